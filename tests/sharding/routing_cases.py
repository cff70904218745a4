"""Calls of products of rows with experts, and of counts of rows."""

from tests.sharding.drawing import ids, normal, sizes

EXPERTS = 4


def _routed(rng):
    """Each row's expert (some have none), and two values of the rows."""
    rows = rng.randint(1, 9)
    return ids(rng, EXPERTS + 2, rows) - 1, normal(rng, rows, 3), normal(rng, rows, 2)


ARGUMENTS = {
    "aten.histc.default": lambda rng: (normal(rng, *sizes(rng, 2)), rng.randint(1, 4), -1, 2),
    "autosp.expert_mm": lambda rng: (*_routed(rng)[:2], normal(rng, EXPERTS, 3, 2)),
    "autosp.expert_mm_weight_grad": lambda rng: (*_routed(rng), EXPERTS),
}
