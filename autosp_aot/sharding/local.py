"""What a rule's `localize` is given: the strategy, and the local shapes it leads to."""

from functools import lru_cache

from autosp_aot.ir.placement import Placement, local_shape
from autosp_aot.ir.program import Int, PerRank, at_rank, per_rank
from autosp_aot.sharding.spec import Axis, Strategy

Shape = tuple[Int, ...]


class Local:
    """Sizes and positions of all ranks' boxes under a strategy that cuts something."""

    def __init__(self, strategy: Strategy, operand_shapes: list[Shape], result_shapes: list[Shape]):
        self.factor, self.bounds, self.outer = strategy.factor, strategy.bounds, strategy.outer
        self.operand_shapes, self.result_shapes = operand_shapes, result_shapes

    @staticmethod
    @lru_cache(maxsize=4096)
    def shape(whole: tuple[int, ...], placement: Placement, ranks: int) -> Shape:
        """The local shape of a whole shape, a `PerRank` where the ranks differ."""
        return tuple(map(per_rank, zip(*(local_shape(whole, placement, rank) for rank in range(ranks)))))

    def start(self, axis: Axis, plus: Int = 0) -> Int:
        """Where, in the rank's part of the factor, what the axis sees begins (`plus` further on)."""
        begin = [axis.offset] * len(self.bounds)
        if axis.factor == self.factor:
            begin = [min(max(axis.offset, lo), hi) - lo for lo, hi in self.bounds]
        return per_rank(tuple(at + at_rank(plus, rank) for rank, at in enumerate(begin)))

    def minus(self, total: Int, *parts: Int) -> Int:
        """`total` less the parts, on each rank."""
        ranks = next((len(n.values) for n in (total, *parts) if isinstance(n, PerRank)), 1)
        return per_rank(tuple(at_rank(total, r) - sum(at_rank(part, r) for part in parts) for r in range(ranks)))
