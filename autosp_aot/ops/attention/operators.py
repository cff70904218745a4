"""The attention operators: their records.

Over heads, and over heads and query rows as one dim where there are more ranks than heads; each with its gradients of
q, k and v, and of one of the vectors that the score reads.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod

from autosp_aot.ops.attention import kernels, rule, workspace
from autosp_aot.ops.record import OverHeads, OwnOp, Shape

_SCORING = "scale=, causal=False, window=None, score=None, safe=True, dropout=0.0, site=0, heads=0"
_SAVED = "grad_out, q, k, v, out, lse, grad_lse, vectors, seed"


def _attention(name: str, arguments: str, results: str, products: int, query: int, **fields) -> OwnOp:
    """A record by what differs; its `products` are of [S, D] and [D, S], or [S, S] and [S, D]."""
    kernel = getattr(kernels, name)
    return OwnOp(
        f"autosp.{name}",
        f"autosp.{name}({arguments}, {_SCORING}) -> {results}",
        kernel,
        getattr(workspace, name),
        flops=_flops(products, query),
        traced=partial(kernel, traced=True),
        site="site",
        **fields,
    )


def _flops(products: int, query: int) -> Callable[[list[Shape], Mapping], int]:
    def flops(shapes: list[Shape], scoring: Mapping) -> int:
        q, k = shapes[query], shapes[query + 1]
        seen = k[2] // 2 if scoring.get("causal") else k[2]
        return products * 2 * prod(q) * min(seen, scoring.get("window", seen))

    return flops


ATTENTION = _attention(
    "attention",
    "q, k, v, vectors, seed, group, first_head",
    "(out, lse)",
    products=2,
    query=0,
    rule=rule.attention,
    quadratic=True,
    gradient="autosp.attention_backward",
    over_heads=OverHeads(0, "autosp.attention_rows"),
)
ATTENTION_BACKWARD = _attention(
    "attention_backward",
    f"{_SAVED}, group, first_head",
    "(grad_q, grad_k, grad_v)",
    products=5,
    query=1,
    rule=rule.attention_backward,
    over_heads=OverHeads(1, "autosp.attention_rows_backward", of_keys=(1, 2)),
)
ATTENTION_VECTOR_GRADIENT = _attention(
    "attention_vector_gradient",
    f"{_SAVED}, which, group, first_head",
    "grad_vector",
    products=2,
    query=1,
    rule=rule.vector_gradient,
    over_heads=OverHeads(1, "autosp.attention_rows_vector_gradient"),
)
ATTENTION_ROWS = _attention(
    "attention_rows",
    "q, k, v, vectors, seed, group, rows, start",
    "(out, lse)",
    products=2,
    query=0,
    rule=rule.attention,
    quadratic=True,
    gradient="autosp.attention_rows_backward",
)
ATTENTION_ROWS_BACKWARD = _attention(
    "attention_rows_backward",
    f"{_SAVED}, group, rows, start",
    "(grad_q, grad_k, grad_v)",
    products=5,
    query=1,
    rule=rule.attention_backward,
)
ATTENTION_ROWS_VECTOR_GRADIENT = _attention(
    "attention_rows_vector_gradient",
    f"{_SAVED}, which, group, rows, start",
    "grad_vector",
    products=2,
    query=1,
    rule=rule.vector_gradient,
)
