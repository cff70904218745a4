"""Kept values wait in host memory from their last use in forward to their first in backward.

    forward    %h.offload = offload(%h, 0)           after the last use; 0 is the byte of the pool
               ...                                   work that takes as long as the copy
               %h.host = wait(%h.offload, %h)        from here on %h may be released
    backward   %h.fetch = fetch(%h.host)             as much work ahead of the first use
               ...
               %h.back = wait(%h.fetch, %h.host)
               %recompute.v = aten.reshape(%h.back)  a view of %h that backward reads

A storage goes as a whole, under the name it was made for. The copies of a section share one link: each begins when the
one before is done. Where the link does not keep up, at most IN_FLIGHT copies are under way, so that what they hold on
the device stays bounded and forward (or backward) waits.

Method: activation offload with prefetch (Rhu et al. 2016, vDNN, arXiv:1602.08124), the distances decided at build.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.ir.program import RECOMPUTED, Instr, Program, Ref, Value, rename
from autosp_aot.memory.costs import flops, heaviest, peak_bytes, storages
from autosp_aot.passes.inplace import reuse
from autosp_aot.passes.keep.budget_error import too_small
from autosp_aot.passes.release import release
from autosp_aot.passes.step import Step

# What a device computes while a byte goes over its link to the host: about half its peak in bf16 over 25 (PCIe 4) or 50
# GB/s (PCIe 5), from the data sheets of A100, H100 and MI300X. Only the distances follow from it, never a number.
FLOPS_A_BYTE = 8192
IN_FLIGHT = 4
# Places in the pool begin at multiples of this.
ALIGNED_BYTES = 512
# A kept value stays on the device where less than this part of the step's work lies between its last use in forward and
# its first in backward. So do the smallest of the others, as many as are together less than this part of their bytes.
SHORT, SMALL = 16, 64
# What the four values of a stay are named: on its way, there, on its way back, here again.
ENDINGS = ("offload", "host", "fetch", "back")


@dataclass(frozen=True)
class _Stay:
    """A storage that nobody reads for a while: the value it was made for, and the names under which backward reads it.

    `views` make those names of the value. `after` is the position of the last instruction of forward that uses the
    storage, `before` that of the first of backward.
    """

    value: Value
    crossing: tuple[str, ...]
    views: tuple[Instr, ...]
    after: int
    before: int


@dataclass(frozen=True)
class _Copy:
    """Begun by the instructions `start`, done with `end`."""

    start: tuple[Instr, ...]
    end: Instr
    nbytes: int


@dataclass(frozen=True)
class Offload:
    """Moves `host`, all that is worth it; `auto`, the first of that with which the budget is kept, or all; or `off`.

    Raises BudgetTooSmall where all is not enough and `recompute` is not `auto`, which handles the budget itself.
    """

    config: BuildConfig
    name: ClassVar[str] = "offload"

    def __call__(self, step: Step) -> Step:
        return step.with_program(offload(step.program, self.config, step.sequence_dims))


def offload(program: Program, config: BuildConfig, sequence_dims: Mapping[str, int]) -> Program:
    """The program with what `config` says in host memory."""
    if config.offload == "off":
        return program
    names = worth_it(program, config.target)
    if config.offload == "host":
        return stowed(program, names, config.target)
    inputs = sum(entry.value.nbytes() for entry in program.inputs)

    def made(count: int) -> Program:
        return reuse(release(stowed(program, names[:count], config.target)), config.target)

    def fits(count: int) -> bool:
        return inputs + peak_bytes(made(count), config.target) <= config.budget_bytes

    count = bisect_left(range(len(names)), True, key=fits)
    if config.recompute != "auto" and not fits(count):
        raise too_small(made(count), config, sequence_dims)
    return stowed(program, names[:count], config.target)


def stowed(program: Program, names: Collection[str], target: str) -> Program:
    """The program with the storages of kept values (`takes` of backward) in host memory while nobody reads them.

    `program` has no `free` yet. What is given to the caller or read by a later section, and what lies in the storage of
    an input, stays on the device.
    """
    forward, backward = program.section("forward"), program.section("backward")
    work = _work(program)
    leaving: dict[int, list[_Copy]] = {}
    coming: dict[int, list[_Copy]] = {}
    hosts: dict[str, str] = {}
    backs: dict[str, str] = {}
    at = 0
    for stay in _stays(program, target):
        if set(names).isdisjoint(stay.crossing):
            continue
        name, nbytes = stay.value.name, max(stay.value.nbytes(rank) for rank in range(program.ranks))
        start, done, fetch, arrived = _copies(stay.value, at)
        backs[name] = arrived.values()[0].name
        backs |= {out.name: RECOMPUTED + out.name for view in stay.views for out in view.values()}
        views = [_again(view, backs) for view in stay.views]
        leaving.setdefault(stay.after + 1, []).append(_Copy((start,), done, nbytes))
        coming.setdefault(len(backward.instrs) - stay.before, []).append(_Copy((*views[::-1], arrived), fetch, nbytes))
        hosts |= dict.fromkeys(stay.crossing, done.values()[0].name)
        at += -(-nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
    takes = tuple(dict.fromkeys(hosts.get(name, name) for name in backward.takes))
    there = {name: backs[name] for name in hosts}
    # Read from its end, backward is as forward is: copies begin where values are read, and end with the fetch.
    read_from_its_end = _linked(backward.instrs[::-1], coming, work["backward"][::-1])
    reading = [rename(instr, there) for instr in reversed(read_from_its_end)]
    program = program.with_section(replace(forward, instrs=tuple(_linked(forward.instrs, leaving, work["forward"]))))
    return program.with_section(replace(backward, takes=takes, instrs=tuple(_once(reading))))


def worth_it(program: Program, target: str) -> list[str]:
    """The kept values of `--offload host`, those that wait longest first: small ones and short waits are left out."""
    stays, rank = _stays(program, target), heaviest(program)
    done = {name: [0, *accumulate(work)] for name, work in _work(program).items()}
    step = done["forward"][-1] + done["backward"][-1]
    between = lambda stay: done["forward"][-1] - done["forward"][stay.after + 1] + done["backward"][stay.before]  # noqa: E731
    long = [stay for stay in stays if between(stay) * SHORT >= step]
    sizes = sorted(stay.value.nbytes(rank) for stay in long)
    least = next((size for size, up_to in zip(sizes, accumulate(sizes)) if up_to * SMALL >= sum(sizes)), 0)
    return [name for stay in long if stay.value.nbytes(rank) >= least for name in stay.crossing]


def _work(program: Program) -> dict[str, list[int]]:
    """The FLOPs of each instruction of each section, on the rank with the most bytes."""
    values, rank = program.values(), heaviest(program)
    return {section.name: [flops(instr, values, rank) for instr in section.instrs] for section in program.sections}


def _stays(program: Program, target: str) -> list[_Stay]:
    """The storages that cross from forward to backward and are not needed beyond, as forward is done with them."""
    forward, backward, *later = (program.section(name) for name in ("forward", "backward", "sum_gradients"))
    owner = storages(program, heaviest(program), target)
    made = {out.name: instr for instr in forward.instrs for out in instr.values()}
    values = {out.name: out for instr in forward.instrs for out in instr.values()}
    last = {owner[name]: at for at, instr in enumerate(forward.instrs) for name in _names(instr)}
    first = {owner[name]: at for at, instr in reversed([*enumerate(backward.instrs)]) for name in instr.refs()}
    given = {owner[name] for section in program.sections for _, name in section.gives}
    given |= {owner[name] for section in later for name in section.takes}
    crossing: dict[str, list[str]] = {}
    for name in backward.takes:
        if owner[name] in values and owner[name] not in given:
            crossing.setdefault(owner[name], []).append(name)
    found = []
    for name, names in crossing.items():
        views = _views(name, names, made, owner)
        if views is not None:
            found.append(_Stay(values[name], tuple(names), views, last[name], first[name]))
    return sorted(found, key=lambda stay: stay.after)


def _names(instr: Instr) -> list[str]:
    return [*instr.refs(), *(out.name for out in instr.values())]


def _copies(value: Value, at: int) -> tuple[Instr, Instr, Instr, Instr]:
    """What starts and ends the copy of a value to byte `at` of the pool, and the one back."""
    moving, host, coming, back = (replace(value, name=f"{value.name}.{end}") for end in ENDINGS)
    return (
        Instr((moving,), "offload", (Ref(value.name), at)),
        Instr((host,), "wait", (Ref(moving.name), Ref(value.name))),
        Instr((coming,), "fetch", (Ref(host.name),)),
        Instr((back,), "wait", (Ref(coming.name), Ref(host.name))),
    )


def _views(value: str, names: Sequence[str], made: dict[str, Instr], owner: dict[str, str]) -> tuple[Instr, ...] | None:
    """What makes views of a value, in order; None where more than one is made at once."""
    views: dict[str, Instr] = {}
    for name in names:
        chain = []
        while name != value and name not in views:
            chain.append(made[name])
            sources = [ref for ref in made[name].refs() if owner[ref] == value]
            if len(made[name].outs) > 1 or not sources:
                return None
            name = sources[0]
        views |= {instr.values()[0].name: instr for instr in reversed(chain)}
    return tuple(views.values())


def _again(view: Instr, backs: dict[str, str]) -> Instr:
    """The view of what is back."""
    (out,) = view.values()
    return replace(rename(view, backs), outs=(replace(out, name=backs[out.name]),))


def _linked(instrs: Sequence[Instr], copies: dict[int, list[_Copy]], work: Sequence[int]) -> list[Instr]:
    """The instructions with copies begun before those at their positions, and ended once the link is done with them.

    Time is counted in FLOPs: `work` has those of each instruction.
    """
    found: list[Instr] = []
    under_way: deque[tuple[int, Instr]] = deque()
    now = idle = 0  # idle: when the link is done with all that was begun
    for at in range(len(instrs) + 1):
        for copy in copies.get(at, ()):
            if len(under_way) == IN_FLIGHT:
                now = max(now, under_way[0][0])
            _end(under_way, now, found)
            found += copy.start
            idle = max(idle, now) + copy.nbytes * FLOPS_A_BYTE
            under_way.append((idle, copy.end))
        _end(under_way, now, found)
        found += instrs[at : at + 1]
        now += sum(work[at : at + 1])
    return found + [end for _, end in under_way]


def _end(under_way: deque[tuple[int, Instr]], now: int, found: list[Instr]) -> None:
    while under_way and under_way[0][0] <= now:
        found.append(under_way.popleft()[1])


def _once(instrs: list[Instr]) -> list[Instr]:
    """Without what makes a value again: a view that backward made before it was made with the others of its storage."""
    made: set[str] = set()
    found = []
    for instr in instrs:
        if made.isdisjoint(names := [out.name for out in instr.values()]):
            found.append(instr)
        made.update(names)
    return found
