"""DreamBooth: training data, loss weights, a complete study, and errors in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from finished_study import PARTS, finished_spec, with_part
from interruptions import stop_twice
from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.study import StudySpec
from isocost.config.training import TrainSpec
from isocost.data import dreambooth as making
from isocost.data.dreambooth import (
    PROMPT_BACKGROUNDS,
    SUBJECT_LOOKS,
    TRAIN_BACKGROUNDS,
    read_prompts,
    read_subjects,
    render_subject,
    synthetic_subjects,
)
from isocost.data.latent_cache import MemoryCache
from isocost.data.synthetic.scenes import BACKGROUNDS, scene
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.errors import ConfigError
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features, write_sample_features
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.reference_set import ReferenceSet
from isocost.experiments.dreambooth import PRETRAINED_BASELINE, DreamboothExperiment
from isocost.experiments.dreambooth_scores import SubjectScores
from isocost.metrics.image_similarity import mean_cosine_to_set
from isocost.models.autoencoder import PCAAutoencoder
from isocost.models.checkpoint import load_checkpoint
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.models.unet import build_unet
from isocost.models.unet_with_text_encoder import UNetWithTextEncoder
from isocost.pipeline.dry_run import plan
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.sampling.generate import PromptEmbeds
from isocost.sampling.sample import sample
from isocost.sweep.schema import HARDWARE_COLUMNS
from isocost.training.objectives import Dreambooth, TextToImage
from isocost.utils.artifact_store import Store
from tiny_configs import Thumbnail, ThumbnailWithText, scenes

CPU = torch.device("cpu")


def dreambooth_study(**changes: Any) -> StudySpec:
    """The finished study with DreamBooth on two synthetic subjects, without its other experiments."""
    return with_part("dreambooth", **changes)


@pytest.fixture(scope="module")
def finished(finished_copy: Path) -> Pipeline:
    return Pipeline(dreambooth_study(), finished_copy)


def experiment_of(pipeline: Pipeline) -> DreamboothExperiment:
    experiment = pipeline.experiments["dreambooth"]
    assert isinstance(experiment, DreamboothExperiment)
    return experiment


# --- subjects ---


def test_synthetic_subjects_occur_in_no_scene() -> None:
    """Their colours are their own, and training images and prompts have different backgrounds."""
    subjects = synthetic_subjects(5, 4, 32)
    assert len({subject.content for subject in subjects}) == 5
    assert not set(TRAIN_BACKGROUNDS) & set(PROMPT_BACKGROUNDS)
    for index, subject in enumerate(subjects):
        assert subject.images.shape == (4, 3, 32, 32)
        assert subject.backgrounds == tuple(list(BACKGROUNDS).index(background) for background in PROMPT_BACKGROUNDS)
        assert all("{0} {1}" in prompt for prompt in subject.prompts)
        pixels = render_subject(index, "white", 256, 0).flatten(1).T
        for colour in SUBJECT_LOOKS[index].colours:
            assert (pixels == torch.tensor(colour)).all(1).float().mean() > 0.02
    assert torch.equal(render_subject(1, "sky", 32, 7), render_subject(1, "sky", 32, 7))
    assert not torch.equal(render_subject(1, "sky", 32, 7), render_subject(1, "sky", 32, 8))
    assert all(scene(0, i).groups for i in range(20))  # rendering subjects does not change the scenes
    with pytest.raises(ConfigError, match="there are 5 synthetic subjects with 4 images each"):
        synthetic_subjects(6, 4, 32)


def photographs(folder: Path) -> Path:
    """Two subjects in the layout of google/dreambooth."""
    (folder / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\ncan,can\ncat2,cat\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n"
        "'a {0} {1} in the snow'.format(unique_token, class_token),\n'a red {0} {1}'.format(unique_token, class_token)\n]\n\n"
        "Live Subject Prompts\n\nprompt_list = [\n'a {0} {1} wearing a hat'.format(unique_token, class_token)\n]\n"
    )
    for name in ("can", "cat2"):
        (folder / name).mkdir()
        for number, image in enumerate(scenes(3, 48, seed=len(name)).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image[: 40 + number]).save(folder / name / f"{number:02d}.jpg")
    return folder


def test_photographs_and_their_prompts_are_read(tmp_path: Path) -> None:
    folder = photographs(tmp_path)
    can, cat = read_subjects(folder, (), 32)
    assert (can.name, can.class_word, can.images.shape) == ("can", "can", (3, 3, 32, 32))
    assert can.prompts == ("a {0} {1} in the snow", "a red {0} {1}")
    assert cat.prompts == ("a {0} {1} wearing a hat",)
    assert [subject.name for subject in read_subjects(folder, ("cat2",), 32)] == ["cat2"]


def test_the_published_subjects_have_25_prompts(shared: Path) -> None:
    classes, prompts = read_prompts(shared / "dreambooth" / "prompts_and_classes.txt")
    assert len(classes) == 30
    assert {len(of_class) for of_class in prompts.values()} == {25}
    (dog,) = read_subjects(shared / "dreambooth", ("dog6",), 64)
    assert dog.class_word == "dog"
    assert 3 <= len(dog.images) <= 6
    assert any("hat" in prompt for prompt in dog.prompts)


def test_errors_in_subjects_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_subjects(tmp_path, (), 32)
    folder = photographs(tmp_path)
    with pytest.raises(ConfigError, match="unknown subject dog; choose from can, cat2"):
        read_subjects(folder, ("dog",), 32)
    (folder / "can" / "00.jpg").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="the image cannot be read"):
        read_subjects(folder, ("can",), 32)
    for file in (folder / "can").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="the subject has no images"):
        read_subjects(folder, ("can",), 32)
    (folder / "prompts_and_classes.txt").write_text("nothing")
    with pytest.raises(ConfigError, match=r"not the prompts_and_classes\.txt"):
        read_subjects(folder, (), 32)


def test_one_photograph_is_too_few(tmp_path: Path) -> None:
    folder = photographs(tmp_path)
    for name in ("01.jpg", "02.jpg"):
        (folder / "can" / name).unlink()
    spec = dreambooth_study(subjects={"kind": "folder", "path": str(folder)})
    with pytest.raises(ConfigError, match="can has one image; give three to five"):
        Pipeline(spec, tmp_path / "out").run(tasks=("dreambooth",))


# --- the training objective ---


@pytest.fixture(scope="module")
def cache() -> MemoryCache:
    images = scenes(9, 32)
    autoencoder, text = PCAAutoencoder.fit(scenes(64, 32), 4, 4), MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    return MemoryCache(images, ["a sks star"] * 3 + ["a star"] * 6, autoencoder, text)


def task_of(cache: MemoryCache, num_subject: int = 3, weight: float = 0.5) -> Dreambooth:
    spec = TrainSpec(num_images=1, caption_dropout=0.0, prediction_type="v_prediction")
    return Dreambooth(spec, cache, NoiseSchedule.scaled_linear(), num_subject, weight)


def test_every_second_image_is_of_the_class(cache: MemoryCache) -> None:
    task = task_of(cache)
    images = task._image_indices(0, 36)
    assert (images[::2] < 3).all()
    assert (images[1::2] >= 3).all()
    assert sorted(images[:6:2].tolist()) == [0, 1, 2]
    assert sorted(images[1:12:2].tolist()) == [3, 4, 5, 6, 7, 8]
    assert torch.equal(task._image_indices(7, 9), images[7:16])


def test_the_loss_equals_that_of_separate_batches(cache: MemoryCache) -> None:
    """DreamBooth's loss is the subject's mean plus lambda times the class's mean; ours is a mean over alternating images."""
    task = task_of(cache)
    batch = task.batch(0, range(12), CPU)

    class Zero(torch.nn.Module):
        def forward(self, x: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor) -> Any:
            return type("Output", (), {"sample": torch.zeros_like(x)})

    squares = batch.target.square().flatten(1).mean(1)
    expected = squares[::2].mean() + 0.5 * squares[1::2].mean()
    assert float(task.loss(Zero(), batch)) == pytest.approx(float(expected), rel=1e-5)


def test_without_a_prior_it_is_text_to_image_on_the_subject(cache: MemoryCache) -> None:
    spec = TrainSpec(num_images=1, caption_dropout=0.0, prediction_type="v_prediction")
    without_prior = Dreambooth(spec, cache, NoiseSchedule.scaled_linear(), len(cache), 1.0).batch(5, range(7), CPU)
    plain = TextToImage(spec, cache, NoiseSchedule.scaled_linear()).batch(5, range(7), CPU)
    assert torch.equal(without_prior.noisy, plain.noisy)
    assert torch.equal(without_prior.weights, plain.weights)


def test_a_memory_cache_has_the_caption_of_each_image(cache: MemoryCache) -> None:
    text = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    numbers = cache.captions(torch.tensor([0, 8]))[:, 0]
    expected = text.encode(["a sks star", "a star"])
    assert torch.allclose(cache.prompt_embeds(numbers), expected, atol=1e-5)
    assert torch.allclose(cache.prompt_embeds(torch.tensor([cache.null_caption])), text.encode([""]), atol=1e-5)
    assert torch.equal(cache.token_ids(numbers), torch.from_numpy(text.tokenize(["a sks star", "a star"])))


# --- a complete study ---


def test_every_size_is_fine_tuned_for_every_subject(finished: Pipeline) -> None:
    runs = experiment_of(finished).runs
    assert [(run.model.width, run.variant) for run in runs] == [(w, f"planted-{s}") for w in (8,) for s in (0, 1)]
    for run in runs:
        info = load_checkpoint(finished.store.folder("checkpoint", run.final)).info
        assert (info.task, info.parent, info.variant) == ("dreambooth", run.parent.name, run.variant)  # type: ignore[union-attr]
    study = finished.study
    assert study.dreambooth is not None
    assert study.dreambooth.train.caption_dropout == 0
    assert study.dreambooth.train.lr == study.train.lr


def test_class_images_are_samples_of_the_parent(finished: Pipeline) -> None:
    experiment = experiment_of(finished)
    run = experiment.runs[0]
    task = experiment.objective(run, experiment.network(run))
    assert isinstance(task, Dreambooth)
    assert (task.num_subject, task.num_prior) == (4, 6)
    again = experiment._generate(run.parent, "a circle", 6)  # type: ignore[arg-type]
    assert torch.equal(experiment._class_images(run, "circle"), again)


def test_the_table_has_two_rows_per_size_tuned_and_untuned(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-dreambooth.parquet")
    assert set(table["size"]) == {"0.8M", f"0.8M {PRETRAINED_BASELINE}"}
    assert len(table) == 2
    assert (table["num_images"] == 2 * 3 * 2).all()
    assert table["is_final"].all()
    assert table["subject_efficientnet"].between(-1, 1).all()
    assert table["alignment"].between(0, 1).all()


def test_the_score_of_a_row_is_the_mean_over_the_images_of_all_subjects(finished: Pipeline) -> None:
    experiment = experiment_of(finished)
    table = pd.read_parquet(finished.out / "table-dreambooth.parquet").set_index("size")
    values = []
    for run in experiment.runs[:2]:
        (point,) = experiment.jobs(run)[0].points
        samples = read_sample_features(finished.store.folder("point", point.digest), ("efficientnet-lite0",))
        subject = experiment._subject_of(run)
        real = experiment._extractors["efficientnet-lite0"](subject.reference_images).numpy()
        values += mean_cosine_to_set(samples.features["efficientnet-lite0"], real).tolist()
    assert table.loc["0.8M", "subject_efficientnet"] == pytest.approx(np.mean(values))
    assert table.loc["0.8M", "subject_efficientnet_low"] < np.mean(values) < table.loc["0.8M", "subject_efficientnet_high"]


def test_alignment_of_a_synthetic_subject_measures_only_the_background(finished: Pipeline) -> None:
    experiment = experiment_of(finished)
    reference = experiment._reference(experiment.subjects[0])
    assert reference.labels is not None
    assert reference.clip_texts is not None
    assert (reference.prompts[0], reference.clip_texts[0]) == (
        "a sks circle on a grey background",
        "a circle on a grey background",
    )
    assert (reference.labels[:, 1:] == -1).all()
    assert reference.labels[:, 0].tolist() == [
        list(BACKGROUNDS).index(background) for background in PROMPT_BACKGROUNDS[:3] for _ in range(2)
    ]
    (point,) = experiment.jobs(experiment.runs[0])[0].points
    samples = read_sample_features(finished.store.folder("point", point.digest), ("efficientnet-lite0",))
    assert samples.alignment is not None
    assert set(samples.alignment.tolist()) <= {0.0, 1.0}


def test_the_page_shows_subjects_and_prior_preservation(finished: Pipeline) -> None:
    page = (finished.out / "report" / "dreambooth" / "index.html").read_text()
    for text in (
        "planted-0: a sks circle on a grey background",
        "training image",
        "tuned minus untuned",
        "on the study's own prompts",
    ):
        assert text in page.replace("&#39;", "'")


@pytest.mark.slow
def test_a_killed_fine_tuning_ends_with_the_same_table(
    finished: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_twice(dreambooth_study(), out, monkeypatch, at_step=6, at_record=2)  # the family takes four steps and has five points
    pipeline = Pipeline(dreambooth_study(), out)
    assert pipeline.run()
    report(pipeline, figure_formats=())
    left, right = (
        pd.read_parquet(run.out / "table-dreambooth.parquet").drop(columns=HARDWARE_COLUMNS).dropna(axis="columns", how="all")
        for run in (finished, pipeline)
    )
    pd.testing.assert_frame_equal(left, right)


@pytest.mark.slow
def test_an_estimate_names_each_fine_tuning_and_measures_each_network_once(
    finished: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(model: ModelSpec, *_: Any) -> tuple[float, float]:
        measured.append(model.width)
        return 0.01, 0.0

    monkeypatch.setattr("isocost.training.throughput_estimate.measure_step_times", measure)
    sizes = [estimate.size for estimate in finished.estimate_training()]
    assert sizes == ["0.8M", "0.8M dreambooth planted-0", "0.8M dreambooth planted-1"]
    assert measured == [8, 8]


def test_a_further_subject_reuses_existing_points(finished: Pipeline) -> None:
    more = dreambooth_study(subjects={"kind": "scenes", "num_subjects": 3, "num_prompts": 3})
    sizes = plan(Pipeline(more, finished.out))["sizes"]
    missing = [size["points_to_make"] for size in sizes if size["task"] == "dreambooth"]
    assert missing == [0, 0, 3]


@pytest.mark.slow
def test_photographs_run_as_a_complete_study_of_two_sizes_without_alignment(tmp_path: Path) -> None:
    """The published layout of subjects, without labels and therefore without alignment; the page compares the sizes."""
    folder = photographs(tmp_path)
    dreambooth = {**PARTS["dreambooth"], "subjects": {"kind": "folder", "path": str(folder)}, "prior": {"num_images": 0}}
    protocol = {"num_images": 32, "num_reference": 64, "num_bootstrap": 20, "alignment": "none"}
    spec = finished_spec("dreambooth", family={"widths": [8, 16]}, dreambooth=dreambooth, protocol=protocol)
    pipeline = Pipeline(spec, tmp_path / "out")
    assert pipeline.run()
    report(pipeline, figure_formats=())
    table = pd.read_parquet(pipeline.out / "table-dreambooth.parquet").set_index("size")
    assert set(table.index) == {size + name for size in ("0.8M", "2.6M") for name in ("", f" {PRETRAINED_BASELINE}")}
    assert set(table["num_images"]) == {2 * (2 + 1)}
    assert "larger minus smaller" in (pipeline.out / "report" / "dreambooth" / "index.html").read_text()


@pytest.mark.slow
def test_the_text_encoder_can_be_trained_too(finished: Pipeline, tmp_path: Path) -> None:
    """Its weights change, its checkpoint contains it, and the sweep and `sample` encode prompts with it."""
    shutil.copytree(finished.out, tmp_path / "out")
    changes = {
        "train_text_encoder": True,
        "subjects": {"kind": "scenes", "num_subjects": 1, "num_prompts": 2},
        "prior": {"num_images": 0},
    }
    for file in ("study.yaml", "table-dreambooth.parquet"):
        (tmp_path / "out" / file).unlink()
    pipeline = Pipeline(dreambooth_study(**changes), tmp_path / "out")
    experiment = experiment_of(pipeline)
    run = experiment.runs[0]
    pipeline.train(run)
    checkpoint = load_checkpoint(pipeline.store.folder("checkpoint", run.final))
    untuned, tuned = MiniLMTextEncoder(pipeline.study.text_encoder), MiniLMTextEncoder(checkpoint.text_encoder)
    prompts = ["a sks circle on a grey background"]
    assert not torch.equal(tuned.encode(prompts), untuned.encode(prompts))
    assert np.array_equal(tuned.tokenize(prompts), untuned.tokenize(prompts))
    tuned_job, _, untuned_job, _ = experiment.jobs(run)
    for job, text_encoder in ((tuned_job, tuned), (untuned_job, untuned)):
        context = job.eval_context()
        expected = PromptEmbeds.encode(list(context.reference.prompts), text_encoder)
        assert torch.equal(context.prompts(torch.tensor([0])), expected(torch.tensor([0])))
    assert pipeline.sweep(run)
    assert sample(checkpoint.folder, prompts, num_steps=1, num_images=1).array.shape == (1, 1, 32, 32, 3)


def test_a_unet_with_text_encoder_computes_and_trains_both_parts() -> None:
    torch.manual_seed(0)
    text = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    unet = build_unet(ModelSpec(width=8, latent_size=8, cross_attention_dim=text.cross_attention_dim))
    joint = UNetWithTextEncoder(unet, text.network, text.tokenizer.pad_token_id).train()
    assert not text.network.training
    ids, x, timesteps = torch.from_numpy(text.tokenize(["a star"])), torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    output = joint(x, timesteps, ids.float()).sample
    with torch.no_grad():
        assert torch.allclose(output, unet(x, timesteps, text.encode(["a star"])).sample, atol=1e-5)
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in joint.parameters())


def test_a_sharded_text_encoder_is_refused(tmp_path: Path) -> None:
    spec = dreambooth_study(train_text_encoder=True, train={"num_images": 32, "sharding": "fsdp"})
    with pytest.raises(ConfigError, match=r"needs dreambooth\.train\.sharding: none"):
        experiment_of(Pipeline(spec, tmp_path / "out")).runs  # noqa: B018


def test_synthetic_subjects_have_different_colours() -> None:
    assert len({colour for look in SUBJECT_LOOKS for colour in look.colours}) == 2 * len(SUBJECT_LOOKS)
    assert making.NUM_REFERENCE_IMAGES >= 32


def test_clip_and_dino_are_scored_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP-I and DINO: mean cosine to all of the subject's images; CLIP-T: cosine to the prompt; over two subjects."""
    for module in ("experiments.dreambooth_scores", "evaluation.reference_set"):
        monkeypatch.setattr(f"isocost.{module}.CLIPFeatureExtractor", ThumbnailWithText)
    generator, store, names = np.random.default_rng(0), Store(tmp_path), ("clip-vit-b-32", "dino-vit-s-16")
    references, points, expected = [], [], {"clip_i": [], "clip_score_b32": [], "dino": []}
    for number, prompts in enumerate((["a", "bb"], ["ccc", "a"])):
        real, generated = ({name: generator.random((count, 48), dtype=np.float32) for name in names} for count in (3, 2))
        protocol = make_protocol(ProtocolSpec(), resolution=8, extractor="x", reference="y", num_reference=3, prompts=prompts)
        extractors = {"clip-vit-b-32": ThumbnailWithText(), "dino-vit-s-16": Thumbnail()}
        references.append(ReferenceSet(protocol, extractors, real, prompts))
        with store.create("point", f"point-{number}", {}) as folder:
            write_sample_features(folder, SampleFeatures(generated, ids=np.arange(2)))
        points.append(f"point-{number}")
        unit = {
            name: [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (generated[name], real[name])]
            for name in names
        }
        expected["clip_i"] += (unit[names[0]][0] @ unit[names[0]][1].T).mean(1).tolist()
        expected["dino"] += (unit[names[1]][0] @ unit[names[1]][1].T).mean(1).tolist()
        expected["clip_score_b32"] += (unit[names[0]][0].sum(1) / np.sqrt(48)).tolist()
    scores = SubjectScores(store, tuple(references), ("subject_similarity", "prompt_similarity"), 20, 0)
    by_image = scores.by_image(points)
    assert by_image.keys() == expected.keys()
    for metric, values in by_image.items():
        assert np.allclose(values, expected[metric], atol=1e-6), metric
    assert scores.format_difference(points, points) == dict.fromkeys(expected, "0.0 [0.0, 0.0]")
