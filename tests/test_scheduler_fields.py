"""Every field of every diffusers scheduler class is honoured, refused by name, or without effect.

Shape letters: S evaluations, E elements of a synthetic latent.
"""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import pytest
from diffusers import schedulers

import tiny_pipelines
from isocost.config.base import parse_spec
from isocost.config.sampling import SolverSpec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import num_function_evaluations, solver_coefficients
from isocost.errors import ConfigError
from isocost.models.checkpoint import read_info
from isocost.models.pretrained.scheduler_config import SCHEDULER_CLASS_TO_SOLVER, SchedulerSettings, read_scheduler
from isocost.models.pretrained.scheduler_fields import (
    SCHEDULER_FIELDS,
    UNSUPPORTED_SCHEDULERS,
    WITHOUT_EXACT_SOLVER,
    fields_table,
)
from isocost.pipeline.pipeline import Pipeline
from isocost.sampling.sample import sample
from test_solvers import float64_diffusers, network, run, run_diffusers, start_and_noises

__all__ = ["float64_diffusers"]
DOCUMENT = Path(__file__).parents[1] / "docs" / "schedulers.md"

VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [500],
    "beta_start": [0.001],
    "beta_end": [0.013],
    "beta_schedule": ["linear", "squaredcos_cap_v2", "sigmoid"],
    "trained_betas": [[0.1, 0.2, 0.3]],
    "prediction_type": ["v_prediction", "sample", "flow_prediction"],
    "clip_sample": [True],
    "clip_sample_range": [0.5],
    "set_alpha_to_one": [True, False],
    "steps_offset": [0, 1, 3],
    "timestep_spacing": ["leading", "trailing", "linspace", "karras", "beta"],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.5],
    "sample_max_value": [0.5],
    "rescale_betas_zero_snr": [True],
    "variance_type": ["learned", "learned_range", "fixed_large"],
    "skip_prk_steps": [True],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_flow_sigmas": [True],
    "flow_shift": [3.0],
    "use_dynamic_shifting": [True],
    "time_shift_type": ["linear"],
    "interpolation_type": ["log_linear"],
    "sigma_min": [0.05],
    "sigma_max": [10.0],
    "timestep_type": ["continuous"],
    "final_sigmas_type": ["sigma_min"],
    "solver_order": [1, 2, 3],
    "algorithm_type": ["dpmsolver", "sde-dpmsolver", "sde-dpmsolver++", "deis"],
    "solver_type": ["heun", "midpoint", "logrho", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "euler_at_final": [True],
    "use_lu_lambdas": [True],
    "lambda_min_clipped": [-1.0],
    "predict_x0": [False],
    "disable_corrector": [[0, 1]],
    "solver_p": ["DDIMScheduler"],
    "shift_terminal": [0.1],
    "original_inference_steps": [25, 100],
    "timestep_scaling": [5.0],
    "shift": [3.0],
    "base_shift": [0.6],
    "max_shift": [1.3],
    "base_image_seq_len": [128],
    "max_image_seq_len": [2048],
    "invert_sigmas": [True],
    "stochastic_sampling": [True],
}
"""Values other than diffusers' default, by field."""

CASES = [
    (name, field, value) for name, fields in SCHEDULER_FIELDS.items() for field in fields for value in VALUES.get(field, [])
]
PAIRS: list[dict[str, Any]] = [
    {"timestep_spacing": spacing, **other}
    for spacing in ("leading", "trailing", "linspace")
    for other in (
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_exponential_sigmas": True, "use_beta_sigmas": True},
        {"use_beta_sigmas": True, "rescale_betas_zero_snr": True},
        {"use_beta_sigmas": True, "solver_order": 1},
        {"beta_schedule": "squaredcos_cap_v2", "use_beta_sigmas": True},
        {"beta_schedule": "squaredcos_cap_v2", "use_exponential_sigmas": True},
        {"steps_offset": 2},
        {"solver_order": 1},
        {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {"lower_order_final": False, "euler_at_final": True},
        {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
        {"num_train_timesteps": 100, "prediction_type": "v_prediction"},
    )
]
"""Combinations; every class gets those of their fields that it has."""


def scheduler_classes() -> list[str]:
    """Scheduler classes of the installed diffusers."""
    return sorted(
        name for name in dir(schedulers) if name.endswith("Scheduler") and inspect.isclass(getattr(schedulers, name, None))
    )


def signature(name: str) -> set[str]:
    return set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}


def test_every_class_and_every_field_of_the_installed_diffusers_has_a_rule() -> None:
    assert set(scheduler_classes()) == SCHEDULER_FIELDS.keys() | UNSUPPORTED_SCHEDULERS.keys()
    assert SCHEDULER_FIELDS.keys() == SCHEDULER_CLASS_TO_SOLVER.keys()
    assert SCHEDULER_FIELDS.keys() >= WITHOUT_EXACT_SOLVER
    for name, rules in SCHEDULER_FIELDS.items():
        assert set(rules) == signature(name), f"{name}: give every field of diffusers a rule in scheduler_fields.py"
        assert rules.keys() <= VALUES.keys(), f"{name}: give every field a value to try in this test"


def test_the_document_has_the_table_of_the_code() -> None:
    assert fields_table() in DOCUMENT.read_text(encoding="utf-8"), "paste the output of scheduler_fields.fields_table()"
    for name, reason in UNSUPPORTED_SCHEDULERS.items():
        assert f"| `{name}` | {reason} |" in DOCUMENT.read_text(encoding="utf-8")


def settings_of(folder: Path, config: dict[str, Any], **options: Any) -> SchedulerSettings:
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_scheduler(folder, epsilon_is_certain=False, **options)


def config_of(name: str, **values: Any) -> dict[str, Any]:
    betas = {} if name.startswith("Flow") else {**tiny_pipelines.BETAS, "prediction_type": "epsilon"}
    return {"_class_name": name, **betas, **values}


def assert_exact_or_named(tmp_path: Path, name: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the settings are said to equal the scheduler; then they do, and else a field is named with its value."""
    config = config_of(name, **values)
    try:
        settings = settings_of(tmp_path, config)
        problem = settings.solver_problem
    except ConfigError as error:
        problem = str(error)
    if problem:
        assert "\n" not in problem
        named = any(field in problem and str(value) in problem for field, value in config.items())
        assert named or "kind = " in problem, problem
        return False
    scheduler = getattr(diffusers, name).from_config({key: value for key, value in config.items() if key[0] != "_"})
    for num_steps in (1, 4, 5, 20):
        if settings.solver.timestep_spacing == "linspace" and (num_steps == 1 or name == "DDIMScheduler"):
            continue  # diffusers' mistakes, see test_solvers.py
        if settings.solver.timestep_spacing in ("karras", "exponential", "beta") and num_steps == 1:
            continue
        difference = trajectory_difference(settings, scheduler, num_steps, monkeypatch)
        assert difference < 1e-6, f"{name} {values}: {num_steps} steps differ by {difference:.1e}"
    return True


def trajectory_difference(
    settings: SchedulerSettings, scheduler: Any, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> float:
    """Relative difference of the final states, from the same noise."""
    schedule = NoiseSchedule.from_spec(settings.noise)
    if settings.noise.rescale_betas_zero_snr:  # diffusers ends at alpha = 2^-12 in some classes
        schedule = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy(), settings.noise.set_alpha_to_one)
    start, noises = start_and_noises(num_function_evaluations(settings.solver, num_steps))
    coefficients = solver_coefficients(settings.solver, num_steps, schedule)
    ours = run(coefficients, settings.prediction_type, network, start, noises)[-1]
    if schedule.is_flow:
        scheduler.set_timesteps(num_steps)
        theirs = start
        for timestep in scheduler.timesteps:
            theirs = scheduler.step(network(theirs, float(timestep)), timestep, theirs).prev_sample
    else:
        # The state of DPM-Solver in diffusers is not scaled, also where it equals our Euler solver.
        is_dpm = type(scheduler).__name__ == "DPMSolverMultistepScheduler"
        spec = SolverSpec(name="dpmsolver++2m") if is_dpm else settings.solver
        theirs = run_diffusers(scheduler, spec, num_steps, network, start, noises, monkeypatch)
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", SCHEDULER_FIELDS)
def test_no_field_is_read_over(name: str, tmp_path: Path, float64_diffusers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one value of every field, and for combinations, the solver equals diffusers', or the field is named."""
    combinations = [{}] + [{field: value} for owner, field, value in CASES if owner == name]
    combinations += [values for values in PAIRS if values.keys() <= signature(name)]
    if "rescale_betas_zero_snr" in signature(name):
        combinations += [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}]
        combinations = [values for values in combinations if values != {"rescale_betas_zero_snr": True}]
    if name == "EulerAncestralDiscreteScheduler":  # diffusers has no such combination
        combinations = [values for values in combinations if values.get("prediction_type") != "sample"]
    if name in ("DDIMScheduler", "DDPMScheduler"):
        combinations = [{"clip_sample": False, **values} for values in combinations]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = [assert_exact_or_named(tmp_path, name, values, monkeypatch) for values in combinations]
    assert any(exact) is (name not in WITHOUT_EXACT_SOLVER)


REFUSED_OWN: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "PNDMScheduler"}, "_class_name = PNDMScheduler: isocost does not have this solver"),
    ({"_class_name": "LMSDiscreteScheduler"}, "_class_name = LMSDiscreteScheduler"),
    ({"_class_name": "DEISMultistepScheduler"}, "_class_name = DEISMultistepScheduler"),
    ({"_class_name": "DPMSolverSinglestepScheduler"}, "_class_name = DPMSolverSinglestepScheduler"),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order = 3"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas = True"),
    ({"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min'"),
    ({"_class_name": "LCMScheduler", "original_inference_steps": 25}, "original_inference_steps = 25"),
    ({"_class_name": "EulerDiscreteScheduler", "of_a_later_version": 3}, "of_a_later_version = 3"),
    ({"thresholding": True}, "thresholding = True"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path_factory.mktemp("schedulers") / "base")


def with_scheduler(folder: Path, values: dict[str, Any]) -> Path:
    """The folder with another scheduler config."""
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(config_of(**{"name": "DDIMScheduler", "clip_sample": False} | values)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("values", "message"), REFUSED_OWN, ids=lambda value: value if isinstance(value, str) else None)
@pytest.mark.fast_cases(3)
def test_another_solver_is_used_only_on_request(
    folder: Path, values: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    changed = with_scheduler(folder, values)
    settings: dict[str, Any] = {"num_steps": 2, "num_images": 1, "guidance": 1.0}
    for own in (None, "own"):
        with pytest.raises(ConfigError, match=message) as caught:
            sample(changed, "a ring", solver=own, **settings)
        assert "or `nearest` for " in str(caught.value)
        assert "\n" not in str(caught.value)
    nearest = read_info(changed).nearest_solver
    with caplog.at_level(logging.WARNING, "isocost"):
        near = sample(changed, "a ring", solver="nearest", **settings)
    assert f"base: sampled with {nearest.label}" in caplog.text
    assert message in caplog.text
    assert np.array_equal(near.array, sample(changed, "a ring", solver=nearest, **settings).array)


def test_pipelines_of_stable_diffusion_switch_clipping_off_and_set_the_offset(folder: Path) -> None:
    info = read_info(with_scheduler(folder, {"clip_sample": True, "steps_offset": 0}))
    assert info.solver == SolverSpec(name="ddim", timestep_spacing="leading", steps_offset=1)


def study_of(folder: Path, *solvers: dict[str, Any]) -> StudySpec:
    plain = {
        "name": "published",
        "data": {"resolution": 16, "reference": {"kind": "scenes", "num_images": 64}},
        "checkpoints": [str(folder)],
        "sweep": {"solvers": list(solvers), "num_steps": [1], "guidance": [1]},
        "protocol": {"num_images": 32, "num_reference": 64, "num_bootstrap": 20},
    }
    return parse_spec(StudySpec, plain, "published")


def test_the_folders_own_scheduler_is_swept(folder: Path, tmp_path: Path) -> None:
    with_scheduler(folder, {"name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"})
    pipeline = Pipeline(study_of(folder, {"name": "own"}, {"name": "ddim"}), tmp_path / "out")
    (run_of_folder,) = pipeline.runs
    assert {point.spec.solver.label for point in pipeline.points(run_of_folder)} == {
        "sde-dpmsolver++2m/linspace",
        "ddim/trailing",
    }
    with_scheduler(folder, {"name": "PNDMScheduler"})
    pipeline = Pipeline(study_of(folder, {"name": "own"}), tmp_path / "own")
    with pytest.raises(ConfigError, match="PNDMScheduler"):
        pipeline.points(pipeline.runs[0])
    pipeline = Pipeline(study_of(folder, {"name": "nearest"}), tmp_path / "nearest")
    assert [point.spec.solver.label for point in pipeline.points(pipeline.runs[0])] == ["ddim/leading"]
    pipeline = Pipeline(study_of(folder, {"name": "own", "timestep_spacing": "leading"}), tmp_path / "spacing")
    with pytest.raises(ConfigError, match="solver own takes spacing and eta from the checkpoint"):
        pipeline.points(pipeline.runs[0])


@pytest.mark.slow
def test_the_table_and_the_page_name_the_scheduler_that_another_solver_replaces(
    folder: Path, tmp_path: Path, isocost: Any
) -> None:
    with_scheduler(folder, {"name": "PNDMScheduler"})
    out, file = tmp_path / "out", tmp_path / "study.yaml"
    file.write_text(dump_study(study_of(folder, {"name": "nearest"}, {"name": "euler"})))
    assert isocost("run", file, "--out", out, "--no-figures").status == 0
    table = pd.read_parquet(out / "table.parquet").set_index("solver")
    assert dict(table["replaced_scheduler"]) == {"ddim/leading": "PNDMScheduler", "euler/trailing": ""}
    sentence = "ddim/leading in place of PNDMScheduler"
    page = (out / "report" / "index.html").read_text()
    assert sentence in page.partition("<script")[0]
    assert '"title":"in place of"' in page
    assert sentence in (out / "report" / "summary.md").read_text()
    advice = isocost("recommend", out, "--budget-nfe", 1)
    is_ddim = advice.answer["configuration"]["solver"] == "ddim/leading"
    assert (advice.answer["configuration"]["replaced_scheduler"] == "PNDMScheduler") is is_ddim
    assert any("the checkpoint's own PNDMScheduler" in note for note in advice.answer["notes"]) is is_ddim
    file.write_text(dump_study(study_of(folder, {"name": "ddim", "timestep_spacing": "leading"})))
    assert isocost("run", file, "--out", tmp_path / "named", "--no-figures").status == 0
    assert "replaced_scheduler" not in pd.read_parquet(tmp_path / "named" / "table.parquet")
    images = isocost("sample", folder, "--prompt", "a", "--solver", "nearest", "--steps", 1, "--out", tmp_path / "images")
    assert (images.answer["solver"], images.answer["replaced_scheduler"]) == ("ddim/leading", "PNDMScheduler")


def test_an_entry_that_was_written_before_schedulers_were_checked_is_read_again(tmp_path: Path) -> None:
    folder = with_scheduler(
        tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "base"), {"name": "PNDMScheduler"}
    )
    pipeline = Pipeline(study_of(folder, {"name": "nearest"}), tmp_path / "out")
    (run_of_folder,) = pipeline.runs
    pipeline.train(run_of_folder)
    entry = pipeline.store.folder("checkpoint", run_of_folder.final)
    manifest = json.loads((entry / "isocost.json").read_text())
    for name in ("solver_problem", "scheduler"):
        del manifest["info"]["pretrained"][name]
    plain = {name: value for name, value in manifest.items() if not name.endswith("_sha256")}
    (entry / "isocost.json").write_text(json.dumps(plain))
    assert read_info(entry).replaced_scheduler(SolverSpec(name="nearest")) == "PNDMScheduler"
    with pytest.raises(ConfigError, match="PNDMScheduler"):
        sample(entry, "a ring", num_steps=1, num_images=1, guidance=1.0)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="of a version that did not check schedulers"):
        read_info(entry)


def test_own_is_a_solver_of_published_checkpoints_only(tmp_path: Path) -> None:
    from conftest import tiny_study

    with pytest.raises(ConfigError, match="unknown solver 'own'"):
        Pipeline(tiny_study(sweep={"solvers": [{"name": "own"}], "num_steps": [1], "guidance": [1]}), tmp_path / "out")


def test_the_nearest_schedule_of_a_refused_field_is_not_used(tmp_path: Path) -> None:
    for values, message in (
        ({"trained_betas": [0.1]}, r"trained_betas = \[0.1\]"),
        ({"num_train_timesteps": 10**9}, "num_timesteps = 1000000000"),
        ({"thresholding": "yes"}, "thresholding = 'yes': must be true or false"),
        ({"timestep_spacing": ["leading"]}, "timestep_spacing"),
        ({"beta_start": "small"}, "beta_start = 'small'"),
    ):
        with pytest.raises(ConfigError, match=message):
            settings_of(tmp_path, config_of("DDIMScheduler", **values))
