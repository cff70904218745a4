"""An operator whose rule is taken away builds all the same, exact, gathered, and listed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosp_aot.commands.build.builder import Captured
from autosp_aot.ops import table
from examples import plain
from tests.steps import captured, equal_to_eager

B, S, H, V = 2, 7, 8, 11


class Various(nn.Module):
    """A decoder's neighbours: lookups, scans, paddings, statistics and a convolution along the sequence."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(V, H), nn.Linear(H, V)
        self.convolution = nn.Conv1d(H, H, 2, groups=H)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        x = x + self.convolution(F.pad(x.transpose(1, 2), (1, 0))).transpose(1, 2)
        x = x + x.cumsum(1) / x.amax(-1, keepdim=True).exp() + torch.cat([x[:, 1:], x[:, :1]], 1)
        x = x * x.topk(3, -1).values.softmax(-1)[..., :1] + x[:, torch.arange(S - 1, -1, -1)].roll(1, 2)
        scores = self.head(x).log_softmax(-1).gather(-1, labels[..., None])
        return -scores.mean() + 1e-2 * x.logsumexp(-1).mean()


DECODER = (
    "aten._log_softmax.default", "aten._log_softmax_backward_data.default", "aten.addmm.default", "aten.add.Tensor",
    "aten.arange.start_step", "aten.embedding.default", "aten.embedding_dense_backward.default", "aten.mm.default",
    "aten.native_layer_norm.default", "aten.native_layer_norm_backward.default", "aten.nll_loss_backward.default",
    "aten.nll_loss_forward.default", "aten.permute.default", "aten.reshape.default", "aten.slice.Tensor",
    "aten.slice_backward.default", "aten.sum.dim_IntList", "autosp.attention", "autosp.attention_backward",
)  # fmt: skip
VARIOUS = (
    "aten._softmax.default", "aten._softmax_backward_data.default", "aten.amax.default", "aten.cat.default",
    "aten.constant_pad_nd.default", "aten.convolution.default", "aten.convolution_backward.default",
    "aten.cumsum.default", "aten.flip.default", "aten.full.default", "aten.gather.default", "aten.index.Tensor",
    "aten.index_put.default", "aten.logsumexp.default", "aten.roll.default", "aten.scatter.src",
    "aten.scatter_add.default", "aten.topk.default",
)  # fmt: skip


@pytest.fixture
def without(monkeypatch):
    """Take the rule of an operator away for the length of a test."""

    def take(op: str) -> None:
        if op in table.OURS:
            monkeypatch.setitem(table.OURS, op, replace(table.OURS[op], rule=None))
        else:
            monkeypatch.setitem(table.RULES, op, lambda call: None)
        table._spec.cache_clear()

    yield take
    table._spec.cache_clear()


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randint(V, (B, S), generator=draw) for name in ("input_ids", "labels")}


@pytest.fixture(scope="module")
def decoder():
    """A model and its step, which is captured without any rule."""
    torch.manual_seed(0)
    model = plain.build_model(V, H, 1, 4, 2, 8, dtype="float64")
    return model, captured(model, batch())


@pytest.fixture(scope="module")
def various():
    torch.manual_seed(0)
    model = Various().double()
    return model, captured(model, batch())


def check(model: nn.Module, step: Captured, op: str, ranks: int) -> None:
    compiled = equal_to_eager(model, batch(), ranks, step=step)
    assert {fallback.op for fallback in compiled.fallbacks} <= {op}
    assert op in {instr.op for instr in compiled.program.instrs()}


@pytest.mark.parametrize("op", DECODER)
def test_a_decoder_without_the_rule_of_one_operator(op, without, decoder):
    without(op)
    check(*decoder, op, 3)


@pytest.mark.parametrize("op", VARIOUS)
def test_other_operators_without_their_rule(op, without, various):
    without(op)
    check(*various, op, 3)
