import math
import time

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from autosp_aot.errors import BuildError
from autosp_aot.export.attention import SDPA, canonical_attention
from autosp_aot.export.masks import constants_of, evaluate, says_all, says_causal

INF = math.inf


class Attention(nn.Module):
    def __init__(self, make_mask):
        super().__init__()
        self.make_mask = make_mask

    def forward(self, q, lengths):
        return scaled_dot_product_attention(q, q, q, attn_mask=self.make_mask(q.shape[2], lengths))


def exported(make_mask, length: int = 5):
    mode = FakeTensorMode()
    with mode:
        q, lengths = torch.empty(2, 2, length, 4), torch.empty(2, dtype=torch.long)
        return torch.export.export(Attention(make_mask), (q, lengths), strict=False)


def mask_of(program):
    mask = next(node for node in program.graph.nodes if node.target is SDPA).args[3]
    return evaluate(mask, constants_of(program))


def columns(s):
    return torch.arange(s)[None, :]


def rows(s):
    return torch.arange(s)[:, None]


def ones(s):
    return torch.ones(s, s, dtype=torch.bool)


def through_a_row(s, _):
    mask = torch.zeros(s, s)
    mask[:, 3] = -INF
    return mask


def through_a_chunk(s, _):
    mask = torch.zeros(s, s)
    mask.chunk(2)[0].fill_(-INF)
    return mask


def under_no_grad(s, _):
    mask = torch.zeros(s, s)
    with torch.no_grad():
        mask[:, 3] = -INF
    return mask


def filled_in_place(s, _):
    mask = torch.zeros(s, s)
    mask.masked_fill_(columns(s) > rows(s), -INF)
    return mask


CAUSAL = {
    "le of aranges": lambda s, _: columns(s) <= rows(s),
    "ge flipped": lambda s, _: rows(s) >= columns(s),
    "lt of the next row": lambda s, _: columns(s) < rows(s) + 1,
    "four dims": lambda s, _: (columns(s) <= rows(s))[None, None],
    "expanded over the batch": lambda s, _: (columns(s) <= rows(s))[None, None].expand(2, 1, s, s),
    "tril of ones": lambda s, _: ones(s).tril(),
    "torch.tril of ones": lambda s, _: torch.tril(torch.ones(s, s)).bool(),
    "triu of -inf": lambda s, _: torch.full((s, s), -INF).triu(1),
    "torch.triu of ones, filled": lambda s, _: torch.zeros(s, s).masked_fill(torch.triu(ones(s), 1), -INF),
    "masked_fill": lambda s, _: torch.zeros(s, s).masked_fill(columns(s) > rows(s), -INF),
    "masked_fill of not": lambda s, _: torch.zeros(s, s).masked_fill(~ones(s).tril(), -INF),
    "where": lambda s, _: torch.where(columns(s) <= rows(s), 0.0, -INF),
    "where of tensors": lambda s, _: torch.where(columns(s) > rows(s), torch.tensor(-INF), torch.tensor(0.0)),
    "filled in place": filled_in_place,
    "triu_ of -inf": lambda s, _: torch.full((s, s), -INF).triu_(1),
    "positions that jump": lambda s, _: 3 * columns(s) <= 3 * rows(s) + 2,
}
OTHER = {
    "window": lambda s, _: (columns(s) <= rows(s)) & (columns(s) > rows(s) - 3),
    "below the diagonal": lambda s, _: columns(s) < rows(s),
    "one above the diagonal": lambda s, _: columns(s) <= rows(s) + 1,
    "tril(-1)": lambda s, _: ones(s).tril(-1),
    "tril(1)": lambda s, _: ones(s).tril(1),
    "triu(2) of -inf": lambda s, _: torch.full((s, s), -INF).triu(2),
    "anti-causal": lambda s, _: columns(s) >= rows(s),
    "anti-causal triu": lambda s, _: ones(s).triu(),
    "the other way round": lambda s, _: torch.where(columns(s) <= rows(s), -INF, 0.0),
    "a large number for -inf": lambda s, _: torch.where(columns(s) <= rows(s), 0.0, -1e4),
    "1 for 0": lambda s, _: torch.where(columns(s) <= rows(s), 1.0, -INF),
    "padding of the batch": lambda s, lengths: columns(s)[None, None] < lengths[:, None, None, None],
    "causal and padding": lambda s, n: (columns(s) <= rows(s)) & (columns(s)[None, None] < n[:, None, None, None]),
    "positions of the batch": lambda s, n: columns(s)[None, None] <= (rows(s) + n[:, None, None])[:, None],
    "columns out of order": lambda s, _: (columns(s) * 2) % s <= rows(s),
    "written through a row": through_a_row,
    "written through a chunk": through_a_chunk,
    "written under no_grad": under_no_grad,
    "sums along both": lambda s, _: ones(s).cumsum(0).cumsum(1).float(),
    "a bias by distance": lambda s, _: (columns(s) - rows(s)).float(),
}


@pytest.mark.parametrize("spelling", CAUSAL)
def test_the_causal_mask_is_recognised_however_it_is_spelled(spelling):
    assert says_causal(mask_of(exported(CAUSAL[spelling])))


@pytest.mark.parametrize("spelling", OTHER)
def test_what_is_not_the_causal_mask_is_not_taken_for_it_and_refused(spelling):
    program = exported(OTHER[spelling])
    said = mask_of(program)
    assert not says_causal(said) and not says_all(said)
    with pytest.raises(BuildError, match="mask-not-recognised"):
        canonical_attention(program)


@pytest.mark.parametrize("made", [lambda s, _: ones(s), lambda s, _: torch.zeros(1, 1, s, s)])
def test_a_mask_that_lets_everything_through_is_no_mask(made):
    assert says_all(mask_of(exported(made)))


@pytest.mark.parametrize("spelling", ["le of aranges", "tril of ones", "triu of -inf", "masked_fill", "where"])
def test_a_mask_of_any_length_is_recognised_without_being_made(spelling):
    program = exported(CAUSAL[spelling], length=200_000)
    started = time.perf_counter()
    assert says_causal(mask_of(program))
    assert time.perf_counter() - started < 0.9


@pytest.mark.parametrize("spelling", ["window", "sums along both", "written through a row"])
def test_an_unknown_mask_of_any_length_is_refused_without_being_made(spelling):
    program = exported(OTHER[spelling], length=200_000)
    with pytest.raises(BuildError) as caught:
        canonical_attention(program)
    assert "the attention mask is not recognised" in str(caught.value)
