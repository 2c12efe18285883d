"""Export of a guided pair: the loop in its README gives the latents of isocost, and the guider the same guided steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionPipeline
from torch import Tensor

from conftest import Outcome
from isocost.config.sampling import SolverSpec
from isocost.diffusion.guidance import guidance_per_evaluation
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.philox import INITIAL_NOISE, philox_normal
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.autoencoder import load_autoencoder
from isocost.sampling.export_pair import export_pair, guider_fraction
from isocost.sampling.sample import sample
from test_latency import STUDENT, write_checkpoint

PROMPTS = ["a red circle on a white background", "two blue squares"]
SEED, NUM_STEPS = 5, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Networks with random weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "base": write_checkpoint(root / "base"),
        "small": write_checkpoint(root / "small", {"width": 4}),
        "epsilon": write_checkpoint(root / "epsilon", {"width": 4}, "epsilon"),
        "dit": write_checkpoint(root / "dit", {"kind": "dit", "width": 16}),
        "student": write_checkpoint(root / "student", {"guidance_embed_dim": 16}, **STUDENT),
        "flow": write_checkpoint(root / "flow", {"width": 4}, "flow_prediction"),
    }


def run_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the first block of code in the README, in its folder; return its names."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def latents_of_sample(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **settings: Any) -> Tensor:
    """The latents that `isocost sample` decodes."""
    autoencoder, decoded = load_autoencoder("scenes"), []
    decode = autoencoder.decode
    monkeypatch.setattr(autoencoder, "decode", lambda latents: decoded.append(latents.clone()) or decode(latents))
    monkeypatch.setattr("isocost.sampling.sample.load_checkpoint_autoencoder", lambda *_: autoencoder)
    sample(*arguments, num_steps=NUM_STEPS, num_images=1, seed=SEED, **settings)
    return decoded[-1][: len(PROMPTS)]


PAIRS = {
    "guide": ("base", "small", {}),
    "guide in an interval": ("base", "small", {"guidance_interval": (-3.0, 2.0)}),
    "guide with the empty prompt": ("base", "small", {"guide_null_prompt": True}),
    "scheduled guide": ("base", "small", {"guidance_schedule": ((-4.0, 1.0), (0.0, 3.0))}),
    "guide of another prediction type": ("base", "epsilon", {}),
    "own empty prompt in an interval": ("base", None, {"guidance_interval": (None, 2.0)}),
    "transformer guides a U-Net": ("base", "dit", {"guidance_interval": (-3.0, None)}),
    "U-Net guides a transformer": ("dit", "small", {}),
    "flow in an interval": ("flow", None, {"guidance_interval": (-1.0, None)}),
}


FAST = ("guide in an interval", "own empty prompt in an interval")


@pytest.mark.parametrize("case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in PAIRS])
@pytest.mark.fast_cases(1)
def test_the_loop_of_the_readme_gives_the_latents_of_sample(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    main, guide, settings = PAIRS[case]
    settings = {**settings, "guide": None if guide is None else folders[guide]}
    if "guidance_schedule" not in settings:
        settings["guidance"] = 2.0
    out = export_pair(folders[main], tmp_path / "pair", num_steps=NUM_STEPS, **settings)
    assert (out / "guide" / "model_index.json").is_file() is (guide is not None)
    ours = latents_of_sample(monkeypatch, folders[main], PROMPTS, **settings)
    names = run_readme(out, monkeypatch)
    assert (out / "0.png").is_file()
    noise = philox_normal(SEED, torch.arange(len(PROMPTS)), INITIAL_NOISE, (4, 8, 8), "cpu")
    theirs = names["sample"](PROMPTS, noise)
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(ours.abs().max())
    plain = latents_of_sample(monkeypatch, folders[main], PROMPTS, guidance=1.0)
    assert float((ours - plain).abs().max()) > 3e-3 * float(ours.abs().max()), "guidance changes the latents"


def test_the_guide_is_a_complete_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    out = export_pair(folders["base"], tmp_path / "pair", guide=folders["small"])
    pipelines = [StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True) for folder in (out, out / "guide")]
    assert [pipeline.unet.config.block_out_channels[0] for pipeline in pipelines] == [8, 4]


@pytest.mark.parametrize("num_steps", [1, 4, 7, 16, 100])
@pytest.mark.parametrize("interval", [(-3.0, 2.0), (None, 0.0), (-2.0, None)])
def test_the_guider_of_the_readme_guides_the_same_steps(
    folders: dict[str, Path], tmp_path: Path, interval: tuple[float | None, float | None], num_steps: int
) -> None:
    solver = solver_coefficients(SolverSpec(), num_steps, NoiseSchedule.scaled_linear())
    weights = guidance_per_evaluation(solver.alpha, solver.sigma, 2.5, interval)
    if num_steps in (4, 16) and interval == (-3.0, 2.0):
        out = export_pair(folders["base"], tmp_path / "pair", guidance=2.5, guidance_interval=interval, num_steps=num_steps)
        text = (out / "README.md").read_text(encoding="utf-8")
        assert f"with {num_steps} steps alone" in text
        (call,) = re.findall(r"ClassifierFreeGuidance\(.*\)", text)
        guider = eval(call, {"ClassifierFreeGuidance": ClassifierFreeGuidance})
    else:
        guided = [step for step, weight in enumerate(weights) if weight != 1] or [0]
        ends = (guided[0], guided[-1] + 1) if max(weights) > 1 else (0, 0)
        start, stop = (guider_fraction(step, num_steps) for step in ends)
        guider = ClassifierFreeGuidance(guidance_scale=2.5, start=start, stop=stop)
    assert guider.guidance_scale == 2.5
    for step, weight in enumerate(weights):
        guider.set_state(step, num_steps, torch.tensor(0))
        assert (guider.num_conditions == 2) == (weight != 1), step


def test_every_step_has_a_fraction() -> None:
    for num_steps in range(1, 1001):
        for step in {0, num_steps // 3, (29 * num_steps) // 100, num_steps - 1, num_steps}:
            assert int(guider_fraction(step, num_steps) * num_steps) == step
    assert guider_fraction(29, 100) == 0.2901
    assert guider_fraction(7, 7) == 1


def test_a_schedule_has_no_guider(folders: dict[str, Path], tmp_path: Path) -> None:
    out = export_pair(folders["base"], tmp_path / "pair", guidance_schedule=((-4.0, 1.0), (0.0, 3.0)))
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "they cannot express this schedule" in text
    assert "ClassifierFreeGuidance" not in text


MISTAKES: dict[str, tuple[str, list[str], str]] = {
    "itself": ("base", ["--guide", "base"], "a model cannot guide itself"),
    "a student as guide": ("base", ["--guide", "student"], "was trained with its guidance as an input"),
    "a student in an interval": ("student", ["--guidance-interval", "-3:2"], "guidance is an input of this student"),
    "another schedule": ("base", ["--guide", "flow"], "another noise schedule"),
    "no second pass": ("base", ["--guide", "small", "--guidance", "1"], "no evaluation takes a second pass"),
    "below 1": ("base", ["--guide", "small", "--guidance", "0.5"], "would lead to the images of the guide"),
    "outside": ("base", ["--guidance-interval", "20:30"], "goes from"),
    "absent": ("base", ["--guide", "absent"], "no such checkpoint folder"),
    "guidance alone": ("base", ["--guidance", "3"], "a pipeline takes it at each call"),
    "null prompt of no guide": ("base", ["--guide-null-prompt", "--guidance-interval", "-3:2"], "there is no guide"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folders: dict[str, Path], isocost: Any, tmp_path: Path, case: str
) -> None:
    main, words, message = MISTAKES[case]
    arguments = [folders.get(word, word) for word in words]
    outcome: Outcome = isocost("export", folders[main], tmp_path / "pair", *arguments)
    assert outcome.status == 2, outcome.err
    assert message in outcome.line
    assert not list(tmp_path.iterdir())


def test_the_folder_must_not_overlap_with_the_guide(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError):
        export_pair(folders["base"], folders["small"] / "pair", guide=folders["small"])
