"""Weights out: a folder as save_pretrained writes it, by the artifact's recipe.

    model.safetensors                                              up to 5 GB
    model-00001-of-00002.safetensors, model.safetensors.index.json     above
    config.json, generation_config.json                            as they were at build, of a transformers model
"""

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from autosp_aot.artifact.atomic_folder import replacing
from autosp_aot.artifact.checkpoint_layout import CONFIGS, Stored
from autosp_aot.artifact.manifest import Manifest, TensorSpec
from autosp_aot.artifact.read import read_recipe
from autosp_aot.errors import AutospError, Problem
from autosp_aot.ir.program import ITEMSIZE

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save_weights(
    artifact: str | Path,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's tensors (`state_dict()` of its module, on any device) so that from_pretrained reads them.

    Call it on one rank, with the `manifest` of the loaded module. `shard_bytes` is the most that a file holds. A tied
    weight is written once. A model that is no transformers model has no config, and the names of its state dict. What
    has to be put together, or comes from another device, is copied, a file at a time; all else is written as it lies.
    The folder is whole or not there. Raises what `refuse_saving` does, and `output-unwritable`.
    """
    artifact, folder = Path(artifact), Path(folder)
    refuse_saving(artifact, manifest, folder)
    recipe = read_recipe(artifact, manifest)
    specs = {spec.name: spec for spec in manifest.parameters}
    shards = _shards(recipe.all_tensors(specs.values()), specs, shard_bytes)
    names = [f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    with replacing(folder) as made:
        for name, config in recipe.configs.items():
            (made / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, shard in zip(names, shards):
            save_file({stored.name: joined(stored, tensors) for stored in shard}, made / name, {"format": "pt"})
            (made / name).chmod(0o644)  # safetensors makes it readable for its owner only
        if len(shards) > 1:
            (made / INDEX).write_text(_index(names, shards, specs), encoding="utf-8")


def refuse_saving(artifact: Path, manifest: Manifest, folder: Path) -> None:
    """Raise AutospError where `save_weights` could not write: `no-recipe`, `output-exists`, `output-inside`."""
    recipe = read_recipe(artifact, manifest)
    problems = []
    if recipe.refused:
        problems.append(Problem("no-recipe", "weights cannot be written as a checkpoint of this model", str(artifact),
                                f"what transformers does to save it is more than moving elements: {recipe.refused}",
                                "train without --save"))  # fmt: skip
    whole = artifact.resolve()
    if whole in (folder.resolve(), *folder.resolve().parents):
        problems.append(Problem("output-inside", f"{folder} is in the artifact", str(folder),
                                "an artifact holds what its manifest lists and nothing else",
                                "give a folder beside the artifact"))  # fmt: skip
    elif folder.exists() and not (folder.is_dir() and all(map(_replaceable, folder.iterdir()))):
        problems.append(Problem("output-exists", f"{folder} exists and is not a folder of weights alone", str(folder),
                                "only weights and their config are ever replaced",
                                "give another folder, or move it away"))  # fmt: skip
    if problems:
        raise AutospError(*problems)


def _replaceable(file: Path) -> bool:
    return file.is_file() and (file.name in (*CONFIGS, INDEX) or OURS.fullmatch(file.name) is not None)


def _shards(tensors: list[Stored], specs: Mapping[str, TensorSpec], limit: int) -> list[list[Stored]]:
    """The tensors in their order, as many to a shard as its size allows, at least one."""
    shards: list[list[Stored]] = [[]]
    size = 0
    for stored in tensors:
        size += _nbytes(stored, specs)
        if size > limit and shards[-1]:
            shards.append([])
            size = _nbytes(stored, specs)
        shards[-1].append(stored)
    return shards


def _nbytes(stored: Stored, specs: Mapping[str, TensorSpec]) -> int:
    return prod(stored.shape) * ITEMSIZE[specs[stored.pieces[0].name].dtype]


def joined(stored: Stored, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor of the checkpoint in host memory: the model's own where it is one, as it lies or copied."""
    parts = [(piece, tensors[piece.name].detach().contiguous()) for piece in stored.pieces]
    piece, source = parts[0]
    if len(parts) == 1 and piece.here.strides == piece.there.strides and piece.sizes == stored.shape:
        return piece.here.of(source, piece.sizes).cpu()
    made = torch.empty(stored.shape, dtype=source.dtype)
    for piece, source in parts:
        piece.there.of(made, piece.sizes).copy_(piece.here.of(source, piece.sizes))
    return made


def _index(names: list[str], shards: list[list[Stored]], specs: Mapping[str, TensorSpec]) -> str:
    """Which file holds which tensor."""
    every = [stored for shard in shards for stored in shard]
    total = {
        "total_parameters": sum(prod(stored.shape) for stored in every),
        "total_size": sum(_nbytes(stored, specs) for stored in every),
    }
    where = {stored.name: name for name, shard in zip(names, shards) for stored in shard}
    return json.dumps({"metadata": total, "weight_map": where}, indent=2, sort_keys=True) + "\n"
