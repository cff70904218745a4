"""Decisions as text: read again they are what was written, and taken again they give the same program."""

import pytest
import torch
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.errors import ArtifactError
from autosp_aot.ir.text import print_program
from autosp_aot.passes.decisions import read, written
from autosp_aot.passes.partition import Partition
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.passes.step import Step
from autosp_aot.sharding.spec import Strategy
from examples import llama, plain
from tests.conftest import TINY

DIMS = {"input_ids": 1, "labels": 1}
STRATEGIES = {
    "a": Strategy(1, ((0, 3), (3, 5))),
    "b": Strategy(0, ((0, 3), (3, 5)), (0, 1), 2),
    "c": Strategy(None, (), (0,)),
    "d": Strategy(2, ((0, 0), (0, 5))),
}
TEXTS = (
    {"cut0": "0:3 3:5", "cut1": "0:0 0:5"},
    {
        "a": "cut factor 1 at cut0",
        "b": "cut factor 0 at cut0 inside 2, summands 0 1",
        "c": "whole, summands 0",
        "d": "cut factor 2 at cut1",
    },
)


def test_decisions_are_written_and_read():
    assert written(STRATEGIES) == TEXTS
    assert read(*TEXTS) == STRATEGIES


@pytest.mark.parametrize("text", ["", "cut", "cut factor x at cut0", "cut factor 1 at cut9", "whole, summands"])
def test_what_was_not_written_so_is_refused(text):
    with pytest.raises(ArtifactError, match="decision-wrong"):
        read({"cut0": "0:3 3:5"}, {"a": text})


def models():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return {"llama": llama.build_model(**small), "plain": plain.build_model(**TINY), "fallback": Distances()}


class Distances(nn.Module):
    """A loss through an operator that has no sharding rule."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)

    def forward(self, input_ids, labels):
        return (torch.cdist(self.embedding(input_ids), self.embedding(labels)) ** 2).mean()


@pytest.mark.parametrize("name", ["llama", "plain", "fallback"])
@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_replay_gives_the_same_program_byte_for_byte(name, ranks):
    batch, config = plain.example_batch(2, 5), BuildConfig(ranks)
    artifact = compile_model(models()[name], batch, DIMS, config, "")
    decisions = read(artifact.manifest.step.cuts, artifact.manifest.step.decisions)
    again = compile_program(artifact.whole, artifact.manifest.sequence_dims, config, decisions)
    assert print_program(again.program) == print_program(artifact.program)
    assert again.decisions == decisions
    assert len(again.fallbacks) == len(artifact.manifest.step.fallbacks)


def test_a_decision_is_taken_although_another_would_be_chosen(tiny2):
    """Without decisions all is computed whole, on every rank."""
    program = Partition(2, {})(Step(tiny2.whole, tiny2.whole, DIMS)).program
    assert all(value.placement.replicated for value in program.values().values())


@pytest.mark.parametrize(("name", "strategy"), [
    ("div", Strategy(7, ((0, 3), (3, 5)))),
    ("div", Strategy(0, ((0, 1), (0, 1)))),
    ("tokens.embedding", Strategy(1, ((0, 3), (3, 5), (5, 5)))),
    ("tokens.embedding", Strategy(partial=(0,))),
    ("no.such.value", Strategy(0, ((0, 1), (1, 2)))),
])  # fmt: skip
def test_a_decision_that_does_not_fit_is_refused(tiny2, name, strategy):
    with pytest.raises(ArtifactError) as caught:
        Partition(2, {name: strategy})(Step(tiny2.whole, tiny2.whole, DIMS))
    assert f"error[decision-wrong]: the recorded decision of {name} cannot be taken again" in str(caught.value)
