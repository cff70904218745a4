"""Operators that move elements: reshape, permute, expand, slice, pad, cat, and constant tensors."""

from collections.abc import Callable, Iterator

from autosp_aot.ir.program import Args, per_rank
from autosp_aot.sharding.call import Call, Rule
from autosp_aot.sharding.local import Local
from autosp_aot.sharding.spec import Axis, Dims, Spec, identity

LINEAR_IN_FIRST = ((0,),)
Sizes = list[tuple[int, int]]  # dims and their sizes


def reshape(call: Call) -> Spec:
    """Dims in, dims out as products of common factors; where none exist, that group of dims is whole."""
    extents: list[int] = []
    whole: set[int] = set()
    operand: list[tuple[Axis, ...]] = [()] * len(call.operands[0].shape)
    result: list[tuple[Axis, ...]] = [()] * len(call.results[0].shape)
    for ins, outs in _groups(call.operands[0].shape, call.results[0].shape):
        factors = _factors([s for _, s in ins], [s for _, s in outs])
        first = len(extents)
        if factors is None:
            extents += [size for _, size in ins] + [size for _, size in outs]
            whole.update(range(first, len(extents)))
            for at, (dim, _) in enumerate(ins):
                operand[dim] = (Axis(first + at),)
            for at, (dim, _) in enumerate(outs):
                result[dim] = (Axis(first + len(ins) + at),)
            continue
        extents += factors
        _deal(operand, ins, factors, first)
        _deal(result, outs, factors, first)
    operands, results = (tuple(operand),), (tuple(result),)
    return Spec(tuple(extents), frozenset(whole), operands, results, LINEAR_IN_FIRST, localize=_sizes(1))


def _groups(ins: tuple[int, ...], outs: tuple[int, ...]) -> Iterator[tuple[Sizes, Sizes]]:
    """Runs of dims (those of size one left out) that hold the same elements on both sides."""
    left = [(dim, size) for dim, size in enumerate(ins) if size != 1]
    right = [(dim, size) for dim, size in enumerate(outs) if size != 1]
    if 0 in ins:
        yield left, right
        return
    while left:
        a, b = [left.pop(0)], [right.pop(0)]
        while (x := _size(a)) != (y := _size(b)):
            if x < y:
                a.append(left.pop(0))
            else:
                b.append(right.pop(0))
        yield a, b


def _size(dims: Sizes) -> int:
    size = 1
    for _, n in dims:
        size *= n
    return size


def _factors(ins: list[int], outs: list[int]) -> list[int] | None:
    """The common refinement of two lists of sizes with equal product: [6, 4] and [2, 12] -> [2, 3, 4]."""
    if 0 in ins:
        return None
    ends = sorted(_ends(ins) | _ends(outs))
    factors, before = [], 1
    for end in ends:
        if end % before:
            return None
        factors.append(end // before)
        before = end
    return factors


def _ends(sizes: list[int]) -> set[int]:
    ends, product = set(), 1
    for size in sizes:
        product *= size
        ends.add(product)
    return ends


def _deal(dims: list[tuple[Axis, ...]], group: Sizes, factors: list[int], first: int) -> None:
    at = 0
    for dim, size in group:
        axes, product = [], 1
        while product < size:
            axes.append(Axis(first + at))
            product *= factors[at]
            at += 1
        dims[dim] = tuple(axes)


def _sizes(position: int) -> Callable[[Args, Local], Args]:
    """Local arguments in which the one that holds sizes is the result's local shape."""

    def localize(args: Args, local: Local) -> Args:
        return (*args[:position], local.result_shapes[0], *args[position + 1 :])

    return localize


def permute(call: Call) -> Spec:
    shape, order = call.operands[0].shape, call.instr.args[1]
    result = tuple((Axis(dim),) for dim in order)
    return Spec(shape, frozenset(), (identity(shape),), (result,), LINEAR_IN_FIRST)


def expand(call: Call) -> Spec:
    shape = call.results[0].shape
    source = call.operands[0].shape
    skipped = len(shape) - len(source)
    operand = tuple(() if size != shape[dim + skipped] else (Axis(dim + skipped),) for dim, size in enumerate(source))
    return Spec(shape, frozenset(), (operand,), (identity(shape),), LINEAR_IN_FIRST, localize=_sizes(1))


def slice_(call: Call) -> Spec:
    """Positions `start .. start + n` of a dim: each rank keeps what it holds of them."""
    shape = call.operands[0].shape
    dim, start, step = _span(shape, *call.instr.args[1:])
    size = call.results[0].shape[dim]
    seen = Axis(dim, offset=start, size=size)
    result: Dims = tuple((seen if d == dim else Axis(d),) for d in range(len(shape)))
    if step != 1:
        extents, result = _own_dim(shape, dim, size, result)
        return Spec(extents, frozenset({dim, len(shape)}), (identity(shape),), (result,), LINEAR_IN_FIRST)

    def localize(args: Args, local: Local) -> Args:
        return (args[0], dim, local.start(seen), local.start(seen, local.result_shapes[0][dim]), 1)

    return Spec(shape, frozenset(), (identity(shape),), (result,), LINEAR_IN_FIRST, localize=localize)


def _span(
    shape: tuple[int, ...], dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> tuple[int, int, int]:
    """A slice's dim, first position and step, whichever way they are given: from the end, or not at all."""
    dim %= len(shape)
    return dim, slice(start, end).indices(shape[dim])[0], step


def slice_backward(call: Call) -> Spec:
    """A gradient put back at `start .. start + n` of a dim of zeros."""
    _, shape, *span = call.instr.args
    dim, start, step = _span(shape, *span)
    size = call.operands[0].shape[dim]
    seen = Axis(dim, offset=start, size=size)
    operand: Dims = tuple((seen if d == dim else Axis(d),) for d in range(len(shape)))
    if step != 1:
        extents, operand = _own_dim(shape, dim, size, operand)
        whole = frozenset({dim, len(shape)})
        return Spec(extents, whole, (operand,), (identity(shape),), LINEAR_IN_FIRST, localize=_sizes(1))

    def localize(args: Args, local: Local) -> Args:
        start = local.start(seen)
        return (args[0], local.result_shapes[0], dim, start, local.start(seen, local.operand_shapes[0][dim]), 1)

    return Spec(shape, frozenset(), (operand,), (identity(shape),), LINEAR_IN_FIRST, localize=localize)


def _own_dim(shape: tuple[int, ...], dim: int, size: int, dims: Dims) -> tuple[tuple[int, ...], Dims]:
    """Extents with one more factor, and dims in which `dim` has it for itself."""
    return (*shape, size), tuple((Axis(len(shape)),) if d == dim else axes for d, axes in enumerate(dims))


def pad(call: Call) -> Spec | None:
    """Constant padding: each rank pads where its box reaches beyond the operand."""
    _, pads, value = (*call.instr.args, 0)[:3]
    shape, source = call.results[0].shape, call.operands[0].shape
    before = {len(shape) - 1 - at // 2: pads[at] for at in range(0, len(pads), 2)}
    if any(n < 0 for n in pads):
        return None
    axes = [Axis(d, before.get(d, 0), source[d]) if source[d] != shape[d] else Axis(d) for d in range(len(shape))]

    def localize(args: Args, local: Local) -> Args:
        sizes = []
        for at in range(0, len(pads), 2):
            dim = len(shape) - 1 - at // 2
            left = local.start(axes[dim]) if axes[dim].size is not None else 0
            right = local.minus(local.result_shapes[0][dim], left, local.operand_shapes[0][dim])
            sizes += [left, right]
        return (args[0], tuple(sizes), *args[2:])

    linear = LINEAR_IN_FIRST if value == 0 else ()
    return Spec(shape, frozenset(), (tuple((a,) for a in axes),), (identity(shape),), linear, localize=localize)


def cat(call: Call) -> Spec:
    """Each operand is a window of the joined dim: a rank joins what it holds of each."""
    shape, dim = call.results[0].shape, call.instr.args[1] % len(call.results[0].shape)
    operands, start = [], 0
    for value in call.operands:
        seen = Axis(dim, offset=start, size=value.shape[dim])
        operands.append(tuple((seen if d == dim else Axis(d),) for d in range(len(shape))))
        start += value.shape[dim]
    return Spec(shape, frozenset(), tuple(operands), (identity(shape),), (tuple(range(len(operands))),))


def slice_scatter(call: Call) -> Spec:
    """Positions `start .. start + n` of a dim replaced: each rank replaces what it holds of them."""
    shape, part = (value.shape for value in call.operands)
    dim, start, step = _span(shape, *call.instr.args[2:])
    seen = Axis(dim, offset=start, size=part[dim])
    operand: Dims = tuple((seen if d == dim else Axis(d),) for d in range(len(shape)))
    if step != 1:
        extents, operand = _own_dim(shape, dim, part[dim], operand)
        return Spec(extents, frozenset({dim, len(shape)}), (identity(shape), operand), (identity(shape),), ((0, 1),))

    def localize(args: Args, local: Local) -> Args:
        start = local.start(seen)
        return (*args[:2], dim, start, local.start(seen, local.operand_shapes[1][dim]), 1)

    return Spec(shape, frozenset(), (identity(shape), operand), (identity(shape),), ((0, 1),), localize=localize)


def triangle(call: Call) -> Spec:
    """Elements on one side of the diagonal that a row of a rank's box meets further right, a column further left."""
    shape, diagonal = call.operands[0].shape, (*call.instr.args, 0)[1]
    row, column = len(shape) - 2, len(shape) - 1

    def localize(args: Args, local: Local) -> Args:
        sign = 1 if local.factor == row else -1 if local.factor == column else 0
        return args[0], per_rank(tuple(diagonal + sign * lo for lo, _ in local.bounds))

    dims = identity(shape)
    return Spec(shape, frozenset(), (dims,), (dims,), LINEAR_IN_FIRST, localize=localize, flat=frozenset({row, column}))


def arange(call: Call) -> Spec | None:
    start, _, step = call.instr.args
    if not all(isinstance(n, int) for n in call.instr.args):
        return None

    def localize(args: Args, local: Local) -> Args:
        first = per_rank(tuple(start + lo * step for lo, _ in local.bounds))
        end = per_rank(tuple(start + hi * step for _, hi in local.bounds))
        return first, end, step

    return Spec(call.results[0].shape, frozenset(), (), (identity(call.results[0].shape),), localize=localize,
                flat=frozenset({0}))  # fmt: skip


def factory(position: int) -> Rule:
    """A constant tensor whose sizes are argument `position`."""

    def rule(call: Call) -> Spec:
        shape = call.results[0].shape
        operands = tuple(tuple((Axis(len(shape) + at),) for at in range(len(v.shape))) for v in call.operands)
        extents = (*shape, *(n for v in call.operands for n in v.shape))
        whole = frozenset(range(len(shape), len(extents)))
        return Spec(extents, whole, operands, (identity(shape),), localize=_sizes(position))

    return rule
