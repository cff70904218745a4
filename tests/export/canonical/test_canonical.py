"""The canonical form of what is spelled in many ways, and what has none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import build, compile_model, model_values
from autosp_aot.errors import BuildError
from autosp_aot.runtime.simulate import simulate
from tests.eager import difference, eager

BATCH = {"tokens": torch.arange(10).reshape(2, 5) % 7}


class Model(nn.Module):
    """An embedding, and a loss made of it by a function."""

    def __init__(self, loss, dtype=torch.float64, batch: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.loss = nn.Embedding(7, 4, dtype=dtype), loss
        self.memory = nn.Parameter(torch.randn(batch, 2, 5, 2, dtype=dtype))

    def forward(self, tokens):
        return self.loss(self.embed(tokens), tokens, self.memory)


def built(loss, **options):
    return compile_model(Model(loss, **options), BATCH, {"tokens": 1}, BuildConfig(3), "")


def error(loss, **options) -> float:
    """The worst difference from eager of any rank's loss and gradients."""
    model, artifact = Model(loss, **options), built(loss, **options)
    reference = eager(model, BATCH)
    inputs = {name: p.detach() for name, p in model.named_parameters()} | BATCH | artifact.buffers
    programs = [artifact.program.for_rank(rank) for rank in range(3)]
    return max(
        difference(reference, r["loss"], {n.removeprefix("grad."): g for n, g in r.items() if n != "loss"})
        for r in simulate(programs, inputs, torch.ones_like(reference[0]))
    )


LOSSES = {
    "one_hot": lambda x, t, m: (F.one_hot(t, 7).to(x.dtype).mean() * x).sum(),
    "select": lambda x, t, m: (x[:, 0] * x[:, -1]).sum() + x.unbind(-1)[1].mean(),
    "one part": lambda x, t, m: x.unsafe_chunk(1, -1)[0].sin().sum() + torch.unsafe_split_with_sizes(x, [2])[0].sum(),
    "list of one": lambda x, t, m: torch._foreach_sin([x])[0].sum(),
    "logsumexp": lambda x, t, m: torch.logsumexp(x, -1).pow(2).mean(),
    "stack": lambda x, t, m: torch.stack([x, 2 * x], 1).pow(2).mean(),
    "shared head": lambda x, t, m: scaled_dot_product_attention(
        x.view(2, 5, 2, 2).transpose(1, 2), m[:, :1], m[:, :1], is_causal=True
    ).sum(),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_and_gradients_equal_eager_s(name):
    assert error(LOSSES[name]) <= 1e-12


def test_a_mean_in_half_precision_does_not_overflow_on_the_way():
    model = Model(lambda x, t, m: (x * 0 + 60000).mean(), dtype=torch.float16)
    artifact = built(model.loss, dtype=torch.float16)
    inputs = {name: p.detach() for name, p in model.named_parameters()} | BATCH
    programs = [artifact.program.for_rank(rank) for rank in range(3)]
    for result in simulate(programs, inputs, torch.ones((), dtype=torch.float16)):
        assert result["loss"] == model(**BATCH)


def test_floats_of_eight_bits_are_refused_with_their_line():
    with pytest.raises(BuildError, match=r"error\[dtype-unsupported\]") as caught:
        built(lambda x, t, m: x.to(torch.float8_e4m3fn).to(x.dtype).sum())
    assert "torch.float8_e4m3fn" in str(caught.value)


def heads(x):
    return x.view(2, 5, 2, 2).transpose(1, 2)


def test_keys_are_shared_by_the_batch_as_eager_does_it():
    assert error(lambda x, t, m: scaled_dot_product_attention(heads(x), m, m).pow(2).sum(), batch=1) <= 1e-12
    assert error(lambda x, t, m: ((heads(x) @ m.mT).softmax(-1) @ m).pow(2).sum(), batch=1) <= 1e-12


def test_causal_attention_of_more_queries_than_keys_begins_at_the_first():
    assert error(lambda x, t, m: scaled_dot_product_attention(
        heads(x), m[:, :, :4], m[:, :, :4], is_causal=True).sum()) <= 1e-12


def test_tensors_made_of_literals_are_stored_with_the_artifact():
    def loss(x, tokens, memory):
        shifted = x.clone()
        shifted[:, 0] = 0.25
        return (shifted * torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=x.dtype)).square().mean() + memory.mean()

    stored = sorted(tuple(value.shape) for value in built(loss).buffers.values())
    assert stored == [(), (4,)]
    assert error(loss) <= 1e-12


class OfIntegers(nn.Module):
    """What integers become where a float is asked for is the default dtype."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, input_ids, labels):
        x = self.tokens(input_ids) + (input_ids / 16).sin()[..., None] + torch.full((8,), 0.1)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_a_program_computes_the_same_whatever_the_default_dtype_is():
    tokens = torch.arange(8).view(2, 4)
    batch = {"input_ids": tokens, "labels": tokens}
    torch.set_default_dtype(torch.float64)
    try:
        model = OfIntegers()
        artifact = build(model, batch, 2, target="cpu")
        expected = model(**batch)
    finally:
        torch.set_default_dtype(torch.float32)
    values = batch | artifact.buffers | model_values(model)
    tangent = torch.ones((), dtype=torch.float64)
    results = simulate([artifact.program.for_rank(rank) for rank in range(2)], values, tangent)
    assert abs(results[0]["loss"] - expected) < 1e-14
