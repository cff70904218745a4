"""What forward is told of being compiled while it is captured: that it is not, as in eager.

    torch.compiler.is_compiling()      False for whoever asks, but for torch itself, whose tracing relies on the answer
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch._dynamo.external_utils
import torch.fx._symbolic_trace

from autosp_aot.export.replaced import caller, replaced_code
from autosp_aot.export.user_code import TORCH

ASKED = (
    torch.compiler.is_compiling, torch.compiler.is_exporting, torch._utils.is_compiling,
    torch._dynamo.external_utils.is_compiling, torch.fx._symbolic_trace.is_fx_tracing,
    torch.fx._symbolic_trace.is_fx_symbolic_tracing,
)  # fmt: skip


@contextlib.contextmanager
def eager_flags() -> Iterator[None]:
    """While it holds, code that is not torch's finds that nothing is being compiled, exported or traced."""
    with replaced_code(dict.fromkeys(ASKED, _answer)):
        yield


def _answer(torchs: Callable[[], bool]) -> bool:
    """What torch's function says, where it is torch that asks, be it through another of these functions."""
    frame = caller()
    return torchs() if frame is not None and frame.f_code.co_filename.startswith(TORCH) else False
