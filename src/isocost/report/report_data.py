"""What a page is drawn from, as files beside its table: the same page can be drawn again from them, without study, data or
checkpoints.

OUT/table.parquet                       the points (`isocost.sweep.ledger.table_file`)
OUT/report_data/TASK/page.json           everything else that is said
OUT/report_data/TASK/images/POINT.png  the images that the page shows, side by side
OUT/report_data/TASK/strips/NUMBER.png   what they are set against, in the order of page.json
OUT/report_data/TASK/pretrained.parquet  the points of the checkpoints that a task started from

Shape letters: K prompts, R side in pixels; images are uint8 [K, R, R, 3].
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
from isocost.analysis.paper_claims import FINDINGS
from isocost.analysis.pareto import BudgetChoice, best_at_budgets
from isocost.analysis.results_table import REPORT_DATA, read_table, table_file
from isocost.config.types import TaskName
from isocost.errors import ConfigError
from isocost.report.claims_table import markdown_verdicts
from isocost.report.html import write_report
from isocost.report.markdown import BUDGET_COST, markdown_summary
from isocost.report.plot_data_finetune import Pretrained
from isocost.utils.artifact_store import write_atomically

PAGE, IMAGES, STRIPS, PRETRAINED = "page.json", "images", "comparison_rows", "pretrained.parquet"


@dataclass(frozen=True)
class Report:
    """What a report says, beside its page: the table of points, the choice at each budget of normalized cost, `summary.md`'s text.

    `others` are the reports of what was tuned from the family, by task.
    """

    page: Path
    table: pd.DataFrame
    choices: list[BudgetChoice]
    summary: str
    others: Mapping[TaskName, Report] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """What `isocost.report.page.write_report` is given beside the table and the images of the points; see there."""

    study_name: str
    metric: str
    provenance: Mapping[str, Any]
    reconstruction_floors: Mapping[str, float]
    prompts: Sequence[str]
    budgets: Sequence[float]
    others: Mapping[str, str]
    findings: Mapping[str, Any]
    floor_label: str
    levels: Mapping[str, Mapping[str, float]] | None
    absent: Sequence[str]
    strips: Mapping[str, np.ndarray] = field(default_factory=dict)
    pretrained: Pretrained | None = None


ReportData = tuple[Page, pd.DataFrame, Mapping[str, np.ndarray]]
"""A page, its table, and the images of the points."""


def draw(out: Path, drawings: Mapping[TaskName, ReportData]) -> Report:
    """Write the pages of the tasks and what they were drawn from; a table goes through its file, so that it is the same again.

    A point without images has those that an earlier page of the folder showed of it.
    """
    for task in set(get_args(TaskName)) - set(drawings):
        shutil.rmtree(out / REPORT_DATA / task, ignore_errors=True)
    samples: dict[TaskName, Mapping[str, np.ndarray]] = {}
    for task, (page, table, images) in drawings.items():
        for suffix, write in (("parquet", table.to_parquet), ("csv", table.to_csv)):
            write(table_file(out, task, suffix), index=False)
        folder = out / REPORT_DATA / task
        earlier = dict(_Kept(folder / IMAGES))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _save(folder, page)
        wanted = set(table["point"]) - set(images)
        known = {point: shown for point, shown in earlier.items() if point in wanted}
        samples[task] = _Shown(images, known, folder / IMAGES)
    return _write_all(out, {task: page for task, (page, _, _) in drawings.items()}, samples)


def redraw(out: str | Path) -> Report:
    """Draw the pages of an output folder again from what an earlier report left there.

    Raises:
        ConfigError: there is nothing to draw from, or it is damaged.
    """
    root = Path(out)
    tasks = [task for task in get_args(TaskName) if (root / REPORT_DATA / task / PAGE).is_file()]
    if not tasks:
        raise ConfigError(f"{out}: no {REPORT_DATA}/TASK/{PAGE} to draw from; `isocost report STUDY --out {out}` leaves it")
    pages = {task: _load(root / REPORT_DATA / task) for task in tasks}
    return _write_all(root, pages, {task: _Kept(root / REPORT_DATA / task / IMAGES) for task in tasks})


def task_folder(task: TaskName) -> str:
    """Where the page of a task lies in `report/`: at the top, or in a folder of its own."""
    return "" if task == "text2image" else f"{task}/"


def _write_all(out: Path, pages: Mapping[TaskName, Page], samples: Mapping[TaskName, Mapping[str, np.ndarray]]) -> Report:
    tables = with_seed_variance({task: TaskResults(read_table(out, task), page.metric) for task, page in pages.items()})
    verdicts = evaluate_claims(FINDINGS, tables)
    study_name = next(iter(pages.values())).study_name
    (out / "report").mkdir(exist_ok=True)
    write_atomically(out / "report" / "claims.md", markdown_verdicts(study_name, verdicts, tables))
    first, *others = (
        _write(out, task, page, tables[task].table, samples[task], () if number else verdicts)
        for number, (task, page) in enumerate(pages.items())
    )
    return replace(first, others=dict(zip(list(pages)[1:], others, strict=True)))


def _write(
    out: Path,
    task: TaskName,
    page: Page,
    table: pd.DataFrame,
    samples: Mapping[str, np.ndarray],
    verdicts: Sequence[ClaimVerdict],
) -> Report:
    folder = out / "report" / task_folder(task)
    written = write_report(
        folder,
        page.study_name,
        table,
        page.metric,
        page.provenance,
        page.reconstruction_floors,
        samples,
        page.prompts,
        page.budgets,
        page.strips,
        page.others,
        page.findings,
        page.floor_label,
        page.levels,
        page.absent,
        page.pretrained,
        verdicts,
    )
    floor = page.reconstruction_floors.get(page.metric)
    summary = markdown_summary(table, page.metric, page.study_name, page.budgets, floor, page.floor_label, page.absent)
    write_atomically(folder / "summary.md", summary)
    choices = best_at_budgets(table, BUDGET_COST, page.metric, page.budgets)
    return Report(written, table, choices, summary)


# --- files ------------------------------------------------------------------------------------------------------------


class _Shown(Mapping[str, np.ndarray]):
    """The points' images, and further ones by point; each that is asked for is kept as a file."""

    def __init__(self, samples: Mapping[str, np.ndarray], further: Mapping[str, np.ndarray], folder: Path) -> None:
        self.samples, self.further, self.folder = samples, further, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, point: str) -> np.ndarray:
        images = self.further[point] if point in self.further else self.samples[point]
        file = self.folder / f"{point}.png"
        if not file.exists():
            _write_strip(file, images)
        return images

    def __iter__(self) -> Iterator[str]:
        yield from self.samples
        yield from self.further

    def __len__(self) -> int:
        return len(self.samples) + len(self.further)


class _Kept(Mapping[str, np.ndarray]):
    """The images that a page showed, by point."""

    def __init__(self, folder: Path) -> None:
        self.files = {file.stem: file for file in sorted(folder.glob("*.png"))}

    def __getitem__(self, point: str) -> np.ndarray:
        return _read_strip(self.files[point])

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _save(folder: Path, page: Page) -> None:
    told = {name: value for name, value in vars(page).items() if name not in ("strips", "pretrained")}
    told["strips"] = list(page.strips)
    told["pretrained"] = None
    if page.pretrained is not None:
        told["pretrained"] = {"task": page.pretrained.task, "metric": page.pretrained.metric}
        page.pretrained.table.to_parquet(folder / PRETRAINED, index=False)
    (folder / STRIPS).mkdir()
    for number, images in enumerate(page.strips.values()):
        _write_strip(folder / STRIPS / f"{number}.png", images)
    write_atomically(folder / PAGE, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def _load(folder: Path) -> Page:
    try:
        told = json.loads((folder / PAGE).read_text(encoding="utf-8"))
        strips = {title: _read_strip(folder / STRIPS / f"{number}.png") for number, title in enumerate(told["strips"])}
        started = told["pretrained"]
        if started is not None:
            started = Pretrained(started["task"], pd.read_parquet(folder / PRETRAINED), started["metric"])
        return Page(**{**told, "strips": strips, "pretrained": started})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: what the page was drawn from is damaged ({error}); report the study again") from error


def _write_strip(file: Path, images: np.ndarray) -> None:
    """Images side by side without loss; what has one colour in three channels is kept as grey."""
    strip = np.concatenate(list(images), axis=1)
    is_grey = bool((strip[..., :1] == strip).all())
    partial = file.with_suffix(".partial")
    Image.fromarray(strip[..., 0] if is_grey else strip).save(partial, format="PNG", optimize=True)
    partial.replace(file)


def _read_strip(file: Path) -> np.ndarray:
    strip = np.asarray(Image.open(file).convert("RGB"))
    side = strip.shape[0]
    return np.stack([strip[:, at : at + side] for at in range(0, strip.shape[1], side)])
