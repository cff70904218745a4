"""What attention makes in memory, by shapes, dtype and target: kernels obey it, `memory/` counts it.

    attention    out like q, lse as `outputs` says        backward    gradients as `gradients` says
    rows of q    all without gaps

Operands lie as `contract.py` demands. Beside its results a call needs what its runs need one at a time: a run is one
key/value head with its query heads (all heads at once where they are one to one), or the rows of one head.
`_LargestRun` says how much that is. What kernels make is in `targets/flash.py`, with its sources; blocks of ATen's CPU
kernel are a few MiB a thread at any length and not counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from autosp_aot.ir.operators import wide
from autosp_aot.ir.score_expr import walk
from autosp_aot.ops.attention.arguments import Arguments, HeadRun, Saved
from autosp_aot.ops.attention.contract import is_by_row, takes_call
from autosp_aot.ops.record import FEW
from autosp_aot.targets.table import TARGETS

# Tensors of a block's size that blockwise attention has at once: beside a score expression, for each part of it, for
# the gradient of a part, and for dropout (64-bit positions and bits).
SCORING, PART, PART_GRADIENT, DRAWING = 8, 1, 2, 12
# Rows of all parts into which `set_params_splitkv` splits the keys: at most 128 parts, and parts of 64 rows that fill
# the two blocks a multiprocessor (160 at most) at most four times over; no parts where they do so by 0.8 (256 blocks).
PARTS, PART_ROWS, ALL_PART_ROWS, UNSPLIT_BLOCKS = 128, 64, 4 * 2 * 160 * 64, 256
# Results, and the bytes needed beside them.
Workspace = tuple[list[Tensor], int]


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


def gradients(call: Arguments, target: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v as one run of flash attention gives them."""
    flash, heads = TARGETS[target].flash, call.q.shape[1]
    if flash.gradients_by_row:
        return gradient(call.q), gradient(call.k), gradient(call.v)
    k, v = (t.expand(-1, heads, -1, -1) for t in (call.k, call.v))
    each = [torch.empty_like(t) for t in (call.q, k, k if flash.grad_v_like_k else v)]
    if call.group > 1:
        each[1:] = [t.sum(1, keepdim=True) for t in each[1:]]
    return each[0], each[1], each[2]


def attention(call: Arguments, target: str) -> Workspace:
    results = outputs(call.q, call.v.shape[3], target)
    if call.q.numel() == 0:
        return list(results), 0
    runs = call.head_runs()
    run = _LargestRun(call, target, _most_heads(runs))
    return list(results), run.forward_bytes() + (run.output_bytes() if len(runs) > 1 else 0)


def attention_backward(call: Arguments, saved: Saved, target: str) -> Workspace:
    q, k, v = call.q, call.k, call.v
    results = [gradient(q), gradient(k), gradient(v)]
    if q.numel() == 0:
        return results, 0
    runs = call.head_runs()
    run = _LargestRun(call, target, _most_heads(runs))
    flash = run.has_kernel() and saved.grad_lse is None
    if flash and len(runs) == 1:
        results = list(gradients(call, target))
    largest = max(runs, key=lambda one: one.heads.stop - one.heads.start)
    beside = run.backward_bytes(saved.part(lambda t: t[:, largest.heads]))
    if call.group == 1:
        return results, beside
    sums = k.shape[0] * k.shape[2] * (k.shape[3] + v.shape[3]) * k.itemsize
    own = run.gradient_bytes() + max(beside, sums)
    return results, own if len(runs) > 1 else own - sums - q.numel() * q.itemsize


def attention_vector_gradient(call: Arguments, saved: Saved, which: int, target: str) -> Workspace:
    run = _LargestRun(call, target, _most_heads(call.head_runs()))
    return _summed([call.vectors[which]], saved.lse.dtype, run.vector_gradient_bytes(which) if call.q.numel() else 0)


def attention_rows(call: Arguments, target: str) -> Workspace:
    q = call.q
    results = [q.new_empty((*q.shape[:2], call.v.shape[3])), q.new_empty(q.shape[:2], dtype=wide(q.dtype))]
    if q.numel() == 0:
        return results, 0
    run = _largest_rows(call, target)
    # Up to two sets of keys, merged in the wide dtype, and one left from the run before.
    return results, 8 * run.output_bytes(wide(q.dtype)) + run.forward_bytes()


def attention_rows_backward(call: Arguments, saved: Saved, target: str) -> Workspace:
    operands = [call.q, call.k, call.v]
    if call.q.numel() == 0:
        return _summed(operands, saved.lse.dtype, 0)
    run = _largest_rows(call, target)

    def part(tensor: Tensor) -> Tensor:
        """Rows of one head among those of others, which a rank may have wherever its own begin."""
        among = tensor.new_empty((tensor.shape[0], tensor.shape[1] + 1, *tensor.shape[2:]))
        return (among if tensor.is_contiguous() else tensor)[:, : run.rows].unsqueeze(1)

    return _summed(operands, saved.lse.dtype, run.gradient_bytes() + run.backward_bytes(saved.part(part)))


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
    def width(self) -> int:
        """The head dim."""
        return self.call.q.shape[-1]

    @property
    def lines(self) -> int:
        """Heads of all sequences of the batch."""
        return self.call.q.shape[0] * self.heads

    def output_bytes(self, dtype: torch.dtype | None = None) -> int:
        lse = wide(self.call.q.dtype).itemsize
        return self.lines * self.rows * (self.call.v.shape[3] * (dtype or self.call.q.dtype).itemsize + lse)

    def gradient_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Of q, k and v, every query head with keys and values of its own."""
        widths = self.rows * self.width + self.call.k.shape[2] * (self.call.k.shape[3] + self.call.v.shape[3])
        return self.lines * widths * (dtype or self.call.q.dtype).itemsize

    def forward_bytes(self) -> int:
        return self.split_bytes() if self.has_kernel() else self.block_bytes(SCORING, PART)

    def backward_bytes(self, saved: Saved) -> int:
        """Beside the gradients; `saved` is what the run is given of it."""
        if self.has_kernel() and saved.grad_lse is None:
            accumulated = self.flash_bytes() if TARGETS[self.target].flash.accumulates else 0
            return accumulated + self.copied_bytes(saved)
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
        return self.lines * -(-self.rows // 128) * 128 * (self.flash_width + 1) * 4

    @property
    def flash_width(self) -> int:
        width = self.width
        multiple = 32 if width <= 128 else 64
        return -(-width // multiple) * multiple

    def split_bytes(self) -> int:
        """Of outputs and lse, in fp32, of all parts into which the keys of few rows are split."""
        if not TARGETS[self.target].flash.splits:
            return 0
        if self.most_rows is None and self.lines * -(-self.rows // PART_ROWS) >= UNSPLIT_BLOCKS:
            return 0
        return min(PARTS * self.lines * self.rows, ALL_PART_ROWS) * (self.flash_width + 1) * 4

    def copied_bytes(self, saved: Saved) -> int:
        """Of the copies of a run's parts that a kernel reads instead of them."""
        flash = TARGETS[self.target].flash
        parts = [part for part in (getattr(saved, name) for name in flash.copied) if not is_by_row(part)]
        parts += [saved.lse] if flash.dense_lse and not saved.lse.is_contiguous() else []
        return sum(part.numel() * part.itemsize for part in parts)

    def block_bytes(self, tensors: int, parts: int) -> int:
        """Of a block of rows and keys: scores, expression, draws, and what is read of q, k, v and vectors, widened."""
        size, scoring = TARGETS[self.target].attention_block, self.call.scoring
        itemsize = wide(self.call.q.dtype).itemsize
        rows, keys = min(size, self.rows), min(size, self.call.k.shape[2])
        count = sum(1 for _ in walk(scoring.get("score"))) if scoring.get("score") is not None else 0
        block = tensors * itemsize + 8 * (count * parts + (DRAWING if scoring.get("dropout") else 0))
        read = tensors * (rows + keys) * max(self.width, self.call.v.shape[3]) * itemsize
        seen = 8 * sum(3 * vector.numel() for vector in self.call.vectors)
        return self.lines * (rows * keys * block + read) + seen + FEW

    def has_kernel(self) -> bool:
        return takes_call(self.call, self.target)


def _largest_rows(call: Arguments, target: str) -> _LargestRun:
    """The largest run over heads and rows as one dim."""
    return _LargestRun(call, target, 1, min(call.rows, call.q.shape[1]))


def _most_heads(runs: list[HeadRun]) -> int:
    return max((run.heads.stop - run.heads.start for run in runs), default=0)


def _summed(operands: list[Tensor], dtype: torch.dtype, beside: int) -> Workspace:
    """Gradients without gaps that are added up in `dtype`."""
    totals = sum(t.numel() * dtype.itemsize for t in operands if t.dtype != dtype)
    return [t.new_empty(t.shape) for t in operands], totals + beside
