import random

import pytest
import torch

from autosp_aot.ops.experts.kernels import expert_mm, expert_mm_weight_grad

WIDTH, OUT = 16, 8
CASES = 40


def cases(dtype: torch.dtype):
    """Ids (some of no expert, on both sides), rows, weights and gradients; no rows and no expert's rows included."""
    for seed in range(CASES):
        draw, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        rows, experts = rng.choice([0, 1, 2, 7, 30]), rng.choice([1, 2, 5, 40])
        ids = torch.randint(-1, experts + 2, (rows,), generator=draw)
        x, weight, grad = (
            torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
            for shape in ((rows, WIDTH), (experts, WIDTH, OUT), (rows, OUT))
        )
        yield ids, x, weight, grad


def dense(ids, weight):
    """Each row's weight, zeros for a row of no expert."""
    whole = torch.cat([weight, torch.zeros_like(weight[:1])])
    return whole[torch.where((ids < 0) | (ids >= len(weight)), len(weight), ids)]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_each_row_is_multiplied_with_its_expert(dtype, limit):
    for ids, x, weight, _ in cases(dtype):
        expected = torch.einsum("tk,tkn->tn", x.double(), dense(ids, weight.double()))
        found = expert_mm(ids, x, weight)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit * WIDTH)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_a_transposed_weight_is_taken_as_it_is(dtype, limit):
    for ids, _, weight, grad in cases(dtype):
        turned = weight.transpose(1, 2)
        expected = expert_mm(ids, grad, turned.contiguous())
        torch.testing.assert_close(expert_mm(ids, grad, turned), expected, rtol=limit, atol=limit * WIDTH)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_gradient_of_a_weight_adds_up_its_rows(dtype, limit):
    for ids, x, weight, grad in cases(dtype):
        wide = weight.double().requires_grad_()
        (torch.einsum("tk,tkn->tn", x.double(), dense(ids, wide)) * grad.double()).sum().backward()
        found = expert_mm_weight_grad(ids, x, grad, len(weight))
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wide.grad, rtol=limit, atol=limit * WIDTH)


def test_values_of_rows_of_no_expert_reach_nothing():
    ids = torch.tensor([0, 2, -1, 1])
    for dtype in (torch.float64, torch.bfloat16):
        x, grad = (torch.ones(4, width, dtype=dtype) for width in (WIDTH, OUT))
        x[1:3], grad[1:3] = torch.nan, torch.nan
        assert expert_mm(ids, x, torch.ones(2, WIDTH, OUT, dtype=dtype))[1:3].eq(0).all()
        assert expert_mm_weight_grad(ids, x, grad, 2).eq(1).all()
