"""What torch would decide by itself while forward runs, decided so that forward can be traced and computes the same.

torch.compile(f)(x)                          runs f as it was written
nn.TransformerEncoder(...)(x, mask=m)        never asks whether m is the causal mask: m itself says it
nn.MultiheadAttention(...).eval()(x, x, x)   is the attention it is in training, not one kernel for all of it
x = rotated(q)                               comes from the line inside of `rotated`, not from the one that calls it
self.a = self.b = block                      a module of two names is itself, under the first of them; torch.export
                                             would put a new object around it at every access
torch._check_tensor_all(ids < V)             assertions of values are no part of a program; those of shapes hold
F.grouped_mm(x, w, offs=ends)                has a shape in every dtype; torch's fake tensors know bf16's alone
with torch.inference_mode(): ...             is no_grad, as far as numbers go
f"{loss:.3f}", x.numpy()                     reads a value like .item()
torch.distributions.Normal(0, 1)             asserts nothing
self.head.to(torch.float32)                  of what has that dtype changes nothing
"""

import contextlib
import sys
from collections.abc import Iterator
from traceback import StackSummary
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import SymBool, SymInt, Tensor, nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer
from torch.nn.modules import transformer

from autosp_aot.export.reads import reads_values
from autosp_aot.export.user_code import users_frame

# Torch's assertions, and which argument the condition is.
ASSERTIONS = {"_check_with": 1, "_check_tensor_all_with": 1, "_check_is_size": 0, "_assert": 0}


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Forward may run while it holds."""
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    _ModuleStackTracer.enable_attr_proxy = property(lambda tracer: False, lambda tracer, wanted: None)
    _ModuleStackTracer._filter_traceback_frames = lambda tracer, frames: StackSummary.from_list(users_frame(frames))
    fake_impls.op_implementations_checks.append(GROUPED_MM)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), contextlib.ExitStack() as undo:
            for owner, name, value in _settled():
                undo.callback(setattr if name in vars(owner) else delattr, *_before(owner, name))
                setattr(owner, name, value)
            yield
    finally:
        fake_impls.op_implementations_checks.remove(GROUPED_MM)
        del _ModuleStackTracer.enable_attr_proxy, _ModuleStackTracer._filter_traceback_frames
        torch.backends.mha.set_fastpath_enabled(fast)
        transformer._detect_is_causal_mask = before


def _settled() -> Iterator[tuple[object, str, object]]:
    """What attributes are while forward runs."""
    yield from ((torch, name, _of_shapes(getattr(torch, name), at)) for name, at in ASSERTIONS.items())
    yield torch.inference_mode, "__enter__", _without_gradients
    yield torch.inference_mode, "__exit__", lambda region, *_: _entered[region].__exit__(None, None, None)
    yield FakeTensor, "__format__", _formatted
    yield FakeTensor, "numpy", _array
    yield FakeTensor, "__array__", _array
    yield Distribution, "_validate_args", False
    yield nn.Module, "to", _moved


def _before(owner: object, name: str) -> tuple:
    return (owner, name, vars(owner)[name]) if name in vars(owner) else (owner, name)


# What was done at the beginning of each region, which its end undoes.
_entered: WeakKeyDictionary[torch.inference_mode, torch.set_grad_enabled] = WeakKeyDictionary()


def _without_gradients(region: torch.inference_mode) -> None:
    _entered[region] = torch.set_grad_enabled(not region.mode)


def _formatted(tensor: Tensor, spec: str) -> str:
    return format(tensor.item(), spec) if tensor.dim() == 0 else object.__format__(tensor, spec)


def _array(tensor: Tensor, *_, **__) -> np.ndarray:
    return np.full(tuple(tensor.shape), tensor.reshape(-1)[0].item())


_to = nn.Module.to


def _moved(module: nn.Module, *args, **kwargs) -> nn.Module:
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    tensors = (*module.parameters(), *module.buffers())
    stay = (device in (None, t.device) and (dtype in (None, t.dtype) or not t.is_floating_point()) for t in tensors)
    return module if layout is None and all(stay) else _to(module, *args, **kwargs)


def _grouped_mm(mode, func, x: Tensor, weight: Tensor, offs: Tensor | None = None, bias=None, out_dtype=None):
    """Shapes of torch._meta_registrations._create_grouped_mm_output_tensor."""
    rows: tuple[int, ...] = x.shape[:-1]
    if x.dim() == weight.dim() == 2:
        assert offs is not None, "of matrices"
        rows = (offs.shape[0], *rows)
    elif x.dim() == 3 and weight.dim() == 2:
        rows = rows[1:]
    with mode:
        return torch.empty((*rows, weight.shape[-1]), dtype=out_dtype or x.dtype)


# How torch's fake tensors are told of an operator: whether it is this one, and what it makes.
GROUPED_MM = (lambda func: func is torch.ops.aten._grouped_mm.default, _grouped_mm)


def _of_shapes(check, at: int):
    """An assertion, whose condition is argument number `at`, that passes where the condition is one of values."""

    def checked(*args, **kwargs):
        condition = args[at]
        if not isinstance(condition, (Tensor, SymBool, SymInt)) and (condition or not reads_values(sys._getframe())):
            check(*args, **kwargs)

    return checked
