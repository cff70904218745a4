"""What is known of the scores of whole blocks of keys, by interval arithmetic over the score expression."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from autosp_aot.ir.intervals import INF, Intervals, Known, Part

Ends = tuple[Tensor, Tensor]


def blocks_of(score, rows: tuple[int, int], blocks: list[slice], ends: list[Ends]) -> tuple[list[bool], list[bool]]:
    """For each block of keys, whether no score of it is above HIDDEN, and whether all are the products themselves.

    `rows` are the first and the last position, `ends` what `ends_of` says of each vector for these blocks.
    """
    leaves: dict[str, Known] = {}
    places = Intervals(len(blocks), leaves)
    leaves["s"] = places.number(0.0, c=1.0)
    leaves["q"] = places.number(*rows)
    first, last = ([keys.start for keys in blocks], [keys.stop - 1 for keys in blocks])
    leaves["k"] = places.number(torch.tensor(first), torch.tensor(last))
    leaves |= {f"v{at}": places.number(*both) for at, both in enumerate(ends)}
    part = places.of(score)
    assert isinstance(part, Part), "so are all leaves"
    return part.hidden.tolist(), ((part.c == 1) & (part.low == 0) & (part.high == 0)).tolist()


def ends_of(vector: Tensor, size: int) -> Ends:
    """Lowest and highest of a vector [B or 1, N or 1, R or 1, T or 1] in each block of `size` keys: fp64, 1-D."""
    wide = vector.to(torch.float64)
    if vector.shape[3] == 1:
        return wide.amin().cpu().view(1), wide.amax().cpu().view(1)
    low, high = wide.amin((0, 1, 2)), wide.amax((0, 1, 2))
    low, high = (pad(end, (0, -len(end) % size), value=more).view(-1, size) for end, more in ((low, INF), (high, -INF)))
    return low.amin(1).cpu(), high.amax(1).cpu()
