"""Memory timeline: the memory of a rank at every moment of its step, by kind.

    gradients       alive at the end of the step
    kept            made in forward and alive when backward begins
    communication   buffers of a collective while it runs; what it gives belongs to the other kinds
    working         all else: what a section makes and releases, workspace of kernels, and the batch
"""

from collections import Counter
from dataclasses import dataclass

from autosp_aot.ir.program import Program
from autosp_aot.ir.structure.table import meets
from autosp_aot.memory.costs import Lifetime, Moment, highest, lifetimes
from autosp_aot.memory.training_state import TrainingState

MEMORY_KINDS = ("gradients", "kept", "working", "communication")
STATE = ("parameter", "buffer")


@dataclass(frozen=True)
class Timeline:
    """The moments of a rank's step, bytes by kind at the worst of each, and the storages with their kinds.

    Parameters are not in it; the batch is.
    """

    moments: tuple[Moment, ...]
    levels: tuple[dict[str, int], ...]
    storages: tuple[tuple[str, Lifetime], ...]

    @property
    def peak_at(self) -> int:
        """The first moment at which most is taken."""
        return max(range(len(self.levels)), key=lambda at: sum(self.levels[at].values()), default=0)


def timeline(program: Program, target: str) -> Timeline:
    """The timeline of the rank with the highest peak, on cpu, cuda or rocm."""
    rank, moments = highest(program, target)
    ends = {moment.section: at for at, moment in enumerate(moments)}
    storages = tuple((_kind(life, ends), life) for life in lifetimes(program, rank, target))
    collectives = {instr.values()[0].name for instr in program.instrs() if meets(instr.op)}
    batch = sum(entry.value.nbytes(rank) for entry in program.inputs if entry.kind not in STATE)
    changes: list[Counter[str]] = [Counter() for _ in range(len(moments) + 1)]
    for kind, life in storages:
        changes[life.moments.start][kind] += life.nbytes
        changes[life.moments.stop][kind] -= life.nbytes
    level, levels = Counter(working=batch), []
    for moment, change in zip(moments, changes):
        level.update(change)
        meanwhile = "communication" if moment.name in collectives else "working"
        extra = Counter({meanwhile: moment.peak_bytes - moment.alive_bytes})
        levels.append({kind: level[kind] + extra[kind] for kind in MEMORY_KINDS})
    return Timeline(tuple(moments), tuple(levels), storages)


def breakdown(program: Program, state: TrainingState, target: str) -> dict[str, int]:
    """Bytes by kind at the moment of the peak, parameters and optimizer state included."""
    found = timeline(program, target)
    level = found.levels[found.peak_at] if found.levels else dict.fromkeys(MEMORY_KINDS, 0)
    return {"parameters": state.parameters, "optimizer": state.optimizer, **level}


def _kind(life: Lifetime, ends: dict[str, int]) -> str:
    """Of a storage. What backward gives and `sum_gradients` replaces by its total is a gradient too."""
    if ends.get("forward", -1) in life.moments:
        return "kept"
    last = (ends.get("backward", -1), ends.get("sum_gradients", -1))
    return "gradients" if any(at in life.moments for at in last) else "working"
