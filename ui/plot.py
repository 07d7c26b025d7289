"""The loss as a small drawing, light and right in both colour schemes; gradio's LinePlot loses its lines on updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from reparam_diffusion.jobs.fold import RunState

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 10, 40  # room around the axes
AVERAGED = 20  # points in the running mean


def loss_plot(state: RunState) -> str:
    """Loss of each step, its running mean, and the loss with fixed noise."""
    each = [(float(step), loss) for step, loss in state.losses if math.isfinite(loss)]
    fixed = [(float(row.step), row.loss) for row in state.validations if math.isfinite(row.loss)]
    if len(each) < 2:
        return '<p class="quiet empty">The loss appears here after two steps.</p>'
    mean = running_mean(each)
    highest = max(loss for _, loss in [*each, *fixed])
    lines = [
        ("each", "each step", each),
        ("mean", f"mean of {AVERAGED} points", mean),
        ("fixed", "held-out pictures" if any(row.held_out for row in state.validations) else "fixed noise", fixed),
    ]
    told = f"Loss from {mean[0][1]:.3g} to {mean[-1][1]:.3g} over {int(each[-1][0])} steps"
    legend = "".join(f'<span class="{kind}">{escape(name)}</span>' for kind, name, points in lines if points)
    drawing = _drawing(told, [(kind, points) for kind, _, points in lines if points], state.steps, highest)
    return (
        f'{drawing}<p class="legend">{legend}</p>'
        f'<p class="quiet">Single steps jump about by nature; the pictures say more.</p>{_rate_plot(state)}'
    )


def _rate_plot(state: RunState) -> str:
    """The learning rate, folded."""
    rates = [(float(step), rate) for step, rate in state.rates]
    if len(rates) < 2:
        return ""
    highest = max(rate for _, rate in rates) or 1.0
    told = f"Learning rate, now {rates[-1][1]:.2g}"
    lines = [("mean", rates)]
    return f'<details data-name="rate"><summary>{told}</summary>{_drawing(told, lines, state.steps, highest)}</details>'


def _drawing(told: str, lines: Sequence[tuple[str, Points]], steps: int, highest: float) -> str:
    """Lines over the steps, from zero to a round number above the highest value."""
    last = max(steps, *(int(points[-1][0]) for _, points in lines))
    row = nice_step(highest, 4)
    top = row * max(1, math.ceil(highest / row - 1e-9))
    drawn = "".join(_line(kind, points, last, top) for kind, points in lines)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">'
        f"<title>{told}</title>{_axes(last, top, row)}{drawn}</svg>"
    )


def running_mean(points: Points, *, width: int = AVERAGED) -> list[tuple[float, float]]:
    """Each point's mean with those before it."""
    means = []
    for at, (step, _) in enumerate(points):
        part = [loss for _, loss in points[max(0, at + 1 - width) : at + 1]]
        means.append((step, sum(part) / len(part)))
    return means


def nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten of which `count` reach over the span."""
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power * count >= span * (1 - 1e-9))


def _x(step: float, last: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / max(last, 1)


def _y(loss: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * loss / top


def _line(kind: str, points: Points, last: float, top: float) -> str:
    path = " ".join(f"{_x(step, last):.1f},{_y(loss, top):.1f}" for step, loss in points)
    dots = "".join(f'<circle cx="{_x(s, last):.1f}" cy="{_y(v, top):.1f}" r="3"/>' for s, v in points)
    return f'<g class="{kind}"><polyline points="{path}"/>{dots if kind == "fixed" else ""}</g>'


def _axes(last: float, top: float, row: float) -> str:
    rows = ""
    for number in range(round(top / row) + 1):
        loss = row * number
        y = _y(loss, top)
        rows += f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        rows += f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.3g}</text>'
    stride = max(1, round(nice_step(last, 5)))
    for step in range(0, int(last) + 1, stride):
        rows += f'<text x="{_x(step, last):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{step}</text>'
    return f'<g class="axes">{rows}<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">step</text></g>'
