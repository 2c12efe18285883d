"""The command `optimize-timesteps`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from isocost.cli.app import app, print_json
from isocost.cli.options import CHECKPOINT_HELP, Compiled, DType, GuidanceScale, Seed, in_range, read_prompts
from isocost.config.types import NumSamples, NumSteps


@app.command("optimize-timesteps")
def optimize_timesteps(
    checkpoint: Annotated[Path, typer.Argument(help=f"{CHECKPOINT_HELP}, or a diffusers pipeline 'PATH_OR_ID'")],
    num_steps: Annotated[
        list[int], typer.Option("--steps", callback=in_range("--steps", NumSteps), help="number of steps; may be repeated")
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="prompt of the trajectories; may be repeated")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="prompts: .txt with one per line, or .csv with a column prompt")
    ] = None,
    guidance: GuidanceScale = 2.0,
    num_trajectories: Annotated[
        int, typer.Option("--num-trajectories", callback=in_range("--num-trajectories", NumSamples), help="trajectories")
    ] = 64,
    num_teacher_steps: Annotated[
        int,
        typer.Option("--teacher-steps", callback=in_range("--teacher-steps", NumSteps), help="steps of each trajectory"),
    ] = 100,
    seed: Seed = 4_000_000,
    dtype: DType = "fp32",
    compiled: Compiled = False,
) -> None:
    """Find the timesteps that follow a checkpoint's own trajectories best, for every number of steps."""
    from isocost.sampling.sample import Model
    from isocost.sampling.trajectories import check_num_steps, optimize_timesteps

    texts = read_prompts(prompt, prompts)
    check_num_steps(texts, num_steps, num_teacher_steps)
    model = Model(checkpoint, dtype=dtype, compiled=compiled)
    found = optimize_timesteps(
        model,
        texts,
        num_steps,
        guidance=guidance,
        num_trajectories=num_trajectories,
        num_teacher_steps=num_teacher_steps,
        seed=seed,
    )
    lists = {steps: ", ".join(map(str, timesteps)) for steps, timesteps in sorted(found.items())}
    print("solvers:", *(f"  - {{name: ddim, timesteps: [{text}]}}" for text in lists.values()), sep="\n", file=sys.stderr)
    print_json({"checkpoint": model.info.label, "guidance": guidance, "timesteps": {str(key): found[key] for key in lists}})
