"""The report: one self-contained HTML page that opens offline, its figures beside it, and a summary in Markdown.

The answer comes first, then what it rests on. A part that the table cannot give says in one line what is missing.
Captions and names come from people's data: the template escapes them, and the page's own policy forbids any network request.

Shape letters: K prompts, H, W height and width in pixels; pictures are uint8 [K, H, W, 3].
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from plotly.offline import get_plotlyjs

from isocost.analysis.frontier import (
    COSTS,
    BudgetChoice,
    best_at_budgets,
    best_first,
    cost_of,
    default_budgets,
    finals,
    format_number,
    format_score,
    metric_of,
    metric_words,
    scored,
    sizes_in_order,
)
from isocost.analysis.recommend import answer
from isocost.errors import RequestError
from isocost.metrics.names import METRICS
from isocost.report import charts, figures, marks
from isocost.store import write_atomically

STUDY_YAML = "study_yaml"
LONGEST_SIDE = 128


@dataclass(frozen=True)
class Control:
    """A row of exclusive choices above a chart; the positions of what is chosen make the key of the drawing."""

    legend: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """A chart with its switches; `drawings` maps "0|1" (a position for each control) to the plotly figures shown together."""

    name: str
    controls: tuple[Control, ...]
    drawings: Mapping[str, Sequence[go.Figure]]
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Missing:
    """A part that is not in the report, and why."""

    why: str


def write_report(
    folder: str | Path,
    study_name: str,
    table: pd.DataFrame,
    metric: str,
    provenance: Mapping[str, Any],
    floors: Mapping[str, float],
    samples: Mapping[str, np.ndarray],
    captions: Sequence[str],
    budgets: Sequence[float] = (),
    strips: Mapping[str, np.ndarray] | None = None,
    others: Mapping[str, str] | None = None,
    findings: Mapping[str, Any] | None = None,
    floor_label: str = marks.FLOOR_LABEL,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write `index.html` and the figures as PNG into `folder`; returns the path of the page.

    Args:
        folder: made where absent.
        study_name: title of the page.
        table: points, as in `isocost.analysis.frontier`.
        metric: what the answer is decided by.
        provenance: facts by name; a mapping as a value becomes a nested list, the text under `study_yaml` is shown as code.
        floors: metric -> value of what `floor_label` names: the best that can be hoped for.
        samples: point -> pictures uint8 [K, H, W, 3] of the same K prompts and seeds.
        captions: the K prompts.
        budgets: budgets of paper cost for the answer; spread over the data where empty.
        strips: title -> pictures uint8 [K, H, W, 3] to be laid side by side (super-resolution: given, enlarged, made, true).
        others: title -> address of the study's other pages.
        levels: further values that no model made: title -> metric -> value.
        findings: what was compared in pairs: texts, or mappings of them, by title.

    Raises:
        RequestError: the points cannot be compared (they differ in protocol, number of pictures or seed).
    """
    for name in metrics_in(table):
        scored(table, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    floor = floors.get(metric)

    def across(name: str) -> dict[str, Any]:
        told = tuple((title, scores[name]) for title, scores in (levels or {}).items() if name in scores)
        return {"floor_label": floor_label, "levels": told}

    budgets = list(budgets) or _or_missing(lambda: default_budgets(table, "paper_cost"))
    choices = budgets if isinstance(budgets, Missing) else _or_missing(best_at_budgets, table, "paper_cost", metric, budgets)
    pictured = [] if isinstance(budgets, Missing) else budgets
    drawn: dict[str, Callable[[], Figure]] = {
        "quality_against_training_compute": lambda: figures.quality_against_training_compute(
            table, metric, floor, **across(metric)
        ),
        "guidance_heatmap": lambda: figures.guidance_heatmap(table, metric),
        "contact_sheet_steps": lambda: figures.contact_sheet(table, metric, samples, captions),
        "contact_sheet_budgets": lambda: figures.contact_sheet(table, metric, samples, captions, "paper_cost", pictured),
    } | {
        f"quality_against_{cost}": lambda cost=cost: figures.quality_against_cost(table, metric, cost, floor, **across(metric))
        for cost in COSTS
    }
    if strips:
        drawn["strips"] = lambda: figures.strips(strips, captions)
    sheet = _or_missing(marks.contact_cells, table, metric, samples, captions)
    page = (
        _environment()
        .get_template("page.html")
        .render(
            study=study_name,
            metric=metric_of(metric),
            metric_words=metric_words(metric),
            facts=_headline_facts(table, metric),
            choices=choices,
            answers=choices if isinstance(choices, Missing) else [answer(choice) for choice in choices],
            moral=None if isinstance(choices, Missing) else moral(choices),
            charts={chart: _or_missing(make, table, metric, floors, across) for chart, make in CHARTS.items()},
            unmeasured=[cost.label for cost in COSTS.values() if table[cost.name].isna().all()],
            floor=None if floor is None else format_number(floor),
            floor_label=floor_label,
            sheet=sheet,
            bought=_bought(choices, samples, captions) if not isinstance(sheet, Missing) else sheet,
            captions=list(captions),
            strips=strips or {},
            others=others or {},
            findings=findings or {},
            picture=_data_uri,
            drawing_json=_drawing_json,
            points_json=_script_json(_point_rows(table, metric)),
            sizes=_size_rows(table),
            provenance={key: value for key, value in provenance.items() if key != STUDY_YAML},
            study_yaml=provenance.get(STUDY_YAML),
            figures=[name for name, draw in drawn.items() if _save(folder / f"{name}.png", draw)],
            plotly_js=Markup(get_plotlyjs()),
            is_missing=lambda part: isinstance(part, Missing),
        )
    )
    path = folder / "index.html"
    write_atomically(path, page)
    return path


def markdown_summary(table: pd.DataFrame, metric: str, study_name: str, budgets: Sequence[float] = ()) -> str:
    """The answer for a pull request or a chat: one table row a budget of paper cost."""
    budgets = list(budgets) or default_budgets(table, "paper_cost")
    choices = best_at_budgets(table, "paper_cost", metric, budgets)
    titles = ["paper cost", "best", metric_words(metric), "runner-up", ""]
    lines = [f"**{study_name}**: {moral(choices)}", "", f"| {' | '.join(titles)} |", "|--:|---|---|---|---|"]
    for choice in choices:
        best, other = choice.best, choice.runner_up
        cells = [format_number(choice.budget), *(("nothing fits", "") if best is None else (str(best), best.score))]
        cells += ["" if other is None else f"{other}: {other.score}", "undecided" if choice.undecided else ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def metrics_in(table: pd.DataFrame) -> list[str]:
    """The metrics that at least one point carries, in the order of `METRICS`."""
    return [name for name in METRICS if name in table.columns and table[name].notna().any()]


def moral(choices: Sequence[BudgetChoice]) -> str:
    """What the budgets say together: whether the best size moves, and how many of the choices are decided."""
    told = [(choice, choice.best) for choice in choices if choice.best is not None]
    if not told:
        return "No budget takes in any point."
    (first, smallest), (last, largest) = told[0], told[-1]
    sizes = {best.size for _, best in told}
    if len(sizes) == 1:
        said = f"{smallest.size} is the best size at every budget here"
    elif smallest.size == largest.size:
        said = f"The best size changes with the budget: {', '.join(dict.fromkeys(best.size for _, best in told))}"
    else:
        start, end = format_number(first.budget), cost_of(last.cost).amount(last.budget)
        said = f"The best size moves from {smallest.size} at {start} to {largest.size} at {end}"
    contested = [choice for choice, _ in told if choice.runner_up is not None]
    decided = sum(not choice.undecided for choice in contested)
    return f"{said}; {decided} of {len(contested)} choices between sizes are decided." if contested else f"{said}."


# --- charts -----------------------------------------------------------------------------------------------------------


Across = Callable[[str], dict[str, Any]]
"""Metric -> what its curves have besides: label of the floor, further levels."""


def _cost_chart(table: pd.DataFrame, metric: str, floors: Mapping[str, float], across: Across) -> Chart:
    metrics = _lead_first(table, metric)
    samplers = sorted(finals(table, metric)["sampler"].unique())
    costs = [cost for cost in COSTS if table.loc[table["is_final"].astype(bool), cost].notna().any()]
    views: list[str | None] = [None, *samplers] if len(samplers) > 1 else [None]
    curves = {
        f"{a}|{b}|{c}": replace(marks.cost_curves(table, name, cost, floors.get(name), sampler), **across(name))
        for a, cost in enumerate(costs)
        for b, sampler in enumerate(views)
        for c, name in enumerate(metrics)
    }
    controls = (
        Control("Cost", tuple(COSTS[cost].label for cost in costs)),
        Control("Sampler", tuple(sampler or "best of all" for sampler in views)),
        Control("Quality", tuple(metric_words(name) for name in metrics)),
    )
    return _chart("cost", controls, curves)


def _compute_chart(table: pd.DataFrame, metric: str, floors: Mapping[str, float], across: Across) -> Chart:
    metrics = _lead_first(table, metric)
    axes = [axis for axis in marks.COMPUTE_AXES if axis in table.columns]
    curves = {
        f"{c}|{a}": replace(marks.compute_curves(table, name, floors.get(name), axis), **across(name))
        for c, name in enumerate(metrics)
        for a, axis in enumerate(axes)
    }
    quality = Control("Quality", tuple(metric_words(name) for name in metrics))
    return _chart("compute", (quality, Control("Compute", tuple(marks.COMPUTE_AXES[axis][0] for axis in axes))), curves)


def _guidance_chart(table: pd.DataFrame, metric: str, _floors: Mapping[str, float], _across: Across) -> Chart:
    metrics = _lead_first(table, metric)
    if (tried := finals(table, metric)["guidance"].unique()).size == 1:
        raise RequestError(f"every point was made with guidance {tried[0]:g}, so there is nothing to choose")
    samplers = sorted(finals(table, metric)["sampler"].unique())
    drawings = {
        f"{b}|{c}": [charts.plotly_heat(panel) for panel in marks.guidance_panels(table, name) if panel.sampler == sampler]
        for b, sampler in enumerate(samplers)
        for c, name in enumerate(metrics)
    }
    controls = (Control("Sampler", tuple(samplers)), Control("Quality", tuple(metric_words(name) for name in metrics)))
    return Chart("guidance", controls, drawings, {})


CHARTS = {"cost": _cost_chart, "compute": _compute_chart, "guidance": _guidance_chart}


def _chart(name: str, controls: tuple[Control, ...], curves: Mapping[str, marks.Curves]) -> Chart:
    drawings = {key: [charts.plotly_curves(one)] for key, one in curves.items()}
    return Chart(name, controls, drawings, {key: f"{one.y_label}. Sampled with {one.setting}." for key, one in curves.items()})


def _lead_first(table: pd.DataFrame, metric: str) -> list[str]:
    return [metric, *(name for name in metrics_in(table) if name != metric)]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _bought(
    choices: list[BudgetChoice] | Missing, samples: Mapping[str, np.ndarray], captions: Sequence[str]
) -> list[tuple[BudgetChoice, np.ndarray | None]] | Missing:
    """The pictures of the best configuration at each budget; None where they were not kept."""
    if isinstance(choices, Missing):
        return choices
    return [(choice, samples.get(choice.best.point)) for choice in choices if choice.best is not None]


def _data_uri(picture: np.ndarray) -> str:
    """A picture uint8 [H, W, 3] as PNG; pixels repeated to about 72 across, or shrunk to `LONGEST_SIDE`."""
    image = Image.fromarray(picture)
    longest = max(image.size)
    if longest > LONGEST_SIDE:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    else:
        times = max(1, 72 // longest)
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _save(path: Path, draw: Callable[[], Figure]) -> bool:
    """Save the figure; where the table cannot give it, remove what an earlier report left under its name."""
    figure = _or_missing(draw)
    if isinstance(figure, Missing):
        path.unlink(missing_ok=True)
        return False
    figure.savefig(path)
    return True


# --- tables -----------------------------------------------------------------------------------------------------------


def _point_rows(table: pd.DataFrame, metric: str) -> dict[str, Any]:
    """Column titles, and for every point, best first, its texts and the values that they sort by; None sorts last."""
    metrics = metrics_in(table)
    rows = best_first(table, metric) if metric in metrics else table
    titles = ["size", "sampler", "steps", "guidance", *(metric_words(name) for name in metrics)]
    titles += [cost.label for cost in COSTS.values()] + ["images seen", "point"]
    texts, keys = [], []
    for row in rows.to_dict("records"):
        scores = [(None, "") if pd.isna(row[m]) else (row[m], _score_text(row, m)) for m in metrics]
        costs = [(None, "") if pd.isna(row[cost]) else (row[cost], format_number(row[cost])) for cost in COSTS]
        cells = [(row["num_parameters"], row["size"]), (row["sampler"], row["sampler"])]
        cells += [(row["num_steps"], str(row["num_steps"])), (row["guidance"], f"{row['guidance']:g}"), *scores, *costs]
        cells += [(row["images_seen"], f"{row['images_seen']:,}"), (row["point"], row["point"])]
        texts.append([text for _, text in cells])
        keys.append([key for key, _ in cells])
    order = "ascending" if metric_of(metric).better == "lower" else "descending"
    sorted_by = [titles.index(metric_words(metric)), order] if metric in metrics else None
    return {"titles": titles, "texts": texts, "keys": keys, "sorted_by": sorted_by}


def _score_text(row: Mapping[Any, Any], metric: str) -> str:
    return format_score(*(float(row[column]) for column in (metric, f"{metric}_low", f"{metric}_high")))


def _size_rows(table: pd.DataFrame) -> list[dict[str, str]]:
    """What was trained, one row a finished checkpoint, from small to large."""
    rows = table[table["is_final"].astype(bool)].drop_duplicates("checkpoint").sort_values(["num_parameters", "checkpoint"])
    return [
        {
            "size": str(row["size"]),
            "width": str(row["width"]),
            "parameters": f"{row['num_parameters']:,}",
            "images seen": f"{row['images_seen']:,}",
            "training GFLOP": f"{row['training_gflop']:,.0f}",
            "checkpoint": str(row["checkpoint"]),
        }
        for row in rows.to_dict("records")
    ]


def _headline_facts(table: pd.DataFrame, metric: str) -> dict[str, str]:
    """The extent of the study in a few numbers."""
    rows = scored(table, metric) if metric in metrics_in(table) else table
    extent = {
        "sizes": len(sizes_in_order(rows)),
        "samplers": rows["sampler"].nunique(),
        "step counts": rows["num_steps"].nunique(),
        "guidance values": rows["guidance"].nunique(),
        "points": len(rows),
    }
    facts = {name: f"{number:,}" for name, number in extent.items()}
    if len(rows):
        facts["pictures a point"] = f"{rows['num_pictures'].iloc[0]:,}"
        facts["protocol"] = str(rows["protocol"].iloc[0])
    return facts


# --- the page ---------------------------------------------------------------------------------------------------------


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("isocost.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _or_missing(make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` gives; where the table cannot answer, its one line, to be shown in the place of the part."""
    try:
        return make(*arguments)
    except RequestError as error:
        return Missing(str(error))


def _drawing_json(charts: Mapping[str, Chart | Missing]) -> Markup:
    plain = {
        name: {
            "drawings": {key: [json.loads(one.to_json()) for one in shown] for key, shown in chart.drawings.items()},
            "settings": dict(chart.settings),
        }
        for name, chart in charts.items()
        if isinstance(chart, Chart)
    }
    return _script_json(plain)


def _script_json(value: Any) -> Markup:
    """JSON that cannot end its script element, whatever names and captions hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain_number)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _plain_number(value: Any) -> float | int | None:
    if isinstance(value, np.generic):
        plain = value.item()
        return None if isinstance(plain, float) and math.isnan(plain) else plain
    raise TypeError(f"{type(value).__name__} cannot enter the page")
