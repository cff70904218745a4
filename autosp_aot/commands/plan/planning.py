"""What a step of a model would take on a rank, at every number of ranks and every length asked for.

    peak = parameters + optimizer + most of (gradients so far, kept activations, working set, communication) at one time

Gradients are values of the program: they come to life through backward and are all there at its end, which is when the
optimizer runs, so the last moment of the curve is the optimizer's. The breakdown is that of the moment of the peak.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

from autosp_aot.artifact.config import BuildConfig
from autosp_aot.commands.build.builder import capture_model
from autosp_aot.commands.plan.max_seq_search import longest
from autosp_aot.errors import BuildError
from autosp_aot.export.example_batch import make_batch
from autosp_aot.export.model_file import make_model, read_model_file
from autosp_aot.export.subject import Subject
from autosp_aot.ir.operators import makes_view
from autosp_aot.ir.program import Program, values_of
from autosp_aot.ir.structure.table import FREE, STRUCTURE
from autosp_aot.memory.costs import costs
from autosp_aot.memory.timeline import breakdown
from autosp_aot.memory.training_state import training_state
from autosp_aot.passes.keep.budget_error import BudgetTooSmall
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.targets.devices import Device, step_seconds


@dataclass(frozen=True)
class Setting:
    """What a plan is made for.

    memory_bytes    of the device; `reserve_bytes` of it are left to the driver, the allocator and everything else
    dp              how many groups of sp ranks share the optimizer's state under ZeRO 1, each with its own sequences
    accumulate      micro-batches of each of them in a step
    """

    device: Device
    memory_bytes: int
    reserve_bytes: int
    dp: int = 1
    zero: int = 1
    optimizer: str = "adamw"
    recompute: str = "auto"
    tile: str | int = "auto"
    offload: str = "off"
    accumulate: int = 1


@dataclass(frozen=True)
class Point:
    """A rank's step at one number of ranks and one length.

    peak_bytes          of all that is on the device; the sum of `breakdown_bytes`
    state_bytes         parameters, all gradients and optimizer state, which no length changes
    host_bytes          in the machine's memory: optimizer state and offloaded values
    moved_bytes         received from other ranks; `host_moved_bytes` to and from host memory
    recomputed_flops    of `flops`, those of matmuls and attention that backward recomputes
    seconds             of forward and backward at the rates of the device's data sheet, which nobody has measured
    fits                the peak and the reserve are within memory
    problem             why it was refused; then the figures are those of the least that it would need
    """

    sp: int
    seq: int
    peak_bytes: int
    peak_at: str
    breakdown_bytes: dict[str, int]
    state_bytes: int
    host_bytes: int
    moved_bytes: int
    host_moved_bytes: int
    flops: int
    recomputed_flops: int
    seconds: float
    fits: bool
    problem: str = ""
    max_seq: int | None = None


@dataclass(frozen=True)
class Asked:
    """What to plan: a model file, sequences of a step, options of build_model, and what for."""

    model: Path
    batch_size: int
    options: Mapping[str, object]
    setting: Setting


def sweep(asked: Asked, sps: Sequence[int], seqs: Sequence[int], search: bool = False, jobs: int = 1) -> list[Point]:
    """A point for every number of ranks and length, by ranks; with `search` also the longest that fits, of each.

    `max_seq` is the longest for a point's number of ranks, 0 where none fits. A model is captured once a length;
    lengths, and in a search numbers of ranks, are shared out over `jobs` processes. Raises BuildError.
    """
    with _processes(min(jobs, max(len(seqs), len(sps) * search))) as run:
        by_length = list(run(partial(_points, asked, sps), seqs))
        rows = [[points[at] for points in by_length] for at in range(len(sps))]
        if search:
            longest_points = run(partial(_longest, asked), rows)
            rows = [_with_longest(points, found) for points, found in zip(rows, longest_points)]
    return [point for points in rows for point in points]


@contextmanager
def _processes(jobs: int) -> Iterator[Callable]:
    """A map over so many processes, or over none of its own."""
    if jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield pool.map


def _points(asked: Asked, sps: Sequence[int], seq: int) -> list[Point]:
    planner = Planner(asked)
    return [planner.point(sp, seq) for sp in sps]


def _longest(asked: Asked, points: Sequence[Point]) -> Point | None:
    """The longest that fits on the ranks of these points, which are known."""
    return Planner(asked).longest({point.seq: point for point in points})


def _with_longest(points: Sequence[Point], found: Point | None) -> list[Point]:
    known = {point.seq: point for point in points} | ({} if found is None else {found.seq: found})
    return [replace(known[seq], max_seq=found.seq if found else 0) for seq in sorted(known)]


class Planner:
    """Plans one model; what was captured is kept."""

    def __init__(self, asked: Asked):
        self.asked, self.setting = asked, asked.setting
        self.model_file = read_model_file(asked.model)
        self.model = make_model(self.model_file, asked.options, weights=False)
        self.captured = cache(self._captured)

    def _captured(self, seq: int) -> tuple[Program, dict[str, int]]:
        batch, sequence_dims = make_batch(self.model_file, self.asked.batch_size, seq)
        whole = capture_model(Subject(self.model, batch, self.setting.device.kind)).whole
        return whole, sequence_dims

    def longest(self, known: dict[int, Point]) -> Point | None:
        """The longest sequence that fits, from points of one number of ranks that are known; None where none does."""
        first = next(iter(known.values()))
        room = self.setting.memory_bytes - self.setting.reserve_bytes
        fixed = first.state_bytes

        def need(seq: int) -> int:
            """What a length needs; twice the room for one that the model refuses, so that half of it is asked next."""
            try:
                known[seq] = known.get(seq) or self.point(first.sp, seq)
            except BuildError:
                return 2 * room - fixed
            return known[seq].peak_bytes if known[seq].fits else max(known[seq].peak_bytes, room + 1)

        start = max((seq for seq, point in known.items() if point.fits), default=first.seq)
        return known.get(longest(need, room, fixed, start)) if fixed < room else None

    def point(self, sp: int, seq: int) -> Point:
        """The plan of one point. Raises BuildError for what no budget would change."""
        setting, (whole, sequence_dims) = self.setting, self.captured(seq)
        state = training_state(whole, setting.optimizer, setting.zero, sp * setting.dp, setting.accumulate)
        available = setting.memory_bytes - setting.reserve_bytes
        budget = max(available - state.optimizer, 1)
        chooses = "auto" in (setting.recompute, setting.offload)
        config = BuildConfig(sp, setting.device.kind, setting.recompute, False, budget if chooses else None,
                             setting.tile, setting.offload, setting.device)  # fmt: skip
        problem = ""
        try:
            program = compile_program(whole, sequence_dims, config).program
        except BudgetTooSmall as error:
            problem, program = str(error), error.least
        taken, parts = costs(program, setting.device.kind), breakdown(program, state, setting.device.kind)
        peak, moved_bytes = sum(parts.values()), sum(moved.received_bytes for moved in taken.moved)
        traffic = traffic_bytes(program)
        seconds = step_seconds(setting.device, taken.flops, traffic, moved_bytes, taken.host_moved_bytes)
        return Point(
            sp, seq, peak, taken.peak_at, parts, state.parameters + state.gradients + state.optimizer,
            state.host_bytes + taken.host_bytes, moved_bytes, taken.host_moved_bytes, taken.flops,
            taken.recomputed_flops, seconds,
            fits=peak <= available and not problem, problem=problem,
        )  # fmt: skip


def traffic_bytes(program: Program, rank: int = 0) -> int:
    """What the operators of a rank read and write, views apart: no two operators share a pass over memory."""
    values, count = program.values(), 0
    for instr in (instr for section in program.sections for instr in section.instrs):
        calls, tiles = (instr.body.instrs, instr.body.tiles) if instr.body else ((instr,), 1)
        made = values_of(calls)
        for call in calls:
            waits = call.op in STRUCTURE and STRUCTURE[call.op].awaits
            if call.op != FREE and not waits and not makes_view(call.op):
                names = (*call.refs(), *values_of([call]))
                boxes = (made[n].nbytes(rank * tiles) if n in made else values[n].nbytes(rank) for n in names)
                count += tiles * sum(boxes)
    return count
