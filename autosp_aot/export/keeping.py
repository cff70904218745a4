"""Where a model can keep something between steps: attributes, what is in them, closures, and names of its own modules.

    blocks.0.steps          an attribute of a module
    blocks.0.history[2]     an element of a list
    blocks.0.scaled.count   what a function closes over
    model.py: STEPS         a global name of a file that has classes of the model
"""

import contextlib
import copy
import functools
import os
import random
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from autosp_aot.export.source import module_path
from autosp_aot.export.user_code import OURS, STDLIB, TORCH

# Of containers that are looked into; tables of a tokenizer hold no state.
LARGEST = 1000
PLAIN = (bool, int, float, str, type(None), Tensor)
# What torch keeps in modules: tensors and modules have names of their own, the rest is no state of forward.
TORCHS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")


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
    """Every place of a model that holds a number, text, flag, tensor, list or mapping; nothing inside of large ones.

    Parameters and buffers are left out.
    """
    seen: set[int] = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        prefix = module_path(path)
        for name in [name for name in vars(module) if name not in TORCHS]:
            yield from _inside(Slot(f"{prefix}.{name}" if prefix else name, vars(module), name), seen)


def buffer_slots(model: nn.Module) -> Iterator[Slot]:
    """The places of buffers."""
    for path, module in model.named_modules():
        yield from (Slot(f"{path}.{name}", module._buffers, name) for name in module._buffers)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors among them, by path; parameters themselves, which a list may hold as well, are left out."""
    parameters = {id(parameter) for parameter in model.parameters()}
    for slot in slots(model):
        if isinstance(slot.value, Tensor) and id(slot.value) not in parameters:
            yield slot.path, slot.value


def global_slots(model: nn.Module) -> Iterator[Slot]:
    """The same of the attributes of the user's classes of the model, and of global names of their files."""
    seen: set[int] = {id(module) for module in model.modules()}
    for path, namespace in _namespaces(model).items():
        for name in [name for name in namespace if not name.startswith("__")]:
            if isinstance(namespace[name], (*PLAIN, list, dict)):
                yield from _inside(Slot(f"{path}{name}", namespace, name), seen)


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


def random_states() -> dict[str, tuple]:
    """The states of random modules that are not torch's."""
    kind, keys, *more = np.random.get_state()
    return {"Python's": random.getstate(), "numpy's": (kind, keys.tobytes(), *more)}


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """When it ends, what forward changed outside of the model is as before: global names, and random modules."""
    python, numpy = random.getstate(), np.random.get_state()
    before = [(slot, slot.value) for slot in global_slots(model)]
    held = [copy.copy(value) if isinstance(value, (list, dict)) else None for _, value in before]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for (slot, value), contents in zip(before, held):
            if slot.value is not value:
                slot.put(value)
            if isinstance(value, list):
                value[:] = contents
            elif isinstance(value, dict):
                value.clear()
                value.update(contents)


class _Attributes(Mapping):
    """The attributes of a class, which a class lets nobody set but itself."""

    def __init__(self, kind: type):
        self.kind = kind

    def __getitem__(self, name: str):
        return vars(self.kind)[name]

    def __setitem__(self, name: str, value) -> None:
        setattr(self.kind, name, value)

    def __iter__(self) -> Iterator[str]:
        return iter(list(vars(self.kind)))

    def __len__(self) -> int:
        return len(vars(self.kind))


def _namespaces(model: nn.Module) -> dict[str, Mapping]:
    """The user's classes of a model and the files they come from, by what their names begin with."""
    found: dict[str, Mapping] = {}
    for kind in dict.fromkeys(kind for module in model.modules() for kind in type(module).__mro__):
        module = sys.modules.get(kind.__module__)
        if _is_users(module) and f"{os.sep}site-packages{os.sep}" not in module.__file__:
            found[f"{kind.__qualname__}."] = _Attributes(kind)
            found[f"{os.path.basename(module.__file__)}: "] = vars(module)
    return found


def _is_users(module: types.ModuleType | None) -> bool:
    path = getattr(module, "__file__", None) or ""
    library = f"{os.sep}site-packages{os.sep}" in path
    return bool(path) and not path.startswith((TORCH, OURS)) and (library or not path.startswith(STDLIB))
