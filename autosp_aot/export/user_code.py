"""Lines of the user's code as `file.py:line`: where an exception was raised, a call is running, a function begins."""

import inspect
import os
import re
import sysconfig
import traceback
from types import FrameType

import torch

# What the user's own code may raise; anything else ends the program with its own traceback.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip

TORCH = os.path.dirname(torch.__file__) + os.sep
OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def raised_at(error: BaseException) -> str:
    """The innermost line outside of torch, Python and this package in an exception's traceback, or in its text."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{os.path.basename(error.filename)}:{error.lineno}"
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    return _innermost(frames) or _innermost(_FRAME.findall(str(error)))


def called_at() -> str:
    """The innermost such line of the code that is running now."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_stack()]
    return _innermost(frames)


def defined_at(function: object) -> str:
    """The line where a function or method begins; "" where it is not written in Python."""
    inner = inspect.unwrap(function) if callable(function) else function
    if inspect.ismethod(inner):
        inner = inner.__func__
    if not inspect.isfunction(inner):
        return ""
    return f"{os.path.basename(inner.__code__.co_filename)}:{inner.__code__.co_firstlineno}"


def is_users(frame: FrameType | None) -> bool:
    """True where a running frame belongs to the user's code or to a library other than torch."""
    return frame is not None and _users(frame.f_code.co_filename)


def said(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def _innermost(frames: list[tuple[str, int | str]]) -> str:
    users = [frame for frame in frames if _users(frame[0])]
    return f"{os.path.basename(users[-1][0])}:{users[-1][1]}" if users else ""


def _users(path: str) -> bool:
    if path.startswith((TORCH, OURS, "<")):
        return False
    return not path.startswith(STDLIB) or f"{os.sep}site-packages{os.sep}" in path
