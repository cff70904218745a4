"""Convolutions: batch, groups and the channels that are made are parallel; channels that are read are whole.

    x: [n, g*I, L]    weight: [g*o, I, K]    bias: [g*o]    ->    [n, g*o, m]

Place m reads K places of x (dilated) from stride * m on: a rank gets what its places read, some of it its neighbour's.
With padding, or transposed, places are whole. A rank's share of the groups is a convolution of that many groups.
"""

from collections.abc import Callable

from autosp_aot.ir.program import Args, per_rank
from autosp_aot.sharding.call import Call
from autosp_aot.sharding.local import Local
from autosp_aot.sharding.spec import Axis, Dims, Linear, Spec

N, G, O, I = range(4)  # noqa: E741
GROUPS = 8


def convolution(call: Call) -> Spec:
    x, weight, *bias = (value.shape for value in call.operands)
    factors = _Factors(call.instr.args[3 : GROUPS + 1], x, weight, call.results[0].shape)
    operands = (factors.x(), factors.weight(), *(factors.bias() for _ in bias))
    results = (factors.y(),)
    linear = () if bias else ((0,), (1,))
    return factors.spec(operands, results, linear, lambda args, local: _with_groups(args, GROUPS, local))


def convolution_backward(call: Call) -> Spec:
    """Arguments are those of the forward operator, with the sizes of the bias in its place after the gradient."""
    at = GROUPS + 1
    y, x, weight = (value.shape for value in call.operands)
    factors = _Factors(call.instr.args[4 : at + 1], x, weight, y)
    operands = (factors.y(), factors.x(), factors.weight())
    every = (factors.x(), factors.weight(), factors.bias())
    results = tuple(dims for dims, used in zip(every, call.results_by_position) if used)

    def localize(args: Args, local: Local) -> Args:
        sizes = args[3] and (local.operand_shapes[0][1],)
        return _with_groups((*args[:3], sizes, *args[4:]), at, local)

    return factors.spec(operands, results, ((0,),), localize)


class _Factors:
    """The factors of a convolution, and each tensor's dims in them."""

    def __init__(self, options: Args, x: tuple[int, ...], weight: tuple[int, ...], y: tuple[int, ...]):
        stride, padding, dilation, self.transposed, _, groups = options
        made, read = (weight[1], weight[0] // groups) if self.transposed else (weight[0] // groups, weight[1])
        self.extents = [x[0], groups, made, read]
        self.places_w, self.places_y = self._places(weight), self._places(y)
        self.whole = {I, *(axis.factor for (axis,) in self.places_w)}
        self.follows: tuple[tuple[int, int], ...] = ()
        if self.transposed or any(padding):
            self.places_x = self._places(x)
            self.whole.update(axis.factor for (axis,) in (*self.places_x, *self.places_y))
            self.follows = tuple((a.factor, b.factor) for (a,), (b,) in zip(self.places_x, self.places_y))
            return
        reaches = [(size - 1) * apart + 1 for size, apart in zip(weight[2:], dilation)]
        self.places_x = tuple(
            (Axis(axis.factor, size=size, stride=step, reach=reach),)
            for (axis,), size, step, reach in zip(self.places_y, x[2:], stride, reaches)
        )

    def _places(self, shape: tuple[int, ...]) -> Dims:
        first = len(self.extents)
        self.extents += shape[2:]
        return tuple((Axis(at),) for at in range(first, len(self.extents)))

    def x(self) -> Dims:
        return ((Axis(N),), (Axis(G), Axis(I)), *self.places_x)

    def weight(self) -> Dims:
        outer, inner = (I, O) if self.transposed else (O, I)
        return ((Axis(G), Axis(outer)), (Axis(inner),), *self.places_w)

    def bias(self) -> Dims:
        return ((Axis(G), Axis(O)),)

    def y(self) -> Dims:
        return ((Axis(N),), (Axis(G), Axis(O)), *self.places_y)

    def spec(
        self, operands: tuple[Dims, ...], results: tuple[Dims, ...], linear: Linear, localize: Callable[..., Args]
    ) -> Spec:
        filled = frozenset({G, O, *(axis.factor for (axis,) in self.places_y)})
        return Spec(tuple(self.extents), frozenset(self.whole), operands, results, linear, localize=localize,
                    flat=frozenset({G}), filled=filled, follows=self.follows)  # fmt: skip


def _with_groups(args: Args, at: int, local: Local) -> Args:
    """Arguments with the number of groups that each rank has."""
    groups = per_rank(tuple(hi - lo for lo, hi in local.bounds)) if local.factor == G else args[at]
    return (*args[:at], groups, *args[at + 1 :])
