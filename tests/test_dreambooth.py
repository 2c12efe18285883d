"""DreamBooth: what is learned from, how it weighs, the whole way from a study, and mistakes in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import plain_study
from interruptions import stop_twice
from isocost.config.base import parse_spec
from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.study import StudySpec
from isocost.config.training import TrainSpec
from isocost.data import dreambooth as making
from isocost.data.dreambooth import (
    LOOKS,
    PROMPT_BACKGROUNDS,
    TRAIN_BACKGROUNDS,
    drawn,
    read_prompts,
    read_subjects,
    synthetic_subjects,
)
from isocost.data.latent_cache import MemoryCache
from isocost.data.synthetic.scenes import BACKGROUNDS, scene
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.errors import ConfigError
from isocost.evaluation.feature_store import SampleFeatures, read_measured, write_measured
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
from isocost.sampling.sample import sample
from isocost.sweep.schema import HARDWARE_COLUMNS
from isocost.training.objectives import Dreambooth, TextToImage
from isocost.utils.artifact_store import Store
from tiny_configs import Talking, Thumbnail, scenes

CPU = torch.device("cpu")


def dreambooth_study(alignment: str = "scenes", **changes: Any) -> StudySpec:
    """The tiny study of two sizes, and two planted subjects."""
    plain = plain_study(
        train={"num_images": 64, "batch_size": 16, "lr": 1e-3, "prediction_type": "v_prediction", "state_every_images": 32},
        sweep={"num_steps": [1], "guidance": [1], "batch_size": 16},
        protocol={"num_images": 32, "num_reference": 64, "num_bootstrap": 20, "alignment": alignment},
        dreambooth={
            "subjects": {"kind": "scenes", "num_subjects": 2, "num_prompts": 3},
            "num_images": 2,
            "num_prior_images": 32,
            "prior": {"num_images": 6, "num_steps": 1, "guidance": 1},
            "train": {"num_images": 32, "state_every_images": 16},
            "sweep": {"num_steps": [2], "guidance": [2], "batch_size": 16},
            "protocol": {"num_bootstrap": 20},
            **changes,
        },
    )
    return parse_spec(StudySpec, plain, "tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    pipeline = Pipeline(dreambooth_study(), tmp_path_factory.mktemp("dreambooth") / "out")
    assert pipeline.run(tasks=("text2image", "dreambooth"))
    report(pipeline)
    return pipeline


def experiment_of(pipeline: Pipeline) -> DreamboothExperiment:
    experiment = pipeline.experiments["dreambooth"]
    assert isinstance(experiment, DreamboothExperiment)
    return experiment


# --- subjects ---


def test_planted_subjects_are_of_no_scene() -> None:
    """No colour of theirs is near to one that scenes draw on the same ground, and they are taught and asked apart."""
    subjects = synthetic_subjects(5, 4, 32)
    assert len({subject.content for subject in subjects}) == 5
    assert not set(TRAIN_BACKGROUNDS) & set(PROMPT_BACKGROUNDS)
    for which, subject in enumerate(subjects):
        assert subject.images.shape == (4, 3, 32, 32)
        assert subject.backgrounds == tuple(list(BACKGROUNDS).index(ground) for ground in PROMPT_BACKGROUNDS)
        assert all("{0} {1}" in prompt for prompt in subject.prompts)
        fine = drawn(which, "white", 256, 0).flatten(1).T
        for colour in LOOKS[which].colours:
            assert (fine == torch.tensor(colour)).all(1).float().mean() > 0.02
    assert torch.equal(drawn(1, "sky", 32, 7), drawn(1, "sky", 32, 7))
    assert not torch.equal(drawn(1, "sky", 32, 7), drawn(1, "sky", 32, 8))
    assert all(scene(0, i).groups for i in range(20))  # the scenes themselves are as they were
    with pytest.raises(ConfigError, match="at most 5 planted subjects of 4 images"):
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
    assert {len(each) for each in prompts.values()} == {25}
    (dog,) = read_subjects(shared / "dreambooth", ("dog6",), 64)
    assert dog.class_word == "dog"
    assert 3 <= len(dog.images) <= 6
    assert any("hat" in prompt for prompt in dog.prompts)


def test_mistakes_in_subjects_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_subjects(tmp_path, (), 32)
    folder = photographs(tmp_path)
    with pytest.raises(ConfigError, match="no subject is called dog; there are can, cat2"):
        read_subjects(folder, ("dog",), 32)
    (folder / "can" / "00.jpg").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="no image can be read"):
        read_subjects(folder, ("can",), 32)
    for file in (folder / "can").iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match="no images of the subject"):
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


# --- the task ---


@pytest.fixture(scope="module")
def cache() -> MemoryCache:
    images = scenes(9, 32)
    autoencoder, text = PCAAutoencoder.fit(scenes(64, 32), 4, 4), MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    return MemoryCache(images, ["a sks star"] * 3 + ["a star"] * 6, autoencoder, text)


def task_of(cache: MemoryCache, num_subject: int = 3, weight: float = 0.5) -> Dreambooth:
    spec = TrainSpec(num_images=1, caption_dropout=0.0, prediction_type="v_prediction")
    return Dreambooth(spec, cache, NoiseSchedule.scaled_linear(), num_subject, weight)


def test_every_other_image_is_of_the_class(cache: MemoryCache) -> None:
    task = task_of(cache)
    images = task._image_indices(0, 36)
    assert (images[::2] < 3).all()
    assert (images[1::2] >= 3).all()
    assert sorted(images[:6:2].tolist()) == [0, 1, 2]
    assert sorted(images[1:12:2].tolist()) == [3, 4, 5, 6, 7, 8]
    assert torch.equal(task._image_indices(7, 9), images[7:16])


def test_both_kinds_weigh_as_in_a_batch_of_each(cache: MemoryCache) -> None:
    """DreamBooth's loss is the subject's mean plus lambda times the class's; ours a mean over both by turns."""
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
    alone = Dreambooth(spec, cache, NoiseSchedule.scaled_linear(), len(cache), 1.0).batch(5, range(7), CPU)
    plain = TextToImage(spec, cache, NoiseSchedule.scaled_linear()).batch(5, range(7), CPU)
    assert torch.equal(alone.noisy, plain.noisy)
    assert torch.equal(alone.weights, plain.weights)


def test_a_cache_in_memory_gives_each_image_its_caption(cache: MemoryCache) -> None:
    text = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    numbers = cache.captions(torch.tensor([0, 8]))[:, 0]
    expected = text.encode(["a sks star", "a star"])
    assert torch.allclose(cache.states(numbers), expected, atol=1e-5)
    assert torch.allclose(cache.states(torch.tensor([cache.null_caption])), text.encode([""]), atol=1e-5)
    assert torch.equal(cache.token_ids(numbers), torch.from_numpy(text.tokenize(["a sks star", "a star"])))


# --- the whole way ---


def test_the_family_is_tuned_for_every_subject(finished: Pipeline) -> None:
    runs = experiment_of(finished).runs
    assert [(run.model.width, run.variant) for run in runs] == [(w, f"planted-{s}") for w in (8, 16) for s in (0, 1)]
    for run in runs:
        info = load_checkpoint(finished.store.folder("checkpoint", run.final)).info
        assert (info.task, info.parent, info.variant) == ("dreambooth", run.parent.name, run.variant)  # type: ignore[union-attr]
    study = finished.study
    assert study.dreambooth is not None
    assert study.dreambooth.train.caption_dropout == 0
    assert study.dreambooth.train.lr == study.train.lr


def test_the_prior_is_the_untuned_models_own(finished: Pipeline) -> None:
    experiment = experiment_of(finished)
    run = experiment.runs[0]
    task = experiment.task(run, experiment.network(run))
    assert isinstance(task, Dreambooth)
    assert (task.num_subject, task.num_prior) == (4, 6)
    again = experiment._draw(run.parent, "a circle", 6)  # type: ignore[arg-type]
    assert torch.equal(experiment._class_images(run, "circle"), again)


def test_the_table_has_a_row_a_size_tuned_and_not(finished: Pipeline) -> None:
    table = pd.read_parquet(finished.out / "table-dreambooth.parquet")
    assert set(table["size"]) == {"0.8M", f"0.8M {PRETRAINED_BASELINE}", "2.6M", f"2.6M {PRETRAINED_BASELINE}"}
    assert len(table) == 4
    assert (table["num_images"] == 2 * 3 * 2).all()
    assert table["is_final"].all()
    assert table["subject_efficientnet"].between(-1, 1).all()
    assert table["alignment"].between(0, 1).all()


def test_a_rows_score_is_the_mean_over_all_subjects_images(finished: Pipeline) -> None:
    experiment = experiment_of(finished)
    table = pd.read_parquet(finished.out / "table-dreambooth.parquet").set_index("size")
    values = []
    for run in experiment.runs[:2]:
        (point,) = experiment.jobs(run)[0].points
        measured = read_measured(finished.store.folder("point", point.digest), ("efficientnet-lite0",))
        subject = experiment._subject_of(run)
        real = experiment._extractors["efficientnet-lite0"](subject.others).numpy()
        values += mean_cosine_to_set(measured.features["efficientnet-lite0"], real).tolist()
    assert table.loc["0.8M", "subject_efficientnet"] == pytest.approx(np.mean(values))
    assert table.loc["0.8M", "subject_efficientnet_low"] < np.mean(values) < table.loc["0.8M", "subject_efficientnet_high"]


def test_only_the_background_is_asked_of_a_planted_subject(finished: Pipeline) -> None:
    experiment = experiment_of(finished)
    reference = experiment._reference(experiment.subjects[0])
    assert reference.labels is not None
    assert reference.said is not None
    assert (reference.prompts[0], reference.said[0]) == (
        "a sks circle on a grey background",
        "a circle on a grey background",
    )
    assert (reference.labels[:, 1:] == -1).all()
    assert reference.labels[:, 0].tolist() == [
        list(BACKGROUNDS).index(ground) for ground in PROMPT_BACKGROUNDS[:3] for _ in range(2)
    ]
    (point,) = experiment.jobs(experiment.runs[0])[0].points
    measured = read_measured(finished.store.folder("point", point.digest), ("efficientnet-lite0",))
    assert measured.alignment is not None
    assert set(measured.alignment.tolist()) <= {0.0, 1.0}


def test_the_page_shows_subjects_and_what_was_kept(finished: Pipeline) -> None:
    page = (finished.out / "report" / "dreambooth" / "index.html").read_text()
    for words in (
        "planted-0: a sks circle on a grey background",
        "learned from",
        "tuned less untuned",
        "the rest",
        "larger less",
    ):
        assert words in page.replace("&#39;", "'")


@pytest.mark.slow
def test_a_tuning_that_was_killed_ends_with_the_same_table(
    finished: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_twice(dreambooth_study(), out, monkeypatch, at_step=10, at_record=4)  # eight steps are the family's
    pipeline = Pipeline(dreambooth_study(), out)
    assert pipeline.run()
    report(pipeline)
    left, right = (
        pd.read_parquet(each.out / "table-dreambooth.parquet").drop(columns=HARDWARE_COLUMNS) for each in (finished, pipeline)
    )
    pd.testing.assert_frame_equal(left, right)


def test_a_forecast_names_each_tuning_and_measures_each_network_once(
    finished: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure(model: ModelSpec, *_: Any) -> tuple[float, float]:
        measured.append(model.width)
        return 0.01, 0.0

    monkeypatch.setattr("isocost.training.throughput_estimate.measure", measure)
    sizes = [one.size for one in finished.forecast()]
    assert sizes[:3] == ["0.8M", "2.6M", "0.8M dreambooth planted-0"]
    assert len(sizes) == 6
    assert measured == [8, 16, 8, 16]


def test_another_subject_reuses_what_stands(finished: Pipeline) -> None:
    more = dreambooth_study(subjects={"kind": "scenes", "num_subjects": 3, "num_prompts": 3})
    sizes = plan(Pipeline(more, finished.out))["sizes"]
    missing = [size["points_to_make"] for size in sizes if size["task"] == "dreambooth"]
    assert missing == [0, 0, 3, 0, 0, 3]


@pytest.mark.slow
def test_photographs_go_the_whole_way_without_a_probe(tmp_path: Path) -> None:
    """Another study's data: no labels, so no alignment; the published layout of subjects."""
    folder = photographs(tmp_path)
    spec = dreambooth_study(alignment="none", subjects={"kind": "folder", "path": str(folder)}, prior={"num_images": 0})
    spec = spec.model_copy(update={"family": spec.family.model_copy(update={"widths": (8,)})})
    pipeline = Pipeline(spec, tmp_path / "out")
    assert pipeline.run()
    report(pipeline)
    table = pd.read_parquet(pipeline.out / "table-dreambooth.parquet").set_index("size")
    assert table.loc["0.8M", "num_images"] == 2 * (2 + 1)


@pytest.mark.slow
def test_the_text_encoder_may_learn_too(finished: Pipeline, tmp_path: Path) -> None:
    """It changes, its checkpoint carries it, and both the sweep and `sample` read captions with it."""
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
    words = ["a sks circle on a grey background"]
    assert not torch.equal(tuned.encode(words), untuned.encode(words))
    assert np.array_equal(tuned.tokenize(words), untuned.tokenize(words))
    jobs = experiment.jobs(run)
    assert torch.equal(
        jobs[0].eval_context().captions(torch.tensor([0])), tuned.encode([jobs[0].eval_context().reference.prompts[0]])
    )
    assert torch.equal(
        jobs[2].eval_context().captions(torch.tensor([0])), untuned.encode([jobs[2].eval_context().reference.prompts[0]])
    )
    assert pipeline.sweep(run)
    assert sample(checkpoint.folder, words, num_steps=1, num_images=1).images.shape == (1, 1, 32, 32, 3)


def test_a_joint_network_is_both_of_its_parts() -> None:
    torch.manual_seed(0)
    text = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    unet = build_unet(ModelSpec(width=8, latent_size=8, cross_attention_dim=text.cross_attention_dim))
    joint = UNetWithTextEncoder(unet, text.network, text.tokenizer.pad_token_id).train()
    assert not text.network.training
    ids, x, timesteps = torch.from_numpy(text.tokenize(["a star"])), torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    made = joint(x, timesteps, ids.float()).sample
    with torch.no_grad():
        assert torch.allclose(made, unet(x, timesteps, text.encode(["a star"])).sample, atol=1e-5)
    made.square().mean().backward()
    assert all(parameter.grad is not None for parameter in joint.parameters())


def test_a_sharded_text_encoder_is_refused(tmp_path: Path) -> None:
    spec = dreambooth_study(train_text_encoder=True, train={"num_images": 32, "sharding": "fsdp"})
    with pytest.raises(ConfigError, match=r"take train\.sharding: none"):
        experiment_of(Pipeline(spec, tmp_path / "out")).runs  # noqa: B018


def test_colours_of_a_planted_subject_are_its_own() -> None:
    assert len({colour for look in LOOKS for colour in look.colours}) == 2 * len(LOOKS)
    assert making.NUM_CLASS_IMAGES >= 32


def test_clip_and_dino_are_scored_as_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP-I and DINO: mean cosine to all of the subject's images; CLIP-T: cosine to the prompt; over two subjects."""
    for module in ("experiments.dreambooth_scores", "evaluation.reference_set"):
        monkeypatch.setattr(f"isocost.{module}.CLIPFeatureExtractor", Talking)
    generator, store, names = np.random.default_rng(0), Store(tmp_path), ("clip-vit-b-32", "dino-vit-s-16")
    references, points, expected = [], [], {"clip_i": [], "clip_score_b32": [], "dino": []}
    for number, captions in enumerate((["a", "bb"], ["ccc", "a"])):
        real, made = ({name: generator.random((count, 48), dtype=np.float32) for name in names} for count in (3, 2))
        protocol = make_protocol(ProtocolSpec(), resolution=8, extractor="x", reference="y", num_reference=3, prompts=captions)
        references.append(ReferenceSet(protocol, {"clip-vit-b-32": Talking(), "dino-vit-s-16": Thumbnail()}, real, captions))
        with store.create("point", f"point-{number}", {}) as folder:
            write_measured(folder, SampleFeatures(made, ids=np.arange(2)))
        points.append(f"point-{number}")
        unit = {name: [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (made[name], real[name])] for name in names}
        expected["clip_i"] += (unit[names[0]][0] @ unit[names[0]][1].T).mean(1).tolist()
        expected["dino"] += (unit[names[1]][0] @ unit[names[1]][1].T).mean(1).tolist()
        expected["clip_score_b32"] += (unit[names[0]][0].sum(1) / np.sqrt(48)).tolist()
    scores = SubjectScores(store, tuple(references), ("subject_similarity", "prompt_similarity"), 20, 0)
    found = scores.by_image(points)
    assert found.keys() == expected.keys()
    for metric, values in found.items():
        assert np.allclose(values, expected[metric], atol=1e-6), metric
    assert scores.difference_between(points, points) == dict.fromkeys(expected, "0.0 [0.0, 0.0]")
