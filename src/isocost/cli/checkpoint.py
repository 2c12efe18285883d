"""Commands on a checkpoint: `sample`, `upscale`, `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isocost.cli.app import app, print_json
from isocost.cli.options import (
    CHECKPOINT_HELP,
    Compiled,
    DType,
    Eta,
    GuidanceScale,
    Guide,
    GuideNullPrompt,
    IntervalText,
    NumImages,
    NumSteps,
    Overlap,
    ScheduleText,
    Seed,
    SolverName,
    StepsOffset,
    TimestepList,
    TimestepSpacing,
    VaeDType,
    VaeSlicing,
    VaeTileSize,
    in_range,
    parse_guidance_schedule,
    parse_interval,
    parse_solver,
    parse_vae,
)
from isocost.config.types import Guidance
from isocost.errors import ConfigError
from isocost.utils.output_paths import check_output_file, check_separate, private_folder


@app.command()
def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help=f"{CHECKPOINT_HELP}, or a diffusers pipeline 'PATH_OR_ID' or 'PATH_OR_ID + LORA:SCALE'")
    ],
    prompts: Annotated[list[str], typer.Option("--prompt", help="prompt; may be repeated")],
    num_steps: NumSteps = None,
    guidance: GuidanceScale = 2.0,
    guide: Guide = None,
    guide_null_prompt: GuideNullPrompt = False,
    guidance_interval: IntervalText = None,
    guidance_schedule: ScheduleText = None,
    solver_name: SolverName = None,
    timestep_spacing: TimestepSpacing = "trailing",
    eta: Eta = 0.0,
    steps_offset: StepsOffset = 1,
    timesteps: TimestepList = None,
    negative_prompt: Annotated[str | None, typer.Option(help="text to guide away from; default: the empty text")] = None,
    dtype: DType = "fp32",
    compiled: Compiled = False,
    vae_dtype: VaeDType = "fp32",
    vae_tile_size: VaeTileSize = None,
    vae_slicing: VaeSlicing = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="load each part for its stage and release it after it: less memory, same images")
    ] = False,
    num_images: NumImages = 4,
    seed: Seed = 0,
    out: Annotated[
        Path,
        typer.Option("--out", help="new folder for the PNG files; a grid of all images is saved next to it, as OUT-sheet.png"),
    ] = Path("samples"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the images of an earlier call in --out")] = False,
) -> None:
    """Sample images from one checkpoint."""
    from isocost.sampling.sample import sample as sample_images
    from isocost.sampling.sample_folder import check_sample_folder, write_sample_folder

    vae = parse_vae(vae_dtype, vae_tile_size, vae_slicing)
    check_sample_folder(out, overwrite)
    if checkpoint.is_dir():
        check_separate(out, checkpoint)
    samples = sample_images(
        checkpoint,
        prompts,
        solver=parse_solver(solver_name, timestep_spacing, eta, steps_offset, timesteps),
        num_steps=num_steps,
        guidance=guidance,
        num_images=num_images,
        seed=seed,
        negative_prompt=negative_prompt,
        guide=guide,
        guide_null_prompt=guide_null_prompt,
        guidance_interval=parse_interval(guidance_interval),
        guidance_schedule=parse_guidance_schedule(guidance_schedule),
        dtype=dtype,
        compiled=compiled,
        vae_dtype=vae.dtype,
        vae_tile_size=vae.tile_size,
        vae_slicing=vae.slicing,
        offload=offload,
    )
    files, sheet = write_sample_folder(out, samples.array)
    cost = {"nfe": samples.nfe, "gflop_per_image": samples.gflop, "seconds": samples.seconds}
    used = {"solver": samples.solver}
    if samples.replaced_scheduler:
        used["replaced_scheduler"] = samples.replaced_scheduler
    print_json({"prompts": list(samples.prompts), "files": list(map(str, files)), "sheet": str(sheet), **used, **cost})


@app.command()
def upscale(
    checkpoint: Annotated[Path, typer.Argument(help=f"super-resolution {CHECKPOINT_HELP}")],
    image: Annotated[Path, typer.Argument(help="image of any size")],
    out: Annotated[Path, typer.Argument(help=".png file to write")],
    num_steps: NumSteps = None,
    prompt: Annotated[str, typer.Option(help="caption of the image, for checkpoints trained with captions")] = "",
    guidance: GuidanceScale = 1.0,
    solver_name: SolverName = None,
    timestep_spacing: TimestepSpacing = "trailing",
    eta: Eta = 0.0,
    steps_offset: StepsOffset = 1,
    timesteps: TimestepList = None,
    overlap: Overlap = 0.25,
    dtype: DType = "fp32",
    compiled: Compiled = False,
    vae_dtype: VaeDType = "fp32",
    vae_tile_size: VaeTileSize = None,
    vae_slicing: VaeSlicing = False,
    seed: Seed = 0,
) -> None:
    """Enlarge an image with a super-resolution checkpoint, in overlapping tiles."""
    from PIL import Image

    from isocost.sampling.upscale import upscale as upscale_image

    check_output_file(out, ".png", inputs=(image,))
    result = upscale_image(
        checkpoint,
        image,
        prompt=prompt,
        solver=parse_solver(solver_name, timestep_spacing, eta, steps_offset, timesteps),
        num_steps=num_steps,
        guidance=guidance,
        overlap=overlap,
        seed=seed,
        dtype=dtype,
        compiled=compiled,
        vae=parse_vae(vae_dtype, vae_tile_size, vae_slicing),
    )
    with private_folder(out) as folder:
        Image.fromarray(result.image).save(folder / out.name, format="PNG")
        (folder / out.name).replace(out)
    height, width, _ = result.image.shape
    cost = {"nfe_per_tile": result.nfe, "gflop": result.gflop, "seconds": result.seconds}
    print_json({"file": str(out), "height": height, "width": width, "num_tiles": result.num_tiles, **cost})


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help=CHECKPOINT_HELP)],
    folder: Annotated[Path, typer.Argument(help="new or empty folder for the diffusers pipeline")],
    guide: Guide = None,
    guide_null_prompt: GuideNullPrompt = False,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            callback=in_range("--guidance", Guidance),
            help="guidance scale in the README of a guide, interval or schedule; default: 2",
        ),
    ] = None,
    guidance_interval: IntervalText = None,
    guidance_schedule: ScheduleText = None,
    num_steps: NumSteps = None,
) -> None:
    """Write a checkpoint, alone or with a guide, as a folder that diffusers pipelines can load."""
    from isocost.models.export_diffusers import export as export_checkpoint
    from isocost.sampling.export_pair import export_pair

    interval, schedule = parse_interval(guidance_interval), parse_guidance_schedule(guidance_schedule)
    readme: dict[str, str] = {}
    if guide is None and interval is None and schedule is None:
        extra = {"--guidance": guidance, "--guide-null-prompt": guide_null_prompt or None, "--steps": num_steps}
        if unused := [option for option, value in extra.items() if value is not None]:
            raise ConfigError(f"{unused[0]}: a pipeline takes it at each call; leave it out, or give --guide or an interval")
        exported = export_checkpoint(checkpoint, folder)
    else:
        exported = export_pair(
            checkpoint,
            folder,
            guide=guide,
            guide_null_prompt=guide_null_prompt,
            guidance=guidance,
            guidance_interval=interval,
            guidance_schedule=schedule,
            num_steps=num_steps,
        )
        readme = {"readme": str(exported / "README.md")}
    pipeline = json.loads((exported / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    print_json({"folder": str(exported), "load": f"{pipeline}.from_pretrained({str(exported)!r})", **readme})
