"""The report: one self-contained HTML page that opens offline, and its figures beside it.

The answer comes first, then what it rests on. A part that the table cannot give says in one line what is missing.
Captions and names come from people's data: the template escapes them, and the page's own policy forbids any network request.

Shape letters: K prompts, H, W height and width in pixels; images are uint8 [K, H, W, 3].
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

from isocost.analysis.claims import ClaimVerdict
from isocost.analysis.costs import COSTS
from isocost.analysis.formatting import format_metric, format_number
from isocost.analysis.pareto import BudgetChoice, best_at_budgets, default_budgets, metric_of
from isocost.analysis.recommend import answer
from isocost.analysis.results_table import with_metric
from isocost.models.paper_table import TABLE_1
from isocost.report import plot_data
from isocost.report.budget_slider import explorer
from isocost.report.chart_panels import CHARTS, Chart, Unavailable, metrics_in, try_make, tuned_charts
from isocost.report.claims_table import verdict_rows
from isocost.report.figures import every_figure, save_figures
from isocost.report.image_embedding import EmbeddedImages, album
from isocost.report.image_grids import ContactSheet, contact_cells, kept_of
from isocost.report.markdown import headline
from isocost.report.matplotlib_backend import FORMATS
from isocost.report.plot_data_finetune import DISTILLED, FOLLOWS, Pretrained
from isocost.report.results_table import headline_facts, point_columns, size_rows
from isocost.utils.artifact_store import write_atomically

STUDY_YAML = "study_yaml"
FIGURES = "figures"
"""Folder beside the page."""
STRIP = "strip"
"""In front of the titles of strips, among the keys of images, which are points otherwise."""


def write_report(
    folder: str | Path,
    study_name: str,
    table: pd.DataFrame,
    metric: str,
    provenance: Mapping[str, Any],
    reconstruction_floors: Mapping[str, float],
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    budgets: Sequence[float] = (),
    strips: Mapping[str, np.ndarray] | None = None,
    others: Mapping[str, str] | None = None,
    findings: Mapping[str, Any] | None = None,
    floor_label: str = plot_data.FLOOR_LABEL,
    levels: Mapping[str, Mapping[str, float]] | None = None,
    absent: Sequence[str] = (),
    pretrained: Pretrained | None = None,
    verdicts: Sequence[ClaimVerdict] = (),
) -> Path:
    """Write `index.html` and `figures/` (`isocost.report.figures`, PNG and PDF) into `folder`; returns the path of the page.

    Args:
        folder: made where absent.
        study_name: title of the page.
        table: points, as in `isocost.analysis.frontier`.
        metric: what the answer is decided by, and what guidance was raced by.
        provenance: facts by name; a mapping as a value becomes a nested list, the text under `study_yaml` is shown as code.
        floors: metric -> value of what `floor_label` names: the best that can be hoped for.
        samples: point -> images uint8 [K, H, W, 3] of the same K prompts and seeds.
        captions: the K prompts.
        budgets: budgets of normalized cost for the answer; spread over the data where empty.
        strips: title -> images uint8 [K, H, W, 3] to be laid side by side (super-resolution: given, enlarged, made, true).
        others: title -> address of the study's other pages.
        findings: what was compared in pairs: texts, or mappings of them, by title.
        levels: further values that no model made: title -> metric -> value.
        absent: titles of experiments that have no page.
        pretrained: what the experiment's runs started from, of tasks that are set against it.
        verdicts: the paper's findings, put to these points and those of the other tasks.

    Raises:
        ConfigError: the points cannot be compared (they differ in protocol, number of images or seed).
    """
    for name in metrics_in(table):
        with_metric(table, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    floor = reconstruction_floors.get(metric)

    def across(name: str) -> dict[str, Any]:
        told = tuple((title, scores[name]) for title, scores in (levels or {}).items() if name in scores)
        return {"floor_label": floor_label, "levels": told}

    budgets = list(budgets) or try_make(lambda: default_budgets(table, "normalized_cost"))
    choices = (
        budgets if isinstance(budgets, Unavailable) else try_make(best_at_budgets, table, "normalized_cost", metric, budgets)
    )
    sample_labels = [] if isinstance(budgets, Unavailable) else budgets
    drawn = every_figure(table, metric, floor, samples, prompts, sample_labels, strips or {}, pretrained, **across(metric))
    tuned = tuned_charts(table, metric, reconstruction_floors, across, pretrained)
    sheets = try_make(_sheets, table, metric, samples, prompts, sample_labels)
    explore = try_make(explorer, table, metric, set(samples))
    images = _album(choices, explore, sheets, samples, prompts, strips or {})
    page = (
        _environment()
        .get_template("page.html")
        .render(
            study=study_name,
            metric=metric_of(metric),
            format_metric=format_metric(metric),
            facts=headline_facts(table, metric),
            choices=choices,
            answers=choices if isinstance(choices, Unavailable) else [answer(choice) for choice in choices],
            headline=None if isinstance(choices, Unavailable) else headline(choices),
            explore=explore,
            charts={chart: try_make(make, table, metric, reconstruction_floors, across) for chart, make in CHARTS.items()}
            | tuned,
            tuned={name: FOLLOWS[pretrained.task][0] if name == "following" and pretrained else DISTILLED for name in tuned},
            paper=TABLE_1,
            raced="guidance_low" in table.columns and bool(table["guidance_low"].notna().any()),
            unmeasured=[cost.label for cost in COSTS.values() if table[cost.name].isna().all()],
            floor=None if floor is None else format_number(floor),
            floor_label=floor_label,
            sheets=sheets,
            images=images,
            prompts=list(prompts),
            strips={title: f"{STRIP}/{title}" for title in strips or {}},
            others=others or {},
            absent=list(absent),
            findings=findings or {},
            verdicts=verdict_rows(verdicts),
            data_json=_data_json(explore, images, prompts),
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
            is_missing=lambda part: isinstance(part, Unavailable),
        )
    )
    path = folder / "index.html"
    write_atomically(path, page)
    return path


# --- images ---------------------------------------------------------------------------------------------------------


def _sheets(
    table: pd.DataFrame, metric: str, samples: Mapping[str, np.ndarray], prompts: Sequence[str], budgets: Sequence[float]
) -> list[ContactSheet]:
    """The contact sheets over steps and, where there are budgets, over those."""
    by_steps = contact_cells(table, metric, samples, prompts)
    return [by_steps, *([contact_cells(table, metric, samples, prompts, "normalized_cost", budgets)] if budgets else [])]


def _album(
    choices: list[BudgetChoice] | Unavailable,
    explore: Mapping[str, Any] | Unavailable,
    sheets: list[ContactSheet] | Unavailable,
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    strips: Mapping[str, np.ndarray],
) -> EmbeddedImages:
    """Every image that the page shows somewhere, by point, and the strips by their titles."""
    wanted: dict[str, None] = {}
    if not isinstance(choices, Unavailable):
        wanted |= dict.fromkeys(choice.best.point for choice in choices if choice.best is not None)
    if not isinstance(explore, Unavailable):
        wanted |= dict.fromkeys(point for point, one in explore["configurations"].items() if one["has_images"])
    if not isinstance(sheets, Unavailable):
        wanted |= dict.fromkeys(cell.point for sheet in sheets for row in sheet.cells for cell in row if cell is not None)
    kept = {point: kept_of(point, samples, prompts) for point in wanted if point in samples}
    return album(kept | {f"{STRIP}/{title}": images for title, images in strips.items()})


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


def _data_json(explore: Mapping[str, Any] | Unavailable, images: EmbeddedImages, prompts: Sequence[str]) -> Markup:
    told = None if isinstance(explore, Unavailable) else explore
    return _script_json({"explore": told, "images": images.addresses, "prompts": list(prompts)})


def _drawing_json(charts: Mapping[str, Chart | Unavailable]) -> Markup:
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
