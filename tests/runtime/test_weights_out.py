"""Weights out: folders that from_pretrained reads, whole or not there."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from autosp_aot.artifact.read import read_manifest, read_recipe
from autosp_aot.commands.build.builder import build
from autosp_aot.errors import AutospError
from autosp_aot.runtime.weights_in import read_weights
from autosp_aot.runtime.weights_out import joined, save_weights
from autosp_aot.training.loop import Training
from tests.architectures import ARCHITECTURES
from tests.sealing import reseal
from tests.training_runs import random_tokens, trained

BATCH = {name: torch.arange(3, 16).view(1, 13) for name in ("input_ids", "labels")}
ROUND_TRIPS = {
    "dense": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "renamed": ("gpt_neox", {}),
    "transposed": ("gpt2", {}),
    "fused": ("phi3", {}),
    "experts": ("mixtral", {}),
    "more experts": ("qwen3_moe", {}),
    "encoder and decoder": ("t5", {}),
}


def model_of(name: str, changes: dict, dtype: torch.dtype):
    """A stock model in the way from_pretrained makes it."""
    known = ARCHITECTURES[name]
    torch.manual_seed(0)
    return known.model._from_config(known.config(**known.options | changes), dtype=dtype)  # buffers stay fp32


def bits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def save(artifact, folder, **options) -> None:
    """Save the weights that the artifact holds."""
    manifest = read_manifest(artifact)
    save_weights(artifact, manifest, read_weights(artifact, manifest, None), folder, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_a_saved_folder_gives_from_pretrained_the_same_bits(tmp_path, kind, dtype):
    name, changes = ROUND_TRIPS[kind]
    model = model_of(name, changes, dtype)
    build(model, BATCH, 1, tmp_path / "a", target="cpu")
    save(tmp_path / "a", tmp_path / "out", shard_bytes=20_000)
    again, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert again.dtype == dtype
    assert torch.equal(bits(again), bits(model))
    model.save_pretrained(tmp_path / "theirs")
    theirs = {file.name for file in (tmp_path / "theirs").iterdir() if file.suffix == ".json"}
    assert "config.json" in theirs
    for file in theirs:
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "theirs" / file).read_text()


class Wrapped(nn.Module):
    """A transformers model inside a module of the user's, with a loss and a parameter of its own."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.net(input_ids).logits * self.scale
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_the_model_inside_of_another_is_what_from_pretrained_finds(tmp_path):
    model = model_of("mixtral", {}, torch.float32)
    build(Wrapped(model), BATCH, 1, tmp_path / "a", target="cpu")
    save(tmp_path / "a", tmp_path / "out")
    again, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert torch.equal(bits(again), bits(model))
    assert told["unexpected_keys"] == {"scale"} and not told["missing_keys"]


@pytest.mark.parametrize("kind", ["dense", "tied", "experts"])
def test_training_goes_from_a_folder_to_a_folder(tmp_path, kind):
    name, changes = ROUND_TRIPS[kind]
    model = model_of(name, changes, torch.float32)
    build(model, BATCH, 2, tmp_path / "a", target="cpu", weights=False)
    model.save_pretrained(tmp_path / "in", max_shard_size=20_000)
    before = bits(model)
    training = Training(tmp_path / "a", 2, init_from=tmp_path / "in", save=tmp_path / "out", metrics=tmp_path / "m")
    rows, ranks = trained(training, 2, random_tokens(tmp_path / "a"))
    model.load_state_dict(ranks[0], strict=False)
    again = type(model).from_pretrained(tmp_path / "out")
    assert len(rows) == 2
    assert torch.equal(bits(again), bits(model))
    assert not torch.equal(bits(again), before)


# --- what is written ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A stock model, and its artifact with weights."""
    model, path = model_of("mixtral", {}, torch.float32), tmp_path_factory.mktemp("artifact") / "a"
    build(model, BATCH, 1, path, target="cpu")
    return model, path


def test_a_model_up_to_the_limit_is_one_file(mixtral, tmp_path):
    save(mixtral[1], tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_larger_one_is_cut_and_has_an_index(mixtral, tmp_path):
    model, artifact = mixtral
    save(artifact, tmp_path / "out", shard_bytes=20_000)
    files = sorted(file.name for file in tmp_path.glob("out/*.safetensors"))
    assert files == [f"model-{at:05}-of-{len(files):05}.safetensors" for at in range(1, len(files) + 1)]
    held = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    count = sum(p.numel() for p in model.parameters())
    assert index == {"metadata": {"total_parameters": count, "total_size": 4 * count}, "weight_map": held}
    assert all((tmp_path / "out" / file).stat().st_size < 20_000 + 4_000 for file in files)


def test_what_is_saved_is_what_init_from_reads(tiny2, tmp_path):
    draw = torch.Generator().manual_seed(0)
    specs = tiny2.manifest.parameters
    weights = {spec.name: torch.rand(spec.shape, generator=draw, dtype=torch.float64) for spec in specs}
    artifact = replace(tiny2, weights=weights).save(tmp_path / "a")
    save(artifact, tmp_path / "out", shard_bytes=300)
    assert not (tmp_path / "out" / "config.json").exists()
    again = read_weights(artifact, read_manifest(artifact), tmp_path / "out")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_a_tensor_that_is_a_part_as_it_lies_is_not_copied(mixtral):
    manifest = read_manifest(mixtral[1])
    weights = read_weights(mixtral[1], manifest, None)
    tensors = read_recipe(mixtral[1], manifest).all_tensors(manifest.parameters)
    assert len(tensors) > 18
    for stored in tensors:
        (piece,) = stored.pieces
        at = weights[piece.name].data_ptr() + 4 * piece.here.offset
        assert joined(stored, weights).data_ptr() == at


# --- where it is written ------------------------------------------------------------------------------------------


def test_weights_that_are_there_are_replaced(mixtral, tmp_path):
    (tmp_path / "out").mkdir()
    save(mixtral[1], tmp_path / "out", shard_bytes=20_000)
    save(mixtral[1], tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors/x", "pytorch_model.bin"])
def test_a_folder_with_anything_else_is_left_alone(mixtral, tmp_path, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(AutospError) as caught:
        save(mixtral[1], tmp_path / "out")
    assert str(caught.value) == (
        f"error[output-exists]: {tmp_path / 'out'} exists and is not a folder of weights alone\n"
        f"  where  {tmp_path / 'out'}\n"
        "  why    only weights and their config are ever replaced\n"
        "  fix    give another folder, or move it away"
    )
    assert file.read_text() == "mine"


@pytest.mark.parametrize("place", [".", "weights", "out/deep"])
def test_a_folder_in_the_artifact_is_refused(full, tmp_path, place):
    path = full.save(tmp_path / "a")
    with pytest.raises(AutospError) as caught:
        save(path, path / place)
    assert str(caught.value) == (
        f"error[output-inside]: {path / place} is in the artifact\n"
        f"  where  {path / place}\n"
        "  why    an artifact holds what its manifest lists and nothing else\n"
        "  fix    give a folder beside the artifact"
    )
    read_manifest(path)


def test_without_a_recipe_nothing_is_written(mixtral, tmp_path):
    path = shutil.copytree(mixtral[1], tmp_path / "a")
    text = json.loads((path / "checkpoint.json").read_text()) | {"refused": "Other: computes", "tensors": []}
    (path / "checkpoint.json").write_text(json.dumps(text))
    reseal(path)
    with pytest.raises(AutospError) as caught:
        save(path, tmp_path / "out")
    assert str(caught.value) == (
        "error[no-recipe]: weights cannot be written as a checkpoint of this model\n"
        f"  where  {path}\n"
        "  why    what transformers does to save it is more than moving elements: Other: computes\n"
        "  fix    train without --save"
    )
    assert os.listdir(tmp_path) == ["a"]
