"""Attention kernels by target, and our own blockwise one for what they lack; arguments are those of `arguments.py`.

Operands lie as `contract.py` demands, which programs see to: kernels do not check it, so it is checked here again.
`lse` is fp32 for half dtypes, else q's dtype. A rank without heads yields empty tensors and calls no kernel.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from autosp_aot.ir.operators import wide
from autosp_aot.ops.attention.arguments import Arguments, KernelCall, RowRun, Saved, of_heads
from autosp_aot.ops.attention.blockwise import blockwise, blockwise_backward, blockwise_vector_gradient
from autosp_aot.ops.attention.contract import by_row, demands, has_kernel
from autosp_aot.ops.attention.workspace import gradient, outputs
from autosp_aot.targets.table import TARGETS

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


def attention(call: Arguments) -> tuple[Tensor, Tensor]:
    """Forward: out and the log of the sum of exponentials of each row's scores."""
    target, width = call.q.device.type, call.v.shape[3]
    _require(call)
    if call.q.numel() == 0:
        return outputs(call.q, width, target)
    runs = call.head_runs()
    results = outputs(call.q, width, target) if len(runs) > 1 else None
    for run in runs:
        found = _forward(call.of_heads(run))
        if results is None:
            return found
        _put(results, (run.heads, run.heads), found)
        del found
    assert results is not None, "there are heads"
    return results


def attention_backward(call: Arguments, saved: Saved) -> Gradients:
    """Gradients of q, k and v; those of k and v hold what this rank's query heads add to them."""
    if call.q.numel() == 0:
        return gradient(call.q), gradient(call.k).zero_(), gradient(call.v).zero_()
    _require(call, saved)
    runs = call.head_runs()
    results = (gradient(call.q), gradient(call.k), gradient(call.v)) if len(runs) > 1 else None
    for run in runs:
        found = _backward(call.of_heads(run), saved.part(lambda t: t[:, run.heads]))
        if call.group > 1:
            found = found[0], found[1].sum(1, keepdim=True), found[2].sum(1, keepdim=True)
        if results is None:
            return found
        _put(results, (run.heads, run.kv, run.kv), found)
        del found
    assert results is not None, "there are heads"
    return results


def attention_vector_gradient(call: Arguments, saved: Saved, which: int) -> Tensor:
    """The gradient of vector number `which`: what this rank's query heads add to it."""
    vector = call.vectors[which]
    total = vector.new_zeros(vector.shape, dtype=saved.lse.dtype)
    for run in call.head_runs() if call.q.numel() else ():
        found = blockwise_vector_gradient(call.of_heads(run), saved.part(lambda t: t[:, run.heads]), which)
        of_heads([total], run.heads)[0].add_(found)
    return total.to(vector.dtype)


def attention_rows(call: Arguments) -> tuple[Tensor, Tensor]:
    """`attention` over heads and rows as one dim."""
    shape, dtype = call.q.shape[:2], wide(call.q.dtype)
    results = call.q.new_empty((*shape, call.v.shape[3])), call.q.new_empty(shape, dtype=dtype)
    _require(call)
    for run in call.row_runs() if call.q.numel() else ():
        found = None
        for _, part in _by_keys(run, call.of_rows(run)):
            more = _forward(part)
            found = more if found is None else _merged(found, more)
        assert found is not None, "there are keys"
        _put(results, (run.part, run.part), tuple(part.squeeze(1) for part in found))
    return results


def attention_rows_backward(call: Arguments, saved: Saved) -> Gradients:
    """Gradients of `attention_rows`; those of k and v hold what this rank's rows add to them."""
    dtypes = [t.dtype for t in (call.q, call.k, call.v)]
    grads = [t.new_zeros(t.shape, dtype=saved.lse.dtype) for t in (call.q, call.k, call.v)]
    _require(call, saved)
    for run in call.row_runs() if call.q.numel() else ():
        own = saved.part(run.rows)
        for keys, part in _by_keys(run, call.of_rows(run)):
            found = _backward(part, own)
            grads[0][:, run.part] += found[0].squeeze(1)
            grads[1][:, run.kv, keys] += found[1]
            grads[2][:, run.kv, keys] += found[2]
            del found
    grad_q, grad_k, grad_v = (total.to(dtype) for total, dtype in zip(grads, dtypes))
    return grad_q, grad_k, grad_v


def attention_rows_vector_gradient(call: Arguments, saved: Saved, which: int) -> Tensor:
    """The gradient of vector number `which`: what this rank's rows add to it."""
    vector = call.vectors[which]
    total = vector.new_zeros(vector.shape, dtype=saved.lse.dtype)
    for run in call.row_runs() if call.q.numel() else ():
        run.vectors([total])[0].add_(blockwise_vector_gradient(call.of_rows(run), saved.part(run.rows), which))
    return total.to(vector.dtype)


def _require(call: Arguments, *saved: Saved) -> None:
    """Raise RuntimeError where an operand does not lie as a kernel takes it to."""
    tensors = {"q": call.q, "k": call.k, "v": call.v} | {name: t for one in saved for name, t in vars(one).items()}
    for name, demand in demands(call, *saved, target=call.q.device.type).items():
        if not demand.holds(tensors[name]):
            strides = list(tensors[name].stride())
            raise RuntimeError(f"{name} with strides {strides} is not what the kernel reads: {demand.source}")


def _by_keys(run: RowRun, call: KernelCall) -> Iterator[tuple[slice, KernelCall]]:
    """What a run's rows see: all keys, or those before them and a triangle (kernels differ on it)."""
    keys, scoring = call.k.shape[2], call.scoring
    if not scoring.plain or not scoring.causal or run.stop > keys:
        yield slice(0, keys), call
        return
    before, own = slice(0, run.first), slice(run.first, run.stop)
    if run.first:
        yield before, call.keys(before, causal=False)
    yield own, call.keys(own, first_row=0)


def _put(results: tuple[Tensor, ...], places: tuple[slice, ...], found: tuple[Tensor, ...]) -> None:
    """Copy what a run found to its places along dim 1."""
    for result, place, part in zip(results, places, found):
        result[:, place] = part


def _merged(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys as one, by their lse."""
    lse = torch.logaddexp(a[1], b[1])
    weights = [torch.exp(part[1] - lse).unsqueeze(-1) for part in (a, b)]
    return (a[0] * weights[0] + b[0] * weights[1]).to(a[0].dtype), lse


def _forward(call: KernelCall) -> tuple[Tensor, Tensor]:
    kernel = _kernels(call)
    return blockwise(call) if kernel is None else kernel[0](call)


def _backward(call: KernelCall, saved: Saved) -> Gradients:
    kernel = _kernels(call)
    if kernel is None or saved.grad_lse is not None:
        return blockwise_backward(call, saved)
    flash = TARGETS[call.q.device.type].flash
    saved = replace(saved, **{name: by_row(getattr(saved, name)) for name in flash.copied})
    if flash.dense_lse:
        saved = replace(saved, lse=saved.lse.contiguous())
    return kernel[1](call, saved)


def _kernels(call: KernelCall) -> tuple[Callable, Callable] | None:
    """Forward and backward kernel for a device, dtype, width and softmax; None where there is none.

    Only operators that CUDA and ROCm builds of torch share: flash attention is FlashAttention-2 on one, AOTriton or CK
    on the other.
    """
    target = call.q.device.type
    if not has_kernel(call.q, call.k, call.v, call.scoring.plain, call.scoring.causal, target):
        return None
    return (_cpu_flash, _cpu_flash_backward) if target == "cpu" else (_cuda_flash, _cuda_flash_backward)


def _cpu_flash(call: KernelCall) -> tuple[Tensor, Tensor]:
    scoring = call.scoring
    return aten._scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, 0.0, scoring.causal, scale=scoring.scale
    )


def _cpu_flash_backward(call: KernelCall, saved: Saved) -> Gradients:
    scoring = call.scoring
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        saved.grad_out, call.q, call.k, call.v, saved.out, saved.lse, 0.0, scoring.causal, scale=scoring.scale
    )


def _cuda_flash(call: KernelCall) -> tuple[Tensor, Tensor]:
    scoring = call.scoring
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        call.q, call.k, call.v, 0.0, scoring.causal, False, scale=scoring.scale
    )
    return out, lse


def _cuda_flash_backward(call: KernelCall, saved: Saved) -> Gradients:
    q, k, scoring = call.q, call.k, call.scoring
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a random generator that dropout 0 does not read
    return aten._scaled_dot_product_flash_attention_backward(
        saved.grad_out, q, k, call.v, saved.out, saved.lse, None, None, q.shape[2], k.shape[2], 0.0,
        scoring.causal, state, state[:1], scale=scoring.scale,
    )  # fmt: skip
