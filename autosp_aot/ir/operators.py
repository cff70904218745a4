"""Which operators a program may name, and torch's operator for a name.

Allowed are ATen operators without side effects: none that writes to an operand, none that draws random numbers, and
none without a tensor operand except the constant tensors below. Those of our own, `autosp.*`, are in `ops/table.py`,
what is no operator in `structure/table.py`. Everything else is refused by name.
"""

from collections.abc import Iterable
from functools import cache, partial

import torch

DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "b8": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HALF = (torch.bfloat16, torch.float16)
# What the names of our own operators begin with.
OWN = "autosp."
FACTORIES = frozenset({
    "aten.arange.start_step", "aten.full.default", "aten.ones.default", "aten.scalar_tensor.default",
    "aten.zeros.default",
})  # fmt: skip
# Elementwise operators that torch does not tag so, and whether a score may consist of one: those have a derivative in
# what they compute with, and broadcast every operand.
UNTAGGED = {
    "aten.__and__.Tensor": True, "aten.__or__.Tensor": True, "aten._prelu_kernel.default": False,
    "aten._prelu_kernel_backward.default": False, "aten._to_copy.default": False, "aten.elu_backward.default": False,
    "aten.fill.Scalar": False, "aten.floor_divide.Scalar": False, "aten.floor_divide.default": False,
    "aten.hardsigmoid_backward.default": False, "aten.hardswish.default": False,
    "aten.hardswish_backward.default": False, "aten.hardtanh_backward.default": False,
    "aten.leaky_relu_backward.default": False,
    "aten.masked_fill.Tensor": False, "aten.mish_backward.default": False, "aten.softplus_backward.default": False,
    "aten.where.Scalar": True, "aten.where.ScalarOther": True, "aten.where.ScalarSelf": True,
}  # fmt: skip
# What torch computes a number's operator with: the number becomes a tensor.
OF_TENSORS = {f"aten.{name}.Scalar": f"aten.{name}.Tensor" for name in ("div", "mul")}


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of a floating dtype are added up: fp32 for half dtypes, else their own."""
    return torch.float32 if dtype in HALF else dtype


@cache
def overload(name: str) -> torch._ops.OpOverload | None:
    """Torch's operator for `aten.<operator>.<overload>`; None where there is none or it is not allowed."""
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "aten" or not all(part.isidentifier() for part in parts):
        return None
    packet = getattr(torch.ops.aten, parts[1], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or parts[2] not in packet.overloads():
        return None
    found = getattr(packet, parts[2])
    return found if _pure(found) and (name in FACTORIES or _reads_tensor(found)) else None


@cache
def elementwise(name: str, in_scores: bool = False) -> bool:
    """Whether a name is that of an allowed operator that works element by element, with broadcasting.

    With `in_scores`, of one that a score may consist of.
    """
    found = overload(name)
    untagged = UNTAGGED.get(name, False) if in_scores else name in UNTAGGED
    return found is not None and (torch.Tag.pointwise in found.tags or untagged)


@cache
def writer(name: str) -> tuple[torch._ops.OpOverload, str] | None:
    """The overload of an elementwise operator that writes its result into a tensor, and the argument that is this one.

    None for other operators, and where torch only has an overload that makes the result first and copies it (a
    generated one).
    """
    found = overload(OF_TENSORS.get(name, name))
    if found is None or torch.Tag.pointwise not in found.tags or len(found._schema.returns) != 1:
        return None
    packet = found.overloadpacket
    for other in map(partial(getattr, packet), packet.overloads()):
        written = [argument.name for argument in other._schema.arguments if argument.is_out]
        said = _said(argument for argument in other._schema.arguments if not argument.is_out)
        if len(written) == 1 and said == _said(found._schema.arguments) and torch.Tag.generated not in other.tags:
            return other, written[0]
    return None


@cache
def makes_view(name: str) -> bool:
    """Whether an operator of ATen gives its operand's storage under another shape."""
    found = overload(name)
    return found is not None and found._schema.returns[0].alias_info is not None


def _pure(found: torch._ops.OpOverload) -> bool:
    returns_tensors = all("Tensor" in str(result.type) for result in found._schema.returns)
    return not found._schema.is_mutable and returns_tensors and torch.Tag.nondeterministic_seeded not in found.tags


def _said(arguments: Iterable[torch._C.Argument]) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in arguments]


def _reads_tensor(found: torch._ops.OpOverload) -> bool:
    return any("Tensor" in str(argument.type) for argument in found._schema.arguments)
