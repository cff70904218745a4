"""Operators that capture writes as others: equal but for the order of additions, and cut wherever those can be cut.

    mse_loss(x, y)     ->  sum((x - y) ** 2) / n            each rank its positions, then one sum
    x.mean(dim)        ->  sum(x, dim) / n                  in fp32 for half dtypes, as eager adds them up
    var(x)             ->  sum((x - mean(x)) ** 2) / (n - correction)
    amax(x, [1, 2])    ->  amax(amax(x, 2), 1)              only the last step needs a dim whole
    any(mask)          ->  sum(mask) > 0
    select_scatter     ->  slice_scatter
    nll_loss2d         ->  nll_loss of rows

An operator with a fused kernel and a rule (layer_norm, softmax, gelu, attention, nll_loss of rows) is not here.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from autosp_aot.ir.operators import wide

aten = torch.ops.aten


def mean(x: Tensor, dim=None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    dims, dtype = _dims(x, dim), dtype or x.dtype
    total = aten.sum.dim_IntList(x, dims, keepdim, dtype=wide(dtype))
    return aten.div.Scalar(total, _count(x, dims)).to(dtype)


def mean_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return mean(x, dtype=dtype)


def var_mean(x: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """In two passes, as Welford's method has no sum over ranks."""
    dims, values = _dims(x, dim), x.to(wide(x.dtype))
    center = mean(values, dims, True)
    squares = aten.sum.dim_IntList((values - center).square(), dims, keepdim)
    freedom = max(_count(x, dims) - (1 if correction is None else correction), 0)
    center = center if keepdim else center.reshape(squares.shape)
    return aten.div.Scalar(squares, freedom).to(x.dtype), center.to(x.dtype)


def var(x: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def std(x: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return var(x, dim, correction=correction, keepdim=keepdim).sqrt()


def group_norm(x: Tensor, weight, bias, batch: int, channels: int, length: int, groups: int, eps: float):
    values = x.to(wide(x.dtype)).reshape(batch, groups, channels // groups, length)
    variance, center = var_mean(values, (2, 3), correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    out = ((values - center) * rstd).reshape(x.shape)
    by_channel = (channels, *[1] * (x.dim() - 2))
    out = out if weight is None else out * weight.reshape(by_channel)
    out = out if bias is None else out + bias.reshape(by_channel)
    return out.to(x.dtype), center.reshape(batch, groups), rstd.reshape(batch, groups)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """Classes last: the scores of a position are together, as in the memory of most models that put classes first."""
    if dim % max(x.dim(), 1) == x.dim() - 1:
        return NotImplemented
    return aten._log_softmax(x.movedim(dim, -1), x.dim() - 1, half_to_float).movedim(-1, dim)


def log_softmax_backward(grad: Tensor, out: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    if dim % max(out.dim(), 1) == out.dim() - 1:
        return NotImplemented
    grad, out = grad.movedim(dim, -1), out.movedim(dim, -1)
    return aten._log_softmax_backward_data(grad, out, out.dim() - 1, dtype).movedim(-1, dim)


def nll_loss2d(scores: Tensor, target: Tensor, weight, reduction: int, ignored: int) -> tuple[Tensor, Tensor]:
    loss, total = aten.nll_loss_forward(_rows(scores), target.reshape(-1), weight, reduction, ignored)
    return (loss if reduction else loss.reshape(target.shape)), total


def nll_loss2d_backward(grad: Tensor, scores: Tensor, target: Tensor, weight, reduction: int, ignored: int, total):
    grad, flat = grad if reduction else grad.reshape(-1), target.reshape(-1)
    rows = aten.nll_loss_backward(grad, _rows(scores), flat, weight, reduction, ignored, total)
    return rows.reshape(*target.shape, scores.shape[1]).movedim(-1, 1)


def _rows(scores: Tensor) -> Tensor:
    """Scores [N, C, ...] as [rows, C]."""
    return scores.movedim(1, -1).reshape(-1, scores.shape[1])


def convolution(x: Tensor, weight, bias, stride, padding, dilation, transposed: bool, more, groups: int) -> Tensor:
    """Padding apart: a rank pads where the sequence ends, and reads its neighbours' places where its own end."""
    if transposed or not any(padding):
        return NotImplemented
    none = [0] * len(padding)
    return aten.convolution(_padded(x, padding), weight, bias, stride, none, dilation, False, more, groups)


def convolution_backward(grad, x, weight, sizes, stride, padding, dilation, transposed: bool, more, groups: int, mask):
    if transposed or not any(padding):
        return NotImplemented
    padded, none = _padded(x, padding), [0] * len(padding)
    grads = aten.convolution_backward(grad, padded, weight, sizes, stride, none, dilation, False, more, groups, mask)
    back = grads[0]
    for at, pad in enumerate(padding if mask[0] else []):
        back = back.narrow(2 + at, pad, x.shape[2 + at])
    return back, *grads[1:]


def _padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    return aten.constant_pad_nd(x, [pad for pad in padding[::-1] for _ in range(2)])


def norm(x: Tensor, p: float | None, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    return torch.linalg.vector_norm(x, 2 if p is None else p, dim, keepdim)


def extreme(reduce):
    """A maximum or minimum over several dims, one dim at a time."""

    def by_dim(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
        dims = _dims(x, dim)
        if len(dims) <= 1:
            return NotImplemented
        for d in dims[::-1]:
            x = reduce(x, [d], keepdim)
        return x

    return by_dim


def some(x: Tensor, dim=None, keepdim: bool = False) -> Tensor:
    return _like_any(aten.sum.dim_IntList(x != 0, _dims(x, dim), keepdim) > 0, x)


def every(x: Tensor, dim=None, keepdim: bool = False) -> Tensor:
    return _like_any(aten.sum.dim_IntList(x == 0, _dims(x, dim), keepdim) == 0, x)


def count_nonzero(x: Tensor, dim=None) -> Tensor:
    return aten.sum.dim_IntList(x != 0, _dims(x, dim), False)


def new_full(x: Tensor, size: Sequence[int], value: float, *, dtype: torch.dtype | None = None, **_) -> Tensor:
    """A constant needs no operand."""
    return aten.full(size, value, dtype=dtype or x.dtype)


def new_empty_strided(x: Tensor, size: Sequence[int], strides: Sequence[int], **options) -> Tensor:
    return new_full(x, size, 0, **options)


def select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    at = index % x.shape[dim]
    return aten.slice_scatter(x, source.unsqueeze(dim), dim, at, at + 1)


def constant_pad(x: Tensor, pads: Sequence[int], value: float = 0) -> Tensor:
    """Negative padding is a slice."""
    if all(n >= 0 for n in pads):
        return NotImplemented
    for at in range(0, len(pads), 2):
        dim = x.dim() - 1 - at // 2
        start, end = max(-pads[at], 0), x.shape[dim] - max(-pads[at + 1], 0)
        x = x.narrow(dim, start, end - start)
    return aten.constant_pad_nd(x, [max(n, 0) for n in pads], value)


def repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    """Each dim as (repeats, size), expanded: nothing is copied but by the last reshape."""
    sizes = (1,) * (len(repeats) - x.dim()) + tuple(x.shape)
    pairs = list(zip(repeats, sizes))
    x = x.reshape([n for size in sizes for n in (1, size)])
    return x.expand([n for pair in pairs for n in pair]).reshape([prod(pair) for pair in pairs])


def put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """One value where a mask holds is a choice, position by position."""
    mask = indices[0] if len(indices) == 1 else None
    if mask is None or mask.dtype != torch.bool or values.numel() != 1 or accumulate:
        return NotImplemented
    return torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), values.reshape(()), x)


def index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return aten.index(x, [None] * (dim % x.dim()) + [index])


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    return aten.index_put(x, [None] * (dim % x.dim()) + [index], source if alpha == 1 else source * alpha, True)


def _dims(x: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    """The dims a reduction is over, in order; none given are all."""
    dims = [dim] if isinstance(dim, int) else dim or range(x.dim())
    return sorted(d % max(x.dim(), 1) for d in dims)


def _count(x: Tensor, dims: Sequence[int]) -> int:
    return prod(x.shape[d] for d in dims) if x.dim() else 1


def _like_any(found: Tensor, x: Tensor) -> Tensor:
    """Of bytes torch makes bytes, of all else booleans."""
    return found.to(torch.uint8) if x.dtype == torch.uint8 else found


OWN = {
    aten._log_softmax.default: log_softmax,
    aten._log_softmax_backward_data.default: log_softmax_backward,
    aten.all.default: every,
    aten.all.dim: every,
    aten.all.dims: every,
    aten.amax.default: extreme(aten.amax),
    aten.amin.default: extreme(aten.amin),
    aten.any.default: some,
    aten.any.dim: some,
    aten.any.dims: some,
    aten.constant_pad_nd.default: constant_pad,
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    aten.count_nonzero.default: count_nonzero,
    aten.count_nonzero.dim_IntList: count_nonzero,
    aten.index_add.default: index_add,
    aten.index_put.default: put,
    aten.index_select.default: index_select,
    aten.max.default: lambda x: aten.amax(x, list(range(x.dim()))),
    aten.mean.default: mean_all,
    aten.mean.dim: mean,
    aten.min.default: lambda x: aten.amin(x, list(range(x.dim()))),
    aten.native_group_norm.default: group_norm,
    aten.new_empty.default: lambda x, size, **options: new_full(x, size, 0, **options),
    aten.new_empty_strided.default: new_empty_strided,
    aten.new_full.default: new_full,
    aten.new_ones.default: lambda x, size, **options: new_full(x, size, 1, **options),
    aten.new_zeros.default: lambda x, size, **options: new_full(x, size, 0, **options),
    aten.nll_loss2d_backward.default: nll_loss2d_backward,
    aten.nll_loss2d_forward.default: nll_loss2d,
    aten.norm.ScalarOpt_dim: norm,
    aten.repeat.default: repeat,
    aten.select_scatter.default: select_scatter,
    aten.std.correction: std,
    aten.var.correction: var,
    aten.var_mean.correction: var_mean,
}
TORCHS = (
    aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
    aten.aminmax.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_backward.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.col2im.default,
    aten.eye.default,
    aten.eye.m,
    aten.fill.Tensor,
    aten.glu.default,
    aten.glu_backward.default,
    aten.huber_loss.default,
    aten.huber_loss_backward.default,
    aten.im2col.default,
    aten.linalg_vector_norm.default,
    aten.linspace.default,
    aten.log_sigmoid_backward.default,
    aten.log_sigmoid_forward.default,
    aten.mse_loss.default,
    aten.mse_loss_backward.default,
    aten.native_batch_norm_backward.default,
    aten.native_group_norm_backward.default,
    aten.smooth_l1_loss.default,
    aten.smooth_l1_loss_backward.default,
    aten.soft_margin_loss.default,
    aten.soft_margin_loss_backward.default,
    aten.unfold_backward.default,
)
DECOMPOSITIONS = OWN | {op: decomposition_table[op] for op in TORCHS}
