"""The executor: a loop over one rank's instructions, prepared once.

A section runs as a generator. Where the ranks have to meet it yields an `Exchange` or a `Sum` and is sent the answer,
so the same code runs over torch.distributed (`groups`) and in one process (`simulate`).
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir import operators
from autosp_aot.ir.operators import DTYPES, wide
from autosp_aot.ir.placement import PARTIAL
from autosp_aot.ir.program import Body, Dtype, Instr, Program, Ref, Section, Value, map_args, map_instr, values_of
from autosp_aot.ir.transfers import Move, Shard, join_into, narrowed, places_of_tile
from autosp_aot.ops.table import OURS
from autosp_aot.runtime.host_pool import Host


@dataclass(frozen=True)
class Exchange:
    """Send `buffer` (1-D) split by `send_sizes` to the ranks in order; the answer holds what they send, in order."""

    buffer: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]


@dataclass(frozen=True)
class Sum:
    """Add `buffer` (1-D) over all ranks; the answer is the total."""

    buffer: Tensor


# An answer comes as a list of one, which is taken out of it: so nothing else keeps its memory.
Meeting = Exchange | Sum
# What is sent at first is None, and then what the ranks made of each meeting: a list of one, for it to be taken out.
Answer = list[Tensor] | None
SectionRun = Generator[Meeting, Answer, dict[str, Tensor]]
# An instruction over the values; one where ranks meet is a generator.
Action = Callable[[dict[str, Tensor]], Generator[Meeting, Answer, None] | None]


class Executor:
    """One rank's program, ready to run on a device.

    `program` has every number filled in (`Program.for_rank`). Operators were checked when the artifact was loaded.
    Where `traced`, what is called does not depend on values (`OwnOp.traced`).
    """

    def __init__(self, program: Program, rank: int, device: torch.device, traced: bool = False):
        self.program, self.rank, self.device, self.traced = program, rank, device, traced
        self.values = program.values()
        self.host = Host(program, device)
        self.steps = {section.name: self._prepare(section) for section in program.sections}
        self.gives = {section.name: section.gives for section in program.sections}

    def run(self, section: str, values: dict[str, Tensor]) -> SectionRun:
        """Run a section over `values` (by name; it adds to them and releases from them); its results by label.

        Raises ArtifactError (`instruction-failed`) where torch refuses an instruction, as for an id beyond a table.
        """
        at = 0
        try:
            for at, step in enumerate(self.steps[section]):
                meetings = step(values)
                if meetings is not None:
                    yield from meetings
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise _failed(self.program.section(section).instrs[at], error) from error
        return {label: values[name] for label, name in self.gives[section]}

    def _prepare(self, section: Section) -> list[Action]:
        steps: list[Action] = []
        for instr in section.instrs:
            if instr.op == operators.FREE:
                steps.append(_free([ref.name for ref in instr.args]))
            elif instr.op == "all_reduce":
                steps.append(self._all_reduce(instr))
            elif instr.body is not None:
                steps.append(self._tiles(instr, instr.body))
            elif instr.op in operators.COPIES:
                steps.append(self.host.step(instr))
            elif instr.op in operators.MOVES:
                steps.append(self._move(instr))
            else:
                steps.append(self._call(instr))
        return steps

    def _call(self, instr: Instr) -> Action:
        own, function = OURS.get(instr.op), self._function(instr.op)
        constant = lambda leaf: DTYPES[leaf.name] if isinstance(leaf, Dtype) else leaf  # noqa: E731
        args, kwargs = map_args(instr.args, constant), {k: map_args(v, constant) for k, v in instr.kwargs}
        if instr.op in operators.FACTORIES or (own is not None and own.makes_memory):
            kwargs["device"] = self.device
        slots = [(at, arg.name) for at, arg in enumerate(args) if isinstance(arg, Ref)]
        nested = [(at, arg) for at, arg in enumerate(args) if isinstance(arg, tuple) and _holds_ref(arg)]
        if instr.into is not None:
            function = _writing(instr.op, slots[instr.into][0])
        names = [None if out is None else out.name for out in instr.outs]
        single = names[0] if len(names) == 1 else None

        def step(values: dict[str, Tensor]) -> None:
            filled = list(args)
            for at, name in slots:
                filled[at] = values[name]
            for at, arg in nested:
                filled[at] = [values[ref.name] if isinstance(ref, Ref) else ref for ref in arg]
            result = function(*filled, **kwargs)
            if single is not None:
                values[single] = result if isinstance(result, Tensor) else result[0]
                return
            for out, tensor in zip(names, result):
                if out is not None:
                    values[out] = tensor

        return step

    def _function(self, op: str) -> Callable:
        if op in OURS:
            return self.traced and OURS[op].traced or OURS[op].kernel
        found = operators.overload(op)
        assert found is not None, "operators were checked"
        return found

    def _tiles(self, instr: Instr, body: Body) -> Action:
        """The body of one tile after the other; what they make is copied into the results, or added up."""
        names, outs, gives = instr.refs(), instr.values(), body.gives
        inside = {name: self.values[name] for name in names} | values_of(body.instrs)
        summed = [inside[name].placement == PARTIAL for name in gives]
        tiles = range(body.tiles)
        steps = list(zip(*(self._inner(inner, inside, tiles) for inner in body.instrs)))
        boxes = range(self.rank * len(tiles), (self.rank + 1) * len(tiles))
        parts = [(inside[name], out) for name, out in zip(gives, outs)]
        places = [[places_of_tile(part, out, box, self.rank) for part, out in parts] for box in boxes]

        def step(values: dict[str, Tensor]) -> None:
            results = [_room(out, add, self.device) for out, add in zip(outs, summed)]
            outer = {name: values[name] for name in names}
            for tile in tiles:
                own = dict(outer)
                for inner in steps[tile]:
                    inner(own)
                for result, name, add, boxes in zip(results, gives, summed, places[tile]):
                    if add:
                        result.add_(own[name])
                        continue
                    for source, target in boxes:
                        narrowed(result, target).copy_(narrowed(own[name], source))
                del own
            while results:
                out = outs[-len(results)]
                values[out.name] = results.pop(0).to(DTYPES[out.dtype])

        return step

    def _inner(self, instr: Instr, values: dict[str, Value], tiles: range) -> list[Action]:
        """An instruction of a body, for each tile."""
        if instr.op == operators.FREE:
            return [_free(instr.refs())] * len(tiles)
        if instr.op == "shard":
            source, target = values[instr.refs()[0]], instr.values()[0]
            return [_shard(source, target, self.rank, self.rank * len(tiles) + tile) for tile in tiles]
        own = [map_instr(instr, lambda n: n.values[tile]) for tile in tiles]
        return [self._call(own[0])] * len(tiles) if own[0] == own[-1] == instr else [self._call(i) for i in own]

    def _all_reduce(self, instr: Instr) -> Action:
        sources, targets = [ref.name for ref in instr.args], [out.name for out in instr.values()]

        def step(values: dict[str, Tensor]) -> Generator[Meeting, Answer, None]:
            tensors = [values[name] for name in sources]
            answer = yield Sum(_joined(tensors))
            assert answer is not None
            parts = answer.pop().split([t.numel() for t in tensors])
            for name, part, tensor in zip(targets, parts, tensors):
                values[name] = part.to(tensor.dtype).view(tensor.shape)

        return step

    def _move(self, instr: Instr) -> Action:
        (ref,), target = instr.args, instr.values()[0]
        source = self.values[ref.name]
        if instr.op == "shard":
            return _shard(source, target, self.rank, self.rank)
        move = Move(source, target, self.rank, self.program.ranks)

        def step(values: dict[str, Tensor]) -> Generator[Meeting, Answer, None]:
            answer = yield Exchange(move.pack(values[source.name]), move.send_sizes, move.receive_sizes)
            assert answer is not None
            values[target.name] = move.unpack(answer.pop())

        return step


def _failed(instr: Instr, error: Exception) -> ArtifactError:
    outs = ", ".join(out.name for out in instr.values())
    why = next(iter(str(error).splitlines()), "")
    return ArtifactError(Problem(
        "instruction-failed", f"{outs} = {instr.op}(...) cannot be computed", instr.where.source,
        f"{type(error).__name__}: {why}", "correct what it reads: ids, labels and positions have to be in range"
    ))  # fmt: skip


def _shard(source: Value, target: Value, rank: int, box: int) -> Action:
    shard = Shard(source, target, rank, box)
    return lambda values: values.update({target.name: shard(values[source.name])})


def _joined(tensors: list[Tensor]) -> Tensor:
    """A copy of all, one after the other, in the dtype they are added up in."""
    buffer = tensors[0].new_empty(sum(t.numel() for t in tensors), dtype=wide(tensors[0].dtype))
    join_into(buffer, tensors)
    return buffer


def _room(out: Value, add: bool, device: torch.device) -> Tensor:
    """Room for a result of all tiles: zeros in a wide dtype to add partial sums to, or what parts are written into."""
    if add:
        return torch.zeros(out.sizes, dtype=wide(DTYPES[out.dtype]), device=device)
    return torch.empty(out.sizes, dtype=DTYPES[out.dtype], device=device)


def _writing(op: str, at: int) -> Callable[..., Tensor]:
    """An elementwise operator that writes its result into its argument number `at`."""
    found = operators.writer(op)
    assert found is not None, "as verified"
    function, name = found
    return lambda *args, **kwargs: function(*args, **kwargs, **{name: args[at]})


def _free(names: list[str]) -> Action:
    def step(values: dict[str, Tensor]) -> None:
        for name in names:
            del values[name]

    return step


def _holds_ref(arg: tuple) -> bool:
    return any(isinstance(item, Ref) for item in arg)
