"""autosp-aot: sequence parallelism compiled ahead of time, on the whole training step, exactly."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "build": "autosp_aot.commands.build.builder",
    "initialize": "autosp_aot.training.deepspeed.engine",
    "load": "autosp_aot.runtime.load",
}


def __getattr__(name: str):
    """Import torch only when something that needs it is asked for: `autosp-aot --help` stays fast."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'autosp_aot' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
