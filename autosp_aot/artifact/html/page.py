"""Pages for people: one file each, no scripts, nothing from a network, for light and dark, with a table for a chart."""

import html
from collections.abc import Sequence

from autosp_aot.artifact.html.chart import areas
from autosp_aot.artifact.html.memory_tables import at_peak, by_layer, by_section
from autosp_aot.artifact.manifest import Manifest
from autosp_aot.artifact.tables import Rows, facts, fallbacks, replicated, traffic
from autosp_aot.ir.program import Program
from autosp_aot.ir.units import bytes_text
from autosp_aot.memory.timeline import MEMORY_KINDS, timeline

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--rule:#d5d9de;--faint:#57606a;
--parameters:#8c959f;--gradients:#d9822b;--kept:#2f6fb5;--working:#6aa84f;--communication:#b04a7b}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--paper:#14171a;--rule:#363c43;--faint:#9aa4af;
--parameters:#6e7681;--gradients:#e0954a;--kept:#5b9bdf;--working:#7fbf63;--communication:#d177a3}}
body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:var(--ink);
background:var(--paper)}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
.wide{overflow-x:auto}table{border-collapse:collapse}
td,th{padding:.25em 1.2em .25em 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;}
td:last-child{overflow-wrap:anywhere;min-width:8em}
td.number,th.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;display:block}text{font-size:12px;fill:var(--faint)}
.grid,.mark{stroke:var(--rule);stroke-width:1}.mark{stroke:var(--ink);stroke-dasharray:3 3}
.limit{stroke:var(--ink);stroke-dasharray:6 4}
.legend{margin:.3em 0 1em}.legend span{margin-right:1.4em;white-space:nowrap}
svg.key{display:inline-block;width:.8em;height:.8em;margin-right:.4em}
.parameters{fill:var(--parameters)}.gradients{fill:var(--gradients)}.kept{fill:var(--kept)}
.working{fill:var(--working)}.communication{fill:var(--communication)}
polyline{fill:none;stroke-width:2}
.line0{stroke:var(--kept)}.line1{stroke:var(--gradients)}.line2{stroke:var(--working)}
.line3{stroke:var(--communication)}.line4{stroke:var(--parameters)}.line5{stroke:var(--ink)}
circle{fill:var(--paper);stroke-width:2}
""".replace("\n", "")


def artifact_page(manifest: Manifest, program: Program) -> str:
    """`report.html`: the build, memory over the step, what holds it, what moves, what is computed on every rank."""
    title = f"autosp-aot: {manifest.ranks} ranks on {manifest.target}"
    parts = [section("The build", table(facts(manifest))), *_memory(manifest, program)]
    parts.append(section("What moves", table(traffic(manifest), head=True)))
    if fallbacks(manifest):
        parts.append(section("Computed on every rank", table(replicated(manifest), head=True)))
    return document(title, parts)


def _memory(manifest: Manifest, program: Program) -> list[str]:
    found = timeline(program, manifest.target)
    parameters = sum(e.value.nbytes() for e in program.inputs if e.kind in ("parameter", "buffer"))
    levels = [{"parameters": parameters, **level} for level in found.levels]
    starts: dict[str, int] = {}
    for at, moment in enumerate(found.moments):
        starts.setdefault(moment.section, at)
    peak = sum(levels[found.peak_at].values())
    said = f"The peak is {bytes_text(peak)}, at {found.moments[found.peak_at].name}. The table below has the figures."
    chart = areas("Memory of a rank over one step", said, levels, ("parameters", *MEMORY_KINDS), starts)
    note = "<p>Of the rank with the highest peak; excluding optimizer state.</p>"
    return [
        section("Memory over the step", note, chart, table(by_section(found, parameters), head=True)),
        section("Live at the peak", table(at_peak(program, found), head=True)),
        section("Bytes a layer", table(by_layer(program, found), head=True)),
    ]


def document(title: str, parts: Sequence[str]) -> str:
    """A page of these parts; the title is text, the parts are markup."""
    named = html.escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{named}</title>'
    body = f"<h1>{named}</h1>{''.join(parts)}"
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{body}</body></html>\n'


def section(title: str, *markup: str) -> str:
    """Markup under a heading."""
    return f"<h2>{html.escape(title)}</h2>{''.join(markup)}"


def table(rows: Rows, head: bool = False) -> str:
    """A table of text; cells that begin with a digit stand to the right, under their heading."""
    numbers = [all(row[at][:1].isdigit() for row in rows[head:]) and len(rows) > 1 for at in range(len(rows[0]))]
    lines = []
    for at, row in enumerate(rows):
        tag = "th" if head and at == 0 else "td"
        kinds = (' class="number"' if head and number else "" for number in numbers)
        cells = "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, row))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'
