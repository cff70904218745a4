"""autosp-aot: sequence parallelism compiled ahead of time, on the whole training step, exactly."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what _PUBLIC says, for tools that read and do not run
    from autosp_aot.commands.build.builder import build
    from autosp_aot.runtime.load import load
    from autosp_aot.training.deepspeed.engine import initialize

__version__ = "0.1.0"
__all__ = ["build", "initialize", "load"]

_PUBLIC = {
    "build": "autosp_aot.commands.build.builder",
    "initialize": "autosp_aot.training.deepspeed.engine",
    "load": "autosp_aot.runtime.load",
}


def __getattr__(name: str) -> object:
    """Import torch only when something that needs it is asked for: `autosp-aot --help` stays fast."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'autosp_aot' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
