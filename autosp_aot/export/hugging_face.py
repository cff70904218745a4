"""The recipe of a transformers model: its own conversion on save, run on tensors without storage and watched.

    experts.gate_up_proj --chunk--> clone --chunk--> select 3      experts.3.w1.weight is a view of experts.gate_up_proj
    q, k, v ------------------------------------------> cat        qkv.weight has q, k and v, one after the other

A copy is taken for what it copies, so a view of a copy is a view of the model's tensor. What is joined, or put in a
shape that no view has, is new, of pieces. All else computes something, and then there is no recipe. The builder imports
this file only where transformers is imported already: no model is one of its own otherwise.
"""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import _get_tied_weight_keys

from autosp_aot.artifact.checkpoint_layout import Piece, Place, Recipe, Stored, check_recipe, contiguous, whole
from autosp_aot.artifact.manifest import TensorSpec
from autosp_aot.ir.operators import DTYPES

ATEN = torch.ops.aten
# Buffers that old checkpoints hold and models no longer read: what from_pretrained passes over (modeling_utils.py).
OLD_BUFFERS = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}


def recipe_of(model: nn.Module, parameters: tuple[TensorSpec, ...], aliases: Mapping[str, str]) -> Recipe:
    """How save_pretrained would write the one transformers model that `model` is or holds; empty without one.

    Names are those of the transformers model; `parameters` and `aliases` are the manifest's.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    outer = [(path, m) for path, m in found if not any(path != p and _inside(path, p) for p, _ in found)]
    if len(outer) != 1:
        return Recipe()
    path, inner = outer[0]
    refused = ""
    tensors: tuple[Stored, ...] = ()
    try:
        tensors = _tensors(inner, f"{path}.".removeprefix("."), {spec.name: spec for spec in parameters}, aliases)
        check_recipe(Recipe(tensors=tensors), parameters)
    except (ValueError, RuntimeError) as error:
        refused, tensors = f"{type(inner).__name__}: {error}", ()
    return Recipe(_configs(inner), inner.base_model_prefix, _ignored(inner), refused, tensors)


def _inside(path: str, other: str) -> bool:
    return other == "" or path.startswith(f"{other}.")


def _tensors(
    inner: PreTrainedModel, prefix: str, specs: Mapping[str, TensorSpec], aliases: Mapping[str, str]
) -> tuple[Stored, ...]:
    """The tensors of its checkpoint that are not the model's own under their own names."""
    own = {name: aliases.get(prefix + name, prefix + name) for name in inner.state_dict()}
    moves = Moves()
    given = {name: moves.watch(specs[own[name]]) for name in _written(inner, own)}
    with moves:
        reverted = revert_weight_conversion(inner, given)
    tensors = [Stored(name, tuple(t.shape), moves.pieces(t)) for name, t in reverted.items()]
    return tuple(stored for stored in tensors if stored.name not in specs or stored != whole(specs[stored.name]))


def _written(inner: PreTrainedModel, own: Mapping[str, str]) -> list[str]:
    """Each tensor under the one of its names that save_pretrained keeps (remove_tied_weights_from_state_dict)."""
    names: dict[str, list[str]] = {}
    for name, stored in own.items():
        names.setdefault(stored, []).append(name)
    tied = _get_tied_weight_keys(inner)
    free = lambda name: not any(re.search(pattern, name) for pattern in tied)  # noqa: E731
    return [next(filter(free, same), max(same)) for same in names.values()]


def _configs(inner: PreTrainedModel) -> dict[str, dict]:
    """config.json and generation_config.json as save_pretrained writes them."""
    config = copy.deepcopy(inner.config)
    config.dtype = str(inner.dtype).removeprefix("torch.")
    config.architectures = [type(inner).__name__]
    found = {"config.json": json.loads(config.to_json_string())}
    if inner.can_generate():
        found["generation_config.json"] = json.loads(inner.generation_config.to_json_string())
    return found


def _ignored(inner: PreTrainedModel) -> tuple[str, ...]:
    """Patterns of the names that from_pretrained passes over in a checkpoint."""
    buffers = [name for name, _ in inner.named_buffers()]
    old = {pattern for name, pattern in OLD_BUFFERS.items() if any(buffer.endswith(name) for buffer in buffers)}
    return tuple(sorted(old | set(inner._keys_to_ignore_on_load_unexpected or ())))


class NotMoved(ValueError):
    """A tensor of the checkpoint has elements that are not just the model's."""


class Moves(TorchDispatchMode):
    """While it holds, what is made of watched tensors is known by where its elements come from."""

    def __init__(self):
        super().__init__()
        self.sources: dict[int, tuple[Tensor, str]] = {}
        self.made: dict[int, tuple[Tensor, tuple[Piece, ...]]] = {}

    def watch(self, spec: TensorSpec) -> Tensor:
        """A tensor without storage that stands for one of the model's."""
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta")
        self.sources[_storage(tensor)] = tensor, spec.name
        return tensor

    def pieces(self, tensor: Tensor) -> tuple[Piece, ...]:
        """What it consists of, each piece with its place in the tensor as it is written: contiguous."""
        at = _storage(tensor)
        if at in self.sources and tensor.dtype == self.sources[at][0].dtype:
            sizes = tuple(tensor.shape)
            here = Place(tuple(tensor.stride()), int(tensor.storage_offset()))
            return (Piece(self.sources[at][1], sizes, here, Place(contiguous(sizes))),)
        joined, pieces = self.made.get(at, (tensor, ()))
        if pieces and tensor.is_contiguous() and (tensor.numel(), tensor.dtype) == (joined.numel(), joined.dtype):
            return pieces
        raise NotMoved("a tensor of its checkpoint is not just moved from the model's")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ATEN.clone.default:
            return ATEN.alias.default(args[0])
        if func in (ATEN.view.default, ATEN._unsafe_view.default) and not args[0].is_contiguous():
            apart = torch.empty_like(args[0], memory_format=torch.contiguous_format)
            return self._made(apart.view(args[1]), self.pieces(args[0]))
        result = func(*args, **kwargs or {})
        if func in (ATEN.cat.default, ATEN.stack.default):
            dim = args[1] % result.dim() if len(args) > 1 else 0
            tensors = args[0] if func is ATEN.cat.default else [tensor.unsqueeze(dim) for tensor in args[0]]
            return self._made(result, self._joined(tensors, dim, contiguous(tuple(result.shape))))
        if func._schema.is_mutable:
            raise NotMoved(f"{func} writes to a tensor")
        return result

    def _joined(self, tensors: list[Tensor], dim: int, strides: tuple[int, ...]) -> tuple[Piece, ...]:
        """The pieces of tensors next to each other; what is made of pieces already keeps them only along dim 0."""
        found, start = [], 0
        for tensor in tensors:
            if dim and _storage(tensor) in self.made:
                raise NotMoved("what was joined is joined once more in another dim")
            for piece in self.pieces(tensor):
                there = Place(strides if dim else piece.there.strides, piece.there.offset + start * strides[dim])
                found.append(replace(piece, there=there))
            start += tensor.shape[dim]
        return tuple(found)

    def _made(self, tensor: Tensor, pieces: tuple[Piece, ...]) -> Tensor:
        self.made[_storage(tensor)] = tensor, pieces
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
