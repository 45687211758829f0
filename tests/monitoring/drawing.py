"""Panels of a Grafana dashboard as SVG, from the series that Prometheus has for them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from denoised.units import format_bytes

# Of a cell of Grafana's grid, in pixels.
CELL_WIDTH, CELL_HEIGHT = 20, 26
GAP = 8
COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#96d98d", "#ffb357", "#ca95e5")
PAGE, CARD, GRID, TEXT, DIM = "#111217", "#181b1f", "#2c3235", "#d8d9da", "#8e8e8e"
STYLE = f"""
text {{ font: 11px sans-serif; fill: {DIM} }}
.title {{ font-weight: 600; fill: {TEXT} }}
.row {{ font-size: 14px; fill: {TEXT} }}
.stat {{ font-size: 40px; fill: {COLOURS[0]} }}
path {{ fill: none; stroke-width: 1.3; stroke-linejoin: round }}
.area {{ fill-opacity: 0.4; stroke: none }}
"""
MAX_LEGENDS = 12
LINE = 13

Point: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line: its legend and its points, times in seconds; where Prometheus has nothing there is no point."""

    legend: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Span:
    """What is drawn, in seconds."""

    start: float
    end: float
    step: float


def legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), template).strip()


def draw(panels: Sequence[tuple[Mapping[str, Any], Sequence[Series]]], span: Span) -> str:
    """A page with panels where the dashboard has them, from the highest one on."""
    top = min(panel["gridPos"]["y"] for panel, _ in panels)
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel, _ in panels)
    width, height = 24 * CELL_WIDTH * 2 + GAP, (bottom - top) * CELL_HEIGHT + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="{PAGE}"/>',
    ]
    for panel, series in panels:
        place = panel["gridPos"]
        x, y = place["x"] * CELL_WIDTH * 2 + GAP, (place["y"] - top) * CELL_HEIGHT + GAP
        size = place["w"] * CELL_WIDTH * 2 - GAP, place["h"] * CELL_HEIGHT - GAP
        parts.append(f'<g transform="translate({x},{y})">{_panel(panel, series, size, span)}</g>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Mapping[str, Any], series: Sequence[Series], size: tuple[int, int], span: Span) -> str:
    width, height = size
    title = escape(panel["title"])
    if panel["type"] == "row":
        return f'<text class="row" x="2" y="{height - 2}">{title}</text>'
    card = (
        f'<rect width="{width}" height="{height}" rx="3" fill="{CARD}"/><text class="title" x="8" y="17">{title}</text>'
    )
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] != "timeseries":
        return card + _stat(series, unit, size)
    return card + _graph(panel, series, unit, size, span)


def _stat(series: Sequence[Series], unit: str, size: tuple[int, int]) -> str:
    width, height = size
    last = [(each.legend, each.points[-1][1]) for each in series if each.points]
    shown = "  ".join(value_text(value, unit) for _, value in last[:3])
    names = "  ".join(name for name, _ in last[:3])
    return (
        f'<text class="stat" x="{width // 2}" y="{height // 2 + 14}" text-anchor="middle">{escape(shown)}</text>'
        f'<text x="{width // 2}" y="{height - 14}" text-anchor="middle">{escape(names)}</text>'
    )


def _graph(panel: Mapping[str, Any], series: Sequence[Series], unit: str, size: tuple[int, int], span: Span) -> str:
    width, height = size
    left, right, upper = 64, width - 10, 28
    names = _legends(series, left, right)
    lower = height - 28 - LINE * (1 + max(y for _, y, _ in names))
    defaults = panel["fieldConfig"]["defaults"]
    is_stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    lines = _stacked(series) if is_stacked else [(each, None) for each in series]
    highest = max((value for each, _ in lines for _, value in each.points), default=0.0)
    ceiling, tick = _scale(defaults.get("max", highest), unit)

    def at(point: Point) -> str:
        time, value = point
        x = left + (time - span.start) / (span.end - span.start) * (right - left)
        return f"{x:.0f} {lower - min(max(value, 0.0), ceiling) / ceiling * (lower - upper):.0f}"

    parts = []
    for number in range(round(ceiling / tick) + 1):
        y = lower - number * tick / ceiling * (lower - upper)
        text = value_text(number * tick, unit)
        parts.append(f'<path d="M{left} {y:.0f}H{right}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{text}</text>')
    for seconds in range(0, round(span.end - span.start) + 1, 30):
        x = left + seconds / (span.end - span.start) * (right - left)
        parts.append(
            f'<text x="{x:.0f}" y="{lower + 15}" text-anchor="middle">{seconds // 60}:{seconds % 60:02}</text>'
        )
    for (each, below), colour in zip(lines, itertools.cycle(COLOURS)):
        for run in _runs(each.points, span.step):
            if below is not None:
                back = [(time, below.get(time, 0.0)) for time, _ in reversed(run)]
                outline = "L".join(map(at, (*run, *back)))
                parts.append(f'<path class="area" d="M{outline}Z" style="fill:{colour}"/>')
            parts.append(f'<path d="M{"L".join(map(at, run))}" stroke="{colour}"/>')
    for (x, y, name), colour in zip(names, itertools.cycle(COLOURS)):
        parts.append(f'<rect x="{x}" y="{lower + 27 + LINE * y}" width="10" height="3" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{lower + 32 + LINE * y}">{escape(name)}</text>')
    return "".join(parts)


def _legends(series: Sequence[Series], left: int, right: int) -> list[tuple[int, int, str]]:
    """Where each begins, on which line."""
    x, y, places = left, 0, []
    for each in series[:MAX_LEGENDS]:
        taken = 24 + 6 * len(each.legend)
        if x + taken > right and x > left:
            x, y = left, y + 1
        places.append((x, y, each.legend))
        x += taken
    return places


def _stacked(series: Sequence[Series]) -> list[tuple[Series, dict[float, float]]]:
    """Each on top of those before it, with the line below."""
    total: dict[float, float] = {}
    lines = []
    for each in series:
        below = dict(total)
        for time, value in each.points:
            total[time] = total.get(time, 0.0) + value
        lines.append((Series(each.legend, [(time, total[time]) for time, _ in each.points]), below))
    return lines


def _runs(points: Sequence[Point], step: float) -> list[list[Point]]:
    """Without a line over what is missing."""
    runs: list[list[Point]] = []
    for point in points:
        if runs and point[0] - runs[-1][-1][0] <= 1.5 * step:
            runs[-1].append(point)
        else:
            runs.append([point])
    return runs


def _scale(highest: float, unit: str) -> tuple[float, float]:
    """The top of the axis and what is between two of its lines: 1, 2 or 5 and zeros, of a binary unit for bytes."""
    if highest <= 0:
        return 1.0, 1.0
    if unit == "bytes":
        binary = 1024.0 ** math.floor(math.log(highest, 1024))
        ceiling, tick = _scale(highest / binary, "none")
        return ceiling * binary, tick * binary
    magnitude = 10.0 ** math.floor(math.log10(highest / 4))
    tick = next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= highest / 4)
    return math.ceil(highest / tick - 1e-9) * tick, tick


def value_text(value: float, unit: str) -> str:
    match unit:
        case "percentunit":
            return f"{value:.0%}"
        case "bytes":
            return format_bytes(round(value))
        case "s" if 0 < value < 1:
            return f"{value * 1000:.3g} ms"
        case "s":
            return f"{value:.3g} s"
        case "reqps" | "ops":
            return f"{value:.3g}/s"
    return f"{value:.3g}"
