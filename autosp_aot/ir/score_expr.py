"""Score expressions: what a model makes of the products of queries and keys before their softmax, as nested tuples.

    where(k <= q, tanh(s / 50) * 50, -inf)
      =  ("aten.where.ScalarOther", ("aten.le.Tensor", "k", "q"),
            ("aten.mul.Tensor", ("aten.tanh.default", ("aten.div.Tensor", "s", 50.0)), 50.0), -inf)

Leaves: "s" the products times the scale, "q" and "k" the positions of the row and of the key (i64), "v0", "v1" ... the
attention's vectors, numbers as they were written, ("constant", dtype, number) a tensor that is the same everywhere.
("cast", dtype, x) is x in another dtype; every other head is an ATen operator that works element by element.
"""

from collections.abc import Iterator, Mapping

from torch import Tensor

from autosp_aot.ir.operators import DTYPES, elementwise, overload
from autosp_aot.ir.program import Arg

NODES = 256  # of one expression


def evaluate(score: Arg, leaves: Mapping[str, Tensor]) -> Tensor:
    """The value of an expression over leaves that broadcast to [B, N, rows, keys]."""
    if isinstance(score, str):
        return leaves[score]
    head, *rest = score
    if head == "constant":
        return leaves["s"].new_full((1, 1, 1, 1), rest[1], dtype=DTYPES[rest[0]])
    if head == "cast":
        return evaluate(rest[1], leaves).to(DTYPES[rest[0]])
    operator = overload(head)
    assert operator is not None, "as checked"
    value: Tensor = operator(*(evaluate(x, leaves) if isinstance(x, (str, tuple)) else x for x in rest))
    return value


def check(score: Arg, vectors: int) -> None:
    """ValueError unless `score` is an expression over `vectors` vectors, of allowed operators."""
    known = {"s", "q", "k", *(f"v{at}" for at in range(vectors))}
    for count, part in enumerate(walk(score)):
        if count > NODES:
            raise ValueError(f"a score expression has more than {NODES} parts")
        if isinstance(part, str) and part not in known:
            raise ValueError(f"a score expression has no leaf {part!r}")
        if isinstance(part, tuple) and part[:1] == ("constant",):
            fits = len(part) == 3 and part[1] in DTYPES and isinstance(part[2], (int, float))
        elif isinstance(part, tuple) and part[:1] == ("cast",):
            fits = len(part) == 3 and part[1] in DTYPES
        else:
            named = isinstance(part, tuple) and part != () and isinstance(part[0], str)
            fits = not isinstance(part, tuple) or (named and elementwise(part[0], in_scores=True))
        if not fits:
            raise ValueError(f"{part[:1]} is no part of a score expression")


def walk(score: Arg) -> Iterator[Arg]:
    """An expression and all its parts, operands after what they are operands of."""
    yield score
    if isinstance(score, tuple):
        head, *rest = score
        for operand in () if head == "constant" else rest[1:] if head == "cast" else rest:
            yield from walk(operand)
