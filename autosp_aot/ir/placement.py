"""Where a value lives: a box a rank, and whether the boxes are summands.

A dim of size `outer * extent` is cut along its `extent`: rank r holds, for every outer index, the interval `bounds[r]`.

    [B, S, H] by sequence     Cut(dim=1, outer=1, bounds over S)
    [B*S, V]  by sequence     Cut(dim=0, outer=B, bounds over S)
    [B, S, N*D] by heads      Cut(dim=2, outer=1, bounds over N*D, multiples of D)

    Replicate   no cut                       Partial     no cut, `partial`: each rank holds a summand
    Shard       one cut, disjoint bounds     copies      one cut, overlapping bounds (key/value heads of a group)
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

Bounds = tuple[tuple[int, int], ...]
Box = tuple[int, int]


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
    clamp = lambda at: min(max(at - offset, 0), size)  # noqa: E731
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


def joined(placement: Placement, ranks: int) -> Placement | None:
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


# --- moving a value from one placement to another -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a value that goes from one rank to another: (dim, start, stop) of each dim that is cut on either side.

    In coordinates of the whole; what is not named goes whole.
    """

    box: tuple[tuple[int, int, int], ...]

    def elements(self, shape: tuple[int, ...]) -> int:
        """How many elements of a value of this whole shape it holds."""
        count = prod(shape)
        for dim, start, stop in self.box:
            count = count // shape[dim] * (stop - start)
        return count

    def local(self, placement: Placement, extents: tuple[int, ...], rank: int) -> tuple[tuple[int, int, int], ...]:
        """The same part in coordinates of rank `rank`'s box; `extents` is the whole shape."""
        cut = placement.cut
        if cut is None:
            return self.box
        extent, (lo, hi) = extents[cut.dim] // cut.outer, cut.bounds[rank]
        found = []
        for dim, start, stop in self.box:
            if dim == cut.dim:
                part = start // extent
                start, stop = (at - part * extent - lo + part * (hi - lo) for at in (start, stop))
            found.append((dim, start, stop))
        return tuple(found)


def transfers(source: Placement, target: Placement, shape: tuple[int, ...], sender: int, receiver: int) -> list[Piece]:
    """What `sender` gives `receiver` when a value goes from `source` to `target`; deterministic, in ascending order.

    Summands all travel. Of several copies the receiver takes its own, then that of the lowest rank that holds it.
    """
    a, b = source.cut, target.cut
    if a is None:
        if not source.partial and sender != receiver:
            return []
        return [Piece(())] if b is None else [Piece(((b.dim, *box),)) for box in _intervals(b, shape, receiver)]
    same = b is not None and a.dim == b.dim
    needed = _intervals(b, shape, receiver) if same else [(0, shape[a.dim])]
    given = _given(source, shape, needed, sender, receiver)
    if same or b is None:
        return [Piece(((a.dim, *box),)) for box in given]
    wanted = _intervals(b, shape, receiver)
    return [Piece(((a.dim, *mine), (b.dim, *theirs))) for mine in given for theirs in wanted]


def common(source: Placement, target: Placement, shape: tuple[int, ...], sender: int, receiver: int) -> list[Piece]:
    """What box `sender` of one placement and box `receiver` of another have in common, where at most one dim is cut."""
    cuts = [(p.cut, box) for p, box in ((source, sender), (target, receiver)) if p.cut is not None]
    if not cuts:
        return [Piece(())]
    boxes = _intervals(cuts[0][0], shape, cuts[0][1])
    for cut, box in cuts[1:]:
        boxes = _meet(boxes, _intervals(cut, shape, box))
    return [Piece(((cuts[0][0].dim, *box),)) for box in boxes]


@lru_cache(maxsize=4096)
def received_bytes(source: Placement, target: Placement, shape: tuple[int, ...], itemsize: int, ranks: int) -> int:
    """Bytes the worst rank receives from others when a value goes from `source` to `target`.

    An all_reduce is counted as the ring does it: every rank receives 2 (P - 1) / P of the value.
    """
    if source == target or source.replicated:
        return 0
    if (source, target) == (PARTIAL, REPLICATE):
        return 2 * prod(shape) * itemsize * (ranks - 1) // ranks
    worst = 0
    for receiver in range(ranks):
        senders = (rank for rank in range(ranks) if rank != receiver)
        pieces = (piece for sender in senders for piece in transfers(source, target, shape, sender, receiver))
        worst = max(worst, sum(piece.elements(shape) for piece in pieces))
    return worst * itemsize


def _intervals(cut: Cut, shape: tuple[int, ...], rank: int) -> list[Box]:
    """What a rank holds of a cut dim, as intervals of the whole dim."""
    extent, (lo, hi) = shape[cut.dim] // cut.outer, cut.bounds[rank]
    return [(part * extent + lo, part * extent + hi) for part in range(cut.outer)] if lo < hi else []


def _given(source: Placement, shape: tuple[int, ...], needed: list[Box], sender: int, receiver: int) -> list[Box]:
    """The parts of `needed` that `receiver` takes from `sender`."""
    cut = source.cut
    if not source.partial and not disjoint(cut.bounds):
        for rank in (receiver, *(r for r in range(len(cut.bounds)) if r != receiver)):
            if rank == sender:
                break
            needed = _without(needed, _intervals(cut, shape, rank))
    return _meet(needed, _intervals(cut, shape, sender))


def _meet(some: list[Box], others: list[Box]) -> list[Box]:
    boxes = ((max(a, c), min(b, d)) for a, b in some for c, d in others if a < d and c < b)
    return [(lo, hi) for lo, hi in boxes if lo < hi]


def _without(some: list[Box], others: list[Box]) -> list[Box]:
    for lo, hi in others:
        parts = (part for a, b in some for part in ((a, min(b, lo)), (max(a, hi), b)))
        some = [(a, b) for a, b in parts if a < b]
    return some
