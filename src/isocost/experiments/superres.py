"""Super-resolution from the last checkpoint of every size, and from scratch (arXiv 2404.01367, section 4.3).

Shapes: N images that are scored, K that are kept, R resolution, S scale.
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
from isocost.analysis.results_table import best_in_each, final_points
from isocost.config.base import digest
from isocost.config.finetune import SuperresSpec
from isocost.config.model import ModelSpec
from isocost.data.degradations import check_scale, degrade, encode_enlarged, resize
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.evaluator import FeatureCollector, score
from isocost.evaluation.feature_store import SampleFeatures, read_measured, write_measured
from isocost.evaluation.paired import PairedComparer
from isocost.evaluation.paired_images import PairedImageMetric, paired_image_metric
from isocost.evaluation.protocol import Protocol
from isocost.evaluation.reconstruction import round_trip
from isocost.evaluation.reference_set import ReferenceSet, make_extractors
from isocost.experiments.base import EvalContext, EvalJob, Experiment, TrainingRun, make_run
from isocost.experiments.pretrain import PretrainExperiment
from isocost.experiments.study_assets import StudyAssets, images_to_save
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.models.checkpoint import load_checkpoint
from isocost.models.factory import build_network, expand_in_channels
from isocost.models.flops import model_cost
from isocost.sampling.generate import PromptEmbeds
from isocost.sampling.request import PerSampleFn
from isocost.training.objectives import Objective, Superres, training_schedule
from isocost.utils.device import best_device
from isocost.utils.progress import say

VERSION = 1
FROM_SCRATCH = "from scratch"


class SuperresExperiment(Experiment):
    """`superres` of a study."""

    def __init__(self, spec: SuperresSpec, assets: StudyAssets, family: PretrainExperiment) -> None:
        self.spec, self.assets, self.family = spec, assets, family
        self.sweep, self.protocol_spec, self.metric = spec.sweep, spec.protocol, spec.metric
        self.resolution = assets.study.data.resolution

    # --- trainings ---

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """Every size from its pretrained checkpoint, then from scratch, as `starts` says.

        Raises:
            ConfigError: the scale does not fit the autoencoder, or a given parent does not fit the study.
        """
        _, side, _ = self.assets.latent_shape
        check_scale(self.resolution, self.spec.scale, self.resolution // side)
        runs = []
        for start in self.spec.starts:
            for parent, model in self._parents():
                is_scratch = start == "scratch"
                wide = model.model_copy(update={"extra_input_channels": model.latent_channels})
                gflop = model_cost(wide, self.assets.study.text_encoder.max_tokens).gflop_per_forward
                came_from = None if is_scratch else parent
                own = self.stage | {"parent": None if came_from is None else came_from.name}
                variant = FROM_SCRATCH if is_scratch else ""
                runs.append(make_run("superres", wide, self.spec.train, own, gflop, came_from, variant))
        return runs

    @property
    def stage(self) -> dict[str, Any]:
        """What of the study decides its weights, besides parent, recipe and network."""
        stage: dict[str, Any] = {"task": "superres", "superres": VERSION, "cache": self.assets.cache_digest}
        return stage | {
            "degradation": self.spec.degradation.canonical(),
            "scale": self.spec.scale,
            "captions": self.spec.captions,
        }

    def _parents(self) -> list[tuple[Path, ModelSpec]]:
        """Checkpoint folders to start from, and their networks."""
        if not self.spec.parents:
            store = self.assets.store
            return [(store.folder("checkpoint", run.final), run.model) for run in self.family.runs]
        return [(Path(folder), self._given_parent(folder)) for folder in self.spec.parents]

    def _given_parent(self, folder: str) -> ModelSpec:
        info = load_checkpoint(folder).info
        if info.model.extra_input_channels:
            raise ConfigError(
                f"superres.parents: {folder} has {info.model.extra_input_channels} further input channels already "
                f"({info.task}); start from a text-to-image checkpoint"
            )
        self.assets.check_parent(info, self.spec.train.prediction_type, f"superres.parents: {folder}")
        return info.model

    def task(self, run: TrainingRun, network: nn.Module) -> Objective:
        """The cache's latents, each with the latent of its degraded image."""
        assets, spec = self.assets, self.spec
        images = assets.images("train").images
        cache = assets.cache
        assert len(cache) == len(images), "the cache holds the images of the source"

        def low_resolution(ids: Tensor, passes: Tensor) -> Tensor:
            seed = run.spec.seed
            low = degrade(images[ids], ids.tolist(), spec.degradation, spec.scale, seed=seed, draws=passes.tolist())
            return encode_enlarged(assets.autoencoder, low, self.resolution)

        text = None if cache.has_prompt_embeds else assets.text_encoder
        return Superres(run.spec, cache, training_schedule(run.spec), low_resolution, text, captions=spec.captions)

    def network(self, run: TrainingRun) -> nn.Module:
        """The parent's network with input channels that are zero; random weights from scratch.

        Raises:
            ConfigError: the parent is not there.
        """
        sharded_elsewhere = run.spec.sharding != "none" and self.assets.part.rank > 0
        if run.parent is None or sharded_elsewhere:
            torch.manual_seed(run.spec.seed)
            return build_network(run.model, "meta" if sharded_elsewhere else "cpu")
        if not run.parent.is_dir():
            raise ConfigError(f"{run.title}: no checkpoint to start from yet; `isocost train` or `isocost run` makes it")
        network = load_checkpoint(run.parent).network.requires_grad_(True).train()
        return expand_in_channels(network, run.model.extra_input_channels)

    def facts(self, run: TrainingRun) -> dict[str, Any]:
        """What `isocost upscale` needs to know."""
        parent = "" if run.parent is None else run.parent.name
        return {"task": "superres", "parent": parent, "variant": run.variant, "scale": self.spec.scale}

    # --- scoring ---

    @cached_property
    def protocol(self) -> Protocol:
        """Held-out images against what is made of their low-resolution forms."""
        given = f"x{self.spec.scale} of {self._low_digest}, captions {self.spec.captions}"
        ids = [one.id for one in self._pair_scores.values()]
        return self.assets.protocol_of(self.spec.protocol, self._extractors, given, ids)

    @cached_property
    def _extractors(self) -> dict[str, FeatureExtractor]:
        return make_extractors(self.spec.protocol, best_device())

    @cached_property
    def _pair_scores(self) -> dict[str, PairedImageMetric]:
        return {name: paired_image_metric(name, self.spec.protocol.lpips) for name in self.spec.protocol.paired_metrics}

    @cached_property
    def reference(self) -> ReferenceSet:
        """The protocol with the held-out images, their features, and what compares them in pairs."""
        compared = self.assets.images("reference").images[: self.protocol.num_reference]
        return ReferenceSet(
            self.protocol,
            self._extractors,
            {name: self.assets.features(extractor, compared) for name, extractor in self._extractors.items()},
            self._captions,
            feature_dtype=self.spec.protocol.feature_dtype,
            originals=self._originals,
            paired_metrics={name: one.function for name, one in self._pair_scores.items()},
        )

    @property
    def _originals(self) -> Tensor:
        return self.assets.images("reference").images[: self.spec.protocol.num_images]

    @property
    def _captions(self) -> list[str]:
        given = self.assets.images("reference").captions[: self.spec.protocol.num_images]
        return ["" if self.spec.captions == "empty" else prompts[0] for prompts in given]

    def check(self) -> None:
        """The protocol can be met."""
        self.protocol  # noqa: B018

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """The grid at the last checkpoint, or its races; a point at every snapshot."""
        return self.eval_jobs_of_run(run, self.sweep, self.protocol, self.make_eval_context)

    def make_eval_context(self) -> EvalContext:
        """The held-out images' captions, or the empty one for each, beside their low-resolution forms."""
        prompts = PromptEmbeds.of(self._captions, self.assets.text_encoder)
        return EvalContext(self.reference, prompts, self.saved_indices, self.spec.protocol.metrics, self.concat_cond)

    @property
    def protocol_summary(self) -> str:
        """Its own protocol."""
        return self.protocol.sentence()

    @property
    def sample_labels(self) -> list[str]:
        """Captions, or numbers where none are given."""
        return [self._captions[i] or f"image {i}" for i in self.saved_indices]

    @property
    def saved_indices(self) -> list[int]:
        """As of text-to-image: the first image of each caption, then others."""
        listed = self.assets.images("reference").captions[: self.spec.protocol.num_images]
        return images_to_save([prompts[0] for prompts in listed])

    @property
    def _low_digest(self) -> str:
        stage = {"stage": "low-resolution", "version": VERSION, "scale": self.spec.scale, "seed": self.spec.protocol.seed}
        stage |= {"num": self.spec.protocol.num_images, "degradation": self.spec.degradation.canonical()}
        return digest(stage, self.assets.source_key("reference"))

    @cached_property
    def low(self) -> Tensor:
        """The degraded held-out images uint8 [N, 3, R / S, R / S], stored: every size is given the same."""
        store, name = self.assets.store, self._low_digest
        if not store.has("low-resolution", name):
            originals = self._originals
            say(f"low-resolution forms of {len(originals)} held-out images")
            ids, seed = range(len(originals)), self.spec.protocol.seed
            low = degrade(originals, ids, self.spec.degradation, self.spec.scale, seed=seed)
            with store.create("low-resolution", name, {"scale": self.spec.scale}) as folder:
                save_file({"images": low}, folder / "images.safetensors")
        return load_file(store.folder("low-resolution", name) / "images.safetensors")["images"]

    @cached_property
    def concat_cond(self) -> PerSampleFn:
        """Latents of the enlarged low-resolution images."""
        batches = self.low.split(32)
        latents = torch.cat([encode_enlarged(self.assets.autoencoder, low, self.resolution) for low in batches])
        return lambda ids: latents[ids]

    # --- what no model made ---

    def _baseline(self, title: str) -> SampleFeatures:
        """What is measured of the images called `title`, `bicubic` or `decoded`; made once."""
        store, reference = self.assets.store, self.reference
        make = {
            "bicubic": partial(resize, self.low, self.resolution),
            "decoded": partial(round_trip, self.assets.autoencoder, self._originals),
        }[title]
        stage = {"stage": "baseline", "version": VERSION, "title": title, "protocol": reference.protocol.id}
        name = digest({**stage, "autoencoder": self.assets.autoencoder_digest if title == "decoded" else None})
        if not store.has("baseline", name):
            images = make()
            measuring = FeatureCollector(reference)
            measuring.add(list(range(len(images))), images)
            with store.create("baseline", name, {"title": title}) as folder:
                write_measured(folder, measuring.measured(), reference.feature_dtype)
        return read_measured(store.folder("baseline", name), tuple(reference.extractors))

    @cached_property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """`decoded`: what no model can pass; `bicubic`: what it must."""
        scored = {
            title: score(self._baseline(title), self.reference, self.spec.protocol.metrics) for title in ("decoded", "bicubic")
        }
        return {title: {metric: interval.value for metric, interval in scores.items()} for title, scores in scored.items()}

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """Every size at its best against bicubic, and pretrained against from scratch, in paired differences."""
        best = best_in_each(final_points(table, self.metric), self.metric, ["size"]).to_dict("records")
        pairing = PairedComparer((self.assets.store,), self.reference, self.spec.protocol.metrics)
        measured = {row["size"]: pairing.measured(row["point"]) for row in best if pairing.has(row["point"])}
        told: dict[str, Any] = {}
        bicubic = self._baseline("bicubic")
        against = {size: _in_words(pairing.of(one, bicubic)) for size, one in measured.items()}
        told["less bicubic, at the best settings"] = against | {
            row["size"]: "its images were measured elsewhere" for row in best if row["size"] not in measured
        }
        pairs = [(size, f"{size} {FROM_SCRATCH}") for size in measured if f"{size} {FROM_SCRATCH}" in measured]
        if pairs:
            told["pretrained less from scratch"] = {
                size: _in_words(pairing.of(measured[size], measured[other])) for size, other in pairs
            }
        return told

    def strips(self) -> Mapping[str, Tensor]:
        """Low resolution, bicubic and truth of the kept images."""
        low = self.low[self.saved_indices]
        return {
            "low resolution": low.repeat_interleave(self.spec.scale, 2).repeat_interleave(self.spec.scale, 3),
            "bicubic": resize(low, self.resolution),
            "truth": self._originals[self.saved_indices],
        }


def _in_words(found: Mapping[str, Interval]) -> dict[str, str]:
    return {metric: format_score(interval.value, interval.low, interval.high) for metric, interval in found.items()}
