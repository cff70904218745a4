"""The executor: a loop over one rank's instructions, prepared once.

A section runs as a generator. Where the ranks have to meet it yields an `Exchange` or a `Sum` and is sent the answer,
so the same code runs over torch.distributed (`comm`) and in one process (`simulate`).
"""

from collections.abc import Callable, Generator, Mapping

import torch
from torch import Tensor

from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir import operators
from autosp_aot.ir.operators import DTYPES, wide
from autosp_aot.ir.placement import PARTIAL
from autosp_aot.ir.program import Body, Dtype, Instr, Program, Ref, Section, Value, map_args, map_instr, values_of
from autosp_aot.ir.structure.record import Action, Answer, At, Meeting
from autosp_aot.ir.structure.table import STRUCTURE
from autosp_aot.ir.transfers import narrowed, places_of_tile
from autosp_aot.ops.table import OURS
from autosp_aot.runtime.host_pool import Host

SectionRun = Generator[Meeting, Answer, dict[str, Tensor]]


class Executor:
    """One rank's program, ready to run on a device.

    `program` has every number filled in (`Program.for_rank`). Operators were checked when the artifact was loaded.
    Where `traced`, what is called does not depend on values (`OwnOp.traced`). A program that was not laid out for
    this device's kernels (the unsharded one, one of another target) is run with `copying`: what they demand is copied.
    """

    def __init__(
        self, program: Program, rank: int, device: torch.device, traced: bool = False, copying: bool = False
    ):
        self.program, self.rank, self.device, self.traced, self.copying = program, rank, device, traced, copying
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
            if instr.body is not None:
                steps.append(self._tiles(instr, instr.body))
            elif instr.op in STRUCTURE:
                steps.append(self._structural(instr, self.values, self.rank))
            else:
                steps.append(self._call(instr))
        return steps

    def _structural(self, instr: Instr, values: Mapping[str, Value], box: int) -> Action:
        execute, at = STRUCTURE[instr.op].execute, At(self.rank, self.program.ranks, box)
        assert execute is not None, "what has a body is done in tiles"
        return execute(instr, [values[name] for name in instr.refs()], instr.values(), at, self.host)

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
            own, target = OURS[op], self.device.type
            if self.copying:
                return lambda *args, **keywords: own.kernel(*own.laid_out(args, keywords, target), **keywords)
            return self.traced and own.traced or own.kernel
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
        if instr.op in STRUCTURE:
            return [self._structural(instr, values, self.rank * len(tiles) + tile) for tile in tiles]
        own = [map_instr(instr, lambda n: n.values[tile]) for tile in tiles]
        return [self._call(instr)] * len(tiles) if own[0] is instr else [self._call(i) for i in own]


def _failed(instr: Instr, error: Exception) -> ArtifactError:
    outs = ", ".join(out.name for out in instr.values())
    why = next(iter(str(error).splitlines()), "")
    return ArtifactError(Problem(
        "instruction-failed", f"{outs} = {instr.op}(...) cannot be computed", instr.where.source,
        f"{type(error).__name__}: {why}", "correct what it reads: ids, labels and positions have to be in range"
    ))  # fmt: skip


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


def _holds_ref(arg: tuple) -> bool:
    return any(isinstance(item, Ref) for item in arg)
