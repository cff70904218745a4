"""Which values forward saves for backward: by policy, or by what a budget has room for.

    none    all that backward reads
    sac     the boundaries of segments, what attention and collectives make: neither is ever recomputed
    full    the boundaries alone
    auto    what takes least time within the budget, chosen segment by segment; `sac` without a budget

The last segment is always saved: backward begins there, and would recompute it while everything else is live.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.ir.program import Program
from autosp_aot.ir.structure.table import meets
from autosp_aot.memory.costs import peak_bytes
from autosp_aot.ops.table import is_quadratic
from autosp_aot.passes.analysis.segments import segments
from autosp_aot.passes.keep.budget_error import too_small
from autosp_aot.passes.keep.knapsack import cheapest, tightest
from autosp_aot.passes.keep.measure import measure
from autosp_aot.passes.keep.rungs import TIERS, Choice, Ladder, Schedule, choices
from autosp_aot.passes.step import Pass, Step

# Why a value is kept.
CARRIES = "the forward pass goes on from it: what follows, up to the next such place, is recomputed from it"
SENT = "it comes from a collective, which would send it again"
ATTENDED = "it comes from attention, whose cost is quadratic in the sequence"
LAST = "it comes after the last layer, where backward begins"
ROOM = "backward reads it, and there is room for it"

KEEPS = {
    "none": (CARRIES, SENT, ATTENDED, LAST, ROOM),
    "sac": (CARRIES, SENT, ATTENDED, LAST),
    "full": (CARRIES, LAST),
}

# What a solution takes in fact may be above what it was said to: so often it is solved again for less.
ATTEMPTS = 4


@dataclass(frozen=True)
class Keep:
    """Chooses which values of forward are kept; some of them backward may not need.

    What counts of a choice is the memory of the program that `schedule`, the passes for an `offload`, makes of it.
    Raises BudgetTooSmall where the budget cannot be met.
    """

    config: BuildConfig
    schedule: Callable[[str], tuple[Pass, ...]]
    name: ClassVar[str] = "plan"

    def __call__(self, step: Step) -> Step:
        step = replace(step, segments=segments(step.program))
        policy = self.config.recompute
        if policy == "auto" and self.config.memory_budget_bytes is not None:
            kept = _within(step, self.config, self.scheduled(step))
            return replace(step, kept={name: why for name, why in reasons(step).items() if name in kept})
        return replace(step, kept=by_policy(step, "sac" if policy == "auto" else policy))

    def scheduled(self, step: Step) -> Schedule:
        """Makes the program that keeps given values, with a policy of what waits in host memory."""

        def program(kept: Collection[str], offload: str) -> Program:
            trial = replace(step, kept=dict.fromkeys(kept, ""))
            for run in self.schedule(offload):
                trial = run(trial)
            return trial.program

        return program


def by_policy(step: Step, policy: str) -> dict[str, str]:
    """The values of forward that `none`, `sac` or `full` keeps, and why."""
    return {name: why for name, why in reasons(step).items() if why in KEEPS[policy]}


def reasons(step: Step) -> dict[str, str]:
    """Why each value of forward would be kept, if it were."""
    why: dict[str, str] = {}
    for instr in step.program.section("forward").instrs:
        reason = SENT if meets(instr.op) else ATTENDED if is_quadratic(instr.op) else ROOM
        why.update((out.name, reason) for out in instr.values())
    why.update((out.name, LAST) for instr in step.segments[-1].instrs for out in instr.values())
    why.update((name, CARRIES) for segment in step.segments for name in segment.boundary)
    return why


def _within(step: Step, config: BuildConfig, schedule: Schedule) -> frozenset[str]:
    """The values to keep for the fastest step that fits the budget."""
    program, ladder = step.program, Ladder(step.program, step.segments, config)
    options = choices(ladder, measure(ladder, schedule), config.offload)
    room = config.budget_bytes - sum(entry.value.nbytes() for entry in program.inputs)
    wanted = room
    for _ in range(ATTEMPTS):
        within = (cheapest(_tier(options, *tier), wanted) for tier in TIERS)
        found = next((found for found in within if found), None)
        if found is None:
            break
        over = peak_bytes(schedule(_kept(found), config.offload), config.target) - room
        if over <= 0:
            return _kept(found)
        wanted -= over
    last = (_kept(tightest(options)), frozenset(by_policy(step, "full")))
    tried = [(kept, schedule(kept, config.offload)) for kept in last]
    kept, least = min(tried, key=lambda one: peak_bytes(one[1], config.target))
    if peak_bytes(least, config.target) > room:
        raise too_small(least, config, step.sequence_dims)
    return kept


def _tier(options: list[list[Choice]], rungs: tuple[str, ...], host: bool) -> list[list[Choice]]:
    return [[choice for choice in some if choice.rung in rungs and (host or not choice.on_host)] for some in options]


def _kept(found: list[Choice]) -> frozenset[str]:
    return frozenset().union(*(choice.kept for choice in found))
