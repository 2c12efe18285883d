"""The summary as Markdown: by what a parser makes of it, on planted data."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

import isocost
from isocost.analysis.formatting import format_configuration, format_score
from isocost.analysis.pareto import best_at_budgets, default_budgets, pareto
from isocost.errors import ConfigError
from isocost.report.markdown import MAX_ROWS, SPACE, escaped, headline, markdown_summary
from synthetic_results import exact, planted_superres, planted_table
from test_report import KERNEL

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
    """As GitHub reads it: tables and strikethrough, HTML let through."""
    reader = Reader()
    reader.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))
    return reader


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return planted_table(noise=0.004)


def test_one_size_is_not_called_the_best_of_several(table: pd.DataFrame) -> None:
    one = table[table["size"] == "0.2M"]
    assert headline(best_at_budgets(one, "normalized_cost", KERNEL, [1000.0])) == "No size but 0.2M fits the budgets here."
    assert "best size" in headline(best_at_budgets(table, "normalized_cost", KERNEL, [0.32, 1000.0]))


def test_the_answer_comes_first_one_row_a_budget(table: pd.DataFrame) -> None:
    text = markdown_summary(table, KERNEL, "planted", floor=0.013, floor_label="decoded real images")
    choices = best_at_budgets(table, "normalized_cost", KERNEL, default_budgets(table, "normalized_cost"))
    assert text.startswith(f"**planted**: {headline(choices)}\n")
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


def test_the_frontier_is_the_planted_one_from_end_to_end(table: pd.DataFrame) -> None:
    frontier = pareto(table, "normalized_cost", KERNEL)
    reader = read(markdown_summary(table, KERNEL, "planted"))
    head, *rows = reader.tables[1]
    assert head == ["normalized cost", "evaluations", "GFLOP", "milliseconds", "configuration", "squared MMD"]
    assert f"Frontier, {MAX_ROWS} of {len(frontier)} points:" in reader.text
    assert len(rows) == MAX_ROWS < len(frontier)
    setting = ["size", "num_steps", "guidance", "solver"]
    known = [format_configuration(*row) for row in frontier[setting].itertuples(index=False)]
    told = [known.index(row[4]) for row in rows]
    assert told == sorted(set(told))
    assert (told[0], told[-1]) == (0, len(frontier) - 1)
    for row, place in zip(rows, told, strict=True):
        assert row[5] == format_score(*(float(frontier[f"{KERNEL}{end}"].iloc[place]) for end in ("", "_low", "_high")))
        assert float(row[0]) == pytest.approx(frontier["normalized_cost"].iloc[place], rel=0.01)


def test_it_says_what_the_numbers_rest_on_and_how_to_go_on(table: pd.DataFrame) -> None:
    reader = read(markdown_summary(table, KERNEL, "planted", floor=0.013, floor_label="decoded real images"))
    for words in (
        "By squared MMD (lower is better) with 95 % intervals; decoded real images: 0.013.",
        "265 points of 5 sizes, 1,000 images a point; protocol planted, seed 0.",
    ):
        assert words in reader.text
    assert "Not done" not in reader.text
    assert reader.code[0] == "isocost report OUT/study.yaml --out OUT"
    best = table.loc[table[KERNEL].idxmin()]
    assert reader.code[1].startswith(
        f"isocost sample OUT/artefacts/checkpoint/{best['checkpoint']} --steps {best['num_steps']} "
    )


def test_what_was_not_done_is_said(table: pd.DataFrame) -> None:
    bare = planted_table(solvers=("ddim/trailing",), snapshots=()).assign(ms_per_image=np.nan)
    unfinished = pd.concat([exact(bare), table[(table["size"] == "7.1M") & ~table["is_final"]].assign(size="9M", point="9")])
    text = read(markdown_summary(unfinished, KERNEL, "bare", [6, 1e-6, 1000], absent=["DreamBooth"])).text
    for words in (
        "Not done: DreamBooth; last checkpoints of 9M are not scored; milliseconds not measured; ",
        "one solver tried (ddim/trailing); some scores have no interval.",
        "nothing fits",
        "Beware: the budget lies beyond the data",
    ):
        assert words in text
    assert "no checkpoint before the last was scored" in read(markdown_summary(bare, KERNEL, "bare")).text
    assert "milliseconds" not in read(markdown_summary(bare, KERNEL, "bare")).tables[1][0]
    young = markdown_summary(table[~table["is_final"]], KERNEL, "young")
    assert young.startswith("**young**: No answer yet: no finished point carries a measured normalized\\_cost")
    assert not read(young).tables
    with pytest.raises(ConfigError, match="differ in seed"):
        markdown_summary(table.assign(seed=range(len(table))), KERNEL, "mixed")


def test_one_of_a_kind_is_told_as_one() -> None:
    alone = planted_superres().iloc[:1]
    text = read(markdown_summary(alone, KERNEL, "alone")).text
    assert "1 point of 1 size," in text
    assert "Frontier, 1 point:" in text
    assert "isocost upscale" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text(name: str) -> None:
    table = planted_table(solvers=(f"{name}/trailing",), snapshots=())
    table = table.assign(size=table["size"].replace("0.2M", name), protocol=name)
    plain = read(markdown_summary(planted_table(solvers=("ddim/trailing",), snapshots=()), KERNEL, "plain"))
    reader = read(markdown_summary(table, KERNEL, name, absent=[name], floor=1.0, floor_label=name))
    assert [tag for tag in reader.tags if tag[0] != "code"] == [tag for tag in plain.tags if tag[0] != "code"]
    assert [[len(row) for row in one] for one in reader.tables] == [[len(row) for row in one] for one in plain.tables]
    shown = reader.text.replace("\u200b", "")
    words = " ".join(name.split())
    assert shown.startswith(f"{words}: ")
    assert f"{words}, 2 steps" in reader.tables[1][1][4].replace("\u200b", "")
    assert f"protocol {words}, seed 0" in shown
    assert f"Not done: {words};" in shown


def test_nobody_is_called_and_nothing_is_linked() -> None:
    assert escaped("@someone") == f"@{SPACE}someone"
    assert escaped("see #12") == f"see #{SPACE}12"
    assert escaped("https://a.example") == f"https:{SPACE}//a.example"
    assert escaped("www.a.example") == f"www{SPACE}.a.example"
    assert escaped("2.6M, 8 steps, ddim/trailing") == "2.6M, 8 steps, ddim/trailing"


def test_it_is_short_enough_to_paste(table: pd.DataFrame) -> None:
    text = markdown_summary(table, KERNEL, "planted")
    assert len(text.splitlines()) < 40
    assert len(text) < 4000


def test_it_is_there_from_python(table: pd.DataFrame) -> None:
    assert isocost.markdown_summary is markdown_summary
