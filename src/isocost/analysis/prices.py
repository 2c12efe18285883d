"""US dollars per 1,000 images, from the measured milliseconds and the price of the device per hour."""

from __future__ import annotations

import pandas as pd

from isocost.analysis.costs import is_measured
from isocost.analysis.timings import TIME_COLUMN, timing_device
from isocost.config.prices import SHIPPED, load_prices
from isocost.errors import ConfigError

USD_COLUMN = "usd_per_1000"
MS_PER_HOUR = 3.6e6


def with_usd(table: pd.DataFrame, file: str | None, *, skips_unknown: bool = False) -> tuple[pd.DataFrame, str]:
    """Return the table with the column `usd_per_1000`, and a note on the prices.

    It is `ms_per_image` at full batches × the price of the device that measured it. Prices are linear in time: no start-up,
    no idle time and no storage.

    Args:
        table: points, as in `isocost.analysis.results_table`.
        skips_unknown: a point whose device has no price gets no value, and the note says so; else it is an error.
        file: the price file or "shipped". None takes the column of the table if there is one, else the shipped prices.

    Raises:
        ConfigError: no point has `ms_per_image`, the price file is wrong, or the device has no price.
    """
    if file is None and is_measured(table, USD_COLUMN):
        return table, "US dollars are those of the report; --prices FILE gives other prices"
    if not is_measured(table, TIME_COLUMN):
        raise ConfigError(
            f"US dollars need {TIME_COLUMN}, and no point has it; `isocost remeasure STUDY` measures it, "
            "and `isocost report STUDY` adds it to the table"
        )
    where = file or SHIPPED
    prices = load_prices(where)
    provenance = table["provenance"] if "provenance" in table.columns else pd.Series("", index=table.index)
    devices = provenance.map(timing_device)
    usd_per_hour, unknown = dict[str, float](), list[str]()
    for device in sorted(devices[table[TIME_COLUMN].notna()].unique()):
        price = prices.price_of(device)
        if price is None and skips_unknown:
            unknown.append(device or "unknown device")
            continue
        if price is None:
            name = f"'{device}'" if device else "the device of this table, whose name is not recorded"
            source = "the list that comes with isocost" if where == SHIPPED else where
            raise ConfigError(
                f"prices: {source} has no price for {name}; give a YAML file (--prices FILE, `report.prices`) with "
                "`date: YYYY-MM-DD` and `devices: [{device: PART OF ITS NAME, usd_per_hour: NUMBER}]`"
            )
        usd_per_hour[device] = price.usd_per_hour
    listed = ", ".join(f"{device} at {usd:g} US dollars per hour" for device, usd in usd_per_hour.items())
    listed += f"no price for {', '.join(unknown)}" if unknown else ""
    usd = 1000 * table[TIME_COLUMN] / MS_PER_HOUR * devices.map(usd_per_hour)
    return table.assign(**{USD_COLUMN: usd}), f"{listed} ({where}, {prices.date})"
