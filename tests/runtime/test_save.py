"""Weights out: folders that from_pretrained reads, whole or not there."""

from dataclasses import replace

import pytest
import torch

from autosp_aot.builder import build
from autosp_aot.runtime.checkpoint import read_weights
from autosp_aot.runtime.save import save_weights
from tests.architectures import ARCHITECTURES

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_a_saved_folder_gives_from_pretrained_the_same_bits(tmp_path, kind, dtype):
    name, changes = ROUND_TRIPS[kind]
    model = model_of(name, changes, dtype)
    artifact = build(model, BATCH, 1, tmp_path / "a", target="cpu")
    weights = read_weights(tmp_path / "a", replace(artifact.manifest, files={"weights/model.safetensors": ""}), None)
    save_weights(tmp_path / "a", artifact.manifest, weights, tmp_path / "out", shard_bytes=20_000)
    again, told = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert again.dtype == dtype
    assert torch.equal(bits(again), bits(model))
    model.save_pretrained(tmp_path / "theirs")
    theirs = {file.name for file in (tmp_path / "theirs").iterdir() if file.suffix == ".json"}
    assert "config.json" in theirs
    for file in theirs:
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "theirs" / file).read_text()
