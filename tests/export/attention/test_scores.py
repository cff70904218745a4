"""Masks and scores become expressions that say the same, and attention in canonical form computes the same."""

import json
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Interpreter
from torch.nn.functional import scaled_dot_product_attention

from autosp_aot.errors import BuildError
from autosp_aot.export.attention.attention import canonical_attention
from autosp_aot.export.regions import flat_regions
from autosp_aot.ir.program import map_args
from autosp_aot.ops.table import OURS

INF = math.inf
LOWEST = torch.finfo(torch.float32).min
ATTENTION = torch.ops.autosp.attention.default


class Attention(nn.Module):
    def __init__(self, make_mask):
        super().__init__()
        self.make_mask = make_mask
        self.register_buffer("tril", torch.ones(8, 8, dtype=torch.bool).tril().view(1, 1, 8, 8), persistent=False)
        self.register_buffer("stored", torch.ones(8, 8, dtype=torch.bool).tril())

    def forward(self, q, lengths):
        return scaled_dot_product_attention(q, q, q, attn_mask=self.make_mask(self, q.shape[2], lengths))


class Spelled(Attention):
    def forward(self, q, lengths):
        scores = self.make_mask(self, q @ q.transpose(-1, -2), lengths)
        return scores.softmax(-1) @ q


class Run(Interpreter):
    """The graph with real numbers; attention by its kernel."""

    def call_function(self, target, args, kwargs):
        if target is not ATTENTION:
            return super().call_function(target, args, kwargs)
        *given, scoring = args
        scoring = {name: map_args(value, lambda leaf: leaf) for name, value in json.loads(scoring).items()}
        return OURS["autosp.attention"].kernel(*given, None, 1, 0, **scoring)


def exported(module: nn.Module, length: int = 5):
    with FakeTensorMode(allow_non_fake_inputs=True), flat_regions():
        q, lengths = torch.empty(2, 2, length, 4), torch.empty(2, dtype=torch.long)
        return torch.export.export(module, (q, lengths), strict=False)


def canonical(module: nn.Module, length: int = 5):
    """The rewritten program, how many vectors its one attention reads, and its scoring without the scale."""
    program = exported(module, length)
    canonical_attention(program)
    (node,) = [node for node in program.graph.nodes if node.target is ATTENTION]
    scoring = json.loads(node.args[4])
    return program, len(node.args[3]), {key: value for key, value in scoring.items() if key != "scale"}


def columns(s):
    return torch.arange(s)[None, :]


def rows(s):
    return torch.arange(s)[:, None]


def ones(s):
    return torch.ones(s, s, dtype=torch.bool)


def causal(s):
    return columns(s) <= rows(s)


def through_a_row(_, s, lengths):
    mask = torch.zeros(s, s)
    mask[:, 3] = -INF
    return mask


def through_a_chunk(_, s, lengths):
    mask = torch.zeros(s, s)
    mask.chunk(2)[0].fill_(-1e3)
    return mask


def under_no_grad(_, s, lengths):
    mask = torch.zeros(s, s)
    with torch.no_grad():
        mask[:, 3] = -INF
    return mask


def filled_in_place(_, s, lengths):
    mask = torch.zeros(s, s)
    mask.masked_fill_(columns(s) > rows(s), -INF)
    return mask


CAUSAL = {
    "le of aranges": lambda _, s, n: causal(s),
    "ge flipped": lambda _, s, n: rows(s) >= columns(s),
    "lt of the next row": lambda _, s, n: columns(s) < rows(s) + 1,
    "four dims": lambda _, s, n: causal(s)[None, None],
    "expanded over the batch": lambda _, s, n: causal(s)[None, None].expand(2, 1, s, s),
    "tril of ones": lambda _, s, n: ones(s).tril(),
    "torch.tril of ones": lambda _, s, n: torch.tril(torch.ones(s, s)).bool(),
    "triu of -inf": lambda _, s, n: torch.full((s, s), -INF).triu(1),
    "torch.triu of ones, filled": lambda _, s, n: torch.zeros(s, s).masked_fill(torch.triu(ones(s), 1), -INF),
    "masked_fill": lambda _, s, n: torch.zeros(s, s).masked_fill(columns(s) > rows(s), -INF),
    "masked_fill of not": lambda _, s, n: torch.zeros(s, s).masked_fill(~ones(s).tril(), -INF),
    "where": lambda _, s, n: torch.where(causal(s), 0.0, -INF),
    "where of tensors": lambda _, s, n: torch.where(columns(s) > rows(s), torch.tensor(-INF), torch.tensor(0.0)),
    "the lowest number": lambda _, s, n: torch.where(causal(s), 0.0, LOWEST),
    "one minus, times the lowest": lambda _, s, n: (1.0 - causal(s).float()) * LOWEST,
    "filled in place": filled_in_place,
    "triu_ of -inf": lambda _, s, n: torch.full((s, s), -INF).triu_(1),
    "positions that jump": lambda _, s, n: 3 * columns(s) <= 3 * rows(s) + 2,
    "a buffer, cut": lambda self, s, n: self.tril[:, :, :s, :s],
}
WINDOWS = {
    "of two comparisons": lambda _, s, n: causal(s) & (columns(s) > rows(s) - 3),
    "of a distance": lambda _, s, n: causal(s) & (rows(s) - columns(s) < 3),
    "of triu and tril": lambda _, s, n: ones(s).tril() & ones(s).triu(-2),
}
VECTORS = {
    "padding of the batch": (1, lambda _, s, n: columns(s)[None, None] < n[:, None, None, None]),
    "causal and padding": (1, lambda _, s, n: causal(s) & (columns(s)[None, None] < n[:, None, None, None])),
    "padding on the left": (1, lambda _, s, n: causal(s) & (columns(s)[None, None] >= n[:, None, None, None])),
    "causal and segments": (2, lambda _, s, n: causal(s) & segments(s, n)),
    "a prefix": (1, lambda _, s, n: causal(s) | (columns(s)[None, None] < n[:, None, None, None])),
    "positions of the batch": (1, lambda _, s, n: columns(s)[None, None] <= (rows(s) + n[:, None, None])[:, None]),
    "slopes of the heads": (1, lambda _, s, n: alibi(s) + torch.where(causal(s), 0.0, -INF)),
    "columns out of order": (1, lambda _, s, n: (columns(s) * 2) % s <= rows(s)),
}
POSITIONS = {
    "one above the diagonal": lambda _, s, n: columns(s) <= rows(s) + 1,
    "tril(1)": lambda _, s, n: ones(s).tril(1),
    "triu(2) of -inf": lambda _, s, n: torch.full((s, s), -INF).triu(2),
    "below the diagonal": lambda _, s, n: columns(s) < rows(s),
    "anti-causal": lambda _, s, n: columns(s) >= rows(s),
    "the other way round": lambda _, s, n: torch.where(causal(s), -INF, 0.0),
    "a large number for -inf": lambda _, s, n: torch.where(causal(s), 0.0, -1e4),
    "1 for 0": lambda _, s, n: torch.where(causal(s), 1.0, -INF),
    "a bias by distance": lambda _, s, n: (columns(s) - rows(s)).float(),
    "the lowest number on whole rows": lambda _, s, n: torch.where(columns(s) < rows(s), 0.0, LOWEST),
}
MATRICES = {
    "written through a row": through_a_row,
    "written through a chunk": through_a_chunk,
    "written under no_grad": under_no_grad,
    "sums along both": lambda _, s, n: ones(s).cumsum(0).cumsum(1).float(),
    "a buffer that a checkpoint holds": lambda self, s, n: self.stored[:s, :s],
}
SCORES = {
    "softcap": lambda _, x, n: (torch.tanh(x / 50) * 50).masked_fill(columns(5) > rows(5), -INF),
    "scaled twice": lambda _, x, n: torch.where(causal(5), x * 0.5 / 3, LOWEST),
    "alibi in place": lambda _, x, n: x.mul_(0.5).add_(alibi(5)),
}


def segments(s, n):
    at = torch.arange(s)[None] >= n[:, None]
    return (at[:, :, None] == at[:, None, :])[:, None]


def alibi(s):
    return (torch.tensor([0.5, 0.25])[:, None, None] * torch.arange(s))[None].expand(1, 2, 1, s)


def assert_the_same(module: nn.Module, program) -> None:
    q, lengths = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 4])
    held = {**dict(module.named_buffers()), **program.constants}
    signature = program.graph_signature
    named = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    given = iter((q, lengths))
    names = [node.name for node in program.graph.find_nodes(op="placeholder")]
    inputs = [held[named[name]] if name in named else next(given) for name in names]
    (found,) = Run(program.graph_module).run(*inputs)
    torch.testing.assert_close(found, module(q, lengths), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("spelling", CAUSAL)
def test_the_causal_mask_is_recognised_however_it_is_spelled(spelling):
    program, vectors, scoring = canonical(Attention(CAUSAL[spelling]))
    assert (vectors, scoring) == (0, {"causal": True})
    assert_the_same(Attention(CAUSAL[spelling]), program)


@pytest.mark.parametrize("spelling", WINDOWS)
def test_a_window_is_recognised_however_it_is_spelled(spelling):
    program, vectors, scoring = canonical(Attention(WINDOWS[spelling]))
    assert (vectors, scoring) == (0, {"causal": True, "window": 3})
    assert_the_same(Attention(WINDOWS[spelling]), program)


@pytest.mark.parametrize("make_mask", [lambda _, s, n: ones(s), lambda _, s, n: torch.zeros(1, 1, s, s)])
def test_a_mask_that_lets_everything_through_is_no_mask(make_mask):
    assert canonical(Attention(make_mask))[1:] == (0, {})


@pytest.mark.parametrize("spelling", POSITIONS)
def test_what_depends_on_positions_reads_no_vector(spelling):
    program, vectors, scoring = canonical(Attention(POSITIONS[spelling]))
    assert vectors == 0 and (scoring.get("score") or "window" in scoring)
    assert_the_same(Attention(POSITIONS[spelling]), program)


@pytest.mark.parametrize("spelling", VECTORS)
def test_what_varies_along_queries_or_keys_is_a_vector(spelling):
    count, make_mask = VECTORS[spelling]
    program, vectors, _ = canonical(Attention(make_mask))
    assert vectors == count
    assert_the_same(Attention(make_mask), program)


@pytest.mark.parametrize("spelling", MATRICES)
def test_a_small_mask_of_unknown_make_is_read_as_it_is(spelling):
    program, vectors, _ = canonical(Attention(MATRICES[spelling]))
    assert vectors == 1
    assert_the_same(Attention(MATRICES[spelling]), program)


def test_a_mask_of_very_many_operators_is_read_as_it_is():
    def make_mask(_, s, n):
        mask = torch.where(causal(s), 0.0, -INF)
        for _ in range(300):
            mask = mask + 1e-3
        return mask

    program, vectors, _ = canonical(Attention(make_mask))
    assert vectors == 1
    assert_the_same(Attention(make_mask), program)


class Shared(nn.Module):
    def forward(self, q, lengths):
        q = q.flatten(0, 1)
        return (q @ q[:1].transpose(-1, -2)).softmax(-1) @ q[:1]


def test_keys_that_eager_broadcasts_over_joined_heads_are_one_head():
    program, _, _ = canonical(Shared())
    (attention,) = [node for node in program.graph.nodes if node.target is ATTENTION]
    assert [node.meta["val"].shape[1] for node in attention.args[:3]] == [4, 1, 1]
    assert_the_same(Shared(), program)


class Fewer(nn.Module):
    def forward(self, q, lengths):
        at, key = torch.arange(5)[:, None], torch.arange(2)[None]
        scores = (q @ q[:, :, :2].transpose(-1, -2)).masked_fill((key > at) | (key <= at - 2), -INF)
        return scores.softmax(-1) @ q[:, :, :2]


def test_queries_that_see_nothing_are_nan_where_softmax_makes_them_so():
    program, _, scoring = canonical(Fewer())
    assert scoring["safe"] is False
    assert_the_same(Fewer(), program)


@pytest.mark.parametrize("spelling", SCORES)
def test_attention_spelled_out_is_recognised(spelling):
    program, _, scoring = canonical(Spelled(SCORES[spelling]))
    assert scoring["safe"] is False
    assert_the_same(Spelled(SCORES[spelling]), program)


ANY_LENGTH = {**CAUSAL, **WINDOWS, **POSITIONS}
del ANY_LENGTH["a buffer, cut"]  # it has eight positions


@pytest.mark.parametrize("spelling", ANY_LENGTH)
def test_a_mask_of_any_length_is_recognised_without_being_made(spelling):
    """Made, it would take 40 GB at this length, or more."""
    _, vectors, _ = canonical(Attention(ANY_LENGTH[spelling]), length=200_000)
    assert vectors == 0


@pytest.mark.parametrize("spelling", ["sums along both", "written through a row"])
def test_a_large_mask_of_unknown_make_is_refused_without_being_made(spelling):
    with pytest.raises(BuildError) as caught:
        canonical(Attention(MATRICES[spelling]), length=200_000)
    said = str(caught.value)
    assert said.startswith("error[mask-not-recognised]: an attention mask or bias would need ")
    line = Attention.forward.__code__.co_firstlineno + 1
    assert f"(test_scores.py:{line}); it is made at test_scores.py:{line}\n" in said


class Regularised(nn.Module):
    def forward(self, q, lengths):
        weights = (q @ q.transpose(-1, -2)).softmax(-1)
        return weights @ q + weights.square().sum()


def test_large_weights_that_are_used_twice_are_refused():
    canonical_attention(exported(Regularised()))
    with pytest.raises(BuildError) as caught:
        canonical_attention(exported(Regularised(), length=200_000))
    line = Regularised.forward.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        "error[attention-not-recognised]: the weights of an attention would need 596.0 GiB as a tensor\n"
        f"  where  test_scores.py:{line}\n"
        "  why    they are used for more than a sum of values, or made in a way that is not known\n"
        "  fix    use scaled_dot_product_attention, or weights = softmax(scores) and weights @ values alone, "
        "or a shorter --seq"
    )


def test_a_large_bias_of_scores_spelled_out_is_refused():
    make_scores = lambda _, x, n: x + torch.randn(x.shape[-1], x.shape[-1]).softmax(0)  # noqa: E731
    with pytest.raises(BuildError, match="an attention mask or bias would need 149.0 GiB"):
        canonical(Spelled(make_scores), length=200_000)
