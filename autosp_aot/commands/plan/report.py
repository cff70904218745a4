"""What `autosp-aot plan` found: a table, JSON and a page."""

import html
from collections.abc import Sequence
from dataclasses import asdict

from autosp_aot.artifact.html.chart import lines
from autosp_aot.artifact.html.page import document, table
from autosp_aot.artifact.tables import Rows, aligned
from autosp_aot.commands.plan.planning import Point, Setting
from autosp_aot.ir.units import bytes_text, length_text
from autosp_aot.memory.timeline import MEMORY_KINDS

BREAKDOWN = ("parameters", "optimizer", *MEMORY_KINDS)


def plan_json(points: Sequence[Point]) -> list[dict]:
    """Each point as it is."""
    return [asdict(point) for point in points]


def plan_text(points: Sequence[Point], setting: Setting) -> str:
    """The setting, a row a point, why points were refused, and the longest sequences."""
    refused = [f"sp {point.sp}, {length_text(point.seq)}: {point.problem}" for point in points if point.problem]
    longest = {point.sp: point.max_seq for point in points if point.max_seq is not None}
    found = [f"sp {sp}: {_longest(max_seq)}" for sp, max_seq in longest.items()]
    parts = [setting_text(setting), aligned(plan_rows(points)), *refused, "\n".join(found)]
    return "\n\n".join(part for part in parts if part)


def plan_page(points: Sequence[Point], setting: Setting) -> str:
    """Peak against length, a line a number of ranks, with the table; one file without scripts."""
    limit = setting.memory_bytes - setting.reserve_bytes
    series: dict[str, list[tuple[int, int]]] = {}
    for point in points:
        series.setdefault(f"sp {point.sp}", []).append((point.seq, point.peak_bytes))
    said = f"The broken line is what a rank has, {bytes_text(limit)}. The table below has the figures."
    chart = lines("Peak of a rank against length", said, series, limit)
    return document("autosp-aot plan", [
        f"<p>{html.escape(setting_text(setting))}</p>", chart, table(plan_rows(points), head=True)
    ])  # fmt: skip


def setting_text(setting: Setting) -> str:
    """One line."""
    memory = f"{bytes_text(setting.memory_bytes)} a rank, {bytes_text(setting.reserve_bytes)} of it reserved"
    state = f"dp {setting.dp}, ZeRO {setting.zero}, optimizer {setting.optimizer}, accumulate {setting.accumulate}"
    return f"{memory}; {state}; recompute {setting.recompute}, tile {setting.tile}, offload {setting.offload}"


def plan_rows(points: Sequence[Point]) -> Rows:
    """A head and a row a point; times are of data sheets."""
    head = ("sp", "seq", "fits", "peak", *BREAKDOWN, "on the host", "moved", "extra FLOPs", "s a step, unmeasured")
    return [head, *map(_row, points)]


def _row(point: Point) -> tuple[str, ...]:
    parts = [point.breakdown_bytes[kind] for kind in BREAKDOWN]
    sizes = map(bytes_text, (point.peak_bytes, *parts, point.host_bytes, point.moved_bytes))
    again = f"{point.recomputed_flops / max(point.flops, 1):.1%}"
    return (str(point.sp), length_text(point.seq), "yes" if point.fits else "no", *sizes, again, f"{point.seconds:.3g}")


def _longest(max_seq: int) -> str:
    return f"{length_text(max_seq)} ({max_seq}) is the longest that fits" if max_seq else "no length fits"
