"""The output of `run --dry-run`: the remaining work of an output folder, or an estimate for named devices."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from isocost.cli.app import print_json
from isocost.config.study import StudySpec
from isocost.errors import ConfigError

if TYPE_CHECKING:
    from isocost.estimate.estimator import SizeEstimate, StudyEstimate

LOG_WIDTH = 132


def print_plan(plan: dict[str, Any]) -> None:
    """Print the totals of a plan and the memory of its checkpoints on stderr, and the plan as JSON."""
    for forecast in plan.get("memory", ()):
        print(forecast["text"], file=sys.stderr)
        if forecast["warning"]:
            print(f"warning: {forecast['warning']}", file=sys.stderr)
    total = plan["total"]
    print(
        f"{total['points']:,} points of {total['images']:,} images, of these {total['points_to_make']:,} points of "
        f"{total['images_to_make']:,} images to sample; {_bytes(total['disk_bytes'])} of disk. For hours, measure with "
        "`isocost train STUDY --estimate`, or give --devices NxNAME as well",
        file=sys.stderr,
    )
    print_json(plan)


def print_estimate(study: StudySpec, devices: str | None, utilisation: float | None, dry_run: bool) -> None:
    """Print the estimate of a study on named devices as a table with its assumptions, and as JSON.

    Raises:
        ConfigError: the options do not fit together, or the study cannot be estimated.
    """
    if not dry_run:
        raise ConfigError("--devices and --utilisation estimate a study without a run: give --dry-run as well")
    if devices is None:
        raise ConfigError("--utilisation: give --devices as well, such as --devices 64xH200")
    from isocost.estimate.accelerators import DEFAULT_UTILISATION, parse_cluster
    from isocost.estimate.estimator import estimate_study

    estimate = estimate_study(study, parse_cluster(devices), DEFAULT_UTILISATION if utilisation is None else utilisation)
    _print_table(estimate)
    print_json(estimate.plain())


def _print_table(estimate: StudyEstimate) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cluster, total = estimate.cluster, estimate.total
    table = Table(
        title=f"{estimate.study} on {cluster} at {estimate.utilisation:.0%} of peak; hours with all devices",
        title_justify="left",
        box=box.SIMPLE,
    )
    for title in (
        "",
        "GFLOP",
        "training images",
        "train h",
        "prepare h",
        "points",
        "images",
        "sweep h",
        "total h",
        "disk GB",
        "memory GB",
    ):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    assets = estimate.assets
    if assets.autoencoder_gflop:
        table.add_row("autoencoder", "", "", "", _hours(assets.autoencoder_device_hours))
    if assets.cache_images is not None and assets.cache_device_hours is not None:
        encoding, disk = _hours(assets.cache_device_hours / cluster.number), _gb(assets.cache_bytes or 0)
        table.add_row("latent cache", "", _count(assets.cache_images), "", encoding, "", "", "", encoding, disk)
    for size in estimate.sizes:
        device_hours = (size.training_device_hours, size.preparing_device_hours, size.sweep_device_hours)
        train, prepare, sweep = (_hours(hours / cluster.number) for hours in device_hours)
        memory = "" if size.model_state_bytes is None else _gb(size.model_state_bytes) + ("" if size.fits else " !")
        table.add_row(
            _title(size),
            _gflop(size.gflop_per_forward),
            _count(size.training_images),
            train,
            prepare,
            _count(size.points),
            _count(size.images),
            sweep,
            _hours(size.hours),
            _gb(size.disk_bytes),
            memory,
        )
    table.add_section()
    table.add_row(
        "total",
        "",
        _count(total["training_images"]),
        _hours(total["training_device_hours"] / cluster.number),
        _hours((total["preparing_device_hours"] + total["assets_device_hours"]) / cluster.number),
        _count(total["points"]),
        _count(total["images"]),
        _hours(total["sweep_device_hours"] / cluster.number),
        _hours(total["hours"]),
        _gb(total["disk_bytes"]),
    )
    console = Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)
    days = f" ({total['hours'] / 24:,.1f} days)" if total["hours"] >= 24 else ""
    hours = f"{_hours(total['hours'])} hours{days} of {cluster}, {_hours(total['device_hours'])} device hours"
    disk = f"{_bytes(total['disk_bytes'])} of disk"
    console.print(f"{total['points']:,} points, {total['images']:,} images, {hours}, {disk}.", soft_wrap=True)
    remedies: dict[str, list[str]] = {}
    for size in estimate.sizes:
        if size.remedy:
            remedies.setdefault(size.remedy, []).append(_title(size))
    for remedy, titles in remedies.items():
        console.print(f"! {', '.join(titles)}: does not fit as the study has it. {remedy}.", soft_wrap=True)
    console.print("Assumed:")
    for sentence in estimate.assumptions:
        console.print(f"- {sentence}", soft_wrap=True)
    console.print("Not counted:")
    for part in estimate.not_counted:
        console.print(f"- {part}", soft_wrap=True)


def _title(size: SizeEstimate) -> str:
    return size.size if size.task == "text2image" else f"{size.task} {size.size}"


def _count(number: float) -> str:
    return f"{number / 1e6:.5g}M" if number >= 1e6 else f"{number:,}"


def _gflop(gflop: float) -> str:
    return f"{gflop:,.1f}" if gflop >= 1 else f"{gflop:.2g}"


def _hours(hours: float) -> str:
    return "< 0.1" if 0 < hours < 0.1 else f"{hours:,.1f}"


def _gb(num_bytes: float) -> str:
    return "< 0.1" if 0 < num_bytes < 1e8 else f"{num_bytes / 1e9:,.1f}"


def _bytes(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:,.0f} bytes"
