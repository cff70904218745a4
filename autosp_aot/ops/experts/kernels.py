"""Products of rows with the expert each row is routed to, in plain torch that CUDA and ROCm share.

    expert_mm(ids, x, weight) -> [T, N]                           row t is x[t] @ weight[ids[t]]
    expert_mm_weight_grad(ids, x, grad, experts) -> [E, K, N]     outer(x[t], grad[t]) added up over an expert's rows

    ids: [T] integers   x: [T, K]   weight: [E, K, N]   grad: [T, N]

A row whose id is no expert gives zeros and adds nothing. Rows are sorted by expert here, so that the sums are in one
order, in O(T) memory. bf16 goes through torch's grouped product, which does not wait for the device; other dtypes
through a product an expert.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

# The grouped product wants rows that begin at multiples of 16 bytes.
ALIGNED = 8


def expert_mm(ids: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Forward, and with `weight.transpose(1, 2)` the gradient of x."""
    experts, width, out_width = weight.shape
    if takes_rows(x, width, out_width):
        order, ends, routed = _sorted(ids, experts)
        product = grouped_mm(x[order], weight, offs=ends).masked_fill_(~routed, 0)
        return torch.empty_like(product).index_copy_(0, order, product)
    out = x.new_zeros(ids.shape[0], out_width)
    for expert, rows in _rows(ids, experts):
        out[rows] = x[rows] @ weight[expert]
    return out


def expert_mm_weight_grad(ids: Tensor, x: Tensor, grad: Tensor, experts: int) -> Tensor:
    """The gradient of weight: what this rank's rows add to it."""
    if takes_rows(x, x.shape[1], grad.shape[1]):
        order, ends, _ = _sorted(ids, experts)
        empty = ends == torch.cat([ends.new_zeros(1), ends[:-1]])
        return grouped_mm(x[order].t(), grad[order], offs=ends).masked_fill_(empty.view(-1, 1, 1), 0)
    out = x.new_zeros(experts, x.shape[1], grad.shape[1])
    for expert, rows in _rows(ids, experts):
        out[expert] = x[rows].t() @ grad[rows]
    return out


def takes_rows(x: Tensor, *widths: int) -> bool:
    """Whether torch's grouped product takes these rows."""
    return x.dtype is torch.bfloat16 and x.shape[0] > 0 and not any(width % ALIGNED for width in widths)


def _sorted(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order by expert, rows of none last; where each expert's rows end in it; which sorted rows have an expert."""
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
    ids, order = ids.sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    return order, ends, (ids < experts).unsqueeze(1)


def _rows(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, its rows) of every expert that has any."""
    order, ends, _ = _sorted(ids, experts)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if start < end:
            yield expert, order[start:end]
        start = end
