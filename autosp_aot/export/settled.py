"""What torch would decide by itself while forward runs, decided so that forward can be traced and computes the same.

torch.compile(f)(x)                          runs f as it was written
nn.TransformerEncoder(...)(x, mask=m)        never asks whether m is the causal mask: m itself says it
nn.MultiheadAttention(...).eval()(x, x, x)   is the attention it is in training, not one kernel for all of it
self.a = self.b = block                      a module of two names is itself, under the first of them; torch.export
                                             would put a new object around it at every access
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer
from torch.nn.modules import transformer


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Forward may run while it holds."""
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    _ModuleStackTracer.enable_attr_proxy = property(lambda tracer: False, lambda tracer, wanted: None)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        del _ModuleStackTracer.enable_attr_proxy
        torch.backends.mha.set_fastpath_enabled(fast)
        transformer._detect_is_causal_mask = before
