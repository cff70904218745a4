"""Our operators as ATen alone, for a tracer: what is computed does not depend on values.

    autosp.attention    runtime/kernels.py as it is, but every block of scores that positions allow
    autosp.expert_mm    a product with every expert, of which each row takes its own

The numbers are those of the runtime's kernels up to the order of additions; experts cost as many products as there are.
"""

from functools import partial

import torch
from torch import Tensor

from autosp_aot.runtime.execute import OURS


def expert_mm(ids: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Row t is x[t] @ weight[ids[t]]; of ids that are no expert, zeros."""
    out = x.new_zeros(ids.shape[0], weight.shape[2])
    for expert in range(weight.shape[0]):
        out = torch.where((ids == expert).unsqueeze(1), x @ weight[expert], out)
    return out


def expert_mm_weight_grad(ids: Tensor, x: Tensor, grad: Tensor, experts: int) -> Tensor:
    """outer(x[t], grad[t]) added up over the rows of each expert."""
    found = []
    for expert in range(experts):
        mine = (ids == expert).unsqueeze(1)
        found.append(torch.where(mine, x, 0).t() @ torch.where(mine, grad, 0))
    return torch.stack(found)


TRACEABLE = {
    **OURS,
    **{name: partial(function, traced=True) for name, function in OURS.items() if name.startswith("autosp.attention")},
    "autosp.expert_mm": expert_mm,
    "autosp.expert_mm_weight_grad": expert_mm_weight_grad,
}
