"""Calls of operators that read or write at positions given by a tensor."""

import torch

from tests.sharding.drawing import ids, normal, sizes


def _gather(rng):
    x, dim = normal(rng, *sizes(rng, 3)), rng.randrange(-3, 3)
    shape = [size if rng.random() < 0.8 else rng.randint(1, size) for size in x.shape]
    shape[dim] = rng.randint(1, 5)
    return x, dim, ids(rng, x.shape[dim], *shape)


def _scatter(rng):
    x, dim, _ = _gather(rng)
    shape = [size if rng.random() < 0.8 else rng.randint(1, size) for size in x.shape]
    order = torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(100))).argsort(dim)
    return x, dim, order, normal(rng, *shape)


def _indices(rng, shape):
    """For some dims a tensor each, of shapes that broadcast."""
    spread = sizes(rng, 2)
    named = rng.sample(range(len(shape)), rng.randint(1, len(shape)))
    slots = []
    for dim in range(max(named) + 1):
        mine = [1 if rng.random() < 0.3 else size for size in spread][rng.randint(0, 1) :]
        slots.append(ids(rng, shape[dim], *mine) if dim in named else None)
    return tuple(slots)


def _index(rng):
    x = normal(rng, *sizes(rng, 3))
    return x, _indices(rng, x.shape)


def _index_put(rng):
    x, slots = _index(rng)
    found = torch.ops.aten.index(x, list(slots)).shape
    values = [1 if rng.random() < 0.2 else size for size in found][rng.randint(0, 1) :]
    return x, slots, normal(rng, *values), True


def _list(rng):
    return normal(rng, rng.randint(1, 6)).round().sort().values


ARGUMENTS = {
    "aten.bucketize.Tensor": lambda rng: (normal(rng, *sizes(rng, 2)), _list(rng)),
    "aten.gather.default": _gather,
    "aten.index.Tensor": _index,
    "aten.index_put.default": _index_put,
    "aten.isin.Tensor_Tensor": lambda rng: (normal(rng, *sizes(rng, 2)).round(), _list(rng)),
    "aten.scatter.src": _scatter,
    "aten.scatter.value": lambda rng: (*_scatter(rng)[:3], 1.5),
    "aten.scatter_add.default": _scatter,
    "aten.scatter_reduce.two": lambda rng: (*_scatter(rng), rng.choice(["sum", "prod", "amax", "mean"])),
    "aten.searchsorted.Tensor": lambda rng: (_list(rng), normal(rng, *sizes(rng, 2))),
}
