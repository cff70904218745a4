"""Calls of convolutions of every kind: grouped, depthwise, strided, transposed."""

from autosp_aot.ir.operators import overload
from tests.sharding.drawing import normal


def _convolution(rng):
    places, transposed = rng.randint(1, 2), rng.random() < 0.3
    groups, made, read = rng.choice([1, 1, 2, 4]), rng.randint(1, 3), rng.randint(1, 3)
    x = normal(rng, rng.randint(1, 4), groups * read, *[rng.randint(5, 9) for _ in range(places)])
    sides = [rng.randint(1, 3) for _ in range(places)]
    weight = normal(rng, groups * read, made, *sides) if transposed else normal(rng, groups * made, read, *sides)
    bias = normal(rng, groups * made) if rng.random() < 0.5 else None
    options = (rng.randint(1, 3),) * places, (rng.choice([0, 0, 1]),) * places, (rng.choice([1, 1, 2]),) * places
    return x, weight, bias, *options, transposed, (0,) * places, groups


def _backward(rng):
    call = _convolution(rng)
    x, weight, bias, *options, groups = call
    grad = overload("aten.convolution.default")(*call) * 2
    made = groups * weight.shape[1] if options[3] else weight.shape[0]
    return grad, x, weight, (made,), *options, groups, (True,) * 3


ARGUMENTS = {"aten.convolution.default": _convolution, "aten.convolution_backward.default": _backward}
