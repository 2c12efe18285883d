"""The command `drift`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from isocost.cli.app import app, print_json
from isocost.cli.evaluate import Weights, parse_weights
from isocost.cli.options import NumImages, read_prompts
from isocost.config.evaluation import PairedMetricName
from isocost.config.yaml_text import parse_yaml
from isocost.errors import ConfigError
from isocost.utils.output_paths import check_output_file, check_output_folder

if TYPE_CHECKING:
    from isocost.experiments.drift import Side

EXIT_WORSE = 3
IMAGES_PER_CALL = 8
SIDE_HELP = "a folder of images, a .npy or .npz file, a checkpoint folder, a published pipeline, or python:MODULE:FUNCTION"


@app.command()
def drift(
    base: Annotated[str, typer.Argument(help=f"the trusted side: {SIDE_HELP}")],
    variant: Annotated[str | None, typer.Argument(help="the side that may have drifted; default: the base")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", help="real images, or statistics of `isocost reference`; without them only images are compared"
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="protocol preset for the scores; default: mmd-efficientnet-64")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="how much worse the variant may be, as a fraction of the base's score; default: 0.05"),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="setting of both sides, such as num_steps=8")
    ] = None,
    base_settings: Annotated[
        list[str] | None, typer.Option("--base-set", metavar="KEY=VALUE", help="setting of the base only")
    ] = None,
    variant_settings: Annotated[
        list[str] | None,
        typer.Option("--variant-set", metavar="KEY=VALUE", help="setting of the variant only, such as dtype=bf16"),
    ] = None,
    batch_invariance: Annotated[
        bool, typer.Option("--batch-invariance", help="compare one image per call with eight per call of the same checkpoint")
    ] = False,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="prompt for models; may be repeated")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="prompts for models: .txt with one per line, or .csv with a column prompt; or the list of the protocol",
        ),
    ] = None,
    images_per_prompt: NumImages = 1,
    image_metrics: Annotated[
        list[str] | None, typer.Option("--image-metric", help="lpips, psnr or ssim; may be repeated; default: all three")
    ] = None,
    weights: Weights = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for the images of models, and for most-different.png")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", help="also write the result as Markdown to this .md file")
    ] = None,
) -> None:
    """Compare a variant with its base, image by image and by score. Exit status 3: the variant is worse."""
    from isocost.evaluation.protocol_presets import protocol_preset
    from isocost.experiments.drift import DEFAULT_PROTOCOL, DEFAULT_TOLERANCE, compare_sides
    from isocost.report.drift import drift_markdown, format_verdict, write_most_different

    if reference is None and (protocol, tolerance) != (None, None):
        raise ConfigError("--protocol and --tolerance are for scores; give --reference too")
    sides = _sides(base, variant, (settings, base_settings, variant_settings), batch_invariance)
    protocol = DEFAULT_PROTOCOL if protocol is None else protocol
    has_own_prompts = reference is not None and protocol_preset(protocol).prompts is not None
    texts = read_prompts(prompt, None if has_own_prompts else prompts)
    if all(side.has_images for side in sides) and (texts or images_per_prompt != 1):
        raise ConfigError("both sides are images, so no prompts are needed; leave out --prompt, --prompts and --num-images")
    if batch_invariance and len(texts) * images_per_prompt < IMAGES_PER_CALL:
        raise ConfigError(f"--batch-invariance: give prompts for {IMAGES_PER_CALL} images or more (--num-images)")
    if markdown is not None:
        check_output_file(markdown, ".md", () if prompts is None else (prompts,))
    if out is not None:
        check_output_folder(out)
    compared = compare_sides(
        *sides,
        out=out,
        prompts=texts,
        images_per_prompt=images_per_prompt,
        reference=reference,
        protocol=protocol,
        protocol_prompts=str(prompts) if has_own_prompts and prompts is not None else None,
        weights=parse_weights(weights),
        image_metrics=_parse_image_metrics(image_metrics),
        tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance,
    )
    result = compared.drift
    of_base, of_variant = (_describe(side.source, side.settings) for side in sides)
    text = drift_markdown(result, of_base, of_variant, shlex.join(["isocost", *sys.argv[1:]]))
    print(text, file=sys.stderr)
    files: dict[str, str] = {}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if write_most_different(out / "most-different.png", result, compared.pairs):
            files["most_different"] = str(out / "most-different.png")
    if markdown is not None:
        markdown.write_text(text, encoding="utf-8")
        files["markdown"] = str(markdown)
    scores = [{**dataclasses.asdict(score), "verdict": score.verdict} for score in result.scores]
    images = {**dataclasses.asdict(result.images), "verdict": result.images.verdict}
    facts = {"protocol": result.protocol, "not_judged": list(result.not_judged)}
    print_json({"verdict": format_verdict(result), "images": images, "scores": scores, **facts, **files})
    if result.verdict == "worse":
        raise typer.Exit(EXIT_WORSE)


def _sides(base: str, variant: str | None, settings: tuple[list[str] | None, ...], batch_invariance: bool) -> tuple[Side, Side]:
    """Both sides with their settings.

    Raises:
        ConfigError: a setting is not KEY=VALUE or is given for both sides and for one, or the sides are the same.
    """
    from isocost.experiments.drift import Side
    from isocost.sampling.image_folder import PYTHON

    of_base, of_variant = (_parse_settings([*(settings[0] or ()), *(own or ())]) for own in settings[1:])
    if batch_invariance:
        if variant is not None or base.startswith(PYTHON) or Side(base).has_images:
            raise ConfigError("--batch-invariance compares a checkpoint with itself; give one checkpoint")
        if "images_per_call" in {**of_base, **of_variant}:
            raise ConfigError("--batch-invariance sets images_per_call of both sides; leave it out")
        of_base, of_variant = {**of_base, "images_per_call": 1}, {**of_variant, "images_per_call": IMAGES_PER_CALL}
    sides = Side(base, of_base), Side(base if variant is None else variant, of_variant)
    if sides[0] == sides[1]:
        raise ConfigError("base and variant are the same; give another VARIANT, or --variant-set KEY=VALUE")
    return sides


def _parse_settings(items: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item}: give KEY=VALUE, such as dtype=bf16")
        target = settings
        *parents, name = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{item}: {parent} already has a value; give it once, for both sides or for each")
        if name in target:
            raise ConfigError(f"{item}: {key} already has a value; give it once, for both sides or for each")
        target[name] = parse_yaml(value, item)
    return settings


def _parse_image_metrics(names: list[str] | None) -> tuple[PairedMetricName, ...]:
    known: tuple[PairedMetricName, ...] = get_args(PairedMetricName)
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--image-metric {name}: give one of {', '.join(known)}")
    return tuple(name for name in known if names is None or name in names)


def _describe(source: str, settings: Mapping[str, Any]) -> str:
    return " ".join([source, *(f"{key}={value}" for key, value in settings.items())])
