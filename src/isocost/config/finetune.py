"""Configuration of fine-tuning: super-resolution, DreamBooth and distillation."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from isocost.config.base import LocalPath, Spec
from isocost.config.evaluation import MIN_IMAGES, PairedMetricName, ProtocolSpec
from isocost.config.sampling import SolverSpec
from isocost.config.sweep import SweepSpec, without_guides
from isocost.config.training import TrainSpec
from isocost.config.types import (
    MAX_CHANNELS,
    MAX_SAMPLES,
    NUM_TRAIN_TIMESTEPS,
    Channels,
    Guidance,
    ImagesSeen,
    NumSamples,
    NumSteps,
    Probability,
    Weight,
)

DistillVariant = Literal["consistency", "codi", "codi-efficient", "progressive"]
ADAPTED_VARIANTS: frozenset[DistillVariant] = frozenset({"codi", "codi-efficient"})
NO_ADAPTER = "codi copies the encoder of a U-Net, and a transformer has none; use consistency or progressive"
Range = tuple[Annotated[float, Field(ge=0, le=1000)], Annotated[float, Field(ge=0, le=1000)]]
Enlargement = Annotated[float, Field(gt=0, le=16)]
Quality = Annotated[float, Field(ge=0, le=100)]


class DegradationStage(Spec):
    """One of the two rounds of Real-ESRGAN's degradation. Defaults: its first round (arXiv 2107.10833, section 4.1)."""

    blur_probability: Probability = 1.0
    sinc_probability: Probability = Field(0.1, description="fraction of the blurs that are sinc filters")
    blur_sigma: Range = Field((0.2, 3.0), description="standard deviation of the blur, pixels")
    generalized_beta: Range = (0.5, 4.0)
    plateau_beta: Range = (1.0, 2.0)
    resize_probabilities: tuple[Probability, Probability, Probability] = Field(
        (0.2, 0.7, 0.1), description="probabilities to enlarge, to shrink, and not to resize"
    )
    resize_range: tuple[Enlargement, Enlargement] = Field((0.15, 1.5), description="factor on the target size")
    gaussian_probability: Probability = Field(0.5, description="fraction of Gaussian noise; the rest is Poisson noise")
    noise_sigma: Range = Field((1.0, 30.0), description="standard deviation of Gaussian noise, grey levels of 255")
    poisson_scale: Range = (0.05, 3.0)
    grey_noise_probability: Probability = 0.4
    jpeg_quality: tuple[Quality, Quality] = (30.0, 95.0)

    @model_validator(mode="after")
    def _ranges(self) -> DegradationStage:
        for name, value in self:
            if isinstance(value, tuple) and len(value) == 2 and value[0] > value[1]:
                raise ValueError(f"{name}: {list(value)} runs backwards; give [low, high]")
        if abs(sum(self.resize_probabilities) - 1) > 1e-6:
            raise ValueError(
                f"resize_probabilities {list(self.resize_probabilities)} do not add up to 1; change them so that they do"
            )
        return self


SECOND_STAGE = DegradationStage(
    blur_probability=0.8,
    blur_sigma=(0.2, 1.5),
    resize_probabilities=(0.3, 0.4, 0.3),
    resize_range=(0.3, 1.2),
    noise_sigma=(1.0, 25.0),
    poisson_scale=(0.05, 2.5),
)


class DegradationSpec(Spec):
    """The degradation to low resolution: Real-ESRGAN's two rounds and a final sinc filter, or only `bicubic` resizing."""

    kind: Literal["real-esrgan", "bicubic"] = "real-esrgan"
    first: DegradationStage = DegradationStage()
    second: DegradationStage = SECOND_STAGE
    final_sinc_probability: Probability = 0.8


class DistillSweepSpec(SweepSpec):
    """The sweep of few-step students. A progressive student uses DDIM at the steps of its stages instead."""

    solvers: tuple[SolverSpec, ...] = (SolverSpec(name="lcm"),)
    num_steps: tuple[NumSteps, ...] = (1, 2, 4, 8)
    snapshot_num_steps: NumSteps = 4

    @field_validator("guides")
    @classmethod
    def _no_guides(cls, guides: tuple[Any, ...]) -> tuple[Any, ...]:
        return without_guides(guides, "students have their guidance as an input or learned it")


class SuperresDistillSweepSpec(DistillSweepSpec):
    """A sweep without guidance by default."""

    guidance: tuple[Guidance, ...] = (1.0,)
    snapshot_guidance: Guidance = 1.0


class DistillGuideSpec(Spec):
    """The guide of the teachers: one network of the teacher's size or smaller. A student learns the guided pair."""

    size: Literal["smaller", "same"] | Channels | None = Field(
        None, description="smaller: the next smaller width; same: the teacher's own width; or a width of the family"
    )
    snapshot: Literal["last"] | ImagesSeen = Field(
        "last", description="last, or the number of images of a snapshot, as in train.snapshots"
    )
    checkpoint: LocalPath | None = Field(None, description="a checkpoint folder in place of a size")
    null_prompt: bool = Field(False, description="the guide gets the empty prompt in place of the image's prompt")

    @model_validator(mode="after")
    def _check_kind(self) -> DistillGuideSpec:
        if (self.size is None) is (self.checkpoint is None):
            raise ValueError("a guide has either size or checkpoint; give one of the two")
        if self.checkpoint is not None and self.snapshot != "last":
            raise ValueError("snapshot belongs to a size of the family; leave it out for a checkpoint")
        return self

    @property
    def title(self) -> str:
        """The guide for messages."""
        return ", ".join(f"{key}: {value}" for key, value in self.canonical().items())


class DistillSpec(Spec):
    """Few-step students of the last checkpoint of every size (arXiv 2404.01367, section 4.7).

    Fields not set in `train` are inherited from the `train` of the teacher, except `num_images`, `snapshots`,
    `snapshots_gflop` and `warmup_images`. `train.num_images` is per student; a progressive student divides it between its
    stages.
    """

    variants: tuple[DistillVariant, ...] = Field(("consistency",), min_length=1)
    teachers: tuple[str, ...] = Field((), description="checkpoint folders to distil, instead of those of the study")
    guidance_range: tuple[Guidance, Guidance] | None = Field(
        (1.0, 8.0), description="range of w, which becomes an input of the student (one pass); null disables guidance"
    )
    guide: DistillGuideSpec | None = Field(
        None, description="guide of the teachers: `guide + w (teacher - guide)`; null is the teacher with the empty prompt"
    )
    guidance_embed_dim: int = Field(
        256, ge=8, le=MAX_CHANNELS, description="width of the embedding of w; 256 in Stable Diffusion's students"
    )
    solver_steps: int = Field(
        50,
        ge=2,
        le=NUM_TRAIN_TIMESTEPS,
        description="number of training timesteps of consistency distillation; the solver lcm assumes 50",
    )
    huber_delta: float = Field(1e-3, gt=0, le=1e6, description="delta of the pseudo-Huber loss of consistency distillation")
    latent_weight: Weight = Field(1.0, description="CoDi: weight of the error in the clean latent")
    one_timestep_per_batch: bool = Field(False, description="one timestep per batch, as in CoDi; if false, one per image")
    target_half_life_images: ImagesSeen = Field(
        500, description="half-life of the EMA that gives the consistency targets, images"
    )
    stages: tuple[NumSteps, ...] = Field((16, 8, 4), description="progressive: number of steps after each stage")
    train: TrainSpec
    sweep: DistillSweepSpec = Field(description="sweep of the students; its guidance must be within guidance_range")
    metric: str | None = Field(None, description="main metric of its report; the teacher's if absent")

    @model_validator(mode="after")
    def _fits_together(self) -> DistillSpec:
        if NUM_TRAIN_TIMESTEPS % self.solver_steps:
            raise ValueError(f"solver_steps={self.solver_steps} does not divide {NUM_TRAIN_TIMESTEPS} timesteps; use 50")
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if not 0 < low <= high:
                raise ValueError(
                    f"guidance_range={[low, high]} runs backwards or is not above 0; give [low, high] with low > 0"
                )
        else:
            low, high = 1.0, 1.0
        if self.guide is not None and self.guidance_range is None:
            raise ValueError("guide: the student learns w of the pair, so it needs a guidance_range; give one, such as [1, 4]")
        if self.guide is not None and low < 1:
            raise ValueError(
                f"guidance_range={[low, high]}: w below 1 with a guide leads to the images of the guide; start at 1 or more"
            )
        has_snapshots = self.train.snapshots or self.train.snapshots_gflop
        guidance = (*self.sweep.guidance, *((self.sweep.snapshot_guidance,) if has_snapshots else ()))
        outside = [w for w in guidance if not low <= w <= high]
        if outside:
            raise ValueError(f"sweep.guidance: {outside[0]:g} is outside guidance_range, {low:g} to {high:g}; remove it")
        if low > 1 and any(interval is not None for interval in self.sweep.intervals):
            raise ValueError(f"sweep.guidance_intervals: guidance is 1 outside, which guidance_range {low:g} to {high:g} lacks")
        if any(2 * later != earlier for earlier, later in pairwise(self.stages)) or not self.stages:
            raise ValueError(
                f"stages={list(self.stages)}: each stage must have half the steps of the previous one, as in [16, 8, 4]"
            )
        if self.train.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"train.prediction_type: {self.train.prediction_type} cannot be distilled; use epsilon or v_prediction"
            )
        if self.train.sharding != "none":
            raise ValueError("train.sharding: distillation does not support sharding; use none")
        return self


class SuperresDistillSpec(DistillSpec):
    """Few-step students of super-resolution, without guidance by default."""

    guidance_range: tuple[Guidance, Guidance] | None = None
    sweep: SuperresDistillSweepSpec = SuperresDistillSweepSpec()


class SuperresSweepSpec(SweepSpec):
    """A sweep without guidance by default."""

    guidance: tuple[Guidance, ...] = (1.0,)
    snapshot_guidance: Guidance = 1.0


class SuperresProtocolSpec(ProtocolSpec):
    """Metrics between images and their originals, and between both sets."""

    metrics: tuple[str, ...] = ("mmd", "frechet")
    paired_metrics: tuple[PairedMetricName, ...] = ("psnr", "ssim", "lpips")


class SuperresSpec(Spec):
    """Super-resolution, fine-tuned from the last checkpoint of every size (arXiv 2404.01367, section 4.3).

    Fields not set in `train` are inherited from the study's `train`, except `num_images`, `snapshots`, `snapshots_gflop` and
    `warmup_images`.
    """

    scale: int = Field(4, ge=2, le=64, description="enlargement")
    degradation: DegradationSpec = DegradationSpec()
    captions: Literal["empty", "dataset"] = Field("empty", description="train on the empty caption or on those of the data set")
    parents: tuple[str, ...] = Field((), description="checkpoint folders to start from, instead of the study's family")
    starts: tuple[Literal["pretrained", "scratch"], ...] = Field(
        ("pretrained",), min_length=1, description="initial weights: the parent's, or random ones for comparison"
    )
    train: TrainSpec
    sweep: SuperresSweepSpec
    protocol: SuperresProtocolSpec = SuperresProtocolSpec()
    metric: str = Field("lpips", description="main metric of its report")
    distill: SuperresDistillSpec | None = Field(None, description="few-step students of the fine-tuned models")


class PhotographedSubjects(Spec):
    """A folder in the layout of google/dreambooth: one folder per subject, and `prompts_and_classes.txt`."""

    kind: Literal["folder"]
    path: LocalPath
    names: tuple[str, ...] = Field((), description="subjects; all if empty")
    num_prompts: NumSamples | None = Field(None, description="number of prompts per subject, the first ones; all 25 if absent")


class SyntheticSubjects(Spec):
    """Rendered objects that occur in no scene and no caption, so that learning them can be measured."""

    kind: Literal["scenes"]
    num_subjects: NumSamples = 1
    num_images: NumSamples = Field(4, description="training images per subject")
    num_prompts: NumSamples | None = Field(None, description="number of prompts per subject; all if absent")


class PriorSpec(Spec):
    """Prior preservation: training also uses images of the class that the original model generates."""

    num_images: int = Field(100, ge=0, le=MAX_SAMPLES, description="class images; 0 disables prior preservation")
    weight: Weight = Field(1.0, description="weight of their loss")
    num_steps: NumSteps = 20
    guidance: Guidance = 3.0


class DreamboothSweepSpec(SweepSpec):
    """The paper's sweep by default (arXiv 2404.01367, section 4.4)."""

    num_steps: tuple[NumSteps, ...] = (50,)
    guidance: tuple[Guidance, ...] = (7.5,)
    snapshot_num_steps: NumSteps = 50
    snapshot_guidance: Guidance = 7.5
    search: Literal["grid"] = "grid"

    @field_validator("guides")
    @classmethod
    def _no_guides(cls, guides: tuple[Any, ...]) -> tuple[Any, ...]:
        return without_guides(guides, "no smaller network is fine-tuned on the same subject in the same way")


class DreamboothProtocolSpec(ProtocolSpec):
    """The protocol of `dreambooth`. Its default metric is the similarity to the images of the subject."""

    metrics: tuple[str, ...] = ("subject_similarity",)


class DreamboothSpec(Spec):
    """A subject learned from a few images, fine-tuned from the last checkpoint of every size (arXiv 2208.12242).

    Fields not set in `train` are inherited as in `SuperresSpec`, except that caption dropout is 0.
    """

    subjects: Annotated[PhotographedSubjects | SyntheticSubjects, Field(discriminator="kind")]
    token: str = Field("sks", min_length=1, description="the rare word that names the subject in prompts")
    prior: PriorSpec = PriorSpec()
    train_text_encoder: bool = Field(False, description="also fine-tune the text encoder; the checkpoint then contains it")
    num_images: NumSamples = Field(4, description="images per prompt")
    num_prior_images: int = Field(
        128,
        ge=MIN_IMAGES,
        le=MAX_SAMPLES,
        description="images of other prompts, which show the quality that the model lost on them",
    )
    train: TrainSpec
    sweep: DreamboothSweepSpec = DreamboothSweepSpec()
    protocol: DreamboothProtocolSpec = DreamboothProtocolSpec()
    metric: str = Field("subject_efficientnet", description="main metric of its report")
