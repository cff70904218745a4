"""Models without their weights: parameters are fake tensors, buffers stay real (their values go into the artifact)."""

import contextlib
import copy
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

# What copying raises of what cannot be copied: a lock or a file (TypeError), an extension's object that says so itself
# (NotImplementedError, RuntimeError), an object that computes its attributes and has none that copying asks for
# (AttributeError; LookupError where they are elements of a dict).
UNCOPYABLE = (TypeError, NotImplementedError, RuntimeError, AttributeError, LookupError)
# How copy.deepcopy copies what is of a kind.
WAYS: dict[type, Callable] = copy._deepcopy_dispatch  # type: ignore[attr-defined]  # typeshed leaves it out


class Weightless:
    """How many bytes the parameters of a model would have that is made of meta tensors."""

    nbytes = 0


@contextlib.contextmanager
def weightless() -> Iterator[Weightless]:
    """While it holds, every parameter registered on any module loses its storage at once: a model of any size is free.

    They are meta tensors, on which `.to(dtype)` and initialisation work; `fake_copy` makes them fit for capture. One
    parameter stays one, and what shares its memory goes on doing so.
    """
    register, made = nn.Module.register_parameter, WeakTensorKeyDictionary()
    storages: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
    counted = Weightless()

    def meta(parameter: nn.Parameter) -> nn.Parameter:
        real = parameter.untyped_storage()
        if real._cdata not in storages:  # which is of one storage alone while there is a weak reference to it
            storages[real._cdata] = StorageWeakRef(real), torch.UntypedStorage(real.nbytes(), device="meta")
            counted.nbytes += real.nbytes()
        empty = torch.empty(0, dtype=parameter.dtype, device="meta")
        empty.set_(storages[real._cdata][1], parameter.storage_offset(), parameter.size(), parameter.stride())
        return nn.Parameter(empty, parameter.requires_grad)

    def register_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in made:
                made[parameter] = meta(parameter)
            parameter = made[parameter]
        register(self, name, parameter)

    with _registering(register_meta):
        yield counted


class TooLarge(Exception):
    """A model's parameters take more than they may."""


@contextlib.contextmanager
def at_most(nbytes: int) -> Iterator[None]:
    """While it holds, registering parameters that together take more than `nbytes` raises TooLarge."""
    register, left = nn.Module.register_parameter, nbytes
    counted = WeakTensorKeyDictionary()

    def register_counted(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is not None and parameter not in counted:
            counted[parameter], left = True, left - parameter.nbytes
        if left < 0:
            raise TooLarge
        register(self, name, parameter)

    with _registering(register_counted):
        yield


@contextlib.contextmanager
def _registering(way: Callable[[nn.Module, str, nn.Parameter | None], None]) -> Iterator[None]:
    """While it holds, parameters are registered so on any module."""
    before = nn.Module.register_parameter
    setattr(nn.Module, "register_parameter", way)
    try:
        yield
    finally:
        setattr(nn.Module, "register_parameter", before)


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy with fake CPU parameters, tied ones still tied; the module itself is left alone.

    Functions that the module holds are copied with what they close over, so that they see the copy; so are weak
    references to its parts.

    Never capture meta tensors themselves: their losses have no gradient kernel and silently yield zeros.
    """
    memo = {id(parameter): _fake(parameter, mode) for parameter in module.parameters()}
    parts = {id(part) for part in module.modules()}
    copied = COPIED | {weakref.ref: functools.partial(_reference, parts)}
    before = {kind: WAYS.get(kind) for kind in copied}
    WAYS.update(copied)
    try:
        return copy.deepcopy(module, dict(memo))
    except UNCOPYABLE:  # a lock or a generator: copy and model share it
        values = {id(value): value for part in module.modules() for value in vars(part).values()}
        shared = {name: value for name, value in values.items() if _copied(value, dict(memo)) is value}
        return copy.deepcopy(module, shared | memo)
    finally:
        for kind, way in before.items():
            WAYS.pop(kind) if way is None else WAYS.update({kind: way})


def _fake(parameter: nn.Parameter, mode: FakeTensorMode) -> nn.Parameter:
    meta = torch.empty_like(parameter, device="meta", requires_grad=False)
    made = nn.Parameter(FakeTensor(mode, meta, torch.device("cpu")), requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def _function(function: types.FunctionType, memo: dict) -> types.FunctionType:
    """A function over copies of what it closes over, of its defaults and attributes; itself where no copy is another.

    So code that asks which function it has been given finds the same one, but where the model is inside of it.
    """
    cells = function.__closure__ or ()
    if not (cells or function.__defaults__ or function.__kwdefaults__ or vars(function)) or _is_global(function):
        return function
    tried = dict(memo)
    mine = tuple(tried.setdefault(id(cell), types.CellType()) for cell in cells)
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, mine or None)
    tried[id(function)] = made
    changed = [_fill(cell, original, tried) for cell, original in zip(mine, cells)]
    for name in ("__defaults__", "__kwdefaults__"):
        held = getattr(function, name)
        setattr(made, name, _copied(held, tried))
        changed.append(_differs(getattr(made, name), held))
    for name, held in vars(function).items():
        vars(made)[name] = _copied(held, tried)
        changed.append(vars(made)[name] is not held)
    if not any(changed):
        return function
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    _keep(tried, memo)
    return made


def _is_global(function: types.FunctionType) -> bool:
    """Whether its module has it under its name, as code anywhere may ask for it."""
    found = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _fill(cell: types.CellType, original: types.CellType, memo: dict) -> bool:
    """Put a copy of what one cell holds into another, where it is empty; whether that is something else."""
    try:
        if _holds(cell):
            return cell.cell_contents is not original.cell_contents
        cell.cell_contents = _copied(original.cell_contents, memo)
    except ValueError:  # nobody has filled it yet
        return False
    return cell.cell_contents is not original.cell_contents


def _holds(cell: types.CellType) -> bool:
    try:
        cell.cell_contents
    except ValueError:
        return False
    return True


def _differs(made, original) -> bool:
    values = lambda held: list(held.values() if isinstance(held, dict) else held or ())  # noqa: E731
    return any(a is not b for a, b in zip(values(made), values(original)))


def _copied(value, memo: dict):
    """A copy; what cannot be copied (a lock, an open file, a Python module) is shared."""
    tried = dict(memo)
    try:
        found = copy.deepcopy(value, tried)
    except UNCOPYABLE:
        return value
    _keep(tried, memo)
    return found


def _keep(tried: dict, memo: dict) -> None:
    """Take over what was copied, and what deepcopy keeps alive under the id of its memo, which is another's soon."""
    memo.setdefault(id(memo), []).append(tried.pop(id(tried), None))
    memo.update(tried)


def _cached(function, memo: dict):
    inner = _copied(function.__wrapped__, memo)
    if inner is function.__wrapped__:
        return function
    memo[id(function)] = functools.lru_cache(**function.cache_parameters())(inner)
    return memo[id(function)]


def _reference(parts: set[int], reference: weakref.ref, memo: dict) -> weakref.ref:
    """A weak reference to the copy of what is one of these parts; else itself."""
    part = reference()
    return weakref.ref(copy.deepcopy(part, memo)) if id(part) in parts else reference


# What copy.deepcopy takes for atoms.
COPIED = {types.FunctionType: _function, type(functools.lru_cache(lambda: None)): _cached}
