"""Report page of 10,000 points: time to write it, its size, time to open it in Chromium, and response times.

    python benchmarks/report_page.py [--quick] [--json]

The report is a grid of synthetic scores for four solvers and five sizes, with images of every point. Each time, the page is
opened in a new browser. Times are from the request to the load event (recommendation, slider and table are visible), and
until all charts are drawn. The last line is JSON.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from results import Row, argument_parser, print_results, row

from isocost.report.html import write_report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from browser import CHROMIUM, Page, browser
from synthetic_results import PARAMETERS, synthetic_table

METRIC = "mmd_efficientnet"
SOLVERS = ("ddim/trailing", "dpmsolver++2m/trailing", "euler/trailing", "unipc/trailing")
MAX_SECONDS, MAX_MEGABYTES, MAX_RESPONSE_MS = 3.0, 15.0, 200.0


def results_table(num_points: int) -> pd.DataFrame:
    """A table of about `num_points` synthetic points: numbers of steps x guidance values, for every size and solver."""
    per_axis = round((num_points / len(SOLVERS) / len(PARAMETERS)) ** 0.5)
    guidance = [round(1 + 7 * index / per_axis, 3) for index in range(per_axis)]
    table = synthetic_table(num_steps=range(1, per_axis + 1), guidance=guidance, solvers=SOLVERS, snapshots=(), noise=0.004)
    return table.assign(point=[f"{number * 2654435761 % 2**64:016x}" for number in range(len(table))], task="text2image")


def iter_images(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Eight images per point, uint8 [8, 32, 32, 3]; all points share one array."""
    ramp = np.linspace(0, 255, 32)
    gradients = [np.clip(np.add.outer(ramp, ramp)[..., None] / 2 + np.arange(3) * k, 0, 255) for k in range(8)]
    images = np.stack(gradients).astype(np.uint8)
    return dict.fromkeys(table["point"], images)


def response_times(page: Page) -> dict[str, list[float]]:
    """Milliseconds that the page takes to move the slider, to sort and to search, including layout."""
    timed = "(() => { const began = performance.now(); %s; document.body.offsetHeight; return performance.now() - began; })()"
    moves = "budget.value = %d; budget.dispatchEvent(new Event('input', {bubbles: true}))"
    notify = "input.dispatchEvent(new Event('input', {bubbles: true}))"
    searches = "(input => { input.value = '%s'; " + notify + "; })(document.querySelector('[type=search]'))"
    clicks = "document.querySelector('#table th:nth-child(%d) button').click()"
    return {
        "slider moved": [page.run(timed % (moves % position)) for position in (3, 9, 5, 12, 1)],
        "table sorted": [page.run(timed % (clicks % column)) for column in (1, 2, 3, 4, 6)],
        "table searched": [page.run(timed % (searches % text)) for text in ("12.6M", "euler", "12.6M euler", "a", "")],
    }


def main() -> None:
    arguments = argument_parser(__doc__, quick="1,000 points, opened twice; under a minute").parse_args()
    if CHROMIUM is None:
        sys.exit("Chromium is not installed")
    table = results_table(1_000 if arguments.quick else 10_000)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        captions = [f"a shape, number {number}" for number in range(8)]
        path = write_report(Path(folder) / "report", "many", table, METRIC, {}, {METRIC: 0.01}, iter_images(table), captions)
        rows.append(row("page and figures written", [time.perf_counter() - started], "s"))
        rows.append(row("size of the page", [path.stat().st_size / 1e6], "MB"))
        loaded, charts_drawn = [], []
        responses: dict[str, list[float]] = {}
        for number in range(2 if arguments.quick else 5):
            with browser(Path(folder) / f"profile-{number}") as page:
                started = time.perf_counter()
                loaded.append(page.open(path))
                charts_drawn.append(time.perf_counter() - started)
                for what, values in response_times(page).items():
                    responses.setdefault(what, []).extend(values)
        rows.append(row("page opened", loaded, "s"))
        rows.append(row("all charts drawn", charts_drawn, "s"))
        rows += [row(what, values, "ms") for what, values in responses.items()]
    if not arguments.json:
        print(f"{len(table):,} points")
        for line in rows:
            print(f"{line['what']:40} {line['value']:9.3g} {line['unit']:3} [{line['low']:.3g}, {line['high']:.3g}]")
    bounds = {"page opened": MAX_SECONDS, "size of the page": MAX_MEGABYTES, **dict.fromkeys(responses, MAX_RESPONSE_MS)}
    targets = [
        {"what": line["what"], "value": line["value"], "target": f"< {bound:g} {line['unit']}", "met": line["value"] < bound}
        for line in rows
        if (bound := bounds.get(line["what"])) is not None
    ]
    print_results("report_page", rows, targets, points=len(table))


if __name__ == "__main__":
    main()
