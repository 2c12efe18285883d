"""Options and arguments that several commands share, and the functions that read them."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import Field, TypeAdapter, ValidationError

from isocost.config.base import parse_spec
from isocost.config.sampling import SolverSpec, VaeSpec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import load_study, parse_override
from isocost.config.types import (
    DTypeName,
    Guidance,
    NumSamples,
    SweepBatch,
    TaskName,
)
from isocost.config.types import NumSteps as SolverSteps
from isocost.config.types import Seed as SeedValue
from isocost.errors import ConfigError


def in_range(option: str, bounds: Any) -> Callable[[Any], Any]:
    """A callback of an option that checks its value, or each of its values, before the command reads anything.

    Args:
        option: its name, for the message.
        bounds: a type with bounds, as in a study: `Annotated[int, Field(ge=1)]`.
    """
    adapter = TypeAdapter(Annotated[bounds, Field(allow_inf_nan=False)] if _is_float(bounds) else bounds)

    def check(value: Any) -> Any:
        for number in value if isinstance(value, list | tuple) else (value,):
            try:
                if number is not None:
                    adapter.validate_python(number)
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Input ")
                raise ConfigError(f"{option} {number}: it {reason}") from error
        return value

    return check


def _is_float(bounds: Any) -> bool:
    return float in (bounds, *get_args(bounds))


Positive = Annotated[float, Field(gt=0)]
Repeats = Annotated[int, Field(ge=3, le=10**6)]
Utilisation = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# --- studies ---

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study")]
OutputDir = Annotated[Path | None, typer.Option("--out", help="output folder; default: runs/NAME with the name of the study")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the study, such as train.lr=2e-4")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="only this task, such as text2image or superres; may be repeated")
]
Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        help="results database in place of OUT/results.sqlite: postgresql://USER@HOST/NAME; all runs on it share the work",
    ),
]
StopAfter = Annotated[
    float | None, typer.Option("--stop-after", metavar="HOURS", help="stop after this time and save all progress")
]
Figures = Annotated[bool, typer.Option(help="also save every figure as PNG; the report is faster without them")]
Pdf = Annotated[bool, typer.Option("--pdf", help="also save every figure as PDF, for print; the report then takes longer")]

# --- sampling ---

CHECKPOINT_HELP = "checkpoint folder OUT/artefacts/checkpoint/DIGEST"
GUIDANCE_HELP = "guidance scale w in uncond + w (cond - uncond); 1 takes one network pass"
NumSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", callback=in_range("--steps", SolverSteps), help="solver steps; default: 16, or 4 for a few-step student"
    ),
]
SolverName = Annotated[
    str | None,
    typer.Option(
        "--solver",
        help="a name from `isocost list solvers`; own: the checkpoint's solver (default); nearest: the solver nearest to it",
    ),
]
TimestepSpacing = Annotated[
    str, typer.Option("--timestep-spacing", help="trailing, leading, linspace, karras, exponential or beta")
]
TimestepList = Annotated[
    str | None,
    typer.Option("--timesteps", help="the timesteps themselves in place of a spacing and --steps, such as 999,666,333"),
]
Eta = Annotated[float, typer.Option("--eta", help="ddim: fraction of ancestral noise, from 0 to 1")]
StepsOffset = Annotated[int, typer.Option("--steps-offset", help="added to the timesteps of leading spacing")]
Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="compile the network; takes minutes once per machine")]
DType = Annotated[DTypeName, typer.Option("--dtype", help="data type of the network")]
Seed = Annotated[int, typer.Option("--seed", callback=in_range("--seed", SeedValue), help="random seed, from 0")]
GuidanceScale = Annotated[float, typer.Option("--guidance", callback=in_range("--guidance", Guidance), help=GUIDANCE_HELP)]
NumImages = Annotated[
    int, typer.Option("--num-images", callback=in_range("--num-images", NumSamples), help="images per prompt")
]
Overlap = Annotated[
    float,
    typer.Option(
        "--overlap", callback=in_range("--overlap", Fraction), help="minimum overlap of tiles, as a fraction of the tile"
    ),
]
Guide = Annotated[
    Path | None,
    typer.Option(
        "--guide",
        help="checkpoint of a smaller or less trained network that guides this one, in place of the empty prompt",
    ),
]
GuideNullPrompt = Annotated[bool, typer.Option("--guide-null-prompt", help="the guide gets the empty prompt")]
IntervalText = Annotated[
    str | None,
    typer.Option("--guidance-interval", help="noise levels with guidance, LOW:HIGH in log-SNR; an empty end is open"),
]
ScheduleText = Annotated[
    str | None,
    typer.Option(
        "--guidance-schedule", help="guidance by noise level in place of --guidance: LOGSNR:GUIDANCE,LOGSNR:GUIDANCE,..."
    ),
]
OptionalGuidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        callback=in_range("--guidance", Guidance),
        help="guidance scale; 1 takes one network pass; default: 2, or 1 for super-resolution",
    ),
]
Batches = Annotated[
    list[int] | None,
    typer.Option("--batch", callback=in_range("--batch", SweepBatch), help="batch size; may be repeated; default: 1 and 4"),
]
NumRepeats = Annotated[
    int,
    typer.Option("--repeats", callback=in_range("--repeats", Repeats), help="measured passes of each batch size, 3 or more"),
]
VaeDType = Annotated[DTypeName, typer.Option("--vae-dtype", help="data type of the autoencoder")]
VaeTileSize = Annotated[
    int | None,
    typer.Option(
        "--vae-tile-size",
        metavar="PIXELS",
        help="decode in overlapping tiles (VAE tiling): less memory, other pixels at the seams; a multiple of 64, such as 512",
    ),
]
VaeSlicing = Annotated[
    bool, typer.Option("--vae-slicing", help="decode one image at a time (VAE slicing); from 91 pixels on this is always so")
]


def read_study(file: Path, overrides: list[str] | None) -> StudySpec:
    """Load a study with the values of --set.

    Raises:
        ConfigError: the study is wrong, or an item of --set is not KEY=VALUE.
    """
    values: dict[str, Any] = {}
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: give KEY=VALUE, such as train.num_images=5000")
        values[key] = parse_override(key, value)
    return load_study(file, values)


def output_dir_of(study: StudySpec, out: Path | None) -> Path:
    """The output folder of --out, or the default one of the study."""
    return out if out is not None else Path("runs") / study.name


def parse_deadline(stop_after: float | None) -> float | None:
    """The `time.monotonic()` of --stop-after.

    Raises:
        ConfigError: the hours are not positive.
    """
    if stop_after is None:
        return None
    if not (math.isfinite(stop_after) and stop_after > 0):
        raise ConfigError(f"--stop-after {stop_after:g}: give hours, more than 0")
    return time.monotonic() + 3600 * stop_after


def parse_tasks(tasks: list[str] | None) -> tuple[TaskName, ...] | None:
    """The tasks of --task in the order of a study; None if the option is absent.

    Raises:
        ConfigError: a task is unknown.
    """
    names: tuple[TaskName, ...] = get_args(TaskName)
    for task in tasks or ():
        if task not in names:
            raise ConfigError(f"--task {task}: give one of {', '.join(names)}")
    return tuple(name for name in names if name in tasks) if tasks else None


def parse_interval(text: str | None) -> tuple[float | None, float | None] | None:
    """Read LOW:HIGH in log-SNR; an empty end is open. Without the option it is None.

    Raises:
        ConfigError: there are not two ends, or one is no number.
    """
    if text is None:
        return None
    low, separator, high = text.partition(":")
    if not separator:
        raise ConfigError(f"--guidance-interval {text}: give LOW:HIGH in log-SNR, such as -3:2, or -3: for an open end")
    ends = [_finite(end, f"--guidance-interval {text}") if end.strip() else None for end in (low, high)]
    return ends[0], ends[1]


def parse_guidance_schedule(text: str | None) -> tuple[tuple[float, float], ...] | None:
    """Read LOGSNR:GUIDANCE,LOGSNR:GUIDANCE,... Without the option it is None.

    Raises:
        ConfigError: a point is not a pair of numbers.
    """
    if text is None:
        return None
    where = f"--guidance-schedule {text}"
    points = [point.split(":") for point in text.split(",")]
    if any(len(point) != 2 for point in points):
        raise ConfigError(f"{where}: give points LOGSNR:GUIDANCE, separated by commas, such as -4:1,0:3")
    return tuple((_finite(level, where), _finite(weight, where)) for level, weight in points)


def _finite(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is not a number") from error
    if not math.isfinite(number):
        raise ConfigError(f"{where}: {text!r} is not finite; leave an open end of an interval empty")
    return number


def parse_solver(
    name: str | None,
    timestep_spacing: str = "trailing",
    eta: float = 0.0,
    steps_offset: int = 1,
    timesteps: str | None = None,
) -> SolverSpec | None:
    """Return the solver that --solver, --timestep-spacing, --eta, --steps-offset and --timesteps describe.

    None if all have their default values: then the checkpoint's default solver is used.

    Raises:
        ConfigError: the solver is unknown or does not take an option.
    """
    if name is None and (timestep_spacing, eta, steps_offset, timesteps) == ("trailing", 0.0, 1, None):
        return None
    fields: dict[str, Any] = {"timestep_spacing": timestep_spacing, "eta": eta, "steps_offset": steps_offset}
    if timesteps is not None:
        if not all(part.strip().isdecimal() for part in timesteps.split(",")):
            raise ConfigError(f"--timesteps {timesteps}: give falling whole numbers, such as 999,666,333")
        fields["timesteps"] = [int(part) for part in timesteps.split(",")]
    return parse_spec(SolverSpec, {"name": name or "ddim", **fields}, "--solver")


def parse_vae(dtype: str, tile_size: int | None, slicing: bool) -> VaeSpec:
    """The settings of --vae-dtype, --vae-tile-size and --vae-slicing.

    Raises:
        ConfigError: the tile size is not a positive multiple of 64.
    """
    return parse_spec(VaeSpec, {"dtype": dtype, "tile_size": tile_size, "slicing": slicing}, "--vae-dtype, --vae-tile-size")


def read_prompts(texts: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of --prompt and --prompts: lines of a .txt file, or the column `prompt` of a .csv file.

    Raises:
        ConfigError: both are given, or the file cannot be read, has no prompts, or has an empty one.
    """
    if file is None:
        return texts or []
    if texts:
        raise ConfigError("give --prompt or --prompts, not both")
    if not file.is_file():
        raise ConfigError(f"--prompts {file}: no such file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {file}: is not UTF-8 text; save it as UTF-8") from error
    if file.suffix.lower() == ".csv":
        found = _prompt_column(file, text)
    elif file.suffix.lower() == ".txt":
        found = [line for line in map(str.strip, text.split("\n")) if line]
    else:
        raise ConfigError(f"--prompts {file}: give a .txt file with one prompt per line, or a .csv file with a column prompt")
    if not found:
        raise ConfigError(f"--prompts {file}: has no prompts; write one per line")
    return found


def _prompt_column(file: Path, text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if "prompt" not in (rows.fieldnames or ()):
            raise ConfigError(f"--prompts {file}: has no column prompt; add a header line with this name")
        found = [(rows.line_num, (row["prompt"] or "").strip()) for row in rows]
    except csv.Error as error:
        raise ConfigError(f"--prompts {file}: line {rows.line_num}: {error}") from error
    if empty := [line for line, prompt in found if not prompt]:
        raise ConfigError(f"--prompts {file}: line {empty[0]} has an empty prompt; fill it in or remove the line")
    return [prompt for _, prompt in found]
