"""`autosp-aot explain DIR VALUE`: why a value is placed, moved, saved, recomputed and released.

What is recorded is the strategy of each call. The alternatives and their prices are found by taking those decisions
again over `whole.program`, up to the call in question.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path

from autosp_aot.artifact.manifest import Manifest
from autosp_aot.artifact.read import read_bodies, read_manifest, read_whole
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.ir.fold_names import folded
from autosp_aot.ir.placement import Placement
from autosp_aot.ir.program import (
    ITEMSIZE,
    RECOMPUTED,
    TILE,
    Instr,
    PerRank,
    Program,
    Ref,
    Value,
    map_ints,
    stands_for,
    values_of,
)
from autosp_aot.ir.structure.table import FREE, copies, meets, moves, to_host
from autosp_aot.ir.transfers import received_bytes
from autosp_aot.ir.units import bytes_text
from autosp_aot.memory.costs import flops, heaviest
from autosp_aot.ops.table import is_quadratic
from autosp_aot.passes import decisions
from autosp_aot.passes.analysis.segments import segments
from autosp_aot.passes.keep.policy import Keep, reasons
from autosp_aot.passes.partition import Candidate, Weighed, weigh
from autosp_aot.passes.pipeline import pipeline
from autosp_aot.passes.step import Step
from autosp_aot.sharding.describe import (
    call_text,
    factors_text,
    placement_text,
    rule_text,
    strategy_text,
    type_text,
)

LISTED = 20
CHOICES = 8
READERS = 4


@dataclass(frozen=True)
class Explanation:
    """What is to be said of a value: lines under headings, in order."""

    value: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def text(self) -> str:
        lines = [self.value]
        for heading, said in self.rows:
            lines += [f"  {heading if at == 0 else '':<12}{line}" for at, line in enumerate(said)]
        return "\n".join(lines)

    @property
    def as_json(self) -> dict:
        return {"value": self.value, **dict(asdict(self)["rows"])}


def explain(path: str | Path, value: str) -> Explanation:
    """Explain a value of an artifact, named in full, by an end of its name that no other value has, or as what the step
    gives (`loss`, `grad.<parameter>`).

    Where several such names differ in the number of a layer only, the first is explained. Raises ArtifactError:
    `no-such-value`, `value-ambiguous` with the candidates, and what reading an artifact raises.
    """
    manifest = read_manifest(path)
    whole = read_whole(path, manifest)
    program = read_bodies(path, manifest)[0][1]
    names = dict.fromkeys((*program.values(), *values_of(program.instrs())))
    given = {label: name for section in program.sections for label, name in section.gives}
    found = [given[value]] if value in given else _resolved(value, list(names), str(path))
    alike = [f"{folded(found)[0]}: the first of {len(found)}, explain another by its whole name"] if found[1:] else []
    rows = ("one of", alike), *_Explainer(manifest, whole, program).rows(found[0])
    return Explanation(found[0], tuple((heading, tuple(lines)) for heading, lines in rows if any(lines)))


def _resolved(text: str, names: list[str], place: str) -> list[str]:
    """The value that is meant, or those of all layers."""
    if text in names:
        return [text]
    found = [name for name in names if name.startswith(text) or name.endswith(text)]
    found = [name for name in found if _rank(name) == min(map(_rank, found))]
    if len(folded(found)) == 1:
        return found
    if found:
        more = f"\nand {len(found) - LISTED} more" if len(found) > LISTED else ""
        why = "\n".join(found[:LISTED]) + more
        raise ArtifactError(Problem("value-ambiguous", f"{len(found)} values begin or end with {text}", place, why,
                                    "give more of the name"))  # fmt: skip
    near = difflib.get_close_matches(text, names, 3)
    why = f"near it: {', '.join(near)}" if near else ""
    raise ArtifactError(Problem("no-such-value", f"no value is named {text}", place, why,
                                "autosp-aot show lists the values"))  # fmt: skip


def _rank(name: str) -> tuple[bool, bool, bool]:
    """What is meant by less than a whole name: values of forward before those of backward, recomputation, tiles."""
    return name.removeprefix(TILE).startswith(RECOMPUTED), name.startswith(TILE), name.startswith("grad.")


@dataclass(frozen=True)
class _Place:
    """The program, or the body of a `tiles` instruction: what is known there, who makes it and who reads it."""

    values: Mapping[str, Value]
    made_by: Mapping[str, Instr]
    readers: Mapping[str, list[Instr]]
    instrs: tuple[Instr, ...]

    @classmethod
    def of(cls, instrs: Iterable[Instr], outer: Mapping[str, Value]) -> "_Place":
        instrs = tuple(instrs)
        readers: dict[str, list[Instr]] = {}
        for instr in instrs:
            for name in dict.fromkeys(instr.refs()):
                if instr.op != FREE:
                    readers.setdefault(name, []).append(instr)
        made_by = {out.name: instr for instr in instrs for out in instr.values()}
        return cls({**outer, **values_of(instrs)}, made_by, readers, instrs)


class _Explainer:
    def __init__(self, manifest: Manifest, whole: Program, program: Program):
        self.manifest, self.whole, self.program = manifest, whole, program
        self.inputs = {entry.value.name: entry.kind for entry in program.inputs}
        instrs = (instr for section in program.sections for instr in section.instrs)
        self.place = _Place.of(instrs, program.values())
        self.values, self.made_by, self.readers = self.place.values, self.place.made_by, self.place.readers

    def rows(self, name: str) -> Iterator[tuple[str, list[str]]]:
        return self.outside(name) if name in self.values else self.inside(name)

    def inside(self, name: str) -> Iterator[tuple[str, list[str]]]:
        """Of a value that only the tiles of one instruction know: the first that makes it."""
        tiles, body = next((i, i.body) for i in self.place.instrs if i.body and name in values_of(i.body.instrs))
        place, means = _Place.of(body.instrs, self.values), stands_for(name)
        instr, value = place.made_by[name], place.values[name]
        yield from self.maker(instr, value, place.values)
        yield "tiles", [f"{body.tiles} a rank, one after the other, for {_some([*values_of([tiles])])}"]
        yield "placed", [placement_text(value.placement, "tile")]
        yield "stands for", [f"a tile's {'partial sum' if value.placement.partial else 'part'} of {means}"]
        if not moves(instr.op) and means in self.whole.values():
            yield from self.choice(means, None)
        yield "read by", [_some([_first(reader) for reader in place.readers.get(name, [])])]
        yield "gives", [out.name for out, inner in zip(tiles.values(), body.gives) if inner == name]
        after = _last_before_release(place.instrs, name)
        yield "released", [f"in each tile after {after}"] if after else []

    def outside(self, name: str) -> Iterator[tuple[str, list[str]]]:
        value, instr = self.values[name], self.made_by.get(name)
        if instr is None:
            yield "is", [f"the {self.inputs[name]} {type_text(value)}, given whole to every rank"]
        else:
            yield from self.maker(instr, value, self.values)
        yield "placed", [placement_text(value.placement)]
        if name.startswith(RECOMPUTED):
            yield "again", [f"{name.removeprefix(RECOMPUTED)}, recomputed for backward; explain that for the rest"]
        elif instr is not None and moves(instr.op):
            yield "moved from", [self.received(name, instr)]
            yield "because", [f"{_first(reader)} reads it so" for reader in self.readers.get(name, [])[:READERS]]
        elif instr is not None and copies(instr.op):
            yield "copy of", [f"{instr.refs()[0]}, to host memory or back; explain what it was made of for the rest"]
        elif instr is not None:
            yield from self.choice(stands_for(name), value.placement)
        yield "moves", list(self.moves(name))
        yield "read by", [_some([_first(i) for i in self.readers.get(name, []) if not moves(i.op)])]
        yield "backward", list(self.backward(name))
        yield "released", [self.released(name)]

    def maker(self, instr: Instr, value: Value, values: Mapping[str, Value]) -> Iterator[tuple[str, list[str]]]:
        """The call, in tiles that of a tile; where it comes from, and what it makes."""
        if instr.body is None:
            yield "made by", [call_text(instr, values)]
        else:
            yield "made by", [f"{call_text(instr, values)} in {instr.body.tiles}"]
            inner = _Place.of(instr.body.instrs, values)
            gives = dict(zip((out.name for out in instr.values()), instr.body.gives))
            instr = inner.made_by[gives[value.name]]
            yield "in a tile", [call_text(instr, inner.values)]
        yield "at", [" in ".join(part for part in (instr.where.source, instr.where.module) if part)]
        yield "is", [type_text(value)]

    def choice(self, meaning: str, placement: Placement | None) -> Iterator[tuple[str, list[str]]]:
        """Label, rule, the strategy taken, which gives `placement` unless that is None, and the others."""
        taken = decisions.read(self.manifest.step.cuts, self.manifest.step.decisions)
        found = weigh(self.whole, self.manifest.sequence_dims, self.manifest.ranks, taken, meaning)
        made = next(i for i in self.whole.instrs() if any(out.name == meaning for out in i.values()))
        placed = dict(zip((out.name for out in made.values()), found.taken.results))
        if placement not in (None, placed[meaning]):
            why = "taken again, the decisions of the manifest shard it differently than the program"
            raise decisions.decision_wrong(meaning, why)
        labels = found.labels.by_value.get(meaning, ())
        yield "sequence", [f"along dim {at.dim}: {at.extent} positions{_parts(at)}" for at in labels] or ["none in it"]
        if found.spec is None:
            operands = found.taken.received_bytes
            yield "rule", ["none for this operator: every rank computes all of it, from whole operands"]
            yield "cost", [f"gathers {bytes_text(operands)} on the worst rank"]
            return
        yield "rule", [rule_text(found.spec), factors_text(found.spec)]
        yield "taken", [_priced(found, found.taken)]
        others = [choice for choice in found.choices if choice != found.taken]
        if found.small:
            yield "others", ["none considered: what follows from ids and positions alone is the whole on every rank"]
        else:
            shown = [_priced(found, choice) for choice in others[:CHOICES]]
            more = [f"and {len(others) - CHOICES} more"] if len(others) > CHOICES else []
            yield "others", shown + more or ["none that the rule allows"]

    def moves(self, name: str) -> Iterator[str]:
        """Every move of the value, and on from where it was moved to."""
        for instr in self.readers.get(name, []):
            if moves(instr.op):
                out = next(out for ref, out in zip(instr.args, instr.values()) if ref == Ref(name))
                readers = _some([_first(reader) for reader in self.readers.get(out.name, [])])
                yield f"{self.received(out.name, instr)}, for {readers or 'the result'}"

    def received(self, name: str, instr: Instr) -> str:
        """A move in words: `all_to_all to Shard(1), 4.00 KiB received by the worst rank`."""
        at = [out.name for out in instr.values()].index(name)
        source, target = self.values[instr.args[at].name], self.values[name]
        bytes_ = received_bytes(source.placement, target.placement, source.whole_shape, ITEMSIZE[source.dtype],
                                self.program.ranks)  # fmt: skip
        to = placement_text(target.placement).partition(":")[0]
        return f"{source.name} by {instr.op} to {to}, {bytes_text(bytes_)} received by the worst rank"

    def backward(self, name: str) -> Iterator[str]:
        """Saved or recomputed, and why."""
        forward, backward = self.program.section("forward"), self.program.section("backward")
        made_here = any(out.name == name for instr in forward.instrs for out in instr.values())
        if not made_here or copies(self.made_by[name].op):
            return
        largest = map_ints(self.program, lambda n: max(n.values) if isinstance(n, PerRank) else n).values()
        away = any(to_host(reader.op) for reader in self.readers.get(name, []))
        if name in backward.takes or away:
            why = "nothing is recomputed" if self.manifest.config.recompute == "none" else self.kept()[name]
            place = "saved in host memory" if away else "saved"
            yield f"{place}, {bytes_text(largest[name].nbytes())} on the rank with the most: {why}"
        elif (again := RECOMPUTED + name) in self.values:
            operands = _some([ref for ref in self.made_by[again].refs() if ref not in self.inputs])
            yield f"recomputed: {self.price(name)}"
            yield f"from {operands or 'inputs'}, for {_some([_first(i) for i in self.readers[again]])}"
        else:
            yield "does not need it"

    def price(self, name: str) -> str:
        """What it takes to recompute a value of forward."""
        instr = self.made_by[name]
        if meets(instr.op):
            return f"not saved under this plan, so repeats {self.received(name, instr)}"
        if is_quadratic(instr.op):
            count = flops(instr, self.values, heaviest(self.program))
            return f"not saved under this plan, so repeats attention's {count:.3g} FLOPs on the rank with the most"
        return "its cost is linear in the sequence, and it follows from what is saved"

    def kept(self) -> dict[str, str]:
        taken = decisions.read(self.manifest.step.cuts, self.manifest.step.decisions)
        step = Step(self.whole, self.whole, self.manifest.sequence_dims)
        for run in takewhile(lambda one: not isinstance(one, Keep), pipeline(self.manifest.config, taken)):
            step = run(step)
        return reasons(replace(step, segments=segments(step.program)))

    def released(self, name: str) -> str:
        for section in self.program.sections:
            if after := _last_before_release(section.instrs, name):
                return f"in {section.name} after {after}"
        given = [label for section in self.program.sections for label, given in section.gives if given == name]
        return f"never: it is {', '.join(dict.fromkeys(given)) or 'an input'}"


def _last_before_release(instrs: Iterable[Instr], name: str) -> str | None:
    """What is made last before a value is released; None where none of these instructions does."""
    last = "the beginning"
    for instr in instrs:
        if instr.op == FREE and Ref(name) in instr.args:
            return last
        last = _first(instr) if instr.values() else last
    return None


def _priced(found: Weighed, choice: Candidate) -> str:
    said = strategy_text(found.spec, choice.strategy)
    if any(placement.partial for placement in choice.results):
        said += ", the result a partial sum"
    received, home, work = map(bytes_text, (choice.received_bytes, choice.home_bytes, choice.work))
    total = f"{bytes_text(choice.price[1])} = {received} received + {home} to reshard results + {work} for local work"
    return f"{said}: {total}" + ("; gathers, so the last resort" if choice.gathers else "")


def _parts(label) -> str:
    outer = f" in each of {label.outer} parts" if label.outer != 1 else ""
    return outer + (f", {label.inner} elements each" if label.inner != 1 else "")


def _first(instr: Instr) -> str:
    return instr.values()[0].name


def _some(names: list[str]) -> str:
    more = f" and {len(names) - READERS} more" if len(names) > READERS else ""
    return ", ".join(names[:READERS]) + more
