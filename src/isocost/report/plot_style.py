"""Ticks, colours, marker shapes and line dashes, shared by the matplotlib and the plotly figures.

No difference relies on colour only: sizes also differ in marker shape, solvers in marker shape and dash.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

MARKERS = (
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
"""Marker shapes: (matplotlib name, plotly name)."""
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
"""Line dashes: plotly name -> matplotlib name."""
INK, MUTED, HAIRLINE, OPTIMUM, EMPTY = "#1c2127", "#5d6672", "#e4e7eb", "#d55e00", "#eceef1"
CATEGORY_COLORS = ("#0072b2", "#d55e00", "#00795a", "#a03a8f", "#1c2127", "#7a5c00")
"""Colours of unordered categories, distinguishable by colour-blind readers; contrast against white is 3.9 to 1 or more."""
MAX_TICKS = 20


def kind_style(index: int) -> tuple[str, tuple[str, str], str]:
    """Return colour, marker shape and dash of category number `index`."""
    return CATEGORY_COLORS[index % len(CATEGORY_COLORS)], MARKERS[index % len(MARKERS)], list(DASHES)[index % len(DASHES)]


@cache
def size_colors(num_sizes: int) -> tuple[str, ...]:
    """Return viridis colours from dark (small) to light (large). The yellow end fades on white and is left out."""
    positions = np.linspace(0.0, 0.82, num_sizes) if num_sizes > 1 else [0.3]
    return tuple(to_hex(colormaps["viridis"](position)) for position in positions)


def tick_indices(count: int) -> list[int]:
    """Return the indices of 0 to `count` - 1 that get a tick: all of them, or at most `MAX_TICKS`, evenly spread."""
    step = -(-count // MAX_TICKS)
    return list(range(0, count, step))


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return ticks and labels of a logarithmic axis.

    Ticks are powers of 2 between 1/4 and 2^14; elsewhere 1, 2 and 5 times powers of 10, or only powers of 10 over wide ranges.
    """
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
