"""Draws: every element follows from its position in the whole value, so any box can be drawn where it is needed."""

from autosp_aot.ir.program import per_rank
from autosp_aot.sharding.spec import Axis, Spec


def uniform(call) -> Spec:
    """Every dim is parallel; a rank is told which box of the whole shape it draws."""
    shape = call.results[0].shape

    def localize(args, local):
        start, stop = (per_rank(tuple(bounds[at] for bounds in local.bounds)) for at in (0, 1))
        return (*args[:-1], (local.factor, local.outer, start, stop))

    return Spec(shape, frozenset(), ((),), (tuple((Axis(dim),) for dim in range(len(shape))),), localize=localize)
