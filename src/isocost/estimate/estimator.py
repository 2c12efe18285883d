"""A whole study on named devices, by arithmetic: points, images, hours, disk, and every assumption in a sentence.

Hours are GFLOP over peak rate x utilisation. Training is 3 x GFLOP per forward x images, because a backward pass is two
forwards (Kaplan et al., arXiv 2001.08361, section 2.1); sampling is GFLOP per forward x passes x evaluations x images, and
each image is decoded and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from isocost.config.data import ScenesSource, SourceSpec
from isocost.config.evaluation import ProtocolSpec
from isocost.config.model import ModelSpec, PCAAutoencoderSpec, TrainedAutoencoderSpec
from isocost.config.study import StudySpec
from isocost.config.training import TrainSpec
from isocost.config.types import DTypeName, TaskName
from isocost.data.latent_cache import forecast_bytes
from isocost.errors import ConfigError
from isocost.estimate.accelerators import DEFAULT_UTILISATION, Cluster, Work
from isocost.estimate.component_shapes import Shapes, extractor_gflop, feature_width
from isocost.estimate.planned_work import Plan, PlannedWork, plan
from isocost.experiments.study_assets import NUM_KEPT
from isocost.models.flops import model_cost
from isocost.training.memory_estimate import FLOAT, state_bytes, training_memory
from isocost.training.throughput_estimate import disk_bytes, suggest_settings

MIN_GFLOP = 10
"""Below this 64 rows are a millisecond or two of a large device, about what launching the kernels of a forward pass takes."""


@dataclass(frozen=True)
class SizeEstimate:
    """One size of one task.

    Attributes:
        images: that its trainings see.
        snapshots: at which a checkpoint is kept.
        training_gflop: 3 x GFLOP per forward x images; of students with their teacher's and average's passes.
        preparing_gflop: captions and images that are encoded in each step, and images that are drawn before.
        sweep_gflop: sampling, decoding and features.
        hours: on all devices, training and sweep.
        held_bytes: of memory in each process at the end of a backward pass; None of students, which are not judged.
        fits: whether a device has room for that and activations; None of students.
        remedy: what to change where it does not fit.
        disk_bytes: states at their most, checkpoints, and what points keep.
    """

    task: TaskName
    size: str
    width: int
    num_parameters: int
    gflop_per_forward: float
    num_trainings: int
    training_images: int
    snapshots: int
    points: int
    images: int
    training_gflop: float
    preparing_gflop: float
    sampling_gflop: float
    decoding_gflop: float
    features_gflop: float
    training_device_hours: float
    preparing_device_hours: float
    sweep_device_hours: float
    device_hours: float
    hours: float
    held_bytes: int | None
    fits: bool | None
    remedy: str
    states_bytes: int
    checkpoints_bytes: int
    points_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class AssetsEstimate:
    """What is made once: the autoencoder's training, and the latent cache; None where the study does not say how many images."""

    autoencoder_gflop: float
    autoencoder_device_hours: float
    cache_images: int | None
    cache_gflop: float | None
    cache_device_hours: float | None
    cache_bytes: int | None
    cache_bytes_per_image: int


@dataclass(frozen=True)
class StudyEstimate:
    """The whole; `total` has the sums of what was counted, and `not_counted` names the rest."""

    study: str
    cluster: Cluster
    utilisation: float
    sizes: tuple[SizeEstimate, ...]
    assets: AssetsEstimate
    total: dict[str, float]
    assumptions: tuple[str, ...]
    not_counted: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON."""
        return {
            "study": self.study,
            "devices": {"number": self.cluster.number, **asdict(self.cluster.device)},
            "utilisation": self.utilisation,
            "sizes": [asdict(size) for size in self.sizes],
            "materials": asdict(self.assets),
            "total": self.total,
            "assumptions": list(self.assumptions),
            "not_counted": list(self.not_counted),
        }


def estimate_study(study: StudySpec, cluster: Cluster, utilisation: float = DEFAULT_UTILISATION) -> StudyEstimate:
    """What a whole study would take; reads its file, and the configurations of autoencoder and caption encoder where they lie here.

    Args:
        study: what is to be done.
        cluster: the devices.
        utilisation: share of their peak that is reached, above 0 and at most 1.

    Raises:
        ConfigError: a share out of range, an autoencoder or caption encoder neither here nor known, a width that does not fit.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation:g}: give a share of the peak, above 0 and at most 1")
    shapes = Shapes.of(study)
    asked = plan(study, shapes)
    room = _rooms(asked.asked, study, cluster)
    calculator = _Calculator(study, shapes, cluster, utilisation)
    sizes = tuple(calculator.size(alike, room) for alike in _by_size(asked.asked))
    assets = calculator.assets()
    return StudyEstimate(
        study.name,
        cluster,
        utilisation,
        sizes,
        assets,
        _total(sizes, assets, cluster),
        (*_assumptions(study, shapes, cluster, utilisation, asked.asked, assets), *asked.assumptions),
        tuple(_not_counted(study, shapes, asked, assets)),
    )


def _by_size(asked: Iterable[PlannedWork]) -> list[list[PlannedWork]]:
    """The stages of a progressive student are one size."""
    return [list(alike) for _, alike in groupby(asked, lambda one: (one.run.task, one.cost.size, one.variant))]


class _Calculator:
    """GFLOP, hours and bytes of sizes."""

    def __init__(self, study: StudySpec, shapes: Shapes, cluster: Cluster, utilisation: float) -> None:
        self.study, self.shapes, self.cluster, self.utilisation = study, shapes, cluster, utilisation

    def device_hours(self, work: Work) -> float:
        return work.device_hours(self.cluster.device, self.utilisation)

    def size(self, alike: list[PlannedWork], room: dict[tuple[ModelSpec, TrainSpec], MemoryFit]) -> SizeEstimate:
        """One size, of one training or of several that follow each other."""
        first = alike[-1]
        points = [(protocol, point) for one in alike for protocol, some in one.points for point in some]
        images = sum(point.spec.num_images for _, point in points)
        training = _sum(Work.of(one.run.spec.dtype, one.gflop_per_image * one.training_images) for one in alike)
        preparing = _sum(self._preparing(one) for one in alike)
        sampling = _sum(
            Work.of(point.spec.dtype, one.cost.gflop_per_forward * point.nfe(one.run.model) * point.spec.num_images)
            for one in alike
            for _, some in one.points
            for point in some
        )
        decoding = Work(tf32=self.shapes.autoencoder.decode_gflop * images)
        features = Work(fp32=sum(extractor_gflop(protocol) * point.spec.num_images for protocol, point in points))
        hours = [self.device_hours(work) for work in (training, preparing, sampling + decoding + features)]
        states, checkpoints = (
            sum(one.num_trainings * count(one) for one in alike) for count in (_states_bytes, _checkpoints_bytes)
        )
        kept = sum(point_bytes(protocol, point.spec.num_images, self.study.data.resolution) for protocol, point in points)
        found = room.get((first.run.model, first.run.spec))
        return SizeEstimate(
            task=first.run.task,
            size=f"{first.cost.size} {first.variant}".rstrip(),
            width=first.cost.width,
            num_parameters=first.cost.num_parameters,
            gflop_per_forward=first.cost.gflop_per_forward,
            num_trainings=sum(one.num_trainings for one in alike),
            training_images=sum(one.training_images for one in alike),
            snapshots=sum(one.num_trainings * len(one.run.checkpoints) for one in alike),
            points=len(points),
            images=images,
            training_gflop=training.gflop,
            preparing_gflop=preparing.gflop,
            sampling_gflop=sampling.gflop,
            decoding_gflop=decoding.gflop,
            features_gflop=features.gflop,
            training_device_hours=hours[0],
            preparing_device_hours=hours[1],
            sweep_device_hours=hours[2],
            device_hours=sum(hours),
            hours=sum(hours) / self.cluster.number,
            held_bytes=None if found is None else found.held_bytes,
            fits=None if found is None else found.fits,
            remedy="" if found is None else found.remedy,
            states_bytes=states,
            checkpoints_bytes=checkpoints,
            points_bytes=kept,
            disk_bytes=states + checkpoints + kept,
        )

    def _preparing(self, one: PlannedWork) -> Work:
        """Captions and images that each step encodes, and images that are drawn before the first."""
        evaluations, drawn = one.drawn_before
        made = Work(fp32=one.cost.gflop_per_forward * evaluations * drawn, tf32=self.shapes.autoencoder.decode_gflop * drawn)
        if one.reads_captions and not self.study.text_encoder.cache_prompt_embeds:
            made += Work(fp32=(self.shapes.text_encoder.gflop or 0.0) * one.training_images)
        if one.encodes_images:
            made += Work(tf32=self.shapes.autoencoder.encode_gflop * one.training_images)
        return made

    def assets(self) -> AssetsEstimate:
        """Autoencoder and cache."""
        study, autoencoder, text = self.study, self.shapes.autoencoder, self.shapes.text_encoder
        side = study.data.resolution // autoencoder.factor
        trained = Work()
        if isinstance(study.autoencoder, TrainedAutoencoderSpec):
            trained = Work(tf32=3 * (autoencoder.encode_gflop + autoencoder.decode_gflop) * study.autoencoder.num_images)

        def size(images: int) -> int:
            latent, tokens = (
                (autoencoder.latent_channels, side, side),
                (study.text_encoder.max_tokens, text.cross_attention_dim),
            )
            return forecast_bytes(images, latent, images, tokens, study.text_encoder.cache_prompt_embeds)

        number = most_images(study.own.images)
        encoded = Work(
            tf32=autoencoder.encode_gflop, fp32=(text.gflop or 0.0) if study.text_encoder.cache_prompt_embeds else 0.0
        )
        return AssetsEstimate(
            autoencoder_gflop=trained.gflop,
            autoencoder_device_hours=self.device_hours(trained),
            cache_images=number,
            cache_gflop=None if number is None else encoded.gflop * number,
            cache_device_hours=None if number is None else self.device_hours(encoded) * number,
            cache_bytes=None if number is None else size(number),
            cache_bytes_per_image=size(1) - size(0),
        )


def _sum(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def _states_bytes(one: PlannedWork) -> int:
    return disk_bytes(one.run.spec, one.cost.num_parameters, 0)


def _checkpoints_bytes(one: PlannedWork) -> int:
    return len(one.run.checkpoints) * FLOAT * one.cost.num_parameters


def _rooms(asked: list[PlannedWork], study: StudySpec, cluster: Cluster) -> dict[tuple[ModelSpec, TrainSpec], MemoryFit]:
    """Of all trainings of a network alone: not of students, nor where the caption encoder learns as well."""
    judged = {"text2image", "superres"}
    if study.dreambooth is not None and not study.dreambooth.train_text_encoder:
        judged.add("dreambooth")
    models: dict[TrainSpec, set[ModelSpec]] = {}
    for one in asked:
        if one.run.task in judged:
            models.setdefault(one.run.spec, set()).add(one.run.model)
    return {
        (model, spec): room
        for spec, some in models.items()
        for model, room in memory_fits(some, spec, study.text_encoder.max_tokens, cluster).items()
    }


def _total(sizes: tuple[SizeEstimate, ...], assets: AssetsEstimate, cluster: Cluster) -> dict[str, float]:
    """Sums of what was counted. One process trains an autoencoder; all devices share the rest."""

    def over(value: Callable[[SizeEstimate], float]) -> float:
        return sum(value(size) for size in sizes)

    shared = over(lambda size: size.device_hours) + (assets.cache_device_hours or 0.0)
    gflop = over(lambda s: s.training_gflop + s.preparing_gflop + s.sampling_gflop + s.decoding_gflop + s.features_gflop)
    return {
        "points": over(lambda size: size.points),
        "images": over(lambda size: size.images),
        "training_images": over(lambda size: size.training_images),
        "gflop": gflop + assets.autoencoder_gflop + (assets.cache_gflop or 0.0),
        "training_device_hours": over(lambda size: size.training_device_hours),
        "preparing_device_hours": over(lambda size: size.preparing_device_hours),
        "sweep_device_hours": over(lambda size: size.sweep_device_hours),
        "materials_device_hours": assets.autoencoder_device_hours + (assets.cache_device_hours or 0.0),
        "device_hours": shared + assets.autoencoder_device_hours,
        "hours": shared / cluster.number + assets.autoencoder_device_hours,
        "disk_bytes": over(lambda size: size.disk_bytes) + (assets.cache_bytes or 0),
    }


# --- in words ---------------------------------------------------------------------------------------------------------


def _assumptions(
    study: StudySpec, shapes: Shapes, cluster: Cluster, share: float, asked: list[PlannedWork], assets: AssetsEstimate
) -> list[str]:
    device, source = cluster.device, study.data.train
    said = [
        f"{device.name}: {device.bf16_tflops:g} TFLOP/s of dense bf16, {device.tf32_tflops:g} of TF32, "
        f"{device.fp32_tflops:g} of fp32, {device.memory_gb} GB ({device.source}).",
        f"{share:.0%} of these rates is reached (--utilisation). Published: about 23 % in training on cached latents at 512 "
        "pixels (mosaicml/diffusion, A100), 32 % in sampling Stable Diffusion v1.5 compiled at batch 16 (A100).",
        "Training is 3 x GFLOP per forward x images: a backward pass is two forwards (arXiv 2001.08361). Sampling is GFLOP per "
        "forward x passes x evaluations x images; each image is decoded and measured.",
        _precisions({one.run.spec.dtype for one in asked}, {point.spec.dtype for point in _points(asked)}),
        "All of it is counted as run on the devices, which share it evenly and without loss; reading, saving, compiling, "
        "scores and report take no time.",
        "Prepared are the latent cache, captions in each step where their states are not cached (text.cache_prompt_embeds), the "
        "images that super-resolution starts from, and what DreamBooth draws of a class.",
        "Held are weights, gradients, moments and averages of each process; ! is where they and the activations of a "
        "microbatch (of one image, where it is auto) do not fit a device.",
        shapes.autoencoder.said,
        shapes.text_encoder.said,
        "Every value of guidance is drawn at every size, solver and number of steps: a race for the best one takes fewer "
        "images. First evaluations that points share are not taken off.",
    ]
    if assets.cache_images is not None:
        how = "" if isinstance(source, ScenesSource) else ", the most that data.train.limit lets in"
        said.append(f"data.train holds {assets.cache_images:,} images{how}, each with one caption of its own.")
    for batch in sorted({one.run.spec.batch_size for one in asked}):
        if batch % cluster.number:
            said.append(
                f"A batch of {batch} does not divide by {cluster.number} devices: train on a number that it divides by."
            )
    if min(one.cost.gflop_per_forward for one in asked) < MIN_GFLOP:
        said.append(
            f"Networks below {MIN_GFLOP} GFLOP are too small to keep a device busy and take longer: `isocost train STUDY "
            "--forecast` measures."
        )
    said.append("States are counted at their most; those of a finished training may be removed.")
    return said


def _points(asked: Iterable[PlannedWork]) -> Iterable[Any]:
    return (point for one in asked for _, some in one.points for point in some)


def _precisions(trained: set[DTypeName], sampled: set[DTypeName]) -> str:
    words = f"Networks are trained in {' and '.join(sorted(trained))} and sampled in {' and '.join(sorted(sampled))}"
    if "fp32" in trained | sampled:
        words += ", fp32 at the plain rate (convolutions that PyTorch runs as TF32 are faster)"
    return f"{words}; the autoencoder in fp32, its convolutions as TF32; caption encoder and extractors in plain fp32."


def _not_counted(study: StudySpec, shapes: Shapes, asked: Plan, assets: AssetsEstimate) -> list[str]:
    left = list(asked.not_counted)
    if assets.cache_images is None:
        left.append(
            f"the latent cache, {assets.cache_bytes_per_image:,} bytes an image and its encoding: data.train does not "
            "say how many images there are; --set data.train.limit=N does"
        )
    if shapes.text_encoder.gflop is None:
        left.append("encoding of captions: the kind of encoder is not one that is counted")
    if isinstance(study.autoencoder, PCAAutoencoderSpec):
        left.append("fitting the linear autoencoder, which takes seconds")
    if isinstance(study.autoencoder, TrainedAutoencoderSpec):
        left.append("the perceptual term of the autoencoder's training")
    if study.protocol.alignment != "none":
        left.append("the probe that reads captions back")
    left.append("what is made once for the sweep: captions, features of the reference images, floors")
    return left


_INT64 = 8
_OF_KEPT = {"fp32": 4, "fp16": 2}


def point_bytes(protocol: ProtocolSpec, num_images: int, resolution: int) -> int:
    """Bytes that a point keeps, within its headers: features, ids, alignment and pair scores of its images, a few whole."""
    by_image = _INT64 * (1 + len(protocol.paired_metrics) + (protocol.alignment != "none"))
    of_features = feature_width(protocol) * _OF_KEPT[protocol.feature_dtype]
    return num_images * (of_features + by_image) + min(num_images, NUM_KEPT) * 3 * resolution**2


def most_images(source: SourceSpec) -> int | None:
    """How many images a source holds at most, by the study alone; None where it does not say."""
    return source.num_images if isinstance(source, ScenesSource) else source.limit


@dataclass(frozen=True)
class MemoryFit:
    """What a process holds at the end of a backward pass, in bytes: weights, gradients, moments and averages.

    `fits` is with the activations of a microbatch: of `train.microbatch`, or of one image where that is "auto". `remedy` says
    what to change where it does not.
    """

    held_bytes: int
    fits: bool
    remedy: str


def memory_fits(models: Iterable[ModelSpec], spec: TrainSpec, num_tokens: int, cluster: Cluster) -> dict[ModelSpec, MemoryFit]:
    """Networks that differ in width alone: where one fits, narrower ones do, so they are tried from the widest on."""
    free, shares = cluster.device.memory_bytes, cluster.number if spec.sharding == "fsdp" else 1
    rows = 1 if spec.microbatch == "auto" else spec.microbatch
    found: dict[ModelSpec, MemoryFit] = {}
    fits = False
    for model in sorted(models, key=lambda model: model.width, reverse=True):
        cost = model_cost(model, num_tokens)
        held = state_bytes(spec, cost.num_parameters, cluster.number) + FLOAT * cost.num_parameters // shares
        if not fits and held < free:
            fits = training_memory(model, spec, rows, num_tokens, cluster.number).total <= free
        found[model] = MemoryFit(held, fits, "" if fits else suggest_settings(model, spec, cost, num_tokens, free))
    return found
