"""Accelerators by name, what their makers say that they can do, and how long an amount of work takes on some of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from isocost.errors import ConfigError

Arithmetic = Literal["bf16", "tf32", "fp32"]
DEFAULT_UTILISATION = 0.4


@dataclass(frozen=True)
class Device:
    """Peak rates of dense products in TFLOP/s, sums kept in fp32, and memory in GB (1e9 bytes).

    `tf32_tflops` is the rate of fp32 numbers through the matrix units at reduced precision, `fp32_tflops` the plain one.
    """

    name: str
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb: int
    source: str

    @property
    def memory_bytes(self) -> int:
        """By the data sheet, a little less than what drivers report, which leaves the runtime its part."""
        return self.memory_gb * 10**9


_SHEET = "NVIDIA's data sheet, the dense half of the rate that it gives with sparsity"
_CLOUD = "Google Cloud's documentation; fp32 is a sixth of bf16, the six passes of XLA's highest precision"

DEVICES = {
    device.name: device
    for device in (
        Device("B200", 2250, 1100, 80, 180, _SHEET),
        # "1979 TFLOP/s" of H100 and H200 is the sparse rate.
        Device("H200", 989, 494, 67, 141, _SHEET),
        Device("H100", 989, 494, 67, 80, _SHEET),
        Device("H100-PCIE", 756, 378, 51, 80, _SHEET),
        Device("A100", 312, 156, 19.5, 80, _SHEET),
        Device("A100-40GB", 312, 156, 19.5, 40, _SHEET),
        Device("L40S", 362, 183, 91.6, 48, _SHEET),
        Device("L4", 121, 60, 30.3, 24, _SHEET),
        Device("A10", 125, 62.5, 31.2, 24, _SHEET),
        Device("RTXA6000", 154.8, 77.4, 38.7, 48, "NVIDIA's white paper on GA102, appendix"),
        Device("RTX5090", 209.5, 104.8, 104.8, 32, "NVIDIA's white paper on the RTX Blackwell architecture, appendix"),
        Device("RTX4090", 165, 82.6, 82.6, 24, "NVIDIA's white paper on Ada, appendix: bf16 with fp32 sums"),
        Device("RTX3090", 71, 35.6, 35.6, 24, "NVIDIA's white paper on GA102, appendix: bf16 with fp32 sums"),
        Device("MI300X", 1307, 653.7, 163.4, 192, "AMD's data sheet, dense"),
        Device("TPUV5P", 459, 76.5, 76.5, 95, _CLOUD),
        Device("TPUV5E", 197, 32.8, 32.8, 16, _CLOUD),
        Device("TPUV4", 275, 45.8, 45.8, 32, _CLOUD),
    )
}


@dataclass(frozen=True)
class Cluster:
    """So many of one device."""

    number: int
    device: Device

    def __str__(self) -> str:
        return f"{self.number} x {self.device.name}"


def parse_cluster(text: str) -> Cluster:
    """Devices as people write them: "64xH200", "1xrtx-4090".

    Raises:
        ConfigError: another form, or a device that is not in the table.
    """
    form = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*(\S.*?)\s*", text)
    if form is None or int(form[1]) < 1:
        raise ConfigError(f"--devices {text}: give NUMBERxNAME, such as 64xH200; known: {', '.join(DEVICES)}")
    by_name = {_plain(name): device for name, device in DEVICES.items()}
    if _plain(form[2]) not in by_name:
        raise ConfigError(f"--devices {text}: no device is called {form[2]}; known: {', '.join(DEVICES)}")
    return Cluster(int(form[1]), by_name[_plain(form[2])])


def _plain(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())


@dataclass(frozen=True)
class Work:
    """GFLOP by the arithmetic that they are done in."""

    bf16: float = 0.0
    tf32: float = 0.0
    fp32: float = 0.0

    @classmethod
    def of(cls, arithmetic: Arithmetic, gflop: float) -> Work:
        """All in one arithmetic."""
        return cls(**{arithmetic: gflop})

    def __add__(self, other: Work) -> Work:
        return Work(self.bf16 + other.bf16, self.tf32 + other.tf32, self.fp32 + other.fp32)

    @property
    def gflop(self) -> float:
        """In all."""
        return self.bf16 + self.tf32 + self.fp32

    def device_hours(self, device: Device, utilisation: float) -> float:
        """Hours of one device that reaches this share of its peak."""
        seconds = self.bf16 / device.bf16_tflops + self.tf32 / device.tf32_tflops + self.fp32 / device.fp32_tflops
        return seconds / 1000 / utilisation / 3600
