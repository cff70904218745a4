"""Which tokens each position of a value follows from, read off an unsharded program by its sharding rules.

    %h = embedding(%ids)                  h[b, p] follows from token p                  low = high = 0
    %o = attention(%q, %k, %v, causal)    from all tokens up to p                       low = -inf, high = 0
    %n = slice(%labels, 1, 1, ...)        from token p + 1                              low = high = 1
    %e = attention(%q, %k, %v)            from all tokens: high = inf, for that reason

The rules say it: a tensor that is cut so that one rank has position p alone says which positions that rank has, and
reads, of every other tensor of the call (`Spec.instantiate`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf

from autosp_aot.ir.bands import band_of
from autosp_aot.ir.operators import DTYPES
from autosp_aot.ir.placement import Bounds, Cut, Placement
from autosp_aot.ir.program import Instr, Value
from autosp_aot.ops.table import OURS, spec_of
from autosp_aot.sharding.spec import Spec

# What goes along a dim from its beginning: a position follows from all before it.
SCANS = ("aten.cumsum.default", "aten.cumprod.default", "aten.logcumsumexp.default", "aten.cummax.default",
         "aten.cummin.default")  # fmt: skip


@dataclass(frozen=True)
class Reach:
    """Position p of dim `dim`, in each of its `outer` parts of `extent`, follows from tokens p + low to p + high.

    `dim` None: it has no position by which that could be said. `ahead` says what surely reads tokens after a position's
    own ("attention that is not causal"); "" where nothing is known to.
    """

    dim: int | None
    outer: int
    extent: int
    low: float
    high: float
    inputs: frozenset[str]
    ahead: str = ""

    @property
    def known(self) -> bool:
        """Whether it is certain which is the last token that a position follows from."""
        return self.dim is not None and self.high < inf


def reaches(instrs: Iterable[Instr], values: Mapping[str, Value], tokens: Mapping[str, int]) -> dict[str, Reach]:
    """The reach of each value that follows from tokens; `tokens` are inputs by name, with the dim of their sequence."""
    found = {
        name: Reach(dim, 1, values[name].sizes[dim], 0, 0, frozenset((name,))) for name, dim in tokens.items()
    }  # fmt: skip
    for instr in instrs:
        read = [found[name] for name in instr.refs() if name in found]
        if not read:
            continue
        made = _made(instr, values, found, read)
        found.update((out.name, reach) for out, reach in zip(instr.values(), made))
    return found


def _made(instr: Instr, values: Mapping[str, Value], found: Mapping[str, Reach], read: list[Reach]) -> list[Reach]:
    """The reach of each result."""
    outs, operands = instr.values(), [found.get(name) for name in instr.refs()]
    inputs, ahead = frozenset().union(*(reach.inputs for reach in read)), next((r.ahead for r in read if r.ahead), "")
    unknown = [Reach(None, 1, 1, -inf, inf, inputs, ahead)] * len(outs)
    if instr.op in OURS and OURS[instr.op].quadratic:
        reach = _attended(instr, values, operands)
        return [replace(reach, inputs=inputs, ahead=reach.ahead or ahead)] * len(outs)
    if any(reach.dim is None for reach in read):
        return unknown
    spec = spec_of(instr, [values[name] for name in instr.refs()], 2)
    made = None if spec is None else _followed(instr, spec, operands)
    return unknown if made is None else [replace(r, inputs=inputs, ahead=r.ahead or ahead) for r in made]


def _attended(instr: Instr, values: Mapping[str, Value], operands: list[Reach | None]) -> Reach:
    """Of an attention [B, N, S, D]: the output and lse have the rows of q in dim 2.

    A score expression that is not known to hide later keys may do so all the same, by numbers that are only very low.
    """
    q, k, *_ = (values[name] for name in instr.refs())
    vectors = [values[name] for name in instr.refs()[3:] if len(values[name].shape) == 4]
    scoring, rows, keys = dict(instr.kwargs), q.sizes[2], k.sizes[2]
    causal, score = scoring.get("causal", False), scoring.get("score")
    if not causal and score is None:
        return Reach(2, 1, rows, -inf, inf, frozenset(), f"attention that is not causal ({instr.where.source})")
    if not causal and rows == keys:
        dtypes = [DTYPES[vector.dtype] for vector in vectors]
        causal = band_of(score, rows, keys, dtypes, scoring.get("safe", True)).causal
    along = all(
        reach is None or (reach.outer, reach.extent) == (1, rows) and reach.dim in ((2,) if at < 3 else (2, 3))
        for at, reach in enumerate(operands)
    )
    if not causal or not along or rows != keys:
        return Reach(None, 1, 1, -inf, inf, frozenset())
    return Reach(2, 1, rows, -inf, max(reach.high for reach in operands if reach is not None), frozenset())


def _followed(instr: Instr, spec: Spec, operands: list[Reach | None]) -> list[Reach] | None:
    """By a rule; None where it mixes positions, or does not say."""
    at, first = next((at, reach) for at, reach in enumerate(operands) if reach is not None)
    assert first.dim is not None, "others were sorted out"
    strategy = spec.strategy_of(spec.operands[at], Placement(Cut(first.dim, first.outer, _probe(first.extent))))
    if strategy is None or strategy.factor is None:
        return None
    if strategy.factor in spec.whole:
        if instr.op not in SCANS or len({reach for reach in operands if reach is not None}) != 1:
            return None
        return [replace(first, low=-inf)] * len(instr.values())
    placed = spec.instantiate(strategy)
    if placed is None:
        return None
    reads = []
    for reach, placement in zip(operands, placed[0], strict=True):
        if reach is None:
            continue
        cut = placement.cut
        if cut is None or (cut.dim, cut.outer) != (reach.dim, reach.outer) or cut.bounds[1][0] == cut.bounds[1][1]:
            return None  # or another operand is where this position is
        reads.append((reach, cut.bounds[1]))
    made = []
    for placement in placed[1]:
        if placement.partial and placement.cut is None:
            what = f"{instr.op} over all positions ({instr.where.source or 'the loss'})"
            made.append(Reach(None, 1, 1, -inf, inf, frozenset(), what))
            continue
        if placement.cut is None or placement.cut.bounds[1][1] - placement.cut.bounds[1][0] != 1:
            return None
        cut, (place, _) = placement.cut, placement.cut.bounds[1]
        low = min(lo - place + reach.low for reach, (lo, _) in reads)
        high = max(hi - 1 - place + reach.high for reach, (_, hi) in reads)
        made.append(Reach(cut.dim, cut.outer, max(end for _, end in cut.bounds), low, high, frozenset()))
    return made


def _probe(extent: int) -> Bounds:
    """Three ranks, of which the second has one position in the middle."""
    middle = extent // 2
    return (0, middle), (middle, middle + 1), (middle + 1, extent)
