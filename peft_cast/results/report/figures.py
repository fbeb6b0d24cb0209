"""The report's figures as inline SVG. Colors of text and lines come from the page's style, so that they follow its
mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup


# Points on viridis (CC0, Smith and van der Walt): even steps for the eye, and for color-blind eyes.
_POINTS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
VIRIDIS = [tuple(bytes.fromhex(point)) for point in _POINTS.split()]
CHARACTER = 6.4  # width of a character in labels


def color(share: float) -> tuple[int, int, int]:
    """The color, red, green and blue of 255, of a value's place on the scale, from 0 to 1."""
    at = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    left = min(int(at), len(VIRIDIS) - 2)
    red, green, blue = (round(a + (at - left) * (b - a)) for a, b in zip(VIRIDIS[left], VIRIDIS[left + 1]))
    return red, green, blue


def _hex(rgb: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _text_on(rgb: Sequence[int]) -> str:
    """Black or white, whichever is in stronger contrast to a color (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"


def _tag(name: str, *inside: str, **attributes: Any) -> Markup:
    """An element. In names of attributes `_` stands for `-` and is dropped at the end; `None` leaves one out."""
    shown = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    texts = {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in shown.items()}
    opened = Markup("").join(Markup(' {}="{}"').format(*item) for item in texts.items())
    return Markup("<{0}{1}>{2}</{0}>").format(name, opened, Markup("").join(inside))


def _svg(width: float, height: float, name: str, parts: Sequence[Markup]) -> Markup:
    size = {"viewBox": f"0 0 {width:.0f} {height:.0f}", "width": f"{width:.0f}", "height": f"{height:.0f}"}
    return _tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", **size, role="img", aria_label=name)


def _label(x: float, y: float, text: str, anchor: str = "middle", turn: int = 0, style: str = "label") -> Markup:
    turned = f"rotate({turn} {x:.1f} {y:.1f})" if turn else None
    return _tag("text", text, x=float(x), y=float(y), text_anchor=anchor, class_=style, transform=turned)


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
    """A grid of colored cells, the value of each in its tooltip, and with `numbers` in the cell, which is wider then.

    Cells of `None`, NaN or infinity are left empty, and labels where they are too dense. `scale` are the values of
    its two ends, `name` is read out instead of the figure, `axes` are the titles of rows and columns, and `marked`
    cells (row → column) are joined by a line.
    """
    wide, high = (36.0, 17.0) if numbers else (min(16.0, max(5.0, 290 / max(len(columns), len(rows) / 2))),) * 2
    longest = CHARACTER * max(len(column) for column in columns)
    upright = numbers and longest > wide
    left, top = 24 + CHARACTER * max(len(row) for row in rows), 26 + (longest if upright else 10)
    right, bottom = left + wide * len(columns), top + high * len(rows)
    # The title of the rows stands beside them, and needs more room than two or three of them give.
    half = CHARACTER * len(axes[0]) / 2 + 4
    middle = max((top + bottom) / 2, half)
    parts = [
        _label((left + right) / 2, 12, axes[1], style="axis"),
        _label(11, middle, axes[0], turn=-90, style="axis"),
    ]
    for j in range(0, len(columns), 1 if numbers else math.ceil((longest + 4) / wide)):
        x = left + (j + 0.5) * wide
        parts.append(_label(x + 4, top - 5, columns[j], "start", -90) if upright else _label(x, top - 5, columns[j]))
    for i in range(0, len(rows), math.ceil(13 / high)):
        parts.append(_label(left - 5, top + (i + 0.5) * high + 4, rows[i], "end"))
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if value is None or not math.isfinite(value):
                continue
            x, y = left + j * wide, top + i * high
            rgb = color((value - scale[0]) / (scale[1] - scale[0]) if scale[1] > scale[0] else 1.0)
            tooltip = _tag("title", f"{rows[i]}, {columns[j]}: {value:.3f}")
            parts.append(_tag("rect", tooltip, x=x, y=y, width=wide + 0.2, height=high + 0.2, fill=_hex(rgb)))
            if numbers:
                at = {"x": x + wide / 2, "y": y + high - 5, "text_anchor": "middle", "class_": "number"}
                parts.append(_tag("text", f"{value:.2f}".replace("-0.00", "0.00"), **at, fill=_text_on(rgb)))
    if marked:
        parts += _path_over(
            [(left + (j + 0.5) * wide, top + (i + 0.5) * high) for i, j in sorted(marked.items())], wide
        )
    width = max(right + 8, (left + right) / 2 + CHARACTER * len(axes[1]) / 2)
    return _svg(width, max(bottom + 6, middle + half), name, parts)


def _path_over(points: Sequence[tuple[float, float]], wide: float) -> list[Markup]:
    """A line with dots that is seen on every color: white, edged in black."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    strokes = (("#000", 3.5), ("#fff", 1.5))
    dot = {"r": min(3.5, max(1.5, wide * 0.25)), "fill": "#fff", "stroke": "#000", "stroke_width": 1.2}
    parts = [
        _tag("polyline", points=line, fill="none", stroke=stroke, stroke_width=width) for stroke, width in strokes
    ]
    return parts + [_tag("circle", cx=x, cy=y, **dot) for x, y in points]


def color_scale(scale: tuple[float, float], name: str) -> Markup:
    """The legend of a heat map: its colors with the values at both ends and in the middle."""
    left, width, steps = 14, 180, 30
    at = {"y": 2, "width": width / steps + 0.3, "height": 10}
    parts = [_tag("rect", x=left + width * i / steps, **at, fill=_hex(color(i / (steps - 1)))) for i in range(steps)]
    for share in (0.0, 0.5, 1.0):
        parts.append(_label(left + width * share, 26, f"{scale[0] + share * (scale[1] - scale[0]):.2f}"))
    return _svg(width + 2 * left, 30, f"{name}: from {scale[0]:.2f}, dark, to {scale[1]:.2f}, light", parts)


def curve(points: Sequence[tuple[float, float]], name: str, level: float | None = None) -> Markup:
    """A curve of finite points (step, value), from zero up, with `level` as a dashed line to compare with."""
    left, right, top, bottom = 46.0, 312.0, 10.0, 150.0
    last = max(step for step, _ in points) or 1
    ticks = ticks_up_to(max([value for _, value in points] + ([] if level is None else [level])))
    digits = max(0, -math.floor(math.log10(ticks[1])))

    def across(step: float) -> float:
        return left + (right - left) * step / last

    def up(value: float) -> float:
        return bottom - (bottom - top) * max(value, 0.0) / ticks[-1]

    lines = [(tick, "grid") for tick in ticks] + ([] if level is None else [(level, "level")])
    parts = [_tag("line", x1=left, x2=right, y1=up(value), y2=up(value), class_=style) for value, style in lines]
    parts += [_label(left - 6, up(tick) + 4, f"{tick:.{digits}f}", "end") for tick in ticks]
    for step, anchor in ((0, "middle"), (last / 2, "middle"), (last, "end")):
        parts.append(_label(across(step), bottom + 16, f"{step:.0f}", anchor))
    parts.append(_label((left + right) / 2, bottom + 32, "step", style="axis"))
    places = [(across(step), up(value)) for step, value in points]
    parts.append(_tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_="curve"))
    for (x, y), (step, value) in zip(places, points):
        parts.append(_tag("circle", _tag("title", f"step {step:.0f}: {value:.4g}"), cx=x, cy=y, r=2.5, class_="dot"))
    return _svg(320, 188, name, parts)


def ticks_up_to(highest: float) -> list[float]:
    """Round numbers from 0 to at least `highest`, three to six of them."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(highest / step * 0.999) + 1)]
