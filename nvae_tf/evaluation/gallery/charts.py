"""Curves as SVG, with units, ticks, and axes that the first points do not flatten."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT = 360, 212
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 38  # margins around the frame
BEGINNING = 0.1  # portion of the steps that may lie outside the vertical axis
TOLERATED = 1.6  # the axis shows them if it becomes no longer than this many times
TICKS = 4  # about as many on an axis
UNITS = ((1e6, "M"), (1e3, "k"))  # of labels

Points = Sequence[tuple[int, float]]


def chart(curves: Mapping[str, Points], title: str, logarithmic: bool = False) -> str:
    """Draws curves as SVG.

    Args:
        curves: Points (step, value) of each curve, by its name, also its class in the style sheet.
        title: What is drawn, for those who cannot see it.
        logarithmic: Whether the vertical axis is logarithmic; it has no place for values of 0.
    """
    if logarithmic:
        curves = {
            name: [(x, math.log10(y)) for x, y in points if y > 0.0]
            for name, points in curves.items()
        }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    x_low, x_high = _padded(*_extent([x for line in curves.values() for x, _ in line]), 0.0)
    y_low, y_high = vertical_range(curves)

    def place(point):
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = TOP + (y_high - point[1]) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        # Far outside the frame, where it is clipped, the exact place does not matter.
        return x, min(max(y, -HEIGHT), 2 * HEIGHT)

    parts = []
    for value, text in _vertical_ticks(y_low, y_high, logarithmic):
        y = place((x_low, value))[1]
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    steps = ticks(x_low, x_high)
    for value, text in zip(steps, labels(steps), strict=True):
        x = place((value, y_low))[0]
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{text}</text>'
        )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>')
    for name, points in curves.items():
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
        css = html.escape(name)
        if len(points) == 1:
            x, y = place(points[0])
            parts.append(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        else:
            parts.append(f'<polyline class="{css}" points="{where}"/>')
    # An inner <svg> clips what lies outside the frame, without names that would have to be unique.
    frame = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    lines = [part for part in parts if part.startswith(("<polyline", "<circle"))]
    others = [part for part in parts if part not in lines]
    view = f"{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f'{"".join(others)}<svg {frame} viewBox="{view}">{"".join(lines)}</svg></svg>'
    )


def vertical_range(curves: Mapping[str, Points]) -> tuple[float, float]:
    """The ends of the vertical axis: without the first values, if those would flatten the rest.

    Args:
        curves: Points (step, value) of each curve.
    """
    first, last = _extent([x for points in curves.values() for x, _ in points])
    later = first + BEGINNING * (last - first)
    everything = _extent([y for points in curves.values() for _, y in points])
    late = _extent([y for points in curves.values() for x, y in points if x >= later])
    flattened = everything[1] - everything[0] > TOLERATED * (late[1] - late[0]) > 0.0
    return _padded(*(late if flattened else everything), 0.05)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, at equal distances: 1, 2 or 5 times a power of ten."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    distance = min((1.0, 2.0, 5.0, 10.0), key=lambda m: abs(m * power - rough)) * power
    first, last = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    return [number * distance for number in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Ticks at equal distances as labels, with as many decimals as tell them apart.

    Args:
        values: Places of the ticks, as `ticks` returns them.
    """
    largest = max(map(abs, values), default=0.0)
    if len(values) < 2 or not largest:
        return [short(value) for value in values]
    distance = values[1] - values[0]
    size, unit = next((pair for pair in UNITS if largest >= pair[0]), (1.0, ""))
    digits = math.floor(math.log10(largest) + 1e-9) - math.floor(math.log10(distance) + 1e-9)
    if largest < 1e-3:
        return [f"{value:.{max(digits, 0)}e}" if value else "0" for value in values]
    decimals = max(0, -math.floor(math.log10(distance / size) + 1e-9))
    return [f"{value / size:.{decimals}f}{unit}" if value else "0" for value in values]


def readable(value: float) -> str:
    """A number in a text, with four digits at least: ``277.4``, ``0.001234``, ``12,345``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def short(value: float) -> str:
    """A round number as a label: ``0.001``, ``2e-05``, ``120``, ``1.2k``, ``3M``."""
    for size, unit in UNITS:
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.3g}"


def _vertical_ticks(low: float, high: float, logarithmic: bool):
    """Places and labels of the vertical axis."""
    if not logarithmic:
        places = ticks(low, high)
        return list(zip(places, labels(places), strict=True))
    powers = range(math.floor(low), math.ceil(high) + 1)
    decades = high - low
    factors = (1,) if decades > 2.5 else (1, 3) if decades > 1.2 else (1, 2, 5)
    values = [factor * 10.0**power for power in powers for factor in factors]
    inside = [value for value in values if low <= math.log10(value) <= high]
    return [(math.log10(value), short(value)) for value in inside]


def _extent(values: Sequence[float]) -> tuple[float, float]:
    array = np.array(values, np.float64)
    return float(array.min()), float(array.max())


def _padded(low: float, high: float, portion: float) -> tuple[float, float]:
    """A range that is a portion longer at both ends, and not empty."""
    if high <= low:
        half = max(abs(low), 1.0) / 2
        return low - half, high + half
    return low - portion * (high - low), high + portion * (high - low)
