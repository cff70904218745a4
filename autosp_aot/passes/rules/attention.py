"""The canonical attention pair, cut by query heads or by query rows; a rank gets the key/value heads its part reads.

    q: [B, N, S, D]   k, v: [B, N / group, T, D]     rank r: query heads lo..hi,
                                                             key/value heads lo // group .. ceil(hi / group)
    q: [B, N * S, D]                                 rank r: positions lo..hi of heads and rows as one dim, likewise

Two ranks that share a group both get its key/value head (copies); its gradients are then summands.
"""

from functools import lru_cache
from math import isqrt

from autosp_aot.passes.rules.spec import Axis, Spec
from autosp_aot.placement import Bounds, even_bounds
from autosp_aot.program import per_rank


def attention(call) -> Spec:
    q, k, v = (value.shape for value in call.operands[:3])
    return _spec(call, q, k, v, operands="qkv", results="ol")


def attention_backward(call) -> Spec:
    _, q, k, v, _, _ = (value.shape for value in call.operands)
    return _spec(call, q, k, v, operands="oqkvol", results="qkv")


def _spec(call, q, k, v, operands: str, results: str) -> Spec:
    _, causal, group, *rest = call.instr.args[len(call.operands) :]
    by_rows = len(q) == 3
    rows = rest[0] if by_rows else 1
    batch, cut, seen, keys, width, v_width = range(6)
    extents = (q[0], q[1], 1 if by_rows else q[2], k[2], k[3], v[3])
    kv_heads = Axis(cut, group=group * rows)
    mine = ((Axis(batch),), (Axis(cut),)) + (() if by_rows else ((Axis(seen),),))
    dims = {
        "q": (*mine, (Axis(width),)),
        "k": ((Axis(batch),), (kv_heads,), (Axis(keys),), (Axis(width),)),
        "v": ((Axis(batch),), (kv_heads,), (Axis(keys),), (Axis(v_width),)),
        "o": (*mine, (Axis(v_width),)),
        "l": mine,
    }
    if by_rows:
        bounds = row_bounds(q[1] // rows, rows, causal, call.ranks)
    else:
        bounds = head_bounds(q[1], group, call.ranks) if q[1] >= call.ranks else None
    kept = [name for name, used in zip(results, call.results_by_position) if used]

    def localize(args, local):
        first = per_rank(tuple(lo for lo, _ in local.bounds)) if local.factor == cut else 0
        return (*args[:-1], first)

    return Spec(
        extents,
        frozenset({seen, keys, width, v_width}),
        tuple(dims[name] for name in operands),
        tuple(dims[name] for name in kept),
        splits=((cut, bounds),) if bounds else (),
        localize=localize,
        flat=frozenset({cut}),
        contraction=True,
    )


@lru_cache
def row_bounds(heads: int, rows: int, causal: bool, ranks: int) -> Bounds:
    """Heads and rows as one dim, cut where all ranks have equally many scores; row i of a causal head has i + 1."""
    if not causal:
        return even_bounds(heads * rows, ranks)
    scores = rows * (rows + 1) // 2
    cuts = []
    for rank in range(ranks + 1):
        head, left = divmod(heads * scores * rank // ranks, scores)
        cuts.append(head * rows + (isqrt(8 * left + 1) - 1) // 2)
    return tuple(zip(cuts, cuts[1:]))


@lru_cache
def head_bounds(heads: int, group: int, ranks: int) -> Bounds:
    """Query heads over ranks: the longest share as short as can be, then the fewest copies of key/value heads.

    `heads >= ranks`; every rank gets at least one head. Dynamic programming over (rank, heads dealt), ties to the left.
    """
    longest = -(-heads // ranks)
    copies = lambda lo, hi: -(-hi // group) - lo // group  # noqa: E731
    best: dict[int, tuple[int, tuple]] = {0: (0, ())}
    for rank in range(ranks):
        after: dict[int, tuple[int, tuple]] = {}
        for lo, (cost, cuts) in best.items():
            for hi in range(min(lo + longest, heads), lo, -1):
                left = ranks - rank - 1
                if left <= heads - hi <= left * longest:
                    found = (cost + copies(lo, hi), (*cuts, (lo, hi)))
                    if hi not in after or found[0] < after[hi][0]:
                        after[hi] = found
        best = after
    return best[heads][1]
