"""Folders that save_pretrained writes, in every layout and dtype: read to the bit, or refused with all offenders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build
from autosp_aot.errors import ArtifactError
from autosp_aot.runtime.comm import Group
from autosp_aot.runtime.load import load
from autosp_aot.runtime.weights_in import read_weights
from tests.architectures import ARCHITECTURES
from tests.sealing import reseal

CPU = torch.device("cpu")
BATCH = {name: torch.arange(3, 16).view(1, 13) for name in ("input_ids", "labels")}


def model_of(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    known = ARCHITECTURES[name]
    torch.manual_seed(seed)
    return known.model._from_config(known.config(**known.options | changes), dtype=dtype)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Artifacts by architecture, each built when it is first asked for, without weights."""
    folder, known = tmp_path_factory.mktemp("artifacts"), {}

    def of(name: str, dtype: torch.dtype = torch.float32, **changes):
        key = f"{name} {dtype} {changes}"
        if key not in known:
            model = model_of(name, dtype=dtype, **changes)
            build(model, BATCH, 1, folder / key, target="cpu", weights=False)
            known[key] = read_manifest(folder / key)
        return folder / key, known[key]

    return of


def refusal(artifact, manifest, folder) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_weights(artifact, manifest, folder)
    return str(caught.value)


def assert_holds(values, model: nn.Module) -> None:
    """What was read are the model's own tensors."""
    state = model.state_dict()
    assert values and all(torch.equal(state[name], tensor) for name, tensor in values.items())


@pytest.mark.parametrize("name, changes", [
    ("llama", {}), ("llama", {"tie_word_embeddings": True}), ("mixtral", {}), ("qwen3_moe", {}), ("gpt2", {}),
    ("gpt_neox", {}), ("phi3", {}), ("t5", {}),
])  # fmt: skip
def test_a_folder_gives_the_loss_of_its_model(built, tmp_path, name, changes):
    model = model_of(name, seed=1, **changes)
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    artifact, manifest = built(name, **changes)
    assert_holds(read_weights(artifact, manifest, tmp_path), model)
    module = load(artifact, tmp_path, comm=Group(0, 1, CPU))
    torch.testing.assert_close(module(**BATCH), model(**BATCH).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("held, wanted", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32),
    (torch.float16, torch.bfloat16),
])  # fmt: skip
def test_values_are_cast_as_from_pretrained_casts_them(built, tmp_path, held, wanted):
    model = model_of("mixtral", seed=1, dtype=torch.float64).to(held)
    model.save_pretrained(tmp_path)
    artifact, manifest = built("mixtral", wanted)
    assert_holds(read_weights(artifact, manifest, tmp_path), type(model).from_pretrained(tmp_path, dtype=wanted))


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_names_may_lack_the_prefix_of_the_base_model(built, tmp_path, name):
    model = model_of(name, seed=1)
    model.save_pretrained(tmp_path)
    file, prefix = tmp_path / "model.safetensors", f"{model.base_model_prefix}."
    tensors = {key.removeprefix(prefix): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    artifact, manifest = built(name)
    assert_holds(read_weights(artifact, manifest, tmp_path), model)


def test_a_base_model_has_names_of_the_whole_one(tmp_path):
    whole, inner = model_of("llama", seed=1), model_of("llama").model
    whole.save_pretrained(tmp_path / "whole")
    held = load_file(tmp_path / "whole/model.safetensors")
    del held["lm_head.weight"]
    save_file(held, tmp_path / "held.safetensors")
    build(Summed(inner), {"input_ids": BATCH["input_ids"]}, 1, tmp_path / "a", target="cpu", weights=False)
    values = read_weights(tmp_path / "a", read_manifest(tmp_path / "a"), tmp_path / "held.safetensors")
    assert_holds(values, Summed(whole.model))


class Summed(nn.Module):
    """A base model with a loss of the user's."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.net(input_ids).last_hidden_state.square().mean()


def test_what_from_pretrained_passes_over_is_passed_over(built, tmp_path):
    model = model_of("gpt2", seed=1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"transformer.h.0.attn.bias": torch.ones(4)}, file)
    artifact, manifest = built("gpt2")
    assert_holds(read_weights(artifact, manifest, tmp_path), model)


def test_the_modules_own_layout_is_read_too(built, tmp_path):
    model = model_of("mixtral", seed=1)
    model.save_pretrained(tmp_path, save_original_format=False)
    artifact, manifest = built("mixtral")
    assert_holds(read_weights(artifact, manifest, tmp_path), model)


def test_a_tensor_in_two_layouts_is_refused(built, tmp_path):
    model = model_of("mixtral")
    model.save_pretrained(tmp_path)
    down = "model.layers.0.mlp.experts.down_proj"
    save_file({down: model.state_dict()[down]}, tmp_path / "more.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "most.safetensors")
    assert f"why    {down} is there whole, and in parts too\n" in refusal(*built("mixtral"), tmp_path)


def test_a_folder_of_another_architecture_is_refused_with_all_that_is_wrong(built, tmp_path):
    model_of("qwen3_moe", vocab_size=65).save_pretrained(tmp_path, max_shard_size=20_000)
    assert refusal(*built("mixtral"), tmp_path) == (
        "error[weights-mismatch]: the weights are not this model's\n"
        f"  where  {tmp_path}\n"
        "  why    model.layers.0.block_sparse_moe.experts.{0-5}.w1.weight is missing\n"
        "         model.layers.0.block_sparse_moe.experts.{0-5}.w3.weight is missing\n"
        "         model.layers.0.block_sparse_moe.experts.{0-5}.w2.weight is missing\n"
        "         lm_head.weight is f32 [65, 32], the model's is f32 [64, 32]\n"
        "         model.embed_tokens.weight is f32 [65, 32], the model's is f32 [64, 32]\n"
        "         model.layers.0.mlp.experts.{0-5}.down_proj.weight is not the model's\n"
        "         model.layers.0.mlp.experts.{0-5}.gate_proj.weight is not the model's\n"
        "         model.layers.0.mlp.experts.{0-5}.up_proj.weight is not the model's\n"
        "         model.layers.0.self_attn.k_norm.weight is not the model's\n"
        "         model.layers.0.self_attn.q_norm.weight is not the model's\n"
        "  fix    give weights saved from the model that was built"
    )


def test_only_the_single_file_of_a_folder_is_read_where_there_is_one(built, tmp_path):
    model = model_of("llama", seed=1)
    model.save_pretrained(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    artifact, manifest = built("llama")
    assert_holds(read_weights(artifact, manifest, tmp_path), model)


def test_integers_are_not_cast(built, tmp_path):
    model = model_of("llama")
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(values | {"lm_head.weight": values["lm_head.weight"].to(torch.int32)}, tmp_path / "w.safetensors")
    assert "lm_head.weight is i32 [64, 32], the model's is f32 [64, 32]\n" in refusal(*built("llama"), tmp_path)


def test_where_the_build_found_no_recipe_it_is_said(built, tmp_path):
    artifact, _ = built("mixtral")
    text = (artifact / "checkpoint.json").read_text()
    recipe = json.loads(text) | {"refused": "Other: computes", "tensors": []}
    model_of("mixtral").save_pretrained(tmp_path / "weights")
    shutil.copytree(artifact, tmp_path / "a")
    (tmp_path / "a" / "checkpoint.json").write_text(json.dumps(recipe))
    reseal(tmp_path / "a")
    said = refusal(tmp_path / "a", read_manifest(tmp_path / "a"), tmp_path / "weights")
    assert "names can only be those of the module: no recipe was found at build (Other: computes)\n" in said
