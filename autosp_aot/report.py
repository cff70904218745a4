"""What an artifact is, for people: a table, JSON, and one HTML page."""

import html
from dataclasses import asdict
from pathlib import Path

from autosp_aot.artifact import Manifest, read_manifest, read_rank
from autosp_aot.collectives import collectives_of
from autosp_aot.errors import ArtifactError, Problem
from autosp_aot.program import ITEMSIZE, Program
from autosp_aot.program_text import print_program

Rows = list[tuple[str, ...]]


def show(path: str | Path, rank: int) -> str:
    """Tables of what the artifact moves and keeps, then the program of a rank with its numbers filled in."""
    manifest = read_manifest(path)
    text, _ = print_program(_program(path, manifest, rank))
    return "\n\n".join([_aligned(facts(manifest)), _aligned(traffic(manifest)), text])


def show_json(path: str | Path, rank: int) -> dict:
    """The manifest, the collectives of a rank and its program as text."""
    manifest = read_manifest(path)
    program = _program(path, manifest, rank)
    collectives = [asdict(collective) for collective in collectives_of(program, rank)]
    return {"manifest": asdict(manifest), "rank": rank, "collectives": collectives, "program": print_program(program)[0]}


def _program(path, manifest: Manifest, rank: int) -> Program:
    if rank >= manifest.ranks:
        raise ArtifactError(Problem("no-such-rank", f"there is no rank {rank}", str(path),
                                    f"the artifact has ranks 0 to {manifest.ranks - 1}", "give another --rank"))  # fmt: skip
    return read_rank(path, rank)


def facts(manifest: Manifest) -> Rows:
    """What was built, and what it costs the rank with the largest boxes."""
    costs = manifest.costs
    weights = sum(_elements(spec.shape) * ITEMSIZE[spec.dtype] for spec in manifest.parameters)
    return [
        ("ranks", str(manifest.ranks)),
        ("target", manifest.target),
        ("inputs", ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in manifest.batch)),
        ("parameters", f"{len(manifest.parameters)}, {_bytes(weights)} on every rank"),
        ("recompute", f"{manifest.recompute}, {costs['recomputed_flops'] / max(costs['flops'], 1):.1%} of the products' FLOPs"),
        ("kept for backward", _bytes(costs["kept_bytes"])),
        ("peak of activations and gradients", f"{_bytes(costs['peak_bytes'])} at {costs['peak_at']}"),
        ("computed on every rank", ", ".join(sorted({f["op"] for f in manifest.fallbacks})) or "nothing"),
    ]


def traffic(manifest: Manifest) -> Rows:
    """Collectives by section and kind."""
    rows: Rows = [("section", "collective", "count", "received by the worst rank")]
    for row in manifest.costs["moved"]:
        rows.append((row["section"], row["op"], str(row["count"]), _bytes(row["received_bytes"])))
    return rows


def html_report(manifest: Manifest, program: Program) -> str:
    """One self-contained page: facts, traffic, what computes replicated. No scripts, nothing from a network."""
    tables = [("The build", facts(manifest)), ("What moves", traffic(manifest))]
    tables.append(("Computed on every rank", [("operator", "where"), *((f["op"], f["source"]) for f in manifest.fallbacks)]))
    body = "".join(f"<h2>{title}</h2>{_table(rows)}" for title, rows in tables)
    style = "body{font:15px/1.5 system-ui;max-width:60em;margin:2em auto}td{padding:.2em 1em .2em 0;border-bottom:1px solid #ddd}"
    title = f"autosp-aot: {manifest.ranks} ranks on {manifest.target}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{body}</html>\n"
    )


def _table(rows: Rows) -> str:
    lines = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{''.join(lines)}</table>"


def _aligned(rows: Rows) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
