"""What training and scoring draw on: a study's images, autoencoder, caption encoder, latent cache, reference and floors.

Each is made once, named by the digest of what it depends on, and found again by the next run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from isocost.config.base import digest
from isocost.config.data import SourceSpec
from isocost.config.evaluation import MIN_IMAGES, ProtocolSpec
from isocost.config.model import PCAAutoencoderSpec, PretrainedAutoencoderSpec
from isocost.config.study import StudySpec
from isocost.data import latent_cache as caching
from isocost.data.datasets import num_classes, read_source, source_fingerprint
from isocost.data.latent_cache import (
    ImageDataset,
    LatentCache,
    ProcessInfo,
    count,
    forecast_bytes,
    load_images,
    write_cache,
    write_index,
)
from isocost.data.row_store import ShardStore
from isocost.errors import ConfigError
from isocost.evaluation import reference_set as referencing
from isocost.evaluation.evaluator import score
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.protocol import Protocol, make_protocol
from isocost.evaluation.reconstruction import autoencoder_quality, round_trip
from isocost.evaluation.reference_set import (
    ReferenceSet,
    fit_attribute_classifier,
    num_label_classes,
    read_features,
    select_prompts,
    write_features,
)
from isocost.metrics.attribute_classifier import AttributeClassifier
from isocost.metrics.extractor_base import FeatureExtractor
from isocost.metrics.lpips import load_lpips
from isocost.models.autoencoder import Autoencoder, PCAAutoencoder, load_autoencoder
from isocost.models.checkpoint import CheckpointInfo, pretrained_info
from isocost.models.pretrained.pipeline_config import source_digest
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.sampling.generate import PromptEmbeds
from isocost.training.autoencoder import fit_autoencoder
from isocost.utils.artifact_store import Store, free_disk
from isocost.utils.device import best_device
from isocost.utils.environment import provenance
from isocost.utils.progress import Report, progress_bar, say

AUTOENCODER_VERSION = 1
RECONSTRUCTION_FLOOR_VERSION = 3
NUM_AUTOENCODER_IMAGES = 2000
NUM_KEPT = 12


class StudyAssets:
    """Made on first use, kept in memory while the object lives."""

    def __init__(self, study: StudySpec, store: Store, part: ProcessInfo = ProcessInfo()) -> None:  # noqa: B008
        """`part` is this process among several that train together; the first one makes what is not shared out."""
        self.study, self.store, self.part = study, store, part
        self._images: dict[str, ImageDataset] = {}
        self._fingerprints: dict[str, str] = {}

    # --- images ---

    def source_key(self, part: str) -> dict[str, Any]:
        """What of the source `train` or `reference` enters digests: its content and how it is read, not where it lies."""
        source: SourceSpec = getattr(self.study.data, part)
        if part not in self._fingerprints:
            self._fingerprints[part] = source_fingerprint(source)
        plain = {key: value for key, value in source.canonical().items() if key != "path"}
        return {**plain, "content": self._fingerprints[part], "resolution": self.study.data.resolution}

    def images(self, part: str) -> ImageDataset:
        """The images of `train` or `reference`, read once."""
        if part not in self._images:
            data = self.study.data
            loaded = load_images(getattr(data, part), data.resolution, data.max_unreadable_fraction)
            if loaded.bad:
                say(
                    f"data.{part}: {len(loaded.bad)} of {len(loaded) + len(loaded.bad)} skipped; the results database names them"
                )
            self._images[part] = loaded
        return self._images[part]

    def skipped(self) -> dict[str, list[tuple[str, str]]]:
        """Name and reason of what could not be read, of the parts that were read so far."""
        cached = self.__dict__.get("cache")
        found = {} if cached is None else {"train": [(bad["name"], bad["reason"]) for bad in cached.index["bad"]]}
        return found | {part: [(bad.name, bad.reason) for bad in loaded.bad] for part, loaded in self._images.items()}

    # --- autoencoder and captions ---

    @cached_property
    def autoencoder_digest(self) -> str:
        """Names the study's autoencoder; of given checkpoints all of theirs."""
        stage: dict[str, Any] = {"stage": "autoencoder", "version": AUTOENCODER_VERSION}
        if self.study.checkpoints:
            return digest({**stage, "pretrained": [source_digest(path) for path in self.study.checkpoints]})
        if isinstance(self.study.own.autoencoder, PretrainedAutoencoderSpec):
            return digest(stage, self.study.own.autoencoder)
        return digest(stage, self.study.own.autoencoder, self.source_key("train"))

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The study's autoencoder, fitted where it is not there yet."""
        spec = self.study.own.autoencoder
        if isinstance(spec, PretrainedAutoencoderSpec):
            return load_autoencoder(spec.path, spec.subfolder, best_device())
        if not self.store.has("autoencoder", self.autoencoder_digest):
            images = self.images("train").images
            total = 1 if isinstance(spec, PCAAutoencoderSpec) else spec.num_images
            started = time.monotonic()
            with self.store.create(
                "autoencoder", self.autoencoder_digest, manifest := _manifest(spec=spec.canonical())
            ) as folder:
                with progress_bar("autoencoder", total, "images") as progress:
                    autoencoder = fit_autoencoder(spec, images, progress=lambda done, loss: progress(done, f"loss {loss:.4f}"))
                autoencoder.save(folder)
                manifest["seconds"] = int(time.monotonic() - started)
        return load_autoencoder(self.store.folder("autoencoder", self.autoencoder_digest), device=best_device())

    @property
    def autoencoder_from_checkpoint(self) -> str:
        """Where a checkpoint of this output folder finds the autoencoder."""
        if isinstance(self.study.own.autoencoder, PretrainedAutoencoderSpec):
            return self.study.own.autoencoder.path
        return f"../../autoencoder/{self.autoencoder_digest}"

    def check_parent(self, info: CheckpointInfo, prediction_type: str, named: str) -> None:
        """
        Raises:
            ConfigError: a given checkpoint, `named` by where it was given, is of another autoencoder or predicts something else.
        """
        if info.pretrained is not None:
            raise ConfigError(f"{named} is a pipeline of diffusers: those are scored, not tuned")
        channels, side, _ = self.latent_shape
        own = Path(self.autoencoder_from_checkpoint).name
        if Path(info.autoencoder).name != own or (info.model.latent_channels, info.model.latent_size) != (channels, side):
            raise ConfigError(f"{named} was trained on latents of another autoencoder; take this study's")
        if info.prediction_type != prediction_type:
            raise ConfigError(f"{named} predicts {info.prediction_type}, the study {prediction_type}")

    def autoencoder_report(self) -> dict[str, Any]:
        """Held-out quality of the autoencoder, and that of the pca autoencoder of the same latent shape beside it."""
        self.study.own  # noqa: B018  given checkpoints have autoencoders of their own
        stage = {"stage": "autoencoder-quality", "version": AUTOENCODER_VERSION, "autoencoder": self.autoencoder_digest}
        name = digest(stage, self.source_key("train"), self.source_key("reference"))
        if not self.store.has("autoencoder-quality", name):
            held_out, others = (self.images(part).images[:NUM_AUTOENCODER_IMAGES] for part in ("reference", "train"))
            pca = PCAAutoencoder.fit(others, self.autoencoder.factor, self.autoencoder.latent_channels)
            weights = str(getattr(self.study.own.autoencoder, "perceptual", ""))
            lpips = load_lpips(weights) if weights.endswith(".safetensors") else None
            with self.store.create(
                "autoencoder-quality", name, manifest := _manifest(autoencoder_digest=self.autoencoder_digest)
            ):
                for title, autoencoder in (("autoencoder", self.autoencoder), ("pca", pca)):
                    say(
                        f"measuring the {'study' if title == 'autoencoder' else title} autoencoder on {len(held_out)} held-out images"
                    )
                    manifest[title] = autoencoder_quality(autoencoder, held_out, others, self.extractor, lpips)
        manifest = self.store.manifest("autoencoder-quality", name)
        parts = {title: manifest[title] for title in ("autoencoder", "pca")}
        if parts["autoencoder"]["psnr_db"] <= parts["pca"]["psnr_db"]:
            say("the study's autoencoder does not beat the pca one of its latent shape: train it longer, or use kind: pca")
        return {"digest": self.autoencoder_digest, "latent_shape": list(self.latent_shape), **parts}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, side, side: known from the spec, before the autoencoder is fitted. Of given checkpoints the largest."""
        if self.study.checkpoints:
            models = [pretrained_info(path).model for path in self.study.checkpoints]
            return max((model.latent_channels, model.latent_size, model.latent_size) for model in models)
        spec = self.study.own.autoencoder
        if isinstance(spec, PretrainedAutoencoderSpec):
            channels, factor = self.autoencoder.latent_channels, self.autoencoder.factor
        elif isinstance(spec, PCAAutoencoderSpec):
            channels, factor = spec.num_channels, spec.patch
        else:
            channels, factor = spec.num_channels, 2 ** (len(spec.block_widths) - 1)
        side = self.study.data.resolution // factor
        return channels, side, side

    @cached_property
    def text_encoder(self) -> MiniLMTextEncoder:
        return MiniLMTextEncoder(self.study.text_encoder, best_device())

    @cached_property
    def cache_digest(self) -> str:
        stage = {"stage": "cache", "version": caching.VERSION, "autoencoder": self.autoencoder_digest}
        return digest(stage, self.source_key("train"), self.study.text_encoder)

    @property
    def cache_place(self) -> ShardStore:
        """Where the latent cache is, or would be."""
        at = self.study.own.train.cache_dir
        return ShardStore(
            self.store.folder("cache", self.cache_digest) if at is None else f"{at.rstrip('/')}/{self.cache_digest}"
        )

    @cached_property
    def cache(self) -> LatentCache:
        """Latent moments, captions and prompt embeddings of the training images; processes of one training write it together.

        Raises:
            ConfigError: there is no room for it.
        """
        place, data, text = self.cache_place, self.study.data, self.study.text_encoder
        if place.size(caching.INDEX) is None:
            if self.part.rank == 0:
                self.autoencoder  # noqa: B018  fitted by one process, read by the others
            self.part.wait()
            autoencoder, encoder = self.autoencoder, self.text_encoder
            read = partial(read_source, self.study.own.images, data.resolution)
            num_images, num_captions, size = self._cache_size()
            say(f"latent cache: {num_images} images, {num_captions} captions, {size / 1e9:.2f} GB")
            if place.is_local and size > (free := free_disk(self.store.out)):
                raise ConfigError(
                    f"the latent cache takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: text.cache_prompt_embeds: false, "
                    "or train.cache_dir: another disk or an object store"
                )
            total = num_images + (num_captions + 1 if text.cache_prompt_embeds else 0)
            with progress_bar("latents and captions", total, "done") as progress:
                index = write_cache(
                    place,
                    read,
                    autoencoder,
                    encoder,
                    with_states=text.cache_prompt_embeds,
                    max_unreadable_fraction=data.max_unreadable_fraction,
                    part=self.part,
                    progress=_cumulative(progress),
                )
            if self.part.rank == 0:
                write_index(place, {"kind": "cache", "digest": self.cache_digest, **index, "provenance": provenance()})
            self.part.wait()
        return LatentCache(place)

    def _cache_size(self) -> tuple[int, int, int]:
        """Images and captions of the cache, readable or not, and the bytes that they will take; no image is decoded."""
        data, text = self.study.data, self.study.text_encoder
        num_images, num_captions = count(partial(read_source, self.study.own.images, data.resolution))
        states = (text.max_tokens, self.text_encoder.cross_attention_dim)
        size = forecast_bytes(num_images, self.latent_shape, num_captions, states, text.cache_prompt_embeds)
        return num_images, num_captions, size

    def cache_bytes(self) -> int:
        """Bytes of the latent cache, as it is or will be."""
        if self.cache_place.size(caching.INDEX) is None:
            return self._cache_size()[2]
        return sum(file["bytes"] for table in self.cache.index["tables"].values() for file in table)

    # --- reference ---

    @cached_property
    def extractors(self) -> dict[str, FeatureExtractor]:
        return referencing.make_extractors(self.study.protocol, best_device())

    @property
    def extractor(self) -> FeatureExtractor:
        """The first of the protocol's extractors, by which an autoencoder is judged."""
        return next(iter(self.extractors.values()))

    @cached_property
    def protocol(self) -> Protocol:
        """What the study's scores rest on, fixed on its real images; nothing is computed from them yet.

        Raises:
            ConfigError: there are too few reference images, or no labels where alignment is asked for.
        """
        return self.protocol_of(self.study.protocol, self.extractors)

    def protocol_of(
        self, spec: ProtocolSpec, extractors: Mapping[str, FeatureExtractor], inputs: str = "", compared_by: Sequence[str] = ()
    ) -> Protocol:
        """A protocol on the study's held-out images; `given` and `compared_by` are super-resolution's (`make_protocol`).

        Raises:
            ConfigError: there are too few reference images, or none of the labels that alignment needs.
        """
        held_out = self.images("reference")
        num_reference = min(len(held_out), spec.num_reference or len(held_out))
        if num_reference < MIN_IMAGES:
            raise ConfigError(f"data.reference: {num_reference} images; a distance takes at least {MIN_IMAGES}")
        prompts, labels = select_prompts(held_out, spec.num_images)
        if spec.alignment != "none" and labels is None:
            raise ConfigError(referencing.LABELS_NEEDED)
        return make_protocol(
            spec,
            resolution=self.study.data.resolution,
            extractor=[*(extractor.id for extractor in extractors.values()), *compared_by],
            reference=held_out.fingerprint(),
            num_reference=num_reference,
            prompts=prompts,
            probe=None if spec.alignment == "none" else self.attribute_classifier_digest,
            inputs=inputs,
        )

    @cached_property
    def reference(self) -> ReferenceSet:
        """The protocol with the reference images' features and the probe."""
        protocol, held_out = self.protocol, self.images("reference")
        prompts, labels = select_prompts(held_out, protocol.num_images)
        compared = held_out.images[: protocol.num_reference]
        features = {name: self.features(extractor, compared) for name, extractor in self.extractors.items()}
        feature_dtype = self.study.protocol.feature_dtype
        if self.study.protocol.alignment == "none":
            return ReferenceSet(protocol, self.extractors, features, prompts, feature_dtype=feature_dtype)
        return ReferenceSet(protocol, self.extractors, features, prompts, labels, self.probe(), feature_dtype=feature_dtype)

    def features(self, extractor: FeatureExtractor, compared: Tensor) -> np.ndarray:
        """Features of the reference images, float32 [M, D], made once for each extractor."""
        stage = {"stage": "features", "version": referencing.VERSION, "extractor": extractor.id, "num": len(compared)}
        name = digest(stage, self.source_key("reference"))
        if not self.store.has("features", name):
            say(f"features of {len(compared)} reference images: {extractor.id.partition(':')[0]}")
            with self.store.create("features", name, {"extractor": extractor.id, "num_images": len(compared)}) as folder:
                write_features(folder, extractor, compared)
        return read_features(self.store.folder("features", name))

    @property
    def attribute_classifier_digest(self) -> str:
        stage = {"stage": "attribute-classifier", "version": referencing.VERSION, "seed": self.study.protocol.seed}
        return digest(stage, self.source_key("train"), self.source_key("reference"))

    def probe(self) -> AttributeClassifier:
        """What reads attributes from images, fitted where it is not there yet."""
        name = self.attribute_classifier_digest
        if not self.store.has("attribute-classifier", name):
            training, held_out = self.images("train"), self.images("reference")
            referencing.require_labels(training, held_out)
            classes = num_classes(self.study.own.images) or num_label_classes(training)
            say(f"fitting the probe to {len(training)} real images")
            with self.store.create("attribute-classifier", name, manifest := _manifest()) as folder:
                manifest.update(fit_attribute_classifier(folder, training, held_out, classes, self.study.protocol.seed))
            say(f"the probe reads {manifest['accuracy']:.3f} of the labels of held-out real images")
        return AttributeClassifier.load(self.store.folder("attribute-classifier", name))

    def reconstruction_floors(self) -> dict[str, dict[str, float]]:
        """Scores of real images after the autoencoder (`decoded`) and before it (`real`): what no model is expected to pass.

        Distances take training images, a fair draw of them, against the reference; alignment and caption scores take the
        reference images with their own labels and captions, so alignment's `real` is the probe's accuracy.
        """
        spec, reference = self.study.protocol, self.reference
        stage = {
            "stage": "reconstruction-floor",
            "version": RECONSTRUCTION_FLOOR_VERSION,
            "autoencoder": self.autoencoder_digest,
            "protocol": reference.protocol.id,
        }
        name = digest({**stage, "metrics": list(spec.metrics)}, self.source_key("train"))
        if not self.store.has("reconstruction-floor", name):
            say(f"the floor: {spec.num_images} real images scored as they are and after the autoencoder")
            with self.store.create("reconstruction-floor", name, manifest := _manifest()):
                for title in ("decoded", "real"):
                    training = self.images("train").random_subset(spec.num_images)
                    held_out = self.images("reference").images[: spec.num_images]
                    if title == "decoded":
                        training, held_out = round_trip(self.autoencoder, training), round_trip(self.autoencoder, held_out)
                    aligned = None
                    if reference.probe is not None and reference.labels is not None:
                        aligned = reference.probe.alignment(held_out, reference.labels)
                    of_sets = tuple(distance for distance in spec.metrics if distance != "prompt_similarity")
                    scores = score(SampleFeatures(self._taken(training), aligned), reference, of_sets)
                    if "prompt_similarity" in spec.metrics:
                        scores.update(score(SampleFeatures(self._taken(held_out)), reference, ("prompt_similarity",)))
                    manifest[title] = {metric: interval.value for metric, interval in scores.items()}
        manifest = self.store.manifest("reconstruction-floor", name)
        return {title: manifest[title] for title in ("decoded", "real")}

    def _taken(self, images: Tensor) -> dict[str, np.ndarray]:
        return {name: extractor(images).cpu().numpy() for name, extractor in self.extractors.items()}

    @cached_property
    def prompt_embeds(self) -> PromptEmbeds:
        """States of the captions that are drawn."""
        return PromptEmbeds.of(self.reference.prompts, self.text_encoder)

    @cached_property
    def saved_indices(self) -> list[int]:
        """Image ids whose images every point keeps: the first of each caption, then others, `NUM_KEPT` in all."""
        return images_to_save(self.reference.prompts)


def images_to_save(prompts: Sequence[str]) -> list[int]:
    """Ids of the images of `captions` that every point keeps: the first of each caption, then others, `NUM_KEPT` in all."""
    firsts = sorted({prompt: i for i, prompt in reversed(list(enumerate(prompts)))}.values())
    others = [i for i in range(len(prompts)) if i not in set(firsts)]
    return sorted([*firsts, *others][:NUM_KEPT])


def _manifest(**facts: Any) -> dict[str, Any]:
    """What an artefact's manifest begins with; its stage fills in the rest."""
    return facts


def _cumulative(progress: Report) -> Callable[[int], None]:
    """A callback that is told how many more."""
    total = 0

    def add(more: int) -> None:
        nonlocal total
        total += more
        progress(total, "")

    return add
