"""A study from pictures to report: each stage a function of specs, each artefact named by its digest, what exists skipped."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isocost.data.cache import PictureSet, load_pictures
from isocost.data.codec import Codec, load_codec
from isocost.data.sources import source_fingerprint
from isocost.progress import progress_bar, say
from isocost.store import Store
from isocost.study import LinearCodecSpec, PretrainedCodecSpec, SourceSpec, StudySpec, digest
from isocost.train.codec import fit_codec

CODEC_VERSION = 1


@dataclass
class Pipeline:
    """One study in one output folder. Stages call the ones they need; results are kept in memory while it lives."""

    study: StudySpec
    out: Path
    _pictures: dict[str, PictureSet] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.store = Store(self.out)

    def source_key(self, source: SourceSpec) -> dict[str, Any]:
        """What of a source enters digests: its content and how it is read, not where it lies."""
        plain = {key: value for key, value in source.canonical().items() if key != "path"}
        return {**plain, "content": source_fingerprint(source), "resolution": self.study.data.resolution}

    def pictures(self, part: str) -> PictureSet:
        """The pictures of `train` or `reference`, read once."""
        if part not in self._pictures:
            data = self.study.data
            self._pictures[part] = load_pictures(getattr(data, part), data.resolution, data.max_bad_share)
        return self._pictures[part]

    # --- codec ---

    def codec_digest(self) -> str:
        spec = self.study.codec
        if isinstance(spec, PretrainedCodecSpec):
            return digest({"stage": "codec", "version": CODEC_VERSION}, spec)
        return digest({"stage": "codec", "version": CODEC_VERSION}, spec, self.source_key(self.study.data.train))

    def codec(self) -> Codec:
        """Fit the study's codec, or load it."""
        spec = self.study.codec
        if isinstance(spec, PretrainedCodecSpec):
            return load_codec(spec.path, spec.subfolder)
        name = self.codec_digest()
        if not self.store.has("codec", name):
            pictures = self.pictures("train").pictures
            total = 1 if isinstance(spec, LinearCodecSpec) else spec.num_images
            started = time.monotonic()
            with self.store.create("codec", name, manifest := {"spec": spec.canonical()}) as folder:
                with progress_bar("codec", total, "images") as progress:
                    codec = fit_codec(spec, pictures, progress=lambda done, loss: progress(done, f"loss {loss:.4f}"))
                codec.save(folder)
                manifest["seconds"] = round(time.monotonic() - started, 1)
            say(f"codec {name} fitted in {manifest['seconds']} s")
        return load_codec(self.store.folder("codec", name))
