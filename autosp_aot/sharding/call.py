"""A call as a sharding rule sees it."""

from dataclasses import dataclass

from autosp_aot.ir.program import Instr, Value


@dataclass(frozen=True)
class Call:
    """An instruction with the whole shapes of what it reads and writes."""

    instr: Instr
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    ranks: int

    @property
    def results_by_position(self) -> tuple[bool, ...]:
        return tuple(out is not None for out in self.instr.outs)
