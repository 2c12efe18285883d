"""Accelerators by name with their peak performance, and the time that an amount of work takes on a number of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from isocost.errors import ConfigError

Arithmetic = Literal["bf16", "tf32", "fp32"]
DEFAULT_UTILISATION = 0.4


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Attributes:
        name: name as in `--devices`.
        bf16_tflops: peak rate of dense bf16 matrix products with fp32 accumulation, in TFLOP/s.
        tf32_tflops: peak rate of fp32 inputs in the matrix units, at reduced precision.
        fp32_tflops: peak rate of full-precision fp32.
        memory_gb: memory in GB (1e9 bytes).
        source: source of the numbers.
    """

    name: str
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb: int
    source: str

    @property
    def memory_bytes(self) -> int:
        """Memory by the data sheet; drivers report slightly more, and the runtime uses about the difference."""
        return self.memory_gb * 10**9


_SHEET = "NVIDIA's data sheet, half of its rate with sparsity"
_CLOUD = "Google Cloud's documentation; fp32 is one sixth of bf16, because XLA's highest precision takes six passes"

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
    """A number of equal devices."""

    number: int
    device: Device

    def __str__(self) -> str:
        return f"{self.number} x {self.device.name}"


def parse_cluster(text: str) -> Cluster:
    """Parse a number of devices, such as "64xH200" or "1xrtx-4090".

    Raises:
        ConfigError: the text has another form, or the device is unknown.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*(\S.*?)\s*", text)
    if match is None or int(match[1]) < 1:
        raise ConfigError(f"--devices {text}: give NUMBERxNAME, such as 64xH200; known devices: {', '.join(DEVICES)}")
    by_name = {_normalize_name(name): device for name, device in DEVICES.items()}
    name = _normalize_name(match[2])
    if name not in by_name:
        raise ConfigError(f"--devices {text}: unknown device {match[2]}; known devices: {', '.join(DEVICES)}")
    return Cluster(int(match[1]), by_name[name])


def _normalize_name(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())


@dataclass(frozen=True)
class Work:
    """GFLOP by their arithmetic."""

    bf16: float = 0.0
    tf32: float = 0.0
    fp32: float = 0.0

    @classmethod
    def of(cls, arithmetic: Arithmetic, gflop: float) -> Work:
        """Work in a single arithmetic."""
        return cls(**{arithmetic: gflop})

    def __add__(self, other: Work) -> Work:
        return Work(self.bf16 + other.bf16, self.tf32 + other.tf32, self.fp32 + other.fp32)

    @property
    def gflop(self) -> float:
        """Total GFLOP."""
        return self.bf16 + self.tf32 + self.fp32

    def device_hours(self, device: Device, utilisation: float) -> float:
        """Hours that one device takes at a utilisation (fraction of its peak)."""
        seconds = self.bf16 / device.bf16_tflops + self.tf32 / device.tf32_tflops + self.fp32 / device.fp32_tflops
        return seconds / 1000 / utilisation / 3600
