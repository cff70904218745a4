"""What a model may bring along that no program has: sparse gradients, tensors that a step left behind, hooks."""

import pytest
import torch
from torch import nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model
from autosp_aot.errors import BuildError

BATCH = {"tokens": torch.arange(10).reshape(2, 5) % 7}


class Model(nn.Module):
    def __init__(self, sparse: bool = False):
        super().__init__()
        self.embed = nn.Embedding(7, 4, sparse=sparse)

    def forward(self, tokens):
        self.last = self.embed(tokens) * 2
        return self.last.square().sum()


def test_sparse_gradients_are_refused_with_their_line():
    with pytest.raises(BuildError, match=r"error\[layout-unsupported\]") as caught:
        compile_model(Model(sparse=True), BATCH, {"tokens": 1}, BuildConfig(2), "")
    assert f"test_edges.py:{Model.forward.__code__.co_firstlineno + 1}" in str(caught.value)


def test_a_model_that_keeps_what_a_step_computed_is_refused():
    model = Model()
    model(**BATCH)
    with pytest.raises(BuildError, match="the model keeps what a step computed in last"):
        compile_model(model, BATCH, {"tokens": 1}, BuildConfig(2), "")


def test_a_hook_that_runs_when_a_gradient_is_ready_is_refused():
    model = Model()
    model.embed.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(BuildError, match=r"error\[gradient-hook\]: parameter 'embed.weight' has a hook"):
        compile_model(model, BATCH, {"tokens": 1}, BuildConfig(2), "")
