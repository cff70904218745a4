"""Where a model can keep something between steps: attributes, what is in them, closures, and names of its own modules.

    blocks.0.steps          an attribute of a module
    blocks.0.history[2]     an element of a list
    blocks.0.scaled.count   what a function closes over
    model.py: STEPS         a global name of a file that has classes of the model
"""

import functools
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from autosp_aot.export.sharing import LARGEST
from autosp_aot.export.source import module_path
from autosp_aot.export.user_code import OURS, STDLIB, TORCH

PLAIN = (bool, int, float, str, type(None), Tensor)
# What torch keeps in modules: parameters and modules are seen elsewhere, the rest is no state of forward.
TORCHS = ("_parameters", "_modules", "_non_persistent_buffers_set", "training")


@dataclass(frozen=True)
class Slot:
    """A place with something in it: its path, and the namespace, sequence or cell that holds it."""

    path: str
    owner: object
    key: object

    @property
    def value(self):
        return self.owner.cell_contents if isinstance(self.owner, types.CellType) else self.owner[self.key]

    def put(self, value) -> None:
        if isinstance(self.owner, types.CellType):
            self.owner.cell_contents = value
        elif not isinstance(self.owner, tuple):
            self.owner[self.key] = value


def slots(model: nn.Module) -> Iterator[Slot]:
    """Every place that holds a number, text, flag, tensor, list or mapping; of a very large one nothing inside."""
    seen: set[int] = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        prefix = module_path(path)
        for name in [name for name in vars(module) if name not in TORCHS]:
            yield from _inside(Slot(f"{prefix}.{name}" if prefix else name, vars(module), name), seen)
    for file, namespace in _files(model).items():
        for name in [name for name in namespace if not name.startswith("__")]:
            if isinstance(namespace[name], (*PLAIN, list, dict)):
                yield from _inside(Slot(f"{file}: {name}", namespace, name), seen)


def _inside(slot: Slot, seen: set[int]) -> Iterator[Slot]:
    try:
        value = slot.value
    except ValueError:  # of a cell that nobody has filled
        return
    if isinstance(value, PLAIN):
        yield slot
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    path = slot.path
    if isinstance(value, (list, tuple, dict)):
        yield slot
        keys = range(len(value)) if isinstance(value, (list, tuple)) else list(value)
        for key in keys if len(keys) <= LARGEST else ():
            yield from _inside(Slot(f"{path}[{key!r}]", value, key), seen)
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            yield from _inside(Slot(f"{path}.{name}", cell, None), seen)
        yield from _namespace(path, vars(value), seen)
    elif isinstance(value, types.MethodType):
        yield from _inside(Slot(path, (value.__self__,), 0), seen)
    elif isinstance(value, functools.partial):
        yield from _inside(Slot(path, (value.func,), 0), seen)
        yield from _inside(Slot(path, (value.args,), 0), seen)
        yield from _inside(Slot(path, (value.keywords,), 0), seen)
    elif hasattr(value, "__dict__") and _is_users(sys.modules.get(type(value).__module__)):
        yield from _namespace(path, vars(value), seen)


def _namespace(path: str, names: dict, seen: set[int]) -> Iterator[Slot]:
    for name in list(names):
        yield from _inside(Slot(f"{path}.{name}", names, name), seen)


def _files(model: nn.Module) -> dict[str, dict]:
    """The global names of the user's own files that classes of the model come from."""
    modules = (sys.modules.get(type(module).__module__) for module in model.modules())
    own = dict.fromkeys(m for m in modules if _is_users(m) and f"{os.sep}site-packages{os.sep}" not in m.__file__)
    return {os.path.basename(module.__file__): vars(module) for module in own}


def _is_users(module: types.ModuleType | None) -> bool:
    path = getattr(module, "__file__", None) or ""
    library = f"{os.sep}site-packages{os.sep}" in path
    return bool(path) and not path.startswith((TORCH, OURS)) and (library or not path.startswith(STDLIB))
