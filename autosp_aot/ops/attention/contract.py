"""What attention's kernels take the memory of their operands to be, by `targets/flash.py`; what is done in blocks, any.

    q, k, v         the head dim has stride 1, rows do not overlap, and all begin where vectors can be loaded
    out, grad_out   dense [B, S, N, D]: kernels copy them otherwise, and a plan has to know
    lse             dense [B, N, S], where a kernel does not read its strides

Where a call is several runs, kernels are given parts of these three, which are copied one run at a time.
"""

from torch import Tensor

from autosp_aot.ir.operators import DTYPE_NAMES
from autosp_aot.ops.attention.arguments import Arguments, Saved
from autosp_aot.ops.record import Demand
from autosp_aot.targets.table import TARGETS

BY_ROW = (0, 2, 1, 3)  # [B, S, N, D] in memory


def demands(call: Arguments, *given: Saved, target: str) -> dict[str, Demand]:
    """The demands of the kernels that a call is done with, by the operands' names."""
    saved = given[0] if given else None
    if call.q.numel() == 0 or not takes_call(call, target) or (saved is not None and saved.grad_lse is not None):
        return {}
    flash = TARGETS[target].flash
    operands = {name: getattr(call, name) for name in ("q", "k", "v")}
    operands |= {} if saved is None else {"out": saved.out, "grad_out": saved.grad_out}

    def readable(tensor: Tensor) -> bool:
        return _readable(tensor, flash.alignment_bytes)

    found = {
        name: Demand(readable, BY_ROW if tensor.dim() == 4 else tuple(range(tensor.dim())), flash.sources["dense"])
        for name, tensor in operands.items()
        if name in flash.dense
    }
    if saved is not None and not call.rows and len(call.head_runs()) == 1:
        by_row = Demand(is_by_row, BY_ROW, flash.sources["copied"])
        found |= {name: by_row for name in operands if name in flash.copied}
        if flash.dense_lse:
            found["lse"] = Demand(Tensor.is_contiguous, (0, 1, 2), flash.sources["dense_lse"])
    return found


def takes_call(call: Arguments, target: str) -> bool:
    """Whether flash attention does a call, or parts of one over heads and rows."""
    q = call.q.unsqueeze(1) if call.rows else call.q
    scoring = call.scoring
    plain = scoring.get("score") is None and scoring.get("window") is None and not scoring.get("dropout")
    causal = scoring.get("causal", False) and not call.rows  # over rows a triangle and what is before it
    return has_kernel(q, call.k, call.v, plain, causal, target)


def has_kernel(q: Tensor, k: Tensor, v: Tensor, plain: bool, causal: bool, target: str) -> bool:
    """Whether flash attention takes q [B, N, S, D], k and v; `plain` says that softmax is all there is to its scoring.

    A causal kernel is given as many rows as keys: kernels differ in which keys the first row sees.
    """
    if not plain or q.shape[-1] != v.shape[-1] or (causal and q.shape[2] != k.shape[2]):
        return False
    flash, width = TARGETS[target].flash, q.shape[-1]
    return DTYPE_NAMES[q.dtype] in flash.dtypes and width <= flash.width_limit and width % flash.width_multiple == 0


def is_by_row(tensor: Tensor) -> bool:
    """Whether [B, N, S, D] lies as dense [B, S, N, D] in memory."""
    return tensor.transpose(1, 2).is_contiguous()


def by_row(tensor: Tensor) -> Tensor:
    """The tensor [B, N, S, D] itself, or a copy, as dense [B, S, N, D]."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _readable(tensor: Tensor, alignment_bytes: int) -> bool:
    """Whether rows, the last dim, have no gaps and do not overlap, and begin at multiples of `alignment_bytes`."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    if tensor.shape[-2] > 1 and tensor.stride(-2) < tensor.shape[-1]:
        return False
    steps = [step for size, step in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
    return all(step * tensor.itemsize % alignment_bytes == 0 for step in (*steps, tensor.storage_offset()))
