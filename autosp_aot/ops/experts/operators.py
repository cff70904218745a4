"""The product of routed rows with their experts, and the gradient of the experts' weights: their records.

Rows of one rank are products of their own, and what they add to a weight's gradient is a partial sum.
"""

from math import prod

from torch import Tensor

from autosp_aot.ops.experts import kernels, traced
from autosp_aot.ops.record import FEW, Demand, OwnOp, Shape
from autosp_aot.sharding.contractions import notation


def _expert_mm_workspace(ids: Tensor, x: Tensor, weight: Tensor, target: str) -> tuple[list[Tensor], int]:
    rows, width, out_width = ids.shape[0], x.shape[1], weight.shape[2]
    return [x.new_empty(rows, out_width)], _sorted_bytes(ids, weight.shape[0]) + rows * (width + out_width) * x.itemsize


def _weight_grad_workspace(ids: Tensor, x: Tensor, grad: Tensor, experts: int, target: str) -> tuple[list[Tensor], int]:
    result = x.new_empty(experts, x.shape[1], grad.shape[1])
    rows = ids.shape[0] * (x.shape[1] + grad.shape[1]) * x.itemsize
    return [result], _sorted_bytes(ids, experts) + rows + result.numel() // experts * x.itemsize


def _sorted_bytes(ids: Tensor, experts: int) -> int:
    """Ids in order, where they were, and what is known of them, twice each."""
    return 8 * 8 * (ids.shape[0] + experts) + FEW


def _demands(ids: Tensor, x: Tensor, weight: Tensor, target: str) -> dict[str, Demand]:
    """Of the grouped product: a matrix lies dense in one of its dims, and its other one begins where vectors can."""
    if not kernels.takes_rows(x, x.shape[1], weight.shape[2]):
        return {}
    source = "cuda/GroupedMM.cpp: check_valid_strides, as in torch/_meta_registrations.py: _meta_grouped_mm_common"
    return {"weight": Demand(_readable, (0, 1, 2), source)}


def _readable(weight: Tensor) -> bool:
    (rows, columns), (each, row, column) = weight.shape[1:], weight.stride()
    if (column != 1 or row < columns) and (row != 1 or column < rows):
        return False
    return all(number * weight.itemsize % 16 == 0 for number in (each, max(row, column), weight.storage_offset()))


def _flops(shapes: list[Shape], scoring) -> int:
    return 2 * prod(shapes[-2]) * shapes[-1][-1]


# Cost looks at what moves: counting every expert's products for every row would let work outweigh it.
EXPERT_MM = OwnOp(
    "autosp.expert_mm",
    "autosp.expert_mm(ids, x, weight) -> y",
    kernels.expert_mm,
    _expert_mm_workspace,
    notation("t,tk,Ekn->tn", linear=((1,), (2,))),
    _flops,
    traced.expert_mm,
    demands=_demands,
)
EXPERT_MM_WEIGHT_GRAD = OwnOp(
    "autosp.expert_mm_weight_grad",
    "autosp.expert_mm_weight_grad(ids, x, grad, experts) -> grad_weight",
    kernels.expert_mm_weight_grad,
    _weight_grad_workspace,
    notation("t,tk,tn->Ekn", linear=((1,), (2,))),
    _flops,
    traced.expert_mm_weight_grad,
)
