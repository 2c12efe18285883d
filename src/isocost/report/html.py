"""The report: one self-contained HTML page that opens offline, and the figures in a folder next to it.

The answer comes first, the evidence after it. A part that the table has no data for is replaced by one line with the reason.
Prompts and names come from users' data: the template escapes them, and the page's content security policy forbids any network
request.

Shape letters: K prompts, H, W height and width in pixels; images are uint8 [K, H, W, 3].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from isocost.analysis.claims import ClaimVerdict
from isocost.analysis.costs import COSTS, expected_costs, is_measured
from isocost.analysis.formatting import format_metric, format_number
from isocost.analysis.guides import has_guides
from isocost.analysis.iso_cost import PairedDifferences, RecordedDifferences
from isocost.analysis.paired_decisions import Resamples
from isocost.analysis.pareto import BudgetChoice, best_at_budgets, default_budgets, metric_of
from isocost.analysis.recommend import describe_choice
from isocost.analysis.results_table import replaced_schedulers, with_metric
from isocost.models.paper_table import TABLE_1
from isocost.report import plot_data
from isocost.report.budget_slider import budget_slider
from isocost.report.chart_panels import (
    CHARTS,
    Chart,
    Unavailable,
    cost_chart,
    finetune_charts,
    guide_charts,
    metrics_in,
    try_make,
)
from isocost.report.claims_table import claim_rows
from isocost.report.figures import FigureFiles, all_figures
from isocost.report.guides_section import guide_section
from isocost.report.image_embedding import EmbeddedImages, embed_images
from isocost.report.image_grids import ImageGrid, image_grid, saved_images_of
from isocost.report.markdown import headline
from isocost.report.plot_data_costs import PARTS_QUESTION
from isocost.report.plot_data_finetune import DISTILLATION_QUESTION, PRETRAINING_QUESTIONS, Pretrained
from isocost.report.plot_data_guides import FRONTIER_QUESTION, HEATMAP_QUESTION
from isocost.report.plot_data_metrics import FRONT_QUESTION
from isocost.report.results_table import headline_facts, point_columns, size_rows
from isocost.report.scope import PAPER_COST, TRAINED, Scope
from isocost.utils.artifact_store import write_atomically

STUDY_YAML = "study_yaml"
FIGURES = "figures"
"""Folder next to the page."""
COMPARISON_PREFIX = "comparison"
"""First part of the image keys of comparison rows; all other image keys are points."""


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
    comparison_rows: Mapping[str, np.ndarray] | None = None,
    other_pages: Mapping[str, str] | None = None,
    findings: Mapping[str, Any] | None = None,
    floor_label: str = plot_data.FLOOR_LABEL,
    reference_lines: Mapping[str, Mapping[str, float]] | None = None,
    missing_experiments: Sequence[str] = (),
    pretrained: Pretrained | None = None,
    verdicts: Sequence[ClaimVerdict] = (),
    figure_formats: Sequence[str] = ("png",),
    scope: Scope = TRAINED,
    pairs: PairedDifferences | None = None,
    resamples: Resamples | None = None,
) -> Path:
    """Write `index.html` and `figures/` (`isocost.report.figures`) into `folder` and return the path of the page.

    Args:
        folder: created if missing.
        study_name: title of the page.
        table: points, as in `isocost.analysis.results_table`.
        metric: the metric that ranks the points and that decided the races for guidance.
        provenance: facts by name; a mapping as a value becomes a nested list, the text under `study_yaml` is shown as code.
        reconstruction_floors: metric -> the best possible value, for example of real images through the autoencoder.
        samples: point -> images uint8 [K, H, W, 3] of the same K prompts and seeds.
        prompts: the K prompts.
        budgets: budgets of `scope.budget_cost` for the answer; spread over the data if empty.
        comparison_rows: title -> images uint8 [K, H, W, 3] to show next to each other: inputs, outputs and targets.
        other_pages: title -> address of the study's other pages.
        findings: results of paired comparisons by title: texts, or mappings of them.
        floor_label: name of the values in `reconstruction_floors`.
        reference_lines: title -> metric -> score of images that no model generated.
        missing_experiments: titles of experiments that have no page.
        pretrained: the points of the checkpoints that the runs started from, for tasks that are compared with them.
        verdicts: verdicts for the paper's claims on these points and those of the other tasks.
        figure_formats: some of `isocost.report.matplotlib_backend.FORMATS`. Files of an earlier report in other formats are
            removed, because they may show old points.
        scope: whether the study trained the networks, and the cost of the budgets.
        pairs: paired differences for the section on guides; without them the scores are treated as independent.
        resamples: resamples of the points by `metric`, for paired decisions between sizes.

    Raises:
        ConfigError: the points cannot be compared (they differ in protocol, number of images or seed).
    """
    for name in metrics_in(table):
        with_metric(table, name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    floor, cost = reconstruction_floors.get(metric), scope.budget_cost

    def curve_options(name: str) -> dict[str, Any]:
        lines = tuple((title, scores[name]) for title, scores in (reference_lines or {}).items() if name in scores)
        return {"floor_label": floor_label, "reference_lines": lines}

    budgets = list(budgets) or try_make(lambda: default_budgets(table, cost))
    choose = partial(best_at_budgets, table, cost, metric, resamples=resamples)
    choices = budgets if isinstance(budgets, Unavailable) else try_make(choose, budgets)
    grid_budgets = [] if isinstance(budgets, Unavailable) else budgets
    comparison_rows = comparison_rows or {}
    makers = all_figures(
        table, metric, floor, samples, prompts, grid_budgets, comparison_rows, pretrained, scope, **curve_options(metric)
    )
    figures = FigureFiles(folder / FIGURES, makers, figure_formats)
    finetune = finetune_charts(table, metric, reconstruction_floors, curve_options, pretrained)
    grids = try_make(_image_grids, table, metric, samples, prompts, grid_budgets, cost)
    slider = try_make(budget_slider, table, metric, set(samples), scope, resamples)
    images = _embed_shown_images(choices, slider, grids, samples, prompts, comparison_rows)
    page = (
        _environment()
        .get_template("page.html")
        .render(
            study=study_name,
            metric=metric_of(metric),
            metric_label=format_metric(metric),
            facts=headline_facts(table, metric, scope),
            choices=choices,
            answers=choices
            if isinstance(choices, Unavailable)
            else [describe_choice(choice, scope.noun) for choice in choices],
            num_paired=0 if isinstance(choices, Unavailable) else sum(choice.decision is not None for choice in choices),
            num_contested=0 if isinstance(choices, Unavailable) else sum(choice.runner_up is not None for choice in choices),
            headline=None if isinstance(choices, Unavailable) else headline(choices, scope.noun),
            scope=scope,
            budget_unit="units" if cost == PAPER_COST else COSTS[cost].label,
            slider=slider,
            charts={
                chart: try_make(make, table, metric, reconstruction_floors, curve_options)
                for chart, make in (CHARTS | {"cost": partial(cost_chart, scope=scope)}).items()
            }
            | finetune
            | guide_charts(table, metric, reconstruction_floors, curve_options),
            guides=try_make(guide_section, table, metric, pairs or RecordedDifferences()) if has_guides(table) else None,
            parts_question=PARTS_QUESTION,
            front_question=FRONT_QUESTION,
            guide_questions=(FRONTIER_QUESTION, HEATMAP_QUESTION),
            finetune_questions={
                name: PRETRAINING_QUESTIONS[pretrained.task][0]
                if name == "pretraining" and pretrained
                else DISTILLATION_QUESTION
                for name in finetune
            },
            paper=TABLE_1,
            replaced=replaced_schedulers(table),
            has_races="guidance_low" in table.columns and bool(table["guidance_low"].notna().any()),
            unmeasured=[COSTS[name].label for name in expected_costs(table) if not is_measured(table, name)],
            floor=None if floor is None else format_number(floor),
            floor_label=floor_label,
            grids=grids,
            images=images,
            prompts=list(prompts),
            comparison_rows={title: f"{COMPARISON_PREFIX}/{title}" for title in comparison_rows},
            other_pages=other_pages or {},
            missing_experiments=list(missing_experiments),
            findings=findings or {},
            claims=claim_rows(verdicts),
            report_json=_report_json(slider, images, prompts),
            chart_json=_chart_json,
            points_json=_script_json(point_columns(table, metric, scope)),
            sizes=size_rows(table, scope),
            provenance={key: value for key, value in provenance.items() if key != STUDY_YAML},
            study_yaml=provenance.get(STUDY_YAML),
            figures=figures.names(),
            formats=figure_formats,
            page_css=_asset("page.css"),
            page_js=_asset("page.js"),
            plotly_js=Markup(get_plotlyjs()),
            is_unavailable=lambda part: isinstance(part, Unavailable),
        )
    )
    path = folder / "index.html"
    write_atomically(path, page)
    return path


# --- images ---------------------------------------------------------------------------------------------------------


def _image_grids(
    table: pd.DataFrame,
    metric: str,
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    budgets: Sequence[float],
    cost: str,
) -> list[ImageGrid]:
    """Return the image grid over numbers of steps and, if there are budgets, the one over budgets."""
    by_steps = image_grid(table, metric, samples, prompts)
    return [by_steps, *([image_grid(table, metric, samples, prompts, cost, budgets)] if budgets else [])]


def _embed_shown_images(
    choices: list[BudgetChoice] | Unavailable,
    slider: Mapping[str, Any] | Unavailable,
    grids: list[ImageGrid] | Unavailable,
    samples: Mapping[str, np.ndarray],
    prompts: Sequence[str],
    comparison_rows: Mapping[str, np.ndarray],
) -> EmbeddedImages:
    """Encode all images that any part of the page shows: by point, and comparison rows by `COMPARISON_PREFIX` and title."""
    points: dict[str, None] = {}
    if not isinstance(choices, Unavailable):
        points |= dict.fromkeys(choice.best.point for choice in choices if choice.best is not None)
    if not isinstance(slider, Unavailable):
        points |= dict.fromkeys(
            point for point, configuration in slider["configurations"].items() if configuration["has_images"]
        )
    if not isinstance(grids, Unavailable):
        points |= dict.fromkeys(cell.point for grid in grids for row in grid.cells for cell in row if cell is not None)
    images = {point: saved_images_of(point, samples, prompts) for point in points if point in samples}
    return embed_images(images | {f"{COMPARISON_PREFIX}/{title}": batch for title, batch in comparison_rows.items()})


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
    """Return a file of the package's templates, unescaped."""
    return Markup(resources.files("isocost.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _report_json(slider: Mapping[str, Any] | Unavailable, images: EmbeddedImages, prompts: Sequence[str]) -> Markup:
    slider_data = None if isinstance(slider, Unavailable) else slider
    return _script_json({"slider": slider_data, "images": images.data_urls, "prompts": list(prompts)})


def _chart_json(charts: Mapping[str, Chart | Unavailable]) -> Markup:
    contents = {
        name: {
            "figures": dict(chart.figures),
            "subtitles": dict(chart.subtitles),
        }
        for name, chart in charts.items()
        if isinstance(chart, Chart)
    }
    return _script_json(contents)


def _script_json(value: Any) -> Markup:
    """Return JSON that cannot end its script element, whatever names and prompts contain."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain_number)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _plain_number(value: Any) -> float | int | None:
    if isinstance(value, np.generic):
        number = value.item()
        return None if isinstance(number, float) and math.isnan(number) else number
    raise TypeError(f"a value of type {type(value).__name__} cannot be stored in the page")
