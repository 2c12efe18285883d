"""The command `drift`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from isocost.cli.app import app, print_json
from isocost.cli.evaluate import Weights, parse_weights
from isocost.cli.options import NumImages, read_prompts
from isocost.config.evaluation import PairedMetricName
from isocost.config.yaml_text import parse_yaml
from isocost.errors import ConfigError
from isocost.utils.output_paths import check_output_file, check_output_folder

EXIT_WORSE = 3
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
    protocol: Annotated[str, typer.Option("--protocol", help="protocol preset for the scores")] = "mmd-efficientnet-64",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="how much worse the variant may be, as a fraction of the base's score")
    ] = 0.05,
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
        bool, typer.Option("--batch-invariance", help="compare one image per call with eight per call of the same model")
    ] = False,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="prompt for models; may be repeated")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="prompts for models: .txt with one per line, or .csv with a column prompt")
    ] = None,
    images_per_prompt: NumImages = 1,
    protocol_prompts: Annotated[
        str | None, typer.Option("--protocol-prompts", help="source of the prompts of a protocol that has prompts")
    ] = None,
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
    from isocost.experiments.drift import Side, compare_sides
    from isocost.report.drift import drift_markdown, format_verdict, write_most_different

    shared, of_base, of_variant = (_parse_settings(items) for items in (settings, base_settings, variant_settings))
    if batch_invariance:
        if variant is not None or "batch_size" in {**shared, **of_base, **of_variant}:
            raise ConfigError("--batch-invariance sets the variant and both batch sizes; leave out VARIANT and batch_size")
        of_base, of_variant = {**of_base, "batch_size": 1}, {**of_variant, "batch_size": 8}
    sides = Side(base, {**shared, **of_base}), Side(base if variant is None else variant, {**shared, **of_variant})
    if sides[0] == sides[1]:
        raise ConfigError("base and variant are the same; give another VARIANT, or --variant-set KEY=VALUE")
    if markdown is not None:
        check_output_file(markdown, ".md")
    if out is not None:
        check_output_folder(out)
    compared = compare_sides(
        *sides,
        out=out,
        prompts=read_prompts(prompt, prompts),
        images_per_prompt=images_per_prompt,
        reference=reference,
        protocol=protocol,
        protocol_prompts=protocol_prompts,
        weights=parse_weights(weights),
        image_metrics=_parse_image_metrics(image_metrics),
        tolerance=tolerance,
    )
    result = compared.drift
    of_both = [_describe(side.source, dict(side.settings)) for side in sides]
    text = drift_markdown(result, of_both[0], of_both[1], shlex.join(["isocost", *sys.argv[1:]]))
    print(text, file=sys.stderr)
    files: dict[str, str] = {}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        if write_most_different(out / "most-different.png", result, compared.base, compared.variant):
            files["most_different"] = str(out / "most-different.png")
    if markdown is not None:
        markdown.write_text(text, encoding="utf-8")
        files["markdown"] = str(markdown)
    scores = [{**dataclasses.asdict(score), "verdict": score.verdict} for score in result.scores]
    images = {**dataclasses.asdict(result.images), "verdict": result.images.verdict}
    print_json({"verdict": format_verdict(result), "images": images, "scores": scores, "protocol": result.protocol, **files})
    if result.verdict == "worse":
        raise typer.Exit(EXIT_WORSE)


def _parse_settings(items: list[str] | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{item}: give KEY=VALUE, such as dtype=bf16")
        target = settings
        *parents, name = key.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{item}: {parent} already has a value; give it once")
        if name in target:
            raise ConfigError(f"{item}: {key} is given twice")
        target[name] = parse_yaml(value, item)
    return settings


def _parse_image_metrics(names: list[str] | None) -> tuple[PairedMetricName, ...]:
    known: tuple[PairedMetricName, ...] = get_args(PairedMetricName)
    for name in names or ():
        if name not in known:
            raise ConfigError(f"--image-metric {name}: give one of {', '.join(known)}")
    return tuple(name for name in known if names is None or name in names)


def _describe(source: str, settings: dict[str, Any]) -> str:
    return " ".join([source, *(f"{key}={value}" for key, value in settings.items())])
