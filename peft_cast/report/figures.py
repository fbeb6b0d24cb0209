"""The report's figures as inline SVG. Colours of text and lines come from the page's style, so that they follow its mode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup


# Points on viridis (CC0, Smith and van der Walt): even steps for the eye, and for colour-blind eyes.
VIRIDIS = ((68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
           (173, 220, 48), (253, 231, 37))  # fmt: skip
CHARACTER = 6.4  # width of a character in labels


def colour(share: float) -> tuple[int, int, int]:
    """The colour, red, green and blue of 255, of a value's place on the scale, from 0 to 1."""
    at = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    left = min(int(at), len(VIRIDIS) - 2)
    red, green, blue = (round(a + (at - left) * (b - a)) for a, b in zip(VIRIDIS[left], VIRIDIS[left + 1]))
    return red, green, blue


def _hex(rgb: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _text_on(rgb: Sequence[int]) -> str:
    """Black or white, whichever is in stronger contrast to a colour (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"


def _svg(width: float, height: float, name: str, parts: Sequence[Markup]) -> Markup:
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}" '
    head = Markup(head + 'role="img" aria-label="{name}">').format(w=width, h=height, name=name)
    return Markup("").join([head, *parts, Markup("</svg>")])


def _label(x: float, y: float, text: str, anchor: str = "middle", turn: int = 0, style: str = "label") -> Markup:
    turned = Markup(' transform="rotate({} {:.1f} {:.1f})"').format(turn, x, y) if turn else ""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}"{}>{}</text>').format(
        x, y, anchor, style, turned, text
    )


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    scale: tuple[float, float],
    *,
    name: str,
    axes: tuple[str, str],
    numbers: bool = False,
    marked: Mapping[int, int] | None = None,
) -> Markup:
    """A matrix as coloured cells, each with its value as a tooltip.

    Args:
        values: The matrix, (rows, columns); `None` and what is not finite is left empty.
        rows, columns: Labels. Where they are too dense only some are shown.
        scale: The values of the scale's two ends.
        name (`str`): What is read out instead of the figure.
        axes: Titles of the rows and the columns.
        numbers (`bool`): Whether to write the values into the cells, which are wider then.
        marked: Row → column of cells to mark, joined by a line.
    """
    wide, high = (36.0, 17.0) if numbers else (min(16.0, max(5.0, 290 / max(len(columns), len(rows) / 2))),) * 2
    upright = any(len(column) * CHARACTER > wide for column in columns) and numbers
    left = 24 + CHARACTER * max(len(row) for row in rows)
    top = 26 + (CHARACTER * max(len(column) for column in columns) if upright else 10)
    right, bottom = left + wide * len(columns), top + high * len(rows)
    every_row = math.ceil(13 / high)
    every_column = 1 if numbers else math.ceil((max(len(c) for c in columns) * CHARACTER + 4) / wide)
    parts = [_label((left + right) / 2, 12, axes[1], style="axis")]
    # The title of the rows stands beside them, and needs more room than two or three of them give.
    half = CHARACTER * len(axes[0]) / 2 + 4
    middle = max((top + bottom) / 2, half)
    parts.append(_label(11, middle, axes[0], turn=-90, style="axis"))
    for j in range(0, len(columns), every_column):
        x = left + (j + 0.5) * wide
        parts.append(_label(x + 4, top - 5, columns[j], "start", -90) if upright else _label(x, top - 5, columns[j]))
    for i in range(0, len(rows), every_row):
        parts.append(_label(left - 5, top + (i + 0.5) * high + 4, rows[i], "end"))
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            parts.append(
                _cell(value, scale, left + j * wide, top + i * high, wide, high, rows[i], columns[j], numbers)
            )
    if marked:
        centres = [(left + (j + 0.5) * wide, top + (i + 0.5) * high) for i, j in sorted(marked.items())]
        parts.append(_path_over(centres, wide))
    width = max(right + 8, (left + right) / 2 + CHARACTER * len(axes[1]) / 2)
    return _svg(width, max(bottom + 6, middle + half), name, parts)


def _cell(value, scale, x, y, wide, high, row: str, column: str, number: bool) -> Markup:
    if value is None or not math.isfinite(value):
        return Markup("")
    low, top = scale
    rgb = colour((value - low) / (top - low) if top > low else 1.0)
    cell = Markup(
        '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}"><title>{}, {}: {:.3f}</title></rect>'
    ).format(x, y, wide + 0.2, high + 0.2, _hex(rgb), row, column, value)
    if number:
        cell += Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle" class="number" fill="{}">{}</text>').format(
            x + wide / 2, y + high - 5, _text_on(rgb), f"{value + 0.0:.2f}".replace("-0.00", "0.00")
        )
    return cell


def _path_over(points: Sequence[tuple[float, float]], wide: float) -> Markup:
    """A line with dots that is seen on every colour: white, edged in black."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [
        Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="{}"/>').format(line, stroke, width)
        for stroke, width in (("#000", 3.5), ("#fff", 1.5))
    ]
    radius = min(3.5, max(1.5, wide * 0.25))
    parts += [
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" fill="#fff" stroke="#000" stroke-width="1.2"/>').format(
            x, y, radius
        )
        for x, y in points
    ]
    return Markup("").join(parts)


def colour_scale(scale: tuple[float, float], name: str) -> Markup:
    """The legend of a heat map: its colours with the values at both ends and in the middle."""
    left, width, steps = 14, 180, 30
    parts = [
        Markup('<rect x="{:.1f}" y="2" width="{:.1f}" height="10" fill="{}"/>').format(
            left + width * i / steps, width / steps + 0.3, _hex(colour(i / (steps - 1)))
        )
        for i in range(steps)
    ]
    for share in (0.0, 0.5, 1.0):
        parts.append(_label(left + width * share, 26, f"{scale[0] + share * (scale[1] - scale[0]):.2f}"))
    return _svg(width + 2 * left, 30, f"{name}: from {scale[0]:.2f}, dark, to {scale[1]:.2f}, light", parts)


def curve(points: Sequence[tuple[float, float]], name: str, level: float | None = None) -> Markup:
    """One curve over the steps of the training, from zero up.

    Args:
        points: Step and value; not empty, finite.
        name (`str`): What is read out instead of the figure.
        level (`float`, *optional*): A value to compare with, drawn as a dashed line.
    """
    left, right, top, bottom = 46.0, 312.0, 10.0, 150.0
    last = max(step for step, _ in points) or 1
    ticks = ticks_up_to(max([value for _, value in points] + ([level] if level is not None else [])))
    highest = ticks[-1]

    def at(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * step / last, bottom - (bottom - top) * max(value, 0.0) / highest

    parts = []
    digits = max(0, -math.floor(math.log10(ticks[1])))
    for tick in ticks:
        y = at(0, tick)[1]
        parts.append(Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" class="grid"/>').format(left, right, y, y))
        parts.append(_label(left - 6, y + 4, f"{tick:.{digits}f}", "end"))
    for step, anchor in ((0, "middle"), (last / 2, "middle"), (last, "end")):
        parts.append(_label(at(step, 0)[0], bottom + 16, f"{step:.0f}", anchor))
    parts.append(_label((left + right) / 2, bottom + 32, "step", style="axis"))
    if level is not None:
        y = at(0, level)[1]
        parts.append(Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" class="level"/>').format(left, right, y, y))
    line = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
    parts.append(Markup('<polyline points="{}" class="curve"/>').format(line))
    for step, value in points:
        x, y = at(step, value)
        parts.append(
            Markup(
                '<circle cx="{:.1f}" cy="{:.1f}" r="2.5" class="dot"><title>step {:.0f}: {:.4g}</title></circle>'
            ).format(x, y, step, value)
        )
    return _svg(320, 188, name, parts)


def ticks_up_to(highest: float) -> list[float]:
    """Round numbers from 0 to at least `highest`, three to six of them."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(highest / step * 0.999) + 1)]
