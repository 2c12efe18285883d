"""The page in a browser: controls, keyboard and screen reader access, and network requests."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from browser import CHROMIUM, Page, browser
from isocost.analysis.claims import TaskResults, evaluate_claims
from isocost.analysis.formatting import format_row
from isocost.analysis.paper_claims import CLAIMS
from isocost.analysis.pareto import best_at_budgets
from isocost.report.budget_slider import slider_values
from isocost.report.html import write_report
from synthetic_results import synthetic_guides, synthetic_table
from test_budget_slider import raced_table, with_fid
from test_report import METRIC, PROMPTS, plain_images

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
WIDE, NARROW = (1440, 900), (390, 844)
SIZES = 5


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Synthetic points with a metric that the paper published, and a size whose name is markup."""
    table = with_fid(synthetic_table(noise=0.004))
    table.loc[table["size"] == "3.2M", "size"] = "3.2M <b>&"
    provenance = [json.dumps({"commit": f"abc{number % 2}", "device": 'a "fine", machine'}) for number in range(len(table))]
    return table.assign(provenance=provenance, task="text2image")


@pytest.fixture(scope="module")
def written(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    provenance = {"commit": "abc", "hours": {"training": 0.5}, "study_yaml": "name: </pre><script>alert('yaml')</script>\n"}
    reconstruction_floors, folder = {METRIC: 0.013, "alignment": 0.95}, tmp_path_factory.mktemp("page") / "report"
    other_pages = {"distillation": "distill/index.html"}
    verdicts = evaluate_claims(CLAIMS, {"text2image": TaskResults(table, METRIC)})
    return write_report(
        folder, "synthetic", table, METRIC, provenance, reconstruction_floors, plain_images(table), PROMPTS,
        other_pages=other_pages, missing_experiments=["DreamBooth"], verdicts=verdicts, figure_formats=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, Path]]:
    profile = tmp_path_factory.mktemp("chromium")
    with browser(profile) as page:
        yield page, profile


@pytest.fixture
def page(chromium: tuple[Page, Path], written: Path) -> Iterator[Page]:
    """A freshly opened page. It must never write to the console, nor request anything but itself."""
    opened, _ = chromium
    opened.requests.clear()
    opened.console_messages.clear()
    opened.open(written, *WIDE)
    yield opened
    opened.run("1")
    assert not opened.console_messages
    assert {address for address in opened.requests if not address.startswith(("data:", "blob:"))} == {written.as_uri()}


def shown_images(page: Page) -> list[list[str]]:
    """Return the addresses of the slider's images, best and runner-up by prompt."""
    return list(
        page.run(
            "[...document.querySelectorAll('#selected-images figure')]"
            ".map(figure => [...figure.querySelectorAll('img')].map(image => image.src))"
        )
    )


def rows(page: Page) -> list[list[str]]:
    """Return the visible rows of the table."""
    table_rows = "[...document.querySelectorAll('#table tbody tr')]"
    return list(page.run(f"{table_rows}.map(row => [...row.cells].map(cell => cell.textContent))"))


def column(page: Page, title: str) -> list[str]:
    """Return a column of the visible rows."""
    index = page.run(f"[...document.querySelectorAll('#table th')].findIndex(cell => cell.textContent === {json.dumps(title)})")
    return [row[index] for row in rows(page)]


def test_all_charts_are_drawn_without_network_requests(page: Page) -> None:
    assert page.run("document.querySelectorAll('.js-plotly-plot').length") == 6 + SIZES
    assert page.run("document.querySelectorAll('.plots [role=img][aria-label]').length") == 6 + SIZES
    assert page.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.run("document.scripts.length") == 5
    assert page.run("document.querySelectorAll('[onerror], b').length") == 0


def test_the_slider_moves_the_configuration_and_its_images(page: Page, table: pd.DataFrame) -> None:
    choices = slider_values(table, METRIC, "normalized_cost")
    images = json.loads(str(page.run("document.getElementById('report-data').textContent")))["images"]
    page.focus("#budget")
    page.press("Home", 36)
    texts = []
    for choice in choices:
        assert choice.best is not None
        text = page.text("#selected")
        assert str(choice.best) in text
        assert choice.best.score in text
        assert (str(choice.runner_up) in text) if choice.runner_up else ("no other size fits" in text.lower())
        points = [configuration.point for configuration in (choice.best, choice.runner_up) if configuration]
        assert shown_images(page) == [[images[point][index] for point in points] for index in range(len(PROMPTS))]
        assert choice.best.point in page.text("#selected-sources")
        assert str(choice.best) in page.run("document.getElementById('budget').getAttribute('aria-valuetext')")
        line = page.run("document.querySelector('[data-chart=cost] .js-plotly-plot').layout.shapes[0].x0")
        assert line == pytest.approx(choice.budget)
        texts.append(text)
        page.press("ArrowRight", 39)
    assert len(set(texts)) == len(choices) > 8
    assert page.text("#selected") == texts[-1], "the slider ends at the last position"


def test_a_budget_can_be_typed(page: Page, table: pd.DataFrame) -> None:
    page.write("#budget-number", "12")
    (choice,) = best_at_budgets(table, "normalized_cost", METRIC, [12])
    assert page.text("#selected").startswith("For 12 units of normalized cost:")
    assert str(choice.best) in page.text("#selected")
    page.write("#budget-number", "0.00001")
    assert "nothing fits" in page.text("#selected")
    assert "The cheapest point costs 0.08" in page.text("#selected")
    assert shown_images(page) == []


@pytest.mark.parametrize("control", ["slider-cost", "cost-Cost"])
def test_the_cost_changes_both_slider_and_chart(page: Page, table: pd.DataFrame, control: str) -> None:
    for cost, title in (("gflop", "GFLOP per image"), ("nfe", "network evaluations"), ("ms_per_image", "ms per image")):
        page.click(f"input[name={control}][data-cost={cost}]")
        assert page.run(f"[...document.querySelectorAll('input[data-cost={cost}]')].every(input => input.checked)")
        assert title in page.run("document.querySelector('[data-chart=cost] .js-plotly-plot').layout.xaxis.title.text")
        choices = slider_values(table, METRIC, cost)
        assert page.run("Number(document.getElementById('budget').max)") == len(choices) - 1
        page.focus("#budget")
        page.press("End", 35)
        assert str(choices[-1].best) in page.text("#selected")
        line = page.run("document.querySelector('[data-chart=cost] .js-plotly-plot').layout.shapes[0].x0")
        assert line == pytest.approx(choices[-1].budget)


def test_the_papers_results_are_shown_on_request_and_where_comparable(page: Page) -> None:
    traces = "document.querySelector('[data-chart=cost] .js-plotly-plot').data"
    visible = f"{traces}.filter(trace => trace.meta === 'published').map(trace => trace.visible)"
    assert page.run("document.querySelector('.published').disabled"), "no squared MMD was published"
    assert page.run(visible) == []
    choices = "[...document.querySelectorAll('input[name=cost-Quality]')].map(input => input.parentNode.textContent.trim())"
    index = page.run(f"{choices}.indexOf('FID')")
    page.click(f"input[name=cost-Quality][value='{index}']")
    assert page.run(visible) == [False]
    page.click(".published")
    assert page.run(visible) == [True]
    assert "published, not ours" in page.run("document.querySelector('[data-chart=cost] .legend').textContent")
    page.click("input[name=cost-Cost][data-cost=gflop]")
    assert page.run(visible) == []
    assert page.run("document.querySelector('.published').disabled")


def test_the_table_filters_and_sorts(page: Page, table: pd.DataFrame) -> None:
    assert page.text("#count") == f"{len(table)} points"
    assert len(rows(page)) == 50
    page.choose("[name=filter-size]", "0.8M")
    page.choose("[name=filter-solver]", "ddim/trailing")
    page.click("[name=filter-final]")
    expected = table[(table["size"] == "0.8M") & (table["solver"] == "ddim/trailing") & table["is_final"]]
    assert page.text("#count") == f"{len(expected)} of {len(table)} points"
    assert sorted(column(page, "point")) == sorted(expected["point"])
    ascending = sorted(expected["num_steps"])
    for steps, direction in ((ascending, "ascending"), (ascending[::-1], "descending")):
        page.click("#table th:nth-child(3) button")
        assert [int(value) for value in column(page, "steps")] == steps
        assert page.run("document.querySelector('#table th:nth-child(3)').getAttribute('aria-sort')") == direction
    page.write("[name=filter-text]", expected["point"].iloc[7])
    assert column(page, "point") == [expected["point"].iloc[7]]
    page.write("[name=filter-text]", "no such words")
    assert page.text("#visible-rows") == "No rows"
    assert page.run("document.getElementById('export').disabled")


def test_the_table_has_pages(page: Page, table: pd.DataFrame) -> None:
    expected = table.sort_values(METRIC, kind="stable")["point"].tolist()
    points = []
    for _ in range(-(-len(expected) // 50)):
        points += column(page, "point")
        page.click("#next")
    assert sorted(points) == sorted(expected)
    assert points[0] == expected[0]
    page.click("#previous")
    assert page.text("#visible-rows").startswith("Rows ")


def test_the_csv_file_has_the_filtered_rows(page: Page, table: pd.DataFrame, chromium: tuple[Page, Path]) -> None:
    page.choose("[name=filter-size]", "3.2M <b>&")
    page.click("#table th:nth-child(3) button")
    file = chromium[1] / "downloads" / "points.csv"
    page.click("#export")
    deadline = time.monotonic() + 30
    while not file.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with file.open(encoding="utf-8", newline="") as stream:
        csv_rows = list(csv.DictReader(stream))
    expected = table[table["size"] == "3.2M <b>&"].set_index("point")
    assert sorted(row["point"] for row in csv_rows) == sorted(expected.index)
    assert [int(row["num_steps"]) for row in csv_rows] == sorted(expected["num_steps"])
    for row in csv_rows:
        point = expected.loc[row["point"]]
        assert (row["size"], row["device"], row["protocol"]) == ("3.2M <b>&", 'a "fine", machine', "synthetic")
        assert row["commit"] == json.loads(point["provenance"])["commit"]
        for name in (METRIC, f"{METRIC}_low", f"{METRIC}_high", "gflop", "guidance", "normalized_cost", "images_seen"):
            assert float(row[name]) == pytest.approx(point[name], rel=1e-8)


def test_image_grids_over_steps_and_over_budgets(page: Page) -> None:
    hidden = "[...document.querySelectorAll('[data-grid]')].map(grid => grid.hidden)"
    assert page.run(hidden) == [False, True]
    page.click("input[name=grid-columns][value='1']")
    assert page.run(hidden) == [True, False]
    count = page.run("document.querySelectorAll('[data-grid=\"0\"] img').length")
    assert count == SIZES * 5 * len(PROMPTS)


def test_other_pages_are_linked_and_missing_experiments_named(page: Page) -> None:
    assert page.run("document.querySelector('#answer .other-pages a').getAttribute('href')") == "distill/index.html"
    assert "not scored yet: DreamBooth" in page.text("#answer .other-pages")


# --- layout, accessibility, print -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_nothing_is_wider_than_the_window(page: Page, size: tuple[int, int]) -> None:
    page.resize(*size)
    page.wait(f"innerWidth === {size[0]}")
    page.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    page.wait(f"document.documentElement.scrollWidth <= {size[0]}")


CONTRAST = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const backgroundOf = element => {
    const bar = element.closest('.point')?.querySelector('path');  // text inside a bar
    if (bar) return numbers(getComputedStyle(bar).fill);
    for (; element; element = element.parentElement) {
      const color = numbers(getComputedStyle(element).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const element of document.querySelectorAll('body *')) {
    const text = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.textContent.trim()).join('');
    const style = getComputedStyle(element);
    if (!text || !element.getClientRects().length || ['SCRIPT', 'STYLE', 'OPTION'].includes(element.tagName)) continue;
    const inChart = element.namespaceURI.endsWith('svg');
    if (inChart && element.closest('.heatmap-label, .heatmaplayer')) continue;
    const color = inChart ? style.fill : style.color;
    const [high, low] = [luminance(numbers(color)), luminance(backgroundOf(element))].sort((a, b) => b - a);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) bad.push(`${element.tagName} ${contrast.toFixed(2)} ${text.slice(0, 40)}`);
  }
  return bad;
})()"""


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_text_has_enough_contrast_with_its_background(page: Page, size: tuple[int, int]) -> None:
    page.resize(*size)
    page.run("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.run(CONTRAST) == []


def test_a_screen_reader_finds_names_headers_and_headings(page: Page) -> None:
    assert page.run("document.documentElement.lang") == "en"
    unlabelled = "[...document.querySelectorAll('input, select')].filter(input => !input.labels.length)"
    assert page.run(f"{unlabelled}.map(input => input.outerHTML)") == []
    for selector, is_bad in {
        "button, a": "!element.textContent.trim()",
        "img": "!element.alt.trim()",
        "table": "!element.querySelector('th[scope]')",
        "fieldset": "!element.querySelector('legend')?.textContent",
        "[tabindex]": "!element.ariaLabel || element.tabIndex > 0",
    }.items():
        assert page.run(f"[...document.querySelectorAll('{selector}')].filter(element => {is_bad}).length") == 0, selector
    with_id = "[...document.querySelectorAll('[id]')].filter(element => !element.closest('.plots'))"
    ids = page.run(f"{with_id}.map(element => element.id)")
    assert len(ids) == len(set(ids))
    levels = page.run("[...document.querySelectorAll('h1, h2, h3, h4, h5')].map(heading => Number(heading.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.run("document.querySelectorAll('main, header, nav[aria-label]').length") == 3


def test_a_keyboard_reaches_every_control_and_the_focus_is_visible(page: Page) -> None:
    candidates = "[...document.querySelectorAll('a, button, select, input, summary, [tabindex]')]"
    usable = f"{candidates}.filter(item => item.getClientRects().length && !item.disabled && item.tabIndex >= 0)"
    num_controls = page.run(f"new Set({usable}.map(item => item.type === 'radio' ? item.name : item)).size")
    page.run("document.activeElement.blur()")
    reached, without_outline = set(), []
    for _ in range(num_controls + 5):
        page.press("Tab", 9)
        for _attempt in range(20):  # the first style after a key can come a frame later
            index, element, has_outline = page.run(
                "(active => { const outlined = active.matches('label > input[type=radio]') ? active.parentNode : active;"
                " const style = getComputedStyle(outlined);"
                " return [[...document.querySelectorAll('*')].indexOf(active), active.outerHTML.slice(0, 90),"
                " style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1]; })(document.activeElement)"
            )
            if has_outline:
                break
            time.sleep(0.05)
        reached.add(index)
        if not has_outline:
            without_outline.append(element)
    assert [element for element in without_outline if not element.startswith("<body")] == []
    assert len(reached) >= num_controls


def test_axe_finds_no_violations(page: Page) -> None:
    axe = os.environ.get("AXE_CORE")
    if not axe:
        pytest.skip("set AXE_CORE to the path of axe-core's axe.min.js")
    page.run(Path(axe).read_text(encoding="utf-8"))
    for size in (WIDE, NARROW):
        page.resize(*size)
        violations = "axe.run().then(result => result.violations.map(item => [item.id, item.nodes[0].html]))"
        assert page.run(violations) == []


PRINT_WIDTH = 695
"""Width of an A4 page between its margins, in pixels."""


def test_it_can_be_printed(page: Page, tmp_path: Path) -> None:
    page.print_pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    page.resize(PRINT_WIDTH, 980)
    page.send("Emulation.setEmulatedMedia", media="print")
    screen_only = ["#budget-slider .budget", "#filters", "nav", ".controls", ".on-screen"]
    are_hidden = f"{json.dumps(screen_only)}.every(selector => !document.querySelector(selector).getClientRects().length)"
    assert page.run(are_hidden)
    assert page.run("document.querySelector('#selected').getClientRects().length") > 0
    assert page.text("#budget-slider h2") == "The answer at one budget"
    boxes = "[...document.querySelectorAll('.scroll, pre, table, p, dl')]"
    too_wide = f"{boxes}.filter(box => box.getBoundingClientRect().right > innerWidth + 1)"
    page.wait(f"{too_wide}.length === 0")
    page.wait(f"document.documentElement.scrollWidth <= {PRINT_WIDTH}")
    visible_titles = "[...document.querySelectorAll('#table th')].filter(cell => cell.getClientRects().length)"
    titles = f"{visible_titles}.map(cell => cell.textContent)"
    metric = "squared MMD"
    costs = ["normalized cost", "evaluations", "GFLOP", "milliseconds", "latency", "joules", "US dollars"]
    assert page.run(titles) == ["size", "solver", "steps", "guidance", metric, *costs, "point"]
    page.send("Emulation.setEmulatedMedia", media="")
    assert len(page.run(titles)) > 15, "the screen shows every column"


@pytest.mark.parametrize("kind", ["minimal", "unfinished", pytest.param("raced", marks=pytest.mark.slow)])
def test_a_page_with_missing_parts_has_no_console_messages(chromium: tuple[Page, Path], tmp_path: Path, kind: str) -> None:
    table = {
        "minimal": synthetic_table(solvers=("euler/trailing",), snapshots=(), guidance=(1.0,), num_steps=(4,)).assign(
            ms_per_image=np.nan
        ),
        "unfinished": synthetic_table()[lambda rows: ~rows["is_final"]],
        "raced": raced_table(),
    }[kind]
    opened, _ = chromium
    opened.console_messages.clear()
    opened.open(write_report(tmp_path, kind, table, METRIC, {}, {}, {}, [], figure_formats=()), *NARROW)
    assert opened.console_messages == []
    assert opened.run("document.documentElement.scrollWidth") <= NARROW[0]
    assert opened.run("document.getElementById('slider-panel')?.hidden === false") == (kind != "unfinished")
    if kind != "unfinished":
        best = table.loc[table[METRIC].idxmin()]
        opened.focus("#budget")
        opened.press("End", 35)
        assert format_row(best) in opened.text("#selected")
        assert opened.text("#selected-legend") == "No images were saved for this point."
    assert "Not in this report" in opened.text("main")


def test_points_with_guides_are_filtered_and_charted(chromium: tuple[Page, Path], tmp_path: Path) -> None:
    table = synthetic_guides(0.02)
    opened, _ = chromium
    opened.console_messages.clear()
    opened.open(write_report(tmp_path, "guides", table, METRIC, {}, {}, {}, [], figure_formats=()), *WIDE)
    assert opened.run("document.querySelectorAll('[data-chart^=guide_] .js-plotly-plot').length") == 2
    options = opened.run("[...document.querySelector('[name=filter-guide]').options].map(option => option.textContent)")
    assert options == ["all", "none", *sorted(table["guide"].dropna().unique())]
    for choice, expected in (
        ("0.8M@50000", table[table["guide"] == "0.8M@50000"]),
        ("", table),
        ("none", table[table["guide"].isna()]),
    ):
        opened.choose("[name=filter-guide]", choice or "all")
        counted = f"{len(expected)} of {len(table)} points" if choice else f"{len(table)} points"
        assert opened.text("#count") == counted
    opened.open(tmp_path / "index.html", *NARROW)
    assert opened.run("document.documentElement.scrollWidth") <= NARROW[0]
    assert opened.console_messages == []
