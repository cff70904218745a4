"""Functions of torch's that do something else while forward runs, under every name they are known by.

    reverse = Reverse.apply             bound before anything is captured
    from torch.compiler import is_compiling

A function's code is replaced, not the attribute it is found under.
"""

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def replaced_code(replacements: Mapping[Callable, Callable]) -> Iterator[None]:
    """While it holds, calling a function calls its replacement, which gets the function as it was as first argument."""
    codes = {function: function.__code__ for function in replacements}
    for function, replacement in replacements.items():
        function.__code__ = _calling(function, replacement)
    try:
        yield
    finally:
        for function, code in codes.items():
            function.__code__ = code


def caller() -> types.FrameType | None:
    """The frame that has called what is replaced, be it through another function that is."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__replaced__":
        frame = frame.f_back
    return frame


def _calling(function: Callable, replacement: Callable) -> types.CodeType:
    """Code for `function` that calls its replacement, over as many closed-over names (one: the class, for super())."""
    before = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    before.__kwdefaults__ = function.__kwdefaults__
    code = _of_none if not function.__closure__ else _of_one(None)
    # It runs among the globals of one of torch's modules: what it needs is among its constants.
    constants = (functools.partial(replacement, before) if value == "replacement" else value
                 for value in code.__code__.co_consts)  # fmt: skip
    return code.__code__.replace(co_consts=tuple(constants), co_name="__replaced__")


def _of_none(*args, **kwargs):
    replacement: Any = "replacement"
    return replacement(*args, **kwargs)


def _of_one(cell):
    def call(*args, **kwargs):
        cell
        replacement: Any = "replacement"
        return replacement(*args, **kwargs)

    return call
