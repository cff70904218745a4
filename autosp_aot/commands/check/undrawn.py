"""Steps without chance, so that a program and the model that it was built from can be compared.

    program    %u = autosp.uniform(%seed, 3, ...)      ->    the same at site UNDRAWN, whose draws are zeros
    eager      bernoulli_(x, 0.9), rand(...), randn(...)    what zeros make of them: ones, zeros, means

So dropout drops nothing, and scales what it keeps.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autosp_aot.ir.program import Instr, Program
from autosp_aot.ops.random import UNDRAWN
from autosp_aot.ops.table import OURS

aten = torch.ops.aten


class NotComparable(Exception):
    """There is nothing to compare with: eager gives no finite numbers, or draws in a way that cannot be kept out."""


def draws(program: Program) -> bool:
    """Whether a program draws random numbers."""
    return any(entry.kind == "seed" for entry in program.inputs)


def undrawn(program: Program) -> Program:
    """The program with nothing drawn."""

    def again(instr: Instr) -> Instr:
        body = instr.body and replace(instr.body, instrs=tuple(map(again, instr.body.instrs)))
        site = OURS[instr.op].site if instr.op in OURS else None
        args = tuple(UNDRAWN if at == site else value for at, value in enumerate(instr.args))
        kwargs = tuple((name, UNDRAWN if name == site else value) for name, value in instr.kwargs)
        return replace(instr, args=args, kwargs=kwargs, body=body)

    sections = (replace(section, instrs=tuple(map(again, section.instrs))) for section in program.sections)
    return replace(program, sections=tuple(sections))


# What operators draw at zero, of their arguments by name (randomness.py has what they draw else).
ZERO = {
    "bernoulli": lambda given: given.get("p", given["self"]) > 0,
    "exponential": lambda given: torch.finfo(_wide(given["self"].dtype)).eps / 2 / given["lambd"],
    "normal": lambda given: given["mean"],
    "rand": lambda given: 0,
    "rand_like": lambda given: 0,
    "randint": lambda given: given.get("low", 0),
    "randint_like": lambda given: given.get("low", 0),
    "randn": lambda given: 0,
    "randn_like": lambda given: 0,
    "uniform": lambda given: given["from"],
}


class Undrawn(TorchDispatchMode):
    """While it is active, eager's operators that draw give what draws of zero make. Raises NotComparable for others."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        named = func._schema.arguments
        given = {argument.name: argument.default_value for argument in named if argument.has_default_value()}
        given |= dict(zip((argument.name for argument in named), args)) | kwargs
        name = func._schema.name.removeprefix("aten::")
        if given.get("dropout_p") == 0:
            return func(*args, **kwargs)
        if name == "native_dropout":
            kept, scale = torch.ones_like(given["input"], dtype=torch.bool), 1 / (1 - given["p"])
            return given["input"] * (1 if given["train"] is False else scale), kept
        if name.removesuffix("_") not in ZERO:
            raise NotComparable(f"what {func} draws cannot be kept out")
        value = ZERO[name.removesuffix("_")](given)
        if name.endswith("_"):
            return given["self"].copy_(value) if isinstance(value, Tensor) else given["self"].fill_(value)
        if "size" in given:
            dtype = kwargs.get("dtype") or (torch.int64 if name == "randint" else torch.get_default_dtype())
            return torch.full(given["size"], value, dtype=dtype, device=kwargs.get("device"))
        like = next(given[key] for key in ("self", "mean", "std") if isinstance(given.get(key), Tensor))
        return torch.zeros_like(like, dtype=kwargs.get("dtype")) + value


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
