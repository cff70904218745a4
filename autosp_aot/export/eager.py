"""Forward as eager runs it: on fake tensors, without a tracer, with what it computes written down as expressions.

    %x = embedding(parameter tokens.weight, batch input_ids)      each call an expression of its operands, told apart by
    loss = nll_loss(..., (x, [2, 33], strides ..., needs grad))   what they are, how they lie in memory, and literals

A tensor is its storage's expression and its place in there, so that views and writes need no rules. Two forwards
compute the same where their losses are the same expression: of constants, and of the batch, weights and draws of their
own step.
"""

import ctypes
import hashlib
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from autosp_aot.errors import BuildError, Problem
from autosp_aot.export.diagnose import DATA_DEPENDENT, sparse_problem
from autosp_aot.export.keeping import tensors_of
from autosp_aot.export.reads import asserts, read_here
from autosp_aot.export.source import module_path
from autosp_aot.export.user_code import called_at, frames_of_users

aten = torch.ops.aten
# Operators whose result holds what their operand does.
LIFTS = (aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default)
# What a norm writes to without its schema saying so, where it trains.
STATISTICS = ("running_mean", "running_var")

# What is read of a tensor where nothing but an assertion depends on it, by whether that is floating and boolean.
ANSWERS = {(True, False): 1.0, (False, False): 1, (False, True): True}

# Arguments that say by what they print what they are; functions and generators are refused when they are captured.
LITERALS = (
    int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.SymInt,
    torch.SymFloat, torch.SymBool,
)  # fmt: skip

Expression = int


class Trace(TorchDispatchMode):
    """While it is active, every call is written down.

    `reads` has the values that forward read, be it that it went on. `written` has what was written to of what outlives
    a step: its name, and the line that wrote first. Where `answers`, what reads a value is given one, so that it can be
    seen whether the loss depends on that. `calls`, where it is a list, gets every call's expression and line.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, original: nn.Module):
        """`model` is a copy of `original`, whose own parameters are not to be seen in it."""
        super().__init__()
        self.originals = {p.untyped_storage()._cdata: name for name, p in original.named_parameters()}
        self.numbers: dict[tuple, Expression] = {}
        self.operands: list[tuple[Expression, ...]] = []
        self.varies: list[bool] = []  # whether an expression depends on batch, trained parameters or draws
        self.stored: dict[int, Expression] = {}
        self.alive: list[torch.UntypedStorage] = []  # so that no other gets the address of one that is known
        self.names: dict[int, str] = {}
        self.batch: list[int] = []
        self.reads: list[Problem] = []
        self.written: dict[str, str] = {}
        self.draws, self.answers = 0, False
        self.calls: list[tuple[Expression, str]] | None = None
        for name, tensor in tensors_of(model):
            self.leaf(tensor, f"attribute {name!r}", False)
        for name, tensor in model.named_buffers():
            self.leaf(tensor, f"buffer {module_path(name)!r}", False)
        for name, parameter in model.named_parameters():
            self.leaf(parameter, f"parameter {module_path(name)!r}", parameter.requires_grad)
        self.homes = homes(model)

    def leaf(self, tensor: Tensor, name: str, varies: bool) -> None:
        """From now on a storage holds what `name` says."""
        storage = tensor.untyped_storage()
        self.stored[storage._cdata] = self.number(("leaf", name), (), varies)
        self.names[storage._cdata] = name
        self.alive.append(storage)

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """A step begins with a batch of its own: what earlier ones made of batch, weights and draws is carried."""
        for storage in self.batch:
            del self.names[storage]
        for storage, expression in self.stored.items():
            if self.varies[expression] and storage not in self.names:
                self.stored[storage] = self.number(("carried", expression), (expression,), True)
        self.draws, self.batch = 0, [tensor.untyped_storage()._cdata for tensor in batch.values()]
        for name, tensor in batch.items():
            self.leaf(tensor, f"batch {name!r}", True)

    def moved(self, model: nn.Module) -> list[str]:
        """The parameters and buffers that have other memory than before, as by assignment to .data."""
        return [what for what, storage in homes(model).items() if storage != self.homes.get(what, storage)]

    def number(self, key: tuple, operands: tuple[Expression, ...], varies: bool) -> Expression:
        """The number of an expression, the same for the same."""
        found = self.numbers.setdefault(key, len(self.operands))
        if found == len(self.operands):
            self.operands.append(operands)
            self.varies.append(varies or any(self.varies[operand] for operand in operands))
        return found

    def expression(self, tensor: Tensor) -> Expression:
        """What a tensor is: what its storage holds, where it lies in there, and whether it needs a gradient."""
        if tensor.layout is not torch.strided:
            return self.number(("sparse",), (), True)
        storage = tensor.untyped_storage()
        if storage._cdata not in self.stored:
            self.alive.append(storage)
            self.stored[storage._cdata] = self.number(("constant", _digest(tensor, storage)), (), False)
        held = self.stored[storage._cdata]
        place = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.requires_grad
        return self.number(("tensor", held, place), (held,), False)

    def carried(self, expression: Expression) -> set[Expression]:
        """What an expression reads of earlier steps: the expressions of what they made."""
        names = {number: key for key, number in self.numbers.items() if key[0] == "carried"}
        found, seen, todo = set(), set(), [expression]
        while todo:
            at = todo.pop()
            if at in names:
                found.add(at)
            elif at not in seen:
                seen.add(at)
                todo += self.operands[at]
        return found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and (self.answers or asserts(sys._getframe())):
            return ANSWERS[args[0].dtype.is_floating_point, args[0].dtype is torch.bool]
        operands: list[Expression] = []
        key: tuple = func, self.encoded((args, kwargs), operands), torch.is_grad_enabled()
        try:
            result = func(*args, **kwargs)
        except DATA_DEPENDENT:  # which forward may catch, and go on
            self.reads.append(read_here(sys._getframe()))
            raise
        made = [tensor for tensor in _tensors(result) if tensor.layout is torch.strided]
        if len(made) < len(_tensors(result)) and (place := called_at()):  # in backward it has no line
            raise BuildError(sparse_problem(func, place))
        drawn = isinstance(func, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in func.tags
        if drawn:
            key, self.draws = (*key, "draw", self.draws), self.draws + 1
        call = self.number(key, tuple(operands), drawn)
        if self.calls is not None:
            self.calls.append((call, called_at()))
        for tensor in written_by(func, args, kwargs):
            self.write(tensor, call)
        for at, tensor in enumerate(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.stored:
                source = (args[0] if func in LIFTS else tensor).untyped_storage()._cdata
                own = self.number(("result", call, at), (call,), False)
                self.stored[storage._cdata] = self.stored.get(source, own)
                self.alive.append(storage)
        return result

    def encoded(self, value, operands: list[Expression]):
        """Arguments as a key; `operands` gets the expressions of the tensors among them."""
        if isinstance(value, Tensor):
            self.outside(value)
            operands.append(self.expression(value))
            return operands[-1]
        if isinstance(value, (list, tuple)):
            return tuple(self.encoded(part, operands) for part in value)
        if isinstance(value, dict):
            return tuple((name, self.encoded(part, operands)) for name, part in value.items())
        return type(value), repr(value) if isinstance(value, LITERALS) else getattr(value, "__code__", None)

    def outside(self, tensor: Tensor) -> None:
        """Raise BuildError for a tensor that needs a gradient and is neither the copy's nor made of what is."""
        storage = tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
        if storage in self.originals or (tensor.requires_grad and not isinstance(tensor, FakeTensor)):
            raise BuildError(_outside(tensor, self.originals.get(storage)))

    def write(self, tensor: Tensor, call: Expression) -> None:
        storage = tensor.untyped_storage()._cdata
        before = self.stored[storage]
        place = tensor.shape, tensor.stride(), tensor.storage_offset()
        self.stored[storage] = self.number(("written", before, call, place), (before, call), False)
        if storage in self.names:
            self.written.setdefault(self.names[storage], called_at())


def homes(model: nn.Module) -> dict[str, int]:
    """The storages of parameters and buffers, by what they are called."""
    named = (("parameter", model.named_parameters()), ("buffer", model.named_buffers()))
    return {f"{kind} {module_path(name)!r}": tensor.untyped_storage()._cdata
            for kind, tensors in named for name, tensor in tensors}  # fmt: skip


def written_by(func, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The tensors that a call writes to."""
    if not isinstance(func, torch._ops.OpOverload):
        return
    named = func._schema.arguments
    given = dict(zip((argument.name for argument in named), args)) | kwargs
    trains = given.get("training", given.get("train"))
    for argument in named:
        hidden = trains is True and argument.name in STATISTICS and "batch_norm" in func._schema.name
        if argument.is_write or hidden:
            yield from _tensors(given.get(argument.name))


def _outside(tensor: Tensor, original: str | None) -> Problem:
    """Of a tensor that needs a gradient and that forward gets from elsewhere than the model's parameters."""
    frame = next(frames_of_users(sys._getframe()), None)
    names = {**frame.f_globals, **frame.f_locals} if frame is not None else {}
    inside = lambda value: isinstance(value, nn.Module) and any(tensor is p for p in value.parameters())  # noqa: E731
    named = (name for name, value in names.items() if value is tensor or inside(value))
    name = original or next(named, "a tensor")
    return Problem(
        "parameter-outside", f"forward reads {name!r}, which needs a gradient, from outside of the model", called_at(),
        "what is no parameter of the model that is built would be a constant of the program",
        "make it a parameter or a submodule of the model, and reach it through self",
    )  # fmt: skip


def _tensors(value) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _digest(tensor: Tensor, storage: torch.UntypedStorage) -> object:
    """What stands for the bytes of a storage that no call has made: a literal, a table of numpy's."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return storage._cdata
    data = storage if storage.device.type == "cpu" else storage.cpu()
    return hashlib.blake2b(ctypes.string_at(data.data_ptr(), data.nbytes())).digest()
