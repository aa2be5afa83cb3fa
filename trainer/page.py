"""Pieces of a self-contained HTML page: pictures, legends, charts, tables. No file is touched.

The page asks nothing of the network (its content security policy forbids it), has no script, and
follows the reader's light or dark setting. Every text from outside is escaped.
"""

import base64
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

from PIL import Image

from ..labeler.draw import Colour

Points = Sequence[tuple[float, float]]

_JPEG_QUALITY = 85
_CHART_PX = (560, 240)
_PLOT = (58, 14, 548, 196)
"""Left, top, right and bottom of a chart's axes, in the chart's own units."""


def page(title: str, sections: Iterable[str]) -> str:
    """Put sections of HTML into a whole page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def title(words: str) -> str:
    """Make the page's heading."""
    return f"<h1>{escape(words)}</h1>"


def section(heading: str, *parts: str) -> str:
    """Put parts of HTML below a heading."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "\n</section>"


def text(words: str) -> str:
    """Make a paragraph of plain text."""
    return f"<p>{escape(words)}</p>"


def card(title: str, figures: Sequence[str], *, below: str = "") -> str:
    """Set figures side by side, as many as fit, with a title above and HTML below."""
    wide = " wide" if len(figures) > 2 else ""
    return (
        f'<div class="card{wide}"><h3>{escape(title)}</h3>'
        f'<div class="figures">{"".join(figures)}</div>{below}</div>'
    )


def cards(each: Iterable[str]) -> str:
    """Set cards below each other, small ones two abreast where there is room."""
    return f'<div class="cards">{"".join(each)}</div>'


def figure(image: Image.Image, caption: str, *, below: str = "") -> str:
    """Embed a picture with a caption, which also describes it to those who cannot see it."""
    return (
        f'<figure><img src="{data_uri(image)}" width="{image.width}" height="{image.height}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption>{below}</figure>'
    )


def beside(caption: str, *parts: str) -> str:
    """Make a figure of HTML, to stand beside pictures."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{''.join(parts)}</figure>"


def data_uri(image: Image.Image) -> str:
    """Encode a picture as a JPEG inside a data: address."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def legend(colours: Mapping[str, Colour]) -> str:
    """List what colours stand for."""
    items = [
        f'<li><i style="background:rgb{colour}"></i>{escape(name)}</li>'
        for name, colour in colours.items()
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def ranking(predictions: Iterable[tuple[str, float]], *, right: Collection[str] = ()) -> str:
    """List class names with their probabilities as bars; `right` are the true ones, if known."""
    lines = []
    for name, probability in predictions:
        mark = ' class="right"' if name in right else ""
        lines.append(
            f'<li{mark}><span class="bar" style="width:{100 * probability:.1f}%"></span>'
            f"<span>{escape(name)}</span><span>{probability:.1%}</span></li>"
        )
    return f'<ol class="ranking">{"".join(lines)}</ol>'


def table(facts: Mapping[str, object]) -> str:
    """Make a two-column table."""
    rows = [
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def columns(names: Sequence[str], rows: Iterable[Sequence[str]], *, num_words: int = 1) -> str:
    """Make a table with headings above; what follows the first num_words columns is numbers."""
    places = [""] * num_words + [' class="number"'] * (len(names) - num_words)
    lines = [_cells("th", names, places)] + [_cells("td", row, places) for row in rows]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _cells(tag: str, texts: Sequence[str], places: Sequence[str]) -> str:
    cells = [f"<{tag}{at}>{escape(text)}</{tag}>" for at, text in zip(places, texts, strict=True)]
    return f"<tr>{''.join(cells)}</tr>"


def details(summary: str, content: str) -> str:
    """Fold preformatted text away below a line to click."""
    body = f"<pre>{escape(content)}</pre>"
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def line_chart(
    title: str, series: Mapping[str, Points], *, x_label: str, from_zero: bool = False
) -> str:
    """Draw lines as SVG.

    Args:
        title: What the y axis measures, with its unit.
        series: (x, y) points by name, at most four lines; points that are not finite are left out.
        x_label: What the x axis measures.
        from_zero: Whether the y axis begins at 0 rather than near the lowest value.
    """
    lines = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + [0.0] * from_zero
    if not xs:
        return text(f"{title}: nothing was logged.")
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
    frame = (min(xs), max(max(xs), min(xs) + 1e-9), y_ticks[0], y_ticks[-1])
    parts = [_axis_x(x_ticks, frame, x_label), _axis_y(y_ticks, frame)]
    parts += [_line(i, points, frame) for i, points in enumerate(lines.values())]
    key = "".join(
        f'<span class="key line{i}">{escape(name)}</span>' for i, name in enumerate(lines)
    )
    width, height = _CHART_PX
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {key}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def nice_ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Choose round numbers that enclose [low, high], evenly spaced; a point is widened."""
    if high == low:
        high = low + (abs(low) or 1.0)
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(f for f in (1, 2, 5, 10, 20) if span / (f * step) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


# ------------------------------------------------------------------------------------- charts


def _place(
    point: tuple[float, float], frame: tuple[float, float, float, float]
) -> tuple[float, float]:
    """Map data to the chart's units; frame is (x min, x max, y min, y max)."""
    left, top, right, bottom = _PLOT
    x = left + (point[0] - frame[0]) / (frame[1] - frame[0]) * (right - left)
    y = bottom - (point[1] - frame[2]) / (frame[3] - frame[2]) * (bottom - top)
    return x, y


def _axis_x(ticks: Iterable[float], frame: tuple[float, float, float, float], label: str) -> str:
    left, _, right, bottom = _PLOT
    marks = [
        f'<text x="{_place((tick, frame[2]), frame)[0]:.1f}" y="{bottom + 17}" '
        f'class="tick middle">{tick:g}</text>'
        for tick in ticks
        if frame[0] <= tick <= frame[1]
    ]
    middle = (left + right) / 2
    return "".join(marks) + f'<text x="{middle}" y="236" class="tick middle">{escape(label)}</text>'


def _axis_y(ticks: Iterable[float], frame: tuple[float, float, float, float]) -> str:
    left, _, right, _ = _PLOT
    marks = []
    for tick in ticks:
        y = _place((frame[0], tick), frame)[1]
        marks.append(
            f'<path d="M{left} {y:.1f}H{right}" class="grid"/>'
            f'<text x="{left - 7}" y="{y + 4:.1f}" class="tick end">{tick:.6g}</text>'
        )
    return "".join(marks)


def _line(number: int, points: Points, frame: tuple[float, float, float, float]) -> str:
    placed = [_place(point, frame) for point in points]
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed[-1:]]
    if len(placed) <= 12:
        dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    return f'<g class="line{number}"><polyline points="{path}"/>{"".join(dots)}</g>'


_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #63636a; --paper: #fff; --card: #f4f4f6;
  --rule: #d9d9de; --bar: #cfe3f3; --a: #0072b2; --b: #c65a00; --c: #007f5f; --d: #a9487f; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --soft: #a4a4ad; --paper: #16161a;
  --card: #212127; --rule: #3a3a42; --bar: #1f4662; --a: #56b4e9; --b: #ff9d4d; --c: #35c79b;
  --d: #e394c0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-top: 1px solid var(--rule);
  padding-top: 1rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 48rem; margin: .4rem 0; }
.cards { display: grid; gap: .8rem; margin: .8rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.card { background: var(--card); border-radius: 10px; padding: .8rem; min-width: 0; }
.wide { grid-column: 1 / -1; }
.figures { display: grid; gap: .8rem; grid-template-columns: 1fr 1fr; }
.wide .figures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
@media (max-width: 34rem) { .wide .figures { grid-template-columns: 1fr 1fr; } }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
figcaption { font-size: .85rem; color: var(--soft); margin: .3rem 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: .5rem 0 0;
  padding: 0; font-size: .85rem; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; }
.ranking { list-style: none; margin: 0; padding: 0; font-size: .85rem; }
.ranking li { position: relative; display: flex; justify-content: space-between; gap: .5rem;
  padding: .1rem .4rem; margin: .15rem 0; overflow: hidden; border-radius: 4px; }
.ranking .bar { position: absolute; inset: 0 auto 0 0; background: var(--bar); }
.ranking span:not(.bar) { position: relative; }
.ranking .right { font-weight: 700; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); }
.scroll { overflow-x: auto; margin: .6rem 0; }
.scroll td { overflow-wrap: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
pre { overflow-x: auto; font-size: .8rem; background: var(--card); padding: .8rem;
  border-radius: 8px; }
summary { cursor: pointer; margin: .6rem 0; }
svg { width: 100%; height: auto; }
.tick { font-size: 12px; fill: var(--soft); }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line0 { stroke: var(--a); color: var(--a); } .line1 { stroke: var(--b); color: var(--b); }
.line2 { stroke: var(--c); color: var(--c); } .line3 { stroke: var(--d); color: var(--d); }
g circle { fill: currentColor; stroke: none; }
.key { margin-left: .8em; white-space: nowrap; } .key::before { content: "— "; font-weight: 700; }
"""
