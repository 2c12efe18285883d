"""The specs of what is tuned from a trained family."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from isocost.config.base import Spec
from isocost.config.evaluation import MIN_IMAGES, MetricGroupName, PairedMetricName, ProtocolSpec
from isocost.config.sampling import SolverSpec
from isocost.config.sweep import SweepSpec
from isocost.config.training import TrainSpec
from isocost.config.types import NUM_TRAIN_TIMESTEPS

DistillVariant = Literal["consistency", "codi", "codi-efficient", "progressive"]
ADAPTED_VARIANTS: frozenset[DistillVariant] = frozenset({"codi", "codi-efficient"})
NO_ADAPTER = "codi adapts a U-Net's encoder, and a transformer has none; take consistency or progressive"
Range = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]


class DegradationStage(Spec):
    """One of the two rounds of Real-ESRGAN's degradation; the first one's published values (arXiv 2107.10833, section 4.1)."""

    blur_probability: float = Field(1.0, ge=0, le=1)
    sinc_probability: float = Field(0.1, ge=0, le=1, description="share of the blurs that are sinc filters")
    blur_sigma: Range = Field((0.2, 3.0), description="pixels")
    generalized_beta: Range = (0.5, 4.0)
    plateau_beta: Range = (1.0, 2.0)
    resize_probabilities: tuple[float, float, float] = Field((0.2, 0.7, 0.1), description="enlarged, shrunk, kept")
    resize_range: Range = Field((0.15, 1.5), description="of the side it would have")
    gaussian_probability: float = Field(0.5, ge=0, le=1, description="share of Gaussian noise, the rest is Poisson's")
    noise_sigma: Range = Field((1.0, 30.0), description="grey levels")
    poisson_scale: Range = (0.05, 3.0)
    grey_noise_probability: float = Field(0.4, ge=0, le=1)
    jpeg_quality: Range = (30.0, 95.0)

    @model_validator(mode="after")
    def _ranges(self) -> DegradationStage:
        for name, value in self:
            if isinstance(value, tuple) and len(value) == 2 and value[0] > value[1]:
                raise ValueError(f"{name}: {list(value)} runs backwards")
        if abs(sum(self.resize_probabilities) - 1) > 1e-6:
            raise ValueError(f"resize_probabilities {list(self.resize_probabilities)} do not add up to 1")
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
    """How an image loses its resolution: Real-ESRGAN's two rounds and a final sinc filter, or `bicubic` alone."""

    kind: Literal["real-esrgan", "bicubic"] = "real-esrgan"
    first: DegradationStage = DegradationStage()
    second: DegradationStage = SECOND_STAGE
    final_sinc_probability: float = Field(0.8, ge=0, le=1)


class DistillSweepSpec(SweepSpec):
    """Few steps by consistency sampling. A progressive student takes DDIM's steps instead, those of its stages."""

    solvers: tuple[SolverSpec, ...] = (SolverSpec(name="lcm"),)
    num_steps: tuple[Annotated[int, Field(ge=1, le=NUM_TRAIN_TIMESTEPS)], ...] = (1, 2, 4, 8)
    snapshot_num_steps: int = Field(4, ge=1, le=NUM_TRAIN_TIMESTEPS)


class SuperresDistillSweepSpec(DistillSweepSpec):
    """Without guidance where nothing else is said."""

    guidance: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    snapshot_guidance: float = Field(1.0, ge=0)


class DistillSpec(Spec):
    """Few-step students of the last checkpoint of every size (arXiv 2404.01367, section 4.7).

    `train` takes what it does not say from that of the teacher, numbers of images and snapshots apart. `train.num_images` are those
    of a student; of a progressive one they are shared out over its stages.
    """

    variants: tuple[DistillVariant, ...] = Field(("consistency",), min_length=1)
    teachers: tuple[str, ...] = Field((), description="checkpoint folders to distil, in place of the study's own")
    guidance_range: tuple[float, float] | None = Field(
        (1.0, 8.0), description="w is drawn from it and becomes an input of the student, of one pass; null: no guidance"
    )
    guidance_embed_dim: int = Field(256, ge=8, description="width of its embedding; Stable Diffusion's students have 256")
    solver_steps: int = Field(50, ge=2, description="grid of consistency distillation; the solver lcm counts on 50")
    huber_delta: float = Field(1e-3, gt=0, description="of consistency distillation's pseudo-Huber distance")
    latent_weight: float = Field(1.0, ge=0, description="CoDi: of the clean latent's error beside the noise's consistency")
    one_timestep_per_batch: bool = Field(False, description="CoDi's own way; every image draws its own where false")
    target_half_life_images: int = Field(500, ge=1, description="of the average that consistency is asked with")
    stages: tuple[Annotated[int, Field(ge=1)], ...] = Field((16, 8, 4), description="steps after each stage of progressive")
    train: TrainSpec
    sweep: DistillSweepSpec = Field(description="guidance within guidance_range")
    metric: str | None = Field(None, description="what its report leads with; that of the teacher's where absent")

    @model_validator(mode="after")
    def _fits_together(self) -> DistillSpec:
        if NUM_TRAIN_TIMESTEPS % self.solver_steps:
            raise ValueError(f"solver_steps={self.solver_steps} does not divide {NUM_TRAIN_TIMESTEPS} timesteps")
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if not 0 < low <= high:
                raise ValueError(f"guidance_range={[low, high]} runs backwards, or begins at 0")
        else:
            low, high = 1.0, 1.0
        asked = (
            *self.sweep.guidance,
            *((self.sweep.snapshot_guidance,) if self.train.snapshots or self.train.snapshots_gflop else ()),
        )
        outside = [w for w in asked if not low <= w <= high]
        if outside:
            raise ValueError(f"sweep.guidance: {outside[0]:g} lies outside what students learn, {low:g} to {high:g}")
        if any(2 * later != earlier for earlier, later in pairwise(self.stages)) or not self.stages:
            raise ValueError(f"stages={list(self.stages)}: each has half the steps of the one before")
        if self.train.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"train.prediction_type: {self.train.prediction_type} is not distilled; epsilon and v_prediction are"
            )
        if self.train.sharding != "none":
            raise ValueError("train.sharding: a student and its teacher are not sharded; take none")
        return self


class SuperresDistillSpec(DistillSpec):
    """Without guidance where nothing else is said."""

    guidance_range: tuple[float, float] | None = None
    sweep: SuperresDistillSweepSpec = SuperresDistillSweepSpec()


class SuperresSweepSpec(SweepSpec):
    """Without guidance where nothing else is said."""

    guidance: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    snapshot_guidance: float = Field(1.0, ge=0)


class SuperresProtocolSpec(ProtocolSpec):
    """Images against their originals, and both sets."""

    metrics: tuple[MetricGroupName, ...] = ("mmd", "frechet")
    paired_metrics: tuple[PairedMetricName, ...] = ("psnr", "ssim", "lpips")


class SuperresSpec(Spec):
    """Super-resolution, fine-tuned from the last checkpoint of every size (arXiv 2404.01367, section 4.3).

    `train` takes what it does not say from the study's own `train`, numbers of images and snapshots apart.
    """

    scale: int = Field(4, ge=2)
    degradation: DegradationSpec = DegradationSpec()
    captions: Literal["empty", "dataset"] = "empty"
    parents: tuple[str, ...] = Field((), description="checkpoint folders to start from, in place of the study's own family")
    starts: tuple[Literal["pretrained", "scratch"], ...] = Field(("pretrained",), min_length=1)
    train: TrainSpec
    sweep: SuperresSweepSpec
    protocol: SuperresProtocolSpec = SuperresProtocolSpec()
    metric: str = Field("lpips", description="what its report leads with")
    distill: SuperresDistillSpec | None = Field(None, description="few-step students of what was tuned")


class PhotographedSubjects(Spec):
    """Folders of photographs beside google/dreambooth's `prompts_and_classes.txt`; all subjects where `names` is empty."""

    kind: Literal["folder"]
    path: str
    names: tuple[str, ...] = ()
    num_prompts: int | None = Field(None, ge=1, description="the first prompts of each subject; all 25 where absent")


class SyntheticSubjects(Spec):
    """Drawn objects that the scenes never show and no caption can name: what was learned can be measured."""

    kind: Literal["scenes"]
    num_subjects: int = Field(1, ge=1)
    num_images: int = Field(4, ge=1, description="to learn from")
    num_prompts: int | None = Field(None, ge=1)


class PriorSpec(Spec):
    """Prior preservation: the untuned model's own images of the class are learned beside the subject's."""

    num_images: int = Field(100, ge=0, description="0 tunes without it")
    weight: float = Field(1.0, ge=0, description="of their loss")
    num_steps: int = Field(20, ge=1, le=NUM_TRAIN_TIMESTEPS)
    guidance: float = Field(3.0, ge=0)


class DreamboothSweepSpec(SweepSpec):
    """The paper's setting where nothing else is said (arXiv 2404.01367, section 4.4)."""

    num_steps: tuple[Annotated[int, Field(ge=1, le=NUM_TRAIN_TIMESTEPS)], ...] = (50,)
    guidance: tuple[Annotated[float, Field(ge=0)], ...] = (7.5,)
    snapshot_num_steps: int = Field(50, ge=1, le=NUM_TRAIN_TIMESTEPS)
    snapshot_guidance: float = Field(7.5, ge=0)
    search: Literal["grid"] = "grid"


class DreamboothProtocolSpec(ProtocolSpec):
    """Likeness to the subject's images; with CLIP among the features also to the prompt."""

    metrics: tuple[MetricGroupName, ...] = ("subject_similarity",)


class DreamboothSpec(Spec):
    """A subject learned from a few images, from the last checkpoint of every size (arXiv 2208.12242).

    `train` takes what it does not say from the study's own `train`, as super-resolution's does, without caption dropout.
    """

    subjects: Annotated[PhotographedSubjects | SyntheticSubjects, Field(discriminator="kind")]
    token: str = Field("sks", min_length=1, description="the rare word that comes to mean the subject")
    prior: PriorSpec = PriorSpec()
    train_text_encoder: bool = Field(False, description="the text encoder learns as well, and becomes part of the checkpoint")
    num_images: int = Field(4, ge=1, description="images of each prompt")
    num_prior_images: int = Field(128, ge=MIN_IMAGES, description="by which it is told whether the rest was kept")
    train: TrainSpec
    sweep: DreamboothSweepSpec = DreamboothSweepSpec()
    protocol: DreamboothProtocolSpec = DreamboothProtocolSpec()
    metric: str = Field("subject_efficientnet", description="what its report leads with")
