"""Attention kernels by target, and our own blockwise one for what they lack.

    attention(q, k, v, scale, causal, group, first_head) -> out, lse

    q: [B, n, S, D]   k: [B, m, T, D]   v: [B, m, T, Dv]   out: [B, n, S, Dv]   lse: [B, n, S]

`first_head` is the number of q's first head in the whole; key/value head number h // group serves query head h, and k's
first head is number first_head // group. `lse` is fp32 for half dtypes, else q's dtype. With `causal` query i sees
keys 0..i. A rank without heads yields empty tensors and calls no kernel.
"""

import torch
from torch import Tensor

from autosp_aot.runtime import experts

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
BLOCK = 1024


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, group: int, first_head: int):
    """Forward: out and the log of the sum of exponentials of each row's scores."""
    if q.numel() == 0:
        lse = q.new_empty(q.shape[:3], dtype=torch.float32 if q.dtype in HALF else q.dtype)
        return q.new_empty((*q.shape[:3], v.shape[3])), lse
    kernel, _ = _kernels(q, v)
    parts = [kernel(*_part(q, k, v, heads, kv), scale, causal) for heads, kv in _runs(q.shape[1], group, first_head)]
    return tuple(torch.cat(found, 1) if len(parts) > 1 else found[0] for found in zip(*parts))


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float, causal: bool, group: int, first_head: int,
):  # fmt: skip
    """Gradients of q, k and v; those of k and v hold what this rank's query heads add to them."""
    if q.numel() == 0:
        return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    _, kernel = _kernels(q, v)
    parts = []
    for heads, kv in _runs(q.shape[1], group, first_head):
        own = [tensor[:, heads] for tensor in (out, lse)]
        grad_q, grad_k, grad_v = kernel(grad_out[:, heads], *_part(q, k, v, heads, kv), *own, scale, causal)
        if kv.stop - kv.start == 1 and heads.stop - heads.start > 1:
            grad_k, grad_v = grad_k.sum(1, keepdim=True), grad_v.sum(1, keepdim=True)
        parts.append((grad_q, grad_k, grad_v))
    return tuple(torch.cat(found, 1) if len(parts) > 1 else found[0] for found in zip(*parts))


def attention_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, group: int, rows: int, start: int):
    """`attention` for positions `start ..` of heads and rows as one dim: q [B, L, D] -> out [B, L, Dv], lse [B, L]."""
    if q.numel() == 0:
        lse = q.new_empty(q.shape[:2], dtype=torch.float32 if q.dtype in HALF else q.dtype)
        return q.new_empty((*q.shape[:2], v.shape[3])), lse
    kernel, _ = _kernels(q, v)
    outs, lses = [], []
    for part, kv, first in _row_runs(q.shape[1], group, rows, start):
        mine, found = q[:, part].unsqueeze(1), None
        for keys, is_causal in _key_blocks(first, mine.shape[2], k.shape[2], causal):
            more = kernel(mine, k[:, kv, keys], v[:, kv, keys], scale, is_causal)
            found = more if found is None else _merged(found, more)
        outs.append(found[0].squeeze(1))
        lses.append(found[1].squeeze(1))
    return torch.cat(outs, 1), torch.cat(lses, 1)


def attention_rows_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    scale: float, causal: bool, group: int, rows: int, start: int,
):  # fmt: skip
    """Gradients of `attention_rows`; those of k and v hold what this rank's rows add to them."""
    dtype = torch.float32 if q.dtype in HALF else q.dtype
    grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=dtype) for t in (q, k, v))
    _, kernel = _kernels(q, v)
    for part, kv, first in _row_runs(q.shape[1], group, rows, start):
        mine = [t[:, part].unsqueeze(1) for t in (grad_out, q, out, lse)]
        for keys, is_causal in _key_blocks(first, part.stop - part.start, k.shape[2], causal):
            found = kernel(mine[0], mine[1], k[:, kv, keys], v[:, kv, keys], mine[2], mine[3], scale, is_causal)
            grad_q[:, part] += found[0].squeeze(1)
            grad_k[:, kv, keys] += found[1]
            grad_v[:, kv, keys] += found[2]
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _row_runs(count: int, group: int, rows: int, start: int):
    """(positions here, key/value head here, first row) of each head that positions `start .. start + count` touch."""
    at, runs, first_kv = start, [], start // rows // group
    while at < start + count:
        head, row = divmod(at, rows)
        end = min((head + 1) * rows, start + count)
        kv = head // group - first_kv
        runs.append((slice(at - start, end - start), slice(kv, kv + 1), row))
        at = end
    return runs


def _key_blocks(first: int, count: int, keys: int, causal: bool):
    """What rows `first .. first + count` see: all keys, or those before them and a triangle (kernels differ on it)."""
    if not causal:
        return [(slice(0, keys), False)]
    before = [(slice(0, first), False)] if first else []
    return [*before, (slice(first, first + count), True)]


def _merged(a, b):
    """Attention over two sets of keys as one, by their lse."""
    lse = torch.logaddexp(a[1], b[1])
    weights = [torch.exp(part[1] - lse).unsqueeze(-1) for part in (a, b)]
    return (a[0] * weights[0] + b[0] * weights[1]).to(a[0].dtype), lse


def _runs(heads: int, group: int, first_head: int):
    """(query heads, key/value heads) as slices: all at once where they are one to one, else a run a key/value head."""
    if group == 1:
        return [(slice(0, heads), slice(0, heads))]
    first_kv, runs, at = first_head // group, [], 0
    while at < heads:
        kv = (first_head + at) // group
        end = min((kv + 1) * group - first_head, heads)
        runs.append((slice(at, end), slice(kv - first_kv, kv - first_kv + 1)))
        at = end
    return runs


def _part(q: Tensor, k: Tensor, v: Tensor, heads: slice, kv: slice):
    """The tensors of a run; one key/value head is repeated by stride, not by copy."""
    q, k, v = q[:, heads], k[:, kv], v[:, kv]
    n = q.shape[1]
    return q, k.expand(-1, n, -1, -1), v.expand(-1, n, -1, -1)


def _kernels(q: Tensor, v: Tensor):
    """Forward and backward kernel for a device, dtype and width.

    Only operators that CUDA and ROCm builds of torch share: flash attention is FlashAttention-2 on one, AOTriton or CK
    on the other.
    """
    same_width = q.shape[-1] == v.shape[-1]
    if q.device.type == "cpu" and same_width:
        return _cpu_flash, _cpu_flash_backward
    if q.device.type == "cuda" and same_width and q.dtype in HALF and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0:
        return _cuda_flash, _cuda_flash_backward
    return blockwise, blockwise_backward


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
        grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, state, state[:1], scale=scale
    )


def blockwise(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool):
    """Attention in plain torch with O(S) memory: online softmax over blocks of keys (Dao et al., arXiv:2205.14135)."""
    dtype = torch.float32 if q.dtype in HALF else q.dtype
    outs, lses = [], []
    for rows in _blocks(q.shape[2]):
        top = q.new_full((*q.shape[:2], rows.stop - rows.start), float("-inf"), dtype=dtype)
        total, out = torch.zeros_like(top), q.new_zeros((*top.shape, v.shape[3]), dtype=dtype)
        for keys in _seen(rows, k.shape[2], causal):
            scores = _scores(q, k, rows, keys, scale, causal, dtype)
            higher = torch.maximum(top, scores.amax(-1))
            weights = torch.exp(scores - higher.unsqueeze(-1))
            shrink = torch.exp(top - higher)
            total = total * shrink + weights.sum(-1)
            out = out * shrink.unsqueeze(-1) + weights @ v[:, :, keys].to(dtype)
            top = higher
        outs.append((out / total.unsqueeze(-1)).to(q.dtype))
        lses.append(top + total.log())
    return torch.cat(outs, 2), torch.cat(lses, 2)


def blockwise_backward(grad_out, q, k, v, out, lse, scale: float, causal: bool):
    """Gradients of `blockwise`: the scores are made again block by block from lse."""
    dtype = lse.dtype
    grad_q, grad_k, grad_v = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q, k, v))
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    for rows in _blocks(q.shape[2]):
        grad = grad_out[:, :, rows].to(dtype)
        for keys in _seen(rows, k.shape[2], causal):
            scores = _scores(q, k, rows, keys, scale, causal, dtype)
            weights = torch.exp(scores - lse[:, :, rows].unsqueeze(-1))
            grad_v[:, :, keys] += weights.transpose(-1, -2) @ grad
            grad_weights = grad @ v[:, :, keys].to(dtype).transpose(-1, -2)
            grad_scores = weights * (grad_weights - delta[:, :, rows].unsqueeze(-1)) * scale
            grad_q[:, :, rows] += grad_scores @ k[:, :, keys].to(dtype)
            grad_k[:, :, keys] += grad_scores.transpose(-1, -2) @ q[:, :, rows].to(dtype)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _blocks(count: int):
    return [slice(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK)]


def _seen(rows: slice, keys: int, causal: bool):
    return [block for block in _blocks(keys) if not causal or block.start < rows.stop]


def _scores(q, k, rows: slice, keys: slice, scale: float, causal: bool, dtype) -> Tensor:
    scores = q[:, :, rows].to(dtype) @ k[:, :, keys].to(dtype).transpose(-1, -2) * scale
    if causal and keys.stop > rows.start + 1:
        row = torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(1)
        scores = scores.masked_fill(torch.arange(keys.start, keys.stop, device=q.device) > row, float("-inf"))
    return scores


OURS = {
    "autosp.attention": attention,
    "autosp.attention_backward": attention_backward,
    "autosp.attention_rows": attention_rows,
    "autosp.attention_rows_backward": attention_rows_backward,
    **experts.OURS,
}
