"""Histograms as inline SVG: two sets of values stacked, thresholds as lines, all bins in a folded table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opensora.data.reporting.markup import number, table
from opensora.page import text

WIDTH, HEIGHT, FOOT = 320, 110, 34  # pixels of a histogram; the foot holds its axis
BINS = 32
FEW = 8  # bins of whole numbers, at least: a single one would be a wall
TAIL = 0.6  # values that far beyond the central 98 % (as a share of it) are gathered in an outer bin
STEEP = 12.0  # 99th percentile by median above which the axis is logarithmic


@dataclass(frozen=True)
class Limit:
    """A threshold to draw."""

    value: float
    name: str  # as "min 0.2"


@dataclass(frozen=True)
class Axis:
    """Edges of the bins, and whether values lie beyond them (which the outer bins hold)."""

    edges: np.ndarray
    log: bool
    below: bool
    above: bool

    def place(self, value: float) -> float:
        """Where `value` lies, in pixels from the left."""
        low, high = (float(edge) for edge in self.edges[[0, -1]])
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low))) * WIDTH


def choose_axis(values: np.ndarray, limits: Sequence[Limit]) -> Axis:
    """Bins for values [N] of any range: one a whole number where they are few, logarithmic where they are skewed."""
    drawn = [limit.value for limit in limits]
    low, high = min([float(values.min()), *drawn]), max([float(values.max()), *drawn])
    if high - low <= 2 * BINS and (values == np.round(values)).all():
        room = max(0.0, FEW - (high - low)) / 2
        return Axis(np.arange(math.floor(low - room) - 0.5, math.ceil(high + room) + 1), False, False, False)
    first, middle, last = (float(value) for value in np.percentile(values, (1, 50, 99)))
    if first > 0 and last > STEEP * middle:
        low = max(low, first / 10)
        return Axis(np.geomspace(low, high, BINS + 1), True, bool((values < low).any()), False)
    reach = TAIL * (last - first)
    left, right = min([max(low, first - reach), *drawn]), max([min(high, last + reach), *drawn])
    if left == right:
        left, right = left - 0.5, right + 0.5
    below, above = bool((values < left).any()), bool((values > right).any())
    return Axis(np.linspace(left, right, BINS + 1), False, below, above)


def histogram(
    name: str,
    kept: np.ndarray,
    dropped: np.ndarray,
    weights: tuple[float, float] = (1.0, 1.0),
    limits: Sequence[Limit] = (),
    legend: tuple[str, str] = ("kept", "dropped"),
) -> str:
    """A figure: both sets of values stacked, thresholds as lines, quantiles in words, all bins in a folded table.

    Args:
        weights: rows that one value stands for, where the values are a sample.
    """
    axis = choose_axis(np.concatenate([kept, dropped]), limits)
    inside = [np.clip(values, axis.edges[0], axis.edges[-1]) for values in (kept, dropped)]
    counts = [np.histogram(values, axis.edges)[0] * weight for values, weight in zip(inside, weights, strict=True)]
    said = {
        title: [number(float(value)) for value in np.percentile(values, (5, 50, 95))]
        for title, values in zip(legend, (kept, dropped), strict=True)
        if len(values)
    }
    lines = "".join(
        f"<small>{text(title)} {low} – <b>{mid}</b> – {high}</small>" for title, (low, mid, high) in said.items()
    )
    spoken = "; ".join(f"{title} {', '.join(quantiles)}" for title, quantiles in said.items())
    body = _bars(axis, counts, legend) + "".join(_limit(axis, limit) for limit in limits) + _axis(axis)
    label = f"{name}, 5th percentile, median and 95th: {spoken}"
    svg = f"<svg viewBox='0 -14 {WIDTH} {HEIGHT + FOOT}' role=img aria-label='{text(label)}'>{body}</svg>"
    rows = [
        [_span(axis, index), *(number(round(float(count[index]))) for count in counts)]
        for index in range(len(axis.edges) - 1)
        if counts[0][index] or counts[1][index]
    ]
    values = f"<details><summary>values</summary>{table([text(name), *legend], rows)}</details>"
    return f"<figure class=chart><figcaption>{text(name)}{lines}</figcaption>{svg}{values}</figure>"


def _bars(axis: Axis, counts: list[np.ndarray], legend: tuple[str, str]) -> str:
    top = max(float((counts[0] + counts[1]).max()), 1.0)
    parts = []
    for index, (kept, dropped) in enumerate(zip(*counts, strict=True)):
        if not kept and not dropped:
            continue
        left, right = axis.place(axis.edges[index]), axis.place(axis.edges[index + 1])
        heights = [max(1.5, HEIGHT * part / top) if part else 0.0 for part in (kept, dropped)]
        tip = f"{_span(axis, index)}: {number(round(kept))} {legend[0]}, {number(round(dropped))} {legend[1]}"
        foot = float(HEIGHT)
        drawn = ""
        for kind, height in zip(("kept", "dropped"), heights, strict=True):
            foot -= height
            if height:
                wide = max(1.0, right - left - 1)
                drawn += f"<rect class={kind} x={left:.1f} y={foot:.1f} width={wide:.1f} height={height:.1f} />"
        parts.append(f"<g><title>{text(tip)}</title>{drawn}</g>")
    return "".join(parts)


def _span(axis: Axis, index: int) -> str:
    low, high = float(axis.edges[index]), float(axis.edges[index + 1])
    if high - low == 1 and low % 1 == 0.5:
        return number(low + 0.5)
    if index == 0 and axis.below:
        return f"up to {number(high)}"
    if index == len(axis.edges) - 2 and axis.above:
        return f"{number(low)} and more"
    return f"{number(low)} to {number(high)}"


def _limit(axis: Axis, limit: Limit) -> str:
    place = axis.place(limit.value)
    anchor = "end" if place > WIDTH / 2 else "start"
    return (
        f"<g class=limit><line x1={place:.1f} x2={place:.1f} y1=-12 y2={HEIGHT} />"
        f"<text x={place + (-4 if anchor == 'end' else 4):.1f} y=-4 text-anchor={anchor}>{text(limit.name)}</text></g>"
    )


def _axis(axis: Axis) -> str:
    low, high = float(axis.edges[0]), float(axis.edges[-1])
    parts = [f"<line class=base x1=0 x2={WIDTH} y1={HEIGHT} y2={HEIGHT} />"]
    for tick in _ticks(low, high, axis.log):
        place = axis.place(tick)
        anchor = "start" if place < 12 else "end" if place > WIDTH - 12 else "middle"
        parts.append(f"<text x={place:.1f} y={HEIGHT + 14} text-anchor={anchor}>{number(tick)}</text>")
    return "".join(parts)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Four to seven round values of [low, high]."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if len(decades) < 3 else (1,)
        return [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(part * power for part in (1, 0.5, 0.2, 0.1) if (high - low) / (part * power) >= 4)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
