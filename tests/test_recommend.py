"""Recommendations: the choice, the words, and a command line that a shell reads back as meant."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

import pytest

from isocost.analysis.frontier import COSTS, best_at_budgets
from isocost.analysis.recommend import answer, recommend, sample_command
from isocost.errors import RequestError
from planted import planted_table

KERNEL = "kernel_efficientnet"


@pytest.mark.parametrize("cost", list(COSTS))
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_the_recommended_point_is_the_best_affordable_row(cost: str, share: float) -> None:
    table = planted_table(noise=0.01)
    finished = table[table["is_final"]]
    budget = finished[cost].quantile(share)
    best = finished[finished[cost] <= budget].sort_values(KERNEL).iloc[0]
    found = recommend(table, cost, budget, KERNEL)
    assert found.configuration.point == best["point"]
    assert found.value == best[KERNEL]
    assert found.interval == (best[f"{KERNEL}_low"], best[f"{KERNEL}_high"])
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["configuration"]["size"] == best["size"]


def test_small_wins_cheap_and_large_wins_dear() -> None:
    table = planted_table()
    cheap, dear = (recommend(table, "paper_cost", budget, KERNEL) for budget in (0.2, 1000))
    assert cheap.configuration.size == "0.2M"
    assert dear.configuration.size == "12.6M"
    assert not cheap.notes
    assert len(dear.notes) == 1
    assert "beyond the data" in dear.notes[0]
    assert "80.6" in dear.notes[0]


def test_a_budget_below_every_point_names_the_cheapest() -> None:
    table = planted_table()
    cheapest = table[table["is_final"]].sort_values(["gflop", KERNEL]).iloc[0]
    with pytest.raises(RequestError, match="below every point") as caught:
        recommend(table, "gflop", cheapest["gflop"] * 0.99, KERNEL)
    assert f"the cheapest point costs {cheapest['gflop']:.3g} GFLOP" in str(caught.value)
    assert "0.2M, 2 steps, guidance 1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert recommend(table, "gflop", cheapest["gflop"], KERNEL).configuration.num_steps == 2


def test_the_command_is_read_by_a_shell_as_meant() -> None:
    found = recommend(planted_table(), "nfe", 32, KERNEL, out="my out/").configuration
    words = shlex.split(sample_command(found, out="my out/"))
    assert words[:3] == ["isocost", "sample", f"my out/artefacts/checkpoint/{found.checkpoint}"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options == {
        "--steps": "16",
        "--guidance": "2",
        "--sampler": "dpmsolver++2m",
        "--spacing": "trailing",
        "--prompt": "TEXT",
    }


def test_eta_enters_the_command() -> None:
    table = planted_table(samplers=("ddim/leading/eta=0.5",))
    assert "--sampler ddim --spacing leading --eta 0.5" in recommend(table, "nfe", 64, KERNEL).command


def test_an_edge_of_the_guidance_grid_is_told() -> None:
    found = recommend(planted_table(guidance=(1.0, 1.5)), "nfe", 64, KERNEL)
    assert "guidance 1.5 is at the edge" in found.notes[0]


@pytest.mark.parametrize(("half_width", "decided"), [(0.0001, True), (0.2, False)])
def test_the_reason_says_whether_it_is_decided(half_width: float, decided: bool) -> None:
    found = recommend(planted_table(half_width=half_width), "paper_cost", 6, KERNEL)
    assert found.decided is decided
    assert found.runner_up is not None
    assert found.runner_up.size != found.configuration.size
    assert str(found.runner_up) in found.reason
    assert ("undecided, the intervals overlap" in found.reason) is not decided
    assert "lowest kernel distance" in found.reason


def test_a_missing_interval_leaves_it_undecided() -> None:
    table = planted_table()
    table[[f"{KERNEL}_low", f"{KERNEL}_high"]] = float("nan")
    found = recommend(table, "nfe", 64, KERNEL)
    assert found.interval is None
    assert not found.decided
    assert "an interval is missing" in found.reason


def test_higher_is_better_where_the_metric_says_so() -> None:
    table = planted_table(noise=0.02)
    found = recommend(table, "nfe", 1000, "alignment")
    assert found.value == table.loc[table["is_final"], "alignment"].max()
    assert "highest caption alignment" in found.reason


def test_one_sentence_for_a_budget() -> None:
    table = planted_table(half_width=0.2)
    (choice, nothing) = best_at_budgets(table, "paper_cost", KERNEL, [6, 1e-6])
    assert choice.best is not None
    said = answer(choice)
    assert str(said).startswith(f"For 6 units of paper cost: {choice.best}, kernel distance {choice.best.score}; runner-up ")
    assert str(said).endswith("so undecided, the intervals overlap.")
    assert not said.decided
    assert "nothing fits; the cheapest point costs 0.08 units of paper cost" in str(answer(nothing))


def test_a_single_size_has_no_runner_up() -> None:
    found = recommend(planted_table(sizes=("0.8M",)), "nfe", 64, KERNEL)
    assert found.runner_up is None
    assert found.decided
    assert "no other size fits" in found.reason


def test_a_super_resolution_is_done_by_upscale() -> None:
    found = recommend(planted_table().assign(task="superres"), "nfe", 8)
    words = shlex.split(found.command)
    assert words[:2] == ["isocost", "upscale"]
    assert words[-2:] == ["PICTURE", "LARGER.png"]
    assert shlex.split(recommend(planted_table().assign(task="text2image"), "nfe", 8).command)[1] == "sample"
