"""Super-resolution: inputs of the network, a complete study, tiles, and errors in one line."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import plain_study, tiny_study
from finished_study import PARTS, finished_spec, with_part
from interruptions import stop_twice
from isocost.cli import main
from isocost.config.model import ModelSpec
from isocost.config.sampling import SolverSpec
from isocost.config.study import StudySpec
from isocost.data.degradations import degrade, encode_enlarged, resize
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError, RunError
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features
from isocost.evaluation.paired import paired_differences
from isocost.evaluation.reference_set import ReferenceSet
from isocost.experiments.base import Experiment, TrainingRun
from isocost.metrics.image_similarity import psnr, ssim
from isocost.models.checkpoint import load_checkpoint
from isocost.models.unet import build_unet, expand_unet_in_channels
from isocost.pipeline.dry_run import plan
from isocost.pipeline.merge import archive, merge
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.report.report_data import rebuild
from isocost.sampling.engine import Engine
from isocost.sampling.request import SampleRequest
from isocost.sampling.tiling import Tiling
from isocost.sampling.upscale import upscale
from isocost.sweep import image_shards as shards
from isocost.sweep.schema import HARDWARE_COLUMNS
from isocost.training.objectives import Superres


def superres_study(**changes: Any) -> StudySpec:
    """The finished study with super-resolution, without students and its other experiments."""
    return with_part("superres", **{"distill": None, **changes})


@pytest.fixture(scope="module")
def finished(finished_copy: Path) -> Pipeline:
    return Pipeline(superres_study(), finished_copy)


@pytest.mark.slow
def test_without_checkpoints_only_unscored_trainings_and_their_parents_are_trained(finished: Pipeline, tmp_path: Path) -> None:
    archive(finished.out, tmp_path / "archive", checkpoint_mib=0.0001)
    merge(tmp_path / "out", [tmp_path / "archive"])

    def images_to_train(study: StudySpec) -> list[int]:
        return [size["images_to_train"] for size in plan(Pipeline(study, tmp_path / "out"))["sizes"]]

    assert images_to_train(superres_study()) == [0, 0, 0]
    sweep = {"num_steps": [1, 2, 4], "batch_size": 16, "snapshot_num_steps": 2}
    assert images_to_train(superres_study(sweep=sweep)) == [64, 64, 64]
    assert images_to_train(superres_study(sweep=sweep, starts=["scratch"])) == [0, 64]


@pytest.mark.slow
def test_the_pages_of_every_experiment_are_rebuilt_byte_by_byte(finished: Pipeline, tmp_path: Path) -> None:
    archive(finished.out, tmp_path)
    rebuild(tmp_path, figure_formats=())
    pages = [page.relative_to(finished.out) for page in (finished.out / "report").rglob("index.html")]
    assert len(pages) == 6
    for page in pages:
        assert (tmp_path / page).read_bytes() == (finished.out / page).read_bytes()


def runs_of(pipeline: Pipeline) -> tuple[Experiment, list[TrainingRun]]:
    experiment = pipeline.experiments["superres"]
    return experiment, experiment.runs


# --- the network and its inputs ---


@pytest.mark.parametrize("width", [8, 64])
def test_extra_input_channels_do_not_change_the_initial_output(width: int) -> None:
    model = ModelSpec(width=width, latent_channels=4, latent_size=8, cross_attention_dim=16)
    torch.manual_seed(0)
    parent = build_unet(model).eval()
    torch.manual_seed(0)
    child = expand_unet_in_channels(build_unet(model).eval(), 4)
    assert child.config.in_channels == 8
    x, concat_cond, states = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = parent(x, torch.tensor([1, 500, 999]), states).sample
        output = child(torch.cat([x, concat_cond], dim=1), torch.tensor([1, 500, 999]), states).sample
    assert torch.equal(output, expected)
    assert set(child.state_dict()) == set(build_unet(model.model_copy(update={"extra_input_channels": 4})).state_dict())


def test_the_first_forward_pass_equals_the_parents(finished: Pipeline) -> None:
    experiment, (run, _) = runs_of(finished)
    parent = load_checkpoint(finished.store.folder("checkpoint", finished.runs[0].final)).network
    network = experiment.network(run).eval()
    task = experiment.objective(run, network)
    batch = task.batch(0, range(8), torch.device("cpu"))
    with torch.no_grad():
        output = network(batch.noisy, batch.timesteps, batch.prompt_embeds).sample
        expected = parent(batch.noisy[:, :4], batch.timesteps, batch.prompt_embeds).sample
    assert torch.equal(output, expected)


def test_each_training_image_is_conditioned_on_its_own_degraded_image(tmp_path: Path) -> None:
    """With an autoencoder of matrix products, which gives an image the same bits in every batch."""
    pca = plain_study()["autoencoder"]
    study = finished_spec("superres", autoencoder=pca, superres={**PARTS["superres"], "starts": ["scratch"], "distill": None})
    pipeline = Pipeline(study, tmp_path / "out")
    pipeline.prepare()
    experiment, (run,) = runs_of(pipeline)
    assets = pipeline.assets
    task = experiment.objective(run, experiment.network(run))
    assert isinstance(task, Superres)
    cache = assets.load_or_build_latent_cache()
    num_images = len(cache)
    ids, passes = torch.tensor([5, 7]), torch.tensor([0, 3])
    images = assets.images("train").images[ids]
    spec = study.superres
    assert spec is not None
    low = degrade(images, ids.tolist(), spec.degradation, 4, seed=0, draws=passes.tolist())
    assert torch.equal(task.low_resolution(ids, passes), encode_enlarged(assets.load_or_train_autoencoder(), low, 32))
    # The second epoch degrades the images differently; a part of a batch equals the same part of the full batch.
    first, later = (task.batch(seen, range(16), torch.device("cpu")).noisy for seen in (0, num_images))
    assert not torch.equal(first[:, 4:], later[:, 4:])
    assert torch.equal(task.batch(0, range(4, 9), torch.device("cpu")).noisy, first[4:9])
    assert torch.equal(
        task.batch(0, range(16), torch.device("cpu")).prompt_embeds[0],
        cache.prompt_embeds(torch.tensor([cache.null_caption]))[0],
    )


def test_captions_of_the_data_set_are_used_on_request(tmp_path: Path) -> None:
    pipeline = Pipeline(superres_study(captions="dataset", starts=["scratch"]), tmp_path / "out")
    experiment, (run,) = runs_of(pipeline)
    pipeline.prepare()
    states = experiment.objective(run, experiment.network(run)).batch(0, range(16), torch.device("cpu")).prompt_embeds
    assert len(torch.unique(states.flatten(1), dim=0)) > 8
    assert len(set(experiment.reference.prompts)) > 8


# --- the engine ---


def test_the_network_gets_the_second_input_of_each_image() -> None:
    concat_cond = torch.arange(40.0)[:, None, None, None].expand(-1, 2, 4, 4)
    initial_noise = -torch.arange(40.0)[:, None, None, None].expand(-1, 3, 4, 4)
    seen: list[Tensor] = []

    def denoise(x: Tensor, timesteps: Tensor, states: Tensor, guidance: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x[:, :3])

    states = torch.zeros(1, 2, 5)
    engine = Engine(
        denoise,
        "epsilon",
        lambda i: states[[0] * len(i)],
        states[0],
        (3, 4, 4),
        4,
        concat_cond=lambda i: concat_cond[i],
        initial_noise=lambda i: initial_noise[i],
    )
    coefficients = solver_coefficients(SolverSpec(), 2, NoiseSchedule.scaled_linear())
    requests = [SampleRequest(i, 0, coefficients, (1.0, 3.0)[i % 2]) for i in range(40)]
    assert len(list(engine.run(requests))) == 40
    inputs = torch.cat(seen).flatten(2)
    inputs = inputs[inputs[:, 0].any(1) | inputs[:, 3].any(1)]  # without empty slots
    first_steps = inputs[inputs[:, 0, 0] == -inputs[:, 3, 0]]
    assert set(first_steps[:, 3, 0].tolist()) == set(range(1, 40))
    assert (inputs[:, 3:] == inputs[:, 3:4, :1]).all()


# --- a complete study ---


def test_the_results_database_has_both_tasks_and_each_has_its_own_table(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-superres.parquet")
    assert set(table["task"]) == {"superres"}
    assert set(table["size"]) == {"0.8M", "0.8M from scratch"}
    assert len(table[table["is_final"]]) == 4
    assert len(table) == 6
    assert (table["guidance"] == 1).all()
    assert (table["nfe"] == table["num_steps"]).all()
    assert set(pd.read_parquet(finished.out / "table.parquet")["task"]) == {"text2image"}
    assert {"psnr", "psnr_low", "ssim", "mmd_efficientnet", "frechet_efficientnet"} <= set(table.columns)
    assert (table["images_seen"].isin([32, 64])).all()


def test_paired_scores_are_those_of_the_saved_images(finished: Pipeline) -> None:
    """The saved images of a point and their originals, scored again by the metrics themselves."""
    experiment, (run, _) = runs_of(finished)
    point = experiment.jobs(run)[-1].points[0]
    folder = finished.store.folder("point", point.digest)
    scores = read_sample_features(folder, ("efficientnet-lite0",)).paired_metrics
    originals = finished.assets.images("reference").images[experiment.saved_indices]
    saved = torch.from_numpy(shards.read_images(folder)).permute(0, 3, 1, 2)
    assert np.allclose(scores["psnr"][experiment.saved_indices], psnr(saved.numpy(), originals.numpy()))
    assert np.allclose(scores["ssim"][experiment.saved_indices], ssim(saved, originals))


def test_bicubic_and_the_autoencoder_are_scored_by_the_same_protocol(finished: Pipeline) -> None:
    experiment, _ = runs_of(finished)
    baselines = experiment.baselines
    spec = finished.study.superres
    assert spec is not None
    originals = finished.assets.images("reference").images[:32]
    low = degrade(originals, range(32), spec.degradation, 4, seed=0)
    assert baselines["bicubic"]["psnr"] == pytest.approx(float(psnr(resize(low, 32).numpy(), originals.numpy()).mean()))
    assert baselines["decoded"]["psnr"] > baselines["bicubic"]["psnr"]


def test_the_reports_link_to_each_other_and_show_comparison_rows(finished: Pipeline) -> None:
    page = (finished.out / "report" / "superres" / "index.html").read_text()
    for words in ("low resolution", "bicubic", "truth", "0.8M from scratch", "minus bicubic", "../index.html", "PSNR"):
        assert words in page
    assert "fewer than two sizes have scores before and after fine-tuning" in page
    assert "superres/index.html" in (finished.out / "report" / "index.html").read_text()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_table(finished: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the fine-tuning, then in its sweep; the same command resumes each time."""
    out = tmp_path / "out"
    study = superres_study()
    stop_twice(study, out, monkeypatch, at_step=7, at_record=3)  # the family takes four steps; the sixth step saves a state
    pipeline = Pipeline(study, out)
    assert pipeline.run()
    report(pipeline)
    assert (out / "report" / "superres" / "figures" / "inputs_outputs.png").is_file()
    left, right = (
        pd.read_parquet(run.out / "table-superres.parquet").drop(columns=HARDWARE_COLUMNS).dropna(axis="columns", how="all")
        for run in (finished, pipeline)
    )
    pd.testing.assert_frame_equal(left, right)


def test_superres_can_be_added_to_a_finished_study(finished: Pipeline, tmp_path: Path) -> None:
    shutil.copytree(finished.out, tmp_path / "out")
    (tmp_path / "out" / "study.yaml").write_text("\n".join((finished.out / "study.yaml").read_text().split("superres:")[:1]))
    assert plan(Pipeline(superres_study(), tmp_path / "out"))["sizes"][1]["points_to_make"] == 0
    with pytest.raises(ConfigError, match=r"superres.scale = 4, but the study has 2"):
        Pipeline(superres_study(scale=2), finished.out)


def test_paired_differences_need_the_same_images() -> None:
    with pytest.raises(ValueError, match="the same sample indices"):
        paired_differences(SampleFeatures({}, ids=np.array([0])), SampleFeatures({}, ids=np.array([1])), None, ())  # type: ignore[arg-type]


# --- tiles ---


@pytest.mark.parametrize(("height", "width", "overlap"), [(32, 32, 8), (96, 64, 8), (100, 36, 16), (64, 32, 0)])
def test_tiles_cover_the_image_overlap_and_join_to_the_same_image(height: int, width: int, overlap: int) -> None:
    tiling = Tiling.from_size(height, width, 32, overlap, 4)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    assert torch.equal(tiling.join(tiling.cut(image)), image)
    for axis, length in ((0, height), (1, width)):
        offsets = sorted({corner[axis] for corner in tiling.corners})
        assert offsets[0] == 0
        assert offsets[-1] == length - 32
        assert all(offset % 4 == 0 for offset in offsets)
        assert all(later - earlier <= 32 - overlap for earlier, later in pairwise(offsets))
    latents = torch.randn(4, height // 4, width // 4)
    assert torch.equal(tiling.cut(latents, 4)[-1], latents[:, -8:, -8:])


def test_overlapping_tiles_are_blended() -> None:
    tiling = Tiling.from_size(32, 56, 32, 8, 4)
    joined = tiling.join([torch.zeros(1, 32, 32, dtype=torch.uint8), torch.full((1, 32, 32), 200, dtype=torch.uint8)])[0, 16]
    assert (joined[:24] == 0).all()
    assert (joined[32:] == 200).all()
    assert (joined[24:32].diff() > 0).all()


def checkpoint_of(pipeline: Pipeline, run_index: int = 0) -> Path:
    return pipeline.store.folder("checkpoint", runs_of(pipeline)[1][run_index].final)


@pytest.mark.parametrize(("height", "width", "num_tiles"), [(8, 8, 1), (5, 7, 1), (9, 23, 8), (20, 14, 6)])
@pytest.mark.fast_cases(2)
def test_any_size_is_upscaled(finished: Pipeline, height: int, width: int, num_tiles: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    result = upscale(checkpoint_of(finished), image, num_steps=2)
    assert result.image.shape == (4 * height, 4 * width, 3)
    assert result.num_tiles == num_tiles
    assert result.nfe == 2


def test_one_tile_equals_the_sweeps_image(finished: Pipeline) -> None:
    """Sample 0 of a point has the same initial noise as an upscaled image of one tile."""
    experiment, (run, _) = runs_of(finished)
    point = next(point for point in experiment.jobs(run)[-1].points if point.spec.num_steps == 2)
    swept = shards.read_images(finished.store.folder("point", point.digest))[experiment.saved_indices.index(0)]
    result = upscale(checkpoint_of(finished), experiment.low[0].permute(1, 2, 0).numpy(), num_steps=2)  # type: ignore[attr-defined]
    assert np.abs(result.image.astype(int) - swept).max() <= 1


def test_upscale_writes_the_file(
    finished: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (11, 9), 90).save(tmp_path / "small.png")
    command = [
        "isocost",
        "upscale",
        str(checkpoint_of(finished)),
        str(tmp_path / "small.png"),
        str(tmp_path / "large.png"),
        "--steps",
        "1",
    ]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["height"] == 36
    assert Image.open(tmp_path / "large.png").size == (44, 36)


# --- errors ---


def test_errors_are_one_line(finished: Pipeline, tmp_path: Path) -> None:
    tuned, plain = checkpoint_of(finished), finished.store.folder("checkpoint", finished.runs[0].final)
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    with pytest.raises(ConfigError, match="trained for text2image"):
        upscale(plain, image)
    with pytest.raises(ConfigError, match="no such image"):
        upscale(tuned, tmp_path / "absent.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(ConfigError, match="the image cannot be read"):
        upscale(tuned, tmp_path / "broken.png")
    with pytest.raises(ConfigError, match="exceeds the limit"):
        upscale(tuned, np.zeros((8, 2**24, 3), dtype=np.uint8))
    with pytest.raises(ConfigError, match="overlap = 1"):
        upscale(tuned, image, overlap=1)
    from isocost.models.export_diffusers import export
    from isocost.sampling.sample import sample

    with pytest.raises(ConfigError, match="isocost upscale"):
        sample(tuned, ["a red circle"])
    with pytest.raises(ConfigError, match="diffusers has no pipeline"):
        export(tuned, tmp_path / "exported")


def test_parents_must_be_compatible(finished: Pipeline, tmp_path: Path) -> None:
    tuned, plain = checkpoint_of(finished), finished.store.folder("checkpoint", finished.runs[0].final)

    def runs(parent: Path, study: StudySpec | None = None) -> list[TrainingRun]:
        spec = study or superres_study(parents=[str(parent)], starts=["pretrained"])
        return Pipeline(spec, tmp_path / "other").experiments["superres"].runs

    (run,) = runs(plain)
    assert run.parent == plain
    with pytest.raises(ConfigError, match="is a checkpoint of superres with 4 extra input channels"):
        runs(tuned)
    with pytest.raises(ConfigError, match="no such checkpoint folder"):
        runs(tmp_path / "absent")
    other = tiny_study(
        autoencoder={"kind": "pca", "patch": 4, "num_channels": 3, "num_fit_images": 64},
        train={"num_images": 64, "batch_size": 16, "prediction_type": "v_prediction"},
        superres={"parents": [str(plain)], "train": {"num_images": 64}, "sweep": {"num_steps": [1]}},
    )
    with pytest.raises(ConfigError, match="latents of another autoencoder"):
        runs(plain, other)


@pytest.mark.parametrize(
    ("superres", "message"),
    [
        ({"scale": 5}, "superres.scale: 5 does not divide data.resolution 32"),
        (
            {"train": {"num_images": 8, "prediction_type": "epsilon"}},
            "superres.train.prediction_type: fine-tuning needs the value of train",
        ),
        ({"starts": []}, "superres.starts"),
        ({"metric": "nothing"}, "unknown metric"),
    ],
)
def test_an_invalid_study_is_refused(superres: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline(superres_study(**superres), tmp_path / "out")


def test_fine_tuning_without_a_parent_names_the_remedy(tmp_path: Path) -> None:
    pipeline = Pipeline(superres_study(), tmp_path / "out")
    with pytest.raises(ConfigError, match="its parent checkpoint does not exist yet; run `isocost train`"):
        pipeline.train(runs_of(pipeline)[1][0])


def test_samples_equal_to_their_originals_cannot_be_scored(finished: Pipeline) -> None:
    experiment, _ = runs_of(finished)
    from isocost.evaluation.evaluator import FeatureCollector, score

    reference: ReferenceSet = experiment.reference
    collector = FeatureCollector(reference)
    collector.add(list(range(32)), finished.assets.images("reference").images[:32])
    with pytest.raises(RunError, match="32 images are identical to their originals"):
        score(collector.features(), reference, ())
