"""Models without their weights: parameters are fake tensors, buffers stay real (their values go into the artifact)."""

import contextlib
import copy
import functools
import types
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary


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

    nn.Module.register_parameter = register_meta
    try:
        yield counted
    finally:
        nn.Module.register_parameter = register


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

    nn.Module.register_parameter = register_counted
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy with fake CPU parameters, tied ones still tied; the module itself is left alone.

    Functions that the module holds are copied with what they close over, so that they see the copy.

    Never capture meta tensors themselves: their losses have no gradient kernel and yield zeros without a word.
    """
    memo = {id(parameter): _fake(parameter, mode) for parameter in module.parameters()}
    before = {kind: copy._deepcopy_dispatch.get(kind) for kind in COPIED}
    copy._deepcopy_dispatch.update(COPIED)
    try:
        return copy.deepcopy(module, memo)
    finally:
        for kind, copied in before.items():
            copy._deepcopy_dispatch.pop(kind) if copied is None else copy._deepcopy_dispatch.update({kind: copied})


def _fake(parameter: nn.Parameter, mode: FakeTensorMode) -> nn.Parameter:
    meta = torch.empty_like(parameter, device="meta", requires_grad=False)
    return nn.Parameter(FakeTensor(mode, meta, torch.device("cpu")), requires_grad=parameter.requires_grad)


def _function(function: types.FunctionType, memo: dict) -> types.FunctionType:
    """A function over copies of what it closes over, of its defaults and attributes; one without any is itself."""
    if not (function.__closure__ or function.__defaults__ or function.__kwdefaults__ or vars(function)):
        return function
    cells = tuple(_cell(cell, memo) for cell in function.__closure__ or ())
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    memo[id(function)] = made
    for cell, original in zip(cells, function.__closure__ or ()):
        _fill(cell, original, memo)
    made.__defaults__, made.__kwdefaults__ = _copied((function.__defaults__, function.__kwdefaults__), memo)
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    vars(made).update(_copied(vars(function), memo))
    return made


def _cell(cell: types.CellType, memo: dict) -> types.CellType:
    """The copy of a cell, one for all functions that share it; empty where nobody has filled it yet."""
    if id(cell) not in memo:
        memo[id(cell)] = types.CellType()
    return memo[id(cell)]


def _fill(cell: types.CellType, original: types.CellType, memo: dict) -> None:
    try:
        cell.cell_contents
    except ValueError:
        with contextlib.suppress(ValueError):  # of one that is empty itself
            cell.cell_contents = _copied(original.cell_contents, memo)


def _copied(value, memo: dict):
    """A copy; what cannot be copied (a lock, an open file, a Python module) is shared."""
    tried = dict(memo)
    try:
        found = copy.deepcopy(value, tried)
    except (TypeError, NotImplementedError, RuntimeError, AttributeError):
        return value
    # What deepcopy keeps alive, under the memo's own id, which another object may have soon.
    memo.setdefault(id(memo), []).append(tried.pop(id(tried), None))
    memo.update(tried)
    return found


def _cached(function, memo: dict):
    made = functools.lru_cache(**function.cache_parameters())(_copied(function.__wrapped__, memo))
    memo[id(function)] = made
    return made


# What copy.deepcopy takes for atoms.
COPIED = {types.FunctionType: _function, type(functools.lru_cache(lambda: None)): _cached}
