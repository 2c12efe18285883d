"""Recommendations: the choice, the words, and a command line that a shell reads back as meant."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

import pandas as pd
import pytest

from isocost.analysis.costs import COSTS
from isocost.analysis.pareto import best_at_budgets
from isocost.analysis.recommend import answer, recommend, sample_command
from isocost.analysis.results_table import of_task
from isocost.errors import ConfigError
from synthetic_results import planted_table

KERNEL = "mmd_efficientnet"


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
    cheap, dear = (recommend(table, "normalized_cost", budget, KERNEL) for budget in (0.2, 1000))
    assert cheap.configuration.size == "0.2M"
    assert dear.configuration.size == "12.6M"
    assert not cheap.notes
    assert len(dear.notes) == 1
    assert "beyond the data" in dear.notes[0]
    assert "80.6" in dear.notes[0]


def test_a_budget_below_every_point_names_the_cheapest() -> None:
    table = planted_table()
    cheapest = table[table["is_final"]].sort_values(["gflop", KERNEL]).iloc[0]
    with pytest.raises(ConfigError, match="below every point") as caught:
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
        "--solver": "dpmsolver++2m",
        "--timestep-spacing": "trailing",
        "--prompt": "TEXT",
    }


def test_eta_enters_the_command() -> None:
    table = planted_table(solvers=("ddim/leading/eta=0.5",))
    assert "--solver ddim --timestep-spacing leading --eta 0.5" in recommend(table, "nfe", 64, KERNEL).command


def test_an_edge_of_the_guidance_grid_is_told() -> None:
    found = recommend(planted_table(guidance=(1.0, 1.5)), "nfe", 64, KERNEL)
    assert "guidance 1.5 is at the edge" in found.notes[0]


@pytest.mark.parametrize(("half_width", "decided"), [(0.0001, True), (0.2, False)])
def test_the_reason_says_whether_it_is_decided(half_width: float, decided: bool) -> None:
    found = recommend(planted_table(half_width=half_width), "normalized_cost", 6, KERNEL)
    assert found.decided is decided
    assert found.runner_up is not None
    assert found.runner_up.size != found.configuration.size
    assert str(found.runner_up) in found.reason
    assert ("undecided, the intervals overlap" in found.reason) is not decided
    assert "lowest squared MMD" in found.reason


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
    (choice, nothing) = best_at_budgets(table, "normalized_cost", KERNEL, [6, 1e-6])
    assert choice.best is not None
    said = answer(choice)
    assert str(said).startswith(f"For 6 units of normalized cost: {choice.best}, squared MMD {choice.best.score}; runner-up ")
    assert str(said).endswith("so undecided, the intervals overlap.")
    assert not said.decided
    assert "nothing fits; the cheapest point costs 0.08 units of normalized cost" in str(answer(nothing))


def test_a_single_size_has_no_runner_up() -> None:
    found = recommend(planted_table(sizes=("0.8M",)), "nfe", 64, KERNEL)
    assert found.runner_up is None
    assert found.decided
    assert "no other size fits" in found.reason


def test_a_super_resolution_is_done_by_upscale() -> None:
    found = recommend(planted_table().assign(task="superres"), "nfe", 8)
    words = shlex.split(found.command)
    assert words[:2] == ["isocost", "upscale"]
    assert words[-2:] == ["IMAGE", "LARGER.png"]
    assert shlex.split(recommend(planted_table().assign(task="text2image"), "nfe", 8).command)[1] == "sample"
    assert shlex.split(recommend(planted_table().assign(task="superres-distill"), "nfe", 8).command)[1] == "upscale"


# --- several budgets, floors ------------------------------------------------------------------------------------------


def test_every_budget_must_hold_and_the_first_breaks_ties() -> None:
    table = planted_table(noise=0.01)
    finished = table[table["is_final"]]
    within = finished[(finished["nfe"] <= 16) & (finished["gflop"] <= 20) & (finished["ms_per_image"] <= 3.6e6 / 500_000)]
    budgets = {"nfe": 16.0, "gflop": 20.0, "images_per_hour": 500_000.0}
    for lead, column in (("nfe", "nfe"), ("gflop", "gflop"), ("images_per_hour", "ms_per_image")):
        also = {name: value for name, value in budgets.items() if name != lead}
        found = recommend(table, lead, budgets[lead], KERNEL, also=also)
        assert found.configuration.point == within.loc[within[KERNEL].idxmin(), "point"]
        assert found.cost == column
        assert {limit.name for limit in found.limits} == {"nfe", "gflop", "ms_per_image"}
        assert all(limit.value <= limit.bound for limit in found.limits)
        assert f"of the {len(within)} points within" in found.reason
    tied = table.assign(mmd_efficientnet=0.1, nfe=table["num_steps"] * 1.0, gflop=64.0 / table["num_steps"])
    by = {cost: recommend(tied, cost, 1e6, KERNEL, also={other: 1e6}) for cost, other in (("nfe", "gflop"), ("gflop", "nfe"))}
    assert {cost: found.configuration.num_steps for cost, found in by.items()} == {"nfe": 2, "gflop": 32}


def test_images_per_hour_are_milliseconds_turned_round() -> None:
    table = planted_table()
    ours, theirs = recommend(table, "images_per_hour", 1_200_000, KERNEL), recommend(table, "ms_per_image", 3, KERNEL)
    assert ours.configuration == theirs.configuration
    assert "within 3 ms per image (1,200,000 images per hour)" in ours.reason


@pytest.mark.parametrize(
    ("metric", "bound", "side"), [("alignment", 0.8, ">="), ("frechet_efficientnet", 30.0, "<="), (KERNEL, 0.1, "<=")]
)
def test_a_floor_is_met_in_the_metrics_own_direction(metric: str, bound: float, side: str) -> None:
    table = planted_table(noise=0.01)
    table["alignment"] = table["alignment"].sample(frac=1, random_state=0).to_numpy()
    within = table[table["is_final"] & (table["nfe"] <= 16)].query(f"{metric} {side} {bound}")
    found = recommend(table, "nfe", 16, KERNEL, requirements={metric: bound})
    assert found.configuration.point == within.loc[within[KERNEL].idxmin(), "point"]
    assert f"of at {'least' if side == '>=' else 'most'} {bound:g}" in found.reason
    (_, requirement) = found.limits
    assert (requirement.name, requirement.bound, requirement.is_most) == (metric, bound, side == "<=")
    assert requirement.low is not None
    if found.runner_up is not None:
        assert found.runner_up.point in set(within["point"])


def test_a_floor_within_the_noise_is_noted() -> None:
    table = planted_table()
    at = recommend(table, "nfe", 16, KERNEL)
    share = float(table.loc[table["point"] == at.configuration.point, "alignment"].iloc[0])
    assert any(
        "reaches below the requirement" in note
        for note in recommend(table, "nfe", 16, KERNEL, requirements={"alignment": share}).notes
    )
    assert not recommend(table, "nfe", 16, KERNEL, requirements={"alignment": share - 0.05}).notes
    table["alignment_low"] = float("nan")
    assert "no interval" in recommend(table, "nfe", 16, KERNEL, requirements={"alignment": share}).notes[0]


def test_memory_is_a_budget_where_it_was_measured() -> None:
    table = planted_table()
    with pytest.raises(ConfigError, match=r"no point has a measured peak memory .* leave the memory budget out"):
        recommend(table, "nfe", 16, KERNEL, also={"memory_gib": 1})
    table["peak_memory_mib"] = table["num_parameters"] / 1e4
    found = recommend(table, "nfe", 16, KERNEL, also={"memory_gib": 0.5})
    assert found.configuration.size == "3.2M", "12.6M takes 1.23 GiB, 7.1M takes 0.69"
    assert "0.5 GiB of memory" in found.reason
    with pytest.raises(ConfigError, match=r"of memory is below every point; the least takes 0.0195 GiB at the peak .0.2M"):
        recommend(table, "nfe", 16, KERNEL, also={"memory_gib": 0.01})
    table.loc[table["size"] == "3.2M", "peak_memory_mib"] = float("nan")
    partly = recommend(table, "nfe", 16, KERNEL, also={"memory_gib": 0.5})
    assert partly.configuration.size == "0.8M"
    assert "50 points are left out, without a measured peak_memory_mib" in partly.notes


def test_beyond_the_data_is_said_only_where_nothing_else_binds() -> None:
    table = planted_table()
    assert "beyond the data" in recommend(table, "nfe", 1000, KERNEL, also={"gflop": 1e6}).notes[0]
    assert not recommend(table, "nfe", 1000, KERNEL, also={"gflop": 20}).notes


def test_points_that_miss_the_floor_still_say_where_the_edges_are() -> None:
    table = planted_table(guidance=(1.0, 2.0, 3.0))
    share = recommend(table, "nfe", 64, "alignment").value
    assert (table[table["is_final"] & (table["alignment"] > share - 0.001)]["guidance"] == 2).all()
    found = recommend(table, "nfe", 64, KERNEL, requirements={"alignment": share - 0.001})
    assert not found.configuration.guidance_at_boundary


def test_nothing_meets_it_names_the_nearest() -> None:
    table = planted_table()
    finished = table[table["is_final"]]
    nearest = finished.sort_values(["alignment"]).iloc[-1]
    with pytest.raises(ConfigError, match=r"no point meets caption alignment of at least 0.999; the nearest is") as caught:
        recommend(table, "nfe", 64, KERNEL, requirements={"alignment": 0.999})
    assert f"the nearest is {nearest['size']}, {nearest['num_steps']} steps" in str(caught.value)
    share = float(nearest["alignment"])
    with pytest.raises(ConfigError, match="no point within 4 network evaluations per image meets caption") as caught:
        recommend(table, "nfe", 4, KERNEL, requirements={"alignment": share})
    inside = finished[finished["nfe"] <= 4].sort_values("alignment").iloc[-1]
    cheapest = finished[finished["alignment"] >= share].sort_values("nfe").iloc[0]
    assert f"the nearest there is {inside['size']}, {inside['num_steps']} steps" in str(caught.value)
    assert f"the cheapest point that does is {cheapest['size']}, {cheapest['num_steps']} steps" in str(caught.value)
    assert str(caught.value).endswith(f"at {cheapest['nfe']:g} network evaluations per image")
    at_odds = table.assign(frechet_efficientnet=100 - table["frechet_efficientnet"])
    both = {"alignment": share, "frechet_efficientnet": float(at_odds.loc[finished.index, "frechet_efficientnet"].min())}
    with pytest.raises(
        ConfigError, match=r"meets caption alignment of at least .* and Fréchet distance of at most .* together"
    ):
        recommend(at_odds, "nfe", 64, KERNEL, requirements=both)
    with pytest.raises(
        ConfigError, match=r"no point keeps 2 network .* and 0\.1 ms .* together; the nearest is 12.6M, 8 steps"
    ):
        recommend(table.assign(ms_per_image=3.0 / table["num_steps"]), "nfe", 2, KERNEL, also={"ms_per_image": 0.1})


def test_contradictions_and_mistakes_are_one_line() -> None:
    table = planted_table()
    for cost, budget, options, said in (
        (
            "ms_per_image",
            3,
            {"also": {"images_per_hour": 100.0}},
            "two budgets of one kind, 3 ms per image and 36,000 ms",
        ),
        ("memory_gib", 3, {}, "a memory budget stands beside one of cost"),
        ("nfe", 3, {"also": {"euros": 3.0}}, "no budget is called 'euros'; known: normalized_cost"),
        ("nfe", 3, {"also": {"gflop": -3.0}}, "a budget is a positive number, not -3"),
        ("images_per_hour", float("inf"), {}, "a budget is a positive number, not inf"),
        ("nfe", 3, {"requirements": {"beauty": 3.0}}, "no metric is called 'beauty'"),
        ("nfe", 3, {"requirements": {"alignment": float("nan")}}, "a requirement is a number, not nan for alignment"),
        ("nfe", 3, {"requirements": {"fid": 20.0}}, "no point carries fid: .* leave that requirement out"),
        ("images_per_hour", 1e9, {}, "1,000,000,000 images per hour. is below every point; the cheapest point costs 0.1"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            recommend(table, cost, budget, KERNEL, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


# --- a results database's table -------------------------------------------------------------------------------------------------


def test_a_ledgers_points_are_told_apart_by_task_and_size() -> None:
    family = planted_table(sizes=("0.2M", "0.8M")).assign(task=None)
    tuned = planted_table(sizes=("0.2M",), snapshots=(1000,), images_seen=2000).assign(task="superres")
    students = planted_table(sizes=("0.2M",), snapshots=(), images_seen=500).assign(task="distill", size="0.2M codi")
    results_db = pd.concat([family, tuned, students], ignore_index=True).assign(is_final=False)
    own = of_task(results_db)
    assert own["is_final"].tolist() == family["is_final"].tolist()
    assert set(of_task(results_db, "superres")["images_seen"]) == {1000, 2000}
    beside = of_task(results_db, "distill")
    assert set(beside["size"]) == {"0.2M", "0.8M", "0.2M codi"}
    assert beside["is_final"].all()
    two = pd.concat([own, own.assign(protocol="other", point=own["point"] + "b")])
    with pytest.raises(ConfigError, match="points that differ in protocol"):
        recommend(of_task(two), "nfe", 16, KERNEL)
    assert recommend(of_task(two, protocol="other"), "nfe", 16, KERNEL).configuration.point.endswith("b")
    for task, protocol, said in (
        ("dreambooth", None, "subject by subject"),
        ("superres-distill", None, "no point of superres-distill; it has distill, superres, text2image"),
        ("text2image", "absent", "under protocol absent; known: planted"),
    ):
        with pytest.raises(ConfigError, match=said):
            of_task(results_db, task, protocol)
    with pytest.raises(ConfigError, match="it has no point at all"):
        of_task(results_db.iloc[:0])
