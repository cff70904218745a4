"""The difference of two artifacts: first what changed in meaning, then the text of the programs."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from autosp_aot.artifact.manifest import CHECKPOINT, EVALUATE, RANKS, STEP, Manifest, ProgramFacts, file_of
from autosp_aot.artifact.read import read_bodies, read_manifest
from autosp_aot.ir.program import RECOMPUTED, Section, instrs_of
from autosp_aot.ir.structure.table import FREE, meets

Sections = tuple[Section, ...]

CONTEXT_LINES = 2
TEXT_LINES = 400


@dataclass(frozen=True)
class Comparison:
    """`meaning` are changes in words, most important first; `text` has them and a unified diff of the programs."""

    same: bool
    meaning: tuple[str, ...]
    text: str

    @property
    def as_json(self) -> dict:
        return asdict(self)


def compare(path_a: str | Path, path_b: str | Path) -> Comparison:
    """Compare two artifacts. Raises ArtifactError where one cannot be read."""
    a, b = read_manifest(path_a), read_manifest(path_b)
    if a == b:
        return Comparison(True, (), "the same")
    kinds = [kind for kind in (STEP, EVALUATE) if kind in a.programs and kind in b.programs]
    first, second = _by_rank(path_a, a, kinds), _by_rank(path_b, b, kinds)
    facts = [(file_of(kind, ""), a.programs[kind], b.programs[kind]) for kind in kinds]
    of_all = lambda said: (line for both in facts for line in said(*both))  # noqa: E731
    meaning = [
        *_versions(a, b),
        *_build(a, b),
        *_counts("collective", _collectives, first, second),
        *of_all(_bytes_moved),
        *_counts("values recomputed", _recomputed, first, second),
        *of_all(_costs),
        *of_all(_fallbacks),
        *_counts("operator", _operators, first, second),
        *of_all(_decisions),
        *_files(a, b),
    ]
    diff = _text_diff(Path(path_a), Path(path_b), a, b, kinds)
    return Comparison(False, tuple(meaning), "\n".join([*meaning, "", *diff] if diff else meaning))


def _by_rank(path: str | Path, manifest: Manifest, kinds: Iterable[str]) -> list[Sections]:
    """The sections of each rank's programs; what is counted here does not depend on the constants."""
    found: list[Sections] = [()] * manifest.ranks
    for kind in kinds:
        for ranks, program in read_bodies(path, manifest, kind):
            for rank in ranks:
                found[rank] += program.sections
    return found


# --- what changed in meaning --------------------------------------------------------------------------------------


def _versions(a: Manifest, b: Manifest) -> list[str]:
    return [f"made by another {name}: {old} -> {new}" for name, old, new in _changed(a.versions, b.versions)]


def _build(a: Manifest, b: Manifest) -> list[str]:
    said = []
    said += [f"{what}: {old} -> {new}" for what, old, new in _changed(asdict(a.config), asdict(b.config))]
    for what in ("sequence_dims", "aliases"):
        if getattr(a, what) != getattr(b, what):
            said.append(f"{what}: {getattr(a, what)} -> {getattr(b, what)}")
    for what in ("batch", "parameters", "buffers"):
        specs = [{s.name: f"{s.dtype}{list(s.shape)}" for s in getattr(manifest, what)} for manifest in (a, b)]
        said += _layers_once(f"{what} {name}: {old} -> {new}" for name, old, new in _changed(*specs))
    said += _layers_once(f"no longer trained: {name}" for name in a.trainable if name not in b.trainable)
    said += _layers_once(f"now trained: {name}" for name in b.trainable if name not in a.trainable)
    if a.source != b.source:
        said.append("built from another model file, or with other options")
    return said


def _layers_once(lines: Iterable[str]) -> list[str]:
    """Lines that are alike but for the number of the layer, once: `blocks.*.norm.weight ... (x32)`."""
    alike: dict[str, list[str]] = {}
    for line in lines:
        alike.setdefault(re.sub(r"\.\d+\.", ".*.", line), []).append(line)
    return [same[0] if len(same) == 1 else f"{said} (x{len(same)})" for said, same in alike.items()]


def _counts(what: str, count, first: list[Sections], second: list[Sections]) -> list[str]:
    """Counts that changed, each with the ranks it changed on unless that is all."""
    ranks: dict[str, list[int]] = {}
    for rank, (a, b) in enumerate(zip(first, second)):
        for key, old, new in _changed(count(a), count(b)):
            ranks.setdefault(f"{what}{key}: {old or 0} -> {new or 0}", []).append(rank)
    every = min(len(first), len(second))
    return [said if len(on) == every else f"{said} on rank {', '.join(map(str, on))}" for said, on in ranks.items()]


def _collectives(sections: Sections) -> Counter[str]:
    return Counter(
        f" {instr.op} of {instr.values()[0].dtype} in {section.name}"
        for section in sections
        for instr in section.instrs
        if meets(instr.op)
    )


def _recomputed(sections: Sections) -> Counter[str]:
    names = (out.name for instr in instrs_of(sections) for out in instr.values())
    return Counter("" for name in names if name.startswith(RECOMPUTED))


def _operators(sections: Sections) -> Counter[str]:
    calls = ((section.name, instr.op) for section in sections for instr in section.instrs)
    return Counter(f" {op} in {section}" for section, op in calls if op != FREE and not meets(op))


def _bytes_moved(_: str, a: ProgramFacts, b: ProgramFacts) -> list[str]:
    rows = [
        {f"{row.op} in {row.section}": row.received_bytes for row in said.costs.moved} for said in (a, b)
    ]
    return [f"bytes received by {key}: {_numbers(old or 0, new or 0)}" for key, old, new in _changed(*rows)]


def _costs(kind: str, a: ProgramFacts, b: ProgramFacts) -> list[str]:
    names = ("recomputed_flops", "peak_bytes", "peak_at", "kept_bytes", "flops")
    costs = [{kind + name: getattr(said.costs, name) for name in names} for said in (a, b)]
    return [f"{name}: {_numbers(old, new)}" for name, old, new in _changed(*costs)]


def _fallbacks(kind: str, a: ProgramFacts, b: ProgramFacts) -> list[str]:
    counts = [Counter(f"{kind}{f.op} ({f.source})" for f in said.fallbacks) for said in (a, b)]
    return [f"computed on every rank: {key} {old or 0} -> {new or 0}" for key, old, new in _changed(*counts)]


def _decisions(kind: str, a: ProgramFacts, b: ProgramFacts) -> list[str]:
    changed = list(_changed(a.decisions, b.decisions))
    if not changed:
        return []
    name, old, new = changed[0]
    return [f"sharded differently: {len(changed)} values, the first {kind}{name}: {old} -> {new}"]


def _files(a: Manifest, b: Manifest) -> list[str]:
    names = [name for name, _, _ in _changed(a.files, b.files)]
    return [f"files that differ: {', '.join(names)}"] if names else []


def _changed(a: dict, b: dict) -> Iterator[tuple[str, object, object]]:
    """Keys whose values differ, with both values; None where there is none."""
    for key in (*a, *(key for key in b if key not in a)):
        if a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def _numbers(old, new) -> str:
    grown = f" ({(new - old) / old:+.1%})" if isinstance(old, int) and old else ""
    return f"{old} -> {new}{grown}"


# --- text ---------------------------------------------------------------------------------------------------------


def _text_diff(path_a: Path, path_b: Path, a: Manifest, b: Manifest, kinds: Sequence[str]) -> list[str]:
    """Unified diffs of the bodies that ranks run, each pair once, of tables of constants, and of checkpoint.json."""
    tables = [file_of(kind, RANKS) for kind in kinds]
    bodies = lambda path, table: [entry["body"] for entry in json.loads((path / table).read_text())]  # noqa: E731
    pairs = [pair for table in tables for pair in zip(bodies(path_a, table), bodies(path_b, table))]
    lines: list[str] = []
    for first, second in dict.fromkeys([*pairs, *zip(tables, tables), (CHECKPOINT, CHECKPOINT)]):
        if a.files[first] != b.files[second]:
            before, after = (path_a / first).read_text().splitlines(), (path_b / second).read_text().splitlines()
            diff = difflib.unified_diff(before, after, f"a/{first}", f"b/{second}", lineterm="", n=CONTEXT_LINES)
            lines += _folded(list(diff))
    if len(lines) > TEXT_LINES:
        return [*lines[:TEXT_LINES], f"... and {len(lines) - TEXT_LINES} lines more"]
    return lines


def _folded(diff: list[str]) -> list[str]:
    """The diff with hunks that are alike but for numbers, as those of equal layers are, shown once."""
    hunks: list[list[str]] = [[]]
    for line in diff:
        if line.startswith("@@"):
            hunks.append([])
        hunks[-1].append(line)
    head, *hunks = hunks
    alike: dict[str, list[list[str]]] = {}
    for hunk in hunks:
        alike.setdefault(re.sub(r"\d+", "0", "\n".join(hunk[1:])), []).append(hunk)
    lines = head
    for first, *more in alike.values():
        lines += first
        if more:
            lines.append(f"  ... and {len(more)} more that differ from it in numbers only")
    return lines
