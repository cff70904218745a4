"""What torch would decide by itself while forward runs, decided so that forward can be traced and computes the same.

torch.compile(f)(x)                          runs f as it was written
nn.TransformerEncoder(...)(x, mask=m)        never asks whether m is the causal mask: m itself says it
nn.MultiheadAttention(...).eval()(x, x, x)   is the attention it is in training, not one kernel for all of it
self.a = self.b = block                      a module of two names is itself, under the first of them; torch.export
                                             would put a new object around it at every access
torch._check_tensor_all(ids < V)             assertions of values are no part of a program; those of shapes hold
"""

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import SymBool, SymInt, Tensor
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer
from torch.nn.modules import transformer

from autosp_aot.export.reads import reads_values


# Torch's assertions, and which argument the condition is.
ASSERTIONS = {"_check_with": 1, "_check_tensor_all_with": 1, "_check_is_size": 0, "_assert": 0}


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Forward may run while it holds."""
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    _ModuleStackTracer.enable_attr_proxy = property(lambda tracer: False, lambda tracer, wanted: None)
    asserts = {name: getattr(torch, name) for name in ASSERTIONS}
    for name, at in ASSERTIONS.items():
        setattr(torch, name, _of_shapes(asserts[name], at))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for name, function in asserts.items():
            setattr(torch, name, function)
        del _ModuleStackTracer.enable_attr_proxy
        torch.backends.mha.set_fastpath_enabled(fast)
        transformer._detect_is_causal_mask = before


def _of_shapes(check, at: int):
    """An assertion, whose condition is argument number `at`, that passes where the condition is one of values."""

    def checked(*args, **kwargs):
        condition = args[at]
        if not isinstance(condition, (Tensor, SymBool, SymInt)) and (condition or not reads_values(sys._getframe())):
            check(*args, **kwargs)

    return checked
