"""How a value goes from one placement to another on one rank: what it sends, and where what it receives belongs.

    source [4, 6] of rank 0 of 2       buffer to 0 | to 1          received of 0 | of 1        target [8, 3]
    all_to_all(join dim 0, cut dim 1)  [4, :3]     | [4, 3:]       [4, 3]        | [4, 3]      [:4]  [4:]

Nothing is copied where parts lie one after the other in memory already: here what is received is the target.
"""

import torch
from torch import Tensor

from autosp_aot.ir.operators import wide
from autosp_aot.ir.placement import PARTIAL, common, transfers
from autosp_aot.ir.program import Value

Box = tuple[tuple[int, int, int], ...]


class Move:
    """The collective that takes `source` to `target`, for rank `rank` of `ranks`; shapes are that rank's."""

    def __init__(self, source: Value, target: Value, rank: int, ranks: int):
        a, b, whole = source.placement, target.placement, source.whole_shape
        self.shape, self.summing = target.shape, a.partial
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
        joined(buffer, [narrowed(tensor, box) for box in self.sends])
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
        self.dim, self.boxes = b.cut.dim, [piece.local(a, whole, rank) for piece in common(a, b, whole, rank, box)]

    def __call__(self, tensor: Tensor) -> Tensor:
        parts = [narrowed(tensor, box) for box in self.boxes]
        if len(parts) > 1:
            return torch.cat(parts, self.dim)
        return (parts[0] if parts else tensor.narrow(self.dim, 0, 0)).contiguous()


def joined(buffer: Tensor, parts: list[Tensor]) -> None:
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
    """Where in a tile's part, box `box`, and where in rank `rank`'s result what they share is; of a summand nothing."""
    if part.placement == PARTIAL:
        return []
    a, b, whole = part.placement, out.placement, out.whole_shape
    return [(at.local(a, whole, box), at.local(b, whole, rank)) for at in common(a, b, whole, box, rank)]


def narrowed(tensor: Tensor, box: Box) -> Tensor:
    """A view of a part."""
    for dim, start, stop in box:
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor
