"""Super-resolution from the last checkpoint of every size, and from scratch (arXiv 2404.01367, section 4.3).

Shapes: N pictures that are scored, K that are kept, R resolution, S scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isocost.analysis.formatting import format_score
from isocost.analysis.results_table import best_in_each, finals
from isocost.config.base import digest
from isocost.config.finetune import SuperresSpec
from isocost.config.model import ModelSpec
from isocost.data.degradations import check_scale, degrade, encode_enlarged, resize
from isocost.errors import RequestError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.evaluator import Measuring, score
from isocost.evaluation.feature_store import Measured, read_measured, write_measured
from isocost.evaluation.paired import Pairing
from isocost.evaluation.paired_images import PairScore, pair_score
from isocost.evaluation.protocol import Protocol
from isocost.evaluation.reconstruction import round_trip
from isocost.evaluation.reference_set import Reference, make_extractors
from isocost.experiments.base import Bench, Experiment, Job, Run, make_run
from isocost.experiments.pretrain import TextToImageExperiment
from isocost.experiments.study_assets import Materials, pictures_to_keep
from isocost.metrics.extractor_base import Extractor
from isocost.models.checkpoint import load_checkpoint
from isocost.models.factory import build_network, with_wider_input
from isocost.models.flops import model_cost
from isocost.sampling.generate import CaptionStates
from isocost.sampling.request import ByPicture
from isocost.training.objectives import Superres, Task, training_schedule
from isocost.utils.device import best_device
from isocost.utils.progress import say

VERSION = 1
SCRATCH = "from scratch"


class SuperresExperiment(Experiment):
    """`superres` of a study."""

    def __init__(self, spec: SuperresSpec, materials: Materials, family: TextToImageExperiment) -> None:
        self.spec, self.materials, self.family = spec, materials, family
        self.sweep, self.protocol_spec, self.metric = spec.sweep, spec.protocol, spec.metric
        self.resolution = materials.study.data.resolution

    # --- trainings ---

    @cached_property
    def runs(self) -> list[Run]:
        """Every size from its pretrained checkpoint, then from scratch, as `starts` says.

        Raises:
            RequestError: the scale does not fit the codec, or a given parent does not fit the study.
        """
        _, side, _ = self.materials.latent_shape
        check_scale(self.resolution, self.spec.scale, self.resolution // side)
        runs = []
        for start in self.spec.starts:
            for parent, model in self._parents():
                is_scratch = start == "scratch"
                wide = model.model_copy(update={"extra_input_channels": model.latent_channels})
                gflop = model_cost(wide, self.materials.study.text.max_tokens).gflop_per_forward
                came_from = None if is_scratch else parent
                own = self.stage | {"parent": None if came_from is None else came_from.name}
                variant = SCRATCH if is_scratch else ""
                runs.append(make_run("superres", wide, self.spec.train, own, gflop, came_from, variant))
        return runs

    @property
    def stage(self) -> dict[str, Any]:
        """What of the study decides its weights, besides parent, recipe and network."""
        stage: dict[str, Any] = {"task": "superres", "superres": VERSION, "cache": self.materials.cache_digest}
        return stage | {
            "degradation": self.spec.degradation.canonical(),
            "scale": self.spec.scale,
            "captions": self.spec.captions,
        }

    def _parents(self) -> list[tuple[Path, ModelSpec]]:
        """Checkpoint folders to start from, and their networks."""
        if not self.spec.parents:
            store = self.materials.store
            return [(store.folder("checkpoint", run.final), run.model) for run in self.family.runs]
        return [(Path(folder), self._given_parent(folder)) for folder in self.spec.parents]

    def _given_parent(self, folder: str) -> ModelSpec:
        info = load_checkpoint(folder).info
        if info.model.extra_input_channels:
            raise RequestError(
                f"superres.parents: {folder} has {info.model.extra_input_channels} further input channels already "
                f"({info.task}); start from a text-to-image checkpoint"
            )
        self.materials.check_parent(info, self.spec.train.prediction, f"superres.parents: {folder}")
        return info.model

    def task(self, run: Run, network: nn.Module) -> Task:
        """The cache's latents, each with the latent of its degraded picture."""
        materials, spec = self.materials, self.spec
        pictures = materials.pictures("train").pictures
        cache = materials.cache
        assert len(cache) == len(pictures), "the cache holds the pictures of the source"

        def low_resolution(ids: Tensor, passes: Tensor) -> Tensor:
            seed = run.spec.seed
            low = degrade(pictures[ids], ids.tolist(), spec.degradation, spec.scale, seed=seed, draws=passes.tolist())
            return encode_enlarged(materials.codec, low, self.resolution)

        text = None if cache.has_states else materials.text
        return Superres(run.spec, cache, training_schedule(run.spec), low_resolution, text, captions=spec.captions)

    def network(self, run: Run) -> nn.Module:
        """The parent's network with input channels that are zero; random weights from scratch.

        Raises:
            RequestError: the parent is not there.
        """
        sharded_elsewhere = run.spec.sharding != "none" and self.materials.part.rank > 0
        if run.parent is None or sharded_elsewhere:
            torch.manual_seed(run.spec.seed)
            return build_network(run.model, "meta" if sharded_elsewhere else "cpu")
        if not run.parent.is_dir():
            raise RequestError(f"{run.title}: no checkpoint to start from yet; `isocost train` or `isocost run` makes it")
        network = load_checkpoint(run.parent).network.requires_grad_(True).train()
        return with_wider_input(network, run.model.extra_input_channels)

    def facts(self, run: Run) -> dict[str, Any]:
        """What `isocost upscale` needs to know."""
        parent = "" if run.parent is None else run.parent.name
        return {"task": "superres", "parent": parent, "variant": run.variant, "scale": self.spec.scale}

    # --- scoring ---

    @cached_property
    def protocol(self) -> Protocol:
        """Held-out pictures against what is made of their low-resolution forms."""
        given = f"x{self.spec.scale} of {self._low_digest}, captions {self.spec.captions}"
        ids = [one.id for one in self._pair_scores.values()]
        return self.materials.protocol_of(self.spec.protocol, self._extractors, given, ids)

    @cached_property
    def _extractors(self) -> dict[str, Extractor]:
        return make_extractors(self.spec.protocol, best_device())

    @cached_property
    def _pair_scores(self) -> dict[str, PairScore]:
        return {name: pair_score(name, self.spec.protocol.lpips) for name in self.spec.protocol.pairs}

    @cached_property
    def reference(self) -> Reference:
        """The protocol with the held-out pictures, their features, and what compares them in pairs."""
        compared = self.materials.pictures("reference").pictures[: self.protocol.num_reference]
        return Reference(
            self.protocol,
            self._extractors,
            {name: self.materials.features(extractor, compared) for name, extractor in self._extractors.items()},
            self._captions,
            kept=self.spec.protocol.kept,
            originals=self._originals,
            pairs={name: one.function for name, one in self._pair_scores.items()},
        )

    @property
    def _originals(self) -> Tensor:
        return self.materials.pictures("reference").pictures[: self.spec.protocol.num_pictures]

    @property
    def _captions(self) -> list[str]:
        given = self.materials.pictures("reference").captions[: self.spec.protocol.num_pictures]
        return ["" if self.spec.captions == "empty" else captions[0] for captions in given]

    def check(self) -> None:
        """The protocol can be met."""
        self.protocol  # noqa: B018

    def jobs(self, run: Run) -> list[Job]:
        """The grid at the last checkpoint, or its races; a point at every mark."""
        return self.jobs_of_run(run, self.sweep, self.protocol, self.make_bench)

    def make_bench(self) -> Bench:
        """The held-out pictures' captions, or the empty one for each, beside their low-resolution forms."""
        captions = CaptionStates.of(self._captions, self.materials.text)
        return Bench(self.reference, captions, self.kept, self.spec.protocol.distances, self.beside)

    @property
    def protocol_words(self) -> str:
        """Its own protocol."""
        return self.protocol.sentence()

    @property
    def pictured(self) -> list[str]:
        """Captions, or numbers where none are given."""
        return [self._captions[i] or f"picture {i}" for i in self.kept]

    @property
    def kept(self) -> list[int]:
        """As of text-to-image: the first picture of each caption, then others."""
        listed = self.materials.pictures("reference").captions[: self.spec.protocol.num_pictures]
        return pictures_to_keep([captions[0] for captions in listed])

    @property
    def _low_digest(self) -> str:
        stage = {"stage": "low-resolution", "version": VERSION, "scale": self.spec.scale, "seed": self.spec.protocol.seed}
        stage |= {"num": self.spec.protocol.num_pictures, "degradation": self.spec.degradation.canonical()}
        return digest(stage, self.materials.source_key("reference"))

    @cached_property
    def low(self) -> Tensor:
        """The degraded held-out pictures uint8 [N, 3, R / S, R / S], stored: every size is given the same."""
        store, name = self.materials.store, self._low_digest
        if not store.has("low-resolution", name):
            originals = self._originals
            say(f"low-resolution forms of {len(originals)} held-out pictures")
            ids, seed = range(len(originals)), self.spec.protocol.seed
            low = degrade(originals, ids, self.spec.degradation, self.spec.scale, seed=seed)
            with store.create("low-resolution", name, {"scale": self.spec.scale}) as folder:
                save_file({"pictures": low}, folder / "pictures.safetensors")
        return load_file(store.folder("low-resolution", name) / "pictures.safetensors")["pictures"]

    @cached_property
    def beside(self) -> ByPicture:
        """Latents of the enlarged low-resolution pictures."""
        batches = self.low.split(32)
        latents = torch.cat([encode_enlarged(self.materials.codec, low, self.resolution) for low in batches])
        return lambda ids: latents[ids]

    # --- what no model made ---

    def _baseline(self, title: str) -> Measured:
        """What is measured of the pictures called `title`, `bicubic` or `decoded`; made once."""
        store, reference = self.materials.store, self.reference
        make = {
            "bicubic": partial(resize, self.low, self.resolution),
            "decoded": partial(round_trip, self.materials.codec, self._originals),
        }[title]
        stage = {"stage": "baseline", "version": VERSION, "title": title, "protocol": reference.protocol.id}
        name = digest({**stage, "codec": self.materials.codec_digest if title == "decoded" else None})
        if not store.has("baseline", name):
            pictures = make()
            measuring = Measuring(reference)
            measuring.add(list(range(len(pictures))), pictures)
            with store.create("baseline", name, {"title": title}) as folder:
                write_measured(folder, measuring.measured(), reference.kept)
        return read_measured(store.folder("baseline", name), tuple(reference.extractors))

    @cached_property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """`decoded`: what no model can pass; `bicubic`: what it must."""
        scored = {
            title: score(self._baseline(title), self.reference, self.spec.protocol.distances)
            for title in ("decoded", "bicubic")
        }
        return {title: {metric: interval.value for metric, interval in scores.items()} for title, scores in scored.items()}

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """Every size at its best against bicubic, and pretrained against from scratch, in paired differences."""
        best = best_in_each(finals(table, self.metric), self.metric, ["size"]).to_dict("records")
        pairing = Pairing((self.materials.store,), self.reference, self.spec.protocol.distances)
        measured = {row["size"]: pairing.measured(row["point"]) for row in best if pairing.has(row["point"])}
        told: dict[str, Any] = {}
        bicubic = self._baseline("bicubic")
        against = {size: _in_words(pairing.of(one, bicubic)) for size, one in measured.items()}
        told["less bicubic, at the best settings"] = against | {
            row["size"]: "its pictures were measured elsewhere" for row in best if row["size"] not in measured
        }
        pairs = [(size, f"{size} {SCRATCH}") for size in measured if f"{size} {SCRATCH}" in measured]
        if pairs:
            told["pretrained less from scratch"] = {
                size: _in_words(pairing.of(measured[size], measured[other])) for size, other in pairs
            }
        return told

    def strips(self) -> Mapping[str, Tensor]:
        """Low resolution, bicubic and truth of the kept pictures."""
        low = self.low[self.kept]
        return {
            "low resolution": low.repeat_interleave(self.spec.scale, 2).repeat_interleave(self.spec.scale, 3),
            "bicubic": resize(low, self.resolution),
            "truth": self._originals[self.kept],
        }


def _in_words(found: Mapping[str, Interval]) -> dict[str, str]:
    return {metric: format_score(interval.value, interval.low, interval.high) for metric, interval in found.items()}
