"""Drawings for a web page as inline SVG: bars, and lines over steps. They need no library and no script.

A drawing is 360 units wide, so that its letters have their own size on a phone. Colours are classes of the page's style
sheet, which has them for light and for dark. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH = 360

MAX_POINTS = 300
"""More points than that are not seen on a drawing of 360 units."""

_ROW = 42
_BAR = 12
_LEFT, _RIGHT, _PLOT, _BOTTOM = 54, 12, 150, 40
_KEY = 17

Point = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """A bar with its name and its value above it."""

    label: str
    value: float
    text: str
    kind: str
    """Class that gives the colour."""
    error: float | None = None
    """Half the length of a whisker, in units of the value."""
    whole: float | None = None
    """Value that fills the whole width, drawn as an outline; None for the largest of all bars."""


@dataclass(frozen=True)
class Line:
    """A line through points, given in the order of x."""

    label: str
    points: Sequence[Point]
    kind: str
    continued: Sequence[Point] = ()
    """Points that follow from what is known, drawn dashed."""


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers inside of an interval, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(points: Sequence[Point]) -> tuple[list[Point], int]:
    """Return at most `MAX_POINTS` points, each the mean of as many neighbours, and how many these are."""
    group = math.ceil(len(points) / MAX_POINTS) or 1
    groups = [points[start : start + group] for start in range(0, len(points), group)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in groups], group


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """Draw horizontal bars from zero on a common scale, or each on its own if it has a `whole`."""
    longest = max((bar.value + (bar.error or 0) for bar in rows), default=0.0)
    room = WIDTH - 2 if any(bar.error for bar in rows) else WIDTH  # the end of an error's line is as wide as its stroke
    parts = []
    for number, bar in enumerate(rows):
        scale = room / ((bar.whole or longest) or 1)
        top, length = number * _ROW + 20, max(0.0, min(bar.value * scale, WIDTH))
        parts.append(_text(0, top - 6, bar.label))
        parts.append(_text(WIDTH, top - 6, bar.text, "end", "strong"))
        if bar.whole is not None:
            parts.append(_rect(0.5, top + 0.5, WIDTH - 1, _BAR - 1, "whole"))
        parts.append(_rect(0, top, length, _BAR, f"fill {bar.kind}"))
        if bar.error is not None:
            left, right, middle = (max(0.0, length + sign * bar.error * scale) for sign in (-1, 1, 0))
            strokes = [[(left, top + _BAR / 2), (right, top + _BAR / 2)]]
            strokes += [[(x, top + 2), (x, top + _BAR - 2)] for x in (left, right) if x != middle]
            # The halo has the page's colour: ink alone is hard to see on the bars of either scheme.
            parts += [_path(stroke, kind) for kind in ("halo", "whisker") for stroke in strokes]
    described = "; ".join(f"{bar.label}: {bar.text}" for bar in rows)
    return _svg(title, described, len(rows) * _ROW - 4, parts)


def lines(
    title: str,
    series: Sequence[Line],
    *,
    y_label: str,
    format_y: Callable[[float], str],
    last_step: float,
    mark: tuple[float, str] | None = None,
    from_zero: bool = False,
    up_to: float | None = None,
) -> Markup:
    """Draw lines over optimizer steps, with axes, a key for several, and a mark at one step.

    The axis of the values spans what is drawn; zero and another value may be given to be on it as well.
    """
    drawn = [point for line in series for point in (*line.points, *line.continued)]
    low, high = min(y for _, y in drawn), max(y for _, y in drawn)
    low, high = min(low, 0.0) if from_zero else low, high if up_to is None else max(high, up_to)
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = (low if from_zero else low - room), high + room
    top = 26 + _KEY * len(series) * (len(series) > 1)
    bottom, right = top + _PLOT, WIDTH - _RIGHT
    width = max(last_step, max(x for x, _ in drawn)) or 1

    def place(point: Point) -> Point:
        return _LEFT + point[0] / width * (right - _LEFT), bottom - (point[1] - low) / (high - low) * _PLOT

    parts = [_text(0, 12, y_label, kind="small")]
    for y in ticks(low, high):
        _, level = place((0, y))
        parts += [_path([(_LEFT, level), (right, level)], "grid"), _text(_LEFT - 6, level + 4, format_y(y), "end")]
    for x in ticks(0, width):
        at, _ = place((x, low))
        parts.append(_text(at, bottom + 16, f"{x:,.6g}", "middle"))
    parts += [_text((_LEFT + right) / 2, bottom + 33, "optimizer step", "middle", "small")]
    parts.append(_path([(_LEFT, bottom), (right, bottom)], "axis"))
    if mark is not None:
        at, _ = place((mark[0], low))
        anchor, shift = ("start", 4) if at < WIDTH / 2 else ("end", -4)
        parts += [_path([(at, top - 10), (at, bottom)], "mark"), _text(at + shift, top - 3, mark[1], anchor, "small")]
    for number, line in enumerate(series):
        places = [place(point) for point in line.points]
        parts.append(_path(places, f"line {line.kind}"))
        if line.continued:
            parts.append(_path([place(point) for point in line.continued], f"line dashed {line.kind}"))
        if len(places) < 40:
            parts += [
                Markup('<circle cx="{}" cy="{}" r="2.5" class="fill {}"/>').format(_n(x), _n(y), line.kind)
                for x, y in places
            ]
        if len(series) > 1:
            level = 26 + _KEY * number
            parts += [_path([(0, level), (20, level)], f"line {line.kind}"), _text(26, level + 4, line.label)]
    return _svg(title, _ends(series, format_y), bottom + _BOTTOM, parts)


def _ends(series: Iterable[Line], format_y: Callable[[float], str]) -> str:
    """Say where lines begin and end, for who cannot see them."""
    said = []
    for line in series:
        (first, before), (last, after) = line.points[0], line.points[-1]
        said.append(
            f"{line.label}: {format_y(before)} at step {first:,.6g}, {format_y(after)} at step {last:,.6g}, "
            f"between {format_y(min(y for _, y in line.points))} and {format_y(max(y for _, y in line.points))}"
        )
    return "; ".join(said)


def _svg(title: str, described: str, height: float, parts: Iterable[Markup]) -> Markup:
    frame = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>{}</svg>'
    whole = f"{title}. {described}."
    return Markup(frame).format(WIDTH, _n(height), whole, whole, Markup("").join(parts))


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "plain") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(_n(x), _n(y), anchor, kind, text)


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="2" class="{}"/>').format(
        _n(x), _n(y), _n(width), _n(height), kind
    )


def _path(points: Sequence[Point], kind: str) -> Markup:
    way = " ".join(f"{'L' if number else 'M'}{_n(x)} {_n(y)}" for number, (x, y) in enumerate(points))
    return Markup('<path d="{}" class="{}"/>').format(way, kind)


def _n(number: float) -> str:
    """Return a coordinate without digits that nobody sees."""
    return f"{number:.1f}".removesuffix(".0")
