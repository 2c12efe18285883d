"""DreamBooth from every size: a network learns a subject from a few images.

A run is one size and one subject. Its points are scored twice: by similarity to the subject, and by the study's own protocol
on a few prompts, to measure prior preservation (whether the network still generates other content as well as before). The
checkpoint before the fine-tuning is scored in the same way.

Shapes: N images of a point, K images of a subject, P images of its class, R resolution.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isocost.config.base import digest
from isocost.config.evaluation import ProtocolSpec
from isocost.config.finetune import DreamboothSpec, PhotographedSubjects
from isocost.config.model import TextEncoderSpec
from isocost.config.sampling import SolverSpec
from isocost.data.dreambooth import Subject, read_subjects, synthetic_subjects
from isocost.data.latent_cache import MemoryCache
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError, RunError
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.reference_set import ReferenceSet, make_extractors, select_prompts
from isocost.experiments.base import EvalContext, EvalJob, Experiment, TrainingRun, make_run
from isocost.experiments.dreambooth_scores import SubjectScores
from isocost.experiments.pretrain import PretrainExperiment
from isocost.experiments.study_assets import StudyAssets
from isocost.models.checkpoint import load_checkpoint
from isocost.models.factory import build_network
from isocost.models.flops import model_cost
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.models.unet_with_text_encoder import TEXT_FOLDER, UNetWithTextEncoder
from isocost.sampling.generate import PromptEmbeds, generate, make_engine, schedule_of
from isocost.sampling.request import SampleRequest
from isocost.sweep.grid import SweepPoint, grid_points, run_points
from isocost.training.objectives import Dreambooth, Objective, training_schedule
from isocost.utils.device import best_device
from isocost.utils.tensor_files import read_tensors

logger = logging.getLogger(__name__)

DREAMBOOTH_VERSION = 1
PRETRAINED_BASELINE = "untuned"
MAX_SAVED_PER_SUBJECT = 5
MAX_SHOWN = 12
PRIOR_SEED = 2**40
"""Seed of the class images; no point has it."""


@dataclass
class _SizePoints:
    """Digests of the points of one size at one setting: lists with one point per subject, and the parent on the study."""

    tuned: list[str]
    untuned: list[str]
    tuned_on_study: list[str]
    untuned_on_study: str


class DreamboothExperiment(Experiment):
    """The part `dreambooth` of a study.

    It fine-tunes every size on each subject and scores the similarity to the subject and the prior preservation.
    """

    def __init__(self, spec: DreamboothSpec, assets: StudyAssets, family: PretrainExperiment) -> None:
        self.spec, self.assets, self.family = spec, assets, family
        self.sweep, self.protocol_spec, self.metric = spec.sweep, spec.protocol, spec.metric
        self._references: dict[str, ReferenceSet] = {}

    # --- subjects and prompts ---

    @cached_property
    def subjects(self) -> list[Subject]:
        """The subjects at the study's resolution, read or rendered on first use.

        Raises:
            ConfigError: a subject is unknown or has fewer than two images.
        """
        spec, resolution = self.spec.subjects, self.assets.study.data.resolution
        if isinstance(spec, PhotographedSubjects):
            subjects = read_subjects(Path(spec.path), spec.names, resolution)
        else:
            subjects = synthetic_subjects(spec.num_subjects, spec.num_images, resolution)
        for subject in subjects:
            if len(subject.images) < 2:
                raise ConfigError(f"dreambooth.subjects: {subject.name} has one image; give three to five")
        return subjects

    def _prompts(self, subject: Subject, token: str) -> list[str]:
        """Return the prompt of every sample: each prompt of the subject `num_images` times."""
        templates = subject.prompts[: self.spec.subjects.num_prompts]
        prompts = [" ".join(template.format(token, subject.class_word).split()) for template in templates]
        return [prompt for prompt in prompts for _ in range(self.spec.num_images)]

    def _subject_of(self, run: TrainingRun) -> Subject:
        return next(subject for subject in self.subjects if subject.name == run.variant)

    # --- trainings ---

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """Every subject from every size.

        Raises:
            ConfigError: the text encoder is trained and the training is sharded.
        """
        stage: dict[str, Any] = {"task": "dreambooth", "dreambooth": DREAMBOOTH_VERSION, "token": self.spec.token}
        stage |= {"prior": self.spec.prior.canonical(), "autoencoder": self.assets.autoencoder_digest}
        if self.spec.train_text_encoder:
            if self.spec.train.sharding != "none":
                raise ConfigError("dreambooth.train_text_encoder: needs dreambooth.train.sharding: none")
            stage["train_text_encoder"] = True
        runs = []
        for family_run in self.family.runs:
            gflop = model_cost(family_run.model, self.assets.study.text_encoder.max_tokens).gflop_per_forward
            parent = self.assets.store.folder("checkpoint", family_run.final)
            for subject in self.subjects:
                inputs = stage | {"parent": parent.name, "subject": subject.content}
                runs.append(make_run("dreambooth", family_run.model, self.spec.train, inputs, gflop, parent, subject.name))
        return runs

    def objective(self, run: TrainingRun, network: nn.Module) -> Objective:
        """Train on the subject's images with the prompt "a TOKEN CLASS", and on class images with "a CLASS"."""
        subject, spec = self._subject_of(run), self.spec
        images, prompts = [subject.images], [f"a {spec.token} {subject.class_word}"] * len(subject.images)
        if spec.prior.num_images:
            images.append(self._class_images(run, subject.class_word))
            prompts += [f"a {subject.class_word}"] * spec.prior.num_images
        cache = MemoryCache(torch.cat(images), prompts, self.assets.load_or_train_autoencoder(), self.assets.text_encoder)
        return Dreambooth(
            run.spec,
            cache,
            training_schedule(run.spec),
            len(subject.images),
            spec.prior.weight,
            trains_text_encoder=spec.train_text_encoder,
        )

    def _class_images(self, run: TrainingRun, class_word: str) -> Tensor:
        """Return the parent network's samples of the class, uint8 [P, 3, R, R]; the first process generates and stores them."""
        prior, store = self.spec.prior, self.assets.store
        parent = self._parent(run)
        stage = {"stage": "class-images", "version": DREAMBOOTH_VERSION, "checkpoint": parent.name, "class": class_word}
        name = digest(stage, {"num": prior.num_images, "num_steps": prior.num_steps, "guidance": prior.guidance})
        if self.assets.process.rank == 0 and not store.has("class-images", name):
            logger.info(f"generating {prior.num_images} class images of a {class_word} (width {run.model.width})")
            images = self._generate(parent, f"a {class_word}", prior.num_images)
            with store.create("class-images", name, {"caption": f"a {class_word}"}) as folder:
                save_file({"images": images}, folder / "images.safetensors")
        self.assets.process.wait()
        return read_tensors(store.open("class-images", name) / "images.safetensors", "images")["images"]

    def _generate(self, checkpoint: Path, prompt: str, num_images: int) -> Tensor:
        loaded, prior = load_checkpoint(checkpoint, best_device()), self.spec.prior
        coefficients = solver_coefficients(SolverSpec(), prior.num_steps, schedule_of(loaded.info))
        requests = [SampleRequest(i, 0, coefficients, prior.guidance, seed=PRIOR_SEED) for i in range(num_images)]
        prompts = PromptEmbeds.encode([prompt], self.assets.text_encoder)
        engine = make_engine(loaded.network, loaded.info, prompts, batch_size=self.sweep.batch_size)
        images: dict[int, Tensor] = {}
        for batch in generate(engine, self.assets.load_or_train_autoencoder(), requests):
            if batch.nonfinite:
                raise RunError(f"{checkpoint}: an image of the class contains NaN or inf; lower dreambooth.prior.guidance")
            images |= {result.request.sample_index: image for result, image in zip(batch.results, batch.images, strict=True)}
        return torch.stack([images[i] for i in range(num_images)])

    def _parent(self, run: TrainingRun) -> Path:
        assert run.parent is not None, "every run has a parent"
        if not run.parent.is_dir():
            raise ConfigError(f"{run.title}: its parent checkpoint does not exist yet; run `isocost train` or `isocost run`")
        return run.parent

    def network(self, run: TrainingRun) -> nn.Module:
        """Build the parent's network, with its text encoder if that is trained too.

        Raises:
            ConfigError: the parent does not exist yet.
        """
        if run.spec.sharding != "none" and self.assets.process.rank > 0:
            return build_network(run.model, "meta")
        unet = load_checkpoint(self._parent(run)).network.requires_grad_(True).train()
        if not self.spec.train_text_encoder:
            return unet
        text = MiniLMTextEncoder(self.assets.study.text_encoder)
        return UNetWithTextEncoder(unet, text.network, text.tokenizer.pad_token_id if text.uses_mask else None).train()

    def save(self, folder: Path, network: nn.Module, run: TrainingRun, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write the network, and the text encoder if it was trained."""
        if not isinstance(network, UNetWithTextEncoder):
            super().save(folder, network, run, weights)
            return
        tokenizer = self.assets.text_encoder.tokenizer
        network.save(folder, tokenizer, run.spec.prediction_type, run.spec.rescale_betas_zero_snr, weights)

    def checkpoint_metadata(self, run: TrainingRun) -> dict[str, Any]:
        """Return the parent, the subject as the variant, and the trained text encoder."""
        metadata: dict[str, Any] = {"task": "dreambooth", "parent": self._parent(run).name, "variant": run.variant}
        if self.spec.train_text_encoder:
            metadata["text_encoder"] = TextEncoderSpec(path=TEXT_FOLDER, max_tokens=self.assets.study.text_encoder.max_tokens)
        return metadata

    # --- points ---

    def validate(self) -> None:
        """Read the subjects and compute their reference features.

        Raises:
            ConfigError: a subject is unknown or has too few images, or weights of a metric are missing.
        """
        for subject in self.subjects:
            self._reference(subject)

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """Return the jobs of the run and of its parent, on the subject's prompts and on the study's prompts.

        The last four are: the final checkpoint on the subject and on the study, the parent on the subject and on the study.
        """
        subject, parent = self._subject_of(run), self._parent_digest(run)
        subject_reference, study_reference = self._reference(subject), self._study_reference
        subject_context = partial(self._eval_context, subject_reference)
        study_context = partial(self._eval_context, study_reference)
        subject_spec = self._protocol_spec(self.spec.protocol, subject_reference)
        study_spec = self._protocol_spec(self.assets.study.protocol, study_reference)
        checkpoints = tuple(run.checkpoints.values())
        tuned_on_subject = run_points(checkpoints, self.sweep, subject_spec, subject_reference.protocol)
        tuned_on_study = grid_points(run.final, self.sweep, study_spec, study_reference.protocol)
        untuned_on_subject = grid_points(parent, self.sweep, subject_spec, subject_reference.protocol)
        untuned_on_study = grid_points(parent, self.sweep, study_spec, study_reference.protocol)
        return [
            *(
                EvalJob(checkpoint, points, partial(subject_context, checkpoint))
                for checkpoint, points in tuned_on_subject.items()
            ),
            EvalJob(run.final, tuple(tuned_on_study), partial(study_context, run.final), protocol_spec=study_spec),
            EvalJob(parent, tuple(untuned_on_subject), subject_context),
            EvalJob(parent, tuple(untuned_on_study), study_context, protocol_spec=study_spec),
        ]

    @staticmethod
    def _parent_digest(run: TrainingRun) -> str:
        assert run.parent is not None, "every run has a parent"
        return run.parent.name

    @staticmethod
    def _protocol_spec(spec: ProtocolSpec, reference: ReferenceSet) -> ProtocolSpec:
        return spec.model_copy(update={"num_images": reference.protocol.num_images})

    def _eval_context(self, reference: ReferenceSet, tuned: str | None = None) -> EvalContext:
        """Build the context of a reference set.

        Args:
            reference: the subject's or the study's.
            tuned: digest of the fine-tuned checkpoint, whose own text encoder encodes the prompts if it was trained.
        """
        metrics = self.spec.protocol.metrics
        if reference is self._study_reference:
            metrics = self.assets.study.protocol.metrics
        text = self.assets.text_encoder
        # A checkpoint whose points are all scored may be absent; then nothing is sampled from these embeddings.
        if tuned is not None and self.spec.train_text_encoder and self.assets.store.has("checkpoint", tuned):
            text = MiniLMTextEncoder(load_checkpoint(self.assets.store.folder("checkpoint", tuned)).text_encoder, best_device())
        return EvalContext(reference, PromptEmbeds.encode(reference.prompts, text), self._saved_indices(reference), metrics)

    def _saved_indices(self, reference: ReferenceSet) -> list[int]:
        """Return the index of the first sample of each of the first prompts."""
        return list(range(0, len(reference.prompts), self.spec.num_images))[:MAX_SAVED_PER_SUBJECT]

    def _reference(self, subject: Subject) -> ReferenceSet:
        """Return the subject's reference set; for synthetic subjects its labels are the backgrounds that the prompts name."""
        if subject.name not in self._references:
            prompts, spec = self._prompts(subject, self.spec.token), self.spec.protocol
            labels = classifier = None
            if subject.backgrounds is not None and self.assets.study.protocol.alignment == "scenes":
                backgrounds = torch.tensor(subject.backgrounds).repeat_interleave(self.spec.num_images)[: len(prompts)]
                classifier = self.assets.load_or_train_attribute_classifier()
                labels = torch.full((len(prompts), len(classifier.network.num_classes)), -1)
                labels[:, 0] = backgrounds
            protocol = make_protocol(
                spec.model_copy(update={"num_images": len(prompts), "alignment": "none" if classifier is None else "scenes"}),
                resolution=self.assets.study.data.resolution,
                extractor=[extractor.id for extractor in self._extractors.values()],
                reference=subject.content,
                num_reference=len(subject.reference_images),
                prompts=prompts,
                attribute_classifier=None if classifier is None else self.assets.attribute_classifier_digest,
            )
            features = {name: extractor(subject.reference_images).cpu().numpy() for name, extractor in self._extractors.items()}
            prompts_without_token = self._prompts(subject, "")
            self._references[subject.name] = ReferenceSet(
                protocol,
                self._extractors,
                features,
                prompts,
                labels,
                classifier,
                feature_dtype=spec.feature_dtype,
                clip_texts=prompts_without_token,
            )
        return self._references[subject.name]

    @cached_property
    def _extractors(self) -> dict[str, Any]:
        return make_extractors(self.spec.protocol, best_device())

    @cached_property
    def _study_reference(self) -> ReferenceSet:
        """The study's reference set with `num_prior_images` prompts, to measure prior preservation."""
        full, spec = self.assets.reference, self.assets.study.protocol
        held_out = self.assets.images("reference")
        num_images = min(self.spec.num_prior_images, len(held_out))
        prompts, labels = select_prompts(held_out, num_images)
        protocol = self.assets.build_protocol(spec.model_copy(update={"num_images": num_images}), self.assets.extractors)
        return ReferenceSet(
            protocol,
            full.extractors,
            full.features,
            prompts,
            labels if full.attribute_classifier is not None else None,
            full.attribute_classifier,
            feature_dtype=full.feature_dtype,
        )

    # --- report ---

    @property
    def protocol_summary(self) -> str:
        """One sentence about the subjects and the protocol of the first one."""
        sentence = self._reference(self.subjects[0]).protocol.sentence()
        return f"{len(self.subjects)} subjects, each with its own images and prompts; {self.subjects[0].name}: {sentence}"

    @cached_property
    def _scores(self) -> SubjectScores:
        protocol, references = self.spec.protocol, tuple(self._reference(subject) for subject in self.subjects)
        store = self.assets.store
        return SubjectScores(store, references, protocol.metrics, protocol.num_bootstrap, protocol.seed)

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Similarity of the subjects' reference images to each other."""
        return {"photographs": self._scores.reference_similarity()}

    @property
    def sample_labels(self) -> list[str]:
        """Subject and prompt of the samples that the report shows."""
        return [f"{subject.name}: {self._reference(subject).prompts[i]}" for subject, i in self._shown()]

    def _shown(self) -> list[tuple[Subject, int]]:
        """Return subject and sample index of the samples that the report shows, the same number per subject."""
        saved = [(subject, self._saved_indices(self._reference(subject))) for subject in self.subjects]
        per_subject = max(1, MAX_SHOWN // len(saved))
        return [(subject, i) for subject, saved_indices in saved for i in saved_indices[:per_subject]][:MAX_SHOWN]

    def comparison_rows(self) -> Mapping[str, Tensor]:
        """Return a training image and a reference image of the subject, for each sample that the report shows."""
        shown = self._shown()
        return {
            "training image": torch.stack([subject.images[i % len(subject.images)] for subject, i in shown]),
            "reference image": torch.stack(
                [subject.reference_images[i % len(subject.reference_images)] for subject, i in shown]
            ),
        }

    def summarise(
        self, table: pd.DataFrame, samples: Mapping[str, np.ndarray]
    ) -> tuple[pd.DataFrame, Mapping[str, np.ndarray]]:
        """Return one row per size, setting and snapshot, tuned and untuned: means over the images of all subjects.

        A setting is left out until all subjects have a point.
        """
        protocols = {self._reference(subject).protocol.id: subject.name for subject in self.subjects}
        rows: list[dict[Any, Any]] = []
        images: dict[str, np.ndarray] = {}
        tuned = {name for run in self.runs for name in run.checkpoints.values()}
        subject_points = table[table["protocol"].isin(protocols)]
        subject_points = subject_points.assign(size=[self._label(row, tuned) for row in subject_points.to_dict("records")])
        for _, group in subject_points.groupby(["size", "images_seen", "solver", "num_steps", "guidance"]):
            if set(group["protocol"]) != set(protocols):
                continue
            ordered = group.set_index("protocol").loc[list(protocols)].reset_index()
            points = [str(point) for point in ordered["point"]]
            is_untuned = str(ordered["size"].iloc[0]).endswith(PRETRAINED_BASELINE)
            combined = {
                **self._scores.means(points),
                "point": digest({"points": points}),
                "protocol": digest({"protocols": sorted(protocols)})[:12],
                "is_final": is_untuned or bool(ordered["is_final"].all()),
                "training_gflop": math.nan if is_untuned else float(ordered["training_gflop"].sum()),
                "normalized_training_compute": math.nan if is_untuned else float(ordered["normalized_training_compute"].sum()),
                "num_images": int(ordered["num_images"].sum()),
            }
            rows.append({**ordered.iloc[0].to_dict(), **combined})
            if all(point in samples for point in points):
                images[str(combined["point"])] = self._shown_images(points, samples)
        return pd.DataFrame(rows) if rows else subject_points.iloc[:0], images

    @staticmethod
    def _label(row: Mapping[Any, Any], tuned: set[str]) -> str:
        size = str(row["size"]).split()[0]
        return size if row["checkpoint"] in tuned else f"{size} {PRETRAINED_BASELINE}"

    def _shown_images(self, points: list[str], samples: Mapping[str, np.ndarray]) -> np.ndarray:
        saved_images = {subject.name: samples[point] for subject, point in zip(self.subjects, points, strict=True)}
        saved_indices = {subject.name: self._saved_indices(self._reference(subject)) for subject in self.subjects}
        return np.stack([saved_images[subject.name][saved_indices[subject.name].index(i)] for subject, i in self._shown()])

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """Compare tuned with untuned, on the subjects and on the study's prompts, and each size with the next, per setting."""
        findings: dict[str, Any] = {}
        for setting in self._settings():
            label = f"{setting.spec.num_steps} steps, guidance {setting.spec.guidance:g}"
            sizes = self._points_by_size(setting)
            findings[f"tuned minus untuned, {label}"] = {
                size: self._scores.format_difference(points.tuned, points.untuned) for size, points in sizes.items()
            }
            findings[f"tuned minus untuned on the study's own prompts, subject by subject, {label}"] = {
                size: self._scores.format_changes(
                    points.tuned_on_study,
                    points.untuned_on_study,
                    self._study_reference,
                    self.assets.study.protocol.metrics,
                )
                for size, points in sizes.items()
            }
            findings[f"larger minus smaller, {label}"] = {
                f"{large} minus {small}": self._scores.format_difference(sizes[large].tuned, sizes[small].tuned)
                for small, large in pairwise(sizes)
            }
        return {title: values for title, values in findings.items() if values}

    def _settings(self) -> list[SweepPoint]:
        """Return the settings of the grid, as points of the first run."""
        run, subject = self.runs[0], self.subjects[0]
        reference = self._reference(subject)
        return grid_points(run.final, self.sweep, self._protocol_spec(self.spec.protocol, reference), reference.protocol)

    def _points_by_size(self, setting: SweepPoint) -> dict[str, _SizePoints]:
        """Return the points of every size whose points at a setting are all complete in this output folder."""
        points_by_size = {}
        for width in sorted({run.model.width for run in self.runs}):
            runs = [run for run in self.runs if run.model.width == width]
            points = _SizePoints([], [], [], "")
            for run in runs:
                jobs = self.jobs(run)[-4:]
                tuned, tuned_on_study, untuned, untuned_on_study = (self._point_at(job, setting) for job in jobs)
                points.tuned.append(tuned)
                points.untuned.append(untuned)
                points.tuned_on_study.append(tuned_on_study)
                points.untuned_on_study = untuned_on_study
            store = self.assets.store
            required = (*points.tuned, *points.untuned, *points.tuned_on_study, points.untuned_on_study)
            if all(store.has("point", point) for point in required):
                size = model_cost(runs[0].model, self.assets.study.text_encoder.max_tokens).size
                points_by_size[size] = points
        return points_by_size

    @staticmethod
    def _point_at(job: EvalJob, setting: SweepPoint) -> str:
        """Return the digest of the job's point with the same solver, number of steps and guidance."""
        names = ("solver", "num_steps", "guidance")
        return next(
            point.digest
            for point in job.points
            if all(getattr(point.spec, name) == getattr(setting.spec, name) for name in names)
        )
