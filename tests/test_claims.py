"""The paper's findings on planted tables: what is planted is found, its opposite is contradicted, noise leaves it open."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.claims import ClaimVerdict, Evidence, Tables, TaskResults, evaluate_claims
from isocost.analysis.paper_claims import FINDINGS
from isocost.report.claims_table import markdown_verdicts, verdict_rows
from synthetic_results import exact, planted_table

KERNEL = "mmd_efficientnet"
SIZES = ("0.2M", "0.8M", "3.2M")


def verdicts_of(tables: Tables) -> dict[tuple[str, str], ClaimVerdict]:
    return {(one.statement, one.cost): one for one in evaluate_claims(FINDINGS, tables)}


def of_text2image(table: pd.DataFrame, metric: str = KERNEL) -> dict[tuple[str, str], ClaimVerdict]:
    return verdicts_of({"text2image": TaskResults(table, metric)})


def moved(table: pd.DataFrame, change: Callable[[pd.DataFrame], pd.Series]) -> pd.DataFrame:
    """The table with its distance and interval moved row by row."""
    by = change(table)
    return table.assign(**{f"{KERNEL}{end}": table[f"{KERNEL}{end}"] + by for end in ("", "_low", "_high")})


def scored_by(table: pd.DataFrame, law: Callable[[pd.DataFrame], pd.Series], half_width: float = 0.01) -> pd.DataFrame:
    """The table with the distance of a law."""
    value = law(table)
    return table.assign(**{KERNEL: value, f"{KERNEL}_low": value - half_width, f"{KERNEL}_high": value + half_width})


# --- training ---


def test_more_training_and_larger_sizes_are_better_where_that_is_planted() -> None:
    table = planted_table(sizes=SIZES)
    told = of_text2image(table)
    for statement in ("More training gives better images, at every size", "Of sizes trained on the same images the larger"):
        (found,) = [one for (said, _), one in told.items() if said.startswith(statement)]
        assert found.verdict == "holds", found.told
        assert found.count("agrees") == len(found.cases)
    worse = of_text2image(scored_by(table, lambda rows: 1 + rows["images_seen"] / 1e5 + rows["num_parameters"] / 1e6))
    assert worse["More training gives better images, at every size", ""].verdict == "does not hold"
    assert worse["Of sizes trained on the same images the larger is better", ""].verdict == "does not hold"


def test_compute_decides_where_quality_is_a_function_of_compute_alone() -> None:
    statement = ("Training compute decides quality, whichever size it is spent on", "")
    table = planted_table(sizes=SIZES)
    of_compute = of_text2image(scored_by(table, lambda rows: 100 / rows["training_gflop"] ** 0.3))
    assert of_compute[statement].verdict == "holds"
    assert len(of_compute[statement].cases) > 3
    of_images = of_text2image(scored_by(table, lambda rows: 1e4 / rows["images_seen"] + rows["num_parameters"] / 1e6))
    assert of_images[statement].verdict == "does not hold"


# --- sampling ---


def trade(rows: pd.DataFrame) -> pd.Series:
    """Few steps cost large sizes nothing less than small ones, so that at equal cost the small win until it saturates."""
    return 1 / rows["num_steps"] + 100 / rows["num_parameters"] ** 0.5


def test_small_wins_at_little_cost_and_large_in_the_end() -> None:
    little = "With little sampling cost a smaller size is better than the largest"
    table = scored_by(planted_table(sizes=SIZES, snapshots=()), trade, 0.001)
    told = of_text2image(table)
    assert told[little, "normalized_cost"].verdict == "holds"
    assert told[little, "gflop"].verdict == "holds"
    assert told[little, "nfe"].verdict == "does not hold"  # an evaluation of the largest counts as much as any
    assert told["With any sampling cost allowed the largest size is the best", ""].verdict == "holds"
    assert told["Under every solver a smaller size is better at little cost", "normalized_cost"].verdict == "holds"
    assert len(told["Under every solver a smaller size is better at little cost", "normalized_cost"].cases) == 2 * 3
    wide = of_text2image(scored_by(table, trade, 1.0))
    assert {one.verdict for one in wide.values() if one.cases} == {"undecided"}
    assert {one.verdict for one in of_text2image(exact(table)).values() if one.cases} == {"undecided"}


@pytest.mark.parametrize("is_falling", [True, False])
def test_the_best_guidance_by_size_and_steps(is_falling: bool) -> None:
    grid = (1.0, 1.5, 2.0, 3.0, 5.0)

    def law(rows: pd.DataFrame) -> pd.Series:
        rank = (np.log2(rows["num_parameters"] / 2e5) / 2 + np.log2(rows["num_steps"] / 2) / 2).round().clip(0, 4).astype(int)
        best = rank.map(lambda at: grid[4 - at] if is_falling else grid[at])
        return 1 + np.log(rows["guidance"] / best) ** 2

    table = scored_by(planted_table(sizes=SIZES, guidance=grid, snapshots=()), law)
    told = of_text2image(table)
    wanted = "holds" if is_falling else "does not hold"
    assert told["The best guidance falls with size", ""].verdict == wanted
    assert told["The best guidance falls with the number of steps", ""].verdict == wanted
    flat = of_text2image(scored_by(table, lambda rows: 1 + 0 * rows["guidance"]))
    assert flat["The best guidance falls with size", ""].verdict == "undecided"


def test_the_interval_of_a_race_counts_not_the_points_beside_it() -> None:
    table = planted_table(sizes=SIZES, guidance=(2.0,), snapshots=())
    ends = table["num_parameters"].map({2e5: (3.0, 4.0), 8e5: (2.0, 3.0), 3.2e6: (1.2, 1.5)})
    raced = table.assign(
        guidance=ends.str[0] + 0.2, guidance_low=ends.str[0], guidance_high=ends.str[1], race_at_boundary=False, race_images=500
    )
    assert of_text2image(raced)["The best guidance falls with size", ""].verdict == "holds"
    with_overlap = raced.assign(guidance_high=5.0)
    assert of_text2image(with_overlap)["The best guidance falls with size", ""].verdict == "undecided"


def test_a_best_guidance_at_the_end_of_the_range_is_a_bound() -> None:
    statement = ("The best guidance falls with size", "")
    table = planted_table(sizes=SIZES, guidance=(1.0, 2.0), snapshots=())
    raced = table[table["guidance"] == 2.0].assign(guidance_low=3.0, guidance_high=3.2, guidance=3.0, race_images=500)
    smallest, largest = raced["size"] == SIZES[0], raced["size"] == SIZES[-1]
    one_pass = table[table["guidance"] == 1.0].assign(
        race_at_boundary=False, guidance_low=1.0, guidance_high=1.0, race_images=500
    )

    def told(of_small: float, of_large: float, small_at_edge: bool, large_at_edge: bool) -> ClaimVerdict:
        rows = raced.assign(race_at_boundary=(smallest & small_at_edge) | (largest & large_at_edge))
        for which, value in ((smallest, of_small), (largest, of_large)):
            rows.loc[which, ["guidance", "guidance_low", "guidance_high"]] = value
        worse = {f"{KERNEL}{end}": one_pass[f"{KERNEL}{end}"] + 9 for end in ("", "_low", "_high")}
        return of_text2image(pd.concat([rows, one_pass.assign(**worse)], ignore_index=True))[statement]

    assert told(12.0, 3.0, True, False).verdict == "holds"
    assert "12 or more for 0.2M" in told(12.0, 3.0, True, False).told[0]
    assert told(3.0, 12.0, False, True).verdict == "does not hold"
    assert told(12.0, 12.5, True, False).verdict == "undecided"  # the smallest may be best with more than the largest
    assert told(12.0, 12.5, False, False).verdict == "does not hold"


def test_solvers_in_the_papers_order() -> None:
    statement = ("With few steps DPM-Solver++ is better than DDIM, and DDIM than DDPM", "")
    solvers = ("ddpm/trailing", "ddim/trailing", "dpmsolver++2m/trailing")
    table = planted_table(sizes=SIZES, solvers=solvers, snapshots=())
    place = table["solver"].map({name: at for at, name in enumerate(solvers)})
    told = of_text2image(moved(table, lambda _: -0.1 * place))
    assert told[statement].verdict == "holds"
    assert len(told[statement].cases) == 3 * 3 * 2  # sizes, step counts from 2 to 10, pairs
    assert of_text2image(moved(table, lambda _: 0.4 * place))[statement].verdict == "does not hold"
    alone = of_text2image(table[table["solver"] == solvers[1]])
    assert alone[statement].verdict == "not measured"
    assert "were tried" in alone[statement].counts


# --- downstream and distillation ---


def test_super_resolution_by_size_compute_and_cost() -> None:
    table = planted_table(sizes=SIZES, num_steps=(2, 4, 8, 32, 64), guidance=(1.0,), solvers=("ddim/trailing",))
    scratch = scored_by(
        table.assign(size=table["size"] + " from scratch", point=table["point"] + "s"), lambda rows: 9 + 0 * rows["seed"]
    )
    lacks = 100 / table["training_gflop"] ** 0.3
    table = table.assign(lpips=lacks, lpips_low=lacks - 1e-4, lpips_high=lacks + 1e-4)
    by_size = pd.concat([scored_by(table, trade, 0.001), scratch], ignore_index=True)
    told = verdicts_of({"superres": TaskResults(by_size, KERNEL)})
    assert told["Super-resolution follows size: a small one does not catch up with more fine-tuning", ""].verdict == "holds"
    assert told["LPIPS of super-resolution follows fine-tuning compute, whatever the size", ""].verdict == "holds"
    assert told["In super-resolution a smaller size is better at up to 20 steps' cost", "gflop"].verdict == "holds"
    beyond = told["In super-resolution the largest is better beyond 20 steps' cost", "gflop"]
    assert beyond.verdict == "holds", beyond.told
    assert len(beyond.cases) == 2
    compute = scored_by(table, lambda rows: 100 / rows["training_gflop"] ** 0.3 + rows["num_parameters"] / 1e5)
    told = verdicts_of({"superres": TaskResults(compute, KERNEL)})
    assert (
        told["Super-resolution follows size: a small one does not catch up with more fine-tuning", ""].verdict
        == "does not hold"
    )


@pytest.mark.parametrize("gain", [-0.2, 0.3])
def test_students_and_teachers(gain: float) -> None:
    table = scored_by(planted_table(sizes=SIZES, solvers=("ddim/trailing",), snapshots=()), trade, 0.001)
    students = table[table["num_steps"] <= 8].copy()
    students = students.assign(size=students["size"] + " codi", point="s" + students["point"])
    students = scored_by(students, lambda rows: trade(rows.assign(num_steps=32)) + gain, 0.001)
    told = verdicts_of({"distill": TaskResults(pd.concat([table, students], ignore_index=True), KERNEL)})
    wanted = "holds" if gain < 0 else "does not hold"
    assert told["A student is better than the undistilled of its size at equal cost", "gflop"].verdict == wanted
    speed = told["Distillation to 4 steps is worth about 5 times as many, or half of that at least", ""]
    assert speed.verdict == ("holds" if gain < 0 else "does not hold"), speed.told
    small = told["The smallest undistilled is no worse than larger students", "normalized_cost"]
    assert small.verdict == ("does not hold" if gain < 0 else "holds"), small.told


def test_dreambooth_by_size() -> None:
    table = planted_table(sizes=SIZES, num_steps=(16,), guidance=(2.0,), solvers=("ddim/trailing",), snapshots=())
    told = verdicts_of({"dreambooth": TaskResults(table, "alignment")})
    assert told["DreamBooth is better from larger sizes", ""].verdict == "holds"


# --- verdicts and their words ---


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("", "not measured"), ("+", "holds"), ("+o", "holds"), ("+oo", "undecided"), ("++-", "undecided"), ("+-", "undecided"),
        ("+--", "does not hold"), ("-", "does not hold"), ("-oo", "undecided"), ("ooo", "undecided"), ("++++-", "undecided"),
    ],
)  # fmt: skip
def test_cases_make_a_verdict(said: str, verdict: str) -> None:
    kinds = {"+": "agrees", "-": "contradicts", "o": "open"}
    cases = tuple(Evidence(kinds[sign], f"case {at}") for at, sign in enumerate(said))  # type: ignore[arg-type]
    told = ClaimVerdict(1, "a finding", "", cases, "nothing there")
    assert told.verdict == verdict
    assert told.counts.startswith("nothing there" if not said else f"{said.count('+')} of {len(said)} agree")


def test_what_is_missing_is_named() -> None:
    told = verdicts_of({"text2image": TaskResults(planted_table(sizes=("0.2M",), snapshots=()), KERNEL)})
    assert {one.verdict for one in told.values() if one.section in (2, 5, 6)} == {"not measured"}
    assert told["DreamBooth is better from larger sizes", ""].counts == "dreambooth was not done"
    assert "train.snapshots" in told["More training gives better images, at every size", ""].counts
    assert not any(one.cases for one in told.values() if one.section == 4 and "solver a smaller" in one.statement)


def test_the_document_is_a_table_that_names_cannot_break() -> None:
    table = planted_table(sizes=SIZES)
    table = table.assign(size=table["size"].replace({"0.2M": "a|b <script>"}))
    tables = {"text2image": TaskResults(table, KERNEL)}
    verdicts = evaluate_claims(FINDINGS, tables)
    text = markdown_verdicts("a *study*", verdicts, tables)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "|--" not in line]
    assert len(rows) == 1 + len(verdict_rows(verdicts)) < len(verdicts)
    assert all(line.replace(r"\|", "").count("|") == 6 for line in rows)
    assert "<script>" not in text
    assert r"a \*study\*" in text
    assert "1,000 images a point" in text
    assert "the best of a grid" in text
