"""The difference of two artifacts: first what changed in meaning, then the text of each rank that changed."""

import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from autosp_aot.artifact import Manifest, read_manifest, read_rank
from autosp_aot.collectives import collectives_of
from autosp_aot.program import Program
from autosp_aot.program_text import print_program

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
        return {"same": self.same, "meaning": list(self.meaning), "text": self.text}


def compare(path_a: str | Path, path_b: str | Path) -> Comparison:
    """Compare two artifacts. Raises ArtifactError where one cannot be read."""
    a, b = read_manifest(path_a), read_manifest(path_b)
    meaning = [*_versions(a, b), *_build(a, b)]
    if a.files == b.files and not meaning:
        return Comparison(True, (), "the same")
    diff: list[str] = []
    for rank in range(min(a.ranks, b.ranks)):
        first, second = read_rank(path_a, rank), read_rank(path_b, rank)
        changes = _programs(first, second, rank)
        new = [change for change in changes if change not in meaning]
        meaning += new
        if rank == 0 or new:
            diff += _text(first, second, rank)
    meaning += _costs(a, b)
    if a.decisions != b.decisions:
        changed = sorted(n for n in {*a.decisions, *b.decisions} if a.decisions.get(n) != b.decisions.get(n))
        meaning.append(f"placed otherwise: {len(changed)} values, the first {changed[0]}")
    rest = sorted(n for n in {*a.files, *b.files} if a.files.get(n) != b.files.get(n))
    meaning.append(f"files that differ: {', '.join(rest)}")
    if len(diff) > TEXT_LINES:
        diff = [*diff[:TEXT_LINES], f"... and {len(diff) - TEXT_LINES} lines more"]
    return Comparison(False, tuple(meaning), "\n".join([*meaning, *diff]))


def _versions(a: Manifest, b: Manifest) -> list[str]:
    names = sorted({*a.versions, *b.versions})
    return [
        f"made by another {name}: {a.versions.get(name)} -> {b.versions.get(name)}"
        for name in names
        if a.versions.get(name) != b.versions.get(name)
    ]


def _build(a: Manifest, b: Manifest) -> list[str]:
    return [
        f"{what}: {getattr(a, what)} -> {getattr(b, what)}"
        for what in ("ranks", "target", "recompute", "sequence_dims", "batch", "aliases", "trainable")
        if getattr(a, what) != getattr(b, what)
    ]


def _programs(a: Program, b: Program, rank: int) -> list[str]:
    """Collectives, recomputation and operators of one rank that changed."""
    found = []
    for what, count in (("collective", _collective_counts), ("recomputed", _recomputed_counts), ("operator", _operator_counts)):
        first, second = count(a, rank), count(b, rank)
        for key in sorted({*first, *second}):
            if first[key] != second[key]:
                found.append(f"{what} {key}: {first[key]} -> {second[key]}")
    return found


def _collective_counts(program: Program, rank: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for c in collectives_of(program, rank):
        counts[f"{c.op} {c.dtype} of {sum(c.send_sizes)} elements in {c.section}"] += 1
    return counts


def _recomputed_counts(program: Program, rank: int) -> Counter[str]:
    names = [out.name for instr in program.instrs() for out in instr.values()]
    return Counter("values" for name in names if name.startswith("recompute."))


def _operator_counts(program: Program, rank: int) -> Counter[str]:
    return Counter(f"{instr.op} in {section.name}" for section in program.sections for instr in section.instrs)


def _costs(a: Manifest, b: Manifest) -> list[str]:
    names = ("peak_bytes", "peak_at", "kept_bytes", "flops", "recomputed_flops")
    changed = [f"{name}: {a.costs[name]} -> {b.costs[name]}" for name in names if a.costs[name] != b.costs[name]]
    rows = [{(row["section"], row["op"]): row["received_bytes"] for row in m.costs["moved"]} for m in (a, b)]
    for key in sorted({*rows[0], *rows[1]}):
        before, after = rows[0].get(key, 0), rows[1].get(key, 0)
        if before != after:
            changed.append(f"bytes received by {key[1]} in {key[0]}: {before} -> {after}")
    return changed


def _text(a: Program, b: Program, rank: int) -> list[str]:
    lines = [print_program(program)[0].splitlines() for program in (a, b)]
    return list(difflib.unified_diff(*lines, f"a rank {rank}", f"b rank {rank}", lineterm="", n=CONTEXT_LINES))
