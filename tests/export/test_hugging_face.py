"""The recipe of a transformers model moves to where save_pretrained would: same names, same bits, nothing left."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    PermuteForRope,
    SplitModulelist,
    Transpose,
    WeightConverter,
)

from autosp_aot.artifact.checkpoint_layout import CONFIGS, Recipe, parse_recipe, print_recipe
from autosp_aot.artifact.config import BuildConfig
from autosp_aot.artifact.manifest import TensorSpec
from autosp_aot.commands.build.builder import compile_model, model_values
from autosp_aot.export.canonical.canonical import DTYPES
from autosp_aot.export.fake import weightless
from autosp_aot.export.hugging_face import Moves, NotMoved, recipe_of
from autosp_aot.runtime.weights_out import joined
from tests.architectures import ARCHITECTURES, SMALL


def parameters_of(model: nn.Module) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n, DTYPES[t.dtype], tuple(t.shape)) for n, t in model_values(model).items())


def aliases_of(model: nn.Module) -> dict[str, str]:
    first = {id(p): name for name, p in reversed([*model.named_parameters(), *model.named_buffers()])}
    state = model.state_dict(keep_vars=True)
    return {name: first[id(t)] for name, t in state.items() if first[id(t)] != name}


def found(model: nn.Module) -> Recipe:
    return recipe_of(model, parameters_of(model), aliases_of(model))


def written(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """The checkpoint that the recipe makes of the model."""
    values = model_values(model)
    return {stored.name: joined(stored, values) for stored in recipe.all_tensors(parameters_of(model))}


def assert_as_saved(model, recipe: Recipe, theirs: nn.Module, folder) -> None:
    """What the recipe makes of `model` is what save_pretrained of `theirs` writes."""
    theirs.save_pretrained(folder)
    saved, mine = load_file(folder / "model.safetensors"), written(model, recipe)
    assert mine.keys() == saved.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in saved.items())


def llama(*conversions: WeightConverter) -> LlamaForCausalLM:
    """A model that was loaded from a checkpoint of another layout."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 2}))
    model._weight_conversions = list(conversions)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_recipe_makes_what_save_pretrained_writes(name, tmp_path):
    model = ARCHITECTURES[name].build()
    recipe = found(model)
    assert_as_saved(model, recipe, model, tmp_path)
    configs = {name: json.loads((tmp_path / name).read_text()) for name in CONFIGS if (tmp_path / name).exists()}
    assert recipe.configs == configs
    assert parse_recipe(print_recipe(recipe), parameters_of(model)) == recipe


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_neox", "t5"])
def test_a_model_without_weights_has_the_same_recipe(name):
    with weightless():
        empty = ARCHITECTURES[name].build()
    assert found(empty) == found(ARCHITECTURES[name].build())


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_neox", "gpt2"])
def test_a_model_that_was_loaded_has_the_recipe_of_what_it_was_loaded_from(name, tmp_path):
    model = ARCHITECTURES[name].build()
    model.save_pretrained(tmp_path)
    assert found(type(model).from_pretrained(tmp_path)).tensors == found(model).tensors
    model.save_pretrained(tmp_path, save_original_format=False)
    assert found(type(model).from_pretrained(tmp_path)).tensors == ()


# --- layouts that a checkpoint may have ---------------------------------------------------------------------------

QKV = [f"self_attn.{part}_proj.weight" for part in "qkv"]
DOWN = "mlp.down_proj.weight"
LAYOUTS = {
    "fused in the file": WeightConverter(
        source_patterns="self_attn.qkv.weight", target_patterns=QKV[1:], operations=[Chunk(dim=0)]
    ),
    "fused across": WeightConverter(
        source_patterns="mlp.both.weight", target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        operations=[Chunk(dim=1)],
    ),
    "apart in the file": WeightConverter(
        source_patterns=["self_attn.q.0", "self_attn.q.1"], target_patterns=QKV[0], operations=[Concatenate(dim=1)]
    ),
    "stacked in the file": WeightConverter(
        source_patterns="norms", target_patterns="model.layers.*.input_layernorm.weight",
        operations=[SplitModulelist(dim=0)],
    ),
    "stacked in another dim": WeightConverter(
        source_patterns="norms", target_patterns="model.layers.*.input_layernorm.weight",
        operations=[SplitModulelist(dim=1)],
    ),
    "transposed": WeightConverter(
        source_patterns="mlp.w2", target_patterns=DOWN, operations=[Transpose(0, 1)]
    ),
    "transposed and apart": WeightConverter(
        source_patterns=["mlp.w2", "mlp.w3"], target_patterns=DOWN,
        operations=[Concatenate(dim=0), Transpose(0, 1)],
    ),
    "permuted": WeightConverter(
        source_patterns="self_attn.wq", target_patterns=QKV[0], operations=[PermuteForRope()]
    ),
    "interleaved": WeightConverter(
        source_patterns="mlp.w2", target_patterns=DOWN, operations=[Interleave(dim=1)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_moves_elements_has_a_recipe(layout, tmp_path):
    model = llama(LAYOUTS[layout])
    recipe = found(model)
    assert recipe.refused == ""
    assert {stored.name for stored in recipe.tensors}.isdisjoint(model.state_dict())
    assert_as_saved(model, recipe, model, tmp_path)


class Scale(ConversionOps):
    """Not a move: it computes."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0] * 2}

    @property
    def reverse_op(self):
        return self


class Zero(Scale):
    """Not a move: it writes."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0].zero_()}


class Cast(Scale):
    """Not a move of this model's elements."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0].to(self.dtype)}


class Reinterpret(Scale):
    """Not a move: other numbers with the same bits."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0].view(torch.int32)}


class Half(Scale):
    """Not all of it."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0][:4]}


@pytest.mark.parametrize("operation, why", [
    (Scale(), "a tensor of its checkpoint is not just moved from the model's"),
    (Zero(), "aten.zero_.default writes to a tensor"),
    (Cast(torch.bfloat16), "a tensor of its checkpoint is not just moved from the model's"),
    (Reinterpret(), "a tensor of its checkpoint is not just moved from the model's"),
    (Half(), "a tensor of the model is not made up of pieces"),
])  # fmt: skip
def test_what_does_more_than_move_has_none(operation, why):
    conversion = WeightConverter(source_patterns="mlp.w2", target_patterns=DOWN, operations=[operation])
    recipe = found(llama(conversion))
    assert recipe.refused == f"LlamaForCausalLM: {why}"
    assert recipe.tensors == ()


def test_a_cast_to_its_own_dtype_is_a_move():
    conversion = WeightConverter(source_patterns="mlp.w2", target_patterns=DOWN, operations=[Cast(torch.float32)])
    assert found(llama(conversion)).refused == ""
    assert found(llama(conversion).bfloat16()).refused != ""


# --- any moves at all ---------------------------------------------------------------------------------------------


def move(tensor: Tensor, draw: random.Random) -> Tensor:
    """One step of what a conversion does to a tensor."""
    dim = draw.randrange(tensor.dim())
    size = tensor.shape[dim]
    kind = draw.choice(["transpose", "split", "reshape", "copy", "stack", "join", "select"])
    if kind == "transpose":
        return tensor.transpose(dim, draw.randrange(tensor.dim()))
    if kind == "split" and size % 2 == 0:
        return draw.choice(tensor.chunk(2, dim)).contiguous()
    if kind == "reshape" and size % 2 == 0 and tensor.dim() < 5:
        return tensor.reshape(*tensor.shape[:dim], 2, size // 2, *tensor.shape[dim + 1 :])
    if kind == "reshape":
        return tensor.reshape(tensor.shape[0], -1)
    if kind == "copy":
        return tensor.clone()
    if kind == "stack" and size > 1:
        return torch.stack(tensor.unbind(dim), draw.randrange(tensor.dim()))
    if kind == "join" and size > 1:
        return torch.cat([tensor.narrow(dim, 1, size - 1), tensor.narrow(dim, 0, 1)], dim)
    return tensor.select(dim, draw.randrange(size)) if tensor.dim() > 1 else tensor


def moved(tensor: Tensor, seed: int) -> Tensor:
    draw = random.Random(seed)
    for _ in range(draw.randrange(1, 6)):
        tensor = move(tensor, draw)
    return tensor


def test_the_pieces_of_any_moves_hold_their_elements():
    real, held = torch.arange(192.0).view(4, 6, 8), 0
    for seed in range(400):
        moves = Moves()
        watched = moves.watch(TensorSpec("x", "f32", (4, 6, 8)))
        try:
            with moves:
                pieces = moves.pieces(moved(watched, seed))
        except NotMoved:
            continue
        wanted = moved(real, seed)
        made = torch.full(wanted.shape, -1.0)
        for piece in pieces:
            piece.there.of(made, piece.sizes).copy_(piece.here.of(real, piece.sizes))
        assert torch.equal(made, wanted), seed
        held += 1
    assert held > 200


def test_what_is_cut_up_after_joining_has_none():
    conversion = WeightConverter(
        source_patterns="mlp.both.weight", target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        operations=[Interleave(dim=0), Chunk(dim=0)],
    )  # fmt: skip
    assert found(llama(conversion)).refused.endswith("is not just moved from the model's")


# --- which module it is of ----------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A transformers model in a module of the user's, with a head of its own."""

    def __init__(self):
        super().__init__()
        self.net = llama()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.net(input_ids).logits * self.scale
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_names_are_those_of_the_transformers_model_inside(tmp_path):
    model = Wrapped()
    recipe = found(model)
    mine = written(model, recipe)
    model.net.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert mine.keys() == {*saved, "scale"}
    assert all(torch.equal(mine[name], tensor) for name, tensor in saved.items())


def test_of_two_models_side_by_side_there_is_no_recipe():
    model = nn.ModuleDict({"teacher": llama(), "student": llama()})
    assert found(model) == Recipe()


def test_other_models_have_none(tiny):
    assert tiny.recipe == Recipe()


def test_the_build_records_it():
    torch.manual_seed(0)
    batch = {name: torch.arange(3, 16).view(1, 13) for name in ("input_ids", "labels")}
    artifact = compile_model(Wrapped(), batch, dict.fromkeys(batch, 1), BuildConfig(2), "")
    assert artifact.recipe == found(Wrapped())
