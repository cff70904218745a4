"""Draws by position: known answers, the same bits for every part, and the distribution."""

import pytest
import torch

from autosp_aot.ops import random
from autosp_aot.ops.random import keep, step_seed, uniform

# The first numbers of SplitMix64 with state 1234567, as the reference implementation of Vigna gives them (Rosetta Code,
# "Pseudo-random numbers/Splitmix64").
KNOWN = [
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
]  # fmt: skip
SEED = step_seed(0, 0)
COUNT = 1_000_000


def test_the_stream_is_splitmix64():
    numbers = random._stream(torch.tensor(1234567), torch.arange(5))
    assert [number % 2**64 for number in numbers.tolist()] == KNOWN


def test_blocks_do_not_show(monkeypatch):
    whole = uniform(SEED, 3, (7, 11, 5), (), torch.float64)
    for size in (1, 4, 55, 100):
        monkeypatch.setattr(random, "BLOCK", size)
        assert torch.equal(uniform(SEED, 3, (7, 11, 5), (), torch.float64), whole)
        assert torch.equal(uniform(SEED, 3, (7, 11, 5), (1, 1, 2, 9), torch.float64), whole[:, 2:9])


def test_a_box_inside_outer_parts_is_that_of_the_whole():
    whole = uniform(SEED, 0, (6, 4), (), torch.float32)
    assert torch.equal(uniform(SEED, 0, (6, 4), (0, 2, 1, 3), torch.float32), whole[[1, 2, 4, 5]])
    assert uniform(SEED, 0, (6, 4), (0, 2, 1, 1), torch.float32).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_draws_are_uniform_in_every_dtype(dtype):
    drawn = uniform(SEED, 1, (COUNT,), (), dtype).double()
    step = torch.finfo(dtype).eps / 2
    assert drawn.min() >= 0 and drawn.max() < 1 and torch.equal(drawn / step, (drawn / step).round())
    counts = torch.histc(drawn, 64, 0, 1)
    assert _chi_square(counts, torch.full((64,), COUNT / 64)) < 4
    assert abs(drawn.mean() + step / 2 - 0.5) < 0.0015  # five standard deviations


@pytest.mark.parametrize("other", [(SEED, 1), (step_seed(0, 1), 0), (step_seed(1, 0), 0)], ids=["site", "step", "seed"])
def test_another_site_step_or_seed_draws_independently(other):
    a, b = (uniform(*which, (COUNT,), (), torch.float32) for which in ((SEED, 0), other))
    counts = torch.histogramdd(torch.stack([a, b], 1), [8, 8], range=[0, 1, 0, 1]).hist
    assert _chi_square(counts.flatten(), torch.full((64,), COUNT / 64)) < 4
    neighbours = torch.histogramdd(torch.stack([a[1:], b[:-1]], 1), [8, 8], range=[0, 1, 0, 1]).hist
    assert _chi_square(neighbours.flatten(), torch.full((64,), COUNT / 64)) < 4


def test_neighbours_in_a_draw_are_independent():
    drawn = uniform(SEED, 0, (COUNT,), (), torch.float32)
    for apart in (1, 2, 1024):
        pairs = torch.stack([drawn[apart:], drawn[:-apart]], 1)
        counts = torch.histogramdd(pairs, [8, 8], range=[0, 1, 0, 1]).hist
        assert _chi_square(counts.flatten(), torch.full((64,), len(pairs) / 64)) < 4


def _chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations the statistic lies above its mean (one less than there are cells)."""
    freedom = len(counts) - 1
    return float(((counts - expected).square() / expected).sum() - freedom) / (2 * freedom) ** 0.5


def test_keep_is_a_draw_at_any_positions_and_keeps_as_many_as_it_should():
    position = torch.arange(COUNT)
    kept = keep(SEED, 5, position, 0.3)
    assert kept.dtype is torch.bool and abs(kept.double().mean() - 0.7) < 0.0025
    assert torch.equal(keep(SEED, 5, position[123:999].view(12, 73), 0.3), kept[123:999].view(12, 73))
    assert not keep(SEED, 5, position, 1.0).any() and keep(SEED, 5, position, 0.0).all()
