"""The report: one self-contained HTML page that opens offline, and its figures beside it.

The answer comes first, then what it rests on. A part that the table cannot give says in one line what is missing.
Captions and names come from people's data: the template escapes them, and the page's own policy forbids any network request.

Shape letters: K prompts, H, W height and width in pixels; pictures are uint8 [K, H, W, 3].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from isocost.analysis.claims import Verdict
from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_number, metric_words
from isocost.analysis.pareto import BudgetChoice, best_at_budgets, default_budgets, metric_of
from isocost.analysis.recommend import answer
from isocost.analysis.results_table import scored
from isocost.models.paper_table import TABLE_1
from isocost.report import plot_data as marks
from isocost.report.budget_slider import explorer
from isocost.report.chart_panels import CHARTS, Chart, Missing, metrics_in, or_missing, tuned_charts
from isocost.report.claims_table import verdict_rows
from isocost.report.figures import every_figure, save_figures
from isocost.report.image_embedding import Album, album
from isocost.report.image_grids import ContactSheet, contact_cells, kept_of
from isocost.report.markdown import moral
from isocost.report.matplotlib_backend import FORMATS
from isocost.report.plot_data_finetune import DISTILLED, FOLLOWS, Pretrained
from isocost.report.results_table import headline_facts, point_columns, size_rows
from isocost.utils.artifact_store import write_atomically

STUDY_YAML = "study_yaml"
FIGURES = "figures"
"""Folder beside the page."""
STRIP = "strip"
"""In front of the titles of strips, among the keys of pictures, which are points otherwise."""


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
    absent: Sequence[str] = (),
    pretrained: Pretrained | None = None,
    verdicts: Sequence[Verdict] = (),
) -> Path:
    """Write `index.html` and `figures/` (`isocost.report.figures`, PNG and PDF) into `folder`; returns the path of the page.

    Args:
        folder: made where absent.
        study_name: title of the page.
        table: points, as in `isocost.analysis.frontier`.
        metric: what the answer is decided by, and what guidance was raced by.
        provenance: facts by name; a mapping as a value becomes a nested list, the text under `study_yaml` is shown as code.
        floors: metric -> value of what `floor_label` names: the best that can be hoped for.
        samples: point -> pictures uint8 [K, H, W, 3] of the same K prompts and seeds.
        captions: the K prompts.
        budgets: budgets of paper cost for the answer; spread over the data where empty.
        strips: title -> pictures uint8 [K, H, W, 3] to be laid side by side (super-resolution: given, enlarged, made, true).
        others: title -> address of the study's other pages.
        findings: what was compared in pairs: texts, or mappings of them, by title.
        levels: further values that no model made: title -> metric -> value.
        absent: titles of experiments that have no page.
        pretrained: what the experiment's runs started from, of tasks that are set against it.
        verdicts: the paper's findings, put to these points and those of the other tasks.

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

    budgets = list(budgets) or or_missing(lambda: default_budgets(table, "paper_cost"))
    choices = budgets if isinstance(budgets, Missing) else or_missing(best_at_budgets, table, "paper_cost", metric, budgets)
    pictured = [] if isinstance(budgets, Missing) else budgets
    drawn = every_figure(table, metric, floor, samples, captions, pictured, strips or {}, pretrained, **across(metric))
    tuned = tuned_charts(table, metric, floors, across, pretrained)
    sheets = or_missing(_sheets, table, metric, samples, captions, pictured)
    explore = or_missing(explorer, table, metric, set(samples))
    pictures = _album(choices, explore, sheets, samples, captions, strips or {})
    page = (
        _environment()
        .get_template("page.html")
        .render(
            study=study_name,
            metric=metric_of(metric),
            metric_words=metric_words(metric),
            facts=headline_facts(table, metric),
            choices=choices,
            answers=choices if isinstance(choices, Missing) else [answer(choice) for choice in choices],
            moral=None if isinstance(choices, Missing) else moral(choices),
            explore=explore,
            charts={chart: or_missing(make, table, metric, floors, across) for chart, make in CHARTS.items()} | tuned,
            tuned={name: FOLLOWS[pretrained.task][0] if name == "following" and pretrained else DISTILLED for name in tuned},
            paper=TABLE_1,
            raced="guidance_low" in table.columns and bool(table["guidance_low"].notna().any()),
            unmeasured=[cost.label for cost in COSTS.values() if table[cost.name].isna().all()],
            floor=None if floor is None else format_number(floor),
            floor_label=floor_label,
            sheets=sheets,
            pictures=pictures,
            captions=list(captions),
            strips={title: f"{STRIP}/{title}" for title in strips or {}},
            others=others or {},
            absent=list(absent),
            findings=findings or {},
            verdicts=verdict_rows(verdicts),
            data_json=_data_json(explore, pictures, captions),
            drawing_json=_drawing_json,
            points_json=_script_json(point_columns(table, metric)),
            sizes=size_rows(table),
            provenance={key: value for key, value in provenance.items() if key != STUDY_YAML},
            study_yaml=provenance.get(STUDY_YAML),
            figures=save_figures(folder / FIGURES, drawn),
            formats=FORMATS,
            page_css=_asset("page.css"),
            page_js=_asset("page.js"),
            plotly_js=Markup(get_plotlyjs()),
            is_missing=lambda part: isinstance(part, Missing),
        )
    )
    path = folder / "index.html"
    write_atomically(path, page)
    return path


# --- pictures ---------------------------------------------------------------------------------------------------------


def _sheets(
    table: pd.DataFrame, metric: str, samples: Mapping[str, np.ndarray], captions: Sequence[str], budgets: Sequence[float]
) -> list[ContactSheet]:
    """The contact sheets over steps and, where there are budgets, over those."""
    by_steps = contact_cells(table, metric, samples, captions)
    return [by_steps, *([contact_cells(table, metric, samples, captions, "paper_cost", budgets)] if budgets else [])]


def _album(
    choices: list[BudgetChoice] | Missing,
    explore: Mapping[str, Any] | Missing,
    sheets: list[ContactSheet] | Missing,
    samples: Mapping[str, np.ndarray],
    captions: Sequence[str],
    strips: Mapping[str, np.ndarray],
) -> Album:
    """Every picture that the page shows somewhere, by point, and the strips by their titles."""
    wanted: dict[str, None] = {}
    if not isinstance(choices, Missing):
        wanted |= dict.fromkeys(choice.best.point for choice in choices if choice.best is not None)
    if not isinstance(explore, Missing):
        wanted |= dict.fromkeys(point for point, one in explore["configurations"].items() if one["pictured"])
    if not isinstance(sheets, Missing):
        wanted |= dict.fromkeys(cell.point for sheet in sheets for row in sheet.cells for cell in row if cell is not None)
    kept = {point: kept_of(point, samples, captions) for point in wanted if point in samples}
    return album(kept | {f"{STRIP}/{title}": pictures for title, pictures in strips.items()})


# --- the page ---------------------------------------------------------------------------------------------------------


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("isocost.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> Markup:
    """A file of the page's own, put in as it is."""
    return Markup(resources.files("isocost.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _data_json(explore: Mapping[str, Any] | Missing, pictures: Album, captions: Sequence[str]) -> Markup:
    told = None if isinstance(explore, Missing) else explore
    return _script_json({"explore": told, "pictures": pictures.addresses, "captions": list(captions)})


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
