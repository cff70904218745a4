"""What forward is told of being compiled while it is captured: that it is not, as in eager.

    torch.compiler.is_compiling()      False for whoever asks, but for torch itself, whose tracing relies on the answer

The functions get other code while it holds, so that names imported from torch before answer alike.
"""

import contextlib
import functools
import sys
import types
from collections.abc import Iterator

import torch
import torch._dynamo.external_utils
import torch.fx._symbolic_trace

from autosp_aot.export.user_code import TORCH

ASKED = (
    torch.compiler.is_compiling, torch.compiler.is_exporting, torch._utils.is_compiling,
    torch._dynamo.external_utils.is_compiling, torch.fx._symbolic_trace.is_fx_tracing,
    torch.fx._symbolic_trace.is_fx_symbolic_tracing,
)  # fmt: skip


@contextlib.contextmanager
def eager_flags() -> Iterator[None]:
    """While it holds, code that is not torch's finds that nothing is being compiled, exported or traced."""
    codes = [function.__code__ for function in ASKED]
    for function, code in zip(ASKED, codes):
        answer = functools.partial(_answer, types.FunctionType(code, function.__globals__))
        constants = tuple(answer if value == "answer" else value for value in _asking.__code__.co_consts)
        function.__code__ = _asking.__code__.replace(co_consts=constants)
    try:
        yield
    finally:
        for function, code in zip(ASKED, codes):
            function.__code__ = code


def _asking() -> bool:
    # Runs among the globals of one of torch's modules: what it needs is among its constants.
    answer = "answer"
    return answer()


def _answer(torchs: types.FunctionType) -> bool:
    """What torch's function says, where it is torch that asks, be it through another of these functions."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name == _asking.__name__:
        frame = frame.f_back
    return torchs() if frame is not None and frame.f_code.co_filename.startswith(TORCH) else False
