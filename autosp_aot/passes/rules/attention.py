"""The canonical attention pair: cut by query heads, a rank gets the key/value heads that its query heads read.

    q: [B, N, S, D]   k, v: [B, N / group, T, D]     rank r: query heads lo..hi, key/value heads lo // group .. ceil(hi / group)

Two ranks that share a group both get its key/value head (copies); its gradients are then summands.
"""

from functools import lru_cache

from autosp_aot.passes.rules.spec import Axis, Spec
from autosp_aot.placement import Bounds
from autosp_aot.program import per_rank


def attention(call) -> Spec:
    q, k, v = (value.shape for value in call.operands[:3])
    return _spec(call, q, k, v, operands="qkv", results="ol")


def attention_backward(call) -> Spec:
    _, q, k, v, _, _ = (value.shape for value in call.operands)
    return _spec(call, q, k, v, operands="oqkvol", results="qkv")


def _spec(call, q, k, v, operands: str, results: str) -> Spec:
    group = q[1] // k[1]
    batch, heads, rows, keys, width, v_width = range(6)
    extents = (q[0], q[1], q[2], k[2], q[3], v[3])
    kv_heads = Axis(heads, group=group)
    dims = {
        "q": ((Axis(batch),), (Axis(heads),), (Axis(rows),), (Axis(width),)),
        "k": ((Axis(batch),), (kv_heads,), (Axis(keys),), (Axis(width),)),
        "v": ((Axis(batch),), (kv_heads,), (Axis(keys),), (Axis(v_width),)),
        "o": ((Axis(batch),), (Axis(heads),), (Axis(rows),), (Axis(v_width),)),
        "l": ((Axis(batch),), (Axis(heads),), (Axis(rows),)),
    }
    kept = [name for name, used in zip(results, call.results_by_position) if used]

    def localize(args, local):
        first = per_rank(tuple(lo for lo, _ in local.bounds)) if local.factor == heads else 0
        return (*args[:-1], first)

    return Spec(
        extents,
        frozenset({rows, keys, width, v_width}),
        tuple(dims[name] for name in operands),
        tuple(dims[name] for name in kept),
        splits=((heads, head_bounds(q[1], group, call.ranks)),) if q[1] >= call.ranks else (),
        localize=localize,
        flat=frozenset({heads}),
        contraction=True,
    )


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
