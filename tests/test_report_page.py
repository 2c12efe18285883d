"""The page in a browser: what moves when something is pressed, what a keyboard and a screen reader find, and what is asked of
the network."""

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
from isocost.analysis.formatting import format_configuration
from isocost.analysis.paper_claims import FINDINGS
from isocost.analysis.pareto import best_at_budgets
from isocost.report.budget_slider import stops
from isocost.report.html import write_report
from synthetic_results import planted_table
from test_budget_slider import raced_table, with_fid
from test_report import CAPTIONS, KERNEL, plain_images

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
WIDE, NARROW = (1440, 900), (390, 844)
SIZES = 5


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Planted points with a metric that the paper has too, and a size whose name is markup."""
    table = with_fid(planted_table(noise=0.004))
    table.loc[table["size"] == "3.2M", "size"] = "3.2M <b>&"
    made = [json.dumps({"commit": f"abc{number % 2}", "device": 'a "fine", machine'}) for number in range(len(table))]
    return table.assign(provenance=made, task="text2image")


@pytest.fixture(scope="module")
def written(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    origin = {"commit": "abc", "hours": {"training": 0.5}, "study_yaml": "name: </pre><script>alert('yaml')</script>\n"}
    reconstruction_floors, folder = {KERNEL: 0.013, "alignment": 0.95}, tmp_path_factory.mktemp("page") / "report"
    others = {"distillation": "distill/index.html"}
    verdicts = evaluate_claims(FINDINGS, {"text2image": TaskResults(table, KERNEL)})
    return write_report(
        folder, "planted", table, KERNEL, origin, reconstruction_floors, plain_images(table), CAPTIONS,
        others=others, absent=["DreamBooth"], verdicts=verdicts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, Path]]:
    profile = tmp_path_factory.mktemp("chromium")
    with browser(profile) as page:
        yield page, profile


@pytest.fixture
def page(chromium: tuple[Page, Path], written: Path) -> Iterator[Page]:
    """The page anew. It must never complain, nor ask for anything but itself."""
    opened, _ = chromium
    opened.requests.clear()
    opened.complaints.clear()
    opened.open(written, *WIDE)
    yield opened
    opened.run("1")
    assert not opened.complaints
    assert {address for address in opened.requests if not address.startswith(("data:", "blob:"))} == {written.as_uri()}


def shown_images(page: Page) -> list[list[str]]:
    """Addresses of the slider's images, best and runner-up by prompt."""
    return list(
        page.run(
            "[...document.querySelectorAll('#chosen-images figure')]"
            ".map(one => [...one.querySelectorAll('img')].map(image => image.src))"
        )
    )


def rows(page: Page) -> list[list[str]]:
    """What the table shows."""
    lines = "[...document.querySelectorAll('#table tbody tr')]"
    return list(page.run(f"{lines}.map(row => [...row.cells].map(one => one.textContent))"))


def column(page: Page, title: str) -> list[str]:
    """One column of what the table shows."""
    at = page.run(f"[...document.querySelectorAll('#table th')].findIndex(cell => cell.textContent === {json.dumps(title)})")
    return [row[at] for row in rows(page)]


def test_all_charts_are_drawn_and_nothing_is_asked_of_the_network(page: Page) -> None:
    assert page.run("document.querySelectorAll('.js-plotly-plot').length") == 4 + SIZES
    assert page.run("document.querySelectorAll('.plots [role=img][aria-label]').length") == 4 + SIZES
    assert page.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.run("document.scripts.length") == 5
    assert page.run("document.querySelectorAll('[onerror], b').length") == 0


def test_the_slider_moves_the_configuration_and_its_images(page: Page, table: pd.DataFrame) -> None:
    found = stops(table, KERNEL, "normalized_cost")
    images = json.loads(str(page.run("document.getElementById('data').textContent")))["images"]
    page.focus("#budget")
    page.press("Home", 36)
    seen = []
    for choice in found:
        assert choice.best is not None
        said = page.text("#chosen")
        assert str(choice.best) in said
        assert choice.best.score in said
        assert (str(choice.runner_up) in said) if choice.runner_up else ("no other size fits" in said.lower())
        both = [one.point for one in (choice.best, choice.runner_up) if one]
        assert shown_images(page) == [[images[point][number] for point in both] for number in range(len(CAPTIONS))]
        assert choice.best.point in page.text("#chosen-origin")
        assert str(choice.best) in page.run("document.getElementById('budget').getAttribute('aria-valuetext')")
        line = page.run("document.querySelector('[data-chart=cost] .js-plotly-plot').layout.shapes[0].x0")
        assert line == pytest.approx(choice.budget)
        seen.append(said)
        page.press("ArrowRight", 39)
    assert len(set(seen)) == len(found) > 8
    assert page.text("#chosen") == seen[-1], "there is nothing beyond the last stop"


def test_a_budget_can_be_typed(page: Page, table: pd.DataFrame) -> None:
    page.write("#budget-number", "12")
    (choice,) = best_at_budgets(table, "normalized_cost", KERNEL, [12])
    assert page.text("#chosen").startswith("For 12 units of normalized cost:")
    assert str(choice.best) in page.text("#chosen")
    page.write("#budget-number", "0.00001")
    assert "nothing fits" in page.text("#chosen")
    assert "The cheapest point costs 0.08" in page.text("#chosen")
    assert shown_images(page) == []


@pytest.mark.parametrize("where", ["explore-cost", "cost-Cost"])
def test_the_cost_acts_on_slider_and_chart_alike(page: Page, table: pd.DataFrame, where: str) -> None:
    for cost, title in (("gflop", "GFLOP per image"), ("nfe", "network evaluations"), ("ms_per_image", "ms per image")):
        page.click(f"input[name={where}][data-cost={cost}]")
        assert page.run(f"[...document.querySelectorAll('input[data-cost={cost}]')].every(input => input.checked)")
        assert title in page.run("document.querySelector('[data-chart=cost] .js-plotly-plot').layout.xaxis.title.text")
        found = stops(table, KERNEL, cost)
        assert page.run("Number(document.getElementById('budget').max)") == len(found) - 1
        page.focus("#budget")
        page.press("End", 35)
        assert str(found[-1].best) in page.text("#chosen")
        line = page.run("document.querySelector('[data-chart=cost] .js-plotly-plot').layout.shapes[0].x0")
        assert line == pytest.approx(found[-1].budget)


def test_the_paper_is_shown_where_it_is_asked_for_and_comparable(page: Page) -> None:
    traces = "document.querySelector('[data-chart=cost] .js-plotly-plot').data"
    visible = f"{traces}.filter(trace => trace.meta === 'published').map(trace => trace.visible)"
    assert page.run("document.querySelector('.published').disabled"), "no squared MMD was published"
    assert page.run(visible) == []
    choices = "[...document.querySelectorAll('input[name=cost-Quality]')].map(one => one.parentNode.textContent.trim())"
    at = page.run(f"{choices}.indexOf('FID')")
    page.click(f"input[name=cost-Quality][value='{at}']")
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
    wanted = table[(table["size"] == "0.8M") & (table["solver"] == "ddim/trailing") & table["is_final"]]
    assert page.text("#count") == f"{len(wanted)} of {len(table)} points"
    assert sorted(column(page, "point")) == sorted(wanted["point"])
    for steps, direction in ((sorted(wanted["num_steps"]), "ascending"), (sorted(wanted["num_steps"])[::-1], "descending")):
        page.click("#table th:nth-child(3) button")
        assert [int(value) for value in column(page, "steps")] == steps
        assert page.run("document.querySelector('#table th:nth-child(3)').getAttribute('aria-sort')") == direction
    page.write("[name=filter-words]", wanted["point"].iloc[7])
    assert column(page, "point") == [wanted["point"].iloc[7]]
    page.write("[name=filter-words]", "no such words")
    assert page.text("#shown") == "No row"
    assert page.run("document.getElementById('export').disabled")


def test_the_table_has_pages(page: Page, table: pd.DataFrame) -> None:
    order = table.sort_values(KERNEL, kind="stable")["point"].tolist()
    told = []
    for _ in range(-(-len(order) // 50)):
        told += column(page, "point")
        page.click("#next")
    assert sorted(told) == sorted(order)
    assert told[0] == order[0]
    page.click("#previous")
    assert page.text("#shown").startswith("Rows ")


def test_the_csv_file_holds_what_is_shown(page: Page, table: pd.DataFrame, chromium: tuple[Page, Path]) -> None:
    page.choose("[name=filter-size]", "3.2M <b>&")
    page.click("#table th:nth-child(3) button")
    file = chromium[1] / "downloads" / "points.csv"
    page.click("#export")
    ends = time.monotonic() + 30
    while not file.is_file():
        assert time.monotonic() < ends
        time.sleep(0.05)
    with file.open(encoding="utf-8", newline="") as stream:
        told = list(csv.DictReader(stream))
    wanted = table[table["size"] == "3.2M <b>&"].set_index("point")
    assert sorted(row["point"] for row in told) == sorted(wanted.index)
    assert [int(row["num_steps"]) for row in told] == sorted(wanted["num_steps"])
    for row in told:
        true = wanted.loc[row["point"]]
        assert (row["size"], row["device"], row["protocol"]) == ("3.2M <b>&", 'a "fine", machine', "planted")
        assert row["commit"] == json.loads(true["provenance"])["commit"]
        for name in (KERNEL, f"{KERNEL}_low", f"{KERNEL}_high", "gflop", "guidance", "normalized_cost", "images_seen"):
            assert float(row[name]) == pytest.approx(true[name], rel=1e-8)


def test_contact_sheets_over_steps_and_over_budgets(page: Page) -> None:
    shown = "[...document.querySelectorAll('[data-sheet]')].map(one => one.hidden)"
    assert page.run(shown) == [False, True]
    page.click("input[name=sheet-columns][value='1']")
    assert page.run(shown) == [True, False]
    count = page.run("document.querySelectorAll('[data-sheet=\"0\"] img').length")
    assert count == SIZES * 5 * len(CAPTIONS)


def test_other_pages_are_linked_and_what_is_not_there_is_said(page: Page) -> None:
    assert page.run("document.querySelector('#answer .elsewhere a').getAttribute('href')") == "distill/index.html"
    assert "not scored yet: DreamBooth" in page.text("#answer .elsewhere")


# --- for everybody ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_nothing_sticks_out_of_the_window(page: Page, size: tuple[int, int]) -> None:
    page.resize(*size)
    page.wait(f"innerWidth === {size[0]}")
    page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.wait(f"document.documentElement.scrollWidth <= {size[0]}")


CONTRAST = """(() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const color = numbers(getComputedStyle(one).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const one of document.querySelectorAll('body *')) {
    const text = [...one.childNodes].filter(node => node.nodeType === 3).map(node => node.textContent.trim()).join('');
    const style = getComputedStyle(one);
    if (!text || !one.getClientRects().length || ['SCRIPT', 'STYLE', 'OPTION'].includes(one.tagName)) continue;
    const inChart = one.namespaceURI.endsWith('svg');
    if (inChart && one.closest('.heatmap-label, .heatmaplayer')) continue;
    const [high, low] = [luminance(numbers(inChart ? style.fill : style.color)), luminance(behind(one))].sort((a, b) => b - a);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) bad.push(`${one.tagName} ${contrast.toFixed(2)} ${text.slice(0, 40)}`);
  }
  return bad;
})()"""


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_text_stands_out_from_what_is_behind_it(page: Page, size: tuple[int, int]) -> None:
    page.resize(*size)
    page.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.run(CONTRAST) == []


def test_a_screen_reader_finds_names_headers_and_headings(page: Page) -> None:
    assert page.run("document.documentElement.lang") == "en"
    nameless = "[...document.querySelectorAll('input, select')].filter(one => !one.labels.length).map(one => one.outerHTML)"
    assert page.run(nameless) == []
    for what, lacks in {
        "button, a": "!one.textContent.trim()",
        "img": "!one.alt.trim()",
        "table": "!one.querySelector('th[scope]')",
        "fieldset": "!one.querySelector('legend')?.textContent",
        "[tabindex]": "!one.ariaLabel || one.tabIndex > 0",
    }.items():
        assert page.run(f"[...document.querySelectorAll('{what}')].filter(one => {lacks}).length") == 0, what
    ids = page.run("[...document.querySelectorAll('[id]')].filter(one => !one.closest('.plots')).map(one => one.id)")
    assert len(ids) == len(set(ids))
    levels = page.run("[...document.querySelectorAll('h1, h2, h3, h4, h5')].map(one => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.run("document.querySelectorAll('main, header, nav[aria-label]').length") == 3


def test_a_keyboard_reaches_every_control_and_sees_where_it_is(page: Page) -> None:
    reachable = "[...document.querySelectorAll('a, button, select, input, summary, [tabindex]')]"
    usable = f"{reachable}.filter(one => one.getClientRects().length && !one.disabled && one.tabIndex >= 0)"
    controls = page.run(f"new Set({usable}.map(one => one.type === 'radio' ? one.name : one)).size")
    page.run("document.activeElement.blur()")
    stops, unseen = set(), []
    for _ in range(controls + 5):
        page.press("Tab", 9)
        told = page.run(
            "(one => { const place = one.matches('label > input[type=radio]') ? one.parentNode : one;"
            " const style = getComputedStyle(place);"
            " return [[...document.querySelectorAll('*')].indexOf(one), one.outerHTML.slice(0, 90),"
            " style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1]; })(document.activeElement)"
        )
        stops.add(told[0])
        if not told[2]:
            unseen.append(told[1])
    assert [one for one in unseen if not one.startswith("<body")] == []
    assert len(stops) >= controls


def test_axe_finds_nothing(page: Page) -> None:
    axe = os.environ.get("AXE_CORE")
    if not axe:
        pytest.skip("AXE_CORE does not name axe-core's axe.min.js")
    page.run(Path(axe).read_text(encoding="utf-8"))
    for size in (WIDE, NARROW):
        page.resize(*size)
        assert page.run("axe.run().then(told => told.violations.map(one => [one.id, one.nodes[0].html]))") == []


PAPER = 695
"""Pixels of an A4 sheet between its margins."""


def test_it_can_be_printed(page: Page, tmp_path: Path) -> None:
    page.printed(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    page.resize(PAPER, 980)
    page.send("Emulation.setEmulatedMedia", media="print")
    away = ["#explore .budget", "#filters", "nav", ".controls", ".screen"]
    hidden = f"{json.dumps(away)}.every(one => !document.querySelector(one).getClientRects().length)"
    assert page.run(hidden)
    assert page.run("document.querySelector('#chosen').getClientRects().length") > 0
    assert page.text("#explore h2") == "At one budget"
    boxes = "[...document.querySelectorAll('.scroll, pre, table, p, dl')]"
    cut = f"{boxes}.filter(one => one.getBoundingClientRect().right > innerWidth + 1)"
    page.wait(f"{cut}.length === 0")
    page.wait(f"document.documentElement.scrollWidth <= {PAPER}")
    shown = "[...document.querySelectorAll('#table th')].filter(one => one.getClientRects().length).map(one => one.textContent)"
    metric, costs = "squared MMD", ["normalized cost", "evaluations", "GFLOP", "milliseconds"]
    assert page.run(shown) == ["size", "solver", "steps", "guidance", metric, *costs, "point"]
    page.send("Emulation.setEmulatedMedia", media="")
    assert len(page.run(shown)) > 15, "on a screen every column is there"


@pytest.mark.parametrize("kind", ["bare", "young", pytest.param("raced", marks=pytest.mark.slow)])
def test_missing_parts_leave_a_page_without_complaint(chromium: tuple[Page, Path], tmp_path: Path, kind: str) -> None:
    table = {
        "bare": planted_table(solvers=("euler/trailing",), snapshots=(), guidance=(1.0,), num_steps=(4,)).assign(
            ms_per_image=np.nan
        ),
        "young": planted_table()[lambda all_: ~all_["is_final"]],
        "raced": raced_table(),
    }[kind]
    opened, _ = chromium
    opened.complaints.clear()
    opened.open(write_report(tmp_path, kind, table, KERNEL, {}, {}, {}, []), *NARROW)
    assert opened.complaints == []
    assert opened.run("document.documentElement.scrollWidth") <= NARROW[0]
    assert opened.run("document.getElementById('explorer') !== null && !explorer.hidden") == (kind != "young")
    if kind != "young":
        best = table.loc[table[KERNEL].idxmin()]
        opened.focus("#budget")
        opened.press("End", 35)
        assert format_configuration(best["size"], best["num_steps"], best["guidance"], best["solver"]) in opened.text("#chosen")
        assert opened.text("#chosen-legend") == "No images were kept of this point."
    assert "Not in this report" in opened.text("main")
