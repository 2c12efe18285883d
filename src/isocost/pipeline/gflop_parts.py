"""The parts of GFLOP of points that a version scored that counted the denoiser only."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pandas as pd

from isocost.config.sampling import VaeSpec
from isocost.errors import ConfigError
from isocost.models.component_costs import ComponentCosts
from isocost.sweep.results_db import with_total_gflop

logger = logging.getLogger(__name__)

MakeComponents = Callable[[str, VaeSpec, str | None], ComponentCosts]
"""(checkpoint, settings of its autoencoder, guide or None) -> the costs around the denoiser; see `Experiment.components`."""
COMPONENT_COLUMNS = ("gflop_text", "gflop_encoder", "gflop_decoder")


def with_gflop_parts(table: pd.DataFrame, components: MakeComponents) -> pd.DataFrame:
    """Fill the parts of GFLOP that a table lacks, and their sum.

    The parts stay unknown, and a message says so, where the text encoder or the autoencoder is not there.

    Args:
        table: points with `gflop_denoiser`.
        components: returns the costs of a checkpoint's components.
    """
    table = table.assign(**{name: table.get(name, float("nan")) for name in COMPONENT_COLUMNS})
    is_missing = table[list(COMPONENT_COLUMNS)].isna().any(axis=1)
    for index, row in table[is_missing].iterrows():
        guide = None if row.get("guide_null_prompt") is True else row.get("guide_checkpoint")
        try:
            costs = components(str(row["checkpoint"]), _vae_of(row), guide if isinstance(guide, str) else None)
        except ConfigError as error:
            logger.warning(f"GFLOP of the whole image is unknown for {int(is_missing.sum())} points: {error}")
            break
        for name in COMPONENT_COLUMNS:
            table.loc[index, name] = getattr(costs, name)
    return with_total_gflop(table)


def _vae_of(row: pd.Series) -> VaeSpec:
    if not isinstance(row.get("vae_dtype"), str):
        return VaeSpec()
    tile_size = row["vae_tile_size"]
    return VaeSpec(
        dtype=row["vae_dtype"], tile_size=None if pd.isna(tile_size) else int(tile_size), slicing=bool(row["vae_slicing"])
    )
