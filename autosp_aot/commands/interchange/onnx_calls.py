"""Calls as ONNX sees them: arguments by name, constants that are exact, dtypes that a standard operator takes."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

import onnx
import torch
from onnx import TensorProto

from autosp_aot.ir.operators import DTYPES, overload
from autosp_aot.ir.program import Dtype, Instr, Ref, Value
from autosp_aot.ops.table import OURS

OPSET = 24
TYPES = {
    "f64": TensorProto.DOUBLE, "f32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16, "f16": TensorProto.FLOAT16,
    "i64": TensorProto.INT64, "i32": TensorProto.INT32, "i16": TensorProto.INT16, "i8": TensorProto.INT8,
    "u8": TensorProto.UINT8, "b8": TensorProto.BOOL,
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """An input that is known: a number, or some in one dim."""

    dtype: str
    numbers: float | int | bool | tuple

    @property
    def exact(self) -> bool:
        """False where the dtype does not have the numbers; fp32 is what torch computes with fp32 and a number in."""
        numbers = self.numbers if isinstance(self.numbers, tuple) else (self.numbers,)
        return self.dtype == "f32" or all(_exact(number, DTYPES[self.dtype]) for number in numbers)


@dataclass(frozen=True)
class Standard:
    """A standard operator with its inputs, None where an optional one is left out."""

    op: str
    inputs: tuple[Value | Constant | None, ...]
    attributes: Mapping[str, object] = field(default_factory=dict)


class AtenCall:
    """An ATen call as rows read it: arguments by name, operands as values, defaults filled in."""

    def __init__(self, instr: Instr, values: Mapping[str, Value]):
        self.outs = instr.outs
        self.given = {name: _valued(argument, values) for name, argument in named(instr).items()}
        self.unread = {name for name, argument in self.given.items() if not isinstance(argument, Value)}
        self.defaults = {a.name: a.default_value for a in _arguments(instr.op) if a.has_default_value()}

    def __getitem__(self, name: str):
        self.unread.discard(name)
        return self.given[name] if name in self.given else self.defaults[name]

    def operands(self, *names: str) -> tuple[Value | Constant | None, ...]:
        """Operands; a number among them is a constant in the dtype of the first tensor of the call."""
        dtype = next(a.dtype for a in (*self.given.values(), *self.outs) if isinstance(a, Value))
        found = [self[name] for name in names]
        return tuple(a if a is None or isinstance(a, Value) else Constant(dtype, a) for a in found)

    @property
    def dtype(self) -> str:
        """That of the first result."""
        return self._out.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._out.sizes

    @property
    def _out(self) -> Value:
        out = self.outs[0]
        assert out is not None, "a row asks of a result that is read"
        return out

    @property
    def all_read(self) -> bool:
        """Whether what the row did not read has its default."""
        return all(name in self.defaults and self.given[name] == self.defaults[name] for name in self.unread)


def named(instr: Instr) -> dict[str, object]:
    """The arguments of a call of ATen's or ours by name, as the text gives them."""
    return dict(zip(_names(instr.op), instr.args)) | dict(instr.kwargs)


@cache
def _names(op: str) -> list[str]:
    if op in OURS:
        return list(OURS[op].arguments)
    return [argument.name for argument in _arguments(op)]


def _arguments(op: str) -> list[torch._C.Argument]:
    """The arguments of an operator of ATen's."""
    found = overload(op)
    assert found is not None, "operators were checked"
    return found._schema.arguments


def _valued(argument, values: Mapping[str, Value]):
    if isinstance(argument, tuple):
        return tuple(_valued(item, values) for item in argument)
    if isinstance(argument, Ref):
        return values[argument.name]
    return argument.name if isinstance(argument, Dtype) else argument


def _exact(number: float, dtype: torch.dtype) -> bool:
    if not dtype.is_floating_point:
        limits = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        return math.isfinite(number) and number == int(number) and limits[0] <= number <= limits[1]
    return number != number or torch.tensor(number, dtype=dtype).item() == number


def fits(found: Standard, outs: tuple[Value | None, ...]) -> bool:
    """Whether ONNX's schema takes and gives these dtypes, and every constant is exact.

    A result that nobody uses may be one that ONNX does not give, but not one that it has to.
    """
    schema = onnx.defs.get_schema(found.op, OPSET, "")
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    bound: dict[str, str] = {}
    if any(outs[len(schema.outputs) :]):
        return False
    for formal, value in (*_formal(schema.inputs, found.inputs), *zip(schema.outputs, outs)):
        if value is None:
            if formal.option == onnx.defs.OpSchema.FormalParameterOption.Single:
                return False
            continue
        said = f"tensor({TensorProto.DataType.Name(TYPES[value.dtype]).lower()})"
        if said not in allowed.get(formal.type_str, [formal.type_str]):
            return False
        if bound.setdefault(formal.type_str, said) != said or (isinstance(value, Constant) and not value.exact):
            return False
    return True


def _formal(formals, actuals) -> Iterator[tuple]:
    """Each actual parameter with its formal one; the last formal one stands for all that follow."""
    return ((formals[min(at, len(formals) - 1)], actual) for at, actual in enumerate(actuals))
