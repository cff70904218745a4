"""What a manifest says, as tables of text."""

from math import prod

from autosp_aot.artifact.manifest import Fallback, Manifest
from autosp_aot.ir.program import ITEMSIZE
from autosp_aot.ir.units import bytes_text
from autosp_aot.memory.costs import Costs

Rows = list[tuple[str, ...]]


def facts(manifest: Manifest) -> Rows:
    """What was built, and what it costs the rank with the highest peak."""
    costs, config = manifest.step.costs, manifest.config
    weights = sum(prod(spec.shape) * ITEMSIZE[spec.dtype] for spec in manifest.parameters)
    again = costs.recomputed_flops / max(costs.flops, 1)
    return [
        ("ranks", str(manifest.ranks)),
        ("target", manifest.target),
        ("inputs", ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in manifest.batch)),
        ("parameters", f"{len(manifest.parameters)}, {bytes_text(weights)} on every rank"),
        ("recompute", f"{config.recompute}, {again:.1%} of matmul and attention FLOPs"),
        *([("memory budget", bytes_text(budget))] if (budget := config.memory_budget_bytes) else []),
        ("tiles", str(config.tile)),
        ("offload", f"{config.offload}{_on_host(costs)}"),
        ("saved for backward", bytes_text(costs.kept_bytes)),
        ("peak of activations and gradients", f"{bytes_text(costs.peak_bytes)} at {costs.peak_at}"),
        ("peak of an evaluation", _evaluation_peak(manifest)),
        ("compared with eager", manifest.compared),
        ("computed on every rank", ", ".join(sorted({f.op for f in fallbacks(manifest)})) or "nothing"),
    ]


def _evaluation_peak(manifest: Manifest) -> str:
    if manifest.evaluation is None:
        return "not built (--no-evaluation)"
    costs = manifest.evaluation.costs
    return f"{bytes_text(costs.peak_bytes)} at {costs.peak_at}"


def fallbacks(manifest: Manifest) -> tuple[Fallback, ...]:
    """What falls back in the step, and what does so in the evaluation alone."""
    others = () if manifest.evaluation is None else manifest.evaluation.fallbacks
    own = manifest.step.fallbacks
    return *own, *(fallback for fallback in others if fallback not in own)


def _on_host(costs: Costs) -> str:
    if not costs.host_bytes:
        return ""
    return f", {bytes_text(costs.host_bytes)} of host memory, {bytes_text(costs.host_moved_bytes)} there and back"


def traffic(manifest: Manifest) -> Rows:
    """Collectives by section and kind."""
    rows: Rows = [("section", "collective", "count", "received by the worst rank")]
    moved = () if manifest.evaluation is None else manifest.evaluation.costs.moved
    for row in (*manifest.step.costs.moved, *moved):
        rows.append((row.section, row.op, str(row.count), bytes_text(row.received_bytes)))
    return rows


def replicated(manifest: Manifest) -> Rows:
    """Operators without a rule, that every rank computes over the whole."""
    rows: Rows = [("operator", "where", "gathered on every rank")]
    return rows + [(f.op, f.source, bytes_text(f.gathered_bytes)) for f in fallbacks(manifest)]


def aligned(rows: Rows) -> str:
    """Rows as lines, columns under each other."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
