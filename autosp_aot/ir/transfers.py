"""How a value goes from one placement to another on one rank: what it sends, and where what it receives belongs.

    source [4, 6] of rank 0 of 2       buffer to 0 | to 1          received of 0 | of 1        target [8, 3]
    all_to_all(join dim 0, cut dim 1)  [4, :3]     | [4, 3:]       [4, 3]        | [4, 3]      [:4]  [4:]

Nothing is copied where parts lie one after the other in memory already: here what is received is the target.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from autosp_aot.ir.operators import wide
from autosp_aot.ir.placement import PARTIAL, REPLICATE, Cut, Placement, disjoint
from autosp_aot.ir.program import Value

Interval = tuple[int, int]
Box = tuple[tuple[int, int, int], ...]  # (dim, start, stop) of each dim that is cut


class Move:
    """The collective that takes `source` to `target`, for rank `rank` of `ranks`; shapes are that rank's."""

    def __init__(self, source: Value, target: Value, rank: int, ranks: int):
        a, b, whole = source.placement, target.placement, source.whole_shape
        self.shape, self.summing = target.sizes, a.partial
        sends = [(peer, piece) for peer in range(ranks) for piece in transfers(a, b, whole, rank, peer)]
        fills = [(peer, piece) for peer in range(ranks) for piece in transfers(a, b, whole, peer, rank)]
        self.sends = [piece.local(a, whole, rank) for _, piece in sends]
        self.fills = [piece.local(b, whole, rank) for _, piece in fills]
        self.send_sizes = [sum(p.elements(whole) for to, p in sends if to == peer) for peer in range(ranks)]
        self.receive_sizes = [sum(p.elements(whole) for of, p in fills if of == peer) for peer in range(ranks)]
        result = torch.empty(self.shape, device="meta")
        self.in_place = not self.summing and _in_order(result, [narrowed(result, box) for box in self.fills])

    def packed_in_place(self, tensor: Tensor) -> bool:
        """Whether what is sent lies in `tensor` as it is sent."""
        return _in_order(tensor, [narrowed(tensor, box) for box in self.sends])

    def pack(self, tensor: Tensor) -> Tensor:
        """What is sent to the ranks in order, 1-D: a view of `tensor` where it lies there so."""
        if self.packed_in_place(tensor):
            return tensor.view(-1)
        buffer = tensor.new_empty(sum(self.send_sizes))
        join_into(buffer, [narrowed(tensor, box) for box in self.sends])
        return buffer

    def unpack(self, received: Tensor) -> Tensor:
        """The target, of what the ranks sent in order."""
        if self.in_place:
            return received.view(self.shape)
        if self.summing:
            result = received.new_zeros(self.shape, dtype=wide(received.dtype))
        else:
            result = received.new_empty(self.shape)
        places = [narrowed(result, box) for box in self.fills]
        for place, part in zip(places, received.split([place.numel() for place in places])):
            part = part.view(place.shape)
            place.add_(part) if self.summing else place.copy_(part)
        return result.to(received.dtype)


class Shard:
    """What box number `box` of the target is of what rank `rank` has: a view where that has no gaps, else a copy.

    Kernels rely on what another kernel made (mean and rstd of a norm) having none.
    """

    def __init__(self, source: Value, target: Value, rank: int, box: int):
        a, b, whole = source.placement, target.placement, source.whole_shape
        assert b.cut is not None, "a shard is cut"
        self.dim, self.boxes = b.cut.dim, [piece.local(a, whole, rank) for piece in common(a, b, whole, rank, box)]

    def __call__(self, tensor: Tensor) -> Tensor:
        parts = [narrowed(tensor, box) for box in self.boxes]
        if len(parts) > 1:
            return torch.cat(parts, self.dim)
        return (parts[0] if parts else tensor.narrow(self.dim, 0, 0)).contiguous()


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of the storage that a tensor lies in."""
    return tensor.untyped_storage().nbytes()


def join_into(buffer: Tensor, parts: list[Tensor]) -> None:
    """Copy parts into a buffer one after the other."""
    for place, part in zip(buffer.split([part.numel() for part in parts]), parts):
        place.view(part.shape).copy_(part)


def _in_order(tensor: Tensor, parts: list[Tensor]) -> bool:
    """True where the parts, one after the other, are the tensor as it lies in memory."""
    at = tensor.storage_offset()
    for part in parts:
        if not part.is_contiguous() or (part.numel() and part.storage_offset() != at):
            return False
        at += part.numel()
    return tensor.is_contiguous() and at == tensor.storage_offset() + tensor.numel()


def places_of_tile(part: Value, out: Value, box: int, rank: int) -> list[tuple[Box, Box]]:
    """Where in a tile's part, box `box`, and where in rank `rank`'s result what they share is; nothing of a sum."""
    if part.placement == PARTIAL:
        return []
    a, b, whole = part.placement, out.placement, out.whole_shape
    return [(at.local(a, whole, box), at.local(b, whole, rank)) for at in common(a, b, whole, box, rank)]


def narrowed(tensor: Tensor, box: Box) -> Tensor:
    """A view of a part."""
    for dim, start, stop in box:
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a value that goes from one rank to another: (dim, start, stop) of each dim that is cut on either side.

    In coordinates of the whole; what is not named goes whole.
    """

    box: Box

    def elements(self, shape: tuple[int, ...]) -> int:
        """How many elements of a value of this whole shape it holds."""
        count = prod(shape)
        for dim, start, stop in self.box:
            count = count // shape[dim] * (stop - start)
        return count

    def local(self, placement: Placement, extents: tuple[int, ...], rank: int) -> Box:
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


def transfers(source: Placement, target: Placement, shape: tuple[int, ...], sender: int, receiver: int) -> list[Chunk]:
    """What `sender` gives `receiver` when a value goes from `source` to `target`; deterministic, in ascending order.

    Partial sums all travel. Of several copies the receiver takes its own, then that of the lowest rank that holds it.
    """
    a, b = source.cut, target.cut
    if a is None:
        if not source.partial and sender != receiver:
            return []
        return [Chunk(())] if b is None else [Chunk(((b.dim, *box),)) for box in _intervals(b, shape, receiver)]
    needed = _intervals(b, shape, receiver) if b is not None and a.dim == b.dim else [(0, shape[a.dim])]
    given = _given(a, source.partial, shape, needed, sender, receiver)
    if b is None or a.dim == b.dim:
        return [Chunk(((a.dim, *box),)) for box in given]
    wanted = _intervals(b, shape, receiver)
    return [Chunk(((a.dim, *mine), (b.dim, *theirs))) for mine in given for theirs in wanted]


def common(source: Placement, target: Placement, shape: tuple[int, ...], sender: int, receiver: int) -> list[Chunk]:
    """What box `sender` of one placement and box `receiver` of another have in common, where at most one dim is cut."""
    cuts = [(p.cut, box) for p, box in ((source, sender), (target, receiver)) if p.cut is not None]
    if not cuts:
        return [Chunk(())]
    boxes = _intervals(cuts[0][0], shape, cuts[0][1])
    for cut, box in cuts[1:]:
        boxes = _meet(boxes, _intervals(cut, shape, box))
    return [Chunk(((cuts[0][0].dim, *box),)) for box in boxes]


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


def _intervals(cut: Cut, shape: tuple[int, ...], rank: int) -> list[Interval]:
    """What a rank holds of a cut dim, as intervals of the whole dim."""
    extent, (lo, hi) = shape[cut.dim] // cut.outer, cut.bounds[rank]
    return [(part * extent + lo, part * extent + hi) for part in range(cut.outer)] if lo < hi else []


def _given(
    cut: Cut, partial: bool, shape: tuple[int, ...], needed: list[Interval], sender: int, receiver: int
) -> list[Interval]:
    """The parts of `needed` that `receiver` takes from `sender`."""
    if not partial and not disjoint(cut.bounds):
        for rank in (receiver, *(r for r in range(len(cut.bounds)) if r != receiver)):
            if rank == sender:
                break
            needed = _without(needed, _intervals(cut, shape, rank))
    return _meet(needed, _intervals(cut, shape, sender))


def _meet(some: list[Interval], others: list[Interval]) -> list[Interval]:
    boxes = ((max(a, c), min(b, d)) for a, b in some for c, d in others if a < d and c < b)
    return [(lo, hi) for lo, hi in boxes if lo < hi]


def _without(some: list[Interval], others: list[Interval]) -> list[Interval]:
    for lo, hi in others:
        parts = (part for a, b in some for part in ((a, min(b, lo)), (max(a, hi), b)))
        some = [(a, b) for a, b in parts if a < b]
    return some
