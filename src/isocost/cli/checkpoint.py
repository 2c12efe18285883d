"""Commands on a checkpoint: `sample`, `upscale`, `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isocost.cli.app import app, print_json
from isocost.config.base import parse_spec
from isocost.config.sampling import SolverSpec
from isocost.config.types import DTypeName
from isocost.errors import ConfigError

Steps = Annotated[int | None, typer.Option(help="solver steps; 16 where absent, 4 for a few-step student")]
Solver = Annotated[str | None, typer.Option(help="a name of `isocost list solvers`; default: the checkpoint's own")]
Spacing = Annotated[str, typer.Option(help="trailing, leading, linspace or karras")]
Eta = Annotated[float, typer.Option(help="DDIM's share of ancestral noise")]
ComputesIn = Annotated[DTypeName, typer.Option(help="what the network computes in")]


@app.command()
def sample(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="a checkpoint folder: OUT/artefacts/checkpoint/DIGEST; or a pipeline, 'PATH_OR_ID + LORA:SCALE'"),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", help="a caption; may be given several times")],
    steps: Steps = None,
    guidance: Annotated[float, typer.Option(help="w in uncond + w (cond - uncond); 1 is one pass")] = 2.0,
    solver: Solver = None,
    timestep_spacing: Spacing = "trailing",
    eta: Eta = 0.0,
    negative_prompt: Annotated[str | None, typer.Option(help="a caption to lead away from, in place of the empty one")] = None,
    dtype: ComputesIn = "fp32",
    num_images: Annotated[int, typer.Option("--num-images", help="images of each prompt")] = 4,
    seed: Annotated[int, typer.Option(help="what the noise is a function of, with the image's number")] = 0,
    out: Annotated[Path, typer.Option("--out", help="folder for the PNGs and sheet.png")] = Path("samples"),
) -> None:
    """Images from one checkpoint."""
    from PIL import Image

    from isocost.sampling.sample import sample as draw

    spec = _solver(solver, timestep_spacing, eta)
    drawn = draw(
        checkpoint,
        prompt,
        solver=spec,
        num_steps=steps,
        guidance=guidance,
        num_images=num_images,
        seed=seed,
        negative_prompt=negative_prompt,
        dtype=dtype,
    )
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for p, images in enumerate(drawn.images):
        for k, image in enumerate(images):
            files.append(str(out / f"{p:02d}-{k:02d}.png"))
            Image.fromarray(image).save(files[-1])
    drawn.sheet().save(out / "sheet.png")
    cost = {"nfe": drawn.nfe, "gflop_per_image": drawn.gflop, "seconds": drawn.seconds}
    print_json({"prompts": list(drawn.prompts), "files": files, "sheet": str(out / "sheet.png"), **cost})


@app.command()
def upscale(
    checkpoint: Annotated[Path, typer.Argument(help="a super-resolution checkpoint: OUT/artefacts/checkpoint/DIGEST")],
    image: Annotated[Path, typer.Argument(help="an image of any size")],
    out: Annotated[Path, typer.Argument(help="the file to write, .png")],
    steps: Steps = None,
    prompt: Annotated[str, typer.Option(help="for checkpoints that were tuned with captions")] = "",
    guidance: Annotated[float, typer.Option(help="1 is one pass")] = 1.0,
    solver: Solver = None,
    timestep_spacing: Spacing = "trailing",
    eta: Eta = 0.0,
    overlap: Annotated[float, typer.Option(help="share of a tile that its neighbours share at least")] = 0.25,
    dtype: ComputesIn = "fp32",
    seed: Annotated[int, typer.Option(help="what the noise is a function of")] = 0,
) -> None:
    """An image made larger by a super-resolution checkpoint, in overlapping tiles."""
    from PIL import Image

    from isocost.sampling.upscale import upscale as enlarge

    if out.suffix.lower() != ".png":
        raise ConfigError(f"{out}: give a file that ends in .png")
    spec = _solver(solver, timestep_spacing, eta)
    done = enlarge(
        checkpoint,
        image,
        prompt=prompt,
        solver=spec,
        num_steps=steps,
        guidance=guidance,
        overlap=overlap,
        seed=seed,
        dtype=dtype,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(done.image).save(out)
    height, width, _ = done.image.shape
    cost = {"nfe_per_tile": done.nfe, "gflop": done.gflop, "seconds": done.seconds}
    print_json({"file": str(out), "height": height, "width": width, "num_tiles": done.num_tiles, **cost})


def _solver(name: str | None, timestep_spacing: str, eta: float) -> SolverSpec | None:
    """What is asked for; None where nothing is, which takes the checkpoint's own."""
    if name is None and (timestep_spacing, eta) == ("trailing", 0.0):
        return None
    return parse_spec(SolverSpec, {"name": name or "ddim", "timestep_spacing": timestep_spacing, "eta": eta}, "--solver")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    folder: Annotated[Path, typer.Argument(help="a new folder")],
) -> None:
    """A folder that diffusers' pipelines load."""
    from isocost.models.export_diffusers import export as write

    written = write(checkpoint, folder)
    pipeline = json.loads((written / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    print_json({"folder": str(written), "load": f"{pipeline}.from_pretrained({str(written)!r})"})
