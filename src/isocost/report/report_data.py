"""The data of a report as files, from which its pages can be rebuilt without the study, its data or its checkpoints.

OUT/table.parquet                                   the points (`isocost.analysis.results_table.table_file`)
OUT/report_data/TASK/page.json                      the other contents of the page, see `Page`
OUT/report_data/TASK/images/POINT.webp              the images of a point that the page shows, in one row
OUT/report_data/TASK/comparison_rows/NUMBER.webp    the images to compare with, in the order of page.json
OUT/report_data/TASK/pretrained.parquet             the points of the checkpoints that the task started from

Image files are lossless WebP, about 30 % smaller than PNG; a row that is too wide for WebP is a PNG file (`write_image_row`).

Shape letters: K images, R height and width in pixels; images are uint8 [K, R, R, 3].
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file

from isocost.analysis.claims import ClaimVerdict, TaskResults, evaluate_claims, with_seed_variance
from isocost.analysis.costs import is_measured
from isocost.analysis.iso_cost import RecordedDifferences
from isocost.analysis.paired_decisions import Resamples
from isocost.analysis.paper_claims import CLAIMS
from isocost.analysis.pareto import BudgetChoice, best_at_budgets
from isocost.analysis.results_table import REPORT_DATA, RESAMPLES, read_table, shared_final_points, table_file
from isocost.config.types import TaskName
from isocost.data.image_files import read_image_file
from isocost.errors import ConfigError
from isocost.models.pretrained.lora import split_loras
from isocost.pipeline.compatibility import STUDY_FILE, read_study_file
from isocost.pipeline.gflop_parts import with_gflop_parts
from isocost.pipeline.pipeline import Pipeline
from isocost.report.claims_table import markdown_claims
from isocost.report.html import write_report
from isocost.report.markdown import markdown_summary
from isocost.report.plot_data_finetune import Pretrained
from isocost.report.scope import TRAINED, Scope
from isocost.utils.artifact_store import replace_folder, replacing, write_atomically
from isocost.utils.output_paths import private_folder
from isocost.utils.tensor_files import read_tensors

logger = logging.getLogger(__name__)

PAGE, IMAGES, COMPARISON_ROWS, PRETRAINED = "page.json", "images", "comparison_rows", "pretrained.parquet"
IMAGE_ROW_SUFFIXES = (".webp", ".png")
WEBP_MAX_SIDE = 16383
"""The largest width and height of a WebP image in pixels."""


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        page: path of the HTML page.
        table: the points.
        choices: the best configuration at each budget of the cost that leads the report.
        summary: the text of `summary.md`.
        task_reports: the reports of the other tasks of the study.
        scope: whether the study trained the networks, and the cost of the budgets.
    """

    page: Path
    table: pd.DataFrame
    choices: list[BudgetChoice]
    summary: str
    task_reports: Mapping[TaskName, Report] = field(default_factory=dict)
    scope: Scope = TRAINED


@dataclass(frozen=True)
class Page:
    """The contents of a page, without the table and the images of the points; see `isocost.report.html.write_report`.

    The fields are the keys of page.json. `differences` are the rows of `isocost.analysis.iso_cost.RecordedDifferences`, and
    `resamples` those of the final points by `metric`, in a file of their own.
    """

    study_name: str
    metric: str
    provenance: Mapping[str, Any]
    reconstruction_floors: Mapping[str, float]
    prompts: Sequence[str]
    budgets: Sequence[float]
    other_pages: Mapping[str, str]
    findings: Mapping[str, Any]
    floor_label: str
    reference_lines: Mapping[str, Mapping[str, float]] | None
    missing_experiments: Sequence[str]
    comparison_rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    pretrained: Pretrained | None = None
    scope: Scope = TRAINED
    differences: Sequence[Sequence[Any]] = ()
    resamples: Resamples = field(default_factory=dict)


ReportData = tuple[Page, pd.DataFrame, Mapping[str, np.ndarray]]
"""A page, its table, and point -> images."""


def render(out: Path, reports: Mapping[TaskName, ReportData], figure_formats: Sequence[str] = ("png",)) -> Report:
    """Write the pages of all tasks, their data as files and, in the given formats, the figures.

    The tables are read back from their files, so that a rebuilt page is equal byte by byte. A point without images gets the
    images that an earlier report of the folder showed.
    """
    for task in set(get_args(TaskName)) - set(reports):
        shutil.rmtree(out / REPORT_DATA / task, ignore_errors=True)
    samples: dict[TaskName, Mapping[str, np.ndarray]] = {}
    for task, (page, table, images) in reports.items():
        folder = out / REPORT_DATA / task
        without_images = set(table["point"]) - set(images)
        with private_folder(folder) as partial:  # images that are only in the earlier data are never at risk
            _save_page(partial / task, page)
            (partial / task / IMAGES).mkdir()
            for point in without_images:
                if (file := find_image_row(folder / IMAGES, point)) is not None:
                    shutil.copyfile(file, partial / task / IMAGES / file.name)
            _write_table(out, task, table)
            replace_folder(partial / task, folder)
        samples[task] = _RecordedImages(images, LazyImages(folder / IMAGES), folder / IMAGES)
    return _write_reports(out, {task: page for task, (page, _, _) in reports.items()}, samples, figure_formats)


def rebuild(out: str | Path, figure_formats: Sequence[str] = ("png",)) -> Report:
    """Write the pages of an output folder again from the data of its last report.

    Args:
        out: output folder of a study, or an archive.
        figure_formats: see `isocost.report.html.write_report`.

    Raises:
        ConfigError: there is no report data, or it is damaged.
    """
    root = Path(out)
    tasks = [task for task in get_args(TaskName) if (root / REPORT_DATA / task / PAGE).is_file()]
    if not tasks:
        raise ConfigError(f"{out}: no {REPORT_DATA}/TASK/{PAGE} to rebuild from; `isocost report STUDY --out {out}` writes it")
    _add_gflop_parts(root, tasks)
    pages = {task: _load_page(root / REPORT_DATA / task) for task in tasks}
    return _write_reports(root, pages, {task: LazyImages(root / REPORT_DATA / task / IMAGES) for task in tasks}, figure_formats)


def _with_known_budget_cost(page: Page, table: pd.DataFrame) -> Page:
    """The page with budgets in GFLOP of the denoiser, if the report of an earlier version had them in its GFLOP."""
    if page.scope.budget_cost != "gflop" or is_measured(table, "gflop"):
        return page
    return replace(page, scope=replace(page.scope, budget_cost="gflop_denoiser"))


def _add_gflop_parts(out: Path, tasks: Sequence[TaskName]) -> None:
    """Write the tables of a version that counted the denoiser only with the parts of GFLOP that the study tells."""
    tables = {task: table for task in tasks if (table := read_table(out, task))["gflop"].isna().any()}
    if not tables or not (out / STUDY_FILE).is_file():
        return
    try:
        study = read_study_file(out)
        if missing := [path for path in study.checkpoints if not Path(split_loras(path)[0]).is_dir()]:
            raise ConfigError(f"{missing[0]} is not here")
        experiments = Pipeline(study, out).experiments
    except ConfigError as error:
        logger.warning(f"GFLOP of the whole image stay unknown: {error}")
        return
    for task, table in tables.items():
        if task in experiments and with_gflop_parts(table, experiments[task].components)["gflop"].notna().any():
            _write_table(out, task, with_gflop_parts(table, experiments[task].components))


def _write_table(out: Path, task: TaskName, table: pd.DataFrame) -> None:
    with replacing(table_file(out, task, "parquet")) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")
    with replacing(table_file(out, task, "csv")) as temporary:
        table.to_csv(temporary, index=False)


def task_folder(task: TaskName) -> str:
    """Return the folder of a task's page inside `report/`: empty for text2image, else "TASK/"."""
    return "" if task == "text2image" else f"{task}/"


def _write_reports(
    out: Path,
    pages: Mapping[TaskName, Page],
    samples: Mapping[TaskName, Mapping[str, np.ndarray]],
    figure_formats: Sequence[str],
) -> Report:
    tables = with_seed_variance({task: TaskResults(read_table(out, task), page.metric) for task, page in pages.items()})
    pages = {task: _with_known_budget_cost(page, tables[task].table) for task, page in pages.items()}
    first_page = next(iter(pages.values()))
    (out / "report").mkdir(exist_ok=True)
    verdicts: Sequence[ClaimVerdict] = ()
    if first_page.scope.trained:
        verdicts = evaluate_claims(CLAIMS, tables)
        write_atomically(out / "report" / "claims.md", markdown_claims(first_page.study_name, verdicts, tables))
    else:  # the claims are about sizes of one family that were trained alike
        (out / "report" / "claims.md").unlink(missing_ok=True)
    with shared_final_points():
        first, *others = (
            _write_task_report(out, task, page, tables[task].table, samples[task], () if index else verdicts, figure_formats)
            for index, (task, page) in enumerate(pages.items())
        )
    return replace(first, task_reports=dict(zip(list(pages)[1:], others, strict=True)))


def _write_task_report(
    out: Path,
    task: TaskName,
    page: Page,
    table: pd.DataFrame,
    samples: Mapping[str, np.ndarray],
    verdicts: Sequence[ClaimVerdict],
    figure_formats: Sequence[str],
) -> Report:
    folder = out / "report" / task_folder(task)
    pairs = RecordedDifferences.from_rows(page.differences)
    page_file = write_report(
        folder,
        page.study_name,
        table,
        page.metric,
        page.provenance,
        page.reconstruction_floors,
        samples,
        page.prompts,
        page.budgets,
        page.comparison_rows,
        page.other_pages,
        page.findings,
        page.floor_label,
        page.reference_lines,
        page.missing_experiments,
        page.pretrained,
        verdicts,
        figure_formats,
        page.scope,
        pairs,
        page.resamples,
    )
    floor = page.reconstruction_floors.get(page.metric)
    summary = markdown_summary(
        table,
        page.metric,
        page.study_name,
        page.budgets,
        floor,
        page.floor_label,
        page.missing_experiments,
        page.scope,
        pairs,
        page.resamples,
    )
    write_atomically(folder / "summary.md", summary)
    choices = best_at_budgets(table, page.scope.budget_cost, page.metric, page.budgets, resamples=page.resamples)
    return Report(page_file, table, choices, summary, scope=page.scope)


# --- files ------------------------------------------------------------------------------------------------------------


class _RecordedImages(Mapping[str, np.ndarray]):
    """The images of points. The images of each point that is read are saved to a file."""

    def __init__(self, samples: Mapping[str, np.ndarray], earlier: Mapping[str, np.ndarray], folder: Path) -> None:
        """Take the images of a point from `earlier` if they are there, else from `samples`; save them in `folder`."""
        self.samples, self.earlier, self.folder = samples, earlier, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, point: str) -> np.ndarray:
        images = self.earlier[point] if point in self.earlier else self.samples[point]
        if not find_image_row(self.folder, point):
            write_image_row(self.folder, point, images)
        return images

    def __iter__(self) -> Iterator[str]:
        yield from self.samples
        yield from self.earlier

    def __len__(self) -> int:
        return len(self.samples) + len(self.earlier)


class LazyImages(Mapping[str, np.ndarray]):
    """The saved images of a page by point; a file is read when its images are used."""

    def __init__(self, folder: Path) -> None:
        self.files = {file.stem: file for file in sorted(folder.glob("*")) if file.suffix in IMAGE_ROW_SUFFIXES}

    def __getitem__(self, point: str) -> np.ndarray:
        return read_image_row(self.files[point])

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _save_page(folder: Path, page: Page) -> None:
    folder.mkdir()
    separate = ("comparison_rows", "pretrained", "scope", "differences", "resamples")
    contents = {name: value for name, value in vars(page).items() if name not in separate}
    if page.scope != TRAINED:
        contents["scope"] = vars(page.scope)
    if page.differences:
        contents["differences"] = page.differences
    contents["comparison_rows"] = list(page.comparison_rows)
    contents["pretrained"] = None
    if page.pretrained is not None:
        contents["pretrained"] = {"task": page.pretrained.task, "metric": page.pretrained.metric}
        page.pretrained.table.to_parquet(folder / PRETRAINED, index=False, compression="zstd")
    if page.resamples:
        tensors = {point: torch.from_numpy(values) for point, values in page.resamples.items()}
        save_file(tensors, folder / RESAMPLES, metadata={"metric": page.metric})
    (folder / COMPARISON_ROWS).mkdir()
    for number, images in enumerate(page.comparison_rows.values()):
        write_image_row(folder / COMPARISON_ROWS, str(number), images)
    write_atomically(folder / PAGE, json.dumps(contents, indent=1, ensure_ascii=False) + "\n")


def _load_page(folder: Path) -> Page:
    try:
        contents = json.loads((folder / PAGE).read_text(encoding="utf-8"))
        files = LazyImages(folder / COMPARISON_ROWS)
        comparison_rows = {title: files[str(number)] for number, title in enumerate(contents["comparison_rows"])}
        pretrained = contents["pretrained"]
        if pretrained is not None:
            pretrained = Pretrained(pretrained["task"], pd.read_parquet(folder / PRETRAINED), pretrained["metric"])
        scope = Scope(**contents.get("scope", {}))
        separate = {"comparison_rows": comparison_rows, "pretrained": pretrained, "scope": scope}
        return Page(**{**contents, **separate, "resamples": _load_resamples(folder)})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{folder}: the report data is damaged ({error}); write the report of the study again") from error


def _load_resamples(folder: Path) -> dict[str, np.ndarray]:
    file = folder / RESAMPLES
    return {point: values.numpy() for point, values in read_tensors(file).items()} if file.is_file() else {}


def write_image_row(folder: Path, name: str, images: np.ndarray) -> Path:
    """Write images next to each other as one lossless file.

    Args:
        folder: folder of the file.
        name: name of the file without suffix.
        images: uint8 [K, R, R, 3].

    Returns:
        FOLDER/NAME.webp, or FOLDER/NAME.png if the row is wider or higher than a WebP image can be.
    """
    row = np.concatenate(list(images), axis=1)
    partial = folder / f"{name}.partial"
    if max(row.shape) <= WEBP_MAX_SIDE:
        file = folder / f"{name}.webp"
        Image.fromarray(row).save(partial, format="WEBP", lossless=True, quality=75, method=4)
    else:
        file = folder / f"{name}.png"
        Image.fromarray(row).save(partial, format="PNG", optimize=True)
    partial.replace(file)
    return file


def find_image_row(folder: Path, name: str) -> Path | None:
    """Return the file that `write_image_row` wrote, None if there is none."""
    return next((file for suffix in IMAGE_ROW_SUFFIXES if (file := folder / f"{name}{suffix}").exists()), None)


def read_image_row(file: Path) -> np.ndarray:
    """Read the images [K, R, R, 3] that `write_image_row` wrote."""
    row = np.asarray(read_image_file(file))
    side = row.shape[0]
    return np.stack([row[:, left : left + side] for left in range(0, row.shape[1], side)])
