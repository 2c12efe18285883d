"""The data of a report as files, from which its pages can be rebuilt without the study, its data or its checkpoints.

OUT/table.parquet                                   the points (`isocost.analysis.results_table.table_file`)
OUT/report_data/TASK/page.json                      the other contents of the page, see `Page`
OUT/report_data/TASK/images/POINT.png               the images of a point that the page shows, in one row
OUT/report_data/TASK/comparison_rows/NUMBER.png     the images to compare with, in the order of page.json
OUT/report_data/TASK/pretrained.parquet             the points of the checkpoints that the task started from

Shape letters: K images, R height and width in pixels; images are uint8 [K, R, R, 3].
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from PIL import Image

from isocost.analysis.claims import ClaimVerdict, TaskResults, evaluate_claims, with_seed_variance
from isocost.analysis.paper_claims import CLAIMS
from isocost.analysis.pareto import BudgetChoice, best_at_budgets
from isocost.analysis.results_table import REPORT_DATA, read_table, table_file
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.report.claims_table import markdown_claims
from isocost.report.html import write_report
from isocost.report.markdown import BUDGET_COST, markdown_summary
from isocost.report.plot_data_finetune import Pretrained
from isocost.utils.artifact_store import write_atomically

PAGE, IMAGES, COMPARISON_ROWS, PRETRAINED = "page.json", "images", "comparison_rows", "pretrained.parquet"


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        page: path of the HTML page.
        table: the points.
        choices: the best configuration at each budget of normalized cost.
        summary: the text of `summary.md`.
        task_reports: the reports of the other tasks of the study.
    """

    page: Path
    table: pd.DataFrame
    choices: list[BudgetChoice]
    summary: str
    task_reports: Mapping[TaskName, Report] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """The contents of a page, without the table and the images of the points; see `isocost.report.html.write_report`.

    The fields are the keys of page.json.
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


ReportData = tuple[Page, pd.DataFrame, Mapping[str, np.ndarray]]
"""A page, its table, and point -> images."""


def render(out: Path, reports: Mapping[TaskName, ReportData]) -> Report:
    """Write the pages of all tasks, and their data as files.

    The tables are read back from their files, so that a rebuilt page is equal byte by byte. A point without images gets the
    images that an earlier report of the folder showed.
    """
    for task in set(get_args(TaskName)) - set(reports):
        shutil.rmtree(out / REPORT_DATA / task, ignore_errors=True)
    samples: dict[TaskName, Mapping[str, np.ndarray]] = {}
    for task, (page, table, images) in reports.items():
        for suffix, write in (("parquet", table.to_parquet), ("csv", table.to_csv)):
            write(table_file(out, task, suffix), index=False)
        folder = out / REPORT_DATA / task
        earlier = dict(LazyImages(folder / IMAGES))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _save_page(folder, page)
        without_images = set(table["point"]) - set(images)
        earlier = {point: point_images for point, point_images in earlier.items() if point in without_images}
        samples[task] = _RecordedImages(images, earlier, folder / IMAGES)
    return _write_reports(out, {task: page for task, (page, _, _) in reports.items()}, samples)


def rebuild(out: str | Path) -> Report:
    """Write the pages of an output folder again from the data of its last report.

    Raises:
        ConfigError: there is no report data, or it is damaged.
    """
    root = Path(out)
    tasks = [task for task in get_args(TaskName) if (root / REPORT_DATA / task / PAGE).is_file()]
    if not tasks:
        raise ConfigError(f"{out}: no {REPORT_DATA}/TASK/{PAGE} to rebuild from; `isocost report STUDY --out {out}` writes it")
    pages = {task: _load_page(root / REPORT_DATA / task) for task in tasks}
    return _write_reports(root, pages, {task: LazyImages(root / REPORT_DATA / task / IMAGES) for task in tasks})


def task_folder(task: TaskName) -> str:
    """Return the folder of a task's page inside `report/`: empty for text2image, else "TASK/"."""
    return "" if task == "text2image" else f"{task}/"


def _write_reports(out: Path, pages: Mapping[TaskName, Page], samples: Mapping[TaskName, Mapping[str, np.ndarray]]) -> Report:
    tables = with_seed_variance({task: TaskResults(read_table(out, task), page.metric) for task, page in pages.items()})
    verdicts = evaluate_claims(CLAIMS, tables)
    study_name = next(iter(pages.values())).study_name
    (out / "report").mkdir(exist_ok=True)
    write_atomically(out / "report" / "claims.md", markdown_claims(study_name, verdicts, tables))
    first, *others = (
        _write_task_report(out, task, page, tables[task].table, samples[task], () if index else verdicts)
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
) -> Report:
    folder = out / "report" / task_folder(task)
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
    )
    floor = page.reconstruction_floors.get(page.metric)
    summary = markdown_summary(
        table, page.metric, page.study_name, page.budgets, floor, page.floor_label, page.missing_experiments
    )
    write_atomically(folder / "summary.md", summary)
    choices = best_at_budgets(table, BUDGET_COST, page.metric, page.budgets)
    return Report(page_file, table, choices, summary)


# --- files ------------------------------------------------------------------------------------------------------------


class _RecordedImages(Mapping[str, np.ndarray]):
    """The images of points. The images of each point that is read are saved to a file."""

    def __init__(self, samples: Mapping[str, np.ndarray], earlier: Mapping[str, np.ndarray], folder: Path) -> None:
        """Take the images of a point from `earlier` if they are there, else from `samples`; save them in `folder`."""
        self.samples, self.earlier, self.folder = samples, earlier, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, point: str) -> np.ndarray:
        images = self.earlier[point] if point in self.earlier else self.samples[point]
        file = self.folder / f"{point}.png"
        if not file.exists():
            write_image_row(file, images)
        return images

    def __iter__(self) -> Iterator[str]:
        yield from self.samples
        yield from self.earlier

    def __len__(self) -> int:
        return len(self.samples) + len(self.earlier)


class LazyImages(Mapping[str, np.ndarray]):
    """The saved images of a page by point; a file is read when its images are used."""

    def __init__(self, folder: Path) -> None:
        self.files = {file.stem: file for file in sorted(folder.glob("*.png"))}

    def __getitem__(self, point: str) -> np.ndarray:
        return read_image_row(self.files[point])

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _save_page(folder: Path, page: Page) -> None:
    contents = {name: value for name, value in vars(page).items() if name not in ("comparison_rows", "pretrained")}
    contents["comparison_rows"] = list(page.comparison_rows)
    contents["pretrained"] = None
    if page.pretrained is not None:
        contents["pretrained"] = {"task": page.pretrained.task, "metric": page.pretrained.metric}
        page.pretrained.table.to_parquet(folder / PRETRAINED, index=False)
    (folder / COMPARISON_ROWS).mkdir()
    for number, images in enumerate(page.comparison_rows.values()):
        write_image_row(folder / COMPARISON_ROWS / f"{number}.png", images)
    write_atomically(folder / PAGE, json.dumps(contents, indent=1, ensure_ascii=False) + "\n")


def _load_page(folder: Path) -> Page:
    try:
        contents = json.loads((folder / PAGE).read_text(encoding="utf-8"))
        comparison_rows = {
            title: read_image_row(folder / COMPARISON_ROWS / f"{number}.png")
            for number, title in enumerate(contents["comparison_rows"])
        }
        pretrained = contents["pretrained"]
        if pretrained is not None:
            pretrained = Pretrained(pretrained["task"], pd.read_parquet(folder / PRETRAINED), pretrained["metric"])
        return Page(**{**contents, "comparison_rows": comparison_rows, "pretrained": pretrained})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: the report data is damaged ({error}); write the report of the study again") from error


def write_image_row(file: Path, images: np.ndarray) -> None:
    """Write images [K, R, R, 3] next to each other as one lossless PNG, in greyscale if they are grey."""
    row = np.concatenate(list(images), axis=1)
    is_grey = bool((row[..., :1] == row).all())
    partial = file.with_suffix(".partial")
    Image.fromarray(row[..., 0] if is_grey else row).save(partial, format="PNG", optimize=True)
    partial.replace(file)


def read_image_row(file: Path) -> np.ndarray:
    """Read the images [K, R, R, 3] that `write_image_row` wrote."""
    row = np.asarray(Image.open(file).convert("RGB"))
    side = row.shape[0]
    return np.stack([row[:, left : left + side] for left in range(0, row.shape[1], side)])
