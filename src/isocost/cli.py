"""The command line. Progress goes to stderr; the last line on stdout is one JSON document.

Exit status: 0 done (or stopped by --stop-after), 1 the work failed, 2 the request was wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import warnings
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from isocost.errors import RequestError, WorkError
from isocost.spec import parse_spec
from isocost.study import SAMPLER_NAMES, Precision, PretrainedCodecSpec, SamplerSpec, StudySpec
from isocost.study_file import load_study

app = typer.Typer(
    help="Which diffusion model, sampler, steps and guidance give the best pictures for an inference budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Study = Annotated[Path, typer.Argument(help="the study, a YAML file")]
Out = Annotated[Path | None, typer.Option("--out", help="output folder; runs/NAME where absent")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the study: train.lr=2e-4")
]
StopAfter = Annotated[float | None, typer.Option("--stop-after", metavar="HOURS", help="keep what is done and stop")]


@app.command()
def demo(out: Out = None, overrides: Set = None, stop_after: StopAfter = None) -> None:
    """The embedded study, pictures to report, minutes on two cores."""
    with resources.as_file(resources.files("isocost.assets") / "demo.yaml") as file:
        _run(_load(file, overrides), out, stop_after)


@app.command()
def run(
    study: Study,
    out: Out = None,
    overrides: Set = None,
    stop_after: StopAfter = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be trained and sampled, and stop")] = False,
) -> None:
    """Train, sweep, score and report a study. The same command goes on where an earlier one stopped."""
    spec = _load(study, overrides)
    if dry_run:
        from isocost.pipeline import Pipeline

        _answer(Pipeline(spec, _out(spec, out)).plan())
        return
    _run(spec, out, stop_after)


@app.command()
def codec(study: Study, out: Out = None, overrides: Set = None) -> None:
    """Train (or fit) a study's codec, and measure it on held-out pictures beside the linear one of the same latent shape."""
    from isocost.pipeline import Pipeline

    spec = _load(study, overrides)
    pipeline = Pipeline(spec, _out(spec, out))
    pipeline.prepare()
    told = pipeline.materials.codec_report()
    trained = not isinstance(spec.codec, PretrainedCodecSpec)
    folder = pipeline.store.folder("codec", told["digest"]) if trained else Path(spec.codec.path)  # type: ignore[union-attr]
    _answer({"study": spec.name, "folder": str(folder), **told})


@app.command()
def train(
    study: Study,
    out: Out = None,
    overrides: Set = None,
    stop_after: StopAfter = None,
    forecast: Annotated[bool, typer.Option("--forecast", help="say hours, memory and disk of each size, and stop")] = False,
) -> None:
    """Train the family of a study; under torchrun or `accelerate launch` by several processes."""
    from isocost.pipeline import Pipeline
    from isocost.train.loop import OutOfTime

    spec = _load(study, overrides)
    pipeline = Pipeline(spec, _out(spec, out))
    if forecast:
        _answer({"study": spec.name, "sizes": [dataclasses.asdict(one) for one in pipeline.forecast()]})
        return
    finished = True
    try:
        for one in pipeline.runs:
            pipeline.train(one, _deadline(stop_after))
    except OutOfTime as stopped:
        print(stopped, file=sys.stderr)
        finished = False
    checkpoints = {
        f"{one.model.width}@{mark}": str(pipeline.store.folder("checkpoint", name))
        for one in pipeline.runs
        for mark, name in one.checkpoints.items()
        if pipeline.store.has("checkpoint", name)
    }
    _answer({"study": spec.name, "finished": finished, "checkpoints": checkpoints})


@app.command()
def sweep(study: Study, out: Out = None, overrides: Set = None, stop_after: StopAfter = None) -> None:
    """Sample and score every point of a study whose checkpoints are there."""
    from isocost.pipeline import Pipeline

    spec = _load(study, overrides)
    pipeline = Pipeline(spec, _out(spec, out))
    deadline = _deadline(stop_after)
    finished = all(pipeline.sweep(one, deadline) for one in pipeline.runs)
    _answer({"study": spec.name, "finished": finished, "ledger": str(pipeline.out / "ledger.sqlite")})


@app.command()
def report(study: Study, out: Out = None, overrides: Set = None) -> None:
    """Write the report of what the ledger holds."""
    from isocost.pipeline import Pipeline

    spec = _load(study, overrides)
    _report(Pipeline(spec, _out(spec, out)), finished=True)


@app.command()
def family(
    widths: Annotated[str, typer.Option(help="widths c, or the paper's names: 64,96 or 39M,83M")] = "",
    context: Annotated[int, typer.Option(help="width of the caption states")] = 1024,
    latent: Annotated[str, typer.Option(help="latent shape, channels x side")] = "4x64",
    tokens: Annotated[int, typer.Option(help="caption tokens")] = 77,
    as_json: Annotated[bool, typer.Option("--json", help="no table, the JSON line alone")] = False,
) -> None:
    """Sizes: parameters, GFLOP per forward pass, normalised cost, and the paper's figures beside."""
    from isocost.models.cost import family_table
    from isocost.models.paper import TABLE_1
    from isocost.models.unet import width_of
    from isocost.study import ModelSpec

    try:
        channels, side = (int(part) for part in latent.lower().split("x"))
    except ValueError as error:
        raise RequestError(f"--latent {latent}: give channels x side, such as 4x64") from error
    names = [part.strip() for part in widths.split(",") if part.strip()]
    chosen = [int(name) if name.isdigit() else width_of(name) for name in names] or [row.width for row in TABLE_1]
    spec = ModelSpec(width=chosen[0], latent_channels=channels, latent_side=side, context_width=context)
    rows = family_table(chosen, spec, tokens)
    reference = f"normalised cost 1 is c = 320 at latent {channels}x{side}x{side}, {tokens} tokens, context {context}"
    if not as_json:
        _print_family(rows, reference)
    _answer({"family": rows, "reference": reference})


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint folder: OUT/artefacts/checkpoint/DIGEST")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="a caption; may be given several times")],
    steps: Annotated[int, typer.Option(help="solver steps")] = 16,
    guidance: Annotated[float, typer.Option(help="w in uncond + w (cond - uncond); 1 is one pass")] = 2.0,
    sampler: Annotated[str, typer.Option(help=", ".join(SAMPLER_NAMES))] = "ddim",
    spacing: Annotated[str, typer.Option(help="trailing, leading, linspace or karras")] = "trailing",
    eta: Annotated[float, typer.Option(help="DDIM's share of ancestral noise")] = 0.0,
    negative: Annotated[str | None, typer.Option(help="a caption to lead away from, in place of the empty one")] = None,
    precision: Annotated[Precision, typer.Option(help="what the network computes in")] = "fp32",
    num: Annotated[int, typer.Option("--num", help="pictures of each prompt")] = 4,
    seed: Annotated[int, typer.Option(help="what the noise is a function of, with the picture's number")] = 0,
    out: Annotated[Path, typer.Option("--out", help="folder for the PNGs and sheet.png")] = Path("samples"),
) -> None:
    """Pictures from one checkpoint."""
    from PIL import Image

    from isocost.sampling import sample as draw

    spec = parse_spec(SamplerSpec, {"name": sampler, "spacing": spacing, "eta": eta}, "--sampler")
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
    _answer({"prompts": list(drawn.prompts), "files": files, "sheet": str(out / "sheet.png"), **cost})


Protocol = Annotated[str, typer.Option("--protocol", help="coco30k-fid-clip, aerial-fd, kernel-efficientnet-64, ...")]
Captions = Annotated[
    str | None, typer.Option("--captions", help="the protocol's captions: a .csv, tar shards, DreamBooth's .txt")
]
Weights = Annotated[
    list[str] | None, typer.Option("--weights", metavar="NAME=PLACE", help="where weights lie: inception=FILE, lpips=FILE")
]


@app.command()
def score(
    pictures: Annotated[str, typer.Argument(help="a folder of pictures, or uint8 [N, H, W, 3] in a .npz or .npy")],
    reference: Annotated[
        str, typer.Option("--reference", help="a folder of real pictures, tar shards, hub:NAME, or statistics made once")
    ],
    protocol: Protocol,
    captions: Captions = None,
    weights: Weights = None,
) -> None:
    """Scores of any pictures against a reference under a named protocol, with intervals."""
    from isocost.score.folders import score_folder

    scored = score_folder(pictures, reference, protocol, captions=captions, weights=_places(weights))
    for note in scored.notes:
        print(note, file=sys.stderr)
    _answer(dataclasses.asdict(scored))


@app.command()
def reference(
    pictures: Annotated[str, typer.Argument(help="a folder of real pictures, tar shards, or hub:NAME:SPLIT")],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    protocol: Protocol,
    captions: Captions = None,
    weights: Weights = None,
) -> None:
    """Statistics of a reference, made once, for `score --reference`."""
    from isocost.score.folders import make_reference

    taken = make_reference(pictures, out, protocol, captions=captions, weights=_places(weights))
    _answer({"folder": str(out), "protocol": protocol, "num_pictures": len(taken), "content": taken.content})


@app.command()
def verify(
    inception: Annotated[
        str | None, typer.Option("--inception", help="FID's Inception weights: checks the way from pictures")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="no table, the JSON line alone")] = False,
) -> None:
    """The metrics against known anchors; exit status 1 where one fails."""
    from isocost.score.verify import anchors

    rows = [dataclasses.asdict(anchor) | {"passed": anchor.passed} for anchor in anchors(inception)]
    if not as_json:
        _print_anchors(rows)
    _answer({"passed": all(row["passed"] for row in rows), "anchors": rows})
    failed = [row["what"] for row in rows if not row["passed"]]
    if failed:
        raise WorkError(f"{len(failed)} of {len(rows)} anchors failed; the first is {failed[0]}")


@app.command()
def recommend(
    out: Annotated[Path, typer.Argument(help="the output folder of a study")],
    budget_ms: Annotated[float | None, typer.Option("--budget-ms", help="milliseconds per picture")] = None,
    budget_gflop: Annotated[float | None, typer.Option("--budget-gflop", help="GFLOP per picture")] = None,
    budget_nfe: Annotated[float | None, typer.Option("--budget-nfe", help="network evaluations per picture")] = None,
    budget_paper_cost: Annotated[float | None, typer.Option("--budget-paper-cost", help="normalised cost x steps")] = None,
    metric: Annotated[str, typer.Option(help="the score to go by")] = "kernel_efficientnet",
) -> None:
    """The best size, sampler, steps and guidance within a budget."""
    from isocost.analysis.recommend import recommend as choose
    from isocost.sweep.ledger import read_table

    budgets = {
        "ms_per_picture": budget_ms,
        "gflop": budget_gflop,
        "nfe": budget_nfe,
        "paper_cost": budget_paper_cost,
    }
    given = {cost: budget for cost, budget in budgets.items() if budget is not None}
    if len(given) != 1:
        raise RequestError("give one budget: --budget-ms, --budget-gflop, --budget-nfe or --budget-paper-cost")
    ((cost, budget),) = given.items()
    chosen = choose(read_table(out), cost, budget, metric, str(out))
    for line in (chosen.reason, *(f"note: {note}" for note in chosen.notes), chosen.command):
        print(line, file=sys.stderr)
    _answer(dataclasses.asdict(chosen))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint folder")],
    folder: Annotated[Path, typer.Argument(help="a new folder")],
) -> None:
    """A folder that diffusers' StableDiffusionPipeline loads."""
    from isocost.exporting import export as write

    written = write(checkpoint, folder)
    _answer({"folder": str(written), "load": f"StableDiffusionPipeline.from_pretrained({str(written)!r})"})


def main() -> None:
    """Entry point: turns mistakes into one line and an exit status."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        app(standalone_mode=True)
    except RequestError as error:
        print(f"isocost: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkError as error:
        print(f"isocost: {error}", file=sys.stderr)
        sys.exit(1)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _load(study: Path, overrides: list[str] | None) -> StudySpec:
    values: dict[str, Any] = {}
    for item in overrides or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise RequestError(f"--set {item}: give KEY=VALUE, such as train.num_images=5000")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RequestError(f"--set {item}: the value is not YAML") from error
    return load_study(study, values)


def _out(study: StudySpec, out: Path | None) -> Path:
    return out if out is not None else Path("runs") / study.name


def _deadline(stop_after: float | None) -> float | None:
    if stop_after is None:
        return None
    if stop_after <= 0:
        raise RequestError(f"--stop-after {stop_after:g}: give hours, more than 0")
    return time.monotonic() + 3600 * stop_after


def _run(study: StudySpec, out: Path | None, stop_after: float | None) -> None:
    from isocost.pipeline import Pipeline

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError("several processes train together: `isocost train` under torchrun, then `isocost run` without it")
    pipeline = Pipeline(study, _out(study, out))
    finished = pipeline.run(_deadline(stop_after))
    if finished:
        _report(pipeline, finished)
    else:
        _answer({"study": study.name, "out": str(pipeline.out), "finished": False})


def _report(pipeline: Any, finished: bool) -> None:
    from isocost.analysis.recommend import answer
    from isocost.report.gather import report as write

    written = write(pipeline)
    for choice in written.choices:
        print(answer(choice), file=sys.stderr)
    best = [
        {
            "budget": choice.budget,
            "cost": choice.cost,
            "metric": choice.metric,
            "best": None if choice.best is None else dataclasses.asdict(choice.best),
            "undecided": choice.undecided,
        }
        for choice in written.choices
    ]
    _answer(
        {
            "study": pipeline.study.name,
            "out": str(pipeline.out),
            "finished": finished,
            "report": str(written.page),
            "num_points": len(written.table),
            "best_at_budgets": best,
        }
    )


def _places(weights: list[str] | None) -> dict[str, str]:
    places = {}
    for item in weights or []:
        name, equals, place = item.partition("=")
        if not equals or not name or not place:
            raise RequestError(
                f"--weights {item}: give NAME=PLACE, such as inception=weights-inception-2015-12-05-6726825d.pth"
            )
        places[name] = place
    return places


def _print_anchors(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for title in ("", "anchor", "found", "expected", "within", "source"):
        table.add_column(title, justify="right" if title in ("found", "expected", "within") else "left", no_wrap=True)
    for row in rows:
        numbers = (f"{row['found']:.6g}", f"{row['expected']:.6g}", f"{row['tolerance']:.0e}")
        table.add_row("pass" if row["passed"] else "FAIL", row["what"], *numbers, row["source"])
    Console(stderr=True, width=150).print(table)


def _print_family(rows: list[dict[str, Any]], reference: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption_justify="left")
    for title in ("size", "c", "M param.", "GFLOP", "cost", "paper GFLOP", "paper cost"):
        table.add_column(title, justify="left" if title == "size" else "right")
    for row in rows:
        *cells, note = row.values()
        table.add_row(*("" if value is None else str(value) for value in cells))
        reference += f"\n{row['size']}: {note}" if note else ""
    table.caption = reference
    Console(stderr=True).print(table)


def _answer(value: Any) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)
