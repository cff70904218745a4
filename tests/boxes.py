"""Boxes of real tensors: cut one into what each rank holds, and put what the ranks hold together again."""

import torch
from torch import Tensor

from autosp_aot.ir.placement import Placement


def parts(tensor: Tensor, placement: Placement, ranks: int) -> list[Tensor]:
    """Each rank's box; a summand is a random share of it, and all shares of a position add up to the tensor."""
    if not placement.partial:
        return [_box(tensor, placement, rank).clone() for rank in range(ranks)]
    shares = torch.randn(ranks, *tensor.shape, dtype=tensor.dtype, generator=torch.Generator().manual_seed(0))
    held = torch.stack([_mark(tensor, placement, rank) for rank in range(ranks)])
    last = ranks - 1 - held.flip(0).int().argmax(0)
    shares = torch.where(held, shares, 0.0)
    rank_of = torch.arange(ranks).view(-1, *[1] * tensor.dim())
    rest = tensor - torch.where(rank_of == last, 0.0, shares).sum(0)
    shares = torch.where(rank_of == last, rest, shares)
    return [_box(share, placement, rank).clone() for rank, share in enumerate(shares)]


def joined(boxes: list[Tensor], placement: Placement, shape: tuple[int, ...]) -> Tensor:
    """The whole of which ranks hold these boxes; copies have to agree."""
    total = torch.zeros(shape, dtype=boxes[0].dtype)
    filled = torch.zeros(shape, dtype=torch.bool)
    for rank, box in enumerate(boxes):
        mark = _mark(total, placement, rank)
        if placement.cut is None and not placement.partial:
            assert box.shape == shape
        part = torch.zeros(shape, dtype=box.dtype)
        part[mark] = box.reshape(-1)
        if placement.partial:
            total = total + part
        else:
            both = mark & filled
            assert torch.allclose(total[both], part[both]), "copies differ"
            total = torch.where(mark, part, total)
        filled |= mark
    assert bool(filled.all()), "the boxes leave a gap"
    return total


def _box(tensor: Tensor, placement: Placement, rank: int) -> Tensor:
    if placement.cut is None:
        return tensor
    shape = list(tensor.shape)
    shape[placement.cut.dim] = placement.cut.local_size(rank)
    return tensor[_mark(tensor, placement, rank)].view(shape)


def _mark(tensor: Tensor, placement: Placement, rank: int) -> Tensor:
    mark = torch.zeros(tensor.shape, dtype=torch.bool)
    if placement.cut is None:
        return ~mark
    indices = torch.arange(tensor.shape[placement.cut.dim])
    extent = tensor.shape[placement.cut.dim] // placement.cut.outer
    lo, hi = placement.cut.bounds[rank]
    inside = (indices % extent >= lo) & (indices % extent < hi)
    return mark | inside.view(*[-1 if d == placement.cut.dim else 1 for d in range(tensor.dim())])
