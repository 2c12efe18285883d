"""DreamBooth from every size: a subject learned from a few images, drawn in new places, the rest kept.

Every run is one size and one subject. Its points are scored twice: by likeness to the subject, and by the study's own
protocol on a few images, which tells whether the model still draws what it drew. The untuned checkpoint is scored alike.

Shapes: N images of a point, K images of a subject, R resolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
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
from isocost.utils.progress import say

VERSION = 1
PRETRAINED_BASELINE = "untuned"
MAX_SHOWN = 5
PRIOR_SEED = 2**40
"""Noise of the class's images, apart from that of points."""


class DreamboothExperiment(Experiment):
    """`dreambooth` of a study."""

    def __init__(self, spec: DreamboothSpec, assets: StudyAssets, family: PretrainExperiment) -> None:
        self.spec, self.assets, self.family = spec, assets, family
        self.sweep, self.protocol_spec, self.metric = spec.sweep, spec.protocol, spec.metric
        self._references: dict[str, ReferenceSet] = {}

    # --- subjects and what is asked of them ---

    @cached_property
    def subjects(self) -> list[Subject]:
        """Read or drawn at the study's resolution.

        Raises:
            ConfigError: a subject is unknown or has no images.
        """
        of, resolution = self.spec.subjects, self.assets.study.data.resolution
        if isinstance(of, PhotographedSubjects):
            found = read_subjects(Path(of.path), of.names, resolution)
        else:
            found = synthetic_subjects(of.num_subjects, of.num_images, resolution)
        for subject in found:
            if len(subject.images) < 2:
                raise ConfigError(f"dreambooth.subjects: {subject.name} has one image; give three to five")
        return found

    def _prompts(self, subject: Subject, token: str) -> list[str]:
        """The prompts to draw, each `num_images` times."""
        templates = subject.prompts[: self.spec.subjects.num_prompts]
        each = [" ".join(template.format(token, subject.class_word).split()) for template in templates]
        return [prompt for prompt in each for _ in range(self.spec.num_images)]

    def _subject_of(self, run: TrainingRun) -> Subject:
        return next(subject for subject in self.subjects if subject.name == run.variant)

    # --- trainings ---

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """Every subject from every size.

        Raises:
            ConfigError: the text encoder is to be tuned and sharded.
        """
        stage: dict[str, Any] = {"task": "dreambooth", "dreambooth": VERSION, "token": self.spec.token}
        stage |= {"prior": self.spec.prior.canonical(), "autoencoder": self.assets.autoencoder_digest}
        if self.spec.train_text_encoder:
            if self.spec.train.sharding != "none":
                raise ConfigError("dreambooth.train_text_encoder: the text encoder is not sharded; take train.sharding: none")
            stage["train_text_encoder"] = True
        runs = []
        for family_run in self.family.runs:
            gflop = model_cost(family_run.model, self.assets.study.text_encoder.max_tokens).gflop_per_forward
            parent = self.assets.store.folder("checkpoint", family_run.final)
            for subject in self.subjects:
                own = stage | {"parent": parent.name, "subject": subject.content}
                runs.append(make_run("dreambooth", family_run.model, self.spec.train, own, gflop, parent, subject.name))
        return runs

    def task(self, run: TrainingRun, network: nn.Module) -> Objective:
        """The subject's images under "a TOKEN CLASS", and the class's own under "a CLASS"."""
        subject, spec = self._subject_of(run), self.spec
        images, prompts = [subject.images], [f"a {spec.token} {subject.class_word}"] * len(subject.images)
        if spec.prior.num_images:
            images.append(self._class_images(run, subject.class_word))
            prompts += [f"a {subject.class_word}"] * spec.prior.num_images
        cache = MemoryCache(torch.cat(images), prompts, self.assets.autoencoder, self.assets.text_encoder)
        return Dreambooth(
            run.spec,
            cache,
            training_schedule(run.spec),
            len(subject.images),
            spec.prior.weight,
            tunes_text=spec.train_text_encoder,
        )

    def _class_images(self, run: TrainingRun, class_word: str) -> Tensor:
        """What the untuned model draws of a class, uint8 [P, 3, R, R], stored; one process of several makes them."""
        prior, store = self.spec.prior, self.assets.store
        parent = self._parent(run)
        stage = {"stage": "class-images", "version": VERSION, "checkpoint": parent.name, "class": class_word}
        name = digest(stage, {"num": prior.num_images, "num_steps": prior.num_steps, "guidance": prior.guidance})
        if self.assets.part.rank == 0 and not store.has("class-images", name):
            say(f"{prior.num_images} images of a {class_word} by the untuned model (width {run.model.width})")
            made = self._draw(parent, f"a {class_word}", prior.num_images)
            with store.create("class-images", name, {"caption": f"a {class_word}"}) as folder:
                save_file({"images": made}, folder / "images.safetensors")
        self.assets.part.wait()
        return load_file(store.folder("class-images", name) / "images.safetensors")["images"]

    def _draw(self, checkpoint: Path, prompt: str, number: int) -> Tensor:
        opened, prior = load_checkpoint(checkpoint, best_device()), self.spec.prior
        table = solver_coefficients(SolverSpec(), prior.num_steps, schedule_of(opened.info))
        rows = [SampleRequest(i, 0, table, prior.guidance, seed=PRIOR_SEED) for i in range(number)]
        states = PromptEmbeds.of([prompt], self.assets.text_encoder)
        engine = make_engine(opened.network, opened.info, states, batch_size=self.sweep.batch_size)
        made: dict[int, Tensor] = {}
        for drawn in generate(engine, self.assets.autoencoder, rows):
            if drawn.broken:
                raise RunError(f"{checkpoint}: an image of the class is not finite numbers; lower dreambooth.prior.guidance")
            made |= {row.row.sample_index: image for row, image in zip(drawn.rows, drawn.images, strict=True)}
        return torch.stack([made[i] for i in range(number)])

    def _parent(self, run: TrainingRun) -> Path:
        assert run.parent is not None, "every run has one"
        if not run.parent.is_dir():
            raise ConfigError(f"{run.title}: no checkpoint to start from yet; `isocost train` or `isocost run` makes it")
        return run.parent

    def network(self, run: TrainingRun) -> nn.Module:
        """The parent's.

        Raises:
            ConfigError: the parent is not there.
        """
        if run.spec.sharding != "none" and self.assets.part.rank > 0:
            return build_network(run.model, "meta")
        unet = load_checkpoint(self._parent(run)).network.requires_grad_(True).train()
        if not self.spec.train_text_encoder:
            return unet
        text = MiniLMTextEncoder(self.assets.study.text_encoder)
        return UNetWithTextEncoder(unet, text.network, text.tokenizer.pad_token_id if text.uses_mask else None).train()

    def save(self, folder: Path, network: nn.Module, run: TrainingRun, weights: Iterable[tuple[str, Tensor]]) -> None:
        """The text encoder as well where it learned."""
        if not isinstance(network, UNetWithTextEncoder):
            super().save(folder, network, run, weights)
            return
        tokenizer = self.assets.text_encoder.tokenizer
        network.save(folder, tokenizer, run.spec.prediction_type, run.spec.rescale_betas_zero_snr, weights)

    def facts(self, run: TrainingRun) -> dict[str, Any]:
        """Where it came from, and the subject."""
        facts: dict[str, Any] = {"task": "dreambooth", "parent": self._parent(run).name, "variant": run.variant}
        if self.spec.train_text_encoder:
            facts["text_encoder"] = TextEncoderSpec(path=TEXT_FOLDER, max_tokens=self.assets.study.text_encoder.max_tokens)
        return facts

    # --- points ---

    def check(self) -> None:
        """The subjects and what tells of them can be had."""
        for subject in self.subjects:
            self._reference(subject)

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """Tuned and untuned, on the subject's prompts and on the study's own."""
        subject, parent = self._subject_of(run), self._parent_digest(run)
        asked, saved_indices = self._reference(subject), self._study_reference
        of_subject, of_study = partial(self._eval_context, asked), partial(self._eval_context, saved_indices)
        tuned_of_study = partial(of_study, run.final)
        asked_spec = self._spec_of(self.spec.protocol, asked)
        kept_spec = self._spec_of(self.assets.study.protocol, saved_indices)
        names = tuple(run.checkpoints.values())
        jobs = [
            EvalJob(name, points, partial(of_subject, name))
            for name, points in run_points(names, self.sweep, asked_spec, asked.protocol).items()
        ]
        return [
            *jobs,
            EvalJob(run.final, tuple(grid_points(run.final, self.sweep, kept_spec, saved_indices.protocol)), tuned_of_study),
            EvalJob(parent, tuple(grid_points(parent, self.sweep, asked_spec, asked.protocol)), of_subject),
            EvalJob(parent, tuple(grid_points(parent, self.sweep, kept_spec, saved_indices.protocol)), of_study),
        ]

    @staticmethod
    def _parent_digest(run: TrainingRun) -> str:
        assert run.parent is not None, "every run has one"
        return run.parent.name

    @staticmethod
    def _spec_of(spec: ProtocolSpec, reference: ReferenceSet) -> ProtocolSpec:
        return spec.model_copy(update={"num_images": reference.protocol.num_images})

    def _eval_context(self, reference: ReferenceSet, tuned: str | None = None) -> EvalContext:
        """`tuned` is the checkpoint whose own text encoder reads the captions, where it has one."""
        metrics = self.spec.protocol.metrics
        if reference is self._study_reference:
            metrics = self.assets.study.protocol.metrics
        text = self.assets.text_encoder
        if tuned is not None and self.spec.train_text_encoder:
            text = MiniLMTextEncoder(load_checkpoint(self.assets.store.folder("checkpoint", tuned)).text_encoder, best_device())
        return EvalContext(reference, PromptEmbeds.of(reference.prompts, text), self._kept_ids(reference), metrics)

    def _kept_ids(self, reference: ReferenceSet) -> list[int]:
        """The first image of each of the first prompts."""
        return list(range(0, len(reference.prompts), self.spec.num_images))[:MAX_SHOWN]

    def _reference(self, subject: Subject) -> ReferenceSet:
        """The subject's images, its prompts, and for planted subjects the backgrounds that these name."""
        if subject.name not in self._references:
            prompts, spec = self._prompts(subject, self.spec.token), self.spec.protocol
            labels = probe = None
            if subject.backgrounds is not None and self.assets.study.protocol.alignment == "scenes":
                grounds = torch.tensor(subject.backgrounds).repeat_interleave(self.spec.num_images)[: len(prompts)]
                probe = self.assets.probe()
                labels = torch.full((len(prompts), len(probe.network.num_classes)), -1)
                labels[:, 0] = grounds
            protocol = make_protocol(
                spec.model_copy(update={"num_images": len(prompts), "alignment": "none" if probe is None else "scenes"}),
                resolution=self.assets.study.data.resolution,
                extractor=[extractor.id for extractor in self._extractors.values()],
                reference=subject.content,
                num_reference=len(subject.others),
                prompts=prompts,
                probe=None if probe is None else self.assets.attribute_classifier_digest,
            )
            features = {name: extractor(subject.others).cpu().numpy() for name, extractor in self._extractors.items()}
            said = self._prompts(subject, "")
            made = ReferenceSet(
                protocol, self._extractors, features, prompts, labels, probe, feature_dtype=spec.feature_dtype, said=said
            )
            self._references[subject.name] = made
        return self._references[subject.name]

    @cached_property
    def _extractors(self) -> dict[str, Any]:
        return make_extractors(self.spec.protocol, best_device())

    @cached_property
    def _study_reference(self) -> ReferenceSet:
        """The study's own, with as many captions as tell whether the rest was kept."""
        whole, spec = self.assets.reference, self.assets.study.protocol
        held_out = self.assets.images("reference")
        number = min(self.spec.num_prior_images, len(held_out))
        fewer = spec.model_copy(update={"num_images": number})
        prompts, labels = select_prompts(held_out, number)
        protocol = self.assets.protocol_of(fewer, self.assets.extractors)
        told = labels if whole.probe is not None else None
        return ReferenceSet(
            protocol, whole.extractors, whole.features, prompts, told, whole.probe, feature_dtype=whole.feature_dtype
        )

    # --- report ---

    @property
    def protocol_summary(self) -> str:
        """The first subject's."""
        first = self._reference(self.subjects[0]).protocol.sentence()
        return f"{len(self.subjects)} subjects, each with its own images and prompts; {self.subjects[0].name}: {first}"

    @cached_property
    def _scores(self) -> SubjectScores:
        protocol, references = self.spec.protocol, tuple(self._reference(subject) for subject in self.subjects)
        store = self.assets.store
        return SubjectScores(store, references, protocol.metrics, protocol.num_bootstrap, protocol.seed)

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Likeness of the subjects' images to each other."""
        return {"photographs": self._scores.among_themselves()}

    @property
    def sample_labels(self) -> list[str]:
        """The first prompts of each subject."""
        return [f"{subject.name}: {self._reference(subject).prompts[i]}" for subject, i in self._shown()]

    def _shown(self) -> list[tuple[Subject, int]]:
        of_each = [(subject, self._kept_ids(self._reference(subject))) for subject in self.subjects]
        most = max(1, 12 // len(of_each))
        return [(subject, i) for subject, saved_indices in of_each for i in saved_indices[:most]][:12]

    def strips(self) -> Mapping[str, Tensor]:
        """An image that was learned from, and another of the subject."""
        shown = self._shown()
        return {
            "learned from": torch.stack([subject.images[i % len(subject.images)] for subject, i in shown]),
            "another": torch.stack([subject.others[i % len(subject.others)] for subject, i in shown]),
        }

    def summarise(
        self, table: pd.DataFrame, samples: Mapping[str, np.ndarray]
    ) -> tuple[pd.DataFrame, Mapping[str, np.ndarray]]:
        """One row a size, setting and mark, tuned and untuned: the means over all subjects' images, and their images."""
        protocols = {self._reference(subject).protocol.id: subject.name for subject in self.subjects}
        rows: list[dict[Any, Any]] = []
        images: dict[str, np.ndarray] = {}
        tuned = {name for run in self.runs for name in run.checkpoints.values()}
        asked = table[table["protocol"].isin(protocols)]
        asked = asked.assign(size=[self._label(row, tuned) for row in asked.to_dict("records")])
        for _, group in asked.groupby(["size", "images_seen", "solver", "num_steps", "guidance"]):
            if set(group["protocol"]) != set(protocols):
                continue
            ordered = group.set_index("protocol").loc[list(protocols)].reset_index()
            points = [str(point) for point in ordered["point"]]
            is_untuned = str(ordered["size"].iloc[0]).endswith(PRETRAINED_BASELINE)
            together = {
                **self._scores.means(points),
                "point": digest({"points": points}),
                "protocol": digest({"protocols": sorted(protocols)})[:12],
                "is_final": is_untuned or bool(ordered["is_final"].all()),
                "training_gflop": math.nan if is_untuned else float(ordered["training_gflop"].sum()),
                "normalized_training_compute": math.nan if is_untuned else float(ordered["normalized_training_compute"].sum()),
                "num_images": int(ordered["num_images"].sum()),
            }
            rows.append({**ordered.iloc[0].to_dict(), **together})
            if all(point in samples for point in points):
                images[str(together["point"])] = self._shown_images(points, samples)
        return pd.DataFrame(rows) if rows else asked.iloc[:0], images

    @staticmethod
    def _label(row: Mapping[Any, Any], tuned: set[str]) -> str:
        size = str(row["size"]).split()[0]
        return size if row["checkpoint"] in tuned else f"{size} {PRETRAINED_BASELINE}"

    def _shown_images(self, points: list[str], samples: Mapping[str, np.ndarray]) -> np.ndarray:
        of_subject = {subject.name: samples[point] for subject, point in zip(self.subjects, points, strict=True)}
        saved_indices = {subject.name: self._kept_ids(self._reference(subject)) for subject in self.subjects}
        return np.stack([of_subject[subject.name][saved_indices[subject.name].index(i)] for subject, i in self._shown()])

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """At each setting: tuned less untuned on the subject and on the study's own captions, and each size less the next."""
        told: dict[str, Any] = {}
        for spec in self._settings():
            label = f"{spec.spec.num_steps} steps, guidance {spec.spec.guidance:g}"
            sizes = self._points_by_size(spec)
            told[f"tuned less untuned, {label}"] = {
                size: self._scores.difference_between(tuned, untuned) for size, (tuned, untuned, _, _) in sizes.items()
            }
            told[f"the rest, on the study's own captions, subject by subject, {label}"] = {
                size: self._scores.changes(tuned, untuned, self._study_reference, self.assets.study.protocol.metrics)
                for size, (_, _, tuned, untuned) in sizes.items()
            }
            names = list(sizes)
            told[f"larger less smaller, {label}"] = {
                f"{large} less {small}": self._scores.difference_between(sizes[large][0], sizes[small][0])
                for small, large in pairwise(names)
            }
        return {title: values for title, values in told.items() if values}

    def _settings(self) -> list[SweepPoint]:
        """The grid's coordinates, as points of the first run."""
        run, subject = self.runs[0], self.subjects[0]
        reference = self._reference(subject)
        return grid_points(run.final, self.sweep, self._spec_of(self.spec.protocol, reference), reference.protocol)

    def _points_by_size(self, at: SweepPoint) -> dict[str, tuple[list[str], list[str], list[str], str]]:
        """By size: tuned and untuned points of all subjects, tuned points on the study's captions, and the untuned one."""
        found = {}
        for width in sorted({run.model.width for run in self.runs}):
            runs = [run for run in self.runs if run.model.width == width]
            tuned, untuned, saved_indices = [], [], []
            before = ""
            for run in runs:
                jobs = self.jobs(run)[-4:]
                one, after, other, study = (self._at(job, at) for job in jobs)
                tuned.append(one)
                saved_indices.append(after)
                untuned.append(other)
                before = study
            store = self.assets.store
            if all(store.has("point", point) for point in (*tuned, *untuned, *saved_indices, before)):
                size = model_cost(runs[0].model, self.assets.study.text_encoder.max_tokens).size
                found[size] = (tuned, untuned, saved_indices, before)
        return found

    @staticmethod
    def _at(job: EvalJob, at: SweepPoint) -> str:
        same = ("solver", "num_steps", "guidance")
        return next(
            point.digest for point in job.points if all(getattr(point.spec, name) == getattr(at.spec, name) for name in same)
        )
