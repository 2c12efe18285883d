"""The command `recommend`: the best configuration within budgets."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from isocost.cli.app import app, print_json
from isocost.cli.options import Positive, in_range
from isocost.errors import ConfigError


@app.command()
def recommend(
    context: typer.Context,
    out: Annotated[Path | None, typer.Argument(help="output folder of a study; not needed with --database")] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(
            "--budget-ms",
            callback=in_range("--budget-ms", Positive),
            help="maximum milliseconds per image, by throughput at full batches",
        ),
    ] = None,
    budget_latency_ms: Annotated[
        float | None,
        typer.Option(
            "--budget-latency-ms",
            callback=in_range("--budget-latency-ms", Positive),
            help="maximum milliseconds of one image alone, measured by `isocost remeasure`",
        ),
    ] = None,
    budget_gflop: Annotated[
        float | None,
        typer.Option(
            "--budget-gflop",
            callback=in_range("--budget-gflop", Positive),
            help="maximum GFLOP per image: prompt, all passes and decoder",
        ),
    ] = None,
    budget_gflop_denoiser: Annotated[
        float | None,
        typer.Option(
            "--budget-gflop-denoiser",
            callback=in_range("--budget-gflop-denoiser", Positive),
            help="maximum GFLOP per image of all passes of the denoiser",
        ),
    ] = None,
    budget_nfe: Annotated[
        float | None,
        typer.Option("--budget-nfe", callback=in_range("--budget-nfe", Positive), help="maximum network evaluations per image"),
    ] = None,
    budget_normalized_cost: Annotated[
        float | None,
        typer.Option(
            "--budget-normalized-cost",
            callback=in_range("--budget-normalized-cost", Positive),
            help="maximum normalized cost x steps",
        ),
    ] = None,
    budget_joules: Annotated[
        float | None,
        typer.Option(
            "--budget-joules",
            callback=in_range("--budget-joules", Positive),
            help="maximum energy per image in J, measured by `isocost remeasure` on a GPU",
        ),
    ] = None,
    budget_usd: Annotated[
        float | None,
        typer.Option(
            "--budget-usd",
            callback=in_range("--budget-usd", Positive),
            help="maximum US dollars per 1,000 images",
        ),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            "--prices",
            help=(
                "YAML file with US dollars per hour of each device; default: the prices of the report, else the "
                "list that comes with isocost (`shipped`)"
            ),
        ),
    ] = None,
    images_per_hour: Annotated[
        float | None,
        typer.Option(
            "--images-per-hour", callback=in_range("--images-per-hour", Positive), help="minimum number of images per hour"
        ),
    ] = None,
    budget_memory_gib: Annotated[
        float | None,
        typer.Option(
            "--budget-memory-gib",
            callback=in_range("--budget-memory-gib", Positive),
            help="maximum peak device memory in GiB; give a second budget too, such as --budget-ms",
        ),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="metric to optimise; default: that of the report")] = None,
    requirements: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="METRIC>=VALUE",
            help=(
                'score that a point must reach, in quotes: "alignment>=0.9", or "fid<=20" where lower is better; '
                "may be repeated"
            ),
        ),
    ] = None,
    front: Annotated[
        str | None,
        typer.Option(
            "--front",
            metavar="METRIC",
            help=(
                "also list the Pareto front of --metric and METRIC within the first budget; other budgets and "
                "--require do not apply to it"
            ),
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(help="text2image, seed-replicates, superres, dreambooth, distill or superres-distill")
    ] = "text2image",
    results_db: Annotated[
        str | None,
        typer.Option("--database", help="read the points of a results database (file or URL) in place of the table of OUT"),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="with --database: id of a protocol; needed if the database has several")
    ] = None,
) -> None:
    """Recommend the best size, solver, steps and guidance within all given budgets. The first budget breaks ties."""
    from isocost.analysis.costs import COSTS
    from isocost.analysis.formatting import format_metric
    from isocost.analysis.metric_front import format_front, metric_front
    from isocost.analysis.prices import with_usd
    from isocost.analysis.recommend import recommend as recommend_configuration
    from isocost.analysis.results_table import CONFIGURATION_COLUMNS, leading_metric, report_metric
    from isocost.analysis.timings import TIME_LABELS, format_excluded_timings

    given = {
        "ms": budget_ms,
        "latency_ms": budget_latency_ms,
        "gflop": budget_gflop,
        "gflop_denoiser": budget_gflop_denoiser,
        "joules": budget_joules,
        "usd": budget_usd,
        "nfe": budget_nfe,
        "normalized_cost": budget_normalized_cost,
    }
    budgets = {
        **{f"budget_{cost.keyword}": (cost.name, given[cost.keyword]) for cost in COSTS.values()},
        "images_per_hour": ("images_per_hour", images_per_hour),
        "budget_memory_gib": ("memory_gib", budget_memory_gib),
    }
    ordered = [budgets[name] for name in context.params if name in budgets]  # in the order of the command line
    limits = {cost: value for cost, value in ordered if value is not None}
    costs = [cost for cost in limits if cost != "memory_gib"]
    if not costs:
        kind = " other than --budget-memory-gib" if limits else ""
        options = [f"--budget-{cost.keyword.replace('_', '-')}" for cost in COSTS.values()]
        known = f"{', '.join(options)} or --images-per-hour"
        raise ConfigError(f"give a budget{kind}: {known}")
    lead = costs[0]
    also = {cost: value for cost, value in limits.items() if cost != lead}
    table = _read_points(out, results_db, task, protocol)
    if metric is None:
        metric = leading_metric(table) if out is None or results_db is not None else report_metric(out, table, task)
    if prices is not None and budget_usd is None:
        raise ConfigError("--prices goes with a budget in US dollars: give --budget-usd too, or leave it out")
    if budget_usd is not None:
        table, note = with_usd(table, prices)
        print(f"note: {note}", file=sys.stderr)
    for column, label in TIME_LABELS.items():
        if untimed := format_excluded_timings(table, column):
            print(f"note: {label} {untimed}", file=sys.stderr)
    folder = "OUT" if out is None else str(out)
    requirement_values = _parse_requirements(requirements)
    recommendation = recommend_configuration(
        table,
        lead,
        limits[lead],
        metric,
        folder,
        also=also,
        requirements=requirement_values,
        resamples=_read_resamples(out, results_db, metric, table),
    )
    front_rows = None if front is None else metric_front(table, metric, front, lead, limits[lead])
    for line in (recommendation.reason, *(f"note: {note}" for note in recommendation.notes), recommendation.command):
        print(line, file=sys.stderr)
    answer = dataclasses.asdict(recommendation)
    if front is not None and front_rows is not None:
        print(f"Pareto front of {format_metric(metric)} and {format_metric(front)} within the first budget:", file=sys.stderr)
        for line in format_front(front_rows, metric, front):
            print(line, file=sys.stderr)
        columns = [name for name in ("point", *CONFIGURATION_COLUMNS, *COSTS, metric, front) if name in front_rows]
        answer["front"] = json.loads(front_rows[columns].to_json(orient="records"))
    print_json(answer)


def _read_points(out: Path | None, results_db: str | None, task: str, protocol: str | None) -> Any:
    """The table of a task, from the last report of an output folder or from a results database."""
    from isocost.analysis.results_table import of_task, read_table
    from isocost.sweep.results_db import ResultsDB

    if results_db is None:
        if protocol is not None:
            raise ConfigError("--protocol selects points of a results database: give --database too, or leave it out")
        if out is None:
            raise ConfigError("give the output folder of a study, or --database")
        return read_table(out, task)
    file = Path(results_db.removeprefix("sqlite:///"))
    if ("://" not in results_db or results_db.startswith("sqlite:///")) and not file.is_file():
        raise ConfigError(
            f"--database {results_db}: no such file; give the results.sqlite of an output folder, or the URL of a database"
        )
    return of_task(ResultsDB(results_db, keep_tables=True).table(), task, protocol)


def _read_resamples(out: Path | None, results_db: str | None, metric: str, table: Any) -> Mapping[str, Any]:
    """The bootstrap resamples of the points in a table, from the folder or from the given results database."""
    from isocost.pipeline.resamples import read_resamples
    from isocost.sweep.results_db import ResultsDB

    if results_db is None:
        return {} if out is None else read_resamples(out, metric)
    with ResultsDB(results_db, keep_tables=True) as database:
        return database.resamples_of_metric(metric, table["point"])


def _parse_requirements(items: list[str] | None) -> dict[str, float]:
    from isocost.evaluation.metric_registry import METRICS

    requirements: dict[str, float] = {}
    for item in items or []:
        parts = re.fullmatch(r"(\w+)\s*(>=|<=|=)\s*(.*)", item)
        if parts is None:
            raise ConfigError(
                f'--require {item}: give "METRIC>=VALUE" or "METRIC<=VALUE" in quotes, such as --require "alignment>=0.9"; '
                "without quotes the shell takes > for a redirection"
            )
        metric, sign, value = parts.groups()
        if sign != "=" and metric in METRICS and (sign == ">=") != METRICS[metric].higher_is_better:
            right = ">=" if METRICS[metric].higher_is_better else "<="
            raise ConfigError(f'--require {item}: {METRICS[metric].better} {metric} is better; give "{metric}{right}{value}"')
        if metric in requirements:
            raise ConfigError(f"--require {item}: {metric} already has the requirement {requirements[metric]:g}; give only one")
        try:
            requirements[metric] = float(value)
        except ValueError as error:
            raise ConfigError(f"--require {item}: {value!r} is not a number") from error
    return requirements
