"""Plots of a report, as SVG that needs no script and no library: points with intervals, and curves.

Series differ in colour, in the shape of their points and in the dashes of their lines, so that a print without colour
can be read. Colours are classes of report.css, for the page's policy allows no style attributes.
"""

import math
import re
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

from arkasr.errors import UsageError

WIDTH, LEFT, RIGHT, TOP = 560, 58, 16, 14
LABELS = 168  # width of the names beside points, and ...
LABEL_CHARACTERS = 25  # ... what fits in
LEGEND = 22  # height of one line of it
LANE = 17  # height of one series of one name
CURVES = 230  # height of the field of curves
X_TICKS = 12
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
SERIES = 6  # as many shapes, dashes and colours there are


@dataclass(frozen=True)
class Series:
    """One system's or one condition's values.

    Attributes:
        name: what the legend calls it.
        x: names (of points) or numbers (of curves).
        y: values; None where there is none.
        low: lower ends of the intervals, or nothing.
        high: upper ends.
    """

    name: str
    x: tuple[str, ...] | tuple[float, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        for values in (self.y, self.low, self.high):
            if len(values) != len(self.x) and (values or values is self.y):
                raise UsageError(f"series {self.name!r}: {len(values)} values at {len(self.x)} places; give one each")

    @property
    def points(self) -> list[tuple[str | float, float | None, float | None, float | None]]:
        """(x, y, low, high); None for what is missing, infinite or undefined."""
        nothing = (None,) * len(self.x)
        low, high = self.low or nothing, self.high or nothing
        return [
            (x, *(None if value is None or not math.isfinite(value) else value for value in values))  # type: ignore[misc]
            for x, *values in zip(self.x, self.y, low, high, strict=True)
        ]


@dataclass(frozen=True)
class Plot:
    """What `draw` draws.

    Attributes:
        kind: "points" (names down the side, as slices have) or "curves" (numbers along x, as SNR and batch are).
        title: of the figure.
        x_label: what the numbers along x are, with unit.
        y_label: what the values are, with unit.
        series: at most six.
        label: regime and normalizer of the values, or under what they were timed.
        log_x: whether x doubles from one tick to the next.
        note: what the reader must know.
    """

    kind: Literal["points", "curves"]
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    label: str
    log_x: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if not 1 <= len(self.series) <= SERIES:
            raise UsageError(f"plot {self.title!r}: {len(self.series)} series; give 1 to {SERIES}, or more plots")
        wanted = str if self.kind == "points" else (int, float)
        if not all(isinstance(x, wanted) for series in self.series for x in series.x):
            raise UsageError(f"plot {self.title!r}: points stand at names, curves at numbers; choose the other kind")
        if self.log_x and any(not isinstance(x, str) and x <= 0 for series in self.series for x in series.x):
            raise UsageError(f"plot {self.title!r}: an x of 0 or less has no place on a logarithmic axis; leave it out")


def visible(text: str) -> str:
    """Text in which what would hide or turn the text around it (controls, bidi) stands by its number."""
    return _UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def shown(text: str) -> str:
    """Visible text for HTML, markup escaped."""
    return escape(visible(text))


def draw(plot: Plot) -> str:
    """The plot as an SVG element."""
    legend = "".join(
        _marker(n, LEFT, TOP + n * LEGEND) + _text(LEFT + 14, TOP + n * LEGEND + 4, series.name)
        for n, series in enumerate(plot.series)
    )
    top = TOP + LEGEND * len(plot.series)
    height, field = (_points if plot.kind == "points" else _curves)(plot, top)
    name = f"{plot.title}: {plot.y_label}, {plot.label}; the numbers are in the table below"
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{shown(name)}">'
        f'<g class="legend">{legend}</g>{field}</svg>'
    )


def _points(plot: Plot, top: int) -> tuple[int, str]:
    """Height and field: a lane for each name and series, values along x."""
    names = list(dict.fromkeys(str(x) for series in plot.series for x in series.x))
    row = LANE * len(plot.series) + 12
    bottom = top + row * len(names) + 6
    ticks = _ticks(plot)
    left, right = LABELS + 10, WIDTH - 56

    def across(value: float) -> float:
        return left + (right - left) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [
        _line(across(t), top, across(t), bottom, "grid") + _text(across(t), bottom + 16, f"{t:g}", "mid") for t in ticks
    ]
    for n, name in enumerate(names):
        short = name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "…"
        parts.append(_text(LABELS, top + row * n + row / 2 + 4, short, "end", title=name))
    for s, series in enumerate(plot.series):
        for x, y, low, high in series.points:
            at = top + row * names.index(str(x)) + 6 + LANE * (s + 0.5)
            if low is not None and high is not None:
                whisker = _line(across(low), at, across(high), at) + "".join(
                    _line(across(end), at - 4, across(end), at + 4) for end in (low, high)
                )
                parts.append(f'<g class="s{s} line">{whisker}</g>')
            if y is not None:
                parts.append(_marker(s, across(y), at))
                parts.append(_text(across(max(y, high or 0)) + 9, at + 4, f"{y:.2f}", "small"))
    parts.append(_text((left + right) / 2, bottom + 36, plot.y_label, "mid"))
    return bottom + 46, "".join(parts)


def _curves(plot: Plot, top: int) -> tuple[int, str]:
    """Height and field: numbers along x, values upwards from 0, intervals as bars."""
    places = sorted({float(x) for series in plot.series for x in series.x}) or [1.0]
    scale = math.log2 if plot.log_x else float
    first, last = scale(places[0]), scale(places[-1])
    ticks = _ticks(plot)
    bottom = top + CURVES

    def across(x: str | float) -> float:
        return (
            LEFT
            + 12
            + (WIDTH - LEFT - RIGHT - 24) * ((scale(float(x)) - first) / (last - first) if last > first else 0.5)
        )

    def up(value: float) -> float:
        return bottom - (bottom - top - 10) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [
        _line(LEFT, up(t), WIDTH - RIGHT, up(t), "grid") + _text(LEFT - 8, up(t) + 4, f"{t:g}", "end") for t in ticks
    ]
    parts += [
        _line(across(x), bottom, across(x), bottom + 5, "grid") + _text(across(x), bottom + 19, f"{x:g}", "mid")
        for x in places[:: -(-len(places) // X_TICKS)]
    ]
    for s, series in enumerate(plot.series):
        points = [(float(x), y, low, high) for x, y, low, high in series.points if y is not None]
        points.sort(key=lambda point: point[0])
        lines = [_line(across(a[0]), up(a[1]), across(b[0]), up(b[1]), f"d{s}") for a, b in pairwise(points)]
        for x, _, low, high in points:
            if low is not None and high is not None:
                lines.append(_line(across(x), up(low), across(x), up(high)))
                lines += [_line(across(x) - 4, up(end), across(x) + 4, up(end)) for end in (low, high)]
        parts.append(f'<g class="s{s} line">{"".join(lines)}</g>')
        parts += [_marker(s, across(x), up(y)) for x, y, _, _ in points]
    parts.append(_text(LEFT - 50, top - 2, plot.y_label, "small"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 40, plot.x_label, "mid"))
    return bottom + 50, "".join(parts)


def _ticks(plot: Plot) -> list[float]:
    """Round numbers that enclose 0 and all values."""
    values = [value for series in plot.series for point in series.points for value in point[1:] if value is not None]
    lowest, highest = min([0.0, *values]), max([0.0, *values])
    extent = highest - lowest or 1.0
    power = 10.0 ** math.floor(math.log10(extent / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if extent / (power * factor) <= 5.0001)
    first, last = math.floor(lowest / step + 1e-9), math.ceil(highest / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _marker(series: int, x: float, y: float) -> str:
    """A point in the shape of its series."""
    corners = (
        None,
        ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        ((0, -6), (6, 0), (0, 6), (-6, 0)),
        ((0, -6), (5.5, 4), (-5.5, 4)),
        ((0, 6), (5.5, -4), (-5.5, -4)),
        ((-5, -1.5), (-1.5, -1.5), (-1.5, -5), (1.5, -5), (1.5, -1.5), (5, -1.5), (5, 1.5), (1.5, 1.5), (1.5, 5),
         (-1.5, 5), (-1.5, 1.5), (-5, 1.5)),
    )[series]  # fmt: skip
    if corners is None:
        return f'<circle class="s{series}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="s{series}" points="{points}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<line{name} x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", *, title: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    inner = f"<title>{shown(title)}</title>" if title and title != text else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}">{inner}{shown(text)}</text>'
