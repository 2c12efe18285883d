"""`isocost drift`: the images of a variant against those of its base, from the same prompts and noise.

A side is a folder of images or an array file, a checkpoint or a published pipeline, or a Python function
(`isocost.sampling.image_folder`). The last two make their images here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isocost.config.base import parse_spec
from isocost.config.evaluation import PairedMetricName
from isocost.config.sampling import ImageSettings
from isocost.errors import ConfigError
from isocost.evaluation.drift import (
    IMAGE_METRICS,
    Drift,
    ImagePairs,
    ScoreComparison,
    bootstrap_spec,
    check_can_score,
    measure_pairs,
)
from isocost.evaluation.image_sources import ARRAY_SUFFIXES
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.protocol_presets import protocol_preset
from isocost.evaluation.reference_set import ReferenceSet, make_extractors
from isocost.evaluation.reference_stats import check_num_images
from isocost.evaluation.score_folder import read_protocol_prompts, read_reference_features, with_weights
from isocost.sampling.image_folder import PYTHON, ImageMaker, checkpoint_maker, python_maker, write_images
from isocost.utils.artifact_store import MANIFEST
from isocost.utils.device import best_device

DEFAULT_PROTOCOL = "mmd-efficientnet-64"
BASE, VARIANT = "base", "variant"
PIPELINE_INDEX = "model_index.json"


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        source: a folder of images, an array file, a checkpoint, a published pipeline, or python:MODULE:FUNCTION.
        settings: fields of `ImageSettings`, or the arguments of the function; empty for images.
    """

    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_images(self) -> bool:
        """Whether the source is images, and not a model that makes them."""
        folder = Path(self.source)
        is_model = any((folder / name).exists() for name in (MANIFEST, PIPELINE_INDEX))
        return self.source.endswith(ARRAY_SUFFIXES) or (folder.is_dir() and not is_model)

    def maker(self) -> ImageMaker:
        """The model of this side with its settings.

        Raises:
            ConfigError: the model cannot be read, or a setting is wrong.
        """
        if self.source.startswith(PYTHON):
            return python_maker(self.source, self.settings)
        return checkpoint_maker(self.source, parse_spec(ImageSettings, dict(self.settings), "settings"))


@dataclass(frozen=True)
class ComparedSides:
    """A comparison with the images it was made from.

    Attributes:
        drift: the differences and verdicts.
        base, variant: the sources of the images: folders or array files.
    """

    drift: Drift
    base: str
    variant: str


def compare_sides(
    base: Side,
    variant: Side,
    *,
    out: Path | None = None,
    prompts: Sequence[str] = (),
    images_per_prompt: int = 1,
    reference: str | None = None,
    protocol: str = DEFAULT_PROTOCOL,
    protocol_prompts: str | None = None,
    weights: Mapping[str, str] | None = None,
    image_metrics: Sequence[PairedMetricName] = IMAGE_METRICS,
    tolerance: float = 0.05,
) -> ComparedSides:
    """Make the images of both sides where they are missing, and compare them.

    Args:
        base: the side that is trusted.
        variant: the side that may have drifted.
        out: folder for the images of models: OUT/base and OUT/variant. An interrupted call goes on.
        prompts: for models; each gets `images_per_prompt` images.
        images_per_prompt: each with its own noise.
        reference: real images, as of `score_folder`; None compares the images only.
        protocol: a name of `isocost.evaluation.protocol_presets.PRESETS`.
        protocol_prompts: source of the protocol's prompts, if it has prompts; they replace `prompts`.
        weights: sources of weights by extractor name, and of AlexNet under "lpips".
        image_metrics: of "lpips", "psnr", "ssim".
        tolerance: fraction of the base's score by which the variant may be worse.

    Raises:
        ConfigError: a request is wrong: a source or a setting, images without counterparts, or too few of them.
    """
    preset = protocol_preset(protocol)
    if preset.compares != "sets":
        raise ConfigError(f"protocol '{protocol}' compares {preset.compares}; give one of sets, such as {DEFAULT_PROTOCOL}")
    if not tolerance >= 0:
        raise ConfigError(f"tolerance {tolerance:g}: give 0 or more")
    by_id = None if reference is None else read_protocol_prompts(preset, protocol_prompts)
    if by_id is None:
        wanted = {str(i): prompts[i // images_per_prompt] for i in range(len(prompts) * images_per_prompt)}
    else:
        wanted = by_id
    lpips_weights, spec = with_weights(preset.spec, weights)
    extractors = {} if reference is None else make_extractors(spec, best_device())
    sources = _image_sources(base, variant, wanted, out)
    pairs = _paired(sources, by_id, protocol)
    if reference is None:
        images = measure_pairs(pairs, {}, image_metrics, lpips_weights).images
        return ComparedSides(Drift(images, ()), *sources)
    real = read_reference_features(reference, preset, extractors, list(by_id) if by_id and preset.reference_ids else None)
    check_num_images("the pairs", len(pairs.ids), preset.num_images)
    check_num_images(reference, len(real), preset.num_reference)
    check_can_score(len(pairs.ids), len(real))
    measured = measure_pairs(pairs, extractors, image_metrics, lpips_weights)
    prompt_list = [] if by_id is None else list(by_id.values())
    full_protocol = make_protocol(
        bootstrap_spec(spec, len(pairs.ids)),
        resolution=preset.resolution or 0,
        extractor=[extractor.id for extractor in extractors.values()],
        reference=real.content,
        num_reference=len(real),
        prompts=prompt_list,
    )
    reference_set = ReferenceSet(full_protocol, extractors, real.features, prompt_list)
    scores = ScoreComparison(measured.base, measured.variant, reference_set, spec.metrics).differences(tolerance)
    return ComparedSides(Drift(measured.images, scores, f"{protocol}:{full_protocol.id}", len(real)), *sources)


def _image_sources(base: Side, variant: Side, prompts: Mapping[str, str], out: Path | None) -> tuple[str, str]:
    """The sources of both sides' images; models make theirs. All requests are checked before a model runs.

    Raises:
        ConfigError: images have settings, or a model cannot be read or lacks prompts or a folder.
    """
    sides = {BASE: base, VARIANT: variant}
    makers: dict[str, ImageMaker] = {}
    for name, side in sides.items():
        if side.has_images and side.settings:
            raise ConfigError(
                f"{side.source}: is a folder of images, so it takes no settings; leave out {next(iter(side.settings))}"
            )
        if side.has_images:
            continue
        if not prompts:
            raise ConfigError(f"{side.source}: a model needs prompts; give --prompt TEXT or --prompts FILE")
        if out is None:
            raise ConfigError(f"{side.source}: a model needs a folder for its images; give --out FOLDER")
        makers[name] = side.maker()
    for name, maker in makers.items():
        assert out is not None, "checked above"
        write_images(maker, prompts, out / name, f"images of the {name}")
    first, second = (str(out / name) if name in makers and out is not None else side.source for name, side in sides.items())
    return first, second


def _paired(sources: tuple[str, str], prompts: Mapping[str, str] | None, protocol: str) -> ImagePairs:
    """The pairs of images, in the order of the protocol's prompts if it has any.

    Raises:
        ConfigError: images have no counterparts, or other ids than the prompts.
    """
    pairs = ImagePairs.read(*sources)
    if prompts is None:
        return pairs
    if set(pairs.ids) != set(prompts):
        raise ConfigError(f"{sources[0]}: its images do not have the ids of the prompts of protocol '{protocol}'")
    return ImagePairs(tuple(prompts), pairs.base, pairs.variant)
