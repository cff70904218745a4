"""Whether all ranks that share a sequence were given the same batch: a sampler that deals by rank deals them others."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from autosp_aot.errors import ArtifactError, Problem

LIMIT = 1048573  # of a mark, a prime: sums of squares over ranks stay exact
PLACES = 65521
BLOCK = 2**18  # elements at once: what is live for a mark is a few MiB, however large the tensor
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Sums(Protocol):
    """Ranks that add up: how many, and the sum of a buffer over all of them."""

    @property
    def size(self) -> int: ...

    def sum(self, buffer: Tensor) -> Tensor: ...


def check_same_batch(batch: Mapping[str, Tensor], ranks: Sums) -> None:
    """Raise ArtifactError `batches-differ`, on every rank alike, unless all were given the same tensors.

    Marks m of n ranks are equal if and only if n * sum(m * m) = sum(m) * sum(m). Two tensors that differ have the same
    mark once in a million.
    """
    differ = _differing(batch, ranks)
    if differ:
        raise ArtifactError(Problem(
            "batches-differ", f"ranks that share a sequence were given different {', '.join(differ)}",
            "forward", f"{ranks.size} ranks compute one loss, each its part of the same batch",
            "deal batches to groups of ranks, not to ranks: a sampler by the number of the group, not of the rank",
        ))  # fmt: skip


def check_same_weights(weights: Mapping[str, Tensor], ranks: Sums) -> None:
    """Raise ArtifactError `weights-differ`, on every rank alike, unless all have the same weights."""
    differ = _differing(weights, ranks)
    if differ:
        more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        raise ArtifactError(Problem(
            "weights-differ", f"the ranks begin with different weights: {differ[0]}{more}",
            why="every rank has all weights, and changes them alike",
            fix="give all nodes the same files with --init-from",
        ))  # fmt: skip


def _differing(tensors: Mapping[str, Tensor], ranks: Sums) -> list[str]:
    """The names of tensors of which not all ranks have the same, by one sum over the ranks."""
    if ranks.size == 1 or not tensors:
        return []
    names = sorted(tensors)  # each rank has an order of its own
    marks = torch.stack([_mark(tensors[name]) for name in names])
    sums, squares = ranks.sum(torch.stack([marks, marks * marks]).view(-1)).view(2, -1).tolist()
    return [name for name, m, s in zip(names, sums, squares) if ranks.size * s != m * m]


def _mark(tensor: Tensor) -> Tensor:
    """A number below LIMIT that follows from a tensor's bits and their places, on its device."""
    bits, mark = tensor.contiguous().view(-1).view(BITS[tensor.itemsize]), torch.tensor(0, device=tensor.device)
    for start in range(0, bits.numel(), BLOCK):
        block = bits[start : start + BLOCK].long() % LIMIT
        at = torch.arange(start, start + block.numel(), device=bits.device)
        places = (at * 40503 + at // (PLACES - 1) * 7919) % (PLACES - 1) + 1  # never zero, and another one period later
        mark = (mark + (block * places).sum()) % LIMIT
    return mark
