"""Experts for a tracer are the runtime's own."""

import pytest
import torch

from autosp_aot.ops.table import OURS
from tests.ops.experts.test_kernels import WIDTH, cases


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_experts_are_those_of_the_runtime(dtype, limit):
    for ids, x, weight, grad in cases(dtype):
        for op, arguments in {
            "autosp.expert_mm": (ids, x, weight),
            "autosp.expert_mm_weight_grad": (ids, x, grad, len(weight)),
        }.items():
            found, wanted = OURS[op].traced(*arguments), OURS[op].kernel(*arguments)
            torch.testing.assert_close(found, wanted, rtol=limit, atol=limit * WIDTH)


def test_values_of_rows_of_no_expert_reach_nothing():
    ids, x, grad = torch.tensor([0, 2, -1, 1]), torch.ones(4, 3), torch.ones(4, 5)
    x[1:3], grad[1:3] = torch.nan, torch.nan
    assert OURS["autosp.expert_mm"].traced(ids, x, torch.ones(2, 3, 5))[1:3].eq(0).all()
    assert OURS["autosp.expert_mm_weight_grad"].traced(ids, x, grad, 2).eq(1).all()
