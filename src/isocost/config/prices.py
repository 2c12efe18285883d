"""The price file: US dollars per hour of each device.

date: "2026-05-01"
devices:
  - {device: H100, usd_per_hour: 3.0, source: "list price, on demand"}
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from isocost.config.base import Spec, parse_spec
from isocost.config.yaml_text import read_yaml
from isocost.errors import ConfigError

SHIPPED = "shipped"
"""In place of a file: the list of prices that comes with isocost."""


class DevicePrice(Spec):
    """The price of one kind of device."""

    device: str = Field(min_length=1, description="part of the device's name, as in the column `hardware` of a report")
    usd_per_hour: float = Field(gt=0, le=1e6, description="US dollars per hour of one device")
    source: str = Field("", description="where the price is from")


class PriceList(Spec):
    """Prices of devices at a date."""

    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="day of the prices, YYYY-MM-DD")]
    devices: tuple[DevicePrice, ...] = Field(description="one entry per kind of device")

    @field_validator("devices")
    @classmethod
    def _not_empty(cls, devices: tuple[DevicePrice, ...]) -> tuple[DevicePrice, ...]:
        if not devices:
            raise ValueError("give at least one device: [{device: PART OF ITS NAME, usd_per_hour: NUMBER}]")
        return devices

    def price_of(self, name: str) -> DevicePrice | None:
        """The price of a device by its full name: the entry with the longest part of it in whole words, None if none fits."""
        fitting = [
            price for price in self.devices if re.search(rf"(?<!\w){re.escape(price.device)}(?!\w)", name, re.IGNORECASE)
        ]
        return max(fitting, key=lambda price: len(price.device), default=None)


def load_prices(file: str | Path = SHIPPED) -> PriceList:
    """Read a price file.

    Args:
        file: the file, or "shipped" for the list that comes with isocost.

    Raises:
        ConfigError: the file is missing or wrong, in one line.
    """
    path = Path(str(resources.files("isocost.assets") / "prices.yaml")) if str(file) == SHIPPED else Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"prices: {file}: no such file; give a YAML file with `date` and `devices`, or `{SHIPPED}`")
    plain = read_yaml(path)
    if not isinstance(plain, dict):
        raise ConfigError(f"prices: {file}: give `date` and `devices`")
    return parse_spec(PriceList, plain, str(file))
