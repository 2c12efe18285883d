"""Recommendations: the choice, its text, and a command line that a shell parses correctly."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from isocost.analysis.costs import COSTS
from isocost.analysis.pareto import best_at_budgets
from isocost.analysis.recommend import describe_choice, recommend, sample_command
from isocost.analysis.results_table import of_task
from isocost.errors import ConfigError
from synthetic_results import synthetic_table

KERNEL = "mmd_efficientnet"


@pytest.mark.parametrize("cost", list(COSTS))
@pytest.mark.parametrize("quantile", [0.05, 0.5, 1.0])
def test_the_recommended_point_is_the_best_affordable_row(cost: str, quantile: float) -> None:
    table = synthetic_table(noise=0.01)
    finals = table[table["is_final"]]
    budget = finals[cost].quantile(quantile)
    best = finals[finals[cost] <= budget].sort_values(KERNEL).iloc[0]
    result = recommend(table, cost, budget, KERNEL)
    assert result.configuration.point == best["point"]
    assert result.value == best[KERNEL]
    assert result.interval == (best[f"{KERNEL}_low"], best[f"{KERNEL}_high"])
    assert json.loads(json.dumps(asdict(result), allow_nan=False))["configuration"]["size"] == best["size"]


def test_a_small_size_wins_at_a_low_budget_and_a_large_size_at_a_high_budget() -> None:
    table = synthetic_table()
    low, high = (recommend(table, "normalized_cost", budget, KERNEL) for budget in (0.2, 1000))
    assert low.configuration.size == "0.2M"
    assert high.configuration.size == "12.6M"
    assert not low.notes
    assert len(high.notes) == 1
    assert "beyond the data" in high.notes[0]
    assert "80.6" in high.notes[0]


def test_a_budget_below_every_point_names_the_cheapest() -> None:
    table = synthetic_table()
    cheapest = table[table["is_final"]].sort_values(["gflop", KERNEL]).iloc[0]
    with pytest.raises(ConfigError, match="below every point") as caught:
        recommend(table, "gflop", cheapest["gflop"] * 0.99, KERNEL)
    assert f"the cheapest point costs {cheapest['gflop']:.3g} GFLOP" in str(caught.value)
    assert "0.2M, 2 steps, guidance 1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert recommend(table, "gflop", cheapest["gflop"], KERNEL).configuration.num_steps == 2


def test_a_shell_parses_the_command_correctly() -> None:
    configuration = recommend(synthetic_table(), "nfe", 32, KERNEL, out="my out/").configuration
    words = shlex.split(sample_command(configuration, out="my out/"))
    assert words[:3] == ["isocost", "sample", f"my out/artefacts/checkpoint/{configuration.checkpoint}"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options == {
        "--steps": "16",
        "--guidance": "2",
        "--solver": "dpmsolver++2m",
        "--timestep-spacing": "trailing",
        "--prompt": "TEXT",
    }


def test_the_command_contains_eta() -> None:
    table = synthetic_table(solvers=("ddim/leading/eta=0.5",))
    assert "--solver ddim --timestep-spacing leading --eta 0.5" in recommend(table, "nfe", 64, KERNEL).command


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("guidance", [1.0, 2.0 ** (1 / 12), 7.5])
@pytest.mark.parametrize(
    "label", ["ddim/leading/eta=0.5/offset=0", "euler/karras", "sde-dpmsolver++2m/leading/offset=3", "ddim/999-500-20/eta=0.5"]
)
def test_the_command_reproduces_the_point(
    dtype: str, compiled: bool, seed: int, guidance: float, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is parsed by the command line itself; the settings that reach `sample` are those of the point."""
    from typer.testing import CliRunner

    from isocost.cli import app
    from isocost.sampling import sample as sample_module

    received: dict[str, Any] = {}

    def receive(checkpoint: Path, prompts: list[str], **settings: Any) -> None:
        received.update(settings, checkpoint=checkpoint, prompts=prompts)
        raise ConfigError("received")

    monkeypatch.setattr(sample_module, "sample", receive)
    table = synthetic_table(solvers=(label,), guidance=(guidance,)).assign(dtype=dtype, compiled=compiled, seed=seed)
    result = recommend(table, "nfe", 64, KERNEL)
    outcome = CliRunner().invoke(app, shlex.split(result.command)[1:])
    assert isinstance(outcome.exception, ConfigError), outcome.output
    assert received["solver"].label == label
    assert received["guidance"] == guidance
    assert (received["dtype"], received["compiled"], received["seed"]) == (dtype, compiled, seed)
    assert received["num_steps"] == result.configuration.num_steps
    assert received["prompts"] == ["TEXT"]


def test_a_boundary_of_the_guidance_grid_is_noted() -> None:
    result = recommend(synthetic_table(guidance=(1.0, 1.5)), "nfe", 64, KERNEL)
    assert "guidance 1.5 is at the boundary" in result.notes[0]


@pytest.mark.parametrize(("half_width", "decided"), [(0.0001, True), (0.2, False)])
def test_the_reason_states_whether_the_choice_is_decided(half_width: float, decided: bool) -> None:
    result = recommend(synthetic_table(half_width=half_width), "normalized_cost", 6, KERNEL)
    assert result.decided is decided
    assert result.runner_up is not None
    assert result.runner_up.size != result.configuration.size
    assert str(result.runner_up) in result.reason
    assert ("undecided, the intervals overlap" in result.reason) is not decided
    assert ("decided, the intervals do not overlap" in result.reason) is decided
    assert "lowest squared MMD" in result.reason


def test_a_missing_interval_leaves_it_undecided() -> None:
    table = synthetic_table()
    table[[f"{KERNEL}_low", f"{KERNEL}_high"]] = float("nan")
    result = recommend(table, "nfe", 64, KERNEL)
    assert result.interval is None
    assert not result.decided
    assert "an interval is missing" in result.reason


def test_higher_is_better_for_metrics_with_that_direction() -> None:
    table = synthetic_table(noise=0.02)
    result = recommend(table, "nfe", 1000, "alignment")
    assert result.value == table.loc[table["is_final"], "alignment"].max()
    assert "highest prompt alignment" in result.reason


def test_one_sentence_for_a_budget() -> None:
    table = synthetic_table(half_width=0.2)
    (choice, without_points) = best_at_budgets(table, "normalized_cost", KERNEL, [6, 1e-6])
    assert choice.best is not None
    text = describe_choice(choice)
    assert str(text).startswith(f"For 6 units of normalized cost: {choice.best}, squared MMD {choice.best.score}; runner-up ")
    assert str(text).endswith("; undecided, the intervals overlap.")
    assert not text.decided
    assert "nothing fits; the cheapest point costs 0.08 units of normalized cost" in str(describe_choice(without_points))


def test_a_single_size_has_no_runner_up() -> None:
    result = recommend(synthetic_table(sizes=("0.8M",)), "nfe", 64, KERNEL)
    assert result.runner_up is None
    assert result.decided
    assert "no other size fits" in result.reason


def test_super_resolution_uses_the_command_upscale() -> None:
    result = recommend(synthetic_table().assign(task="superres"), "nfe", 8)
    words = shlex.split(result.command)
    assert words[:2] == ["isocost", "upscale"]
    assert words[-2:] == ["IMAGE", "LARGER.png"]
    assert shlex.split(recommend(synthetic_table().assign(task="text2image"), "nfe", 8).command)[1] == "sample"
    assert shlex.split(recommend(synthetic_table().assign(task="superres-distill"), "nfe", 8).command)[1] == "upscale"


# --- several budgets, requirements ------------------------------------------------------------------------------------


def test_every_budget_must_hold_and_the_first_breaks_ties() -> None:
    table = synthetic_table(noise=0.01)
    finals = table[table["is_final"]]
    within = finals[(finals["nfe"] <= 16) & (finals["gflop"] <= 20) & (finals["ms_per_image"] <= 3.6e6 / 500_000)]
    budgets = {"nfe": 16.0, "gflop": 20.0, "images_per_hour": 500_000.0}
    for lead, column in (("nfe", "nfe"), ("gflop", "gflop"), ("images_per_hour", "ms_per_image")):
        also = {name: value for name, value in budgets.items() if name != lead}
        result = recommend(table, lead, budgets[lead], KERNEL, also=also)
        assert result.configuration.point == within.loc[within[KERNEL].idxmin(), "point"]
        assert result.cost == column
        assert {limit.name for limit in result.limits} == {"nfe", "gflop", "ms_per_image"}
        assert all(limit.value <= limit.bound for limit in result.limits)
        assert f"of the {len(within)} points within" in result.reason
    tied = table.assign(mmd_efficientnet=0.1, nfe=table["num_steps"] * 1.0, gflop=64.0 / table["num_steps"])
    by = {cost: recommend(tied, cost, 1e6, KERNEL, also={other: 1e6}) for cost, other in (("nfe", "gflop"), ("gflop", "nfe"))}
    assert {cost: result.configuration.num_steps for cost, result in by.items()} == {"nfe": 2, "gflop": 32}


def test_images_per_hour_are_the_inverse_of_milliseconds() -> None:
    table = synthetic_table()
    by_rate, by_time = recommend(table, "images_per_hour", 1_200_000, KERNEL), recommend(table, "ms_per_image", 3, KERNEL)
    assert by_rate.configuration == by_time.configuration
    assert "within 3 ms per image (1,200,000 images per hour)" in by_rate.reason


def test_latency_is_a_budget_of_its_own() -> None:
    table = synthetic_table()
    finals = table[table["is_final"]]
    budget = float(finals["latency_ms"].quantile(0.3))
    result = recommend(table, "latency_ms", budget, KERNEL)
    assert result.configuration.cost <= budget
    assert f"within {budget:.3g} ms of latency" in result.reason
    both = recommend(table, "ms_per_image", 1e6, KERNEL, also={"latency_ms": budget})
    assert both.configuration.point == result.configuration.point


@pytest.mark.parametrize("table", [synthetic_table().drop(columns="latency_ms"), synthetic_table().assign(latency_ms=math.nan)])
def test_a_latency_budget_without_a_measurement_names_the_command_that_measures(table: pd.DataFrame) -> None:
    for cost, also in (("latency_ms", {}), ("nfe", {"latency_ms": 3.0})):
        with pytest.raises(
            ConfigError, match="no point has a measured latency_ms; `isocost remeasure STUDY` measures"
        ) as caught:
            recommend(table, cost, 3.0, KERNEL, also=also)
        assert "\n" not in str(caught.value)
    partly = synthetic_table()
    partly.loc[partly["size"] == "0.2M", "latency_ms"] = math.nan
    result = recommend(partly, "latency_ms", 1e6, KERNEL)
    assert result.configuration.size != "0.2M"


def provenance_of(num_remeasured: int, num_points: int) -> list[str]:
    timed_with = {"timed_with": {"device": "cpu", "num_latency_runs": 3}}
    return [json.dumps({"device": "cpu", **(timed_with if n < num_remeasured else {})}) for n in range(num_points)]


@pytest.mark.parametrize(("cost", "bound"), [("ms_per_image", 3), ("images_per_hour", 1_200_000)])
def test_a_budget_on_times_of_a_sweep_names_the_command_that_measures_properly(cost: str, bound: float) -> None:
    table = synthetic_table(snapshots=())
    num_points = len(table)
    (note,) = recommend(table.assign(provenance=provenance_of(0, num_points)), cost, bound, KERNEL).notes
    assert note.startswith("ms_per_image is the throughput at full batches, measured in stages while the study ran; ")
    assert "`isocost remeasure STUDY` on an idle device measures each point" in note
    (note,) = recommend(table.assign(provenance=provenance_of(10, num_points)), cost, bound, KERNEL).notes
    assert note.startswith(f"ms_per_image of {num_points - 10} of {num_points} points is the throughput")
    assert not recommend(table.assign(provenance=provenance_of(num_points, num_points)), cost, bound, KERNEL).notes
    for other in ("nfe", "latency_ms"):
        assert not recommend(table.assign(provenance=provenance_of(0, num_points)), other, 16, KERNEL).notes


@pytest.mark.parametrize(
    ("metric", "bound", "side"), [("alignment", 0.8, ">="), ("frechet_efficientnet", 30.0, "<="), (KERNEL, 0.1, "<=")]
)
def test_a_requirement_is_met_in_the_direction_of_the_metric(metric: str, bound: float, side: str) -> None:
    table = synthetic_table(noise=0.01)
    table["alignment"] = table["alignment"].sample(frac=1, random_state=0).to_numpy()
    within = table[table["is_final"] & (table["nfe"] <= 16)].query(f"{metric} {side} {bound}")
    result = recommend(table, "nfe", 16, KERNEL, requirements={metric: bound})
    assert result.configuration.point == within.loc[within[KERNEL].idxmin(), "point"]
    assert f"of at {'least' if side == '>=' else 'most'} {bound:g}" in result.reason
    (_, requirement) = result.limits
    assert (requirement.name, requirement.bound, requirement.is_upper_bound) == (metric, bound, side == "<=")
    assert requirement.low is not None
    if result.runner_up is not None:
        assert result.runner_up.point in set(within["point"])


def test_a_requirement_within_the_noise_is_noted() -> None:
    table = synthetic_table()
    best = recommend(table, "nfe", 16, KERNEL)
    score = float(table.loc[table["point"] == best.configuration.point, "alignment"].iloc[0])
    assert any(
        "reaches below the requirement" in note
        for note in recommend(table, "nfe", 16, KERNEL, requirements={"alignment": score}).notes
    )
    assert not recommend(table, "nfe", 16, KERNEL, requirements={"alignment": score - 0.05}).notes
    table["alignment_low"] = float("nan")
    assert "no interval" in recommend(table, "nfe", 16, KERNEL, requirements={"alignment": score}).notes[0]


def test_measured_memory_is_a_budget() -> None:
    table = synthetic_table()
    with pytest.raises(ConfigError, match=r"no point has a measured peak memory .* leave the memory budget out"):
        recommend(table, "nfe", 16, KERNEL, also={"memory_gib": 1})
    table["peak_memory_mib"] = table["num_parameters"] / 1e4
    result = recommend(table, "nfe", 16, KERNEL, also={"memory_gib": 0.5})
    assert result.configuration.size == "3.2M", "12.6M takes 1.23 GiB, 7.1M takes 0.69"
    assert "0.5 GiB of memory" in result.reason
    with pytest.raises(ConfigError, match=r"below every point; the smallest point needs 0.0195 GiB of peak memory .0.2M"):
        recommend(table, "nfe", 16, KERNEL, also={"memory_gib": 0.01})
    table.loc[table["size"] == "3.2M", "peak_memory_mib"] = float("nan")
    partly_measured = recommend(table, "nfe", 16, KERNEL, also={"memory_gib": 0.5})
    assert partly_measured.configuration.size == "0.8M"
    assert "50 points are left out because peak_memory_mib was not measured" in partly_measured.notes


def test_beyond_the_data_is_noted_only_if_no_other_budget_binds() -> None:
    table = synthetic_table()
    assert "beyond the data" in recommend(table, "nfe", 1000, KERNEL, also={"gflop": 1e6}).notes[0]
    assert not recommend(table, "nfe", 1000, KERNEL, also={"gflop": 20}).notes


def test_points_that_miss_the_requirement_still_count_for_the_guidance_boundary() -> None:
    table = synthetic_table(guidance=(1.0, 2.0, 3.0))
    score = recommend(table, "nfe", 64, "alignment").value
    assert (table[table["is_final"] & (table["alignment"] > score - 0.001)]["guidance"] == 2).all()
    result = recommend(table, "nfe", 64, KERNEL, requirements={"alignment": score - 0.001})
    assert not result.configuration.guidance_at_boundary


def test_an_infeasible_requirement_names_the_nearest_point() -> None:
    table = synthetic_table()
    finals = table[table["is_final"]]
    nearest = finals.sort_values(["alignment"]).iloc[-1]
    with pytest.raises(ConfigError, match=r"no point meets prompt alignment of at least 0.999; the nearest is") as caught:
        recommend(table, "nfe", 64, KERNEL, requirements={"alignment": 0.999})
    assert f"the nearest is {nearest['size']}, {nearest['num_steps']} steps" in str(caught.value)
    score = float(nearest["alignment"])
    with pytest.raises(ConfigError, match="no point within 4 network evaluations per image meets prompt") as caught:
        recommend(table, "nfe", 4, KERNEL, requirements={"alignment": score})
    affordable = finals[finals["nfe"] <= 4].sort_values("alignment").iloc[-1]
    cheapest = finals[finals["alignment"] >= score].sort_values("nfe").iloc[0]
    message = str(caught.value)
    assert f"the nearest affordable point is {affordable['size']}, {affordable['num_steps']} steps" in message
    assert f"the cheapest point that meets the requirement is {cheapest['size']}, {cheapest['num_steps']} steps" in message
    assert message.endswith(f"at {cheapest['nfe']:g} network evaluations per image")
    conflicting = table.assign(frechet_efficientnet=100 - table["frechet_efficientnet"])
    both = {"alignment": score, "frechet_efficientnet": float(conflicting.loc[finals.index, "frechet_efficientnet"].min())}
    with pytest.raises(ConfigError, match=r"meets prompt alignment of at least .* and Fréchet distance of at most .* together"):
        recommend(conflicting, "nfe", 64, KERNEL, requirements=both)
    with pytest.raises(ConfigError, match=r"no point fits 2 network .* and 0\.1 ms .* together; the nearest is 12.6M, 8 steps"):
        recommend(table.assign(ms_per_image=3.0 / table["num_steps"]), "nfe", 2, KERNEL, also={"ms_per_image": 0.1})


def test_contradictions_and_errors_are_one_line() -> None:
    table = synthetic_table()
    for cost, budget, options, message in (
        (
            "ms_per_image",
            3,
            {"also": {"images_per_hour": 100.0}},
            "two budgets of one kind, 3 ms per image and 36,000 ms",
        ),
        ("memory_gib", 3, {}, "a memory budget needs a cost budget as well"),
        ("nfe", 3, {"also": {"euros": 3.0}}, "no budget is called 'euros'; known: normalized_cost"),
        ("nfe", 3, {"also": {"gflop": -3.0}}, "a budget must be a positive number, not -3"),
        ("images_per_hour", float("inf"), {}, "a budget must be a positive number, not inf"),
        ("nfe", 3, {"requirements": {"beauty": 3.0}}, "unknown metric 'beauty'"),
        ("nfe", 3, {"requirements": {"alignment": float("nan")}}, "a requirement must be a number, not nan for alignment"),
        ("nfe", 3, {"requirements": {"fid": 20.0}}, "no point has fid: .* leave this requirement out"),
        ("images_per_hour", 1e9, {}, "1,000,000,000 images per hour. is below every point; the cheapest point costs 0.1"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            recommend(table, cost, budget, KERNEL, **options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


# --- the table of a results database -----------------------------------------------------------------------------------


def test_the_points_of_a_results_database_are_selected_by_task_and_size() -> None:
    family = synthetic_table(sizes=("0.2M", "0.8M")).assign(task=None)
    tuned = synthetic_table(sizes=("0.2M",), snapshots=(1000,), images_seen=2000).assign(task="superres")
    students = synthetic_table(sizes=("0.2M",), snapshots=(), images_seen=500).assign(task="distill", size="0.2M codi")
    results_db = pd.concat([family, tuned, students], ignore_index=True).assign(is_final=False)
    points = of_task(results_db)
    assert points["is_final"].tolist() == family["is_final"].tolist()
    assert set(of_task(results_db, "superres")["images_seen"]) == {1000, 2000}
    with_teachers = of_task(results_db, "distill")
    assert set(with_teachers["size"]) == {"0.2M", "0.8M", "0.2M codi"}
    assert with_teachers["is_final"].all()
    two_protocols = pd.concat([points, points.assign(protocol="other", point=points["point"] + "b")])
    with pytest.raises(ConfigError, match="points that differ in protocol"):
        recommend(of_task(two_protocols), "nfe", 16, KERNEL)
    assert recommend(of_task(two_protocols, protocol="other"), "nfe", 16, KERNEL).configuration.point.endswith("b")
    for task, protocol, message in (
        ("dreambooth", None, "scores of single subjects only"),
        ("superres-distill", None, "no point of superres-distill; it has distill, superres, text2image"),
        ("text2image", "absent", "under protocol absent; known: synthetic"),
    ):
        with pytest.raises(ConfigError, match=message):
            of_task(results_db, task, protocol)
    with pytest.raises(ConfigError, match="it has no point at all"):
        of_task(results_db.iloc[:0])


# --- the default metric -----------------------------------------------------------------------------------------------


def test_the_default_metric_is_that_of_the_report(tmp_path: Path, isocost: Any) -> None:
    """A study of published checkpoints has FID and no squared MMD on EfficientNet-lite0."""
    table = synthetic_table()
    names = {f"{KERNEL}{end}": f"fid{end}" for end in ("", "_low", "_high")}
    published = table.rename(columns=names).drop(columns=[name for name in table.columns if name.startswith("frechet")])
    published.to_parquet(tmp_path / "table.parquet")
    assert isocost("recommend", tmp_path, "--budget-nfe", 16).answer["metric"] == "fid"
    page = tmp_path / "report_data" / "text2image" / "page.json"
    page.parent.mkdir(parents=True)
    page.write_text(json.dumps({"metric": "alignment"}), encoding="utf-8")
    assert isocost("recommend", tmp_path, "--budget-nfe", 16).answer["metric"] == "alignment"
    assert isocost("recommend", tmp_path, "--budget-nfe", 16, "--metric", "fid").answer["metric"] == "fid"
    outcome = isocost("recommend", tmp_path, "--budget-nfe", 16, "--metric", KERNEL)
    assert outcome.status == 2
    assert "take another metric: alignment, fid" in outcome.line
