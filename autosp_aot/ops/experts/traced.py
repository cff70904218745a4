"""Products of rows with their experts for a tracer: a product with every expert, of which each row takes its own.

The numbers are those of the kernels up to the order of additions; it costs as many products as there are experts.
"""

import torch
from torch import Tensor


def expert_mm(ids: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Row t is x[t] @ weight[ids[t]]; of ids that are no expert, zeros."""
    out = x.new_zeros(ids.shape[0], weight.shape[2])
    for expert in range(weight.shape[0]):
        out = torch.where((ids == expert).unsqueeze(1), x @ weight[expert], out)
    return out


def expert_mm_weight_grad(ids: Tensor, x: Tensor, grad: Tensor, experts: int) -> Tensor:
    """outer(x[t], grad[t]) added up over the rows of each expert."""
    gradients = []
    for expert in range(experts):
        own = (ids == expert).unsqueeze(1)
        gradients.append(torch.where(own, x, 0).t() @ torch.where(own, grad, 0))
    return torch.stack(gradients)
