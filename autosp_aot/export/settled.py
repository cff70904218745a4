"""What torch would decide by itself while forward runs, decided so that forward can be traced and computes the same.

torch.compile(f)(x)                          runs f as it was written
nn.TransformerEncoder(...)(x, mask=m)        never asks whether m is the causal mask: m itself says it
nn.MultiheadAttention(...).eval()(x, x, x)   is the attention it is in training, not one kernel for all of it
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.modules import transformer


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Forward may run while it holds."""
    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        transformer._detect_is_causal_mask = before
