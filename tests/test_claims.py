"""The paper's claims on synthetic tables: true claims hold, false ones are contradicted, and noise leaves them undecided."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from isocost.analysis.claims import ClaimVerdict, Evidence, Tables, TaskResults, evaluate_claims
from isocost.analysis.costs import REPORT_COSTS
from isocost.analysis.paper_claims import CLAIMS
from isocost.report.claims_table import claim_rows, markdown_claims
from synthetic_results import exact, synthetic_table

KERNEL = "mmd_efficientnet"
SIZES = ("0.2M", "0.8M", "3.2M")


def verdicts_of(tables: Tables) -> dict[tuple[str, str], ClaimVerdict]:
    return {(verdict.statement, verdict.cost): verdict for verdict in evaluate_claims(CLAIMS, tables)}


def of_text2image(table: pd.DataFrame, metric: str = KERNEL) -> dict[tuple[str, str], ClaimVerdict]:
    return verdicts_of({"text2image": TaskResults(table, metric)})


def shifted(table: pd.DataFrame, change: Callable[[pd.DataFrame], pd.Series]) -> pd.DataFrame:
    """The table with its distance and interval shifted by a value for each row."""
    shift = change(table)
    return table.assign(**{f"{KERNEL}{end}": table[f"{KERNEL}{end}"] + shift for end in ("", "_low", "_high")})


def scored_by(table: pd.DataFrame, law: Callable[[pd.DataFrame], pd.Series], half_width: float = 0.01) -> pd.DataFrame:
    """The table with distances from a law."""
    value = law(table)
    return table.assign(**{KERNEL: value, f"{KERNEL}_low": value - half_width, f"{KERNEL}_high": value + half_width})


# --- training ---


def test_more_training_and_larger_sizes_are_better_if_they_are() -> None:
    more_training = ("More training gives better images, at every size", "")
    larger = ("Of two sizes trained on the same images the larger is better", "")
    table = synthetic_table(sizes=SIZES)
    verdicts = of_text2image(table)
    for claim in (more_training, larger):
        verdict = verdicts[claim]
        assert verdict.verdict == "holds", verdict.examples
        assert verdict.count("agrees") == len(verdict.cases)
    worse = of_text2image(scored_by(table, lambda rows: 1 + rows["images_seen"] / 1e5 + rows["num_parameters"] / 1e6))
    assert worse[more_training].verdict == "does not hold"
    assert worse[larger].verdict == "does not hold"


def test_compute_determines_quality_if_quality_is_a_function_of_compute() -> None:
    statement = ("Training compute, not size, determines quality", "")
    table = synthetic_table(sizes=SIZES)
    of_compute = of_text2image(scored_by(table, lambda rows: 100 / rows["training_gflop"] ** 0.3))
    assert of_compute[statement].verdict == "holds"
    assert len(of_compute[statement].cases) > 3
    of_images = of_text2image(scored_by(table, lambda rows: 1e4 / rows["images_seen"] + rows["num_parameters"] / 1e6))
    assert of_images[statement].verdict == "does not hold"


# --- sampling ---


def tradeoff(rows: pd.DataFrame) -> pd.Series:
    """The loss from few steps is the same for all sizes, so at equal cost a small size wins until it saturates."""
    return 1 / rows["num_steps"] + 100 / rows["num_parameters"] ** 0.5


@pytest.mark.slow
def test_small_sizes_win_at_little_cost_and_large_sizes_at_any_cost() -> None:
    small_wins = "With little sampling cost a smaller size is better than the largest"
    under_every_solver = ("With every solver a smaller size is better at little cost", "normalized_cost")
    table = scored_by(synthetic_table(sizes=SIZES, snapshots=()), tradeoff, 0.001)
    verdicts = of_text2image(table)
    assert verdicts[small_wins, "normalized_cost"].verdict == "holds"
    assert verdicts[small_wins, "gflop"].verdict == "holds"
    assert verdicts[small_wins, "nfe"].verdict == "does not hold"  # an evaluation counts the same for every size
    assert verdicts["With any sampling cost allowed the largest size is the best", ""].verdict == "holds"
    assert verdicts[under_every_solver].verdict == "holds"
    assert len(verdicts[under_every_solver].cases) == 2 * 3
    wide = of_text2image(scored_by(table, tradeoff, 1.0))
    assert {verdict.verdict for verdict in wide.values() if verdict.cases} == {"undecided"}
    assert {verdict.verdict for verdict in of_text2image(exact(table)).values() if verdict.cases} == {"undecided"}


@pytest.mark.parametrize("is_falling", [True, False])
@pytest.mark.fast_cases(1)
def test_the_best_guidance_by_size_and_steps(is_falling: bool) -> None:
    grid = (1.0, 1.5, 2.0, 3.0, 5.0)

    def law(rows: pd.DataFrame) -> pd.Series:
        rank = (np.log2(rows["num_parameters"] / 2e5) / 2 + np.log2(rows["num_steps"] / 2) / 2).round().clip(0, 4).astype(int)
        best = rank.map(lambda index: grid[4 - index] if is_falling else grid[index])
        return 1 + np.log(rows["guidance"] / best) ** 2

    table = scored_by(synthetic_table(sizes=SIZES, guidance=grid, snapshots=()), law)
    verdicts = of_text2image(table)
    expected = "holds" if is_falling else "does not hold"
    assert verdicts["The best guidance falls with size", ""].verdict == expected
    assert verdicts["The best guidance falls with the number of steps", ""].verdict == expected
    flat = of_text2image(scored_by(table, lambda rows: 1 + 0 * rows["guidance"]))
    assert flat["The best guidance falls with size", ""].verdict == "undecided"


def test_the_interval_of_a_guidance_search_counts_and_not_the_points() -> None:
    table = synthetic_table(sizes=SIZES, guidance=(2.0,), snapshots=())
    ends = table["num_parameters"].map({2e5: (3.0, 4.0), 8e5: (2.0, 3.0), 3.2e6: (1.2, 1.5)})
    searched = table.assign(
        guidance=ends.str[0] + 0.2, guidance_low=ends.str[0], guidance_high=ends.str[1], race_at_boundary=False, race_images=500
    )
    assert of_text2image(searched)["The best guidance falls with size", ""].verdict == "holds"
    with_overlap = searched.assign(guidance_high=5.0)
    assert of_text2image(with_overlap)["The best guidance falls with size", ""].verdict == "undecided"


@pytest.mark.slow
def test_a_best_guidance_at_the_end_of_the_range_is_a_bound() -> None:
    statement = ("The best guidance falls with size", "")
    table = synthetic_table(sizes=SIZES, guidance=(1.0, 2.0), snapshots=())
    searched = table[table["guidance"] == 2.0].assign(guidance_low=3.0, guidance_high=3.2, guidance=3.0, race_images=500)
    smallest, largest = searched["size"] == SIZES[0], searched["size"] == SIZES[-1]
    unguided = table[table["guidance"] == 1.0].assign(
        race_at_boundary=False, guidance_low=1.0, guidance_high=1.0, race_images=500
    )

    def verdict_of(of_small: float, of_large: float, small_at_boundary: bool, large_at_boundary: bool) -> ClaimVerdict:
        rows = searched.assign(race_at_boundary=(smallest & small_at_boundary) | (largest & large_at_boundary))
        for is_size, value in ((smallest, of_small), (largest, of_large)):
            rows.loc[is_size, ["guidance", "guidance_low", "guidance_high"]] = value
        worse = {f"{KERNEL}{end}": unguided[f"{KERNEL}{end}"] + 9 for end in ("", "_low", "_high")}
        return of_text2image(pd.concat([rows, unguided.assign(**worse)], ignore_index=True))[statement]

    assert verdict_of(12.0, 3.0, True, False).verdict == "holds"
    assert "12 or more for 0.2M" in verdict_of(12.0, 3.0, True, False).examples[0]
    assert verdict_of(3.0, 12.0, False, True).verdict == "does not hold"
    assert verdict_of(12.0, 12.5, True, False).verdict == "undecided"  # the best of the smallest may be above the largest's
    assert verdict_of(12.0, 12.5, False, False).verdict == "does not hold"


@pytest.mark.slow
def test_solvers_in_the_papers_order() -> None:
    statement = ("With few steps DPM-Solver++ is better than DDIM, and DDIM is better than DDPM", "")
    solvers = ("ddpm/trailing", "ddim/trailing", "dpmsolver++2m/trailing")
    table = synthetic_table(sizes=SIZES, solvers=solvers, snapshots=())
    order = table["solver"].map({name: index for index, name in enumerate(solvers)})
    verdicts = of_text2image(shifted(table, lambda _: -0.1 * order))
    assert verdicts[statement].verdict == "holds"
    assert len(verdicts[statement].cases) == 3 * 3 * 2  # sizes, step counts from 2 to 10, pairs
    assert of_text2image(shifted(table, lambda _: 0.4 * order))[statement].verdict == "does not hold"
    of_one_solver = of_text2image(table[table["solver"] == solvers[1]])
    assert of_one_solver[statement].verdict == "not measured"
    assert "were tried" in of_one_solver[statement].counts


# --- downstream and distillation ---


def test_super_resolution_by_size_compute_and_cost() -> None:
    table = synthetic_table(sizes=SIZES, num_steps=(2, 4, 8, 32, 64), guidance=(1.0,), solvers=("ddim/trailing",))
    scratch = scored_by(
        table.assign(size=table["size"] + " from scratch", point=table["point"] + "s"), lambda rows: 9 + 0 * rows["seed"]
    )
    follows_size = ("Super-resolution follows size: a small one does not catch up with more fine-tuning", "")
    lpips = 100 / table["training_gflop"] ** 0.3
    table = table.assign(lpips=lpips, lpips_low=lpips - 1e-4, lpips_high=lpips + 1e-4)
    by_size = pd.concat([scored_by(table, tradeoff, 0.001), scratch], ignore_index=True)
    verdicts = verdicts_of({"superres": TaskResults(by_size, KERNEL)})
    assert verdicts[follows_size].verdict == "holds"
    assert verdicts["LPIPS of super-resolution follows fine-tuning compute, not size", ""].verdict == "holds"
    assert verdicts["In super-resolution a smaller size is better at the cost of up to 20 steps", "gflop"].verdict == "holds"
    above = verdicts["In super-resolution the largest size is better above the cost of 20 steps", "gflop"]
    assert above.verdict == "holds", above.examples
    assert len(above.cases) == 2
    compute = scored_by(table, lambda rows: 100 / rows["training_gflop"] ** 0.3 + rows["num_parameters"] / 1e5)
    assert verdicts_of({"superres": TaskResults(compute, KERNEL)})[follows_size].verdict == "does not hold"


@pytest.mark.parametrize("gain", [-0.2, 0.3])
def test_students_and_teachers(gain: float) -> None:
    table = scored_by(synthetic_table(sizes=SIZES, solvers=("ddim/trailing",), snapshots=()), tradeoff, 0.001)
    students = table[table["num_steps"] <= 8].copy()
    students = students.assign(size=students["size"] + " codi", point="s" + students["point"])
    students = scored_by(students, lambda rows: tradeoff(rows.assign(num_steps=32)) + gain, 0.001)
    verdicts = verdicts_of({"distill": TaskResults(pd.concat([table, students], ignore_index=True), KERNEL)})
    expected = "holds" if gain < 0 else "does not hold"
    student = verdicts["A student is better than the undistilled model of its size at equal cost", "gflop"]
    assert student.verdict == expected, student.examples
    speed = verdicts["Distillation to 4 steps replaces about 5 times as many steps, or at least half of that", ""]
    assert speed.verdict == expected, speed.examples
    small = verdicts["The smallest undistilled model is no worse than larger students", "normalized_cost"]
    assert small.verdict == ("does not hold" if gain < 0 else "holds"), small.examples


def test_dreambooth_by_size() -> None:
    table = synthetic_table(sizes=SIZES, num_steps=(16,), guidance=(2.0,), solvers=("ddim/trailing",), snapshots=())
    verdicts = verdicts_of({"dreambooth": TaskResults(table, "alignment")})
    assert verdicts["DreamBooth is better from larger sizes", ""].verdict == "holds"


# --- verdicts and their texts ---


@pytest.mark.parametrize(
    ("votes", "verdict"),
    [
        ("", "not measured"), ("+", "holds"), ("+o", "holds"), ("+oo", "undecided"), ("++-", "undecided"), ("+-", "undecided"),
        ("+--", "does not hold"), ("-", "does not hold"), ("-oo", "undecided"), ("ooo", "undecided"), ("++++-", "undecided"),
    ],
)  # fmt: skip
def test_cases_make_a_verdict(votes: str, verdict: str) -> None:
    names = {"+": "agrees", "-": "contradicts", "o": "open"}
    cases = tuple(Evidence(names[sign], f"case {index}") for index, sign in enumerate(votes))  # type: ignore[arg-type]
    result = ClaimVerdict(1, "a claim", "", cases, "no data")
    assert result.verdict == verdict
    assert result.counts.startswith("no data" if not votes else f"{votes.count('+')} of {len(votes)} agree")


def test_missing_data_is_named() -> None:
    verdicts = verdicts_of({"text2image": TaskResults(synthetic_table(sizes=("0.2M",), snapshots=()), KERNEL)})
    assert {verdict.verdict for verdict in verdicts.values() if verdict.section in (2, 5, 6)} == {"not measured"}
    assert verdicts["DreamBooth is better from larger sizes", ""].counts == "no results of dreambooth"
    assert "train.snapshots" in verdicts["More training gives better images, at every size", ""].counts
    assert not any(verdicts["With every solver a smaller size is better at little cost", cost].cases for cost in REPORT_COSTS)


def test_the_document_is_a_table_that_names_cannot_break() -> None:
    table = synthetic_table(sizes=SIZES)
    table = table.assign(size=table["size"].replace({"0.2M": "a|b <script>"}))
    tables = {"text2image": TaskResults(table, KERNEL)}
    verdicts = evaluate_claims(CLAIMS, tables)
    text = markdown_claims("a *study*", verdicts, tables)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "|--" not in line]
    assert len(rows) == 1 + len(claim_rows(verdicts)) < len(verdicts)
    assert all(line.replace(r"\|", "").count("|") == 6 for line in rows)
    assert "<script>" not in text
    assert r"a \*study\*" in text
    assert "1,000 images per point" in text
    assert "the best of a grid" in text
