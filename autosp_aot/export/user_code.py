"""Lines of the user's code as `file.py:line`: where an exception was raised, a call is running, something changes.

The user's code is what runs inside of this package and is not torch's or Python's: libraries such as transformers
count. Who called this package does not.
"""

import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from traceback import FrameSummary, StackSummary
from types import FrameType, TracebackType

import torch
from torch import nn

# What the user's own code may raise; anything else ends the program with its own traceback.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip

TORCH = os.path.dirname(torch.__file__) + os.sep
OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def raised_at(error: BaseException, inside: str = "") -> str:
    """The innermost of the user's lines in an exception's traceback, or in its text; "" where there is none.

    `inside` is a line of the one file to look in.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{os.path.basename(error.filename)}:{error.lineno}"
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(path, line) for path, line in frames if os.path.basename(path) == inside.partition(":")[0]]
    return innermost(own) or innermost(frames) or innermost(_FRAME.findall(str(error)))


def users_traceback(error: BaseException) -> TracebackType | None:
    """The innermost entry of the user's in an exception's traceback."""
    found, entry = None, error.__traceback__
    while entry is not None:
        found = entry if is_users(entry.tb_frame) else found
        entry = entry.tb_next
    return found


def called_at() -> str:
    """The innermost of the user's lines of the code that is running now."""
    return innermost([(frame.filename, frame.lineno) for frame in traceback.extract_stack()])


def traced_at(stack_trace: str) -> str:
    """The innermost of the user's lines in the text of a stack."""
    return innermost(_FRAME.findall(stack_trace))


def defined_at(function: object) -> str:
    """The line where a function or method begins; "" where it is not written in Python."""
    inner = inspect.unwrap(function) if callable(function) else function
    if inspect.ismethod(inner):
        inner = inner.__func__
    if not inspect.isfunction(inner):
        return ""
    return f"{os.path.basename(inner.__code__.co_filename)}:{inner.__code__.co_firstlineno}"


def made_at(model: nn.Module, name: str = "") -> str:
    """The line where the class begins to make the innermost of the user's modules that `name` is in."""
    owners = [model]
    for part in name.split("."):
        if (inner := owners[-1]._modules.get(part)) is None:
            break
        owners.append(inner)
    makers = [inspect.unwrap(type(owner).__init__) for owner in reversed(owners)]
    places = (defined_at(make) for make in makers if hasattr(make, "__code__") and _users(make.__code__.co_filename))
    place = next(places, "")
    return f"{place} (build_model)" if place else "build_model"


def changed_at(run: Callable[[], object], state: Callable[[], object]) -> str:
    """The first of the user's lines that leaves `state()` other than it found it while `run()` runs; "" for none."""
    lines: list[str] = []
    found, last = "", state()

    def look() -> None:
        nonlocal found, last
        now = state()
        if now != last and lines and lines[-1]:
            found, last = found or lines[-1], now

    def trace(frame: FrameType, event: str, arg):
        if event == "call":
            if not is_users(frame):
                return None
            look()
            lines.append("")
            return trace
        look()
        if event == "line":
            lines[-1] = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        elif event == "return":
            lines.pop()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return found


def is_users(frame: FrameType | None) -> bool:
    """True where a running frame belongs to the user's code."""
    return frame is not None and _users(frame.f_code.co_filename)


def frames_of_users(frame: FrameType | None) -> Iterator[FrameType]:
    """The user's frames among those of a running call, the innermost first, up to this package's."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    ours = max((at for at, f in enumerate(frames) if f.f_code.co_filename.startswith(OURS)), default=len(frames))
    return (f for f in frames[:ours] if is_users(f))


def said(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def innermost(frames: Iterable[tuple[str, int | str | None]]) -> str:
    """The last of the user's frames, given the outermost first as (path, line)."""
    frames = list(frames)
    at = _innermost([path for path, _ in frames])
    return f"{os.path.basename(frames[at][0])}:{frames[at][1]}" if at >= 0 else ""


def users_frame(stack: StackSummary) -> list[FrameSummary]:
    """The innermost of the user's frames of a stack; nothing where there is none."""
    at = _innermost([frame.filename for frame in stack])
    return [stack[at]] if at >= 0 else []


def _innermost(paths: Sequence[str]) -> int:
    """Which is the last of the user's paths, given the outermost first; -1 for none."""
    ours = next((at for at, path in enumerate(paths) if path.startswith(OURS)), -1)
    return next((at for at in range(len(paths) - 1, ours, -1) if _users(paths[at])), -1)


def _users(path: str) -> bool:
    if path.startswith((TORCH, OURS, "<")):
        return False
    return not path.startswith(STDLIB) or f"{os.sep}site-packages{os.sep}" in path
