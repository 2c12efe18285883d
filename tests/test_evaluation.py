"""Scores with intervals under a protocol, from images in any order, for a study's points and for folders of images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from PIL import Image, ImageFilter
from torch import Tensor

from conftest import tiny_study
from isocost.config.data import ScenesSource
from isocost.config.evaluation import MIN_IMAGES, ProtocolSpec
from isocost.data.latent_cache import ImageDataset, load_images
from isocost.errors import ConfigError
from isocost.evaluation.bootstrap import extractors_of
from isocost.evaluation.confidence_intervals import paired_kernel_difference, percentile_interval
from isocost.evaluation.evaluator import FeatureCollector, Scorer, frechet_is_biased, score
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.metric_registry import METRICS
from isocost.evaluation.protocol import Protocol, make_protocol
from isocost.evaluation.reference_set import (
    ReferenceSet,
    fit_attribute_classifier,
    make_extractors,
    num_label_classes,
    read_features,
    require_labels,
    select_prompts,
    write_features,
)
from isocost.evaluation.score_folder import PRESETS, FolderScore, score_folder
from isocost.experiments.study_assets import StudyAssets
from isocost.metrics.attribute_classifier import AttributeClassifier, AttributeClassifierNetwork
from isocost.metrics.efficientnet import EfficientNetLite0
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.frechet import frechet_distance
from isocost.metrics.mmd import squared_mmd
from isocost.utils.artifact_store import Store

KERNEL = "mmd-efficientnet-64"
LITE = "efficientnet-lite0"
PLAIN = Protocol(
    num_images=100,
    num_reference=200,
    resolution=32,
    extractor="some-network/side=64",
    reference="0123456789abcdef",
    prompts="fedcba987654",
    alignment="none",
    num_bootstrap=50,
    seed=0,
)


class Thumbnail:
    """Features without a network: the mean colour of each of 16 tiles."""

    id = "thumbnail/4x4"
    feature_dim = 48

    def __call__(self, images: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


def scenes(num: int, seed: int) -> ImageDataset:
    return load_images(ScenesSource(kind="scenes", num_images=num, seed=seed), 32, 0)


def reference_of(
    real: ImageDataset, extractor: FeatureExtractor, *, num_images: int, attribute_classifier: AttributeClassifier | None = None
) -> ReferenceSet:
    spec = ProtocolSpec(num_images=num_images, num_bootstrap=60, seed=3)
    captions, labels = select_prompts(real, num_images)
    protocol = make_protocol(
        spec,
        resolution=32,
        extractor=extractor.id,
        reference=real.fingerprint(),
        num_reference=len(real),
        prompts=captions,
    )
    return ReferenceSet(
        protocol, {LITE: extractor}, {LITE: extractor(real.images).cpu().numpy()}, captions, labels, attribute_classifier
    )


def collect(reference: ReferenceSet, images: Tensor, batches: list[list[int]]) -> SampleFeatures:
    collector = FeatureCollector(reference)
    for ids in batches:
        collector.add(ids, images[ids])
    return collector.features()


def blurred(images: Tensor, radius: float) -> Tensor:
    """Gaussian blur by Pillow."""
    opened = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack([image.filter(ImageFilter.GaussianBlur(radius)) for image in opened])).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def real() -> ImageDataset:
    return scenes(96, 1)


@pytest.fixture(scope="module")
def generated() -> Tensor:
    """Other images of the same distribution as `real`: uint8 [80, 3, 32, 32]."""
    return scenes(80, 0).images


@pytest.fixture(scope="module")
def reference(real: ImageDataset) -> ReferenceSet:
    """Real features, and an untrained attribute classifier."""
    assert real.labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = AttributeClassifier(AttributeClassifierNetwork(32, num_label_classes(real)))
    return reference_of(real, EfficientNetLite0(side=64), num_images=80, attribute_classifier=classifier)


@pytest.fixture(scope="module")
def thumbnails(real: ImageDataset) -> ReferenceSet:
    return reference_of(real, Thumbnail(), num_images=80)


# --- collecting features ----------------------------------------------------------------------------------------------


def test_order_and_batching_of_images_do_not_change_a_bit(reference: ReferenceSet, generated: Tensor) -> None:
    mixed = np.random.default_rng(0).permutation(40).tolist()
    expected = collect(reference, generated, [list(range(40))])
    assert expected.alignment is not None
    for batches in ([mixed[:1], mixed[1:30], mixed[30:]], [list(range(39, 19, -1)), list(range(20))]):
        again = collect(reference, generated, batches)
        assert np.array_equal(again.features[LITE], expected.features[LITE])
        assert np.array_equal(again.alignment, expected.alignment)
        assert score(again, reference, ("mmd",)) == score(expected, reference, ("mmd",))


def test_a_collector_uses_only_the_requested_extractors(real: ImageDataset, generated: Tensor) -> None:
    reference = reference_of(real, Thumbnail(), num_images=80)
    reference.extractors["other"] = Thumbnail()
    for names, expected in ((None, {LITE, "other"}), ((LITE,), {LITE}), ((), set())):
        collector = FeatureCollector(reference, names)
        collector.add([3, 1], generated[[3, 1]])
        samples = collector.features()
        assert set(samples.features) == expected
        assert samples.ids is not None
        assert samples.ids.tolist() == [1, 3]


def test_a_race_names_a_metric_that_it_cannot_use(thumbnails: ReferenceSet) -> None:
    assert extractors_of("mmd_efficientnet", thumbnails) == (LITE,)
    assert extractors_of("alignment", thumbnails) == ()
    for metric, message in (
        ("precision_efficientnet", "has no paired resamples"),
        ("fid_infinity", "has no paired resamples"),
        ("clip_i", "has no paired resamples"),
        ("kid", "the protocol does not measure it"),
    ):
        with pytest.raises(ConfigError, match=message):
            extractors_of(metric, thumbnails)


def test_features_are_in_the_order_of_image_ids(thumbnails: ReferenceSet, generated: Tensor) -> None:
    samples = collect(thumbnails, generated, [[5, 79, 0], [33]])
    assert samples.features[LITE].shape == (4, 48)
    assert samples.features[LITE].dtype == np.float32
    assert np.array_equal(samples.features[LITE], Thumbnail()(generated[[0, 5, 33, 79]]).numpy())
    assert samples.alignment is None


def test_an_images_alignment_uses_the_labels_of_its_own_id(reference: ReferenceSet, generated: Tensor) -> None:
    assert reference.attribute_classifier is not None
    assert reference.labels is not None
    alignment = collect(reference, generated, [[70, 2], [11]]).alignment
    assert alignment is not None
    ids = [2, 11, 70]
    expected = (reference.attribute_classifier.predict(generated[ids]) == reference.labels[ids]).double().mean(1)
    np.testing.assert_allclose(alignment, expected)


# --- score and its resamples -------------------------------------------------------------------------------------------


def test_resamples_are_paired_and_follow_the_scores(thumbnails: ReferenceSet, generated: Tensor) -> None:
    metrics = ("mmd", "frechet", "sliced_wasserstein", "precision_recall")
    names = ("mmd_efficientnet", "frechet_efficientnet", "sliced_wasserstein_efficientnet")
    images = [generated, blurred(generated, 1.0)]
    scorers = [Scorer(collect(thumbnails, rows, [list(range(80))]), thumbnails, metrics) for rows in images]
    resamples = [scorer.resamples() for scorer in scorers]
    for scorer, by_metric in zip(scorers, resamples, strict=True):
        intervals = scorer.intervals()
        assert set(by_metric) == set(names), "precision and recall have no resamples"
        for name, values in by_metric.items():
            assert values.shape == (61,)
            assert values[0] == pytest.approx(intervals[name].value)
        assert percentile_interval(by_metric["mmd_efficientnet"]) == intervals["mmd_efficientnet"]
    kernel = thumbnails.kernel(LITE)
    features = [scorer.samples.features[LITE] for scorer in scorers]
    expected = paired_kernel_difference(*features, kernel)
    assert percentile_interval(resamples[0]["mmd_efficientnet"] - resamples[1]["mmd_efficientnet"]) == expected
    for name in names[1:]:
        first, second = (by_metric[name] for by_metric in resamples)
        assert (first - second).std() < 0.7 * (first.std() + second.std())


def test_resamples_leave_out_images_that_are_not_finite(thumbnails: ReferenceSet, generated: Tensor) -> None:
    """Image i has the same weight in a resample whether or not other images are missing."""
    finite = [i for i in range(80) if i != 7]
    all_rows, without = (
        Scorer(collect(thumbnails, generated, [ids]), thumbnails, ("mmd",), 80).resamples()["mmd_efficientnet"]
        for ids in (list(range(80)), finite)
    )
    assert np.corrcoef(all_rows[1:], without[1:])[0, 1] > 0.95


def test_scores_are_the_requested_metrics_under_their_names(thumbnails: ReferenceSet, generated: Tensor) -> None:
    samples = collect(thumbnails, generated, [list(range(80))])
    assert set(score(samples, thumbnails, ("mmd",))) == {"mmd_efficientnet"}
    scores = score(samples, thumbnails, ("mmd", "frechet"))
    assert set(scores) == {"mmd_efficientnet", "frechet_efficientnet"} <= set(METRICS)
    assert scores["mmd_efficientnet"].value == pytest.approx(
        squared_mmd(samples.features[LITE], thumbnails.features[LITE]), rel=1e-9
    )
    assert scores["frechet_efficientnet"].value == pytest.approx(
        frechet_distance(samples.features[LITE], thumbnails.features[LITE]), rel=1e-9
    )
    for interval in scores.values():
        assert interval.low < interval.value < interval.high
        assert interval.confidence == 0.95


def test_the_score_of_alignment_is_the_mean_over_images(reference: ReferenceSet, generated: Tensor) -> None:
    samples = collect(reference, generated, [list(range(40))])
    assert samples.alignment is not None
    alignment = score(samples, reference, ())["alignment"]
    assert alignment.value == pytest.approx(samples.alignment.mean(), rel=1e-12)
    assert 0 <= alignment.low < alignment.value < alignment.high <= 1


def test_the_interval_depends_on_the_protocols_seed_and_resamples(thumbnails: ReferenceSet, generated: Tensor) -> None:
    def ends(**changes: int) -> tuple[float, float, float]:
        changed = dataclasses.replace(thumbnails, protocol=dataclasses.replace(thumbnails.protocol, **changes))
        interval = score(collect(changed, generated, [list(range(80))]), changed, ("mmd",))["mmd_efficientnet"]
        return interval.value, interval.low, interval.high

    value, low, high = ends()
    assert ends() == (value, low, high)
    for other in (ends(seed=4), ends(num_bootstrap=61)):
        assert other[0] == value
        assert other[1:] != (low, high)


def test_the_references_own_distribution_scores_near_zero_and_blur_scores_worse(
    reference: ReferenceSet, generated: Tensor
) -> None:
    scores = []
    for radius in (0, 0.7, 1, 1.5):
        images = blurred(generated, radius) if radius else generated
        scores.append(score(SampleFeatures({LITE: reference.extractors[LITE](images).numpy()}), reference, ("mmd", "frechet")))
    mmds = [by_metric["mmd_efficientnet"] for by_metric in scores]
    assert mmds[0].low < 0 < mmds[0].high
    for metric in ("mmd_efficientnet", "frechet_efficientnet"):
        better, worse = ([by_metric[metric] for by_metric in part] for part in (scores[:-1], scores[1:]))
        assert all(a.value < b.value for a, b in zip(better, worse, strict=True)), metric
        assert better[0].high < worse[-1].low
    assert abs(mmds[0].value) < 0.05 * mmds[-1].value


@pytest.mark.parametrize(("num_images", "has_too_few_samples"), [(2, True), (2559, True), (2560, False), (50_000, False)])
def test_a_frechet_distance_from_too_few_images_is_flagged(num_images: int, has_too_few_samples: bool) -> None:
    assert frechet_is_biased(num_images, 1280) is has_too_few_samples


# --- protocol ---------------------------------------------------------------------------------------------------------


def test_a_protocols_id_is_the_hash_of_its_fields() -> None:
    fields = {name: value for name, value in dataclasses.asdict(PLAIN).items() if name != "inputs"}
    assert PLAIN.inputs == ""  # added in a later version; empty inputs are not part of the id
    plain = json.dumps([fields], sort_keys=True, separators=(",", ":"))
    assert PLAIN.id == hashlib.sha256(plain.encode()).hexdigest()[:12]


def test_a_protocols_id_equals_that_of_existing_results_databases() -> None:
    assert PLAIN.id == "8a5a21e457f4"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Protocol)])
def test_a_protocols_id_changes_with_each_field(name: str) -> None:
    value = getattr(PLAIN, name)
    changed = dataclasses.replace(PLAIN, **{name: value + 1 if isinstance(value, int) else f"{value}'"})
    assert changed.id != PLAIN.id
    assert dataclasses.replace(changed, **{name: value}).id == PLAIN.id


def protocol_with(spec: ProtocolSpec | None = None, **changes: object) -> Protocol:
    fields = {"resolution": 32, "extractor": "e", "reference": "r", "num_reference": 9, "prompts": ["a cat", "été"], **changes}
    return make_protocol(spec or ProtocolSpec(num_images=32), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution": 64},
        {"extractor": "f"},
        {"reference": "s"},
        {"num_reference": 10},
        {"prompts": ["a cat", "ete"]},
        {"prompts": ["été", "a cat"]},
        {"prompts": ["a cat"]},
        {"prompts": ["a", " catété"]},
        {"spec": ProtocolSpec(num_images=33)},
        {"spec": ProtocolSpec(num_images=32, num_bootstrap=201)},
        {"spec": ProtocolSpec(num_images=32, seed=1)},
        {"spec": ProtocolSpec(num_images=32, alignment="class")},
    ],
    ids=str,
)
def test_each_input_makes_another_protocol(changes: dict[str, object]) -> None:
    assert protocol_with(**changes).id != protocol_with().id  # type: ignore[arg-type]


def test_further_metrics_do_not_change_the_protocol() -> None:
    assert protocol_with(ProtocolSpec(num_images=32, metrics=("mmd", "frechet"))).id == protocol_with().id


@pytest.mark.slow
def test_an_attribute_classifier_of_other_images_makes_another_protocol(tmp_path: Path, generated: Tensor) -> None:
    def reference_with(seed: int) -> ReferenceSet:
        parts = {"train": {"kind": "scenes", "num_images": 192, "seed": seed}}
        parts["reference"] = {"kind": "scenes", "num_images": 64, "seed": 1}
        return StudyAssets(tiny_study(data={"resolution": 32, **parts}), Store(tmp_path)).reference

    first, second = reference_with(0), reference_with(5)
    alignments = [collect(reference, generated, [list(range(32))]).alignment for reference in (first, second)]
    assert not np.array_equal(*alignments)
    assert first.protocol.id != second.protocol.id


def test_a_protocol_is_described_in_one_sentence() -> None:
    sentence = PLAIN.sentence()
    for part in ("100 images", "32 x 32", "200 reference", PLAIN.reference, PLAIN.prompts, PLAIN.extractor, "50 bootstrap"):
        assert part in sentence


# --- reference --------------------------------------------------------------------------------------------------------


def captioned(num: int, labels: Tensor | None = None) -> ImageDataset:
    captions = [(f"first {number}", f"second {number}") for number in range(num)]
    return ImageDataset(
        torch.zeros(num, 3, 32, 32, dtype=torch.uint8), captions, [str(number) for number in range(num)], labels
    )


def test_the_prompts_are_the_first_caption_of_each_image() -> None:
    labels = torch.arange(10).reshape(5, 2)
    prompts, prompt_labels = select_prompts(captioned(5, labels), 3)
    assert prompts == ["first 0", "first 1", "first 2"]
    assert prompt_labels is not None
    assert torch.equal(prompt_labels, labels[:3])
    prompts, prompt_labels = select_prompts(captioned(5), 5)
    assert len(prompts) == 5
    assert prompt_labels is None


def test_more_images_than_captions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"protocol\.num_images=6 exceeds the 5 captions"):
        select_prompts(captioned(5), 6)


def test_a_study_with_too_few_reference_images_is_refused(tmp_path: Path) -> None:
    few = {"kind": "scenes", "num_images": MIN_IMAGES - 1, "seed": 1}
    study = tiny_study(data={"resolution": 32, "train": {**few, "seed": 0}, "reference": few})
    with pytest.raises(ConfigError, match=r"data\.reference: 31 images.*at least 32"):
        _ = StudyAssets(study, Store(tmp_path)).reference


def test_alignment_without_labels_is_refused() -> None:
    labelled, unlabelled = captioned(4, torch.zeros(4, 1, dtype=torch.int64)), captioned(4)
    require_labels(labelled, labelled)
    for pair in ((labelled, unlabelled), (unlabelled, labelled)):
        with pytest.raises(ConfigError, match="label_column"):
            require_labels(*pair)


def test_reference_features_are_written_and_read(tmp_path: Path, generated: Tensor) -> None:
    write_features(tmp_path, Thumbnail(), generated)
    assert np.array_equal(read_features(tmp_path), Thumbnail()(generated).numpy())


def test_the_extractor_of_a_protocol_has_its_feature_size() -> None:
    (extractor,) = make_extractors(ProtocolSpec(feature_size=96)).values()
    assert extractor.id == EfficientNetLite0(side=96).id


@pytest.mark.slow
def test_an_attribute_classifier_is_trained_saved_and_tested_on_other_images(tmp_path: Path) -> None:
    def shaded(num: int, seed: int) -> ImageDataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 3, (num, 1), generator=generator)
        noise = torch.randint(-20, 21, (num, 3, 32, 32), generator=generator)
        images = (60 + 70 * labels[:, :, None, None] + noise).to(torch.uint8)
        return dataclasses.replace(captioned(num, labels), images=images)

    train, held_out = shaded(768, 0), shaded(60, 1)
    held_out.labels[:15] = (held_out.labels[:15] + 1) % 3  # type: ignore[index]
    assert num_label_classes(train) == (3,)
    manifest = fit_attribute_classifier(tmp_path, train, held_out, (3,), seed=0)
    assert manifest == {"accuracy": 0.75, "accuracy_by_head": [0.75], "held_out": 60}
    assert AttributeClassifier.load(tmp_path).accuracy(held_out.images, held_out.labels).tolist() == [0.75]  # type: ignore[arg-type]


# --- folders ----------------------------------------------------------------------------------------------------------


def save_images(folder: Path, images: Tensor, name: Callable[[int], str] = "{:04d}.png".format) -> Path:
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        file = folder / name(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, real: ImageDataset, generated: Tensor) -> Path:
    """`real` and `generated` from one distribution, `noise`, and `few` with one image less than the minimum."""
    root = tmp_path_factory.mktemp("images")
    save_images(root / "real", real.images[:64])
    save_images(root / "generated", generated[:64])
    noise = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_images(root / "noise", noise)
    save_images(root / "few", generated[: MIN_IMAGES - 1])
    return root


@pytest.fixture(scope="module")
def plain_score(folders: Path) -> FolderScore:
    return score_folder(folders / "generated", folders / "real", KERNEL)


def mmd_value(result: FolderScore) -> float:
    return result.scores["mmd_efficientnet"].value


def test_a_folder_of_the_same_distribution_scores_near_zero_and_noise_does_not(folders: Path, plain_score: FolderScore) -> None:
    alike = plain_score.scores["mmd_efficientnet"]
    noise = score_folder(folders / "noise", folders / "real", KERNEL)
    assert alike.low < 0 < alike.high
    assert noise.scores["mmd_efficientnet"].low > 3 * alike.high
    assert (plain_score.num_images, plain_score.num_reference, noise.num_images) == (64, 64, 32)


def test_a_folders_score_is_the_distance_of_its_images_features(
    plain_score: FolderScore, real: ImageDataset, generated: Tensor
) -> None:
    extractor = EfficientNetLite0(side=64)
    expected = squared_mmd(extractor(generated[:64]).numpy(), extractor(real.images[:64]).numpy())
    assert mmd_value(plain_score) == pytest.approx(expected, rel=1e-9)
    assert plain_score.extractor == extractor.id
    assert set(plain_score.scores) == {"mmd_efficientnet"}
    assert plain_score.notes == ()


def test_a_frechet_protocol_adds_its_distance_and_a_note_on_few_images(folders: Path) -> None:
    result = score_folder(folders / "noise", folders / "real", "frechet-efficientnet-64")
    assert set(result.scores) == {"mmd_efficientnet", "frechet_efficientnet"}
    assert result.scores["frechet_efficientnet"].low > 0
    (note,) = result.notes
    assert "32 images" in note
    assert "1280" in note


@pytest.mark.parametrize("name", [name for name in PRESETS if "efficientnet" in name])
def test_a_presets_name_has_its_distance_and_feature_size(name: str) -> None:
    distance, _, side = name.split("-")
    spec = PRESETS[name].spec
    assert spec.feature_size == int(side)
    assert spec.metrics == (("mmd", "frechet") if distance == "frechet" else ("mmd",))


def test_folders_file_names_and_formats_do_not_matter(
    tmp_path: Path, folders: Path, generated: Tensor, plain_score: FolderScore
) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    suffixes = ("png", "PNG", "bmp", "webp")
    save_images(tmp_path, generated[:64][order], lambda number: f"part {number % 3}/deep/{number}.{suffixes[number % 3]}")
    (tmp_path / "part 0" / "captions.txt").write_text("no image")
    (tmp_path / "part 1" / "notes.json").write_text("{}")
    result = score_folder(tmp_path, folders / "real", KERNEL)
    assert result.num_images == 64
    assert mmd_value(result) == pytest.approx(mmd_value(plain_score), rel=1e-4)


def test_images_of_any_shape_and_mode_are_cropped_to_centre_squares(tmp_path: Path, folders: Path, generated: Tensor) -> None:
    originals, squares = tmp_path / "originals", tmp_path / "squares"
    originals.mkdir()
    squares.mkdir()
    shapes = [(48, 40)] * 32 + [(40, 64), (32, 32)]
    for number, (image, shape) in enumerate(zip(generated[:34].permute(0, 2, 3, 1).numpy(), shapes, strict=True)):
        image = Image.fromarray(image).resize(shape).convert("L" if number % 4 == 3 else "RGB")
        image.save(originals / f"{number:03d}.png")
        side = min(shape)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image.convert("RGB").crop((left, top, left + side, top + side)).save(squares / f"{number:03d}.png")
    result, expected = (score_folder(folder, folders / "real", KERNEL) for folder in (originals, squares))
    assert result == expected


def test_the_protocol_of_a_folder_depends_on_everything_that_its_scores_depend_on(
    folders: Path, plain_score: FolderScore
) -> None:
    assert plain_score.protocol.startswith(f"{KERNEL}:")
    same_protocol = score_folder(folders / "real", folders / "real", KERNEL)
    assert same_protocol.protocol == plain_score.protocol
    others = [
        score_folder(folders / "noise", folders / "real", KERNEL),
        score_folder(folders / "generated", folders / "noise", KERNEL),
        score_folder(folders / "noise", folders / "real", "frechet-efficientnet-64"),
    ]
    assert len({plain_score.protocol, *(other.protocol for other in others)}) == 4


@pytest.mark.parametrize("absent", ["images", "reference"])
def test_a_missing_folder_is_refused(folders: Path, absent: str) -> None:
    inputs = {"images": folders / "noise", "reference": folders / "noise", absent: folders / "nowhere"}
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        score_folder(inputs["images"], inputs["reference"], KERNEL)


@pytest.mark.parametrize("short", ["images", "reference"])
def test_too_few_images_are_refused(folders: Path, short: str) -> None:
    inputs = {"images": folders / "noise", "reference": folders / "noise", short: folders / "few"}
    with pytest.raises(ConfigError, match=r"few: 31 images.*at least 32"):
        score_folder(inputs["images"], inputs["reference"], KERNEL)


def test_an_unknown_protocol_is_refused_with_the_known_ones(folders: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        score_folder(folders / "noise", folders / "real", "fid")
    assert "'fid'" in str(refused.value)
    assert all(name in str(refused.value) for name in PRESETS)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, folders: Path, generated: Tensor, damage: str) -> None:
    save_images(tmp_path, generated[:MIN_IMAGES])
    file = tmp_path / "0007.png"
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"not an image", "truncated": content[: len(content) // 2]}[damage])
    with pytest.raises(ConfigError, match=r"0007\.png: the image cannot be read") as refused:
        score_folder(tmp_path, folders / "real", KERNEL)
    assert "\n" not in str(refused.value)


# --- features as the reference ----------------------------------------------------------------------------------------


def test_features_that_a_study_saved_give_the_scores_of_their_images(tmp_path: Path, folders: Path) -> None:
    study = tiny_study(protocol={"num_images": 32, "num_reference": 40, "num_bootstrap": 20})
    assets = StudyAssets(study, Store(tmp_path / "out"))
    assert assets.reference.features[LITE].shape == (40, 1280)
    (saved,) = (tmp_path / "out" / "artefacts" / "features").iterdir()
    save_images(tmp_path / "images", assets.images("reference").images[:40])
    by_images = score_folder(folders / "noise", tmp_path / "images", KERNEL)
    by_features = score_folder(folders / "noise", saved, KERNEL)
    assert by_features.scores == by_images.scores
    assert by_features.num_reference == by_images.num_reference == 40
    assert score_folder(folders / "noise", saved / "features.safetensors", KERNEL) == by_features


def test_features_of_another_extractor_are_refused(tmp_path: Path, folders: Path, generated: Tensor) -> None:
    store, extractor = Store(tmp_path), EfficientNetLite0(side=32)
    with store.create("features", "small", {"extractor": extractor.id}) as folder:
        write_features(folder, extractor, generated[:32])
    with pytest.raises(ConfigError, match=r"another extractor.*side=32.*side=64"):
        score_folder(folders / "noise", store.folder("features", "small"), KERNEL)


def test_features_of_an_unknown_extractor_are_refused(tmp_path: Path, folders: Path, generated: Tensor) -> None:
    write_features(tmp_path, EfficientNetLite0(side=64), generated[:32])
    with pytest.raises(ConfigError, match="another extractor"):
        score_folder(folders / "noise", tmp_path, KERNEL)
