"""Charts as inline SVG: no scripts, nothing from a network; colours are the page's, so they suit light and dark."""

import html
from collections.abc import Callable, Mapping, Sequence
from math import log2

from autosp_aot.ir.units import bytes_text, length_text

WIDTH, HEIGHT = 960, 340
LEFT, RIGHT, TOP, BOTTOM = 84, 12, 26, 30
COLUMNS = 320

Level = Mapping[str, int]
Scale = Callable[[float], float]


def areas(title: str, said: str, levels: Sequence[Level], kinds: Sequence[str], sections: Mapping[str, int]) -> str:
    """Bytes by kind over the moments of a step, stacked in the order of `kinds`; `sections` begin at their moments.

    Neighbouring moments share a column, which shows the one of them with most.
    """
    columns = _columns(levels)
    most = max((sum(level[kind] for kind in kinds) for level in columns), default=0)
    x = _scale(0, len(columns), LEFT, WIDTH - RIGHT)
    y = _scale(0, most or 1, HEIGHT - BOTTOM, TOP)
    shapes = []
    for at in range(len(kinds), 0, -1):  # each from the bottom to its top, the lower ones drawn over the higher
        tops = (y(sum(level[kind] for kind in kinds[:at])) for level in columns)
        edge = "".join(f"V{top:.1f}H{x(column + 1):.1f}" for column, top in enumerate(tops))
        shapes.append(f'<path class="{kinds[at - 1]}" d="M{LEFT} {y(0):.1f}{edge}V{y(0):.1f}Z"/>')
    share = len(columns) / max(len(levels), 1)
    for name, start in sections.items():
        place = x(start * share)
        shapes.append(f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        beside = (place + 4, "start") if place < WIDTH * 0.85 else (WIDTH - RIGHT, "end")
        shapes.append(_text(beside[0], HEIGHT - BOTTOM + 18, name, beside[1]))
    return _svg(title, said, [*shapes, *_grid(most, y)]) + _legend(kinds)


def _columns(levels: Sequence[Level]) -> list[Level]:
    count = min(COLUMNS, len(levels))
    bounds = [len(levels) * at // count for at in range(count + 1)] if count else []
    total = lambda level: sum(level.values())  # noqa: E731
    return [max(levels[lo:hi], key=total) for lo, hi in zip(bounds, bounds[1:])]


def lines(title: str, said: str, series: Mapping[str, Sequence[tuple[int, int]]], limit_bytes: int) -> str:
    """Bytes against length, a line a series of (length, bytes), lengths to a scale of powers of two, and the limit."""
    points = [point for line in series.values() for point in line]
    lengths, most = sorted({length for length, _ in points}), max(limit_bytes, *(count for _, count in points))
    x = _scale(log2(lengths[0]) - 0.1, log2(lengths[-1]) + 0.9, LEFT, WIDTH - RIGHT)
    y = _scale(0, most, HEIGHT - BOTTOM, TOP)
    limit = _text(WIDTH - RIGHT, y(limit_bytes) - 6, f"a rank has {bytes_text(limit_bytes)}", "end")
    shapes = [_across("limit", y(limit_bytes)), limit]
    shapes += [_text(x(log2(length)), HEIGHT - BOTTOM + 18, length_text(length), "middle") for length in lengths]
    for at, (name, line) in enumerate(series.items()):
        places = [(x(log2(length)), y(count)) for length, count in line]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        shapes.append(f'<polyline class="line{at % 6}" points="{path}"/>')
        shapes += [f'<circle class="line{at % 6}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>' for px, py in places]
        shapes.append(_text(places[-1][0] + 8, places[-1][1] + 14, name))
    return _svg(title, said, [*_grid(most, y), *shapes])


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    return lambda value: start + (end - start) * (value - low) / max(high - low, 1e-9)


def _grid(most: int, y: Scale) -> list[str]:
    """Lines at four to eight round numbers of bytes."""
    shapes, step = [], max(2 ** (most.bit_length() - 3), 1)
    for count in range(0, most + 1, step):
        shapes += [_across("grid", y(count)), _text(LEFT - 6, y(count) + 4, bytes_text(count), "end")]
    return shapes


def _across(kind: str, y: float) -> str:
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(title: str, said: str, shapes: Sequence[str]) -> str:
    head = f"<title>{html.escape(title)}</title><desc>{html.escape(said)}</desc>"
    return f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}">{head}{"".join(shapes)}</svg>'


def _legend(kinds: Sequence[str]) -> str:
    items = (f'<span><svg class="key" viewBox="0 0 1 1"><path class="{kind}" d="M0 0H1V1H0Z"/></svg>{kind}</span>'
             for kind in kinds)  # fmt: skip
    return f'<p class="legend">{"".join(items)}</p>'
