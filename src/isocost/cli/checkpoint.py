"""Commands on a checkpoint: `sample`, `upscale`, `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isocost.cli.app import answer_json, app
from isocost.config.base import parse_spec
from isocost.config.sampling import SAMPLER_NAMES, SamplerSpec
from isocost.config.types import Precision
from isocost.errors import RequestError

Steps = Annotated[int | None, typer.Option(help="solver steps; 16 where absent, 4 for a few-step student")]
Sampler = Annotated[str | None, typer.Option(help=f"{', '.join(SAMPLER_NAMES)}; the checkpoint's own where absent")]
Spacing = Annotated[str, typer.Option(help="trailing, leading, linspace or karras")]
Eta = Annotated[float, typer.Option(help="DDIM's share of ancestral noise")]
ComputesIn = Annotated[Precision, typer.Option(help="what the network computes in")]


@app.command()
def sample(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="a checkpoint folder: OUT/artefacts/checkpoint/DIGEST; or a pipeline, 'PATH_OR_ID + LORA:SCALE'"),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", help="a caption; may be given several times")],
    steps: Steps = None,
    guidance: Annotated[float, typer.Option(help="w in uncond + w (cond - uncond); 1 is one pass")] = 2.0,
    sampler: Sampler = None,
    spacing: Spacing = "trailing",
    eta: Eta = 0.0,
    negative: Annotated[str | None, typer.Option(help="a caption to lead away from, in place of the empty one")] = None,
    precision: ComputesIn = "fp32",
    num: Annotated[int, typer.Option("--num", help="pictures of each prompt")] = 4,
    seed: Annotated[int, typer.Option(help="what the noise is a function of, with the picture's number")] = 0,
    out: Annotated[Path, typer.Option("--out", help="folder for the PNGs and sheet.png")] = Path("samples"),
) -> None:
    """Pictures from one checkpoint."""
    from PIL import Image

    from isocost.sampling.sample import sample as draw

    spec = _sampler(sampler, spacing, eta)
    drawn = draw(
        checkpoint,
        prompt,
        sampler=spec,
        num_steps=steps,
        guidance=guidance,
        num_pictures=num,
        seed=seed,
        negative=negative,
        precision=precision,
    )
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for p, pictures in enumerate(drawn.pictures):
        for k, picture in enumerate(pictures):
            files.append(str(out / f"{p:02d}-{k:02d}.png"))
            Image.fromarray(picture).save(files[-1])
    drawn.sheet().save(out / "sheet.png")
    cost = {"nfe": drawn.nfe, "gflop_per_picture": drawn.gflop, "seconds": drawn.seconds}
    answer_json({"prompts": list(drawn.prompts), "files": files, "sheet": str(out / "sheet.png"), **cost})


@app.command()
def upscale(
    checkpoint: Annotated[Path, typer.Argument(help="a super-resolution checkpoint: OUT/artefacts/checkpoint/DIGEST")],
    picture: Annotated[Path, typer.Argument(help="a picture of any size")],
    out: Annotated[Path, typer.Argument(help="the file to write, .png")],
    steps: Steps = None,
    caption: Annotated[str, typer.Option(help="for checkpoints that were tuned with captions")] = "",
    guidance: Annotated[float, typer.Option(help="1 is one pass")] = 1.0,
    sampler: Sampler = None,
    spacing: Spacing = "trailing",
    eta: Eta = 0.0,
    overlap: Annotated[float, typer.Option(help="share of a tile that its neighbours share at least")] = 0.25,
    precision: ComputesIn = "fp32",
    seed: Annotated[int, typer.Option(help="what the noise is a function of")] = 0,
) -> None:
    """A picture made larger by a super-resolution checkpoint, in overlapping tiles."""
    from PIL import Image

    from isocost.sampling.upscale import upscale as enlarge

    if out.suffix.lower() != ".png":
        raise RequestError(f"{out}: give a file that ends in .png")
    spec = _sampler(sampler, spacing, eta)
    done = enlarge(
        checkpoint,
        picture,
        caption=caption,
        sampler=spec,
        num_steps=steps,
        guidance=guidance,
        overlap=overlap,
        seed=seed,
        precision=precision,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(done.picture).save(out)
    height, width, _ = done.picture.shape
    cost = {"nfe_per_tile": done.nfe, "gflop": done.gflop, "seconds": done.seconds}
    answer_json({"file": str(out), "height": height, "width": width, "num_tiles": done.num_tiles, **cost})


def _sampler(name: str | None, spacing: str, eta: float) -> SamplerSpec | None:
    """What is asked for; None where nothing is, which takes the checkpoint's own."""
    if name is None and (spacing, eta) == ("trailing", 0.0):
        return None
    return parse_spec(SamplerSpec, {"name": name or "ddim", "spacing": spacing, "eta": eta}, "--sampler")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    folder: Annotated[Path, typer.Argument(help="a new folder")],
) -> None:
    """A folder that diffusers' pipelines load."""
    from isocost.models.export_diffusers import export as write

    written = write(checkpoint, folder)
    pipeline = json.loads((written / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    answer_json({"folder": str(written), "load": f"{pipeline}.from_pretrained({str(written)!r})"})
