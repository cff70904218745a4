"""The attention operators as they are captured: shapes and autograd only, no kernel (those are in `kernels.py`).

    attention(q, k, v, vectors; scoring) -> out, lse
    attention_backward(grad_out, q, k, v, out, lse, grad_lse, vectors; scoring) -> grad_q, grad_k, grad_v
    attention_vector_gradient(grad_out, q, k, v, out, lse, grad_lse, vectors, which; scoring) -> grad of vectors[which]

    q: [B, N, S, D]   k: [B, Nkv, T, D]   v: [B, Nkv, T, Dv]   out: [B, N, S, Dv]   lse: [B, N, S]

Query head n reads key/value head n // (N / Nkv). `lse` is fp32 for bf16 and fp16, else the dtype of q. `scoring` is the
JSON of what `blockwise.Scoring` holds: from the products of queries and keys to weights.
"""

import torch
from torch import Tensor

from autosp_aot.ir.operators import wide


@torch.library.custom_op("autosp::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, vectors: list[Tensor], scoring: str) -> tuple[Tensor, Tensor]:
    raise AssertionError("captured on fake tensors only")


@attention.register_fake
def _(q, k, v, vectors, scoring):
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@torch.library.custom_op("autosp::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    vectors: list[Tensor], scoring: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    raise AssertionError("captured on fake tensors only")


@attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, grad_lse, vectors, scoring):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("autosp::attention_vector_gradient", mutates_args=())
def attention_vector_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None,
    vectors: list[Tensor], which: int, scoring: str,
) -> Tensor:  # fmt: skip
    raise AssertionError("captured on fake tensors only")


@attention_vector_gradient.register_fake
def _(grad_out, q, k, v, out, lse, grad_lse, vectors, which, scoring):
    return vectors[which].new_empty(vectors[which].shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k, v, vectors, ctx.scoring = inputs
    ctx.save_for_backward(q, k, v, *output, *vectors)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, *vectors = ctx.saved_tensors
    given = torch.zeros_like(out) if grad_out is None else grad_out, q, k, v, out, lse, grad_lse, vectors
    gradients = [
        attention_vector_gradient(*given, which, ctx.scoring) if needed else None
        for which, needed in enumerate(ctx.needs_input_grad[3])
    ]
    return *attention_backward(*given, ctx.scoring), gradients, None


attention.register_autograd(_backward, setup_context=_setup_context)
