"""Memory breakdown tables: a timeline by section, the peak by value, and layers, equal ones folded."""

import re
from collections import Counter, defaultdict
from itertools import groupby, zip_longest

from autosp_aot.artifact.tables import Rows
from autosp_aot.ir.program import Program, Where
from autosp_aot.ir.units import bytes_text
from autosp_aot.memory.timeline import MEMORY_KINDS, STATE, Timeline

LISTED = 20


def by_section(found: Timeline, parameters: int) -> Rows:
    """Each section's worst moment, by kind."""
    rows: Rows = [("section", "peak", "parameters", *MEMORY_KINDS, "at")]
    for name, group in groupby(enumerate(found.moments), key=lambda entry: entry[1].section):
        at = max((at for at, _ in group), key=lambda at: sum(found.levels[at].values()))
        level = found.levels[at]
        sizes = (parameters + sum(level.values()), parameters, *(level[kind] for kind in MEMORY_KINDS))
        rows.append((name, *map(bytes_text, sizes), found.moments[at].name))
    return rows


def at_peak(program: Program, found: Timeline) -> Rows:
    """The storages that are live at the peak, alike ones of several layers together, the largest first."""
    where, peak_at = _where(program), found.peak_at
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for kind, life in found.storages:
        if peak_at in life.moments:
            alike[_folded(life.value.name), kind, where[life.value.name].source].append(life.nbytes)
    ranked = sorted(alike.items(), key=lambda entry: (-sum(entry[1]), entry[0]))
    rows: Rows = [("value", "kind", "bytes", "made at")]
    for (name, kind, source), sizes in ranked[:LISTED]:
        times = f" (x{len(sizes)})" if len(sizes) > 1 else ""
        rows.append((name + times, kind, bytes_text(sum(sizes)), source))
    rest = [sum(sizes) for _, sizes in ranked[LISTED:]]
    return rows + ([(f"{len(rest)} more", "", bytes_text(sum(rest)), "")] if rest else [])


def by_layer(program: Program, found: Timeline) -> Rows:
    """Parameters and saved activations of each layer, or of the module where there are no layers."""
    where = _where(program)
    parameters: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for entry in program.inputs:
        if entry.kind in STATE:
            parameters[_layer(entry.value.name.rpartition(".")[0])] += entry.value.nbytes()
    for kind, life in found.storages:
        if kind == "kept":
            kept[_layer(where[life.value.name].module)] += life.nbytes
    layers = [(layer, parameters[layer], kept[layer]) for layer in dict.fromkeys((*parameters, *kept))]
    rows: Rows = [("layer", "parameters, each", "saved, each")]
    for (_, *sizes), group in groupby(layers, key=lambda entry: (entry[0].rpartition(".")[0], *entry[1:])):
        names = [name for name, *_ in group]
        rows.append((_span(names), *map(bytes_text, sizes)))
    return rows


def _where(program: Program) -> dict[str, Where]:
    """Where each value comes from; what a sum of gradients or tiles give comes from where its parts do."""
    found: dict[str, Where] = {}
    for instr in (instr for section in program.sections for instr in section.instrs):
        body = instr.body.instrs if instr.body else ()
        found.update((out.name, inner.where) for inner in body for out in inner.values())
        parts = instr.body.gives if instr.body else instr.refs()
        for out, part in zip_longest(instr.values(), parts):
            if out is not None:
                found[out.name] = instr.where if instr.where.source else found.get(part, instr.where)
    return found


def _folded(path: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def _layer(path: str) -> str:
    """The path up to its first number, or all of it."""
    match = re.match(r"(.*?\.)?\d+(?=\.|$)", path)
    return match[0] if match else path or "the model itself"


def _span(names: list[str]) -> str:
    """`model.layers 0-31 (x32)`."""
    if len(names) == 1:
        return names[0]
    path, _, first = names[0].rpartition(".")
    return f"{path} {first}-{names[-1].rpartition('.')[2]} (x{len(names)})"
