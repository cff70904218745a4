"""Calls of operators that run along some dims."""

import torch

from tests.sharding.drawing import normal, sizes


def _along(rng):
    return normal(rng, *sizes(rng, 3)), rng.randrange(-3, 3)


def _kept(rng):
    return (*_along(rng), rng.random() < 0.5)


def _flip(rng):
    return normal(rng, *sizes(rng, 3)), tuple(rng.sample(range(3), rng.randint(1, 3)))


def _roll(rng):
    dims = rng.sample(range(3), rng.randint(0, 2))
    return normal(rng, *sizes(rng, 3)), tuple(rng.randint(-3, 3) for _ in dims) or (2,), tuple(dims)


def _topk(rng):
    x, dim = _along(rng)
    return x, rng.randint(1, x.shape[dim]), dim, rng.random() < 0.5


def _kthvalue(rng):
    x, dim = _along(rng)
    return x, rng.randint(1, x.shape[dim]), dim, rng.random() < 0.5


def _unfold(rng):
    x, dim = _along(rng)
    return x, dim, rng.randint(1, x.shape[dim]), rng.randint(1, 2)


def _planes(rng):
    return normal(rng, *sizes(rng, 2), rng.randint(3, 6), rng.randint(3, 6))


def _pool(rng):
    return _planes(rng), (2, 3), (rng.randint(1, 2), 1), (1, 1)


def _average_backward(rng):
    x, *window = _pool(rng)
    return torch.ops.aten.avg_pool2d(x, *window) * 2, x, *window, False, True, None


def _maximum_backward(rng):
    x, *window = _pool(rng)
    y, at = torch.ops.aten.max_pool2d_with_indices(x, *window)
    return y * 2, x, *window, (1, 1), False, at


def _padded(rng):
    return normal(rng, *sizes(rng, 2), rng.randint(3, 5)), (rng.randint(0, 2), rng.randint(0, 2))


def _padded_backward(pad):
    def draw(rng):
        x, sides = _padded(rng)
        return pad(x, sides) * 2, x, sides

    return draw


ARGUMENTS = {
    "aten.avg_pool2d.default": _pool,
    "aten.avg_pool2d_backward.default": _average_backward,
    "aten.cummax.default": _along,
    "aten.cummin.default": _along,
    "aten.cumprod.default": _along,
    "aten.cumsum.default": _along,
    "aten.flip.default": _flip,
    "aten.kthvalue.default": _kthvalue,
    "aten.logcumsumexp.default": _along,
    "aten.max.dim": _kept,
    "aten.max_pool2d_with_indices.default": _pool,
    "aten.max_pool2d_with_indices_backward.default": _maximum_backward,
    "aten.median.dim": _kept,
    "aten.min.dim": _kept,
    "aten.mode.default": _kept,
    "aten.reflection_pad1d.default": _padded,
    "aten.reflection_pad1d_backward.default": _padded_backward(torch.ops.aten.reflection_pad1d),
    "aten.replication_pad1d.default": _padded,
    "aten.replication_pad1d_backward.default": _padded_backward(torch.ops.aten.replication_pad1d),
    "aten.roll.default": _roll,
    "aten.sort.default": lambda rng: (*_along(rng), rng.random() < 0.5),
    "aten.sort.stable": lambda rng: (normal(rng, *sizes(rng, 3)),),
    "aten.topk.default": _topk,
    "aten.unfold.default": _unfold,
}
