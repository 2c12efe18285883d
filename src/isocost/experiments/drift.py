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
from isocost.evaluation.feature_batches import BatchFunction
from isocost.evaluation.image_sources import ARRAY_SUFFIXES
from isocost.evaluation.paired_images import paired_image_metric
from isocost.evaluation.protocol import make_protocol
from isocost.evaluation.protocol_presets import protocol_preset
from isocost.evaluation.reference_set import ReferenceSet, make_extractors
from isocost.evaluation.reference_stats import check_num_images
from isocost.evaluation.score_folder import read_protocol_prompts, read_reference_features, with_weights
from isocost.sampling.image_folder import PYTHON, ImageMaker, check_image_folder, checkpoint_maker, python_maker, write_images
from isocost.utils.artifact_store import MANIFEST
from isocost.utils.device import best_device
from isocost.utils.output_paths import check_separate

DEFAULT_PROTOCOL, DEFAULT_TOLERANCE = "mmd-efficientnet-64", 0.05
BASE, VARIANT = "base", "variant"
PIPELINE_INDEX = "model_index.json"


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        source: a folder of images, an array file, a checkpoint, a published pipeline, or python:MODULE:FUNCTION.
        settings: fields of `ImageSettings`, or the arguments of the function; empty for images.

    Raises:
        ConfigError: the source is empty.
    """

    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ConfigError("the name of a side is empty; give a folder of images or a model")

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
        pairs: the compared images.
    """

    drift: Drift
    pairs: ImagePairs


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
    tolerance: float = DEFAULT_TOLERANCE,
) -> ComparedSides:
    """Make the images of both sides where they are missing, and compare them. Requests are checked before a model runs.

    Args:
        base: the side that is trusted.
        variant: the side that may have drifted.
        out: folder for the images of models: OUT/base and OUT/variant. An interrupted call goes on.
        prompts: for models; each gets `images_per_prompt` images.
        images_per_prompt: each with its own noise.
        reference: real images, as of `score_folder`; None compares the images only.
        protocol: a name of `isocost.evaluation.protocol_presets.PRESETS`.
        protocol_prompts: source of the protocol's prompts, if it has prompts; then without `prompts`.
        weights: sources of weights by extractor name, and of AlexNet under "lpips".
        image_metrics: of "lpips", "psnr", "ssim".
        tolerance: fraction of the base's score by which the variant may be worse.

    Raises:
        ConfigError: a request is wrong: a source or a setting, images without counterparts, or too few of them.
        RunError: a Python function of the user failed.
    """
    preset = protocol_preset(protocol)
    if preset.compares != "sets":
        raise ConfigError(f"protocol '{protocol}' compares {preset.compares}; give one of sets, such as {DEFAULT_PROTOCOL}")
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance {tolerance:g}: give a finite number, 0 or more")
    makers = _makers(base, variant, out, reference)
    by_id = None if reference is None else read_protocol_prompts(preset, protocol_prompts)
    if by_id is not None and prompts:
        raise ConfigError(f"protocol '{protocol}' has prompts of its own; leave out the others")
    wanted = by_id or {str(i): prompts[i // images_per_prompt] for i in range(len(prompts) * images_per_prompt)}
    for name, maker in makers.items():
        if not wanted:
            raise ConfigError(f"the {name} is a model and needs prompts; give --prompt TEXT or --prompts FILE")
        assert out is not None, "_makers() checks it"
        maker.check()
        check_image_folder(maker, wanted, out / name)
    lpips_weights, spec = with_weights(preset.spec, weights)
    extractors = {} if reference is None else make_extractors(spec, best_device())
    real = None
    if reference is not None:
        ids = list(by_id) if by_id is not None and preset.reference_ids else None
        real = read_reference_features(reference, preset, extractors, ids)
        check_num_images(reference, len(real), preset.num_reference)
        if makers:
            check_num_images("the prompts", len(wanted), preset.num_images)
            check_can_score(len(wanted), len(real))
    functions: dict[str, BatchFunction] = {name: paired_image_metric(name, lpips_weights).function for name in image_metrics}
    for name, maker in makers.items():
        assert out is not None, "_makers() checks it"
        write_images(maker, wanted, out / name, f"images of the {name}")
    first, second = (
        str(out / name) if name in makers and out is not None else side.source
        for name, side in ((BASE, base), (VARIANT, variant))
    )
    pairs = ImagePairs.read(first, second, None if reference is None else preset.resolution)
    if by_id is not None:
        pairs = pairs.in_order(list(by_id), f"the prompts of protocol '{protocol}'")
    if real is not None:
        check_num_images("the pairs", len(pairs.ids), preset.num_images)
        check_can_score(len(pairs.ids), len(real))
    measured = measure_pairs(pairs, extractors, functions)
    if real is None:
        return ComparedSides(Drift(measured.images, ()), pairs)
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
    comparison = ScoreComparison(measured.base, measured.variant, reference_set, spec.metrics)
    drift = Drift(
        measured.images,
        comparison.differences(tolerance),
        f"{protocol}:{full_protocol.id}",
        len(real),
        comparison.not_judged,
    )
    return ComparedSides(drift, pairs)


def _makers(base: Side, variant: Side, out: Path | None, reference: str | None) -> dict[str, ImageMaker]:
    """The models among both sides.

    Raises:
        ConfigError: images have settings, a model cannot be read or lacks a folder for its images, or that folder overlaps with
            an input.
    """
    makers: dict[str, ImageMaker] = {}
    inputs = [] if reference is None else [reference]
    for name, side in ((BASE, base), (VARIANT, variant)):
        if not side.has_images:
            makers[name] = side.maker()
            if out is None:
                raise ConfigError(f"{side.source}: a model needs a folder for its images; give --out FOLDER")
            continue
        inputs.append(side.source)
        if side.settings:
            raise ConfigError(
                f"{side.source}: is a folder of images, so it takes no settings; leave out {next(iter(side.settings))}"
            )
    for source in inputs:
        if out is not None and Path(source).exists():
            check_separate(out, source)
    return makers
