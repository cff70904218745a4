"""The canonical attention, cut by query heads or by query rows; a rank gets the key/value heads its part reads.

    q: [B, N, S, D]   k, v: [B, N / group, T, D]     rank r: query heads lo..hi,
                                                             key/value heads lo // group .. ceil(hi / group)
    q: [B, N * S, D]                                 rank r: positions lo..hi of heads and rows as one dim, likewise

Two ranks that share a group both get its key/value head (copies); its gradients are then summands. Vectors of the score
are cut with the heads where they have heads; over rows they stay whole, unless they have a dim of heads and rows too.
"""

from functools import lru_cache
from math import isqrt

from autosp_aot.ir.placement import Bounds, even_bounds
from autosp_aot.ir.program import Args, Ref, per_rank
from autosp_aot.sharding.call import Call
from autosp_aot.sharding.local import Local
from autosp_aot.sharding.spec import Axis, Dims, Spec

BATCH, CUT, ROWS, KEYS, WIDTH, V_WIDTH, HEADS = range(7)


def attention(call: Call) -> Spec:
    return _spec(call, "qkv", results=["o", "l"])


def attention_backward(call: Call) -> Spec:
    return _spec(call, "oqkvoll", results=["q", "k", "v"])


def vector_gradient(call: Call) -> Spec:
    which = call.instr.args[len("oqkvoll") + 2]
    return _spec(call, "oqkvoll", results=[which])


def _spec(call: Call, letters: str, results: list[str | int]) -> Spec:
    """`letters` name the tensor arguments before the vectors; `results` are letters, or the number of a vector.

    After the vectors comes the seed of dropout or None. What is dropped follows from the position in the whole batch.
    """
    drops = isinstance(call.instr.args[len(letters) + 1], Ref)
    given = [isinstance(arg, Ref) for arg in call.instr.args[: len(letters)]]
    named = "".join(letter for letter, there in zip(letters, given) if there)
    shapes = [value.shape for value in call.operands[: len(call.operands) - drops]]
    q, k, v = (shapes[named.index(letter)] for letter in "qkv")
    by_rows, count = len(q) == 3, len(shapes) - len(named)
    group, *rest = call.instr.args[len(letters) + 2 + (len(results) == 1) : -1]
    rows = rest[0] if by_rows else 1
    heads = q[1] // rows
    extents = (q[0], q[1], rows if by_rows else q[2], k[2], k[3], v[3], heads)
    vectors = [_vector(shape, by_rows) for shape in shapes[len(shapes) - count :]]
    dims = _dims(group * rows, by_rows) | dict(enumerate(vectors))
    bounds = _bounds(call, heads, rows, group, by_rows)
    kept = [name for name, used in zip(results, call.results_by_position) if used]
    return Spec(
        extents,
        frozenset({ROWS, KEYS, WIDTH, V_WIDTH, HEADS, *((BATCH,) if drops else ())}),
        (*(dims[letter] for letter in named), *vectors, *(((),) if drops else ())),
        tuple(dims[name] for name in kept),
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
        "o": (*mine, (Axis(V_WIDTH),)),
        "l": mine,
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
