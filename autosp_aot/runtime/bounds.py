"""Which blocks of keys a block of rows cannot see, by interval arithmetic over the score expression."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from autosp_aot.intervals import INF, Intervals, Part


def hidden_blocks(score, rows: tuple[int, int], blocks: list[slice], vectors: list[Tensor]) -> list[bool]:
    """For each block of keys whether no score of it is above HIDDEN; `rows` are the first and the last position.

    `vectors` ([B or 1, N or 1, R or 1, T or 1]) are narrowed to the rows. Blocks are of one size but the last.
    """
    leaves: dict[str, Part] = {}
    places = Intervals(len(blocks), leaves)
    leaves["s"] = places.number(0.0, c=1.0)
    leaves["q"] = places.number(*rows)
    leaves["k"] = places.number([keys.start for keys in blocks], [keys.stop - 1 for keys in blocks])
    for at, vector in enumerate(vectors):
        leaves[f"v{at}"] = places.number(*_ends(vector, blocks))
    return places.of(score).hidden.tolist()


def _ends(vector: Tensor, blocks: list[slice]) -> tuple[Tensor, Tensor]:
    """Lowest and highest of a vector in each block."""
    wide = vector.to(torch.float64)
    if vector.shape[3] == 1:
        return wide.amin().cpu(), wide.amax().cpu()
    size = blocks[0].stop - blocks[0].start
    at = torch.tensor([keys.start // size for keys in blocks])
    low, high = wide.amin((0, 1, 2)), wide.amax((0, 1, 2))
    low, high = (pad(end, (0, -len(end) % size), value=more).view(-1, size) for end, more in ((low, INF), (high, -INF)))
    return low.amin(1).cpu()[at], high.amax(1).cpu()[at]
