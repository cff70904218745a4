"""What is said of the tokens that a position follows from is what changes when a token does."""

from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import compile_model, model_values
from autosp_aot.proof.reach import reaches
from autosp_aot.runtime.execute import Executor
from autosp_aot.runtime.simulate import lockstep

V, H, S = 7, 4, 9


class Model(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.table, self.head, self.mix = nn.Embedding(V, H), nn.Linear(H, V), mix
        self.double()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.mix(self.table(ids))).flatten(0, -2), labels.flatten())


def attended(x: Tensor, **options) -> Tensor:
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, **options).transpose(1, 2).flatten(2)


def mask(seen) -> Tensor:
    at = torch.arange(S)
    return seen(at[:, None], at[None])


# What a position of the scores follows from: the first and the last token, relative to its own.
MIXES = {
    "nothing": (lambda x: x, 0, 0),
    "causal": (lambda x: attended(x, is_causal=True), -inf, 0),
    "a causal mask": (lambda x: attended(x, attn_mask=mask(lambda q, k: k <= q)), -inf, 0),
    "a window": (lambda x: attended(x, attn_mask=mask(lambda q, k: (k <= q) & (k > q - 3))), -inf, 0),
    "strictly before": (lambda x: x + attended(x, attn_mask=mask(lambda q, k: k <= q)).cumsum(1), -inf, 0),
    "both ways": (lambda x: attended(x), -inf, inf),
    "a mask both ways": (lambda x: attended(x, attn_mask=mask(lambda q, k: k <= q + 1)), -inf, inf),
    "cumsum": (lambda x: x.cumsum(1), -inf, 0),
    "convolution": (lambda x: F.conv1d(F.pad(x.mT, (2, 0)), torch.ones(H, 1, 3, dtype=x.dtype), groups=H).mT, -2, 0),
    "look-ahead": (lambda x: F.conv1d(F.pad(x.mT, (1, 1)), torch.ones(H, 1, 3, dtype=x.dtype), groups=H).mT, -1, 1),
    "shifted": (lambda x: F.pad(x, (0, 0, 2, 0))[:, :-2] + x, -2, 0),
    "a part": (lambda x: F.pad(x[:, 1:], (0, 0, 0, 1)), 1, 1),
    "mean": (lambda x: x + x.mean(1, keepdim=True), -inf, inf),
    "flipped": (lambda x: x.flip(1), -inf, inf),
    "product": (lambda x: torch.ones(S, S, dtype=x.dtype).tril() @ x, -inf, inf),  # causal, which no rule says
}


@pytest.mark.parametrize("name", MIXES)
def test_a_position_follows_from_these_tokens(name):
    mix, low, high = MIXES[name]
    torch.manual_seed(0)
    model, ids = Model(mix), torch.randint(V, (2, S))
    config = BuildConfig(1, evaluation=False)
    artifact = compile_model(model, {"ids": ids, "labels": ids}, {"ids": 1, "labels": 1}, config, "")
    (loss,) = (instr for instr in artifact.whole.instrs() if instr.op == "aten.nll_loss_forward.default")
    scores, labels, *_ = loss.refs()
    found = reaches(artifact.whole.instrs(), artifact.whole.values(), {"ids": 1, "labels": 1})
    reach = found[scores]
    assert (reach.low, reach.high, reach.inputs) == (low, high, frozenset({"ids"}))
    assert (found[labels].low, found[labels].high, found[labels].inputs) == (0, 0, frozenset({"labels"}))
    values = model_values(model) | artifact.buffers | {"labels": ids, "grad_loss": torch.ones((), dtype=torch.float64)}
    before = scored(artifact.whole, values | {"ids": ids}, scores)
    for token in range(S):
        other = ids.clone()
        other[:, token] = (other[:, token] + 1) % V
        changed = (scored(artifact.whole, values | {"ids": other}, scores) != before).any(-1).view(2, S).any(0)
        places = set(changed.nonzero().flatten().tolist())
        assert places <= {place for place in range(S) if place + low <= token <= place + high}
        if reach.known and 0 <= token - high < S:
            assert token - high in places, "nearer than said"


def scored(whole, values: dict[str, Tensor], name: str) -> Tensor:
    """A value of the unsharded program."""
    values = dict(values)
    lockstep([Executor(whole, 0, torch.device("cpu")).run("step", values)])
    return values[name]
