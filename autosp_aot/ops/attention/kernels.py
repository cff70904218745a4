"""Attention kernels by target, and our own blockwise one for what they lack.

    attention(q, k, v, vectors, seed, group, first_head, scale=, causal=, window=, score=, ...) -> out, lse

    q: [B, n, S, D]   k: [B, m, T, D]   v: [B, m, T, Dv]   out: [B, n, S, Dv]   lse: [B, n, S]
    vectors: [B or 1, n or 1, S or 1, T or 1] each, what `score` (see `scores`) reads beside products and positions

`first_head` is the number of q's first head in the whole; key/value head number h // group serves query head h, and k's
first head is number first_head // group. What of q, k, v and out is not dense is copied: flash kernels read the head
dim as if it were, and do not check it. `lse` is fp32 for half dtypes, else q's dtype. The rest is `Scoring`'s, and
where `dropout` is not zero the `site` of the draws and the number of all `heads`. A rank without heads yields empty
tensors and calls no kernel.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autosp_aot.ir.operators import wide
from autosp_aot.ops.attention.blockwise import (
    Dropout,
    Scoring,
    blockwise,
    blockwise_backward,
    blockwise_vector_gradient,
)
from autosp_aot.ops.attention.workspace import dense, gradient, has_kernel, head_runs, outputs

aten = torch.ops.aten


def attention(
    q: Tensor, k: Tensor, v: Tensor, vectors: list[Tensor], seed: Tensor | None,
    group: int, first_head: int, **scoring,
):  # fmt: skip
    """Forward: out and the log of the sum of exponentials of each row's scores."""
    q, k, v = dense(q), dense(k), dense(v)
    if q.numel() == 0:
        return outputs(q, v.shape[3], q.device.type)
    runs = head_runs(q.shape[1], group, first_head)
    results = outputs(q, v.shape[3], q.device.type) if len(runs) > 1 else None
    for heads, kv in runs:
        mask = _scoring(scoring, seed, first_head + heads.start, q.shape[2], k.shape[2])
        found = _forward(*_part(q, k, v, heads, kv), _of_heads(vectors, heads), mask)
        if results is None:
            return found
        _put(results, (heads, heads), found)
        del found
    return results


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    vectors: list[Tensor], seed: Tensor | None, group: int, first_head: int, **scoring,
):  # fmt: skip
    """Gradients of q, k and v; those of k and v hold what this rank's query heads add to them."""
    if q.numel() == 0:
        return gradient(q), gradient(k).zero_(), gradient(v).zero_()
    q, k, v, out = dense(q), dense(k), dense(v), dense(out)
    runs = head_runs(q.shape[1], group, first_head)
    results = (gradient(q), gradient(k), gradient(v)) if len(runs) > 1 else None
    for heads, kv in runs:
        own = out[:, heads], lse[:, heads], None if grad_lse is None else grad_lse[:, heads]
        mask = _scoring(scoring, seed, first_head + heads.start, q.shape[2], k.shape[2])
        parts = _part(q, k, v, heads, kv)
        found = _backward(grad_out[:, heads], *parts, *own, _of_heads(vectors, heads), mask)
        if group > 1:
            found = found[0], found[1].sum(1, keepdim=True), found[2].sum(1, keepdim=True)
        if results is None:
            return found
        _put(results, (heads, kv, kv), found)
        del found
    return results


def attention_vector_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    vectors: list[Tensor], seed: Tensor | None, which: int, group: int, first_head: int, **scoring,
):  # fmt: skip
    """The gradient of vector `which`: what this rank's query heads add to it."""
    total = vectors[which].new_zeros(vectors[which].shape, dtype=lse.dtype)
    for heads, kv in head_runs(q.shape[1], group, first_head) if q.numel() else ():
        own = out[:, heads], lse[:, heads], None if grad_lse is None else grad_lse[:, heads]
        mine, parts = _of_heads(vectors, heads), _part(q, k, v, heads, kv)
        mask = _scoring(scoring, seed, first_head + heads.start, q.shape[2], k.shape[2])
        found = blockwise_vector_gradient(grad_out[:, heads], *parts, *own, mine, which, mask)
        _of_heads([total], heads)[0].add_(found)
    return total.to(vectors[which].dtype)


def attention_rows(
    q: Tensor, k: Tensor, v: Tensor, vectors: list[Tensor], seed: Tensor | None,
    group: int, rows: int, start: int, **scoring,
):  # fmt: skip
    """`attention` for positions `start ..` of heads and rows as one dim: q [B, L, D] -> out [B, L, Dv], lse [B, L].

    Vectors are whole, [B or 1, N or 1, S or 1, T or 1], or cut as q is, [B or 1, L, T or 1].
    """
    results = q.new_empty((*q.shape[:2], v.shape[3])), q.new_empty(q.shape[:2], dtype=wide(q.dtype))
    q, k, v = dense(q), dense(k), dense(v)
    for run in _row_runs(q.shape[1], group, rows, start) if q.numel() else ():
        mine, found = run.rows(q), None
        for keys, mask in _key_blocks(run, k.shape[2], run.scoring(scoring, seed, k)):
            more = _forward(mine, k[:, run.kv, keys], v[:, run.kv, keys], run.vectors(vectors), mask)
            found = more if found is None else _merged(found, more)
        assert found is not None, "there are keys"
        _put(results, (run.part, run.part), [part.squeeze(1) for part in found])
    return results


def attention_rows_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    vectors: list[Tensor], seed: Tensor | None, group: int, rows: int, start: int, **scoring,
):  # fmt: skip
    """Gradients of `attention_rows`; those of k and v hold what this rank's rows add to them."""
    grad_q, grad_k, grad_v = (t.new_zeros(t.shape, dtype=lse.dtype) for t in (q, k, v))
    q, k, v, out = dense(q), dense(k), dense(v), dense(out)
    for run in _row_runs(q.shape[1], group, rows, start) if q.numel() else ():
        grad, mine = run.rows(grad_out), run.rows(q)
        own = run.rows(out), run.rows(lse), None if grad_lse is None else run.rows(grad_lse)
        for keys, mask in _key_blocks(run, k.shape[2], run.scoring(scoring, seed, k)):
            parts = k[:, run.kv, keys], v[:, run.kv, keys]
            found = _backward(grad, mine, *parts, *own, run.vectors(vectors), mask)
            grad_q[:, run.part] += found[0].squeeze(1)
            grad_k[:, run.kv, keys] += found[1]
            grad_v[:, run.kv, keys] += found[2]
            del found
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def attention_rows_vector_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    vectors: list[Tensor], seed: Tensor | None, which: int, group: int, rows: int, start: int, **scoring,
):  # fmt: skip
    """The gradient of vector `which`: what this rank's rows add to it."""
    total = vectors[which].new_zeros(vectors[which].shape, dtype=lse.dtype)
    for run in _row_runs(q.shape[1], group, rows, start) if q.numel() else ():
        grad, mine = run.rows(grad_out), run.rows(q)
        own = run.rows(out), run.rows(lse), None if grad_lse is None else run.rows(grad_lse)
        mine_k, mine_v, mask = k[:, run.kv], v[:, run.kv], run.scoring(scoring, seed, k)
        found = blockwise_vector_gradient(grad, mine, mine_k, mine_v, *own, run.vectors(vectors), which, mask)
        run.vectors([total])[0].add_(found)
    return total.to(vectors[which].dtype)


@dataclass(frozen=True)
class _RowRun:
    """The positions of one head: where they are here, its key/value head here, its number, and the rows they are."""

    part: slice
    kv: slice
    head: int
    first: int
    all_rows: int

    def scoring(self, scoring: dict, seed: Tensor | None, k: Tensor) -> Scoring:
        return replace(_scoring(scoring, seed, self.head, self.all_rows, k.shape[2]), first_row=self.first)

    def rows(self, tensor: Tensor) -> Tensor:
        """The run's part of a tensor [B, L, ...], as [B, 1, rows, ...]."""
        return tensor[:, self.part].unsqueeze(1)

    def vectors(self, vectors: list[Tensor]) -> list[Tensor]:
        """What the run reads of vectors, as views of [B or 1, 1, rows or 1, T or 1]."""
        rows, found = slice(self.first, self.first + self.part.stop - self.part.start), []
        for vector in vectors:
            if vector.dim() == 3:
                found.append(self.rows(vector))
                continue
            (vector,) = _of_heads([vector], slice(self.head, self.head + 1))
            found.append(vector[:, :, rows] if vector.shape[2] > 1 else vector)
        return found


def _row_runs(count: int, group: int, rows: int, start: int) -> list[_RowRun]:
    """A run for each head that positions `start .. start + count` touch."""
    at, runs, first_kv = start, [], start // rows // group
    while at < start + count:
        head, row = divmod(at, rows)
        end = min((head + 1) * rows, start + count)
        kv = head // group - first_kv
        runs.append(_RowRun(slice(at - start, end - start), slice(kv, kv + 1), head, row, rows))
        at = end
    return runs


def _key_blocks(run: _RowRun, keys: int, scoring: Scoring) -> list[tuple[slice, Scoring]]:
    """What a run's rows see: all keys, or those before them and a triangle (kernels differ on it)."""
    stop = run.first + run.part.stop - run.part.start
    if not _plain(scoring) or not scoring.causal or stop > keys:
        return [(slice(0, keys), scoring)]
    before = [(slice(0, run.first), replace(scoring, causal=False))] if run.first else []
    return [*before, (slice(run.first, stop), replace(scoring, first_row=0))]


def _put(results: tuple[Tensor, ...], places: tuple[slice, ...], found) -> None:
    """Copy what a run found to its places along dim 1."""
    for result, place, part in zip(results, places, found):
        result[:, place] = part


def _of_heads(vectors: list[Tensor], heads: slice) -> list[Tensor]:
    """Views of what some heads read."""
    return [vector[:, heads if vector.shape[1] > 1 else slice(None)] for vector in vectors]


def _merged(a, b):
    """Attention over two sets of keys as one, by their lse."""
    lse = torch.logaddexp(a[1], b[1])
    weights = [torch.exp(part[1] - lse).unsqueeze(-1) for part in (a, b)]
    return (a[0] * weights[0] + b[0] * weights[1]).to(a[0].dtype), lse


def _part(q: Tensor, k: Tensor, v: Tensor, heads: slice, kv: slice) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a run; one key/value head is repeated by stride, not by copy."""
    q, k, v = q[:, heads], k[:, kv], v[:, kv]
    n = q.shape[1]
    return q, k.expand(-1, n, -1, -1), v.expand(-1, n, -1, -1)


def _scoring(scoring: dict, seed: Tensor | None, head: int, rows: int, keys: int) -> Scoring:
    """The scoring of a call whose first head has number `head`, over so many rows and keys of the whole."""
    scoring = dict(scoring)
    p, site, heads = scoring.pop("dropout", 0.0), scoring.pop("site", 0), scoring.pop("heads", 0)
    if not p:
        return Scoring(**scoring)
    assert seed is not None, "what is dropped is drawn"
    return Scoring(**scoring, dropout=Dropout(seed, site, p, heads, rows, keys, head))


def _plain(scoring: Scoring) -> bool:
    """True where softmax is all there is."""
    return scoring.score is None and scoring.window is None and scoring.dropout is None


def _forward(q: Tensor, k: Tensor, v: Tensor, vectors: list[Tensor], scoring: Scoring) -> tuple[Tensor, Tensor]:
    kernel = _kernels(q, k, v, scoring)
    if kernel is None:
        return blockwise(q, k, v, vectors, scoring)
    return kernel[0](q, k, v, scoring.scale, scoring.causal)


def _backward(grad_out, q, k, v, out, lse, grad_lse, vectors, scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernels(q, k, v, scoring)
    if kernel is None or grad_lse is not None:
        return blockwise_backward(grad_out, q, k, v, out, lse, grad_lse, vectors, scoring)
    return kernel[1](grad_out, q, k, v, out, lse, scoring.scale, scoring.causal)


def _kernels(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring):
    """Forward and backward kernel for a device, dtype, width and softmax; None where there is none.

    Only operators that CUDA and ROCm builds of torch share: flash attention is FlashAttention-2 on one, AOTriton or CK
    on the other.
    """
    if not has_kernel(q, k, v, _plain(scoring), scoring.causal, q.device.type):
        return None
    return (_cpu_flash, _cpu_flash_backward) if q.device.type == "cpu" else (_cuda_flash, _cuda_flash_backward)


def _cpu_flash(q, k, v, scale, causal):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_flash_backward(grad_out, q, k, v, out, lse, scale, causal):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def _cuda_flash(q, k, v, scale, causal):
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _cuda_flash_backward(grad_out, q, k, v, out, lse, scale, causal):
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a random generator that dropout 0 does not read
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, state, state[:1],
        scale=scale,
    )  # fmt: skip
