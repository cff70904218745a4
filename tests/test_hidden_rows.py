"""Attention at its edges, loss and every gradient against eager, in several blocks: rows that see nothing, parameters
that change no score yet, masks that are written again."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from autosp_aot.targets.table import CPU, TARGETS
from tests.steps import captured, equal_to_eager

S, N, INF = 13, 4, float("inf")
AT, KEY = torch.arange(S)[:, None], torch.arange(S)[None]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(TARGETS, "cpu", replace(CPU, attention_block=4))


class Attention(nn.Module):
    """One layer of attention, made of q, k, v [B, N, S, D], a mask [B, S] of the batch and a parameter by `attend`."""

    def __init__(self, attend, parameter=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.head = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 32)
        self.parameter = None if parameter is None else nn.Parameter(parameter)
        self.attend = attend

    def forward(self, input_ids, labels, mask):
        q, k, v = (part.unflatten(2, (N, 4)).transpose(1, 2) for part in self.qkv(self.embed(input_ids)).chunk(3, 2))
        out = self.attend(q, k, v, mask, self.parameter)
        return cross_entropy(self.head(out.transpose(1, 2).flatten(2)).flatten(0, 1), labels.flatten())


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(32, (2, S), generator=draw) for _ in range(2))
    mask = torch.ones(2, S, dtype=torch.int64)
    mask[0, :5], mask[1, 9:] = 0, 2
    return {"input_ids": ids, "labels": labels, "mask": mask}


def weighted(score):
    """Attention spelled out around what `score` makes of the products."""
    return lambda q, k, v, mask, p: score(q @ k.mT / 2, mask, p).softmax(-1) @ v


def masked(make):
    return lambda q, k, v, mask, p: scaled_dot_product_attention(q, k, v, make(mask, p))


def hidden_by(number: float):
    return weighted(lambda s, mask, p: s + (1.0 - (mask > 0).to(s.dtype))[:, None, None] * number
                    + torch.full((S, S), number, dtype=s.dtype).triu(1))  # fmt: skip


def sink(q, k, v, mask, p):
    scores = (q @ k.mT).masked_fill(KEY >= AT, -INF)
    return torch.cat([scores, p.view(1, N, 1, 1).expand(2, N, S, 1)], -1).softmax(-1)[..., :-1] @ v


def written_after(q, k, v, mask, p):
    bias = torch.zeros(S, S, dtype=q.dtype)
    scores = q @ k.mT + bias
    bias.fill_(3.0).tril_()
    return scores.softmax(-1) @ v + bias.sum() * 0


def written_between(q, k, v, mask, p):
    bias = torch.zeros(S, S, dtype=q.dtype)
    shifted = bias + KEY * 0.1
    bias.fill_(-3.0).tril_()
    return scaled_dot_product_attention(q, k, v, attn_mask=shifted) + scaled_dot_product_attention(q, k, v, bias)


CASES = {
    "a bias of zeros": (weighted(lambda s, mask, p: s + p), torch.zeros(N, S, S)),
    "a bias of zeros by key": (weighted(lambda s, mask, p: s + p), torch.zeros(1, S)),
    "a bias of zeros as a mask": (masked(lambda mask, p: p), torch.zeros(N, S, S)),
    "a table of zeros": (weighted(lambda s, mask, p: s + p[:, (KEY - AT).clamp(-4, 4) + 4]), torch.zeros(N, 9)),
    "a temperature of one": (weighted(lambda s, mask, p: s * p), torch.ones(N, 1, 1)),
    "slopes of zero": (
        weighted(lambda s, mask, p: (s + p * (KEY - AT)).masked_fill(KEY > AT, -INF)), torch.zeros(N, 1, 1),
    ),
    "hidden by -1e4": (hidden_by(-1e4), None),
    "hidden by -1e5": (hidden_by(-1e5), None),
    "hidden by -1e9": (hidden_by(-1e9), None),
    "scores of a thousand": (weighted(lambda s, mask, p: s * 300 + (mask - 1)[:, None, None]), None),
    "a sink beside nothing": (sink, torch.randn(N, generator=torch.Generator().manual_seed(0))),
    "a mask written after its use": (written_after, None),
    "a mask written between its uses": (written_between, None),
    "whole numbers and True": (
        masked(lambda mask, p: ((mask[:, None, None] & torch.ones(S, S, dtype=torch.bool)) > 0) | (KEY == AT)), None,
    ),
    "whole numbers as truths": (
        masked(lambda mask, p: mask[:, None, None].logical_and(torch.ones(S, S, dtype=torch.bool)) | (KEY == AT)), None,
    ),
    "a product added to nothing": (
        lambda q, k, v, mask, p: torch.baddbmm(
            torch.empty(1, S, S, dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.5
        ).view(2, N, S, S).softmax(-1) @ v, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_eager_s_at_any_number_of_ranks(name):
    model = Attention(*CASES[name]).double()
    step = captured(model, batch())
    for ranks in (2, 5):
        equal_to_eager(model, batch(), ranks, step=step)


@pytest.mark.parametrize("number", [-1e4, -1e5, -1e9, torch.finfo(torch.float32).min])
def test_rows_hidden_by_a_number_weigh_keys_alike_in_fp32(number):
    equal_to_eager(Attention(hidden_by(number)), batch(), 3, 1e-5)


def test_half_products_are_rounded_before_numbers_are_added():
    """The lowest fp16 number takes the scores' digits: rows of padding weigh all keys alike."""
    model = Attention(hidden_by(torch.finfo(torch.float16).min)).half()
    compiled = equal_to_eager(model, batch(), 2, 2 * torch.finfo(torch.float16).eps)
    (attention,) = [instr for instr in compiled.whole.instrs() if instr.op == "autosp.attention"]
    assert '("cast", "f16", "s")' in str(dict(attention.kwargs)["score"]).replace("'", '"')
