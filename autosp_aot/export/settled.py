"""What torch would decide by itself while forward runs, decided so that forward can be traced and computes the same.

torch.compile(f)(x)                          runs f as it was written
nn.TransformerEncoder(...)(x, mask=m)        never asks whether m is the causal mask: m itself says it
nn.MultiheadAttention(...).eval()(x, x, x)   is the attention it is in training, not one kernel for all of it
x = rotated(q)                               comes from the line inside of `rotated`, not from the one that calls it
self.a = self.b = block                      a module of two names is itself, under the first of them; torch.export
                                             would put a new object around it at every access
torch._check_tensor_all(ids < V)             assertions of values are no part of a program; those of shapes hold
F.grouped_mm(x, w, offs=ends)                has a shape in every dtype; torch's fake tensors know bf16's alone
"""

import contextlib
import sys
from collections.abc import Iterator
from traceback import StackSummary

import torch
from torch import SymBool, SymInt, Tensor
from torch._subclasses import fake_impls
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
    asserts = {name: getattr(torch, name) for name in ASSERTIONS}
    for name, at in ASSERTIONS.items():
        setattr(torch, name, _of_shapes(asserts[name], at))
    fake_impls.op_implementations_checks.append(GROUPED_MM)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        fake_impls.op_implementations_checks.remove(GROUPED_MM)
        for name, function in asserts.items():
            setattr(torch, name, function)
        del _ModuleStackTracer.enable_attr_proxy, _ModuleStackTracer._filter_traceback_frames
        torch.backends.mha.set_fastpath_enabled(fast)
        transformer._detect_is_causal_mask = before


def _grouped_mm(mode, func, x: Tensor, weight: Tensor, offs: Tensor | None = None, bias=None, out_dtype=None):
    """Shapes of torch._meta_registrations._create_grouped_mm_output_tensor."""
    rows, columns = x.shape[:-1], weight.shape[-1:]
    if x.dim() == weight.dim() == 2:
        rows = (offs.shape[0], *rows)
    elif x.dim() == 3 and weight.dim() == 2:
        rows = rows[1:]
    with mode:
        return torch.empty((*rows, *columns), dtype=out_dtype or x.dtype)


# How torch's fake tensors are told of an operator: whether it is this one, and what it makes.
GROUPED_MM = (lambda func: func is torch.ops.aten._grouped_mm.default, _grouped_mm)


def _of_shapes(check, at: int):
    """An assertion, whose condition is argument number `at`, that passes where the condition is one of values."""

    def checked(*args, **kwargs):
        condition = args[at]
        if not isinstance(condition, (Tensor, SymBool, SymInt)) and (condition or not reads_values(sys._getframe())):
            check(*args, **kwargs)

    return checked
