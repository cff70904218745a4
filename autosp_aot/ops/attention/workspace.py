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

from dataclasses import dataclass

import torch
from torch import Tensor

from autosp_aot.ir.operators import DTYPE_NAMES, wide
from autosp_aot.ir.score_expr import walk
from autosp_aot.ops.record import FEW
from autosp_aot.targets.table import TARGETS

# Tensors of a block's size that blockwise attention has at once: beside a score expression, for each part of it, for
# the gradient of a part, and for dropout (64-bit positions and bits).
SCORING, PART, PART_GRADIENT, DRAWING = 8, 1, 2, 12


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of the last dim lie next to each other, as flash kernels take them to without a check."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where it is not dense."""
    return tensor if is_dense(tensor) else tensor.contiguous()


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


def head_runs(heads: int, group: int, first_head: int) -> list[tuple[slice, slice]]:
    """(query heads, key/value heads) of a call: all at once where they are one to one, else a run a key/value head."""
    if group == 1:
        return [(slice(0, heads), slice(0, heads))]
    first_kv, runs, at = first_head // group, [], 0
    while at < heads:
        kv = (first_head + at) // group
        end = min((kv + 1) * group - first_head, heads)
        runs.append((slice(at, end), slice(kv - first_kv, kv - first_kv + 1)))
        at = end
    return runs


def attention(q, k, v, vectors, seed, group, first_head, target, **scoring):
    (q, k, v), copied_bytes = _densed(q, k, v)
    results = outputs(q, v.shape[3], target)
    if q.numel() == 0:
        return results, 0
    runs = head_runs(q.shape[1], group, first_head)
    run = _LargestRun(q, k, v, vectors, scoring, target, _most_heads(runs))
    return results, copied_bytes + run.forward_bytes() + (run.output_bytes() if len(runs) > 1 else 0)


def attention_backward(grad_out, q, k, v, out, lse, grad_lse, vectors, seed, group, first_head, target, **scoring):
    results = gradient(q), gradient(k), gradient(v)
    if q.numel() == 0:
        return results, 0
    (q, k, v, out), copied_bytes = _densed(q, k, v, out)
    runs = head_runs(q.shape[1], group, first_head)
    run = _LargestRun(q, k, v, vectors, scoring, target, _most_heads(runs))
    beside = run.backward_bytes(grad_lse is not None)
    if group == 1:
        return results, copied_bytes + beside
    sums = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.itemsize
    own = run.gradient_bytes() + max(beside, sums)
    return results, copied_bytes + (own if len(runs) > 1 else own - sums - q.numel() * q.itemsize)


def attention_vector_gradient(
    grad_out, q, k, v, out, lse, grad_lse, vectors, seed, which, group, first_head, target, **scoring
):
    most = _most_heads(head_runs(q.shape[1], group, first_head))
    run = _LargestRun(q, k, v, vectors, scoring, target, most)
    return _summed([vectors[which]], lse.dtype, run.vector_gradient_bytes(which) if q.numel() else 0)


def attention_rows(q, k, v, vectors, seed, group, rows, start, target, **scoring):
    results = q.new_empty((*q.shape[:2], v.shape[3])), q.new_empty(q.shape[:2], dtype=wide(q.dtype))
    if q.numel() == 0:
        return results, 0
    (q, k, v), copied_bytes = _densed(q, k, v)
    run = _LargestRun(q.unsqueeze(1), k, v, vectors, scoring, target, 1, min(rows, q.shape[1]))
    # Up to two sets of keys, merged in the wide dtype, and one left from the run before.
    return results, copied_bytes + 8 * run.output_bytes(wide(q.dtype)) + run.forward_bytes()


def attention_rows_backward(
    grad_out, q, k, v, out, lse, grad_lse, vectors, seed, group, rows, start, target, **scoring
):
    if q.numel() == 0:
        return _summed([q, k, v], lse.dtype, 0)
    (q, k, v, out), copied_bytes = _densed(q, k, v, out)
    run = _LargestRun(q.unsqueeze(1), k, v, vectors, scoring, target, 1, min(rows, q.shape[1]))
    beside = copied_bytes + run.gradient_bytes() + run.backward_bytes(grad_lse is not None)
    return _summed([q, k, v], lse.dtype, beside)


def attention_rows_vector_gradient(
    grad_out, q, k, v, out, lse, grad_lse, vectors, seed, which, group, rows, start, target, **scoring
):
    run = _LargestRun(q.unsqueeze(1), k, v, vectors, scoring, target, 1, min(rows, q.shape[1]))
    return _summed([vectors[which]], lse.dtype, run.vector_gradient_bytes(which) if q.numel() else 0)


@dataclass(frozen=True)
class _LargestRun:
    """The largest run of a call: so many heads, and rows of them; bytes of what its kernel makes and needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    vectors: tuple[Tensor, ...]
    scoring: dict
    target: str
    heads: int
    most_rows: int | None = None

    @property
    def rows(self) -> int:
        return self.q.shape[2] if self.most_rows is None else self.most_rows

    @property
    def lines(self) -> int:
        """Heads of all sequences of the batch."""
        return self.q.shape[0] * self.heads

    def output_bytes(self, dtype: torch.dtype | None = None) -> int:
        lse = wide(self.q.dtype).itemsize
        return self.lines * self.rows * (self.v.shape[3] * (dtype or self.q.dtype).itemsize + lse)

    def gradient_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Of q, k and v, every query head with keys and values of its own."""
        widths = self.rows * self.q.shape[3] + self.k.shape[2] * (self.k.shape[3] + self.v.shape[3])
        return self.lines * widths * (dtype or self.q.dtype).itemsize

    def forward_bytes(self) -> int:
        return 0 if self.has_kernel() else self.block_bytes(SCORING, PART)

    def backward_bytes(self, lse_has_gradient: bool) -> int:
        if self.has_kernel() and not lse_has_gradient:
            return self.flash_bytes() + self.lse_bytes() if TARGETS[self.target].flash.accumulates else 0
        return self.accumulated_bytes() + self.block_bytes(2 * SCORING, PART + PART_GRADIENT)

    def vector_gradient_bytes(self, which: int) -> int:
        found = self.vectors[which].numel() * wide(self.q.dtype).itemsize
        return found + self.block_bytes(2 * SCORING, PART + PART_GRADIENT)

    def accumulated_bytes(self) -> int:
        """Gradients of half dtypes are added up in fp32 beside the results; base and delta are a number a row."""
        dtype = wide(self.q.dtype)
        return (self.gradient_bytes(dtype) if dtype != self.q.dtype else 0) + self.lines * self.rows * dtype.itemsize

    def flash_bytes(self) -> int:
        rows, width = -(-self.q.shape[2] // 128) * 128, -(-self.q.shape[3] // 32) * 32
        return self.lines * rows * (width + 1) * 4

    def lse_bytes(self) -> int:
        """Of the dense copy of lse [B, n, rows] that a kernel reads where that is a part of a larger one."""
        is_part = self.heads < self.q.shape[1] or self.rows < self.q.shape[2]
        return self.lines * self.rows * wide(self.q.dtype).itemsize if is_part and self.q.shape[0] > 1 else 0

    def block_bytes(self, tensors: int, parts: int) -> int:
        """Of a block of rows and keys: scores, expression, draws, and what is read of q, k, v and vectors, widened."""
        size, scoring = TARGETS[self.target].attention_block, self.scoring
        itemsize = wide(self.q.dtype).itemsize
        rows, keys = min(size, self.rows), min(size, self.k.shape[2])
        count = sum(1 for _ in walk(scoring.get("score"))) if scoring.get("score") is not None else 0
        block = tensors * itemsize + 8 * (count * parts + (DRAWING if scoring.get("dropout") else 0))
        read = tensors * (rows + keys) * max(self.q.shape[3], self.v.shape[3]) * itemsize
        seen = 8 * sum(3 * vector.numel() for vector in self.vectors)
        return self.lines * (rows * keys * block + read) + seen + FEW

    def has_kernel(self) -> bool:
        scoring = self.scoring
        plain = scoring.get("score") is None and scoring.get("window") is None and not scoring.get("dropout")
        if self.most_rows is not None and plain:
            return has_kernel(self.q, self.k, self.v, plain, False, self.target)
        return has_kernel(self.q, self.k, self.v, plain, scoring.get("causal", False), self.target)


def _densed(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """The tensors as `dense` makes them, and the bytes of the copies."""
    return [dense(t) for t in tensors], sum(t.numel() * t.itemsize for t in tensors if not is_dense(t))


def _most_heads(runs: list[tuple[slice, slice]]) -> int:
    return max((heads.stop - heads.start for heads, _ in runs), default=0)


def _summed(operands: list[Tensor], dtype: torch.dtype, beside: int) -> tuple[list[Tensor], int]:
    """Gradients without gaps that are added up in `dtype`."""
    totals = sum(t.numel() * dtype.itemsize for t in operands if t.dtype != dtype)
    return [t.new_empty(t.shape) for t in operands], totals + beside
