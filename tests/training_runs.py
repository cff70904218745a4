"""Runs of `run`'s loop, ranks as threads, and the same in eager torch over the same micro-batches."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from autosp_aot.artifact.read import read_manifest
from autosp_aot.commands.build.builder import build
from autosp_aot.runtime.comm import Group, Mesh
from autosp_aot.training.data import open_feed
from autosp_aot.training.loop import Training, train
from examples import llama
from tests.threads import on_ranks

ALONE = Group(0, 1, torch.device("cpu"))
VOCABULARY, LENGTH, ROWS = 16, 13, 2


def model(tied: bool = False, dtype: str = "float32") -> nn.Module:
    """A Llama without biases: a gradient that is zero but for rounding is no direction for AdamW."""
    torch.manual_seed(0)
    return llama.build_model(
        dtype, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip


def artifact(model: nn.Module, sp: int, path: Path, **more: Tensor) -> Path:
    """A model built for 2 rows of 13 tokens; `more` are further inputs."""
    build(model, llama.example_batch(ROWS, LENGTH) | more, sp, path, target="cpu", eager_check=False)
    return path


def trained(training: Training, sp: int, feed, held_out=None) -> tuple[list[dict], list[dict[str, Tensor]]]:
    """The metrics that rank 0 wrote, a row a step, and the parameters of every rank."""
    ranks = training.dp * sp

    def rank():
        mesh = Mesh.join("cpu", sp, training.dp) if ranks > 1 else Mesh(ALONE, ALONE)
        return {name: p.detach() for name, p in train(training, feed, mesh, held_out).named_parameters()}

    states = on_ranks(ranks, rank) if ranks > 1 else [rank()]
    return [json.loads(line) for line in training.metrics.read_text().splitlines()], states


def random_tokens(path: Path):
    return open_feed(read_manifest(path).batch, 0, None, None)
