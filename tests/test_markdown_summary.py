"""The Markdown summary of synthetic tables, as a parser reads it."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from isocost.analysis.costs import COSTS, REPORT_COSTS
from isocost.analysis.formatting import format_row, format_score
from isocost.analysis.pareto import best_at_budgets, default_budgets, pareto
from isocost.errors import ConfigError
from isocost.report.markdown import MAX_ROWS, ZERO_WIDTH_SPACE, escape_markdown, headline, markdown_summary
from isocost.report.scope import checkpoint_scope
from synthetic_results import exact, synthetic_superres, synthetic_table
from test_report import METRIC

HOSTILE = (
    "</td><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![image](http://evil.example/a.png)",
    "a | b || c",
    "*bold* _slanted_ ~~gone~~ `code` $x^2$",
    "back\\slash \\| pipe",
    "&lt;b&gt; &amp;",
    "two\nlines\n\n# heading\n- item",
    "@someone #12 www.evil.example https://evil.example <https://evil.example>",
)


class Reader(HTMLParser):
    """Elements with their attributes, and the text of every cell and paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.code: list[str] = []
        self.text = ""
        self._within: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "code":
            self.code.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._within and self._within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._within):
            self.tables[-1][-1][-1] += data
        if "code" in self._within:
            self.code[-1] += data


def read(text: str) -> Reader:
    """Parse as GitHub does: with tables and strikethrough, and HTML allowed."""
    reader = Reader()
    reader.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))
    return reader


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return synthetic_table(noise=0.004)


def test_a_single_size_is_not_called_the_best(table: pd.DataFrame) -> None:
    single_size = table[table["size"] == "0.2M"]
    assert headline(best_at_budgets(single_size, "normalized_cost", METRIC, [1000.0])) == "Only 0.2M fits the budgets."
    assert "best size" in headline(best_at_budgets(table, "normalized_cost", METRIC, [0.32, 1000.0]))


def test_the_answer_comes_first_with_one_row_per_budget(table: pd.DataFrame) -> None:
    text = markdown_summary(table, METRIC, "synthetic", floor=0.013, floor_label="decoded real images")
    choices = best_at_budgets(table, "normalized_cost", METRIC, default_budgets(table, "normalized_cost"))
    assert text.startswith(f"**synthetic**: {headline(choices)}\n")
    assert headline(choices).startswith("The best size moves from 0.2M at 0.32 to 12.6M at 81 units of normalized cost")
    head, *rows = read(text).tables[0]
    assert head == ["at most", "best", "squared MMD", "best of another size", ""]
    assert len(rows) == len(choices) == 5
    for row, choice in zip(rows, choices, strict=True):
        assert choice.best is not None
        assert choice.runner_up is not None
        assert float(row[0]) == pytest.approx(choice.budget)
        assert row[1:3] == [str(choice.best), choice.best.score]
        assert row[3] == f"{choice.runner_up}: {choice.runner_up.score}"
        assert row[4] == ("undecided" if choice.undecided else "decided")


def test_the_frontier_table_goes_from_end_to_end(table: pd.DataFrame) -> None:
    frontier = pareto(table, "normalized_cost", METRIC)
    reader = read(markdown_summary(table, METRIC, "synthetic"))
    head, *rows = reader.tables[1]
    assert head == [*(COSTS[cost].label for cost in REPORT_COSTS), "configuration", "squared MMD"]
    assert f"Frontier, {MAX_ROWS} of {len(frontier)} points:" in reader.text
    assert len(rows) == MAX_ROWS < len(frontier)
    labels = [format_row(row) for row in frontier.to_dict("records")]
    indices = [labels.index(row[-2]) for row in rows]
    assert indices == sorted(set(indices))
    assert (indices[0], indices[-1]) == (0, len(frontier) - 1)
    for row, index in zip(rows, indices, strict=True):
        assert row[-1] == format_score(*(float(frontier[f"{METRIC}{end}"].iloc[index]) for end in ("", "_low", "_high")))
        assert float(row[0]) == pytest.approx(frontier["normalized_cost"].iloc[index], rel=0.01)


def test_it_names_the_data_behind_the_numbers_and_the_next_commands(table: pd.DataFrame) -> None:
    reader = read(markdown_summary(table, METRIC, "synthetic", floor=0.013, floor_label="decoded real images"))
    for text in (
        "By squared MMD (lower is better) with 95 % intervals; decoded real images: 0.013.",
        "265 points of 5 sizes, 1,000 images per point; protocol synthetic, seed 0.",
    ):
        assert text in reader.text
    assert "Not included" not in reader.text
    assert reader.code[0] == "isocost report OUT/study.yaml --out OUT"
    best = table.loc[table[METRIC].idxmin()]
    assert reader.code[1].startswith(
        f"isocost sample OUT/artefacts/checkpoint/{best['checkpoint']} --steps {best['num_steps']} "
    )


def test_missing_results_are_named(table: pd.DataFrame) -> None:
    minimal = synthetic_table(solvers=("ddim/trailing",), snapshots=()).assign(ms_per_image=np.nan)
    unfinished = pd.concat([exact(minimal), table[(table["size"] == "7.1M") & ~table["is_final"]].assign(size="9M", point="9")])
    summary = read(markdown_summary(unfinished, METRIC, "minimal", [6, 1e-6, 1000], missing_experiments=["DreamBooth"])).text
    for text in (
        "Not included: DreamBooth; final checkpoints of 9M are not scored yet; milliseconds not measured; ",
        "only one solver was tried (ddim/trailing); some scores have no interval.",
        "nothing fits",
        "Note: the budget is beyond the data",
    ):
        assert text in summary
    assert "no checkpoint before the last was scored" in read(markdown_summary(minimal, METRIC, "minimal")).text
    assert "milliseconds" not in read(markdown_summary(minimal, METRIC, "minimal")).tables[1][0]
    without_final_points = markdown_summary(table[~table["is_final"]], METRIC, "unfinished")
    assert without_final_points.startswith("**unfinished**: No answer yet: no final point has a measured normalized\\_cost")
    assert not read(without_final_points).tables
    with pytest.raises(ConfigError, match="differ in seed"):
        markdown_summary(table.assign(seed=range(len(table))), METRIC, "mixed")


def test_counts_of_one_are_singular() -> None:
    single_point = synthetic_superres().iloc[:1]
    text = read(markdown_summary(single_point, METRIC, "single")).text
    assert "1 point of 1 size," in text
    assert "Frontier, 1 point:" in text
    assert "isocost upscale" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text(name: str) -> None:
    table = synthetic_table(solvers=(f"{name}/trailing",), snapshots=())
    table = table.assign(size=table["size"].replace("0.2M", name), protocol=name)
    plain = read(markdown_summary(synthetic_table(solvers=("ddim/trailing",), snapshots=()), METRIC, "plain"))
    reader = read(markdown_summary(table, METRIC, name, missing_experiments=[name], floor=1.0, floor_label=name))
    assert [tag for tag in reader.tags if tag[0] != "code"] == [tag for tag in plain.tags if tag[0] != "code"]
    assert [[len(row) for row in rows] for rows in reader.tables] == [[len(row) for row in rows] for rows in plain.tables]
    shown = reader.text.replace("\u200b", "")
    line = " ".join(name.split())
    assert shown.startswith(f"{line}: ")
    assert f"{line}, 2 steps" in reader.tables[1][1][-2].replace("\u200b", "")
    assert f"protocol {line}, seed 0" in shown
    assert f"Not included: {line};" in shown


def test_nobody_is_mentioned_and_nothing_is_linked() -> None:
    assert escape_markdown("@someone") == f"@{ZERO_WIDTH_SPACE}someone"
    assert escape_markdown("see #12") == f"see #{ZERO_WIDTH_SPACE}12"
    assert escape_markdown("https://a.example") == f"https:{ZERO_WIDTH_SPACE}//a.example"
    assert escape_markdown("www.a.example") == f"www{ZERO_WIDTH_SPACE}.a.example"
    assert escape_markdown("2.6M, 8 steps, ddim/trailing") == "2.6M, 8 steps, ddim/trailing"


def test_it_is_short_enough_to_paste(table: pd.DataFrame) -> None:
    text = markdown_summary(table, METRIC, "synthetic")
    assert len(text.splitlines()) < 40
    assert len(text) < 4000


def test_a_summary_of_published_checkpoints_has_budgets_of_whole_images_and_nothing_of_training() -> None:
    table = synthetic_table(snapshots=())
    scope = checkpoint_scope(table)
    assert (scope.budget_cost, scope.costs[-1], scope.noun) == ("gflop", "normalized_cost", "checkpoint")
    text = read(markdown_summary(table, METRIC, "published", scope=scope)).text
    assert "The best checkpoint moves from" in text
    assert "Budgets in GFLOP per image" in text
    assert "best of another checkpoint" in text
    assert "no checkpoint before the last" not in text
    assert "normalized cost:" not in text
    unmeasured = table.assign(gflop=table["gflop"].where(table.index > 0))
    assert checkpoint_scope(unmeasured).budget_cost != "gflop"
