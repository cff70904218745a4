"""AdamW over buckets and ranks, against torch's own."""

from math import sqrt

import pytest
import torch
from torch import nn

from autosp_aot.runtime.comm import Group, Mesh
from autosp_aot.training import optimizer
from autosp_aot.training.optimizer import AdamW
from tests.threads import on_ranks

ALONE = Group(0, 1, torch.device("cpu"))
SHAPES = [(3, 2), (4,), (), (0, 2), (5, 7)]


@pytest.fixture
def small_buckets(monkeypatch):
    """Buckets of 8 elements, so that parameters lie across them."""
    monkeypatch.setattr(optimizer, "BUCKET", 8)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in SHAPES]


def summands(step: int, rank: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]


def trained(zero: int, ranks: int, clip: float | None = None, dtype: torch.dtype = torch.float32):
    """Parameters and gradient norms of 4 steps along half the sum of the ranks' summands, on each rank."""

    def rank():
        world = Mesh.join("cpu", ranks).world if ranks > 1 else ALONE
        own = parameters(dtype)
        stepper = AdamW(own, world, zero, weight_decay=0.1)
        norms = []
        for step in range(4):
            for parameter, gradient in zip(own, summands(step, world.rank, dtype)):
                parameter.grad = gradient
            norms.append(stepper.step(1e-2, 0.5, clip))
        return [p.detach() for p in own], norms

    return on_ranks(ranks, rank) if ranks > 1 else [rank()]


def torchs(ranks: int, clip: float | None = None):
    """The same by torch's AdamW and clip_grad_norm_."""
    own = parameters()
    stepper, norms = torch.optim.AdamW(own, 1e-2, weight_decay=0.1), []
    for step in range(4):
        for parameter, *parts in zip(own, *(summands(step, rank) for rank in range(ranks))):
            parameter.grad = sum(parts) * 0.5
        norms.append(float(nn.utils.clip_grad_norm_(own, clip if clip is not None else float("inf"))))
        stepper.step()
    return [p.detach() for p in own], norms


def test_without_clipping_it_is_torchs_adamw_bit_for_bit(small_buckets):
    [(found, _)], (expected, _) = trained(0, 1), torchs(1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("ranks, zero", [(1, 1), (3, 0), (3, 1), (4, 1)])
@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_over_ranks_it_is_torchs_adamw_on_the_sum(small_buckets, ranks, zero, clip):
    expected, expected_norms = torchs(ranks, clip)
    for found, norms in trained(zero, ranks, clip):
        assert norms == pytest.approx(expected_norms, rel=1e-6)
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_1_gives_the_bits_of_zero_0_on_every_rank(small_buckets, dtype):
    (reference, norms), *_ = trained(0, 3, 0.5, dtype)
    for found, found_norms in (*trained(0, 3, 0.5, dtype), *trained(1, 3, 0.5, dtype)):
        assert found_norms == norms
        assert all(torch.equal(a, b) for a, b in zip(found, reference))


def test_a_frozen_parameter_has_no_state_and_stays():
    own = parameters()
    own[0].requires_grad_(False)
    stepper = AdamW(own, ALONE, weight_decay=0.1)
    assert sum(bucket.average.numel() for bucket in stepper.buckets) == sum(p.numel() for p in own[1:])
    before = own[0].clone()
    for parameter in own[1:]:
        parameter.grad = torch.ones_like(parameter)
    stepper.step(1e-2)
    assert torch.equal(own[0], before)


def test_narrow_parameters_are_their_fp32_masters_rounded(small_buckets):
    """Steps far smaller than bf16 resolves add up in the master."""
    own = nn.Parameter(torch.ones(20, dtype=torch.bfloat16))
    stepper = AdamW([own], ALONE, weight_decay=0.0)
    for _ in range(100):
        own.grad = torch.ones_like(own)
        stepper.step(1e-4)
    master = torch.cat([bucket.master for bucket in stepper.buckets])
    assert master.dtype is torch.float32 and torch.equal(own, master.bfloat16())
    torch.testing.assert_close(master, torch.full((20,), 1 - 100 * 1e-4))


def test_parameters_of_several_dtypes_are_stepped_each_in_its_own():
    own = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)]
    stepper = AdamW(own, ALONE)
    for parameter in own:
        parameter.grad = torch.ones_like(parameter)
    assert stepper.step(0.25) == pytest.approx(3.0)
    assert [bucket.dtype for bucket in stepper.buckets] == [torch.bfloat16, torch.float32]
    assert all(p[0].item() < 1 and p.grad is None for p in own)


def test_narrow_gradients_are_accumulated_in_fp32():
    """1 + 1/512 is 1 in bf16."""
    own = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    stepper = AdamW([own], ALONE)
    for size in (1.0, 2.0**-9, 2.0**-9):
        own.grad = torch.full_like(own, size)
        stepper.accumulate()
        assert own.grad is None
    assert stepper.gradients()[own].tolist() == [1 + 2.0**-8] * 4


def test_what_ranks_left_is_added_up_in_fp32():
    def rank():
        world = Mesh.join("cpu", 3).world
        own = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        own.grad = torch.full_like(own, 1.0 if world.rank == 0 else 2.0**-9)
        return AdamW([own], world, 1).step(1e-3)

    assert on_ranks(3, rank) == [pytest.approx(sqrt(4) * (1 + 2.0**-8), rel=1e-7)] * 3


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_that_are_not_finite_are_stepped_along_as_torch_does(clip):
    ours, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for gradient in (torch.tensor([1.0, float("nan"), 1.0]), torch.tensor([1.0, float("inf"), 1.0])):
        ours.grad, theirs.grad = gradient, gradient.clone()
        AdamW([ours], ALONE).step(0.1, clip=clip)
        if clip is not None:
            nn.utils.clip_grad_norm_([theirs], clip)
        torch.optim.AdamW([theirs], 0.1).step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), equal_nan=True)
