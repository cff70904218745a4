"""Where a model can keep something between steps: attributes, what is in them, closures, and names of its own modules.

    blocks.0.steps          an attribute of a module
    blocks.0.history[2]     an element of a list
    blocks.0.scaled.count   what a function closes over
    Block.steps             an attribute of a class of the model's
    model.py: STEPS         a global name of a file that has classes of the model, or of one that it imports
"""

import contextlib
import functools
import os
import random
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autosp_aot.export.kept import CONTAINERS, LARGEST, is_leaf, keeper
from autosp_aot.export.source import module_path
from autosp_aot.export.user_code import OURS, STDLIB, TORCH

# Of packages whose objects are not: what they keep is no state of forward, or is found as the module's own.
CLOSED = ("torch._", "torch.nn", "torch.fx", "torch.distributed", "torch.utils", "logging", "threading", "importlib")
# What torch keeps in modules: tensors and modules have names of their own, the rest is no state of forward.
TORCHS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")


@dataclass(frozen=True)
class Slot:
    """A place with something in it: its path, and the namespace, sequence, object or cell that holds it.

    `slotted` is one of an object's __slots__: what is a list or a dict may have attributes too.
    """

    path: str
    owner: Any
    key: Any
    slotted: bool = False

    @property
    def value(self):
        if isinstance(self.owner, types.CellType):
            return self.owner.cell_contents
        if isinstance(self.owner, type):
            return vars(self.owner)[self.key]
        return getattr(self.owner, self.key) if self.slotted else self.owner[self.key]

    def put(self, value) -> None:
        if isinstance(self.owner, types.CellType):
            self.owner.cell_contents = value
        elif self.slotted or isinstance(self.owner, type):
            setattr(self.owner, self.key, value)
        elif not isinstance(self.owner, tuple):
            self.owner[self.key] = value


def slots(model: nn.Module) -> Iterator[Slot]:
    """Every place of a model with a number, text, tensor, container or the like; nothing inside of large containers.

    Parameters and buffers are left out.
    """
    seen: set[int] = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        prefix = module_path(path)
        for tensor_name, parameter in module._parameters.items():
            for slot in _attributes(f"{prefix}.{tensor_name}" if prefix else tensor_name, parameter):
                yield from _inside(slot, seen)
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


def arrays_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The arrays of numpy's among them, as tensors of the same memory."""
    for slot in slots(model):
        if isinstance(slot.value, np.ndarray) and slot.value.dtype.kind in "fiub" and slot.value.flags.writeable:
            yield slot.path, torch.from_numpy(slot.value)


def global_slots(model: nn.Module) -> Iterator[Slot]:
    """The same of the user's classes of the model, and of global names of their files and of those they import."""
    seen: set[int] = {id(module) for module in model.modules()}
    for kind in _own_kinds(model):
        yield from _inside(Slot(kind.__qualname__, (kind,), 0), seen)
    for file in own_files(model):
        for name in [name for name in vars(file) if not name.startswith("__")]:
            yield from _inside(Slot(f"{os.path.basename(_path(file))}: {name}", vars(file), name), seen)


def own_files(model: nn.Module) -> list[types.ModuleType]:
    """The user's files that the model's classes are from, and those that they have imported, be it in a function."""
    files = {kind.__module__: sys.modules[kind.__module__] for kind in _own_kinds(model)}
    for file in (todo := list(files.values())):
        modules = (sys.modules.get(getattr(value, "__module__", "")) for value in list(vars(file).values()))
        named = (sys.modules.get(name) for code in codes_of(file) for name in code.co_names)
        imported = [value for value in vars(file).values() if isinstance(value, types.ModuleType)]
        for home in (*imported, *modules, *named):
            if home is not None and _is_own(home) and home.__name__ not in files:
                todo.append(files.setdefault(home.__name__, home))
    return todo


def codes_of(*namespaces: types.ModuleType | type) -> Iterator[types.CodeType]:
    """The code of the functions of modules and classes, and of those inside of them."""
    held = [value for namespace in namespaces for value in vars(namespace).values()]
    held += [inner for value in held if isinstance(value, type) for inner in vars(value).values()]
    todo = [function.__code__ for value in held for function in _functions(value)]
    while todo:
        code = todo.pop()
        yield code
        todo += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]


def _functions(value) -> Iterator[types.FunctionType]:
    """A function, that of a property, or what is around one; and what it is around."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, functools._lru_cache_wrapper):
        value = value.__wrapped__
    while isinstance(value, types.FunctionType):
        yield value
        value = vars(value).get("__wrapped__")


def _own_kinds(model: nn.Module) -> list[type]:
    return [kind for kind in dict.fromkeys(chain(*(type(m).__mro__ for m in model.modules()))) if _is_own(kind)]


def caches(model: nn.Module) -> list[functools._lru_cache_wrapper]:
    """The functions of those files that keep what they have computed."""
    held = {id(value): value for file in own_files(model) for value in vars(file).values()}
    return [value for value in held.values() if isinstance(value, functools._lru_cache_wrapper)]


def _inside(slot: Slot, seen: set[int]) -> Iterator[Slot]:
    try:
        value, path = slot.value, slot.path
    except (ValueError, AttributeError):  # of a cell that nobody has filled, or a slot of an object
        return
    if is_leaf(value):
        yield slot
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, CONTAINERS):
        yield slot
        yield from chain.from_iterable(_inside(inner, seen) for inner in _attributes(path, value))
        keys = () if isinstance(value, (set, frozenset)) else value if isinstance(value, dict) else range(len(value))
        inner = [Slot(f"{path}[{key!r}]", value, key) for key in keys] if len(keys) <= LARGEST else []
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or ())
        inner = [Slot(f"{path}.{name}", cell, None) for name, cell in cells] + _attributes(path, value)
        inner += [Slot(path, (held,), 0) for held in (value.__defaults__, value.__kwdefaults__) if held]
    elif isinstance(value, types.MethodType):
        inner = [Slot(path, (value.__self__,), 0)]
    elif isinstance(value, functools.partial):
        inner = [Slot(path, (held,), 0) for held in (value.func, value.args, value.keywords)]
    elif isinstance(value, (staticmethod, classmethod)):
        inner = [Slot(path, (value.__func__,), 0)]
    elif isinstance(value, property):
        inner = [Slot(path, (function,), 0) for function in (value.fget, value.fset) if function]
    elif isinstance(value, type):
        inner = _attributes(path, value) if _is_own(value) else []
    elif not type(value).__module__.startswith(CLOSED) and not isinstance(value, types.ModuleType):
        inner = _attributes(path, value)
    else:
        inner = []
    yield from chain.from_iterable(_inside(slot, seen) for slot in inner)


def _attributes(path: str, owner: object) -> list[Slot]:
    """The attributes of an object, in its namespace and in its __slots__."""
    names = [name for name in getattr(owner, "__dict__", ()) if not name.startswith("__")]
    slotted = [name for kind in type(owner).__mro__ for name in _slotted(kind)]
    namespace = owner if isinstance(owner, type) else vars(owner) if names else {}
    return [Slot(f"{path}.{name}", namespace, name) for name in names] + [
        Slot(f"{path}.{name}", owner, name, slotted=True) for name in slotted
    ]


def _slotted(kind: type) -> list[str]:
    """The attributes that a class has in its __slots__, as they are named in its objects."""
    names = vars(kind).get("__slots__", ())
    private = lambda name: name.startswith("__") and not name.endswith("__")  # noqa: E731
    names = (names,) if isinstance(names, str) else names
    return [f"_{kind.__name__.lstrip('_')}{name}" if private(name) else name
            for name in names if name not in ("__dict__", "__weakref__")]  # fmt: skip


def random_states() -> dict[str, object]:
    """The states of random modules that are not torch's."""
    numpy = np.random.get_state()
    of_numpy = (numpy[0], numpy[1].tobytes(), *numpy[2:]) if isinstance(numpy, tuple) else repr(numpy)
    return {"Python's": random.getstate(), "numpy's": of_numpy}


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """When it ends, what forward keeps in the model or outside of it is as before, and so are random modules."""
    python, numpy = random.getstate(), np.random.get_state()
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    before = [(slot, slot.value, keeper(slot.value)) for slot in chain(slots(model), global_slots(model))]
    computed = [(cache, cache.cache_info().misses) for cache in caches(model)]
    try:
        yield
    finally:
        for cache, misses in computed:  # of tensors without values, perhaps
            if cache.cache_info().misses != misses:
                cache.cache_clear()
        random.setstate(python)
        np.random.set_state(numpy)
        for held, names in attributes:
            held.clear()
            held.update(names)
        for slot, value, restore in before:
            restore()
            if slot.value is not value:
                slot.put(value)


def _is_own(owner: type | types.ModuleType | None) -> bool:
    """Whether a module, or the one of a class, is a file of the user's own: of no installed package."""
    module = sys.modules.get(owner.__module__) if isinstance(owner, type) else owner
    return _is_users(module) and f"{os.sep}site-packages{os.sep}" not in _path(module)


def _is_users(module: types.ModuleType | None) -> bool:
    path = _path(module)
    library = f"{os.sep}site-packages{os.sep}" in path
    return bool(path) and not path.startswith((TORCH, OURS)) and (library or not path.startswith(STDLIB))


def _path(module: types.ModuleType | None) -> str:
    return getattr(module, "__file__", None) or ""
