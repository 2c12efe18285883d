"""DreamBooth from every size: a subject learned from a few pictures, drawn in new places, the rest kept.

Every run is one size and one subject. Its points are scored twice: by likeness to the subject, and by the study's own
protocol on a few pictures, which tells whether the model still draws what it drew. The untuned checkpoint is scored alike.

Shapes: N pictures of a point, K pictures of a subject, R resolution.
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
from isocost.config.model import TextSpec
from isocost.config.sampling import SamplerSpec
from isocost.data.dreambooth import Subject, planted_subjects, read_subjects
from isocost.data.latent_cache import MemoryCache
from isocost.diffusion.solvers import build_table
from isocost.errors import RequestError, WorkError
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.reference_set import Reference, captions_to_draw, make_extractors
from isocost.experiments.base import Bench, Experiment, Job, Run, make_run
from isocost.experiments.dreambooth_scores import SubjectScores
from isocost.experiments.pretrain import TextToImageExperiment
from isocost.experiments.study_assets import Materials
from isocost.models.checkpoint import load_checkpoint
from isocost.models.factory import build_network
from isocost.models.flops import model_cost
from isocost.models.text_encoder import TextCodec
from isocost.models.unet_with_text_encoder import TEXT_FOLDER, JointNetwork
from isocost.sampling.generate import CaptionStates, generate, make_engine, schedule_of
from isocost.sampling.request import Row
from isocost.sweep.grid import Point, grid_points, run_points
from isocost.training.objectives import Dreambooth, Task, training_schedule
from isocost.utils.device import best_device
from isocost.utils.progress import say

VERSION = 1
UNTUNED = "untuned"
MOST_PICTURED = 5
PRIOR_SEED = 2**40
"""Noise of the class's pictures, apart from that of points."""


class DreamboothExperiment(Experiment):
    """`dreambooth` of a study."""

    def __init__(self, spec: DreamboothSpec, materials: Materials, family: TextToImageExperiment) -> None:
        self.spec, self.materials, self.family = spec, materials, family
        self.sweep, self.protocol_spec, self.metric = spec.sweep, spec.protocol, spec.metric
        self._references: dict[str, Reference] = {}

    # --- subjects and what is asked of them ---

    @cached_property
    def subjects(self) -> list[Subject]:
        """Read or drawn at the study's resolution.

        Raises:
            RequestError: a subject is unknown or has no pictures.
        """
        of, resolution = self.spec.subjects, self.materials.study.data.resolution
        if isinstance(of, PhotographedSubjects):
            found = read_subjects(Path(of.path), of.names, resolution)
        else:
            found = planted_subjects(of.num_subjects, of.num_pictures, resolution)
        for subject in found:
            if len(subject.pictures) < 2:
                raise RequestError(f"dreambooth.subjects: {subject.name} has one picture; give three to five")
        return found

    def _prompts(self, subject: Subject, token: str) -> list[str]:
        """The prompts to draw, each `num_pictures` times."""
        templates = subject.prompts[: self.spec.subjects.num_prompts]
        each = [" ".join(template.format(token, subject.class_word).split()) for template in templates]
        return [prompt for prompt in each for _ in range(self.spec.num_pictures)]

    def _subject_of(self, run: Run) -> Subject:
        return next(subject for subject in self.subjects if subject.name == run.variant)

    # --- trainings ---

    @cached_property
    def runs(self) -> list[Run]:
        """Every subject from every size.

        Raises:
            RequestError: the text encoder is to be tuned and sharded.
        """
        stage: dict[str, Any] = {"task": "dreambooth", "dreambooth": VERSION, "token": self.spec.token}
        stage |= {"prior": self.spec.prior.canonical(), "codec": self.materials.codec_digest}
        if self.spec.tune_text:
            if self.spec.train.sharding != "none":
                raise RequestError("dreambooth.tune_text: the text encoder is not sharded; take train.sharding: none")
            stage["tune_text"] = True
        runs = []
        for family_run in self.family.runs:
            gflop = model_cost(family_run.model, self.materials.study.text.max_tokens).gflop_per_forward
            parent = self.materials.store.folder("checkpoint", family_run.final)
            for subject in self.subjects:
                own = stage | {"parent": parent.name, "subject": subject.content}
                runs.append(make_run("dreambooth", family_run.model, self.spec.train, own, gflop, parent, subject.name))
        return runs

    def task(self, run: Run, network: nn.Module) -> Task:
        """The subject's pictures under "a TOKEN CLASS", and the class's own under "a CLASS"."""
        subject, spec = self._subject_of(run), self.spec
        pictures, captions = [subject.pictures], [f"a {spec.token} {subject.class_word}"] * len(subject.pictures)
        if spec.prior.num_pictures:
            pictures.append(self._class_pictures(run, subject.class_word))
            captions += [f"a {subject.class_word}"] * spec.prior.num_pictures
        cache = MemoryCache(torch.cat(pictures), captions, self.materials.codec, self.materials.text)
        return Dreambooth(
            run.spec, cache, training_schedule(run.spec), len(subject.pictures), spec.prior.weight, tunes_text=spec.tune_text
        )

    def _class_pictures(self, run: Run, class_word: str) -> Tensor:
        """What the untuned model draws of a class, uint8 [P, 3, R, R], stored; one process of several makes them."""
        prior, store = self.spec.prior, self.materials.store
        parent = self._parent(run)
        stage = {"stage": "class-pictures", "version": VERSION, "checkpoint": parent.name, "class": class_word}
        name = digest(stage, {"num": prior.num_pictures, "num_steps": prior.num_steps, "guidance": prior.guidance})
        if self.materials.part.rank == 0 and not store.has("class-pictures", name):
            say(f"{prior.num_pictures} pictures of a {class_word} by the untuned model (width {run.model.width})")
            made = self._draw(parent, f"a {class_word}", prior.num_pictures)
            with store.create("class-pictures", name, {"caption": f"a {class_word}"}) as folder:
                save_file({"pictures": made}, folder / "pictures.safetensors")
        self.materials.part.wait()
        return load_file(store.folder("class-pictures", name) / "pictures.safetensors")["pictures"]

    def _draw(self, checkpoint: Path, caption: str, number: int) -> Tensor:
        opened, prior = load_checkpoint(checkpoint, best_device()), self.spec.prior
        table = build_table(SamplerSpec(), prior.num_steps, schedule_of(opened.info))
        rows = [Row(i, 0, table, prior.guidance, seed=PRIOR_SEED) for i in range(number)]
        states = CaptionStates.of([caption], self.materials.text)
        engine = make_engine(opened.network, opened.info, states, bucket_size=self.sweep.bucket_size)
        made: dict[int, Tensor] = {}
        for drawn in generate(engine, self.materials.codec, rows):
            if drawn.broken:
                raise WorkError(f"{checkpoint}: a picture of the class is not finite numbers; lower dreambooth.prior.guidance")
            made |= {row.row.picture_id: picture for row, picture in zip(drawn.rows, drawn.pictures, strict=True)}
        return torch.stack([made[i] for i in range(number)])

    def _parent(self, run: Run) -> Path:
        assert run.parent is not None, "every run has one"
        if not run.parent.is_dir():
            raise RequestError(f"{run.title}: no checkpoint to start from yet; `isocost train` or `isocost run` makes it")
        return run.parent

    def network(self, run: Run) -> nn.Module:
        """The parent's.

        Raises:
            RequestError: the parent is not there.
        """
        if run.spec.sharding != "none" and self.materials.part.rank > 0:
            return build_network(run.model, "meta")
        unet = load_checkpoint(self._parent(run)).network.requires_grad_(True).train()
        if not self.spec.tune_text:
            return unet
        text = TextCodec(self.materials.study.text)
        return JointNetwork(unet, text.network, text.tokenizer.pad_token_id if text.uses_mask else None).train()

    def save(self, folder: Path, network: nn.Module, run: Run, weights: Iterable[tuple[str, Tensor]]) -> None:
        """The text encoder as well where it learned."""
        if not isinstance(network, JointNetwork):
            super().save(folder, network, run, weights)
            return
        tokenizer = self.materials.text.tokenizer
        network.save(folder, tokenizer, run.spec.prediction, run.spec.zero_terminal_snr, weights)

    def facts(self, run: Run) -> dict[str, Any]:
        """Where it came from, and the subject."""
        facts: dict[str, Any] = {"task": "dreambooth", "parent": self._parent(run).name, "variant": run.variant}
        if self.spec.tune_text:
            facts["text"] = TextSpec(path=TEXT_FOLDER, max_tokens=self.materials.study.text.max_tokens)
        return facts

    # --- points ---

    def check(self) -> None:
        """The subjects and what tells of them can be had."""
        for subject in self.subjects:
            self._reference(subject)

    def jobs(self, run: Run) -> list[Job]:
        """Tuned and untuned, on the subject's prompts and on the study's own."""
        subject, parent = self._subject_of(run), self._parent_digest(run)
        asked, kept = self._reference(subject), self._study_reference
        of_subject, of_study = partial(self._bench, asked), partial(self._bench, kept)
        tuned_of_study = partial(of_study, run.final)
        asked_spec = self._spec_of(self.spec.protocol, asked)
        kept_spec = self._spec_of(self.materials.study.protocol, kept)
        names = tuple(run.checkpoints.values())
        jobs = [
            Job(name, points, partial(of_subject, name))
            for name, points in run_points(names, self.sweep, asked_spec, asked.protocol).items()
        ]
        return [
            *jobs,
            Job(run.final, tuple(grid_points(run.final, self.sweep, kept_spec, kept.protocol)), tuned_of_study),
            Job(parent, tuple(grid_points(parent, self.sweep, asked_spec, asked.protocol)), of_subject),
            Job(parent, tuple(grid_points(parent, self.sweep, kept_spec, kept.protocol)), of_study),
        ]

    @staticmethod
    def _parent_digest(run: Run) -> str:
        assert run.parent is not None, "every run has one"
        return run.parent.name

    @staticmethod
    def _spec_of(spec: ProtocolSpec, reference: Reference) -> ProtocolSpec:
        return spec.model_copy(update={"num_pictures": reference.protocol.num_pictures})

    def _bench(self, reference: Reference, tuned: str | None = None) -> Bench:
        """`tuned` is the checkpoint whose own text encoder reads the captions, where it has one."""
        distances = self.spec.protocol.distances
        if reference is self._study_reference:
            distances = self.materials.study.protocol.distances
        text = self.materials.text
        if tuned is not None and self.spec.tune_text:
            text = TextCodec(load_checkpoint(self.materials.store.folder("checkpoint", tuned)).text, best_device())
        return Bench(reference, CaptionStates.of(reference.captions, text), self._kept_ids(reference), distances)

    def _kept_ids(self, reference: Reference) -> list[int]:
        """The first picture of each of the first prompts."""
        return list(range(0, len(reference.captions), self.spec.num_pictures))[:MOST_PICTURED]

    def _reference(self, subject: Subject) -> Reference:
        """The subject's pictures, its prompts, and for planted subjects the backgrounds that these name."""
        if subject.name not in self._references:
            captions, spec = self._prompts(subject, self.spec.token), self.spec.protocol
            labels = probe = None
            if subject.backgrounds is not None and self.materials.study.protocol.alignment == "scenes":
                grounds = torch.tensor(subject.backgrounds).repeat_interleave(self.spec.num_pictures)[: len(captions)]
                probe = self.materials.probe()
                labels = torch.full((len(captions), len(probe.network.num_classes)), -1)
                labels[:, 0] = grounds
            protocol = make_protocol(
                spec.model_copy(update={"num_pictures": len(captions), "alignment": "none" if probe is None else "scenes"}),
                resolution=self.materials.study.data.resolution,
                extractor=[extractor.id for extractor in self._extractors.values()],
                reference=subject.content,
                num_reference=len(subject.others),
                captions=captions,
                probe=None if probe is None else self.materials.probe_digest,
            )
            features = {name: extractor(subject.others).cpu().numpy() for name, extractor in self._extractors.items()}
            said = self._prompts(subject, "")
            made = Reference(protocol, self._extractors, features, captions, labels, probe, kept=spec.kept, said=said)
            self._references[subject.name] = made
        return self._references[subject.name]

    @cached_property
    def _extractors(self) -> dict[str, Any]:
        return make_extractors(self.spec.protocol, best_device())

    @cached_property
    def _study_reference(self) -> Reference:
        """The study's own, with as many captions as tell whether the rest was kept."""
        whole, spec = self.materials.reference, self.materials.study.protocol
        held_out = self.materials.pictures("reference")
        number = min(self.spec.num_prior_pictures, len(held_out))
        fewer = spec.model_copy(update={"num_pictures": number})
        captions, labels = captions_to_draw(held_out, number)
        protocol = self.materials.protocol_of(fewer, self.materials.extractors)
        told = labels if whole.probe is not None else None
        return Reference(protocol, whole.extractors, whole.features, captions, told, whole.probe, kept=whole.kept)

    # --- report ---

    @property
    def protocol_words(self) -> str:
        """The first subject's."""
        first = self._reference(self.subjects[0]).protocol.sentence()
        return f"{len(self.subjects)} subjects, each with its own pictures and prompts; {self.subjects[0].name}: {first}"

    @cached_property
    def _scores(self) -> SubjectScores:
        protocol, references = self.spec.protocol, tuple(self._reference(subject) for subject in self.subjects)
        store = self.materials.store
        return SubjectScores(store, references, protocol.distances, protocol.num_bootstrap, protocol.seed)

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Likeness of the subjects' pictures to each other."""
        return {"photographs": self._scores.among_themselves()}

    @property
    def pictured(self) -> list[str]:
        """The first prompts of each subject."""
        return [f"{subject.name}: {self._reference(subject).captions[i]}" for subject, i in self._shown()]

    def _shown(self) -> list[tuple[Subject, int]]:
        of_each = [(subject, self._kept_ids(self._reference(subject))) for subject in self.subjects]
        most = max(1, 12 // len(of_each))
        return [(subject, i) for subject, kept in of_each for i in kept[:most]][:12]

    def strips(self) -> Mapping[str, Tensor]:
        """A picture that was learned from, and another of the subject."""
        shown = self._shown()
        return {
            "learned from": torch.stack([subject.pictures[i % len(subject.pictures)] for subject, i in shown]),
            "another": torch.stack([subject.others[i % len(subject.others)] for subject, i in shown]),
        }

    def summarise(
        self, table: pd.DataFrame, samples: Mapping[str, np.ndarray]
    ) -> tuple[pd.DataFrame, Mapping[str, np.ndarray]]:
        """One row a size, setting and mark, tuned and untuned: the means over all subjects' pictures, and their pictures."""
        protocols = {self._reference(subject).protocol.id: subject.name for subject in self.subjects}
        rows: list[dict[Any, Any]] = []
        pictures: dict[str, np.ndarray] = {}
        tuned = {name for run in self.runs for name in run.checkpoints.values()}
        asked = table[table["protocol"].isin(protocols)]
        asked = asked.assign(size=[self._label(row, tuned) for row in asked.to_dict("records")])
        for _, group in asked.groupby(["size", "images_seen", "sampler", "num_steps", "guidance"]):
            if set(group["protocol"]) != set(protocols):
                continue
            ordered = group.set_index("protocol").loc[list(protocols)].reset_index()
            points = [str(point) for point in ordered["point"]]
            is_untuned = str(ordered["size"].iloc[0]).endswith(UNTUNED)
            together = {
                **self._scores.means(points),
                "point": digest({"points": points}),
                "protocol": digest({"protocols": sorted(protocols)})[:12],
                "is_final": is_untuned or bool(ordered["is_final"].all()),
                "training_gflop": math.nan if is_untuned else float(ordered["training_gflop"].sum()),
                "paper_compute": math.nan if is_untuned else float(ordered["paper_compute"].sum()),
                "num_pictures": int(ordered["num_pictures"].sum()),
            }
            rows.append({**ordered.iloc[0].to_dict(), **together})
            if all(point in samples for point in points):
                pictures[str(together["point"])] = self._shown_pictures(points, samples)
        return pd.DataFrame(rows) if rows else asked.iloc[:0], pictures

    @staticmethod
    def _label(row: Mapping[Any, Any], tuned: set[str]) -> str:
        size = str(row["size"]).split()[0]
        return size if row["checkpoint"] in tuned else f"{size} {UNTUNED}"

    def _shown_pictures(self, points: list[str], samples: Mapping[str, np.ndarray]) -> np.ndarray:
        of_subject = {subject.name: samples[point] for subject, point in zip(self.subjects, points, strict=True)}
        kept = {subject.name: self._kept_ids(self._reference(subject)) for subject in self.subjects}
        return np.stack([of_subject[subject.name][kept[subject.name].index(i)] for subject, i in self._shown()])

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """At each setting: tuned less untuned on the subject and on the study's own captions, and each size less the next."""
        told: dict[str, Any] = {}
        for spec in self._settings():
            label = f"{spec.spec.num_steps} steps, guidance {spec.spec.guidance:g}"
            sizes = self._points_by_size(spec)
            told[f"tuned less untuned, {label}"] = {
                size: self._scores.less(tuned, untuned) for size, (tuned, untuned, _, _) in sizes.items()
            }
            told[f"the rest, on the study's own captions, subject by subject, {label}"] = {
                size: self._scores.changes(tuned, untuned, self._study_reference, self.materials.study.protocol.distances)
                for size, (_, _, tuned, untuned) in sizes.items()
            }
            names = list(sizes)
            told[f"larger less smaller, {label}"] = {
                f"{large} less {small}": self._scores.less(sizes[large][0], sizes[small][0]) for small, large in pairwise(names)
            }
        return {title: values for title, values in told.items() if values}

    def _settings(self) -> list[Point]:
        """The grid's coordinates, as points of the first run."""
        run, subject = self.runs[0], self.subjects[0]
        reference = self._reference(subject)
        return grid_points(run.final, self.sweep, self._spec_of(self.spec.protocol, reference), reference.protocol)

    def _points_by_size(self, at: Point) -> dict[str, tuple[list[str], list[str], list[str], str]]:
        """By size: tuned and untuned points of all subjects, tuned points on the study's captions, and the untuned one."""
        found = {}
        for width in sorted({run.model.width for run in self.runs}):
            runs = [run for run in self.runs if run.model.width == width]
            tuned, untuned, kept = [], [], []
            before = ""
            for run in runs:
                jobs = self.jobs(run)[-4:]
                one, after, other, study = (self._at(job, at) for job in jobs)
                tuned.append(one)
                kept.append(after)
                untuned.append(other)
                before = study
            store = self.materials.store
            if all(store.has("point", point) for point in (*tuned, *untuned, *kept, before)):
                size = model_cost(runs[0].model, self.materials.study.text.max_tokens).size
                found[size] = (tuned, untuned, kept, before)
        return found

    @staticmethod
    def _at(job: Job, at: Point) -> str:
        same = ("sampler", "num_steps", "guidance")
        return next(
            point.digest for point in job.points if all(getattr(point.spec, name) == getattr(at.spec, name) for name in same)
        )
