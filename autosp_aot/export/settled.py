"""What torch would decide by itself while forward runs, decided so that forward can be traced and computes the same.

torch.compile(f)(x)                          runs f as it was written
nn.TransformerEncoder(...)(x, mask=m)        never asks whether m is the causal mask: m itself says it
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
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        transformer._detect_is_causal_mask = before
