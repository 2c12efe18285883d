"""`isocost drift`: how much images differ, whether a variant is worse, and its requests."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import assert_refused
from isocost.cli.options import read_prompts
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import KernelReference, generated_counts, kernel_resamples, percentile_interval
from isocost.evaluation.drift import ImagePairs, ScoreDifference, measure_pairs, score_difference
from isocost.evaluation.paired_images import paired_image_metric

CHECKPOINT = Path(__file__).parents[1] / "docs/reference/artefacts/checkpoint/caabdccc783d484b"
KERNEL = "mmd_efficientnet"
NUM_IMAGES, WIDTH = 200, 8


def judge(seed: int, gain: float, tolerance: float) -> ScoreDifference:
    """A base whose features are shifted by 1.2 along one axis, and a variant that is shifted by `gain` more or less."""
    generator = np.random.default_rng(seed)
    reference = KernelReference.of(generator.standard_normal((300, WIDTH)), num_bootstrap=200, seed=seed)
    counts = generated_counts(NUM_IMAGES, 200, seed)
    shared = generator.standard_normal((NUM_IMAGES, WIDTH))
    sides = []
    for shift in (1.2, 1.2 + gain):
        features = shared + 0.1 * generator.standard_normal((NUM_IMAGES, WIDTH))
        features[:, 0] += shift
        resamples = kernel_resamples(features, counts, reference)
        sides.append((percentile_interval(resamples), resamples))
    return score_difference(KERNEL, *sides, tolerance=tolerance, num_metrics=1, num_images=NUM_IMAGES)


def write_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_equal_variants_are_called_worse_in_at_most_five_percent() -> None:
    verdicts = [judge(seed, 0.0, 0.0).verdict for seed in range(200)]
    assert verdicts.count("worse") <= 10
    assert verdicts.count("not worse") <= 10, "with no tolerance at all, equal scores cannot be shown to be not worse"


def test_a_worse_variant_is_found_and_an_equal_one_within_the_tolerance_is_cleared() -> None:
    assert sum(judge(seed, 0.15, 0.05).verdict == "worse" for seed in range(40)) >= 36
    assert sum(judge(seed, 0.0, 0.3).verdict == "not worse" for seed in range(40)) >= 36
    assert sum(judge(seed, -0.15, 0.05).verdict == "not worse" for seed in range(40)) >= 36, "a better variant is not worse"


def test_an_undecided_verdict_says_how_many_pairs_decide_it() -> None:
    undecided = [found for seed in range(40) if (found := judge(seed, 0.03, 0.05)).verdict == "undecided"]
    assert undecided
    for found in undecided:
        assert found.num_images is not None
        assert found.num_images > NUM_IMAGES
        error = (found.difference.high - found.difference.value) / 1.95996
        needed = (1.95996 + 0.84162) * error / abs(found.loss.value - found.tolerance)
        assert found.num_images == pytest.approx(NUM_IMAGES * needed**2, rel=1e-3, abs=1)


def test_the_level_is_divided_among_several_metrics() -> None:
    resamples = np.concatenate([[0.0], np.random.default_rng(0).standard_normal(1000)])
    base = percentile_interval(resamples + 10), resamples * 0 + 10
    widths = []
    for num_metrics in (1, 5):
        variant = percentile_interval(resamples + 10), resamples + 10
        found = score_difference(KERNEL, base, variant, tolerance=0, num_metrics=num_metrics, num_images=100)
        widths.append(found.difference.high - found.difference.value)
    assert widths[1] / widths[0] == pytest.approx(2.5758 / 1.9600, rel=1e-3)


def functions(*names: str) -> dict[str, Any]:
    return {name: paired_image_metric(name, None).function for name in names}


# --- images -----------------------------------------------------------------------------------------------------------


def test_differences_of_images_are_counted_by_pair(tmp_path: Path, images: np.ndarray) -> None:
    changed = images.copy()
    changed[3, 0, 0, 0] ^= 8
    changed[7, :, :, 1] = 255 - changed[7, :, :, 1]
    pairs = ImagePairs.read(str(write_images(tmp_path / "a", images)), str(write_images(tmp_path / "b", changed)))
    found = measure_pairs(pairs, {}, functions("psnr", "ssim")).images
    assert (found.num_images, found.num_equal, found.verdict) == (40, 38, "different")
    error = np.abs(images.astype(int) - changed.astype(int))
    assert found.max_grey_levels == error.max()
    assert found.mean_grey_levels == pytest.approx(error.mean())
    psnr = [10 * math.log10(255**2 / np.square(error[index]).mean()) for index in (3, 7)]
    assert found.similarity["psnr"].value == pytest.approx(np.mean(psnr))
    assert found.most_different == ("7", "3")


def test_one_grey_level_is_the_same_and_no_difference_is_identical(tmp_path: Path, images: np.ndarray) -> None:
    base = str(write_images(tmp_path / "a", images))
    assert measure_pairs(ImagePairs.read(base, base), {}, functions("psnr")).images.verdict == "identical"
    close = np.where(images < 255, images + 1, images).astype(np.uint8)
    pairs = ImagePairs.read(base, str(write_images(tmp_path / "b", close)))
    assert measure_pairs(pairs, {}, functions("psnr")).images.verdict == "same"


def test_images_without_counterpart_or_of_another_size_are_refused(tmp_path: Path, images: np.ndarray, isocost: Any) -> None:
    base, fewer = (write_images(tmp_path / name, part) for name, part in (("a", images), ("b", images[:30])))
    other = write_images(tmp_path / "c", images[:, :16, :16])
    request = ("drift", "--image-metric", "psnr", base)
    assert_refused(isocost(*request, fewer), f"{fewer}: 10 images of the other side are missing; the first is 30")
    assert_refused(isocost(*request, other), "16 x 16 pixels, but")
    assert_refused(isocost(*request, base), "base and variant are the same")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def drift(tmp_path: Path, isocost: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `isocost drift` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: isocost("drift", *arguments)


def test_a_trained_checkpoint_with_too_few_steps_is_worse_and_bf16_is_not(tmp_path: Path, drift: Any) -> None:
    model = [CHECKPOINT, "--prompt", "a coat", "--prompt", "a sandal", "--num-images", 32, "--image-metric", "psnr"]
    real = drift(*model, "--base-set", "num_steps=16", "--set", "seed=5", "--variant-set", "num_steps=15", "--out", "real")
    assert real.status == 0, real.err
    scored = [*model, "--reference", "real/base", "--tolerance", "0.5"]
    judged = [*scored, "--base-set", "num_steps=2"]
    worse = drift(*judged, "--variant-set", "num_steps=1", "--out", "steps", "--markdown", "pr.md")
    assert (worse.status, worse.answer["verdict"]) == (3, "different, worse"), worse.err
    assert (tmp_path / "pr.md").read_text().startswith("### Drift: different, worse\n")
    assert Image.open(tmp_path / "steps/most-different.png").size[0] == 3 * 128 + 2 * 4
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "steps/variant").iterdir()}
    assert len(before) == 64
    again = drift(*judged, "--variant-set", "num_steps=1", "--out", "steps")
    assert (again.status, again.answer["scores"]) == (3, worse.answer["scores"])
    assert before == {file: file.stat().st_mtime_ns for file in before}, "nothing is sampled twice"
    both = [*scored, "--set", "num_steps=2", "--variant-set", "dtype=bf16", "--out", "dtype"]
    cleared = drift(*both)
    assert (cleared.status, cleared.answer["verdict"]) == (0, "different, not worse"), cleared.err
    refused = drift(*both, "--set", "guidance=3")
    assert_refused(refused, "has images of another model, other settings or prompts (changed: guidance); give a new folder")


def test_batch_sizes_of_the_engine_are_compared(drift: Any) -> None:
    arguments = (CHECKPOINT, "--batch-invariance", "--prompt", "a bag", "--set", "num_steps=2", "--image-metric", "psnr")
    assert_refused(drift(*arguments, "--num-images", 7, "--out", "out"), "give prompts for 8 images or more")
    compared = drift(*arguments, "--num-images", 9, "--out", "out")
    assert compared.status == 0, compared.err
    assert compared.answer["images"]["verdict"] in ("identical", "same")


ENGINE = """
import numpy as np
def generate(prompts, seeds, brightness=0):
    values = [len(prompt) + seed % 7 + brightness for prompt, seed in zip(prompts, seeds)]
    return np.stack([np.full((16, 16, 3), value, np.uint8) for value in values])
def wrong(prompts, seeds):
    return np.zeros((len(prompts), 16, 16))
def fails(prompts, seeds):
    raise KeyError("weights")
def transparent(prompts, seeds):
    from PIL import Image
    return [Image.new("RGBA", (16, 16)) for _ in prompts]
def empty(prompts, seeds):
    return np.zeros((len(prompts), 0, 0, 3), np.uint8)
constant = 3
"""


def test_a_function_of_the_user_makes_images_and_its_mistakes_are_one_line(
    tmp_path: Path, drift: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "drift_engine.py").write_text(ENGINE)
    (tmp_path / "prompts.txt").write_text("a\nbb\n\nccc\n")
    plain = ["--prompts", "prompts.txt", "--num-images", 30, "--image-metric", "psnr"]
    made = drift("python:drift_engine:generate", "--variant-set", "brightness=5", *plain, "--out", "out")
    assert made.status == 0, made.err
    assert made.answer["images"]["max_grey_levels"] == 5
    assert np.asarray(Image.open(tmp_path / "out/base/31.png"))[0, 0, 0] == 2 + 31 % 7, "image 31: second prompt, seed 31"
    (tmp_path / "drift_broken.py").write_text("def generate(:\n")
    for number, (name, message) in enumerate(
        {
            "drift_engine:missing": "cannot be imported (AttributeError: module 'drift_engine' has no attribute 'missing'",
            "nowhere:generate": "cannot be imported (No module named 'nowhere')",
            "drift_broken:generate": "cannot be imported (SyntaxError",
            "drift_engine:constant": "is int, not a function",
            "drift_engine:wrong": "returned float64 [64, 16, 16]; return PIL images, or uint8 [N, H, W, 3]",
            "drift_engine:transparent": "returned images in mode RGBA; convert them to RGB",
            "drift_engine:empty": "returned [64, 0, 0, 3] for 64 prompts",
            "drift_engine": "give python:MODULE:FUNCTION",
        }.items()
    ):
        assert_refused(drift(f"python:{name}", "python:drift_engine:generate", *plain, "--out", f"out{number}"), message)
    failed = drift("python:drift_engine:fails", "python:drift_engine:generate", *plain, "--out", "failed")
    assert failed.status == 1
    assert "python:drift_engine:fails: failed (KeyError: 'weights', drift_engine.py:9)" in failed.line
    for setting, message in (
        ("colour=5", "does not take prompts, seeds and these settings (got an unexpected keyword argument 'colour')"),
        ("seed=1.5", "seed = 1.5: give a whole number, 0 or more"),
    ):
        refused = drift("python:drift_engine:generate", "--variant-set", setting, *plain, "--out", "settings")
        assert_refused(refused, message)
    assert not (tmp_path / "settings").exists(), "requests are checked before a model runs"


def test_an_edited_function_makes_new_images(tmp_path: Path, drift: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "drift_edited.py"
    file.write_text(ENGINE)
    request = ("python:drift_edited:generate", "--variant-set", "brightness=5", "--prompt", "a", "--image-metric", "psnr")
    assert drift(*request, "--out", "out").status == 0
    file.write_text(ENGINE.replace("% 7", "% 5"))
    assert_refused(drift(*request, "--out", "out"), "(changed: source); give a new folder (--out)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("CKPT --variant-set dtype=bf16 --out o", "the base is a model and needs prompts; give --prompt TEXT or --prompts"),
        ("CKPT --variant-set dtype=bf16 --prompt a", "a model needs a folder for its images; give --out FOLDER"),
        ("CKPT --variant-set dtype=int8 --prompt a --out o", "settings: dtype = 'int8'"),
        ("CKPT --variant-set steps=3 --prompt a --out o", "settings: steps"),
        ("CKPT --variant-set dtype --prompt a --out o", "dtype: give KEY=VALUE, such as dtype=bf16"),
        ("CKPT --variant-set dtype=bf16 --prompt a --prompts f --out o", "give --prompt or --prompts, not both"),
        ("CKPT --variant-set dtype=bf16 --prompts f --out o", "--prompts f: no such file"),
        ("CKPT --variant-set dtype=bf16 --prompt a --out o --image-metric mse", "--image-metric mse: give one of"),
        ("CKPT --variant-set dtype=bf16 --prompt a --out o --tolerance 1", "are for scores; give --reference too"),
        ("CKPT --variant-set dtype=bf16 --prompt a --out o --reference r --tolerance -1", "tolerance -1: give a finite number"),
        (
            "CKPT --variant-set dtype=bf16 --prompt a --out o --reference r --tolerance inf",
            "tolerance inf: give a finite number",
        ),
        ("CKPT --variant-set dtype=bf16 --prompt a --out o --reference r --protocol nope", "protocol 'nope': choose one of"),
        ("CKPT --variant-set dtype=bf16 --prompt a --out o --reference r", "r: no such folder of images"),
        ("CKPT --variant-set solver=eulr --prompt a --out o", "unknown solver 'eulr'; did you mean euler"),
        ("CKPT --variant-set vae.tile_size=64 --prompt a --out o", "vae.tile_size"),
        ("CKPT --variant-set guide=CKPT --prompt a --out o", "a model cannot guide itself"),
        ("CKPT --variant-set guide_null_prompt=true --prompt a --out o", "guide_null_prompt: there is no guide"),
        ("CKPT --set solver.name=euler --variant-set solver=ddim --prompt a --out o", "solver already has a value"),
        ("CKPT --set solver=euler --variant-set solver.name=ddim --prompt a --out o", "solver already has a value"),
        ("CKPT CKPT --batch-invariance --prompt a --out o", "compares a checkpoint with itself; give one checkpoint"),
        ("nowhere/model CKPT --prompt a --out o", "nowhere/model"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: str, message: str, tmp_path: Path, drift: Any) -> None:
    assert_refused(drift(*arguments.replace("CKPT", str(CHECKPOINT)).split()), message)
    assert not list(tmp_path.glob("o/*"))


def test_settings_of_both_sides_and_of_one_are_joined(tmp_path: Path, drift: Any) -> None:
    request = (CHECKPOINT, "--prompt", "a", "--set", "solver.name=dpmsolver++2m", "--set", "num_steps=2", "--out", "out")
    joined = drift(*request, "--variant-set", "solver.timestep_spacing=leading", "--image-metric", "psnr")
    assert joined.status == 0, joined.err
    record = json.loads((tmp_path / "out/variant.json").read_text())["model"]["solver"]
    assert record == {"name": "dpmsolver++2m", "timestep_spacing": "leading"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", 'prompt\n"two\nlines"\n', None),
        ("p.CSV", "id,prompt\n1,a cat\n", None),
        ("p.txt", "a\u2028b\n", None),
        ("p.csv", 'prompt\na\n""\n', "line 3 has an empty prompt"),
        ("p.csv", "caption\na\n", "has no column prompt"),
        ("p.csv", f"prompt\n{'x' * 200_000}\n", "line 1: field larger than field limit"),
        ("p.json", "[]", "give a .txt file with one prompt per line"),
        ("p.txt", "\n\n", "has no prompts"),
    ],
)
def test_prompts_are_read_as_they_are(name: str, text: str, message: str | None, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8", newline="")
    if message is None:
        assert read_prompts(None, file) == [{"p.csv": "two\nlines", "p.CSV": "a cat", "p.txt": "a\u2028b"}[name]]
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_prompts(None, file)


def test_files_of_the_user_are_not_overwritten(tmp_path: Path, images: np.ndarray, drift: Any) -> None:
    base, variant = (write_images(tmp_path / name, part) for name, part in (("a", images), ("b", images[::-1])))
    plain = ("--image-metric", "psnr")
    assert_refused(drift(base, variant, *plain, "--out", base), "itself; give another folder")
    (tmp_path / "p.md").write_text("mine")
    request = (CHECKPOINT, "--variant-set", "dtype=bf16", "--prompts", "p.md", "--markdown", "p.md", "--out", "o")
    assert_refused(drift(*request), "--prompts p.md: give a .txt file")
    assert (tmp_path / "p.md").read_text() == "mine"
    assert drift(base, variant, *plain, "--out", "o").status == 0
    assert (tmp_path / "o/most-different.png").is_file()
    same = write_images(tmp_path / "c", images)
    assert drift(base, same, *plain, "--out", "o").answer["verdict"] == "identical"
    assert not (tmp_path / "o/most-different.png").exists(), "no sheet of another comparison stays"
    assert_refused(drift(base, variant, *plain, "--prompt", "a"), "both sides are images, so no prompts are needed")


def test_a_damaged_record_and_empty_sources_are_one_line(tmp_path: Path, images: np.ndarray, drift: Any) -> None:
    request = (CHECKPOINT, "--variant-set", "dtype=bf16", "--prompt", "a", "--set", "num_steps=1", "--image-metric", "psnr")
    assert drift(*request, "--out", "o").status == 0
    (tmp_path / "o/base.json").write_text("{")
    assert_refused(drift(*request, "--out", "o"), "base.json: is damaged; remove it and o/base")
    (tmp_path / "empty").mkdir()
    folder = write_images(tmp_path / "a", images)
    assert_refused(drift("empty", folder, "--image-metric", "psnr"), "empty: has no images")
    assert_refused(drift("", folder), "the name of a side is empty")
    np.save(tmp_path / "none.npy", np.zeros((3, 0, 8, 3), np.uint8))
    np.save(tmp_path / "none2.npy", np.zeros((3, 0, 8, 3), np.uint8))
    assert_refused(drift("none.npy", "none2.npy", "--image-metric", "psnr"), "has no pixels")


def test_images_take_no_settings(tmp_path: Path, images: np.ndarray, drift: Any) -> None:
    folder = write_images(tmp_path / "a", images)
    assert_refused(drift(folder, "--variant-set", "num_steps=4"), "takes no settings; leave out num_steps")


def test_too_few_images_are_not_scored(tmp_path: Path, images: np.ndarray, drift: Any) -> None:
    base, variant = (write_images(tmp_path / name, part) for name, part in (("a", images[:9]), ("b", images[1:10])))
    request = (base, variant, "--reference", base, "--image-metric", "psnr")
    assert_refused(drift(*request), "a score needs at least 32; leave out --reference")


def test_given_timesteps_are_those_of_the_spacing(drift: Any) -> None:
    model = (CHECKPOINT, "--prompt", "a bag", "--num-images", 3, "--image-metric", "psnr", "--out", "out")
    same = ("--base-set", "num_steps=2", "--variant-set", "solver={name: ddim, timesteps: [999, 499]}")
    assert drift(*model, *same).answer["verdict"] == "identical"
