"""The canonical attention, cut by query heads or by query rows; a rank gets the key/value heads its part reads.

    q: [B, N, S, D]   k, v: [B, N / group, T, D]     rank r: query heads lo..hi,
                                                             key/value heads lo // group .. ceil(hi / group)
    q: [B, N * S, D]                                 rank r: positions lo..hi of heads and rows as one dim, likewise

Two ranks that share a group both get its key/value head (copies); its gradients are then partial sums. Vectors of the
score are cut with the heads where they have heads; over rows they stay whole, unless they have a dim of heads and rows.
"""

from functools import lru_cache
from math import isqrt

from autosp_aot.ir.placement import Bounds, even_bounds
from autosp_aot.ir.program import Args, Ref, per_rank
from autosp_aot.sharding.call import Call
from autosp_aot.sharding.local import Local
from autosp_aot.sharding.spec import Axis, Dims, Spec

BATCH, CUT, ROWS, KEYS, WIDTH, V_WIDTH, HEADS = range(7)


def spec(arguments: str, results: str, call: Call) -> Spec:
    """`arguments` and `results` are the names in the operator's signature.

    Where there is dropout the seed is an operand: what is dropped follows from the position in the whole batch.
    """
    given = dict(zip(arguments.split(", "), call.instr.args, strict=True))
    operands = iter(call.operands)
    shapes = {name: next(operands).shape for name, arg in given.items() if isinstance(arg, Ref) and name != "seed"}
    vectors, drops = [next(operands).shape for _ in given["vectors"]], isinstance(given["seed"], Ref)
    q, k, v = shapes["q"], shapes["k"], shapes["v"]
    by_rows, group, rows = "rows" in given, given["group"], given.get("rows", 1)
    heads = q[1] // rows
    bounds = _bounds(call, heads, rows, group, by_rows)
    each = [_vector(shape, by_rows) for shape in vectors]
    dims = _dims(group * rows, by_rows) | ({"vector": each[given["which"]]} if "which" in given else {})
    own = [dims[name.removeprefix("grad_")] for name in results.strip("()").split(", ")]
    return Spec(
        (q[0], q[1], rows if by_rows else q[2], k[2], k[3], v[3], heads),
        frozenset({ROWS, KEYS, WIDTH, V_WIDTH, HEADS, *((BATCH,) if drops else ())}),
        (*(dims[name.removeprefix("grad_")] for name in shapes), *each, *(((),) if drops else ())),
        tuple(dim for dim, used in zip(own, call.results_by_position) if used),
        splits=((CUT, bounds),) if bounds else (),
        localize=_localize,
        flat=frozenset({CUT}),
        contraction=True,
    )


def _dims(group: int, by_rows: bool) -> dict[str, Dims]:
    """Of q, k, v, the output and lse; `group` positions of the cut dim share a key/value head."""
    kv = Axis(CUT, group=group)
    mine = ((Axis(BATCH),), (Axis(CUT),)) + (() if by_rows else ((Axis(ROWS),),))
    return {
        "q": (*mine, (Axis(WIDTH),)),
        "k": ((Axis(BATCH),), (kv,), (Axis(KEYS),), (Axis(WIDTH),)),
        "v": ((Axis(BATCH),), (kv,), (Axis(KEYS),), (Axis(V_WIDTH),)),
        "out": (*mine, (Axis(V_WIDTH),)),
        "lse": mine,
    }


def _bounds(call: Call, heads: int, rows: int, group: int, by_rows: bool) -> Bounds | None:
    """Where heads, or heads and rows, are cut; None where there are too few heads."""
    if by_rows:
        scoring = dict(call.instr.kwargs)
        return row_bounds(heads, rows, scoring.get("causal", False) and "window" not in scoring, call.ranks)
    return head_bounds(heads, group, call.ranks) if heads >= call.ranks else None


def _localize(args: Args, local: Local) -> Args:
    """The call of a rank, whose last argument is the first of its heads, or of its heads and rows."""
    return (*args[:-1], per_rank(tuple(lo for lo, _ in local.bounds)) if local.factor == CUT else 0)


def _vector(shape: tuple[int, ...], by_rows: bool) -> Dims:
    """A vector's dims: [batch, heads, rows, keys], or [batch, heads and rows, keys]; one of size one has no factor."""
    factors = (BATCH, CUT, KEYS) if len(shape) == 3 else (BATCH, HEADS if by_rows else CUT, ROWS, KEYS)
    return tuple(() if size == 1 else (Axis(factor),) for factor, size in zip(factors, shape))


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

    def copies(lo: int, hi: int) -> int:
        return -(-hi // group) - lo // group

    best: dict[int, tuple[int, Bounds]] = {0: (0, ())}
    for rank in range(ranks):
        after: dict[int, tuple[int, Bounds]] = {}
        for lo, (cost, cuts) in best.items():
            for hi in range(min(lo + longest, heads), lo, -1):
                left = ranks - rank - 1
                if left <= heads - hi <= left * longest:
                    found = (cost + copies(lo, hi), (*cuts, (lo, hi)))
                    if hi not in after or found[0] < after[hi][0]:
                        after[hi] = found
        best = after
    return best[heads][1]
