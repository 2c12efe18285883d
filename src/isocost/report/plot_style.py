"""Ticks, colours, shapes of marks and dashes: how figures tell things apart, the same for matplotlib and plotly.

Nothing is told by colour alone: sizes differ in the shape of their marks too, solvers in shape and dash.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

MARKS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle-up"),
    ("D", "diamond"),
    ("v", "triangle-down"),
    ("P", "cross"),
    ("X", "x"),
    ("p", "pentagon"),
    ("*", "star"),
    ("h", "hexagon"),
    ("<", "triangle-left"),
    (">", "triangle-right"),
)
"""Shapes of marks, as matplotlib and as plotly call them."""
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
"""Dashes of lines, as plotly and as matplotlib call them."""
INK, MUTED, HAIRLINE, OPTIMUM, EMPTY = "#1c2127", "#5d6672", "#e4e7eb", "#d55e00", "#eceef1"
FAMILIES = ("#0072b2", "#d55e00", "#00795a", "#a03a8f", "#1c2127", "#7a5c00")
"""Colours of things without an order, 3.9 to 1 or more against white, told apart by the colour-blind too."""
MAX_TICKS = 20


def kind_style(at: int) -> tuple[str, tuple[str, str], str]:
    """Colour, shape of the mark and dash of the thing without an order at place `at`."""
    return FAMILIES[at % len(FAMILIES)], MARKS[at % len(MARKS)], list(DASHES)[at % len(DASHES)]


def size_colors(num_sizes: int) -> list[str]:
    """Colours of viridis from dark (small) to light (large), short of its yellow, which fades on white."""
    places = np.linspace(0.0, 0.82, num_sizes) if num_sizes > 1 else [0.3]
    return [to_hex(colormaps["viridis"](place)) for place in places]


def some_places(number: int) -> list[int]:
    """Places of 0 to `number` - 1 that get a tick: all, or at most `MAX_TICKS` of them, evenly spread."""
    step = -(-number // MAX_TICKS)
    return list(range(0, number, step))


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Places and labels for a logarithmic axis: powers of two from 1/4 up, else 1-2-5, or powers of ten over wide ranges."""
    if low >= 0.25 and high <= 2**14:
        ticks = [2.0**power for power in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    else:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    inside = [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]
    return inside, [_tick_label(tick) for tick in inside]


def _tick_label(value: float) -> str:
    if value < 1e4:
        return f"{value:g}"
    power = math.floor(math.log10(value))
    digit = round(value / 10**power)
    superscript = str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{'' if digit == 1 else f'{digit}×'}10{superscript}"
