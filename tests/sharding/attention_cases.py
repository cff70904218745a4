"""Calls of attention: groups, windows, score expressions with vectors of every shape, gradients of lse."""

import torch

from autosp_aot.ops.table import OURS
from tests.sharding.drawing import normal

SCORES = (
    ("aten.add.Tensor", ("aten.tanh.default", "s"), "v0"),
    ("aten.where.ScalarOther", ("aten.le.Tensor", "k", "q"), ("aten.mul.Tensor", "s", "v0"), -9.0),
)


def _attention(rng, kind: str, by_rows: bool):
    """Arguments, the last of them keyword arguments."""
    group, kv, batch, rows, width = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 2), rng.randint(1, 6), 8
    keys = rows if (causal := rng.random() < 0.6) else rng.randint(1, 6)
    heads = group * kv
    q = normal(rng, batch, heads, rows, width)
    k, v = normal(rng, batch, kv, keys, width), normal(rng, batch, kv, keys, width)
    scoring, vectors = {"scale": 0.3, "causal": causal}, []
    if causal and rng.random() < 0.3:
        scoring["window"] = rng.randint(1, 3)
    if kind == "vector_gradient" or rng.random() < 0.4:
        vectors = [normal(rng, *(rng.choice((1, size)) for size in (batch, heads, rows, keys)))]
        scoring["score"] = rng.choice(SCORES)
    seed = torch.tensor(rng.randrange(99)) if rng.random() < 0.3 else None
    if seed is not None:
        scoring |= {"dropout": 0.3, "site": 1, "heads": heads}
    out, lse = OURS["autosp.attention"].kernel(q, k, v, vectors, seed, group, 0, **scoring)
    grad_lse = normal(rng, *lse.shape) if rng.random() < 0.3 else None
    tensors = [q, k, v] if kind == "forward" else [normal(rng, *out.shape), q, k, v, out, lse, grad_lse]
    tail = [group, rows, 0] if by_rows else [group, 0]
    if by_rows:
        flat = lambda t: t.flatten(1, 2) if t is not None and t.shape[1:3] == (heads, rows) else t  # noqa: E731
        whole = (1, 2) if kind == "forward" else (2, 3)
        tensors = [t if at in whole else flat(t) for at, t in enumerate(tensors)]
        vectors = list(map(flat, vectors))
    which = [0] if kind == "vector_gradient" else []
    return (*tensors, tuple(vectors), seed, *which, *tail, scoring)


ARGUMENTS = {
    "autosp.attention": lambda rng: _attention(rng, "forward", False),
    "autosp.attention_backward": lambda rng: _attention(rng, "backward", False),
    "autosp.attention_rows": lambda rng: _attention(rng, "forward", True),
    "autosp.attention_rows_backward": lambda rng: _attention(rng, "backward", True),
    "autosp.attention_rows_vector_gradient": lambda rng: _attention(rng, "vector_gradient", True),
    "autosp.attention_vector_gradient": lambda rng: _attention(rng, "vector_gradient", False),
}
