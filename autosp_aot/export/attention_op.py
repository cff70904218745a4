"""The attention operator pair as it is captured: shapes and autograd only, no kernel (that is `runtime/kernels.py`).

    attention(q, k, v, scale, causal) -> out, lse
    attention_backward(grad_out, q, k, v, out, lse, scale, causal) -> grad_q, grad_k, grad_v

    q: [B, N, S, D]   k: [B, Nkv, T, D]   v: [B, Nkv, T, Dv]   out: [B, N, S, Dv]   lse: [B, N, S]

Query head n reads key/value head n // (N / Nkv). `lse` is fp32 for bf16 and fp16, else the dtype of q. `causal` lets
query i see keys 0..i (the top left alignment of `scaled_dot_product_attention`).
"""

import torch
from torch import Tensor


@torch.library.custom_op("autosp::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    raise AssertionError("captured on fake tensors only")


@attention.register_fake
def _(q, k, v, scale, causal):
    lse_dtype = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.custom_op("autosp::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("captured on fake tensors only")


@attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, scale, causal):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse = ctx.saved_tensors
    return (*attention_backward(grad_out, q, k, v, out, lse, ctx.scale, ctx.causal), None, None)


attention.register_autograd(_backward, setup_context=_setup_context)
