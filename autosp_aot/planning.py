"""What a step of a model would take on a rank, at every number of ranks and every length asked for.

    peak = parameters + optimizer + most of (gradients so far, kept activations, working set, communication) at one time

Gradients are values of the program: they come to life through backward and are all there at its end, which is when the
optimizer runs, so the last moment of the curve is the optimizer's. The breakdown is that of the moment of the peak.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from autosp_aot.builder import capture_model
from autosp_aot.config import BuildConfig
from autosp_aot.cost import costs
from autosp_aot.errors import BuildError
from autosp_aot.export.model_file import make_batch, make_model, read_model_file
from autosp_aot.longest import longest
from autosp_aot.operators import FREE, overload
from autosp_aot.passes.pipeline import compile_program
from autosp_aot.program import Program, values_of
from autosp_aot.state import training_state
from autosp_aot.targets import Device, step_seconds
from autosp_aot.timeline import breakdown


@dataclass(frozen=True)
class Setting:
    """What a plan is made for.

    memory_bytes    of the device; `reserve_bytes` of it are left to the driver, the allocator and everything else
    dp              how many groups of sp ranks share the optimizer's state under ZeRO 1, each with its own sequences
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


@dataclass(frozen=True)
class Point:
    """A rank's step at one number of ranks and one length.

    peak_bytes          of all that is on the device; the sum of `breakdown_bytes`
    host_bytes          in the machine's memory: optimizer state and offloaded values
    moved_bytes         received from other ranks; `host_moved_bytes` to and from host memory
    recomputed_flops    of `flops`, those of products that backward computes again
    seconds             of forward and backward at the rates of the device's data sheet, which nobody has measured
    fits                the peak and the reserve are within memory
    problem             why it was refused; then the figures are those of the least that it would need
    """

    sp: int
    seq: int
    peak_bytes: int
    peak_at: str
    breakdown_bytes: dict[str, int]
    host_bytes: int
    moved_bytes: int
    host_moved_bytes: int
    flops: int
    recomputed_flops: int
    seconds: float
    fits: bool
    problem: str = ""
    max_seq: int | None = None


class Planner:
    """Plans a model: captured once a length, compiled once a length and number of ranks."""

    def __init__(self, model_path: str | Path, batch_size: int, options: Mapping[str, object], setting: Setting):
        self.setting, self.batch_size = setting, batch_size
        self.model_file = read_model_file(model_path)
        self.model = make_model(self.model_file, options)
        self.captured = cache(self._captured)
        self.point = cache(self._point)

    def sweep(self, sps: Sequence[int], seqs: Sequence[int], search: bool = False) -> list[Point]:
        """A point for every number of ranks and length, by ranks; with `search` also that of the longest that fits.

        `max_seq` of each is then the longest for its number of ranks, 0 where none fits.
        """
        points = []
        for sp in sps:
            found = {seq: self.point(sp, seq) for seq in seqs}
            max_seq = self.longest(sp, list(found.values())) if search else None
            if max_seq:
                found[max_seq] = self.point(sp, max_seq)
            points += [replace(found[seq], max_seq=max_seq) for seq in sorted(found)]
        return points

    def longest(self, sp: int, points: Sequence[Point]) -> int:
        """The longest sequence that fits, searched from what is known."""
        setting, (whole, _) = self.setting, self.captured(points[0].seq)
        state = training_state(whole, setting.optimizer, setting.zero, sp * setting.dp)
        room = setting.memory_bytes - setting.reserve_bytes
        fixed = state.parameters + state.gradients + state.optimizer

        def need(seq: int) -> int:
            """What a length needs; twice the room for one that the model refuses, so that half of it is asked next."""
            try:
                point = self.point(sp, seq)
            except BuildError:
                return 2 * room - fixed
            return point.peak_bytes if point.fits else max(point.peak_bytes, room + 1)

        start = max((point.seq for point in points if point.fits), default=points[0].seq)
        return longest(need, room, fixed, start) if fixed < room else 0

    def _captured(self, seq: int) -> tuple[Program, dict[str, int]]:
        batch, sequence_dims = make_batch(self.model_file, self.batch_size, seq)
        whole, _ = capture_model(self.model, batch, self.setting.device.kind)
        return whole, sequence_dims

    def _point(self, sp: int, seq: int) -> Point:
        """The plan of one point. Raises BuildError for what no budget would change."""
        setting, (whole, sequence_dims) = self.setting, self.captured(seq)
        state = training_state(whole, setting.optimizer, setting.zero, sp * setting.dp)
        available = setting.memory_bytes - setting.reserve_bytes
        budget = max(available - state.optimizer, 1)
        chooses = "auto" in (setting.recompute, setting.offload)
        config = BuildConfig(sp, setting.device.kind, setting.recompute, False, budget if chooses else None,
                             setting.tile, setting.offload)  # fmt: skip
        problem = ""
        try:
            program = compile_program(whole, sequence_dims, config).program
        except BuildError as error:
            if error.problems[0].code != "budget-too-small":
                raise
            problem = str(error)
            program = compile_program(whole, sequence_dims, _least(config)).program
        taken, parts = costs(program), breakdown(program, state)
        peak, moved_bytes = sum(parts.values()), sum(moved.received_bytes for moved in taken.moved)
        host_moved_bytes = 0
        seconds = step_seconds(setting.device, taken.flops, traffic_bytes(program), moved_bytes, host_moved_bytes)
        return Point(sp, seq, peak, taken.peak_at, parts, state.host_bytes, moved_bytes, host_moved_bytes, taken.flops,
                     taken.recomputed_flops, seconds, peak <= available and not problem, problem)  # fmt: skip


def _least(config: BuildConfig) -> BuildConfig:
    """The options that take the least memory of those that were left open."""
    recompute = "full" if config.recompute == "auto" else config.recompute
    offload = "host" if config.offload == "auto" else config.offload
    return replace(config, recompute=recompute, offload=offload, memory_budget_bytes=None)


def traffic_bytes(program: Program, rank: int = 0) -> int:
    """What the operators of a rank read and write, views apart: no two operators share a pass over memory."""
    values, count = program.values(), 0
    for instr in (instr for section in program.sections for instr in section.instrs):
        calls, tiles = (instr.body.instrs, instr.body.tiles) if instr.body else ((instr,), 1)
        made = values_of(calls)
        for call in calls:
            if call.op != FREE and not _view(call.op):
                names = (*call.refs(), *values_of([call]))
                boxes = (made[n].nbytes(rank * tiles) if n in made else values[n].nbytes(rank) for n in names)
                count += tiles * sum(boxes)
    return count


@cache
def _view(op: str) -> bool:
    found = overload(op)
    return found is not None and found._schema.returns[0].alias_info is not None
