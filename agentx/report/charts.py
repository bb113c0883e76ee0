"""Curves as inline SVG, drawn here so that the page needs no library and follows its colours.

The colours are CSS classes of report.css, so a chart turns dark with the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 300, 180
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 10, 24
MAX_POINTS = 240

Point = tuple[float, float]


def curve(steps: Sequence[float], values: Sequence[float], label: str) -> Markup:
    """One metric over steps: the values as a faint line, their running mean as a strong one.

    Values that are not finite break the faint line. Returns nothing to draw, an empty string, when
    none is finite.
    """
    points = [(float(s), float(v)) for s, v in zip(steps, values, strict=True)]
    points = _thin(points)
    finite = [p for p in points if math.isfinite(p[1])]
    if not finite:
        return Markup("")
    y_ticks = nice_ticks(min(v for _, v in finite), max(v for _, v in finite), 4)
    first, last = points[0][0], points[-1][0]
    x_ticks = [t for t in nice_ticks(first, last, 4) if first <= t <= last]

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick, name in zip(y_ticks, _tick_names(y_ticks), strict=True):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 7}" y="{y(tick) + 4:.1f}">{name}</text>')
    for tick, name in zip(x_ticks, _tick_names(x_ticks), strict=True):
        parts.append(f'<text class="x" x="{x(tick):.1f}" y="{HEIGHT - 7}">{name}</text>')
    for line in _unbroken(points):
        parts.append(f'<path class="raw" d="{_path([(x(s), y(v)) for s, v in line])}"/>')
    mean = [(x(s), y(v)) for s, v in running_mean(finite)]
    parts.append(f'<path class="mean" d="{_path(mean)}"/>')
    parts.append(f'<circle class="end" cx="{mean[-1][0]:.1f}" cy="{mean[-1][1]:.1f}" r="3.5"/>')
    about = html.escape(
        f"{label}: {finite[0][1]:.4g} at step {finite[0][0]:.0f}, "
        f"{finite[-1][1]:.4g} at step {finite[-1][0]:.0f}"
    )
    return Markup(
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}">'
        f"{''.join(parts)}</svg>"
    )


def nice_ticks(low: float, high: float, num_steps: int) -> list[float]:
    """Round numbers that enclose [low, high], about `num_steps` steps apart: at least two.

    nice_ticks(0.3, 6.9, 4)  ->  [0, 2, 4, 6, 8]
    """
    if high <= low:
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / num_steps
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(start, stop + 1)]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """The mean over a centred window of about an eighth of the points.

    Towards the ends the window shrinks from both sides, so that the mean never lags behind.
    """
    out = []
    for i, (step, _) in enumerate(points):
        half = min(len(points) // 16, i, len(points) - 1 - i)
        window = points[i - half : i + half + 1]
        out.append((step, sum(value for _, value in window) / len(window)))
    return out


def _thin(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS points, each the mean of its neighbours: a page stays small."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    # The last bucket keeps the last step, so that the axis ends where the run did.
    return [(bucket[-1][0], sum(v for _, v in bucket) / len(bucket)) for bucket in buckets]


def _unbroken(points: Sequence[Point]) -> list[list[Point]]:
    """The stretches of finite values."""
    lines: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            lines[-1].append(point)
        elif lines[-1]:
            lines.append([])
    return [line for line in lines if line]


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _tick_names(ticks: Sequence[float]) -> list[str]:
    """The ticks as text, all with the same decimals; thousands as k, small ones as they are."""
    largest = max((abs(t) for t in ticks), default=0)
    if largest >= 10_000:
        return [f"{t / 1000:g}k" if t else "0" for t in ticks]
    if largest < 1e-3:
        return [f"{t:g}" for t in ticks]
    decimals = next(
        d for d in range(7) if d == 6 or all(abs(t - round(t, d)) < 1e-9 for t in ticks)
    )
    return [f"{t:.{decimals}f}".replace("-", "\u2212") for t in ticks]
