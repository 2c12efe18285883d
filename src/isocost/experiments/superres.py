"""Super-resolution, fine-tuned from the final checkpoint of every size, and from scratch (arXiv 2404.01367, section 4.3).

Shapes: N scored images, K saved images, R resolution, S scale.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isocost.analysis.formatting import format_score
from isocost.analysis.results_table import best_per_group, final_points
from isocost.config.base import digest
from isocost.config.finetune import SuperresSpec
from isocost.config.model import ModelSpec
from isocost.config.sampling import VaeSpec
from isocost.data.degradations import check_scale, degrade, encode_enlarged, resize
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.evaluator import FeatureCollector, Scorer, score
from isocost.evaluation.feature_store import SampleFeatures, read_sample_features, write_sample_features
from isocost.evaluation.paired import PairedComparer, PointResamples
from isocost.evaluation.paired_images import PairedImageMetric, paired_image_metric
from isocost.evaluation.protocol import Protocol
from isocost.evaluation.reconstruction import round_trip
from isocost.evaluation.reference_set import ReferenceSet, make_extractors
from isocost.experiments.base import EvalContext, EvalJob, Experiment, TrainingRun, make_run
from isocost.experiments.component_costs import study_component_costs
from isocost.experiments.pretrain import PretrainExperiment
from isocost.experiments.study_assets import StudyAssets, images_to_save
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.models.checkpoint import checkpoint_name, load_checkpoint
from isocost.models.component_costs import ComponentCosts
from isocost.models.factory import build_network, expand_in_channels
from isocost.models.flops import model_cost
from isocost.sampling.generate import PromptEmbeds
from isocost.sampling.request import PerSampleFn
from isocost.training.objectives import Objective, Superres, training_schedule
from isocost.utils.device import best_device
from isocost.utils.tensor_files import read_tensors

logger = logging.getLogger(__name__)

SUPERRES_VERSION = 1
FROM_SCRATCH = "from scratch"


class SuperresExperiment(Experiment):
    """The part `superres` of a study."""

    def __init__(self, spec: SuperresSpec, assets: StudyAssets, family: PretrainExperiment) -> None:
        self.spec, self.assets, self.family = spec, assets, family
        self.sweep, self.protocol_spec, self.metric = spec.sweep, spec.protocol, spec.metric
        self.resolution = assets.study.data.resolution
        self._protocol: Protocol | None = None

    # --- trainings ---

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """One run for each network size and each kind of initial weights in `starts`: "pretrained" or "scratch".

        Raises:
            ConfigError: the scale does not fit the autoencoder, or a checkpoint of `parents` does not fit the study.
        """
        _, latent_size, _ = self.assets.latent_shape
        check_scale(self.resolution, self.spec.scale, self.resolution // latent_size)
        runs = []
        for start in self.spec.starts:
            for parent, model in self._parents():
                from_scratch = start == "scratch"
                expanded = model.model_copy(update={"extra_input_channels": model.latent_channels})
                gflop = model_cost(expanded, self.assets.study.text_encoder.max_tokens).gflop_per_forward
                run_parent = None if from_scratch else parent
                stage = self.stage | {"parent": None if run_parent is None else checkpoint_name(run_parent)}
                variant = FROM_SCRATCH if from_scratch else ""
                runs.append(make_run("superres", expanded, self.spec.train, stage, gflop, run_parent, variant))
        return runs

    @property
    def stage(self) -> dict[str, Any]:
        """Digest inputs of a training besides the parent, the recipe and the network."""
        stage: dict[str, Any] = {"task": "superres", "superres": SUPERRES_VERSION, "cache": self.assets.cache_digest}
        return stage | {
            "degradation": self.spec.degradation.canonical(),
            "scale": self.spec.scale,
            "captions": self.spec.captions,
        }

    def _parents(self) -> list[tuple[Path, ModelSpec]]:
        """Return the checkpoint folders to start from, and their networks."""
        if not self.spec.parents:
            store = self.assets.store
            return [(store.folder("checkpoint", run.final), run.model) for run in self.family.runs]
        return [(Path(folder).expanduser(), self._parent_model(folder)) for folder in self.spec.parents]

    def _parent_model(self, folder: str) -> ModelSpec:
        info = load_checkpoint(folder).info
        if info.model.extra_input_channels:
            raise ConfigError(
                f"superres.parents: {folder} is a checkpoint of {info.task} with {info.model.extra_input_channels} extra input "
                "channels; give a text-to-image checkpoint"
            )
        self.assets.check_compatible_parent(info, self.spec.train.prediction_type, f"superres.parents: {folder}")
        return info.model

    def components(self, checkpoint: str, vae: VaeSpec, guide: str | None) -> ComponentCosts:
        """Return the costs around the denoiser, with the encoding of the enlarged image."""
        return study_component_costs(self.assets.study, vae, with_encoder=True)

    def objective(self, run: TrainingRun, network: nn.Module) -> Objective:
        """Train on the latents of the cache, each with the latent of its degraded and enlarged image."""
        assets, spec = self.assets, self.spec
        images = assets.images("train").images
        cache = assets.load_or_build_latent_cache()
        assert len(cache) == len(images), "the cache has one entry per training image"

        def low_resolution(indices: Tensor, epochs: Tensor) -> Tensor:
            seed = run.spec.seed
            low = degrade(images[indices], indices.tolist(), spec.degradation, spec.scale, seed=seed, draws=epochs.tolist())
            return encode_enlarged(assets.load_or_train_autoencoder(), low, self.resolution)

        text_encoder = None if cache.has_prompt_embeds else assets.text_encoder
        return Superres(run.spec, cache, training_schedule(run.spec), low_resolution, text_encoder, captions=spec.captions)

    def network(self, run: TrainingRun) -> nn.Module:
        """Build the network of a run.

        With a parent checkpoint it has the parent's weights, and zero weights for the extra input channels. Without one it has
        random weights. If the training is sharded, only rank 0 loads the weights.

        Raises:
            ConfigError: the parent checkpoint does not exist yet.
        """
        gets_weights_from_rank_0 = run.spec.sharding != "none" and self.assets.process.rank > 0
        if run.parent is None or gets_weights_from_rank_0:
            torch.manual_seed(run.spec.seed)
            return build_network(run.model, "meta" if gets_weights_from_rank_0 else "cpu")
        if not run.parent.is_dir():
            raise ConfigError(f"{run.title}: its parent checkpoint does not exist yet; run `isocost train` or `isocost run`")
        network = load_checkpoint(run.parent).network.requires_grad_(True).train()
        return expand_in_channels(network, run.model.extra_input_channels)

    def checkpoint_metadata(self, run: TrainingRun) -> dict[str, Any]:
        """Return the parent, the variant and the scale; `isocost upscale` reads the scale."""
        parent = "" if run.parent is None else checkpoint_name(run.parent)
        return {"task": "superres", "parent": parent, "variant": run.variant, "scale": self.spec.scale}

    # --- scoring ---

    @property
    def protocol(self) -> Protocol:
        """The protocol, see `build_protocol`."""
        return self.build_protocol()

    def build_protocol(self) -> Protocol:
        """Return the protocol: reference images against samples for their low-resolution versions. It is built once.

        Raises:
            ConfigError: there are too few reference images, or weights of a metric are missing.
        """
        if self._protocol is None:
            inputs = f"x{self.spec.scale} of {self._low_digest}, captions {self.spec.captions}"
            metric_ids = [metric.id for metric in self._paired_metrics.values()]
            self._protocol = self.assets.build_protocol(self.spec.protocol, self._extractors, inputs, metric_ids)
        return self._protocol

    @cached_property
    def _extractors(self) -> dict[str, FeatureExtractor]:
        return make_extractors(self.spec.protocol, best_device())

    @cached_property
    def _paired_metrics(self) -> dict[str, PairedImageMetric]:
        return {name: paired_image_metric(name, self.spec.protocol.lpips) for name in self.spec.protocol.paired_metrics}

    @cached_property
    def reference(self) -> ReferenceSet:
        """The protocol with the reference images, their features and the paired metrics; computed on first use."""
        reference_images = self.assets.images("reference").images[: self.protocol.num_reference]
        return ReferenceSet(
            self.protocol,
            self._extractors,
            {name: self.assets.features(extractor, reference_images) for name, extractor in self._extractors.items()},
            self._captions,
            feature_dtype=self.spec.protocol.feature_dtype,
            originals=self._originals,
            paired_metrics={name: metric.function for name, metric in self._paired_metrics.items()},
        )

    @property
    def _originals(self) -> Tensor:
        return self.assets.images("reference").images[: self.spec.protocol.num_images]

    @property
    def _captions(self) -> list[str]:
        captions = self.assets.images("reference").captions[: self.spec.protocol.num_images]
        return ["" if self.spec.captions == "empty" else of_image[0] for of_image in captions]

    def validate(self) -> None:
        """Build the protocol.

        Raises:
            ConfigError: there are too few reference images, or weights of a metric are missing.
        """
        self.build_protocol()

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """Return the grid or the search cells of the final checkpoint, and a point at every snapshot."""
        return self.eval_jobs_of_run(run, self.sweep, self.protocol, self.make_eval_context)

    def make_eval_context(self) -> EvalContext:
        """Build the context with the low-resolution versions of the reference images, and their captions or empty prompts."""
        prompts = PromptEmbeds.encode(self._captions, self.assets.text_encoder)
        return EvalContext(self.reference, prompts, self.saved_indices, self.spec.protocol.metrics, self.concat_cond)

    @property
    def protocol_summary(self) -> str:
        """One sentence about the protocol."""
        return self.protocol.sentence()

    @property
    def sample_labels(self) -> list[str]:
        """Captions of the saved images, or their numbers if the prompts are empty."""
        return [self._captions[i] or f"image {i}" for i in self.saved_indices]

    @property
    def saved_indices(self) -> list[int]:
        """Indices of the samples whose images every point saves, by the first caption of each; see `images_to_save`."""
        captions = self.assets.images("reference").captions[: self.spec.protocol.num_images]
        return images_to_save([of_image[0] for of_image in captions])

    @property
    def _low_digest(self) -> str:
        stage = {
            "stage": "low-resolution",
            "version": SUPERRES_VERSION,
            "scale": self.spec.scale,
            "seed": self.spec.protocol.seed,
        }
        stage |= {"num": self.spec.protocol.num_images, "degradation": self.spec.degradation.canonical()}
        return digest(stage, self.assets.source_key("reference"))

    @cached_property
    def low(self) -> Tensor:
        """Degraded reference images, uint8 [N, 3, R / S, R / S]. They are computed and stored once, the same for all sizes."""
        store, name = self.assets.store, self._low_digest
        if not store.has("low-resolution", name):
            originals = self._originals
            logger.info(f"degrading {len(originals)} reference images")
            indices, seed = range(len(originals)), self.spec.protocol.seed
            low = degrade(originals, indices, self.spec.degradation, self.spec.scale, seed=seed)
            with store.create("low-resolution", name, {"scale": self.spec.scale}) as folder:
                save_file({"images": low}, folder / "images.safetensors")
        return read_tensors(store.open("low-resolution", name) / "images.safetensors", "images")["images"]

    @cached_property
    def concat_cond(self) -> PerSampleFn:
        """Latents of the enlarged low-resolution images, by sample index; computed on first use."""
        autoencoder = self.assets.load_or_train_autoencoder()
        latents = torch.cat([encode_enlarged(autoencoder, low, self.resolution) for low in self.low.split(32)])
        return lambda indices: latents[indices]

    # --- baselines ---

    def _baseline(self, title: str) -> SampleFeatures:
        """Return the features of the baseline `bicubic` or `decoded`, computed and stored once."""
        store, reference = self.assets.store, self.reference
        make = {
            "bicubic": partial(resize, self.low, self.resolution),
            "decoded": partial(round_trip, self.assets.load_or_train_autoencoder(), self._originals),
        }[title]
        stage = {"stage": "baseline", "version": SUPERRES_VERSION, "title": title, "protocol": reference.protocol.id}
        name = digest({**stage, "autoencoder": self.assets.autoencoder_digest if title == "decoded" else None})
        if not store.has("baseline", name):
            images = make()
            collector = FeatureCollector(reference)
            collector.add(list(range(len(images))), images)
            with store.create("baseline", name, {"title": title}) as folder:
                write_sample_features(folder, collector.features(), reference.feature_dtype)
        return read_sample_features(store.open("baseline", name), tuple(reference.extractors))

    @cached_property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Scores of `decoded`, the upper bound of every model (the originals after the autoencoder), and of `bicubic`."""
        scores_by_title = {
            title: score(self._baseline(title), self.reference, self.spec.protocol.metrics) for title in ("decoded", "bicubic")
        }
        return {
            title: {metric: interval.value for metric, interval in scores.items()} for title, scores in scores_by_title.items()
        }

    def _baseline_resamples(self, title: str) -> PointResamples:
        """Return the resamples of a baseline, paired with those of the points."""
        num_images, metrics = len(self._originals), self.spec.protocol.metrics
        resamples = Scorer(self._baseline(title), self.reference, metrics, num_images).resamples()
        return PointResamples(self.reference.protocol.id, num_images, resamples)

    def comparer(self) -> PairedComparer:
        """Return the paired differences between points, by the reference set of the task."""
        return self.assets.comparer(lambda: self.reference, self.spec.protocol.metrics)

    def findings(self, table: pd.DataFrame) -> dict[str, Any]:
        """Compare every size at its best settings with bicubic, and pretrained with from scratch, by paired differences."""
        best = best_per_group(final_points(table, self.metric), self.metric, ["size"]).to_dict("records")
        comparer = self.comparer()
        found = {row["size"]: comparer.resamples_of(row["point"]) for row in best}
        resamples = {size: point for size, point in found.items() if point is not None}
        findings: dict[str, Any] = {}
        bicubic = self._baseline_resamples("bicubic")
        minus_bicubic = {size: _format_intervals(ours.minus(bicubic)) for size, ours in resamples.items()}
        findings["size minus bicubic, at the best settings"] = minus_bicubic | {
            size: "neither its resamples nor its features are in this output folder" for size in found if size not in resamples
        }
        pairs = [(size, f"{size} {FROM_SCRATCH}") for size in resamples if f"{size} {FROM_SCRATCH}" in resamples]
        if pairs:
            findings["pretrained minus from scratch"] = {
                size: _format_intervals(resamples[size].minus(resamples[from_scratch])) for size, from_scratch in pairs
            }
        return findings

    def comparison_rows(self) -> Mapping[str, Tensor]:
        """Return low resolution, bicubic and original of the saved images."""
        low = self.low[self.saved_indices]
        return {
            "low resolution": low.repeat_interleave(self.spec.scale, 2).repeat_interleave(self.spec.scale, 3),
            "bicubic": resize(low, self.resolution),
            "truth": self._originals[self.saved_indices],
        }


def _format_intervals(intervals: Mapping[str, Interval]) -> dict[str, str]:
    return {metric: format_score(interval.value, interval.low, interval.high) for metric, interval in intervals.items()}
