"""Which keys a score expression lets a query see, as far as that follows from their distance d = k - q alone.

where(k <= q, s, -inf)                          d > 0 hidden, else s itself          causal, nothing else
where((k <= q) & (k > q - 4), s, -inf)          d in -3..0                           causal, window 4
where((k <= q) & (v0 == v1), s, -inf)           d > 0 hidden, else unknown           causal, and the expression
"""

from dataclasses import dataclass

import torch

from autosp_aot.ir.intervals import INF, Intervals, Known, Position
from autosp_aot.ir.program import Arg


@dataclass(frozen=True)
class Band:
    """`causal` and `window` as in `Scoring`; `plain` where the expression says nothing else."""

    causal: bool
    window: int | None
    plain: bool


NOTHING = Band(False, None, False)


def band_of(score: Arg, rows: int, keys: int, dtypes: list[torch.dtype], safe: bool) -> Band:
    """The band of an expression over `rows` queries and `keys` keys; `dtypes` are those of its vectors.

    Where a query that sees nothing would not give zeros (not `safe`), every one has to see something to be plain.
    """
    distances = torch.arange(-(rows - 1), keys)
    leaves: dict[str, Known] = {"q": Position(1, 0, 0), "k": Position(0, 1, 0)}
    places = Intervals(len(distances), leaves, distances)
    leaves["s"] = places.number(0.0, c=1.0)
    for at, dtype in enumerate(dtypes):
        leaves[f"v{at}"] = places.number(0, 1) if dtype is torch.bool else places.number(-INF, INF)
    part = places.of(score)
    if isinstance(part, Position) or bool(part.hidden.all()):
        return NOTHING
    seen = distances[~part.hidden]
    first, last = int(seen[0]), int(seen[-1])
    inside = (distances >= first) & (distances <= last)
    same = bool(((part.c == 1) & (part.low == 0) & (part.high == 0))[inside].all())
    never = bool((part.high[~inside] == -INF).all())
    causal, window = last == 0 < keys - 1, 1 - first if first > 1 - rows else None
    everyone_sees = first <= 0 <= last and rows <= keys
    whole = last == keys - 1 and window is None
    if same and (causal or whole) and ((never and safe) or everyone_sees):
        return Band(causal, window, True)
    return Band(causal, window, False) if never else NOTHING
