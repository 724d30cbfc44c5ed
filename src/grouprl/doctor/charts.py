"""Small charts as SVG: lines, dots and a goal, without a script."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grouprl.doctor.table import Array

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 22
MOST_POINTS = 240
"""A line has no more points; each is the mean of its neighbours."""


def chart(
    name: str, about: str, steps: Array, values: Array, dots: Array | None = None, goal: float | None = None
) -> str:
    """A figure: ``values [rows]`` over ``steps [rows]`` as a line, ``dots [rows]`` beside it, ``goal`` dashed.

    NaN is left out. Empty text where there is nothing to draw.
    """
    import numpy as np

    line = np.isfinite(values) & np.isfinite(steps)
    dotted = np.zeros_like(line) if dots is None else np.isfinite(dots) & np.isfinite(steps)
    ys = np.concatenate([values[line], *([dots[dotted]] if dots is not None else [])])
    xs = np.concatenate([steps[line], steps[dotted]])
    if not len(ys):
        return ""
    low, high = float(ys.min()), float(ys.max())
    if goal is not None:
        low, high = min(low, goal), max(high, goal)
    x_ticks, y_ticks = _ticks(float(xs.min()), float(xs.max()), 4), _ticks(low, high, 4)
    x0, x1 = float(xs.min()), float(xs.max())
    y0, y1 = min(low, y_ticks[0]), max(high, y_ticks[-1])
    if y1 <= y0:
        y0, y1 = y0 - 0.5 * (abs(y0) or 1), y1 + 0.5 * (abs(y1) or 1)

    def x(value: float) -> float:
        return LEFT + (value - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(name, quote=True)}">']
    for tick in y_ticks:
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in x_ticks:
        anchor = "end" if x(tick) > WIDTH - 30 else "middle"
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{_label(tick)}</text>')
    if goal is not None:
        at = f"{y(goal):.1f}"
        parts.append(f'<line class="goal" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
    if line.any():
        points = list(zip(*_thinned(steps[line], values[line]), strict=True))
        if len(points) == 1:
            points *= 2
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        parts.append(f'<path class="a" d="M{path}"/>')
    if dots is not None:
        for a, b in zip(steps[dotted], dots[dotted], strict=True):
            parts.append(f'<circle class="b" r="3.6" cx="{x(a):.1f}" cy="{y(b):.1f}"/>')
    caption = f"<figcaption>{html.escape(name)}<span>{html.escape(about)}</span></figcaption>"
    return f"<figure>{caption}{''.join(parts)}</svg></figure>"


def _thinned(xs: Array, ys: Array) -> tuple[Array, Array]:
    import numpy as np

    if len(xs) <= MOST_POINTS:
        return xs, ys
    return tuple(np.array([part.mean() for part in np.array_split(v, MOST_POINTS)]) for v in (xs, ys))  # type: ignore[return-value]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, ``about`` so many, within ``low`` and ``high``; at least one."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
    first = math.ceil(low / unit - 1e-9)
    return [n * unit for n in range(first, math.floor(high / unit + 1e-9) + 1)] or [low]


def _label(value: float) -> str:
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if letter == "k" else limit
            return f"{value / scale:.4g}{letter}"
    if size >= 1e3:
        return f"{value:.0f}"
    return f"{value:.3g}" if size >= 1e-3 or value == 0 else f"{value:.0e}"
