"""Sequence-aware checkpointing: what costs linear time in the sequence is computed again, attention never is.

    forward    h1 = ...                              kept: h1, q k v after their collectives, attention's results
               n = norm(h1); q = all_to_all(n @ Wq)
               o, lse = attention(q, k, v)
               h2 = h1 + all_to_all(o) @ Wo          kept: all_to_all(o), h2
    backward   recompute.n = norm(h1)                just before its first use, one layer at a time
               grad_Wq = recompute.n' @ grad_q

Method: selective checkpointing by operator cost (AutoSP, ICLR 2026; Korthikanti et al. 2022, arXiv:2205.05198), with
the layer inputs found as the places where a single value carries the forward pass.
"""

from collections.abc import Collection
from dataclasses import replace

from autosp_aot.operators import COLLECTIVES
from autosp_aot.program import RECOMPUTED, Instr, Program, Section, Value, rename

QUADRATIC = ("autosp.attention", "autosp.attention_rows")

# A value that is this many times smaller than the one that carries the forward pass costs little to keep beside it.
SMALL = 8

# Why a value is kept.
SENT = "it comes from a collective, which would send it again"
ATTENDED = "it comes from attention, whose cost is quadratic in the sequence"
CARRIES = "it alone carries the forward pass here: what follows, up to the next such place, is computed again from it"
BESIDE = "it is small beside the value that carries the forward pass here, and used after the layers it crosses"
LAST = "it comes after the last layer, where backward begins"


def recompute(program: Program, policy: str) -> Program:
    """Apply `sac` (or `none`, which keeps everything) to the sections forward and backward."""
    if policy == "none":
        return program
    forward, backward = program.section("forward"), program.section("backward")
    made = {out.name: instr for instr in forward.instrs for out in instr.values()}
    kept = kept_values(program)
    instrs, names = _late(backward, made, kept)
    read = {name for instr in instrs for name in instr.refs()}
    gives = tuple((label, names.get(name, name)) for label, name in backward.gives)
    read |= {name for _, name in gives}
    takes = tuple(name for name in made if name in read)
    return program.with_section(replace(backward, takes=takes, instrs=tuple(instrs), gives=gives))


def _late(backward: Section, made: dict[str, Instr], kept: Collection[str]) -> tuple[list[Instr], dict[str, str]]:
    """The backward instructions, each preceded by what has to be computed again for it."""
    names: dict[str, str] = {}
    instrs: list[Instr] = []

    def again(wanted: str) -> None:
        """Emit what makes `wanted` from kept values, operands first (an explicit stack: chains can be long)."""
        stack = [wanted]
        while stack:
            name = stack[-1]
            if name in names or name in kept or name not in made:
                stack.pop()
                continue
            missing = [ref for ref in made[name].refs() if ref in made and ref not in kept and ref not in names]
            if missing:
                stack.extend(reversed(missing))
                continue
            instr = rename(made[name], names)
            outs = tuple(out and replace(out, name=RECOMPUTED + out.name) for out in instr.outs)
            instrs.append(replace(instr, outs=outs))
            names.update((out.name, RECOMPUTED + out.name) for out in instr.values())
            stack.pop()

    for instr in backward.instrs:
        for ref in instr.refs():
            again(ref)
        instrs.append(rename(instr, names))
    for _, name in backward.gives:
        again(name)
    return instrs, names


def kept_values(program: Program) -> dict[str, str]:
    """What `sac` keeps of the forward section, and why: costly results, a value a layer, all after the last layer."""
    forward = program.section("forward")
    kept: dict[str, str] = {}
    for instr in forward.instrs:
        if instr.op in COLLECTIVES or instr.op in QUADRATIC:
            kept.update((out.name, SENT if instr.op in COLLECTIVES else ATTENDED) for out in instr.values())
    alive = _alive(program, forward, kept)
    quadratic = [at for at, instr in enumerate(forward.instrs) if instr.op in QUADRATIC]
    previous, sizes = -1, [0]
    last: dict[str, str] = {}
    for at in quadratic:
        crossing = {value.name for value in alive[at]}
        for cut in range(at, previous, -1):
            carrying, beside = _carrying(alive[cut])
            if carrying and crossing.issuperset(value.name for value in beside):
                kept |= {carrying.name: CARRIES} | {value.name: BESIDE for value in beside}
                sizes.append(carrying.nbytes())
                break
        previous = at
    start = previous
    for cut in range(previous + 1, len(alive)):
        carrying, beside = _carrying(alive[cut])
        if carrying and 0 < carrying.nbytes() <= max(sizes):
            start, last = cut, {carrying.name: CARRIES} | {value.name: BESIDE for value in beside}
    kept |= last
    for instr in forward.instrs[start + 1 :]:
        for out in instr.values():
            kept.setdefault(out.name, LAST)
    return kept


def _carrying(alive: list[Value]) -> tuple[Value | None, list[Value]]:
    """The one value that carries the forward pass, if there is one, and the small ones beside it."""
    largest = max((value.nbytes() for value in alive), default=0)
    large = [value for value in alive if value.nbytes() * SMALL > largest]
    beside = [value for value in alive if value.nbytes() * SMALL <= largest]
    return (large[0], beside) if len(large) == 1 else (None, [])


def _alive(program: Program, forward: Section, kept: Collection[str]) -> list[list[Value]]:
    """The values alive after each instruction, of those that depend on weights and batch and are not kept."""
    weights = {entry.value.name for entry in program.inputs if entry.kind == "parameter"}
    batch = {entry.value.name for entry in program.inputs if entry.kind == "batch"}
    last_use = {name: at for at, instr in enumerate(forward.instrs) for name in instr.refs()}
    stream: dict[str, Value] = {}
    found: list[list[Value]] = []
    for at, instr in enumerate(forward.instrs):
        refs = instr.refs()
        from_weights, from_batch = any(r in weights for r in refs), any(r in batch for r in refs)
        for out in instr.values():
            if from_weights:
                weights.add(out.name)
            if from_batch:
                batch.add(out.name)
            if from_weights and from_batch and out.name not in kept:
                stream[out.name] = out
        for name in refs:
            if last_use[name] == at:
                stream.pop(name, None)
        found.append([out for name, out in stream.items() if last_use.get(name, -1) > at])
    return found
