"""What a sharding rule says: the factors of an operator, and how each dim of operands and results consists of them.

    mm: ik, kj -> ij            i, j parallel (in every result that has them)
                                k vanishes: cut along it, the result is Partial
    log_softmax: iW -> iW       W (upper case) must be whole

One factor at a time is cut. A strategy is (factor, bounds); `instantiate` gives the placement of every operand and
result under it, or None where it is not allowed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from autosp_aot.ir.placement import (
    PARTIAL,
    REPLICATE,
    Bounds,
    Cut,
    Placement,
    disjoint,
    even_bounds,
    scale,
    window,
)
from autosp_aot.ir.program import Args


@dataclass(frozen=True, slots=True)
class Axis:
    """A factor as one tensor's dim sees it: positions `offset .. offset + size`, or every `group` positions as one.

    With a `reach`, position i of the factor reads `reach` positions of the dim's `size`, from `stride * i` on.
    """

    factor: int
    offset: int = 0
    size: int | None = None
    group: int = 1
    stride: int = 1
    reach: int = 0


Dims = tuple[tuple[Axis, ...], ...]
Linear = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Strategy:
    """Cut `factor` (inside each of its `outer` parts) at `bounds`; None: nothing is cut.

    The operands in `partial` are partial sums, then so are the results.
    """

    factor: int | None = None
    bounds: Bounds = ()
    partial: tuple[int, ...] = ()
    outer: int = 1


@dataclass(frozen=True, eq=False)
class Spec:
    """The rule of one call. Operands are the tensor arguments in the order they appear.

    `linear` lists the sets of operands that may be partial sums together, all others being the same on every rank.
    `splits` are bounds the rule itself proposes. `localize(args, local)` rewrites the arguments that hold sizes or
    positions for a rank's box; factors in `flat` are positions for it, and cannot be cut inside outer parts. Of factors
    in `filled` every rank has to have something. `follows` are pairs of factors of which one is a sequence if the other
    is, though not place by place: what a convolution reads and what it makes.
    """

    extents: tuple[int, ...]
    whole: frozenset[int]
    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    linear: Linear = ()
    splits: tuple[tuple[int, Bounds], ...] = ()
    localize: Callable[..., Args] | None = None
    flat: frozenset[int] = frozenset()
    filled: frozenset[int] = frozenset()
    follows: tuple[tuple[int, int], ...] = ()
    contraction: bool = False

    def instantiate(self, strategy: Strategy) -> tuple[tuple[Placement, ...], tuple[Placement, ...]] | None:
        """Placements of the operands and of the results under a strategy; None where the laws forbid it."""
        factor, bounds = strategy.factor, strategy.bounds
        if self._forbids(strategy):
            return None
        placed = [self._placed(dims, strategy) for dims in (*self.operands, *self.results)]
        tensors = [placement for placement in placed if placement is not None]
        if len(tensors) < len(placed):
            return None
        operands, results = tensors[: len(self.operands)], tensors[len(self.operands) :]
        for at in strategy.partial:
            operands[at] = Placement(operands[at].cut, True)
        for at, placement in enumerate(results):
            if strategy.partial:
                results[at] = Placement(placement.cut, True)
            elif factor is not None and placement.cut is None:
                if not disjoint(bounds):
                    return None
                results[at] = PARTIAL
            elif placement.cut is not None and disjoint(bounds) and not disjoint(placement.cut.bounds):
                results[at] = Placement(placement.cut, True)
        cut = [operands[at] for at in strategy.partial] + results
        if strategy.partial and factor is not None and any(p.cut is None for p in cut):
            return None
        return tuple(operands), tuple(results)

    def _forbids(self, strategy: Strategy) -> bool:
        """Whether a strategy is against what is said of factors."""
        factor = strategy.factor
        if factor in self.whole or (strategy.partial and strategy.partial not in self.linear):
            return True
        if strategy.outer != 1 and factor in self.flat:
            return True
        summed = (axis for at in strategy.partial for axes in self.operands[at] for axis in axes)
        if any(axis.reach and axis.factor == factor for axis in summed):
            return True  # of a place that two ranks read, each would have only a share
        return factor in self.filled and any(lo == hi for lo, hi in strategy.bounds)

    def _placed(self, dims: Dims, strategy: Strategy) -> Placement | None:
        """Where a tensor is under a strategy: None where the dims cannot be cut so."""
        found = REPLICATE
        for dim, axes in enumerate(dims):
            for at, axis in enumerate(axes):
                if axis.factor == strategy.factor:
                    if found.cut is not None or (strategy.outer != 1 and (axis.size is not None or axis.group > 1)):
                        return None
                    outer = _product(self.size(a) for a in axes[:at]) * strategy.outer
                    inner = _product(self.size(a) for a in axes[at + 1 :])
                    found = Placement(Cut(dim, outer, scale(self.seen(axis, strategy.bounds), inner)))
        return found

    def size(self, axis: Axis) -> int:
        """How many positions of its factor an axis has."""
        return axis.size if axis.size is not None else self.extents[axis.factor] // axis.group

    def seen(self, axis: Axis, bounds: Bounds) -> Bounds:
        """Bounds of the factor as the axis sees them."""
        if axis.group > 1:
            return tuple((lo // axis.group, -(-hi // axis.group)) if lo < hi else (0, 0) for lo, hi in bounds)
        if axis.reach:
            return tuple(self._read(axis, lo, hi) for lo, hi in bounds)
        return bounds if axis.size is None else window(bounds, axis.offset, axis.size)

    def _read(self, axis: Axis, lo: int, hi: int) -> tuple[int, int]:
        """What positions `lo .. hi` read, and what is read by none after it."""
        if lo >= hi:
            return 0, 0
        end = max((hi - 1) * axis.stride + axis.reach, hi * axis.stride)
        return lo * axis.stride, self.size(axis) if hi == self.extents[axis.factor] else end

    def strategy_of(self, dims: Dims, placement: Placement) -> Strategy | None:
        """The strategy that cuts a tensor with these dims as the placement says; None where there is not just one.

        Where the placement cuts inside what the factor has as one (a head, a chunk), the nearest that does not.
        """
        if placement.cut is None:
            return Strategy()
        cut = placement.cut
        before = 1
        for at, axis in enumerate(dims[cut.dim]):
            size = self.size(axis)
            later = dims[cut.dim][at + 1 :]
            inside = cut.outer < before * size or not later
            if cut.outer % before == 0 and inside and size % (cut.outer // before) == 0:
                inner = _product(map(self.size, later))
                if not inner or axis.group > 1:
                    return None
                bounds = tuple(((lo + inner // 2) // inner, (hi + inner // 2) // inner) for lo, hi in cut.bounds)
                return Strategy(axis.factor, self._unseen(axis, bounds), outer=cut.outer // before)
            before *= size
        return None

    def _unseen(self, axis: Axis, bounds: Bounds) -> Bounds:
        """Bounds of the factor that an axis sees as `bounds`; what it does not see goes to the first and last rank."""
        if axis.size is None:
            return bounds
        moved = [(self._unread(axis, lo), self._unread(axis, hi)) for lo, hi in bounds]
        filled = [rank for rank, (lo, hi) in enumerate(moved) if lo < hi] or [0]
        moved[filled[0]] = (0, moved[filled[0]][1])
        moved[filled[-1]] = (moved[filled[-1]][0], self.extents[axis.factor])
        return tuple(moved)

    def _unread(self, axis: Axis, at: int) -> int:
        """The first position of the factor that reads nothing before `at`."""
        return min(-(-(at + axis.offset) // axis.stride), self.extents[axis.factor])


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def from_notation(
    text: str,
    operands: list[tuple[int, ...]],
    results: list[tuple[int, ...]],
    linear: Linear = (),
    contraction: bool = False,
) -> Spec:
    """A Spec from letters, one a dim: `"ik,kj->ij"`. Upper case must be whole; `1` is a dim of size one, no factor."""
    left, right = (side.split(",") for side in text.split("->"))
    letters: dict[str, int] = {}
    extents: list[int] = []

    def dims(word: str, shape: tuple[int, ...]) -> Dims:
        assert len(word) == len(shape), (text, operands, results)
        found = []
        for letter, size in zip(word, shape):
            if letter != "1" and letter not in letters:
                letters[letter] = len(extents)
                extents.append(size)
            found.append(() if letter == "1" else (Axis(letters[letter]),))
        return tuple(found)

    operand_dims = tuple(dims(word, shape) for word, shape in zip(left, operands, strict=True))
    result_dims = tuple(dims(word, shape) for word, shape in zip(right, results, strict=True))
    whole = frozenset(at for letter, at in letters.items() if letter.isupper())
    return Spec(tuple(extents), whole, operand_dims, result_dims, linear, contraction=contraction)


def even_split(extent: int, ranks: int) -> Bounds | None:
    """Even bounds, where every rank gets something."""
    return even_bounds(extent, ranks) if extent >= ranks else None


def identity(shape: tuple[int, ...]) -> Dims:
    """Every dim a factor of its own, in order."""
    return tuple((Axis(dim),) for dim in range(len(shape)))
