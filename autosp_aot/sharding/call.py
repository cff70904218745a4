"""What a sharding rule is given: a call, and the whole shapes of what it reads and writes."""

from collections.abc import Callable
from dataclasses import dataclass

from autosp_aot.ir.program import Instr
from autosp_aot.sharding.spec import Spec


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor operand or result, as it is unsharded."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """An instruction, its tensor operands in the order they appear, and those of its results that are used."""

    instr: Instr
    operands: tuple[Whole, ...]
    results: tuple[Whole, ...]
    ranks: int

    @property
    def results_by_position(self) -> tuple[bool, ...]:
        return tuple(out is not None for out in self.instr.outs)


# None where no cut is possible: the call computes replicated.
Rule = Callable[[Call], Spec | None]
