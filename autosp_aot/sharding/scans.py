"""Operators that run along some dims, which are whole, each place of the other dims for itself: cumsum, sort, flip."""

from collections.abc import Callable

from autosp_aot.sharding.call import Call, Rule
from autosp_aot.sharding.spec import Axis, Dims, Spec


def along(position: int, default: int | None = None, linear: bool = False) -> Rule:
    """The dims that argument `position` names (by `default` if it is not given; none named are all)."""

    def named(call: Call) -> tuple[int, ...]:
        args = call.instr.args
        dims = args[position] if len(args) > position else dict(call.instr.kwargs).get("dim", default)
        return (dims,) if isinstance(dims, int) else tuple(dims or range(len(call.operands[0].shape)))

    return _rule(named, linear)


def over_places(count: int, linear: bool = False) -> Rule:
    """The last `count` dims, for operators that take no empty box: pooling, padding."""
    return _rule(lambda call: tuple(range(-count, 0)), linear, filled=True)


def _rule(named: Callable[[Call], tuple[int, ...]], linear: bool, filled: bool = False) -> Rule:
    def rule(call: Call) -> Spec:
        """A result has the operand's dims, less those named if it has fewer, and may have more at its end."""
        shape = call.operands[0].shape
        whole = {dim % len(shape) for dim in named(call)} if shape else set()
        extents = list(shape)
        follows: list[tuple[int, int]] = []

        def dims(sizes: tuple[int, ...]) -> Dims:
            places = [dim for dim in range(len(shape)) if len(sizes) >= len(shape) or dim not in whole]
            found = []
            for at, size in enumerate(sizes):
                if at < len(places) and size == shape[places[at]]:
                    found.append((Axis(places[at]),))
                else:
                    whole.add(len(extents))
                    if at < len(places) and size > 1:
                        follows.append((places[at], len(extents)))
                    found.append((Axis(len(extents)),))
                    extents.append(size)
            return tuple(found)

        operands = tuple(dims(value.shape) for value in call.operands)
        results = tuple(dims(value.shape) for value in call.results)
        taken = frozenset(range(len(extents))) if filled else frozenset()
        return Spec(tuple(extents), frozenset(whole), operands, results, ((0,),) if linear else (), filled=taken,
                    follows=tuple(follows))  # fmt: skip

    return rule
