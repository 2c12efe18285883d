"""Estimate a study on named devices without running it: points, images, hours and disk, with all assumptions.

Hours are GFLOP / (peak rate x utilisation). Training takes 3 x GFLOP per forward x images, because a backward pass costs two
forward passes (Kaplan et al., arXiv 2001.08361, section 2.1). Sampling takes GFLOP per forward x forward passes x images; each
image is also decoded and its features are computed.
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
from isocost.data.latent_cache import estimate_cache_bytes
from isocost.errors import ConfigError
from isocost.estimate.accelerators import DEFAULT_UTILISATION, Cluster, Work
from isocost.estimate.component_shapes import ComponentShapes, extractor_gflop, feature_width, uncounted_extractors
from isocost.estimate.planned_work import PlannedWork, StudyPlan, plan_study
from isocost.experiments.study_assets import NUM_SAVED_IMAGES
from isocost.models.flops import model_cost
from isocost.training.memory_estimate import FLOAT, state_bytes, training_memory
from isocost.training.throughput_estimate import disk_bytes, suggest_settings

MIN_GFLOP = 10
"""Below this, a forward pass of 64 samples takes 1-2 ms on a large device, about as long as launching its kernels."""


@dataclass(frozen=True)
class SizeEstimate:
    """Estimate of one size of one task.

    Attributes:
        task: the task.
        size: name of the size.
        width: width of the network.
        num_parameters: parameters of the network.
        gflop_per_forward: GFLOP of one forward pass.
        num_trainings: number of trainings.
        training_images: images seen by all trainings.
        snapshots: checkpoints that are saved.
        points: points of the sweep.
        images: images of all points.
        training_gflop: 3 x GFLOP per forward x images; for students including the passes of their teacher and EMA.
        preparing_gflop: prompts and images that are encoded in each step, and images that are sampled before the training.
        sampling_gflop: sampling of all points.
        decoding_gflop: decoding of all images.
        features_gflop: features of all images.
        training_device_hours: hours of one device for `training_gflop`.
        preparing_device_hours: hours of one device for `preparing_gflop`.
        sweep_device_hours: hours of one device for sampling, decoding and features.
        device_hours: sum of the three.
        hours: `device_hours` divided by the number of devices.
        model_state_bytes: memory of each process for weights, gradients, optimizer moments and EMA weights; None for students,
            whose memory is not estimated.
        fits: whether this and the activations fit into a device; None for students.
        remedy: settings to change if it does not fit.
        resume_state_bytes: disk for resume states, at their maximum.
        checkpoints_bytes: disk for checkpoints.
        points_bytes: disk for results of points.
        disk_bytes: sum of the three.
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
    model_state_bytes: int | None
    fits: bool | None
    remedy: str
    resume_state_bytes: int
    checkpoints_bytes: int
    points_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class AssetsEstimate:
    """Estimate of the shared assets: the autoencoder's training and the latent cache.

    Fields of the cache are None if the study does not set the number of images.
    """

    autoencoder_gflop: float
    autoencoder_device_hours: float
    cache_images: int | None
    cache_gflop: float | None
    cache_device_hours: float | None
    cache_bytes: int | None
    cache_bytes_per_image: int


@dataclass(frozen=True)
class StudyEstimate:
    """Estimate of a study; `total` has the sums of everything that was counted, `not_counted` lists the other parts."""

    study: str
    cluster: Cluster
    utilisation: float
    sizes: tuple[SizeEstimate, ...]
    assets: AssetsEstimate
    total: dict[str, float]
    assumptions: tuple[str, ...]
    not_counted: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """The estimate as a JSON document."""
        return {
            "study": self.study,
            "devices": {"number": self.cluster.number, **asdict(self.cluster.device)},
            "utilisation": self.utilisation,
            "sizes": [asdict(size) for size in self.sizes],
            "assets": asdict(self.assets),
            "total": self.total,
            "assumptions": list(self.assumptions),
            "not_counted": list(self.not_counted),
        }


def estimate_study(study: StudySpec, cluster: Cluster, utilisation: float = DEFAULT_UTILISATION) -> StudyEstimate:
    """Estimate a whole study from its file and the configs of its autoencoder and text encoder, if these are available.

    Args:
        study: the study.
        cluster: the devices.
        utilisation: fraction of their peak performance that is reached, in (0, 1].

    Raises:
        ConfigError: the utilisation is out of range, autoencoder or text encoder are neither available nor known, or a width
            does not fit.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"--utilisation {utilisation:g}: must be a fraction of the peak, above 0 and at most 1")
    shapes = ComponentShapes.from_study(study)
    plan = plan_study(study, shapes)
    memory = _check_memory(plan.work, study, cluster)
    calculator = _Calculator(study, shapes, cluster, utilisation)
    sizes = tuple(calculator.size(works, memory) for works in _group_by_size(plan.work))
    assets = calculator.assets()
    return StudyEstimate(
        study.name,
        cluster,
        utilisation,
        sizes,
        assets,
        _total(sizes, assets, cluster),
        (*_assumptions(study, shapes, cluster, utilisation, plan.work, assets), *plan.assumptions),
        tuple(_not_counted(study, shapes, plan, assets)),
    )


def _group_by_size(works: Iterable[PlannedWork]) -> list[list[PlannedWork]]:
    """Group works by size; the stages of a progressive student are one size."""
    return [list(group) for _, group in groupby(works, lambda work: (work.run.task, work.cost.size, work.variant))]


class _Calculator:
    def __init__(self, study: StudySpec, shapes: ComponentShapes, cluster: Cluster, utilisation: float) -> None:
        self.study, self.shapes, self.cluster, self.utilisation = study, shapes, cluster, utilisation

    def device_hours(self, work: Work) -> float:
        return work.device_hours(self.cluster.device, self.utilisation)

    def size(self, works: list[PlannedWork], memory: dict[tuple[ModelSpec, TrainSpec], MemoryFit]) -> SizeEstimate:
        """Estimate one size with one training, or with several consecutive trainings."""
        last = works[-1]
        points = [(protocol, point) for work in works for protocol, scored in work.points for point in scored]
        images = sum(point.spec.num_images for _, point in points)
        training = _sum(Work.of(work.run.spec.dtype, work.gflop_per_image * work.training_images) for work in works)
        preparing = _sum(self._preparing(work) for work in works)
        sampling = _sum(
            Work.of(point.spec.dtype, work.gflop_of(point) * point.spec.num_images)
            for work in works
            for _, scored in work.points
            for point in scored
        )
        decoding = Work(tf32=self.shapes.autoencoder.decode_gflop * images)
        features = Work(fp32=sum(extractor_gflop(protocol) * point.spec.num_images for protocol, point in points))
        hours = [self.device_hours(work) for work in (training, preparing, sampling + decoding + features)]
        resume_states, checkpoints = (
            sum(work.num_trainings * count(work) for work in works) for count in (_resume_state_bytes, _checkpoints_bytes)
        )
        results = sum(point_bytes(protocol, point.spec.num_images, self.study.data.resolution) for protocol, point in points)
        fit = memory.get((last.run.model, last.run.spec))
        return SizeEstimate(
            task=last.run.task,
            size=f"{last.cost.size} {last.variant}".rstrip(),
            width=last.cost.width,
            num_parameters=last.cost.num_parameters,
            gflop_per_forward=last.cost.gflop_per_forward,
            num_trainings=sum(work.num_trainings for work in works),
            training_images=sum(work.training_images for work in works),
            snapshots=sum(work.num_trainings * len(work.run.checkpoints) for work in works),
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
            model_state_bytes=None if fit is None else fit.model_state_bytes,
            fits=None if fit is None else fit.fits,
            remedy="" if fit is None else fit.remedy,
            resume_state_bytes=resume_states,
            checkpoints_bytes=checkpoints,
            points_bytes=results,
            disk_bytes=resume_states + checkpoints + results,
        )

    def _preparing(self, planned: PlannedWork) -> Work:
        """Prompts and images that each step encodes, and images that are sampled before the first step."""
        passes, num_images = planned.class_images
        work = Work(
            fp32=planned.cost.gflop_per_forward * passes * num_images,
            tf32=self.shapes.autoencoder.decode_gflop * num_images,
        )
        if planned.has_captions and not self.study.text_encoder.cache_prompt_embeds:
            work += Work(fp32=(self.shapes.text_encoder.gflop or 0.0) * planned.training_images)
        if planned.encodes_images:
            work += Work(tf32=self.shapes.autoencoder.encode_gflop * planned.training_images)
        return work

    def assets(self) -> AssetsEstimate:
        """Estimate the autoencoder's training and the latent cache."""
        study, autoencoder, text_encoder = self.study, self.shapes.autoencoder, self.shapes.text_encoder
        latent_size = study.data.resolution // autoencoder.factor
        caches_embeds = study.text_encoder.cache_prompt_embeds
        training = Work()
        if isinstance(study.autoencoder, TrainedAutoencoderSpec):
            training = Work(tf32=3 * (autoencoder.encode_gflop + autoencoder.decode_gflop) * study.autoencoder.num_images)

        def cache_bytes(num_images: int) -> int:
            latent = (autoencoder.latent_channels, latent_size, latent_size)
            embeds = (study.text_encoder.max_tokens, text_encoder.cross_attention_dim)
            return estimate_cache_bytes(num_images, latent, num_images, embeds, caches_embeds)

        num_images = max_num_images(study.training_parts.images)
        encoding = Work(tf32=autoencoder.encode_gflop, fp32=(text_encoder.gflop or 0.0) if caches_embeds else 0.0)
        return AssetsEstimate(
            autoencoder_gflop=training.gflop,
            autoencoder_device_hours=self.device_hours(training),
            cache_images=num_images,
            cache_gflop=None if num_images is None else encoding.gflop * num_images,
            cache_device_hours=None if num_images is None else self.device_hours(encoding) * num_images,
            cache_bytes=None if num_images is None else cache_bytes(num_images),
            cache_bytes_per_image=cache_bytes(1) - cache_bytes(0),
        )


def _sum(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def _resume_state_bytes(work: PlannedWork) -> int:
    return disk_bytes(work.run.spec, work.cost.num_parameters, 0)


def _checkpoints_bytes(work: PlannedWork) -> int:
    return len(work.run.checkpoints) * FLOAT * work.cost.num_parameters


def _check_memory(works: list[PlannedWork], study: StudySpec, cluster: Cluster) -> dict[tuple[ModelSpec, TrainSpec], MemoryFit]:
    """Check the memory of all trainings of a single network: not of students, nor with a trained text encoder."""
    tasks = {"text2image", "superres"}
    if study.dreambooth is not None and not study.dreambooth.train_text_encoder:
        tasks.add("dreambooth")
    models_by_spec: dict[TrainSpec, set[ModelSpec]] = {}
    for work in works:
        if work.run.task in tasks:
            models_by_spec.setdefault(work.run.spec, set()).add(work.run.model)
    return {
        (model, spec): fit
        for spec, models in models_by_spec.items()
        for model, fit in memory_fits(models, spec, study.text_encoder.max_tokens, cluster).items()
    }


def _total(sizes: tuple[SizeEstimate, ...], assets: AssetsEstimate, cluster: Cluster) -> dict[str, float]:
    """Sums of everything that was counted. One process trains an autoencoder; all devices share the other work."""

    def total(value: Callable[[SizeEstimate], float]) -> float:
        return sum(value(size) for size in sizes)

    shared = total(lambda size: size.device_hours) + (assets.cache_device_hours or 0.0)
    gflop = total(lambda s: s.training_gflop + s.preparing_gflop + s.sampling_gflop + s.decoding_gflop + s.features_gflop)
    return {
        "points": total(lambda size: size.points),
        "images": total(lambda size: size.images),
        "training_images": total(lambda size: size.training_images),
        "gflop": gflop + assets.autoencoder_gflop + (assets.cache_gflop or 0.0),
        "training_device_hours": total(lambda size: size.training_device_hours),
        "preparing_device_hours": total(lambda size: size.preparing_device_hours),
        "sweep_device_hours": total(lambda size: size.sweep_device_hours),
        "assets_device_hours": assets.autoencoder_device_hours + (assets.cache_device_hours or 0.0),
        "device_hours": shared + assets.autoencoder_device_hours,
        "hours": shared / cluster.number + assets.autoencoder_device_hours,
        "disk_bytes": total(lambda size: size.disk_bytes) + (assets.cache_bytes or 0),
    }


# --- sentences --------------------------------------------------------------------------------------------------------


def _assumptions(
    study: StudySpec,
    shapes: ComponentShapes,
    cluster: Cluster,
    utilisation: float,
    works: list[PlannedWork],
    assets: AssetsEstimate,
) -> list[str]:
    device, source = cluster.device, study.data.train
    sentences = [
        f"{device.name}: {device.bf16_tflops:g} TFLOP/s of dense bf16, {device.tf32_tflops:g} of TF32, "
        f"{device.fp32_tflops:g} of fp32, {device.memory_gb} GB ({device.source}).",
        f"The utilisation is {utilisation:.0%} of these rates (--utilisation). Published values: about 23 % for training on "
        "cached latents at 512 pixels (mosaicml/diffusion, A100), 32 % for sampling Stable Diffusion v1.5, compiled, in "
        "batches of 16 (A100).",
        "Training costs 3 x GFLOP per forward x images, because a backward pass costs two forward passes (arXiv 2001.08361). "
        "Sampling costs GFLOP per forward x forward passes x images. Each image is decoded and its features are computed.",
        _format_dtypes({work.run.spec.dtype for work in works}, {point.spec.dtype for point in _points(works)}),
        "All work runs on the devices, evenly divided and without loss. Loading, saving, compiling, scores and the report take "
        "no time.",
        "Preparation is the latent cache, prompts that are encoded in each step if their embeddings are not cached "
        "(text_encoder.cache_prompt_embeds), the low-resolution images of super-resolution, and DreamBooth's class images.",
        "Memory is that of weights, gradients, optimizer moments and EMA weights in each process. A ! marks sizes that do not "
        "fit into a device together with the activations of a microbatch (of one image if train.microbatch is auto).",
        shapes.autoencoder.description,
        shapes.text_encoder.description,
        "Every guidance value is sampled at every size, solver and number of steps; a guidance search needs fewer images. "
        "First steps that points share are not subtracted.",
    ]
    if assets.cache_images is not None:
        limit = "" if isinstance(source, ScenesSource) else " (data.train.limit)"
        sentences.append(f"data.train has {assets.cache_images:,} images{limit}, each with its own caption.")
    for batch in sorted({work.run.spec.batch_size for work in works}):
        if batch % cluster.number:
            sentences.append(
                f"A batch of {batch} is not divisible by {cluster.number} devices: train on a number that divides it."
            )
    if min(work.cost.gflop_per_forward for work in works) < MIN_GFLOP:
        sentences.append(
            f"Networks below {MIN_GFLOP} GFLOP are too small to keep a device busy and take longer: measure them with "
            "`isocost train STUDY --estimate`."
        )
    sentences.append("Resume states are counted at their maximum; those of finished trainings may be deleted.")
    return sentences


def _points(works: Iterable[PlannedWork]) -> Iterable[Any]:
    return (point for work in works for _, scored in work.points for point in scored)


def _format_dtypes(trained: set[DTypeName], sampled: set[DTypeName]) -> str:
    sentence = f"Networks are trained in {' and '.join(sorted(trained))} and sampled in {' and '.join(sorted(sampled))}"
    if "fp32" in trained | sampled:
        sentence += ", with fp32 at its full-precision rate (convolutions that PyTorch runs in TF32 are faster)"
    return (
        f"{sentence}. The autoencoder runs in fp32 with convolutions in TF32; the text encoder and the feature extractors run "
        "in fp32."
    )


def _not_counted(study: StudySpec, shapes: ComponentShapes, plan: StudyPlan, assets: AssetsEstimate) -> list[str]:
    parts = list(plan.not_counted)
    parts += uncounted_extractors(protocol for work in plan.work for protocol, _ in work.points)
    if assets.cache_images is None:
        parts.append(
            f"the latent cache ({assets.cache_bytes_per_image:,} bytes per image) and its encoding: data.train does not set "
            "the number of images; set it with --set data.train.limit=N"
        )
    if shapes.text_encoder.gflop is None:
        parts.append("encoding of prompts: the architecture of the text encoder is unknown")
    if isinstance(study.autoencoder, PCAAutoencoderSpec):
        parts.append("fitting the PCA autoencoder, which takes seconds")
    if isinstance(study.autoencoder, TrainedAutoencoderSpec):
        parts.append("the perceptual loss of the autoencoder's training")
    if study.protocol.alignment != "none":
        parts.append("the attribute classifier of the alignment score")
    parts.append("shared results of the sweep: prompt embeddings, features of the reference images, reconstruction floors")
    return parts


_INT64 = 8
_FEATURE_BYTES = {"fp32": 4, "fp16": 2}


def point_bytes(protocol: ProtocolSpec, num_images: int, resolution: int) -> int:
    """Disk space of a point without file headers: features, ids, alignment and paired scores, and a few images."""
    scores = _INT64 * (1 + len(protocol.paired_metrics) + (protocol.alignment != "none"))
    features = feature_width(protocol) * _FEATURE_BYTES[protocol.feature_dtype]
    return num_images * (features + scores) + min(num_images, NUM_SAVED_IMAGES) * 3 * resolution**2


def max_num_images(source: SourceSpec) -> int | None:
    """Maximum number of images of a source according to the study; None if the study does not set it."""
    return source.num_images if isinstance(source, ScenesSource) else source.limit


@dataclass(frozen=True)
class MemoryFit:
    """Memory of a training in each process.

    Attributes:
        model_state_bytes: weights, gradients, optimizer moments and EMA weights.
        fits: whether this and the activations of a microbatch fit into a device; the microbatch is `train.microbatch`, or one
            image if that is "auto".
        remedy: settings to change if it does not fit.
    """

    model_state_bytes: int
    fits: bool
    remedy: str


def memory_fits(models: Iterable[ModelSpec], spec: TrainSpec, num_tokens: int, cluster: Cluster) -> dict[ModelSpec, MemoryFit]:
    """Check the memory of networks that differ only in width.

    If a network fits, narrower ones do too, so the widest are checked first.
    """
    free, num_shards = cluster.device.memory_bytes, cluster.number if spec.sharding == "fsdp" else 1
    microbatch = 1 if spec.microbatch == "auto" else spec.microbatch
    results: dict[ModelSpec, MemoryFit] = {}
    fits = False
    for model in sorted(models, key=lambda model: model.width, reverse=True):
        cost = model_cost(model, num_tokens)
        model_states = state_bytes(spec, cost.num_parameters, cluster.number) + FLOAT * cost.num_parameters // num_shards
        if not fits and model_states < free:
            fits = training_memory(model, spec, microbatch, num_tokens, cluster.number).total <= free
        remedy = "" if fits else suggest_settings(model, spec, cost, num_tokens, free)
        results[model] = MemoryFit(model_states, fits, remedy)
    return results
