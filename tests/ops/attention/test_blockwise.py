"""Blockwise attention against the same scores made whole, differentiated by autograd; fp64, blocks of four."""

import random
from dataclasses import replace

import pytest
import torch

from autosp_aot.ir.intervals import HIDDEN
from autosp_aot.ir.score_expr import evaluate
from autosp_aot.ops.attention import blockwise
from autosp_aot.ops.attention.arguments import Dropout, KernelCall, Saved, Scoring
from autosp_aot.ops.attention.block_bounds import blocks_of, ends_of
from autosp_aot.ops.attention.blockwise import blockwise_backward, blockwise_vector_gradient
from autosp_aot.targets.table import CPU, TARGETS

INF = float("inf")
LOWEST = -3e38
CAUSAL = ("aten.le.Tensor", "k", "q")
SEGMENTS = ("aten.eq.Tensor", "v0", "v1")
SCORES = {
    "softcap": ("aten.mul.Tensor", ("aten.tanh.default", ("aten.div.Tensor", "s", 5.0)), 5.0),
    "segments": ("aten.where.ScalarOther", ("aten.__and__.Tensor", CAUSAL, SEGMENTS), "s", -INF),
    "segments, lowest": ("aten.where.ScalarOther", ("aten.__and__.Tensor", CAUSAL, SEGMENTS), "s", LOWEST),
    "added": ("aten.add.Tensor", "s", ("aten.masked_fill.Scalar", ("constant", "f64", LOWEST), SEGMENTS, 0.0)),
    "slopes": ("aten.add.Tensor", "s", ("aten.mul.Tensor", "v2", ("aten.sub.Tensor", "k", "q"))),
    "bias": ("aten.where.ScalarOther", CAUSAL, ("aten.add.Tensor", "s", "v3"), -INF),
    "prefix": ("aten.where.ScalarOther", ("aten.__or__.Tensor", CAUSAL, ("aten.lt.Tensor", "k", "v4")), "s", -INF),
    "nothing seen": ("aten.where.ScalarOther", ("aten.lt.Scalar", "k", 0), "s", -INF),
    "nothing seen, lowest": (
        "aten.where.ScalarOther", ("aten.lt.Tensor", "k", ("aten.sub.Tensor", "q", 5)), "s", LOWEST,
    ),
}  # fmt: skip
B, N, R, T, D = 2, 2, 10, 10, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(TARGETS, "cpu", replace(CPU, attention_block=4))


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def vectors():
    at = torch.arange(R)
    return [
        (at >= 3).long().add(at >= 7).view(1, 1, R, 1), (at >= 3).long().add(at >= 7).view(1, 1, 1, T),
        normal(1, N, 1, 1), normal(1, N, R, T), torch.tensor([2, 6]).view(B, 1, 1, 1),
    ]  # fmt: skip


def weights(q, k, given, scoring):
    """Weights and lse with everything made at once."""
    at, key = torch.arange(R).view(1, 1, -1, 1), torch.arange(T).view(1, 1, 1, -1)
    scores = q @ k.mT * scoring.scale
    if scoring.score is not None:
        leaves = {"s": scores, "q": at, "k": key} | {f"v{n}": vector for n, vector in enumerate(given)}
        scores = evaluate(scoring.score, leaves).expand_as(scores)
    if scoring.causal:
        scores = scores.masked_fill(key > at, -INF)
    if scoring.window is not None:
        scores = scores.masked_fill(key <= at - scoring.window, -INF)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1).nan_to_num(nan=0.0 if scoring.safe else torch.nan), lse


def check(scoring: Scoring, differentiate=()) -> None:
    """Output, lse and gradients are those of scores made whole, also where nothing may depend on values."""
    for traced in (False, True):
        check_one(replace(scoring, traced=traced), differentiate)


def check_one(scoring: Scoring, differentiate) -> None:
    q, k, v, grad_out, grad_lse = normal(B, N, R, D), normal(B, N, T, D), normal(B, N, T, 3), normal(B, N, R, 3), None
    given = vectors()
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v, *(given[at] for at in differentiate))]
    made = [leaves[3 + differentiate.index(at)] if at in differentiate else vector for at, vector in enumerate(given)]
    probabilities, lse = weights(*leaves[:2], made, scoring)
    if scoring.dropout is not None:
        at, key = torch.arange(R).view(1, 1, -1, 1), torch.arange(T).view(1, 1, 1, -1)
        probabilities = probabilities * scoring.dropout.factor(B, N, at, key, torch.float64)
    expected = probabilities @ leaves[2]
    call = KernelCall(q, k, v, given, scoring)
    out, found_lse = blockwise.blockwise(call)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found_lse, lse)
    total = (expected * grad_out).sum()
    if bool(lse.isfinite().all()) and scoring.score != SCORES["nothing seen, lowest"]:
        grad_lse = normal(B, N, R)
        total = total + (lse * grad_lse).sum()
    wanted = torch.autograd.grad(total, leaves)
    saved = Saved(grad_out, out, found_lse, grad_lse)
    grads = [*blockwise_backward(call, saved)]
    grads += [blockwise_vector_gradient(call, saved, at) for at in differentiate]
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want.nan_to_num(nan=0.0))


@pytest.mark.parametrize("name", SCORES)
def test_a_score_expression_is_what_it_says(name):
    check(Scoring(0.7, score=SCORES[name]))


@pytest.mark.parametrize("window", [1, 3, 4, 9, 30])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_hides_all_but_the_last_keys(window, causal):
    check(Scoring(0.7, causal, window))


def test_a_window_and_an_expression_together():
    check(Scoring(0.7, True, 5, SCORES["softcap"]))


@pytest.mark.parametrize(("name", "which"), [("slopes", 2), ("bias", 3)])
def test_vectors_that_train_have_gradients(name, which):
    check(Scoring(0.7, score=SCORES[name]), (which,))


@pytest.mark.parametrize("score", [None, SCORES["segments"]])
def test_dropped_weights_are_those_of_the_position(score):
    check(Scoring(0.7, True, None, score, dropout=Dropout(torch.tensor(3), 1, 0.4, N, R, T, 0)))


def test_rows_that_see_nothing_are_nan_where_softmax_makes_them_so():
    q, k = normal(B, N, R, D), normal(B, N, T, D)
    out, lse = blockwise.blockwise(
        KernelCall(q, k, k, vectors(), Scoring(0.7, score=SCORES["nothing seen"], safe=False))
    )
    assert bool(out.isnan().all()) and bool(lse.isnan().all())


def test_blocks_that_cannot_be_seen_are_not_computed(monkeypatch):
    computed = []
    block = blockwise._Blocks.block

    def seen(self, rows, keys, *rest):
        computed.append((rows, keys))
        return block(self, rows, keys, *rest)

    monkeypatch.setattr(blockwise._Blocks, "block", seen)
    q = normal(1, 1, 12, D)
    at = torch.arange(12) // 4
    given = [at.view(1, 1, -1, 1), at.view(1, 1, 1, -1)]
    scoring = Scoring(1.0, score=("aten.where.ScalarOther", SEGMENTS, "s", -INF))
    blockwise.blockwise(KernelCall(q, q, q, given, scoring))
    assert computed == [(slice(0, 4), slice(0, 4)), (slice(4, 8), slice(4, 8)), (slice(8, 12), slice(8, 12))]


# --- bounds -------------------------------------------------------------------------------------------------------


def truth(rng: random.Random, depth: int):
    """A random condition."""
    if depth == 0 or rng.random() < 0.3:
        compare = rng.choice(["le", "lt", "ge", "gt", "eq", "ne"])
        return (f"aten.{compare}.Tensor", whole(rng), whole(rng))
    if rng.random() < 0.3:
        return (f"aten.{rng.choice(['logical_not', 'bitwise_not'])}.default", truth(rng, depth - 1))
    both = rng.choice(["__and__.Tensor", "__or__.Tensor", "logical_and.default", "bitwise_or.Tensor"])
    return (f"aten.{both}", truth(rng, depth - 1), truth(rng, depth - 1))


def whole(rng: random.Random):
    leaf = rng.choice(["q", "k", "v0", "v1", "v4"])
    return ("aten.add.Tensor", leaf, rng.randint(-4, 4)) if rng.random() < 0.5 else leaf


def number(rng: random.Random, depth: int):
    """A random score."""
    if depth == 0:
        return rng.choice(["s", ("constant", "f64", LOWEST), ("constant", "f64", 0.0), "v2"])
    kind = rng.randrange(5)
    if kind == 0:
        return ("aten.where.self", truth(rng, 2), number(rng, depth - 1), number(rng, depth - 1))
    if kind == 1:
        return (f"aten.{rng.choice(['add', 'sub'])}.Tensor", number(rng, depth - 1), number(rng, depth - 1))
    if kind == 2:
        return ("aten.masked_fill.Scalar", number(rng, depth - 1), truth(rng, 1), LOWEST)
    if kind == 3:
        return ("aten.mul.Tensor", ("cast", "f64", truth(rng, 1)), number(rng, depth - 1))
    return (f"aten.{rng.choice(['tanh', 'neg', 'sigmoid'])}.default", number(rng, depth - 1))


@pytest.mark.parametrize("seed", range(300))
def test_no_block_is_called_hidden_or_plain_that_is_not(seed):
    rng = random.Random(seed)
    score = ("aten.where.self", truth(rng, 2), number(rng, 2), ("constant", "f64", LOWEST))
    given, rows = vectors(), slice(rng.randrange(6), 8)
    cut = [vector[:, :, rows if vector.shape[2] > 1 else slice(None)] for vector in given]
    blocks = [slice(0, 4), slice(4, 8), slice(8, 10)]
    hidden, plain = blocks_of(score, (rows.start, rows.stop - 1), blocks, [ends_of(vector, 4) for vector in cut])
    at, key = torch.arange(R).view(1, 1, -1, 1), torch.arange(T).view(1, 1, 1, -1)
    leaves = {"s": normal(B, N, R, T), "q": at, "k": key} | {f"v{n}": vector for n, vector in enumerate(given)}
    scores = evaluate(score, leaves).expand(B, N, R, T)[:, :, rows]
    for keys, is_hidden, is_plain in zip(blocks, hidden, plain):
        assert not is_hidden or bool((scores[..., keys] <= HIDDEN / 2).all()), score
        assert not is_plain or torch.equal(scores[..., keys], leaves["s"][:, :, rows, keys]), score
