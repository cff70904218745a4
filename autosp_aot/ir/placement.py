"""Where a value lives: a box a rank, and whether the local tensors are partial sums.

A dim of size `outer * extent` is cut along its `extent`: rank r holds, for every outer index, the interval `bounds[r]`.

    [B, S, H] by sequence     Cut(dim=1, outer=1, bounds over S)
    [B*S, V]  by sequence     Cut(dim=0, outer=B, bounds over S)
    [B, S, N*D] by heads      Cut(dim=2, outer=1, bounds over N*D, multiples of D)

    Replicate   no cut                       Partial     no cut, `partial`: each rank holds a partial sum
    Shard       one cut, disjoint bounds     copies      one cut, overlapping bounds (key/value heads of a group)
"""

from dataclasses import dataclass
from functools import lru_cache

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """One dim cut along its inner extent; `bounds[r]` is rank r's half-open interval, empty ones included."""

    dim: int
    outer: int
    bounds: Bounds

    def local_size(self, rank: int) -> int:
        lo, hi = self.bounds[rank]
        return self.outer * (hi - lo)


@dataclass(frozen=True, slots=True)
class Placement:
    """Each rank's box of a value (the whole without a cut), and whether the boxes have to be summed."""

    cut: Cut | None = None
    partial: bool = False

    @property
    def replicated(self) -> bool:
        return self.cut is None and not self.partial


REPLICATE = Placement()
PARTIAL = Placement(partial=True)


@lru_cache(maxsize=4096)
def even_bounds(extent: int, ranks: int) -> Bounds:
    """`extent` positions over `ranks` ranks, in order, sizes differing by at most one, larger ones first."""
    size, more = divmod(extent, ranks)
    cuts = [rank * size + min(rank, more) for rank in range(ranks + 1)]
    return tuple(zip(cuts, cuts[1:]))


def window(bounds: Bounds, offset: int, size: int) -> Bounds:
    """The same intervals seen from a tensor that holds positions `offset .. offset + size` of the factor."""

    def clamp(at: int) -> int:
        return min(max(at - offset, 0), size)

    return tuple((clamp(lo), clamp(hi)) for lo, hi in bounds)


@lru_cache(maxsize=4096)
def scale(bounds: Bounds, by: int) -> Bounds:
    return bounds if by == 1 else tuple((lo * by, hi * by) for lo, hi in bounds)


@lru_cache(maxsize=4096)
def disjoint(bounds: Bounds) -> bool:
    """True when no position belongs to two ranks."""
    filled = sorted(b for b in bounds if b[0] < b[1])
    return all(a[1] <= b[0] for a, b in zip(filled, filled[1:]))


@lru_cache(maxsize=4096)
def covers(bounds: Bounds, extent: int) -> bool:
    """True when every position of the extent belongs to some rank."""
    at = 0
    for lo, hi in sorted(bounds):
        if lo > at:
            return False
        at = max(at, hi)
    return at >= extent


def local_shape(shape: tuple[int, ...], placement: Placement, rank: int) -> tuple[int, ...]:
    """The shape of rank `rank`'s box of a value whose whole shape is `shape`."""
    if placement.cut is None:
        return shape
    dim = placement.cut.dim
    return (*shape[:dim], placement.cut.local_size(rank), *shape[dim + 1 :])


def inside(source: Placement, target: Placement) -> bool:
    """Each rank, for each of its tiles where there are more boxes than ranks, already has what it is to keep."""
    if source.cut is None:
        return target.cut is not None
    if target.cut is None or (source.cut.dim, source.cut.outer) != (target.cut.dim, target.cut.outer):
        return False
    tiles = len(target.cut.bounds) // len(source.cut.bounds)
    boxes = ((source.cut.bounds[at // tiles], box) for at, box in enumerate(target.cut.bounds))
    return all(lo >= hi or (a <= lo and hi <= b) for (a, b), (lo, hi) in boxes)


def joined_tiles(placement: Placement, ranks: int) -> Placement | None:
    """Where a value is whose tiles are placed so, a rank's one after the other; None where they leave gaps or overlap.

    Of one rank the tiles make up the whole.
    """
    if placement.cut is None or placement.partial or not disjoint(placement.cut.bounds):
        return None
    cut, tiles = placement.cut, len(placement.cut.bounds) // ranks
    boxes = [cut.bounds[rank * tiles : (rank + 1) * tiles] for rank in range(ranks)]
    if any(a[1] != b[0] for own in boxes for a, b in zip(own, own[1:])):
        return None
    bounds = tuple((own[0][0], own[-1][1]) for own in boxes)
    if not covers(bounds, max(hi for _, hi in bounds)):
        return None
    return REPLICATE if ranks == 1 else Placement(Cut(cut.dim, cut.outer, bounds))
