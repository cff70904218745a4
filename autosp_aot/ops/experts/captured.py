"""The product of routed rows with their experts as it is captured: shapes and autograd only, no kernel.

    expert_mm(ids, x, weight) -> y                     y[t] = x[t] @ weight[ids[t]], zeros where ids[t] is no expert
    expert_mm_weight_grad(ids, x, grad, experts)       grad_weight[e] = the sum of outer(x[t], grad[t]) over ids[t] = e

    ids: [T] int64   x: [T, K]   weight: [E, K, N]   y, grad: [T, N]   grad_weight: [E, K, N]

Rows come in any order; sorting them by expert is the kernel's matter (`kernels.py`).
"""

import torch
from torch import Tensor

# Products that models sort their rows for: (rows by expert [T, K], weight [E, K, N], offs: where each's rows end [E]).
PRODUCTS = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")


@torch.library.custom_op("autosp::expert_mm", mutates_args=())
def expert_mm(ids: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    raise AssertionError("captured on fake tensors only")


@expert_mm.register_fake
def _(ids, x, weight):
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("autosp::expert_mm_weight_grad", mutates_args=())
def expert_mm_weight_grad(ids: Tensor, x: Tensor, grad: Tensor, experts: int) -> Tensor:
    raise AssertionError("captured on fake tensors only")


@expert_mm_weight_grad.register_fake
def _(ids, x, grad, experts):
    return x.new_empty(experts, x.shape[1], grad.shape[1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    ids, x, weight = ctx.saved_tensors
    grad_x = expert_mm(ids, grad, weight.transpose(1, 2)) if ctx.needs_input_grad[1] else None
    grad_weight = expert_mm_weight_grad(ids, x, grad, weight.shape[0]) if ctx.needs_input_grad[2] else None
    return None, grad_x, grad_weight


expert_mm.register_autograd(_backward, setup_context=_setup_context)
