"""What training and scoring draw on: a study's pictures, codec, caption encoder, latent cache, reference and floors.

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
from isocost.config.evaluation import LEAST_PICTURES, ProtocolSpec
from isocost.config.model import LinearCodecSpec, PretrainedCodecSpec
from isocost.config.study import StudySpec
from isocost.data import latent_cache as caching
from isocost.data.datasets import num_classes, read_source, source_fingerprint
from isocost.data.latent_cache import (
    LatentCache,
    Part,
    PictureSet,
    count,
    forecast_bytes,
    load_pictures,
    write_cache,
    write_index,
)
from isocost.data.row_store import Place
from isocost.errors import RequestError
from isocost.evaluation import reference_set as referencing
from isocost.evaluation.evaluator import score
from isocost.evaluation.feature_store import Measured
from isocost.evaluation.protocol import Protocol, make_protocol
from isocost.evaluation.reconstruction import codec_quality, round_trip
from isocost.evaluation.reference_set import Reference, captions_to_draw, classes_of, read_features, train_probe, write_features
from isocost.metrics.attribute_classifier import Probe
from isocost.metrics.extractor_base import Extractor
from isocost.metrics.lpips import load_lpips
from isocost.models.autoencoder import Codec, LinearCodec, load_codec
from isocost.models.checkpoint import CheckpointInfo, given_info
from isocost.models.pretrained.pipeline_config import source_digest
from isocost.models.text_encoder import TextCodec
from isocost.sampling.generate import CaptionStates
from isocost.training.autoencoder import fit_codec
from isocost.utils.artifact_store import Store, free_disk
from isocost.utils.device import best_device
from isocost.utils.environment import provenance
from isocost.utils.progress import Report, progress_bar, say

CODEC_VERSION = 1
FLOOR_VERSION = 3
NUM_CODEC_PICTURES = 2000
NUM_KEPT = 12


class Materials:
    """Made on first use, kept in memory while the object lives."""

    def __init__(self, study: StudySpec, store: Store, part: Part = Part()) -> None:  # noqa: B008
        """`part` is this process among several that train together; the first one makes what is not shared out."""
        self.study, self.store, self.part = study, store, part
        self._pictures: dict[str, PictureSet] = {}
        self._fingerprints: dict[str, str] = {}

    # --- pictures ---

    def source_key(self, part: str) -> dict[str, Any]:
        """What of the source `train` or `reference` enters digests: its content and how it is read, not where it lies."""
        source: SourceSpec = getattr(self.study.data, part)
        if part not in self._fingerprints:
            self._fingerprints[part] = source_fingerprint(source)
        plain = {key: value for key, value in source.canonical().items() if key != "path"}
        return {**plain, "content": self._fingerprints[part], "resolution": self.study.data.resolution}

    def pictures(self, part: str) -> PictureSet:
        """The pictures of `train` or `reference`, read once."""
        if part not in self._pictures:
            data = self.study.data
            loaded = load_pictures(getattr(data, part), data.resolution, data.max_bad_share)
            if loaded.bad:
                say(f"data.{part}: {len(loaded.bad)} of {len(loaded) + len(loaded.bad)} skipped; the ledger names them")
            self._pictures[part] = loaded
        return self._pictures[part]

    def skipped(self) -> dict[str, list[tuple[str, str]]]:
        """Name and reason of what could not be read, of the parts that were read so far."""
        cached = self.__dict__.get("cache")
        found = {} if cached is None else {"train": [(bad["name"], bad["reason"]) for bad in cached.index["bad"]]}
        return found | {part: [(bad.name, bad.reason) for bad in loaded.bad] for part, loaded in self._pictures.items()}

    # --- codec and captions ---

    @cached_property
    def codec_digest(self) -> str:
        """Names the study's codec; of given checkpoints all of theirs."""
        stage: dict[str, Any] = {"stage": "codec", "version": CODEC_VERSION}
        if self.study.checkpoints:
            return digest({**stage, "given": [source_digest(path) for path in self.study.checkpoints]})
        if isinstance(self.study.own.codec, PretrainedCodecSpec):
            return digest(stage, self.study.own.codec)
        return digest(stage, self.study.own.codec, self.source_key("train"))

    @cached_property
    def codec(self) -> Codec:
        """The study's codec, fitted where it is not there yet."""
        spec = self.study.own.codec
        if isinstance(spec, PretrainedCodecSpec):
            return load_codec(spec.path, spec.subfolder, best_device())
        if not self.store.has("codec", self.codec_digest):
            pictures = self.pictures("train").pictures
            total = 1 if isinstance(spec, LinearCodecSpec) else spec.num_images
            started = time.monotonic()
            with self.store.create("codec", self.codec_digest, manifest := _manifest(spec=spec.canonical())) as folder:
                with progress_bar("codec", total, "images") as progress:
                    codec = fit_codec(spec, pictures, progress=lambda done, loss: progress(done, f"loss {loss:.4f}"))
                codec.save(folder)
                manifest["seconds"] = int(time.monotonic() - started)
        return load_codec(self.store.folder("codec", self.codec_digest), device=best_device())

    @property
    def codec_from_checkpoint(self) -> str:
        """Where a checkpoint of this output folder finds the codec."""
        if isinstance(self.study.own.codec, PretrainedCodecSpec):
            return self.study.own.codec.path
        return f"../../codec/{self.codec_digest}"

    def check_parent(self, info: CheckpointInfo, prediction: str, named: str) -> None:
        """
        Raises:
            RequestError: a given checkpoint, `named` by where it was given, is of another codec or predicts something else.
        """
        if info.given is not None:
            raise RequestError(f"{named} is a pipeline of diffusers: those are scored, not tuned")
        channels, side, _ = self.latent_shape
        own = Path(self.codec_from_checkpoint).name
        if Path(info.codec).name != own or (info.model.latent_channels, info.model.latent_side) != (channels, side):
            raise RequestError(f"{named} was trained on latents of another codec; take this study's")
        if info.prediction != prediction:
            raise RequestError(f"{named} predicts {info.prediction}, the study {prediction}")

    def codec_report(self) -> dict[str, Any]:
        """Held-out quality of the codec, and that of the linear codec of the same latent shape beside it."""
        self.study.own  # noqa: B018  given checkpoints have codecs of their own
        stage = {"stage": "codec-quality", "version": CODEC_VERSION, "codec": self.codec_digest}
        name = digest(stage, self.source_key("train"), self.source_key("reference"))
        if not self.store.has("codec-quality", name):
            held_out, others = (self.pictures(part).pictures[:NUM_CODEC_PICTURES] for part in ("reference", "train"))
            linear = LinearCodec.fit(others, self.codec.factor, self.codec.latent_channels)
            weights = str(getattr(self.study.own.codec, "perceptual", ""))
            lpips = load_lpips(weights) if weights.endswith(".safetensors") else None
            with self.store.create("codec-quality", name, manifest := _manifest(codec_digest=self.codec_digest)):
                for title, codec in (("codec", self.codec), ("linear", linear)):
                    say(f"measuring the {'study' if title == 'codec' else title} codec on {len(held_out)} held-out pictures")
                    manifest[title] = codec_quality(codec, held_out, others, self.extractor, lpips)
        manifest = self.store.manifest("codec-quality", name)
        parts = {title: manifest[title] for title in ("codec", "linear")}
        if parts["codec"]["psnr_db"] <= parts["linear"]["psnr_db"]:
            say("the study's codec does not beat the linear one of its latent shape: train it longer, or use kind: linear")
        return {"digest": self.codec_digest, "latent_shape": list(self.latent_shape), **parts}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, side, side: known from the spec, before the codec is fitted. Of given checkpoints the largest."""
        if self.study.checkpoints:
            models = [given_info(path).model for path in self.study.checkpoints]
            return max((model.latent_channels, model.latent_side, model.latent_side) for model in models)
        spec = self.study.own.codec
        if isinstance(spec, PretrainedCodecSpec):
            channels, factor = self.codec.latent_channels, self.codec.factor
        elif isinstance(spec, LinearCodecSpec):
            channels, factor = spec.num_channels, spec.patch
        else:
            channels, factor = spec.num_channels, 2 ** (len(spec.block_widths) - 1)
        side = self.study.data.resolution // factor
        return channels, side, side

    @cached_property
    def text(self) -> TextCodec:
        return TextCodec(self.study.text, best_device())

    @cached_property
    def cache_digest(self) -> str:
        stage = {"stage": "cache", "version": caching.VERSION, "codec": self.codec_digest}
        return digest(stage, self.source_key("train"), self.study.text)

    @property
    def cache_place(self) -> Place:
        """Where the latent cache is, or would be."""
        at = self.study.own.train.cache_at
        return Place(self.store.folder("cache", self.cache_digest) if at is None else f"{at.rstrip('/')}/{self.cache_digest}")

    @cached_property
    def cache(self) -> LatentCache:
        """Latent moments, captions and caption states of the training pictures; processes of one training write it together.

        Raises:
            RequestError: there is no room for it.
        """
        place, data, text = self.cache_place, self.study.data, self.study.text
        if place.size(caching.INDEX) is None:
            if self.part.rank == 0:
                self.codec  # noqa: B018  fitted by one process, read by the others
            self.part.wait()
            codec, encoder = self.codec, self.text
            read = partial(read_source, self.study.own.pictures, data.resolution)
            num_pictures, num_captions, size = self._cache_size()
            say(f"latent cache: {num_pictures} pictures, {num_captions} captions, {size / 1e9:.2f} GB")
            if place.is_local and size > (free := free_disk(self.store.out)):
                raise RequestError(
                    f"the latent cache takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: text.cache_states: false, "
                    "or train.cache_at: another disk or an object store"
                )
            total = num_pictures + (num_captions + 1 if text.cache_states else 0)
            with progress_bar("latents and captions", total, "done") as progress:
                index = write_cache(
                    place,
                    read,
                    codec,
                    encoder,
                    with_states=text.cache_states,
                    max_bad_share=data.max_bad_share,
                    part=self.part,
                    progress=_adding_up(progress),
                )
            if self.part.rank == 0:
                write_index(place, {"kind": "cache", "digest": self.cache_digest, **index, "provenance": provenance()})
            self.part.wait()
        return LatentCache(place)

    def _cache_size(self) -> tuple[int, int, int]:
        """Pictures and captions of the cache, readable or not, and the bytes that they will take; no picture is decoded."""
        data, text = self.study.data, self.study.text
        num_pictures, num_captions = count(partial(read_source, self.study.own.pictures, data.resolution))
        states = (text.max_tokens, self.text.context_width)
        size = forecast_bytes(num_pictures, self.latent_shape, num_captions, states, text.cache_states)
        return num_pictures, num_captions, size

    def cache_bytes(self) -> int:
        """Bytes of the latent cache, as it is or will be."""
        if self.cache_place.size(caching.INDEX) is None:
            return self._cache_size()[2]
        return sum(file["bytes"] for table in self.cache.index["tables"].values() for file in table)

    # --- reference ---

    @cached_property
    def extractors(self) -> dict[str, Extractor]:
        return referencing.make_extractors(self.study.protocol, best_device())

    @property
    def extractor(self) -> Extractor:
        """The first of the protocol's extractors, by which a codec is judged."""
        return next(iter(self.extractors.values()))

    @cached_property
    def protocol(self) -> Protocol:
        """What the study's scores rest on, fixed on its real pictures; nothing is computed from them yet.

        Raises:
            RequestError: there are too few reference pictures, or no labels where alignment is asked for.
        """
        return self.protocol_of(self.study.protocol, self.extractors)

    def protocol_of(
        self, spec: ProtocolSpec, extractors: Mapping[str, Extractor], given: str = "", compared_by: Sequence[str] = ()
    ) -> Protocol:
        """A protocol on the study's held-out pictures; `given` and `compared_by` are super-resolution's (`make_protocol`).

        Raises:
            RequestError: there are too few reference pictures, or none of the labels that alignment needs.
        """
        held_out = self.pictures("reference")
        num_reference = min(len(held_out), spec.num_reference or len(held_out))
        if num_reference < LEAST_PICTURES:
            raise RequestError(f"data.reference: {num_reference} pictures; a distance takes at least {LEAST_PICTURES}")
        captions, labels = captions_to_draw(held_out, spec.num_pictures)
        if spec.alignment != "none" and labels is None:
            raise RequestError(referencing.LABELS_NEEDED)
        return make_protocol(
            spec,
            resolution=self.study.data.resolution,
            extractor=[*(extractor.id for extractor in extractors.values()), *compared_by],
            reference=held_out.fingerprint(),
            num_reference=num_reference,
            captions=captions,
            probe=None if spec.alignment == "none" else self.probe_digest,
            given=given,
        )

    @cached_property
    def reference(self) -> Reference:
        """The protocol with the reference pictures' features and the probe."""
        protocol, held_out = self.protocol, self.pictures("reference")
        captions, labels = captions_to_draw(held_out, protocol.num_pictures)
        compared = held_out.pictures[: protocol.num_reference]
        features = {name: self.features(extractor, compared) for name, extractor in self.extractors.items()}
        kept = self.study.protocol.kept
        if self.study.protocol.alignment == "none":
            return Reference(protocol, self.extractors, features, captions, kept=kept)
        return Reference(protocol, self.extractors, features, captions, labels, self.probe(), kept=kept)

    def features(self, extractor: Extractor, compared: Tensor) -> np.ndarray:
        """Features of the reference pictures, float32 [M, D], made once for each extractor."""
        stage = {"stage": "features", "version": referencing.VERSION, "extractor": extractor.id, "num": len(compared)}
        name = digest(stage, self.source_key("reference"))
        if not self.store.has("features", name):
            say(f"features of {len(compared)} reference pictures: {extractor.id.partition(':')[0]}")
            with self.store.create("features", name, {"extractor": extractor.id, "num_pictures": len(compared)}) as folder:
                write_features(folder, extractor, compared)
        return read_features(self.store.folder("features", name))

    @property
    def probe_digest(self) -> str:
        stage = {"stage": "probe", "version": referencing.VERSION, "seed": self.study.protocol.seed}
        return digest(stage, self.source_key("train"), self.source_key("reference"))

    def probe(self) -> Probe:
        """What reads attributes from pictures, fitted where it is not there yet."""
        name = self.probe_digest
        if not self.store.has("probe", name):
            training, held_out = self.pictures("train"), self.pictures("reference")
            referencing.need_labels(training, held_out)
            classes = num_classes(self.study.own.pictures) or classes_of(training)
            say(f"fitting the probe to {len(training)} real pictures")
            with self.store.create("probe", name, manifest := _manifest()) as folder:
                manifest.update(train_probe(folder, training, held_out, classes, self.study.protocol.seed))
            say(f"the probe reads {manifest['accuracy']:.3f} of the labels of held-out real pictures")
        return Probe.load(self.store.folder("probe", name))

    def floors(self) -> dict[str, dict[str, float]]:
        """Scores of real pictures after the codec (`decoded`) and before it (`real`): what no model is expected to pass.

        Distances take training pictures, a fair draw of them, against the reference; alignment and caption scores take the
        reference pictures with their own labels and captions, so alignment's `real` is the probe's accuracy.
        """
        spec, reference = self.study.protocol, self.reference
        stage = {"stage": "floor", "version": FLOOR_VERSION, "codec": self.codec_digest, "protocol": reference.protocol.id}
        name = digest({**stage, "distances": list(spec.distances)}, self.source_key("train"))
        if not self.store.has("floor", name):
            say(f"the floor: {spec.num_pictures} real pictures scored as they are and after the codec")
            with self.store.create("floor", name, manifest := _manifest()):
                for title in ("decoded", "real"):
                    training = self.pictures("train").fair_draw(spec.num_pictures)
                    held_out = self.pictures("reference").pictures[: spec.num_pictures]
                    if title == "decoded":
                        training, held_out = round_trip(self.codec, training), round_trip(self.codec, held_out)
                    aligned = None
                    if reference.probe is not None and reference.labels is not None:
                        aligned = reference.probe.alignment(held_out, reference.labels)
                    of_sets = tuple(distance for distance in spec.distances if distance != "caption")
                    scores = score(Measured(self._taken(training), aligned), reference, of_sets)
                    if "caption" in spec.distances:
                        scores.update(score(Measured(self._taken(held_out)), reference, ("caption",)))
                    manifest[title] = {metric: interval.value for metric, interval in scores.items()}
        manifest = self.store.manifest("floor", name)
        return {title: manifest[title] for title in ("decoded", "real")}

    def _taken(self, pictures: Tensor) -> dict[str, np.ndarray]:
        return {name: extractor(pictures).cpu().numpy() for name, extractor in self.extractors.items()}

    @cached_property
    def caption_states(self) -> CaptionStates:
        """States of the captions that are drawn."""
        return CaptionStates.of(self.reference.captions, self.text)

    @cached_property
    def kept(self) -> list[int]:
        """Picture ids whose pictures every point keeps: the first of each caption, then others, `NUM_KEPT` in all."""
        return pictures_to_keep(self.reference.captions)


def pictures_to_keep(captions: Sequence[str]) -> list[int]:
    """Ids of the pictures of `captions` that every point keeps: the first of each caption, then others, `NUM_KEPT` in all."""
    firsts = sorted({caption: i for i, caption in reversed(list(enumerate(captions)))}.values())
    others = [i for i in range(len(captions)) if i not in set(firsts)]
    return sorted([*firsts, *others][:NUM_KEPT])


def _manifest(**facts: Any) -> dict[str, Any]:
    """What an artefact's manifest begins with; its stage fills in the rest."""
    return facts


def _adding_up(progress: Report) -> Callable[[int], None]:
    """A callback that is told how many more."""
    total = 0

    def add(more: int) -> None:
        nonlocal total
        total += more
        progress(total, "")

    return add
