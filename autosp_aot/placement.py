"""Where a value lives: a box a rank, and whether the boxes are summands.

A dim of size `outer * extent` is cut along its `extent`: rank r holds, for every outer index, the interval `bounds[r]`.

    [B, S, H] by sequence     Cut(dim=1, outer=1, bounds over S)
    [B*S, V]  by sequence     Cut(dim=0, outer=B, bounds over S)
    [B, S, N*D] by heads      Cut(dim=2, outer=1, bounds over N*D, multiples of D)

    Replicate   no cut                       Partial     no cut, `partial`: each rank holds a summand
    Shard       one cut, disjoint bounds     copies      one cut, overlapping bounds (key/value heads of a group)
"""

from dataclasses import dataclass
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


def even_bounds(extent: int, ranks: int) -> Bounds:
    """`extent` positions over `ranks` ranks, in order, sizes differing by at most one, larger ones first."""
    size, more = divmod(extent, ranks)
    cuts = [rank * size + min(rank, more) for rank in range(ranks + 1)]
    return tuple(zip(cuts, cuts[1:]))


def window(bounds: Bounds, offset: int, size: int) -> Bounds:
    """The same intervals seen from a tensor that holds positions `offset .. offset + size` of the factor."""
    clamp = lambda at: min(max(at - offset, 0), size)  # noqa: E731
    return tuple((clamp(lo), clamp(hi)) for lo, hi in bounds)


def scale(bounds: Bounds, by: int) -> Bounds:
    return bounds if by == 1 else tuple((lo * by, hi * by) for lo, hi in bounds)


def disjoint(bounds: Bounds) -> bool:
    """True when no position belongs to two ranks."""
    filled = sorted(b for b in bounds if b[0] < b[1])
    return all(a[1] <= b[0] for a, b in zip(filled, filled[1:]))


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


# --- moving a value from one placement to another -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a value that goes from one rank to another: an interval of the cut of each side, in whole coordinates.

    `None` on a side means the whole extent. Where both sides cut the same dim and outer the intervals are equal.
    """

    source: Box | None
    target: Box | None


def transfers(source: Placement, target: Placement, shape: tuple[int, ...], sender: int, receiver: int) -> list[Piece]:
    """What `sender` gives `receiver` when a value goes from `source` to `target`; deterministic, in ascending order.

    Summands all travel. Of several copies the receiver takes its own, then that of the lowest rank that holds it.
    """
    wanted = target.cut.bounds[receiver] if target.cut else None
    if source.cut is None:
        if not source.partial and sender != receiver:
            return []
        return [] if _empty(wanted) else [Piece(None, wanted)]
    same = target.cut is not None and (target.cut.dim, target.cut.outer) == (source.cut.dim, source.cut.outer)
    extent = shape[source.cut.dim] // source.cut.outer
    needed = wanted if same else (0, extent)
    if source.partial:
        intervals = [_meet(source.cut.bounds[sender], needed)]
    else:
        intervals = _owned(source.cut.bounds, needed, sender, receiver)
    if not same and _empty(wanted):
        return []
    return [Piece(box, box if same else wanted) for box in intervals if box[0] < box[1]]


def received_bytes(source: Placement, target: Placement, shape: tuple[int, ...], itemsize: int, ranks: int) -> int:
    """Bytes the worst rank receives from others when a value goes from `source` to `target`.

    An all_reduce is counted as the ring does it: every rank receives 2 (P - 1) / P of the value.
    """
    if source == target or source.replicated:
        return 0
    whole = prod(shape) * itemsize
    if source.partial and target.cut == source.cut:
        return 2 * whole * (ranks - 1) // ranks
    worst = 0
    for receiver in range(ranks):
        got = 0
        for sender in range(ranks):
            if sender == receiver:
                continue
            for piece in transfers(source, target, shape, sender, receiver):
                got += piece_elements(piece, source, target, shape)
        worst = max(worst, got)
    return worst * itemsize


def piece_elements(piece: Piece, source: Placement, target: Placement, shape: tuple[int, ...]) -> int:
    """How many elements a piece holds."""
    count = prod(shape)
    for cut, box in _cut_boxes(piece, source, target):
        count = count // (shape[cut.dim] // cut.outer) * (box[1] - box[0])
    return count


def _cut_boxes(piece: Piece, source: Placement, target: Placement) -> list[tuple[Cut, Box]]:
    """The intervals that bound a piece, each once, with the cut whose coordinates they are in."""
    boxes = []
    if piece.source is not None:
        boxes.append((source.cut, piece.source))
    if piece.target is not None and not (boxes and _same_axis(source.cut, target.cut)):
        boxes.append((target.cut, piece.target))
    return boxes


def _same_axis(a: Cut, b: Cut) -> bool:
    return (a.dim, a.outer) == (b.dim, b.outer)


def compatible(source: Placement, target: Placement) -> bool:
    """Whether a value can go from one to the other directly: two cuts of one dim have to cut the same extent."""
    a, b = source.cut, target.cut
    return a is None or b is None or a.dim != b.dim or a.outer == b.outer


def _meet(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), min(a[1], b[1])


def _empty(box: Box | None) -> bool:
    return box is not None and box[0] >= box[1]


def _owned(bounds: Bounds, needed: Box, sender: int, receiver: int) -> list[Box]:
    """The parts of `needed` that `receiver` takes from `sender`, when some positions have several holders."""
    order = [receiver, *(r for r in range(len(bounds)) if r != receiver)]
    missing = [needed]
    for rank in order:
        taken = [box for box in (_meet(bounds[rank], part) for part in missing) if box[0] < box[1]]
        if rank == sender:
            return taken
        if taken:
            missing = [rest for part in missing for rest in _without(part, bounds[rank]) if rest[0] < rest[1]]
    return []


def _without(part: Box, hole: Box) -> list[Box]:
    if hole[0] >= hole[1]:
        return [part]
    return [(part[0], min(part[1], hole[0])), (max(part[0], hole[1]), part[1])]


# --- local coordinates --------------------------------------------------------------------------------------------


def piece_in_source(piece: Piece, source: Placement, target: Placement, rank: int) -> list[tuple[int, int, int, int]]:
    """A piece as slices of the sender's local tensor: (dim, outer, start, stop) each, to be applied in turn."""
    return _local_slices(piece, source, target, source, rank)


def piece_in_target(piece: Piece, source: Placement, target: Placement, rank: int) -> list[tuple[int, int, int, int]]:
    """A piece as slices of the receiver's local tensor: (dim, outer, start, stop) each, to be applied in turn."""
    return _local_slices(piece, source, target, target, rank)


def _local_slices(piece, source, target, mine: Placement, rank: int) -> list[tuple[int, int, int, int]]:
    slices = []
    for cut, (lo, hi) in _cut_boxes(piece, source, target):
        inside = mine.cut is not None and _same_axis(mine.cut, cut)
        base = mine.cut.bounds[rank][0] if inside else 0
        slices.append((cut.dim, cut.outer, lo - base, hi - base))
    return slices
