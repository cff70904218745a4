"""The attention operators: their records.

Over heads, and over heads and query rows as one dim where there are more ranks than heads; each with its gradients of
q, k and v, and of one of the vectors that the score reads.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod

from autosp_aot.ops.attention import contract, kernels, rule, workspace
from autosp_aot.ops.attention.arguments import named
from autosp_aot.ops.record import OverHeads, OwnOp, Shape

_SCORING = "scale=, causal=False, window=None, score=None, safe=True, dropout=0.0, site=0, heads=0"
_SAVED = "grad_out, q, k, v, out, lse, grad_lse, vectors, seed"


def _attention(name: str, arguments: str, results: str, products: int, rows: str = "", **fields) -> OwnOp:
    """A record by what differs: its `products` are of [S, D] and [D, S], or [S, S] and [S, D].

    `rows` is the name of the operator over heads and rows as one dim.
    """
    kernel, memory = getattr(kernels, name), getattr(workspace, name)
    query, in_blocks = arguments.split(", ").index("q"), "which" in arguments

    def of_target(function: Callable) -> Callable:
        return lambda *values, target, **scoring: named(partial(function, target=target), arguments)(*values, **scoring)

    of_keys = tuple(at for at, result in enumerate(results.strip("()").split(", ")) if result in ("grad_k", "grad_v"))
    return OwnOp(
        f"autosp.{name}",
        f"autosp.{name}({arguments}, {_SCORING}) -> {results}",
        named(kernel, arguments),
        of_target(memory),
        partial(rule.spec, arguments, results),
        flops=_flops(products, query),
        traced=partial(named(kernel, arguments), traced=True),
        over_heads=OverHeads(query, f"autosp.{rows}", of_keys) if rows else None,
        site="site",
        demands=None if in_blocks else of_target(contract.demands),
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
    rows="attention_rows",
    quadratic=True,
    gradient="autosp.attention_backward",
)
ATTENTION_BACKWARD = _attention(
    "attention_backward",
    f"{_SAVED}, group, first_head",
    "(grad_q, grad_k, grad_v)",
    products=5,
    rows="attention_rows_backward",
)
ATTENTION_VECTOR_GRADIENT = _attention(
    "attention_vector_gradient",
    f"{_SAVED}, which, group, first_head",
    "grad_vector",
    products=2,
    rows="attention_rows_vector_gradient",
)
ATTENTION_ROWS = _attention(
    "attention_rows",
    "q, k, v, vectors, seed, group, rows, start",
    "(out, lse)",
    products=2,
    quadratic=True,
    gradient="autosp.attention_rows_backward",
)
ATTENTION_ROWS_BACKWARD = _attention(
    "attention_rows_backward", f"{_SAVED}, group, rows, start", "(grad_q, grad_k, grad_v)", products=5
)
ATTENTION_ROWS_VECTOR_GRADIENT = _attention(
    "attention_rows_vector_gradient", f"{_SAVED}, which, group, rows, start", "grad_vector", products=2
)
