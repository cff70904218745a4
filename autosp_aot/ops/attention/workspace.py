"""What attention makes in memory, by shapes, dtype and target: kernels obey it, `memory/` counts it.

    attention    out like q, lse as `outputs` says        backward    gradients [B, S, N, D] in memory
    rows of q    all without gaps

What of q, k, v and out is not dense is copied. Beside its results a call needs what its runs need one at a time: a run
is one key/value head with its query heads (all heads at once where they are one to one), or the rows of one head.
`_LargestRun` says how much that is.

Sources: FlashAttention-2's `mha_bwd` (Dao-AILab/flash-attention, csrc/flash_attn/flash_api.cpp, as in
aten/native/transformers/cuda/flash_attn) rounds rows to 128 and widths to 32, adds up grad_q in fp32 and keeps one fp32
number a row; AOTriton's backward keeps that number (aten/native/transformers/hip/flash_attn/aot). Blocks of ATen's CPU
kernel are a few MiB a thread at any length and not counted.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autosp_aot.ir.operators import DTYPE_NAMES, wide
from autosp_aot.ir.score_expr import walk
from autosp_aot.ops.attention.arguments import Arguments, HeadRun, Saved
from autosp_aot.ops.record import FEW
from autosp_aot.targets.table import TARGETS

# Tensors of a block's size that blockwise attention has at once: beside a score expression, for each part of it, for
# the gradient of a part, and for dropout (64-bit positions and bits).
SCORING, PART, PART_GRADIENT, DRAWING = 8, 1, 2, 12
# Results, and the bytes needed beside them.
Workspace = tuple[list[Tensor], int]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of the last dim lie next to each other, as flash kernels take them to without a check."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where it is not dense."""
    return tensor if is_dense(tensor) else tensor.contiguous()


def densed(call: Arguments) -> Arguments:
    """The call with q, k and v as `dense` makes them."""
    return replace(call, q=dense(call.q), k=dense(call.k), v=dense(call.v))


def outputs(q: Tensor, width: int, target: str) -> tuple[Tensor, Tensor]:
    """Empty out [B, N, S, width] and lse [B, N, S] of a dense q [B, N, S, D], laid out as flash kernels make them.

    CPU's kernel makes lse [B, S, N] in memory; CUDA's makes it [B, N, S], and `mha_bwd` reads it so without a check.
    """
    out = torch.empty_like(q) if width == q.shape[3] else q.new_empty((*q.shape[:3], width))
    batch, heads, rows = q.shape[:3]
    if not TARGETS[target].flash.lse_by_row:
        return out, q.new_empty((batch, heads, rows), dtype=wide(q.dtype))
    return out, q.new_empty((batch, rows, heads), dtype=wide(q.dtype)).transpose(1, 2)


def gradient(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty gradient of q, k or v [B, N, S, D]."""
    batch, heads, rows, width = like.shape
    return like.new_empty((batch, rows, heads, width), dtype=dtype or like.dtype).transpose(1, 2)


def has_kernel(q: Tensor, k: Tensor, v: Tensor, plain: bool, causal: bool, target: str) -> bool:
    """Whether flash attention takes a call; `plain` says that softmax is all there is to its scoring.

    A causal kernel is given as many rows as keys: kernels differ in which keys the first row sees.
    """
    if not plain or q.shape[-1] != v.shape[-1] or (causal and q.shape[2] != k.shape[2]):
        return False
    flash, width = TARGETS[target].flash, q.shape[-1]
    return DTYPE_NAMES[q.dtype] in flash.dtypes and width <= flash.width_limit and width % flash.width_multiple == 0


def attention(call: Arguments, target: str) -> Workspace:
    call, copied_bytes = _densed(call)
    results = outputs(call.q, call.v.shape[3], target)
    if call.q.numel() == 0:
        return list(results), 0
    runs = call.head_runs()
    run = _LargestRun(call, target, _most_heads(runs))
    return list(results), copied_bytes + run.forward_bytes() + (run.output_bytes() if len(runs) > 1 else 0)


def attention_backward(call: Arguments, saved: Saved, target: str) -> Workspace:
    q, k, v = call.q, call.k, call.v
    results = [gradient(q), gradient(k), gradient(v)]
    if q.numel() == 0:
        return results, 0
    call, copied_bytes = _densed(call, saved.out)
    runs = call.head_runs()
    run = _LargestRun(call, target, _most_heads(runs))
    beside = run.backward_bytes(saved.grad_lse is not None)
    if call.group == 1:
        return results, copied_bytes + beside
    sums = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.itemsize
    own = run.gradient_bytes() + max(beside, sums)
    return results, copied_bytes + (own if len(runs) > 1 else own - sums - q.numel() * q.itemsize)


def attention_vector_gradient(call: Arguments, saved: Saved, which: int, target: str) -> Workspace:
    run = _LargestRun(call, target, _most_heads(call.head_runs()))
    return _summed([call.vectors[which]], saved.lse.dtype, run.vector_gradient_bytes(which) if call.q.numel() else 0)


def attention_rows(call: Arguments, target: str) -> Workspace:
    q = call.q
    results = [q.new_empty((*q.shape[:2], call.v.shape[3])), q.new_empty(q.shape[:2], dtype=wide(q.dtype))]
    if q.numel() == 0:
        return results, 0
    call, copied_bytes = _densed(call)
    run = _largest_rows(call, target)
    # Up to two sets of keys, merged in the wide dtype, and one left from the run before.
    return results, copied_bytes + 8 * run.output_bytes(wide(q.dtype)) + run.forward_bytes()


def attention_rows_backward(call: Arguments, saved: Saved, target: str) -> Workspace:
    operands = [call.q, call.k, call.v]
    if call.q.numel() == 0:
        return _summed(operands, saved.lse.dtype, 0)
    call, copied_bytes = _densed(call, saved.out)
    run = _largest_rows(call, target)
    beside = copied_bytes + run.gradient_bytes() + run.backward_bytes(saved.grad_lse is not None)
    return _summed(operands, saved.lse.dtype, beside)


def attention_rows_vector_gradient(call: Arguments, saved: Saved, which: int, target: str) -> Workspace:
    run = _largest_rows(call, target)
    return _summed([call.vectors[which]], saved.lse.dtype, run.vector_gradient_bytes(which) if call.q.numel() else 0)


@dataclass(frozen=True)
class _LargestRun:
    """The largest run of a call: so many heads, and rows of them; bytes of what its kernel makes and needs."""

    call: Arguments
    target: str
    heads: int
    most_rows: int | None = None

    @property
    def rows(self) -> int:
        return self.call.q.shape[2] if self.most_rows is None else self.most_rows

    @property
    def lines(self) -> int:
        """Heads of all sequences of the batch."""
        return self.call.q.shape[0] * self.heads

    def output_bytes(self, dtype: torch.dtype | None = None) -> int:
        lse = wide(self.call.q.dtype).itemsize
        return self.lines * self.rows * (self.call.v.shape[3] * (dtype or self.call.q.dtype).itemsize + lse)

    def gradient_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Of q, k and v, every query head with keys and values of its own."""
        widths = self.rows * self.call.q.shape[3] + self.call.k.shape[2] * (self.call.k.shape[3] + self.call.v.shape[3])
        return self.lines * widths * (dtype or self.call.q.dtype).itemsize

    def forward_bytes(self) -> int:
        return 0 if self.has_kernel() else self.block_bytes(SCORING, PART)

    def backward_bytes(self, lse_has_gradient: bool) -> int:
        if self.has_kernel() and not lse_has_gradient:
            return self.flash_bytes() + self.lse_bytes() if TARGETS[self.target].flash.accumulates else 0
        return self.accumulated_bytes() + self.block_bytes(2 * SCORING, PART + PART_GRADIENT)

    def vector_gradient_bytes(self, which: int) -> int:
        found = self.call.vectors[which].numel() * wide(self.call.q.dtype).itemsize
        return found + self.block_bytes(2 * SCORING, PART + PART_GRADIENT)

    def accumulated_bytes(self) -> int:
        """Gradients of half dtypes are added up in fp32 beside the results; base and delta are a number a row."""
        dtype = wide(self.call.q.dtype)
        gradients = self.gradient_bytes(dtype) if dtype != self.call.q.dtype else 0
        return gradients + self.lines * self.rows * dtype.itemsize

    def flash_bytes(self) -> int:
        rows, width = -(-self.call.q.shape[2] // 128) * 128, -(-self.call.q.shape[3] // 32) * 32
        return self.lines * rows * (width + 1) * 4

    def lse_bytes(self) -> int:
        """Of the dense copy of lse [B, n, rows] that a kernel reads where that is a part of a larger one."""
        is_part = self.heads < self.call.q.shape[1] or self.rows < self.call.q.shape[2]
        return self.lines * self.rows * wide(self.call.q.dtype).itemsize if is_part and self.call.q.shape[0] > 1 else 0

    def block_bytes(self, tensors: int, parts: int) -> int:
        """Of a block of rows and keys: scores, expression, draws, and what is read of q, k, v and vectors, widened."""
        size, scoring = TARGETS[self.target].attention_block, self.call.scoring
        itemsize = wide(self.call.q.dtype).itemsize
        rows, keys = min(size, self.rows), min(size, self.call.k.shape[2])
        count = sum(1 for _ in walk(scoring.get("score"))) if scoring.get("score") is not None else 0
        block = tensors * itemsize + 8 * (count * parts + (DRAWING if scoring.get("dropout") else 0))
        read = tensors * (rows + keys) * max(self.call.q.shape[3], self.call.v.shape[3]) * itemsize
        seen = 8 * sum(3 * vector.numel() for vector in self.call.vectors)
        return self.lines * (rows * keys * block + read) + seen + FEW

    def has_kernel(self) -> bool:
        scoring = self.call.scoring
        plain = scoring.get("score") is None and scoring.get("window") is None and not scoring.get("dropout")
        if self.most_rows is not None and plain:
            return has_kernel(self.call.q, self.call.k, self.call.v, plain, False, self.target)
        return has_kernel(self.call.q, self.call.k, self.call.v, plain, scoring.get("causal", False), self.target)


def _largest_rows(call: Arguments, target: str) -> _LargestRun:
    """The largest run over heads and rows as one dim."""
    return _LargestRun(replace(call, q=call.q.unsqueeze(1)), target, 1, min(call.rows, call.q.shape[1]))


def _densed(call: Arguments, *others: Tensor) -> tuple[Arguments, int]:
    """The call as `dense` makes its tensors, and the bytes of these copies and of the others'."""
    copied = sum(t.numel() * t.itemsize for t in (call.q, call.k, call.v, *others) if not is_dense(t))
    return densed(call), copied


def _most_heads(runs: list[HeadRun]) -> int:
    return max((run.heads.stop - run.heads.start for run in runs), default=0)


def _summed(operands: list[Tensor], dtype: torch.dtype, beside: int) -> Workspace:
    """Gradients without gaps that are added up in `dtype`."""
    totals = sum(t.numel() * dtype.itemsize for t in operands if t.dtype != dtype)
    return [t.new_empty(t.shape) for t in operands], totals + beside
