"""Everything that training and scoring of a study share: images, autoencoder, text encoder, latent cache, reference set.

Each of them is an artefact that is computed once, named by the digest of its inputs, and found again by the next run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from isocost.config.base import Spec, digest
from isocost.config.data import SourceSpec
from isocost.config.evaluation import MIN_IMAGES, ProtocolSpec
from isocost.config.model import PCAAutoencoderSpec, PretrainedAutoencoderSpec
from isocost.config.sampling import VaeSpec
from isocost.config.study import StudySpec
from isocost.data import latent_cache as caching
from isocost.data.datasets import num_classes, read_source, source_fingerprint
from isocost.data.latent_cache import (
    ImageDataset,
    LatentCache,
    ProcessInfo,
    count_images_and_captions,
    estimate_cache_bytes,
    load_images,
    write_cache,
    write_index,
)
from isocost.data.row_store import ShardStore
from isocost.errors import ConfigError
from isocost.evaluation import reference_set as referencing
from isocost.evaluation.evaluator import score
from isocost.evaluation.feature_store import SampleFeatures
from isocost.evaluation.paired import PairedComparer, ReadResamples
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
from isocost.models.components import component_content
from isocost.models.pretrained.pipeline_config import source_digest
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.sampling.generate import PromptEmbeds
from isocost.training.autoencoder import fit_autoencoder
from isocost.utils.artifact_store import Store, free_disk
from isocost.utils.device import best_device
from isocost.utils.environment import provenance
from isocost.utils.progress import Report, progress_bar
from isocost.utils.warn_once import warn_once

logger = logging.getLogger(__name__)

AUTOENCODER_VERSION = 1
RECONSTRUCTION_FLOOR_VERSION = 3
NUM_AUTOENCODER_IMAGES = 2000
NUM_SAVED_IMAGES = 12


class StudyAssets:
    """The shared artefacts of a study, computed on first use and then kept in memory.

    A method `load_or_*` may train or compute an artefact. The properties load weights or read images on first use; `reference`
    and everything that follows from it also compute features on first use, and may train the attribute classifier.
    """

    def __init__(
        self,
        study: StudySpec,
        store: Store,
        process: ProcessInfo = ProcessInfo(),  # noqa: B008
        component_paths: Mapping[str, str] | None = None,
        read_resamples: ReadResamples = lambda point: None,
    ) -> None:
        """
        Args:
            study: the study.
            store: artefacts of the output folder.
            process: this process among several that train together; the first one computes everything that is not distributed.
            component_paths: the first paths of `autoencoder` and `text_encoder`, where the files have moved since. They name
                the artefacts.
            read_resamples: reads the bootstrap resamples of a point from the results database of the study.
        """
        self.study, self.store, self.process = study, store, process
        self.component_paths = dict(component_paths or {})
        self._read_resamples = read_resamples
        self._images: dict[str, ImageDataset] = {}
        self._fingerprints: dict[str, str] = {}
        self._sampling_autoencoders: dict[VaeSpec, Autoencoder] = {}

    def comparer(self, reference: Callable[[], ReferenceSet], metrics: tuple[str, ...]) -> PairedComparer:
        """Return the paired differences between the points that `reference` scored by `metrics`."""
        return PairedComparer((self._read_resamples,), (self.store,), reference, metrics)

    # --- images ---

    def source_key(self, part: str) -> dict[str, Any]:
        """Return the digest inputs of the source `train` or `reference`: its content and how it is read, not its location."""
        source: SourceSpec = getattr(self.study.data, part)
        plain = {key: value for key, value in source.canonical().items() if key != "path"}
        return {**plain, "content": self.source_content(part), "resolution": self.study.data.resolution}

    def source_content(self, part: str) -> str:
        """Return the digest of the files of `train` or `reference`; the first call reads them.

        Raises:
            ConfigError: the files are missing.
        """
        if part not in self._fingerprints:
            self._fingerprints[part] = source_fingerprint(getattr(self.study.data, part))
        return self._fingerprints[part]

    def images(self, part: str) -> ImageDataset:
        """Return the images of `train` or `reference`; the first call reads and decodes them."""
        if part not in self._images:
            data = self.study.data
            loaded = load_images(getattr(data, part), data.resolution, data.max_unreadable_fraction)
            if loaded.unreadable:
                logger.warning(
                    f"data.{part}: {len(loaded.unreadable)} of {len(loaded) + len(loaded.unreadable)} images skipped; "
                    "the events of the results database name them"
                )
            self._images[part] = loaded
        return self._images[part]

    def skipped(self) -> dict[str, list[tuple[str, str]]]:
        """Return (name, reason) of every unreadable image, for the sources that were read so far."""
        cache = self.__dict__.get("_latent_cache")
        skipped = {} if cache is None else {"train": [(bad["name"], bad["reason"]) for bad in cache.index["bad"]]}
        return skipped | {part: [(bad.name, bad.reason) for bad in loaded.unreadable] for part, loaded in self._images.items()}

    # --- autoencoder and text encoder ---

    @cached_property
    def autoencoder_digest(self) -> str:
        """Digest of the study's autoencoder; for pretrained checkpoints, of all their autoencoders."""
        stage: dict[str, Any] = {"stage": "autoencoder", "version": AUTOENCODER_VERSION}
        if self.study.checkpoints:
            return digest({**stage, "pretrained": [source_digest(path) for path in self.study.checkpoints]})
        if isinstance(self.study.training_parts.autoencoder, PretrainedAutoencoderSpec):
            return digest(stage, self._named("autoencoder"))
        return digest(stage, self.study.training_parts.autoencoder, self.source_key("train"))

    def load_or_train_autoencoder(self) -> Autoencoder:
        """Return the study's autoencoder; train it first if its artefact does not exist."""
        return self._autoencoder

    def sampling_autoencoder(self, vae: VaeSpec) -> Autoencoder:
        """Return the study's autoencoder with the settings of a sweep; it is the same object if they are the defaults."""
        if vae.is_default:
            return self.load_or_train_autoencoder()
        if vae not in self._sampling_autoencoders:
            spec = self.study.training_parts.autoencoder
            self.load_or_train_autoencoder()
            if isinstance(spec, PretrainedAutoencoderSpec):
                loaded = load_autoencoder(spec.path, spec.subfolder, best_device(), vae)
            else:
                loaded = load_autoencoder(
                    self.store.open("autoencoder", self.autoencoder_digest), device=best_device(), vae=vae
                )
            self._sampling_autoencoders[vae] = loaded
        return self._sampling_autoencoders[vae]

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        spec = self.study.training_parts.autoencoder
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
        return load_autoencoder(self.store.open("autoencoder", self.autoencoder_digest), device=best_device())

    @property
    def autoencoder_from_checkpoint(self) -> str:
        """Path of the autoencoder as a checkpoint of this output folder stores it."""
        if isinstance(self.study.training_parts.autoencoder, PretrainedAutoencoderSpec):
            return self.study.training_parts.autoencoder.path
        return f"../../autoencoder/{self.autoencoder_digest}"

    def check_compatible_parent(self, info: CheckpointInfo, prediction_type: str, source: str) -> None:
        """Check that a checkpoint of another output folder can be fine-tuned or distilled in this study.

        Args:
            info: its metadata.
            prediction_type: prediction type of the new training.
            source: field and path of the checkpoint, for messages.

        Raises:
            ConfigError: it is a diffusers pipeline, has another autoencoder, or predicts something else.
        """
        if info.pretrained is not None:
            raise ConfigError(f"{source} is a diffusers pipeline, which isocost can score but not fine-tune")
        channels, size, _ = self.latent_shape
        model = info.model
        if not self.has_autoencoder_of(info) or (model.latent_channels, model.latent_size) != (channels, size):
            raise ConfigError(f"{source} was trained on latents of another autoencoder; set autoencoder to the same one")
        if info.prediction_type != prediction_type:
            raise ConfigError(
                f"{source} was trained with prediction_type {info.prediction_type}, but the study has {prediction_type}; "
                f"set train.prediction_type: {info.prediction_type}"
            )

    def has_autoencoder_of(self, info: CheckpointInfo) -> bool:
        """Whether a checkpoint has the study's autoencoder: the same artefact or name, or the same files at another path."""
        ours, theirs = self.autoencoder_from_checkpoint, info.autoencoder
        spec = self.study.training_parts.autoencoder
        if not isinstance(spec, PretrainedAutoencoderSpec):
            return Path(theirs).name == Path(ours).name
        if theirs in (ours, self.component_paths.get("autoencoder")):
            return True
        content = component_content(ours, spec.subfolder)
        return content is not None and content == component_content(theirs, info.autoencoder_subfolder)

    def autoencoder_report(self) -> dict[str, Any]:
        """Measure the quality of the autoencoder on held-out images, and that of a PCA autoencoder of the same latent shape.

        Raises:
            ConfigError: the study has pretrained checkpoints, which bring their own autoencoders.
        """
        spec = self.study.require_training_parts().autoencoder
        stage = {"stage": "autoencoder-quality", "version": AUTOENCODER_VERSION, "autoencoder": self.autoencoder_digest}
        name = digest(stage, self.source_key("train"), self.source_key("reference"))
        if not self.store.has("autoencoder-quality", name):
            held_out, others = (self.images(part).images[:NUM_AUTOENCODER_IMAGES] for part in ("reference", "train"))
            trained = self.load_or_train_autoencoder()
            pca = PCAAutoencoder.fit(others, trained.factor, trained.latent_channels)
            weights = str(getattr(spec, "perceptual", ""))
            lpips = load_lpips(weights) if weights.endswith(".safetensors") else None
            with self.store.create(
                "autoencoder-quality", name, manifest := _manifest(autoencoder_digest=self.autoencoder_digest)
            ):
                for title, autoencoder in (("autoencoder", trained), ("pca", pca)):
                    label = "study's" if title == "autoencoder" else "PCA"
                    logger.info(f"measuring the {label} autoencoder on {len(held_out)} held-out images")
                    manifest[title] = autoencoder_quality(autoencoder, held_out, others, self.extractor, lpips)
        manifest = self.store.manifest("autoencoder-quality", name)
        parts = {title: manifest[title] for title in ("autoencoder", "pca")}
        if parts["autoencoder"]["psnr_db"] <= parts["pca"]["psnr_db"]:
            logger.warning(
                "the study's autoencoder is not better than a PCA autoencoder of the same latent shape: "
                "train it longer, or use kind: pca"
            )
        return {"digest": self.autoencoder_digest, "latent_shape": list(self.latent_shape), **parts}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height, width of the latents, from the configuration; for pretrained checkpoints the largest shape.

        A pretrained autoencoder of the study is loaded.
        """
        if self.study.checkpoints:
            models = [pretrained_info(path).model for path in self.study.checkpoints]
            return max((model.latent_channels, model.latent_size, model.latent_size) for model in models)
        spec = self.study.training_parts.autoencoder
        if isinstance(spec, PretrainedAutoencoderSpec):
            autoencoder = self.load_or_train_autoencoder()
            channels, factor = autoencoder.latent_channels, autoencoder.factor
        elif isinstance(spec, PCAAutoencoderSpec):
            channels, factor = spec.num_channels, spec.patch
        else:
            channels, factor = spec.num_channels, 2 ** (len(spec.block_widths) - 1)
        size = self.study.data.resolution // factor
        return channels, size, size

    @cached_property
    def text_encoder(self) -> MiniLMTextEncoder:
        """The study's text encoder; its weights are loaded on first use."""
        return MiniLMTextEncoder(self.study.text_encoder, best_device())

    @cached_property
    def cache_digest(self) -> str:
        stage = {"stage": "cache", "version": caching.CACHE_VERSION, "autoencoder": self.autoencoder_digest}
        return digest(stage, self.source_key("train"), self._named("text_encoder"))

    def _named(self, part: str) -> Spec:
        """The spec of a component with the path that names its artefacts."""
        spec: Spec = getattr(self.study, part)
        path = self.component_paths.get(part)
        return spec if path is None else spec.model_copy(update={"path": path})

    @property
    def cache_store(self) -> ShardStore:
        """Location of the latent cache, which may not exist yet."""
        cache_dir = self.study.training_parts.train.cache_dir
        return ShardStore(
            self.store.folder("cache", self.cache_digest)
            if cache_dir is None
            else f"{cache_dir.rstrip('/')}/{self.cache_digest}"
        )

    def load_or_build_latent_cache(self) -> LatentCache:
        """Return latent moments, captions and prompt embeddings of the training images; compute them first if they are missing.

        All processes of one training compute the cache together. The autoencoder is trained first if it is missing.

        Raises:
            ConfigError: the cache does not fit on the disk.
        """
        return self._latent_cache

    @cached_property
    def _latent_cache(self) -> LatentCache:
        cache_store, data, text = self.cache_store, self.study.data, self.study.text_encoder
        if cache_store.size(caching.INDEX) is None:
            if self.process.rank == 0:
                self.load_or_train_autoencoder()
            self.process.wait()
            autoencoder, encoder = self.load_or_train_autoencoder(), self.text_encoder
            read_images = partial(read_source, self.study.training_parts.images, data.resolution)
            num_images, num_captions, size = self._cache_size()
            logger.info(f"latent cache: {num_images} images, {num_captions} captions, {size / 1e9:.2f} GB")
            if cache_store.is_local and size > (free := free_disk(self.store.out)):
                raise ConfigError(
                    f"the latent cache takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; set "
                    "text_encoder.cache_prompt_embeds: false, or train.cache_dir: a folder of another disk or an object store"
                )
            total = num_images + (num_captions + 1 if text.cache_prompt_embeds else 0)
            with progress_bar("latents and captions", total, "done") as progress:
                index = write_cache(
                    cache_store,
                    read_images,
                    autoencoder,
                    encoder,
                    with_prompt_embeds=text.cache_prompt_embeds,
                    max_unreadable_fraction=data.max_unreadable_fraction,
                    process=self.process,
                    progress=_cumulative(progress),
                )
            if self.process.rank == 0:
                write_index(cache_store, {"kind": "cache", "digest": self.cache_digest, **index, "provenance": provenance()})
            self.process.wait()
        cache = LatentCache(cache_store)
        if self.process.rank == 0 and (note := cache.token_note):
            warn_once(f"data.train: {note}")
        return cache

    def _cache_size(self) -> tuple[int, int, int]:
        """Count images and captions, readable or not, and estimate the bytes of the cache; no image is decoded."""
        data, text = self.study.data, self.study.text_encoder
        num_images, num_captions = count_images_and_captions(
            partial(read_source, self.study.training_parts.images, data.resolution)
        )
        embeds_shape = (text.max_tokens, self.text_encoder.cross_attention_dim)
        size = estimate_cache_bytes(num_images, self.latent_shape, num_captions, embeds_shape, text.cache_prompt_embeds)
        return num_images, num_captions, size

    def cache_bytes(self) -> int:
        """Return the bytes of the latent cache, or an estimate if it does not exist yet."""
        if self.cache_store.size(caching.INDEX) is None:
            return self._cache_size()[2]
        return sum(file["bytes"] for table in self.load_or_build_latent_cache().index["tables"].values() for file in table)

    # --- reference ---

    @cached_property
    def extractors(self) -> dict[str, FeatureExtractor]:
        """The protocol's feature extractors; their weights are loaded on first use."""
        return referencing.make_extractors(self.study.protocol, best_device())

    @property
    def extractor(self) -> FeatureExtractor:
        """The first of the protocol's extractors; it also measures autoencoders."""
        return next(iter(self.extractors.values()))

    @cached_property
    def protocol(self) -> Protocol:
        """The study's protocol. Its first use reads the reference images, but computes no features.

        Raises:
            ConfigError: there are too few reference images, or alignment needs labels that they do not have.
        """
        return self.build_protocol(self.study.protocol, self.extractors)

    def build_protocol(
        self,
        spec: ProtocolSpec,
        extractors: Mapping[str, FeatureExtractor],
        inputs: str = "",
        paired_metric_ids: Sequence[str] = (),
    ) -> Protocol:
        """Build a protocol on the study's reference images.

        Args:
            spec: its configuration.
            extractors: its feature extractors by name.
            inputs: description of the network's further inputs (super-resolution), see `make_protocol`.
            paired_metric_ids: ids of the paired metrics (super-resolution).

        Raises:
            ConfigError: there are too few reference images, or alignment needs labels that they do not have.
        """
        held_out = self.images("reference")
        num_reference = min(len(held_out), spec.num_reference or len(held_out))
        if num_reference < MIN_IMAGES:
            raise ConfigError(f"data.reference: {num_reference} images; a metric needs at least {MIN_IMAGES}")
        prompts, labels = select_prompts(held_out, spec.num_images)
        if spec.alignment != "none" and labels is None:
            raise ConfigError(referencing.LABELS_NEEDED)
        return make_protocol(
            spec,
            resolution=self.study.data.resolution,
            extractor=[*(extractor.id for extractor in extractors.values()), *paired_metric_ids],
            reference=held_out.fingerprint(),
            num_reference=num_reference,
            prompts=prompts,
            attribute_classifier=None if spec.alignment == "none" else self.attribute_classifier_digest,
            inputs=inputs,
        )

    @cached_property
    def reference(self) -> ReferenceSet:
        """The protocol with the features of the reference images and the attribute classifier.

        Its first use computes the features, and trains the classifier if alignment is measured and it does not exist yet.
        """
        protocol, held_out = self.protocol, self.images("reference")
        prompts, labels = select_prompts(held_out, protocol.num_images)
        reference_images = held_out.images[: protocol.num_reference]
        features = {name: self.features(extractor, reference_images) for name, extractor in self.extractors.items()}
        feature_dtype = self.study.protocol.feature_dtype
        if self.study.protocol.alignment == "none":
            return ReferenceSet(protocol, self.extractors, features, prompts, feature_dtype=feature_dtype)
        return ReferenceSet(
            protocol,
            self.extractors,
            features,
            prompts,
            labels,
            self.load_or_train_attribute_classifier(),
            feature_dtype=feature_dtype,
        )

    def prepare_reference(self) -> None:
        """Compute the features of the reference images and train the attribute classifier, if they do not exist yet."""
        _ = self.reference

    def features(self, extractor: FeatureExtractor, images: Tensor) -> np.ndarray:
        """Return features of reference images, float32 [M, D]; the first call computes and stores them.

        Args:
            extractor: feature extractor.
            images: the first images of `data.reference`, uint8 [M, 3, R, R].
        """
        stage = {"stage": "features", "version": referencing.VERSION, "extractor": extractor.id, "num": len(images)}
        name = digest(stage, self.source_key("reference"))
        if not self.store.has("features", name):
            logger.info(f"features of {len(images)} reference images: {extractor.id.partition(':')[0]}")
            with self.store.create("features", name, {"extractor": extractor.id, "num_images": len(images)}) as folder:
                write_features(folder, extractor, images)
        return read_features(self.store.open("features", name))

    @property
    def attribute_classifier_digest(self) -> str:
        stage = {"stage": "attribute-classifier", "version": referencing.VERSION, "seed": self.study.protocol.seed}
        return digest(stage, self.source_key("train"), self.source_key("reference"))

    def load_or_train_attribute_classifier(self) -> AttributeClassifier:
        """Return the classifier that measures alignment; train it first if its artefact does not exist.

        Raises:
            ConfigError: the images have no labels.
        """
        name = self.attribute_classifier_digest
        if not self.store.has("attribute-classifier", name):
            training, held_out = self.images("train"), self.images("reference")
            referencing.require_labels(training, held_out)
            classes = num_classes(self.study.training_parts.images) or num_label_classes(training)
            logger.info(f"training the attribute classifier on {len(training)} real images")
            with self.store.create("attribute-classifier", name, manifest := _manifest()) as folder:
                manifest.update(fit_attribute_classifier(folder, training, held_out, classes, self.study.protocol.seed))
            logger.info(f"attribute classifier: accuracy {manifest['accuracy']:.3f} on held-out real images")
        return AttributeClassifier.load(self.store.open("attribute-classifier", name))

    def reconstruction_floors(self) -> dict[str, dict[str, float]]:
        """Return scores of real images after the autoencoder (`decoded`) and before it (`real`), by metric.

        No model is expected to score better. Distances compare a random subset of the training images with the reference.
        Alignment and prompt similarity use the reference images with their own labels and captions, so the `real` alignment is
        the accuracy of the attribute classifier. The first call computes and stores the scores.
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
            logger.info(f"reconstruction floor: scoring {spec.num_images} real images before and after the autoencoder")
            with self.store.create("reconstruction-floor", name, manifest := _manifest()):
                for title in ("decoded", "real"):
                    training = self.images("train").random_subset(spec.num_images)
                    held_out = self.images("reference").images[: spec.num_images]
                    if title == "decoded":
                        autoencoder = self.load_or_train_autoencoder()
                        training, held_out = round_trip(autoencoder, training), round_trip(autoencoder, held_out)
                    aligned = None
                    if reference.attribute_classifier is not None and reference.labels is not None:
                        aligned = reference.attribute_classifier.alignment(held_out, reference.labels)
                    of_sets = tuple(distance for distance in spec.metrics if distance != "prompt_similarity")
                    scores = score(SampleFeatures(self._extract(training), aligned), reference, of_sets)
                    if "prompt_similarity" in spec.metrics:
                        scores.update(score(SampleFeatures(self._extract(held_out)), reference, ("prompt_similarity",)))
                    manifest[title] = {metric: interval.value for metric, interval in scores.items()}
        manifest = self.store.manifest("reconstruction-floor", name)
        return {title: manifest[title] for title in ("decoded", "real")}

    def _extract(self, images: Tensor) -> dict[str, np.ndarray]:
        return {name: extractor(images).cpu().numpy() for name, extractor in self.extractors.items()}

    @cached_property
    def prompt_embeds(self) -> PromptEmbeds:
        """Embeddings of the reference prompts; computed on first use."""
        return PromptEmbeds.encode(self.reference.prompts, self.text_encoder)

    @cached_property
    def saved_indices(self) -> list[int]:
        """Indices of the samples whose images every point saves, see `images_to_save`."""
        return images_to_save(self.reference.prompts)


def images_to_save(prompts: Sequence[str]) -> list[int]:
    """Choose the samples to save, `NUM_SAVED_IMAGES` in total: the first of each distinct prompt, then others.

    Args:
        prompts: prompt of every sample.
    """
    firsts = sorted({prompt: i for i, prompt in reversed(list(enumerate(prompts)))}.values())
    others = [i for i in range(len(prompts)) if i not in set(firsts)]
    return sorted([*firsts, *others][:NUM_SAVED_IMAGES])


def _manifest(**facts: Any) -> dict[str, Any]:
    """The start of an artefact's manifest, to which its stage adds entries."""
    return facts


def _cumulative(progress: Report) -> Callable[[int], None]:
    """Turn a callback for the total count into a callback for increments."""
    total = 0

    def add(increment: int) -> None:
        nonlocal total
        total += increment
        progress(total, "")

    return add
