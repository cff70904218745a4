"""Which values forward keeps for backward: by policy, or by what a budget has room for.

    none    all that backward reads
    sac     the boundaries of segments, what attention and collectives make: neither is ever done twice
    full    the boundaries alone
    auto    for every segment the choice that together take least time and fit the budget; `sac` without a budget

The last segment is always kept: backward begins there, and would compute it again while all else is alive.
"""

from autosp_aot.operators import COLLECTIVES
from autosp_aot.passes.segments import QUADRATIC, segments
from autosp_aot.program import Program

# Why a value is kept.
CARRIES = "the forward pass goes on from it: what follows, up to the next such place, is computed again from it"
SENT = "it comes from a collective, which would send it again"
ATTENDED = "it comes from attention, whose cost is quadratic in the sequence"
LAST = "it comes after the last layer, where backward begins"
ROOM = "backward reads it, and there is room for it"

KEEPS = {
    "none": (CARRIES, SENT, ATTENDED, LAST, ROOM),
    "sac": (CARRIES, SENT, ATTENDED, LAST),
    "full": (CARRIES, LAST),
    "auto": (CARRIES, SENT, ATTENDED, LAST),
}


def plan(program: Program, policy: str) -> dict[str, str]:
    """The values of forward that a policy keeps, and why; some of them backward may not need."""
    return {name: why for name, why in reasons(program).items() if why in KEEPS[policy]}


def reasons(program: Program) -> dict[str, str]:
    """Why each value of forward would be kept, if it were."""
    found = segments(program)
    why = {}
    for instr in program.section("forward").instrs:
        reason = SENT if instr.op in COLLECTIVES else ATTENDED if instr.op in QUADRATIC else ROOM
        why.update((out.name, reason) for out in instr.values())
    why.update((out.name, LAST) for instr in found[-1].instrs for out in instr.values())
    why.update((name, CARRIES) for segment in found for name in segment.boundary)
    return why
