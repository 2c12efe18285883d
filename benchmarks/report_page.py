"""A page of ten thousand points: how long it takes to write, how large it is, how long Chromium takes to open it and to answer.

    python benchmarks/report_page.py [--quick] [--json]

A grid of planted scores, four solvers and five sizes, with images of every point. Each opening is a browser of its own;
seconds count from the request to the load event (the answer, the slider and the table are there), and until every chart is
drawn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from results import Row, print_results, row

from isocost.report.html import write_report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from browser import CHROMIUM, Page, browser
from synthetic_results import PARAMETERS, planted_table

METRIC = "mmd_efficientnet"
SOLVERS = ("ddim/trailing", "dpmsolver++2m/trailing", "euler/trailing", "unipc/trailing")
MOST_SECONDS, MOST_MEGABYTES, MOST_ANSWER_MS = 3.0, 15.0, 200.0


def table_of(num_points: int) -> pd.DataFrame:
    """So many planted points: steps by guidance, for every size and solver."""
    side = round((num_points / len(SOLVERS) / len(PARAMETERS)) ** 0.5)
    guidance = [round(1 + 7 * place / side, 3) for place in range(side)]
    table = planted_table(num_steps=range(1, side + 1), guidance=guidance, solvers=SOLVERS, snapshots=(), noise=0.004)
    return table.assign(point=[f"{number * 2654435761 % 2**64:016x}" for number in range(len(table))], task="text2image")


def iter_images(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Eight images of every point, the same arrays again and again, uint8 [8, 32, 32, 3]."""
    across = np.linspace(0, 255, 32)
    some = [np.clip(np.add.outer(across, across)[..., None] / 2 + np.arange(3) * k, 0, 255) for k in range(8)]
    images = np.stack(some).astype(np.uint8)
    return dict.fromkeys(table["point"], images)


def answers(page: Page) -> dict[str, list[float]]:
    """Milliseconds that the page itself takes to move the slider, to sort and to search, layout included."""
    timed = "(() => { const began = performance.now(); %s; document.body.offsetHeight; return performance.now() - began; })()"
    moves = "budget.value = %d; budget.dispatchEvent(new Event('input', {bubbles: true}))"
    told = "one.dispatchEvent(new Event('input', {bubbles: true}))"
    words = "(one => { one.value = '%s'; " + told + "; })(document.querySelector('[type=search]'))"
    clicks = "document.querySelector('#table th:nth-child(%d) button').click()"
    return {
        "slider moved": [page.run(timed % (moves % place)) for place in (3, 9, 5, 12, 1)],
        "table sorted": [page.run(timed % (clicks % place)) for place in (1, 2, 3, 4, 6)],
        "table searched": [page.run(timed % (words % text)) for text in ("12.6M", "euler", "12.6M euler", "a", "")],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="1,000 points, two openings")
    options.add_argument("--json", action="store_true", help="the JSON line alone")
    asked = options.parse_args()
    if CHROMIUM is None:
        sys.exit("no Chromium here")
    table = table_of(1_000 if asked.quick else 10_000)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        captions = [f"a shape, number {number}" for number in range(8)]
        path = write_report(Path(folder) / "report", "many", table, METRIC, {}, {METRIC: 0.01}, iter_images(table), captions)
        rows.append(row("written, figures beside it included", [time.perf_counter() - began], "s"))
        rows.append(row("size of the page", [path.stat().st_size / 1e6], "MB"))
        loaded, drawn = [], []
        told: dict[str, list[float]] = {}
        for number in range(2 if asked.quick else 5):
            with browser(Path(folder) / f"profile-{number}") as page:
                began = time.perf_counter()
                loaded.append(page.open(path))
                drawn.append(time.perf_counter() - began)
                for what, values in answers(page).items():
                    told.setdefault(what, []).extend(values)
        rows.append(row("opened", loaded, "s"))
        rows.append(row("every chart drawn", drawn, "s"))
        rows += [row(what, values, "ms") for what, values in told.items()]
    if not asked.json:
        print(f"{len(table):,} points")
        for one in rows:
            print(f"{one['what']:40} {one['value']:9.3g} {one['unit']:3} [{one['low']:.3g}, {one['high']:.3g}]")
    bounds = {"opened": MOST_SECONDS, "size of the page": MOST_MEGABYTES, **dict.fromkeys(told, MOST_ANSWER_MS)}
    targets = [
        {"what": one["what"], "value": one["value"], "target": f"< {most:g} {one['unit']}", "met": one["value"] < most}
        for one in rows
        if (most := bounds.get(one["what"])) is not None
    ]
    print_results("report_page", rows, targets, points=len(table))


if __name__ == "__main__":
    main()
