"""What a device tells of itself while it is measured: time, memory, clocks, energy. What it does not tell is None."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from isocost.utils.environment import processor_name

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What Linux takes in `clear_refs` to set the peak of a process's resident memory to what it holds now."""


class Timer(Protocol):
    """Marks moments and tells the milliseconds between two of them."""

    name: str

    def wait(self) -> None:
        """Return when the device has done all that it was given."""

    def record(self) -> Any:
        """The moment at which the work that was given so far is done."""

    def elapsed_ms(self, first: Any, last: Any) -> float:
        """Milliseconds from one mark to a later one, unrounded; after `wait`."""


class HostTimer:
    """Python's `perf_counter_ns`, for work that is done when its call returns."""

    name = "perf_counter"

    def wait(self) -> None:
        """Nothing is pending."""

    def record(self) -> int:
        """Nanoseconds from a start of the system's choice."""
        return time.perf_counter_ns()

    def elapsed_ms(self, first: int, last: int) -> float:
        """Milliseconds."""
        return (last - first) / 1e6


class CudaTimer:
    """Events in a CUDA device's current stream: the device's own clock."""

    name = "cuda_events"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Return when the device is idle."""
        torch.cuda.synchronize(self.device)

    def record(self) -> torch.cuda.Event:
        """An event behind all that is in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def elapsed_ms(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Milliseconds, of about half a microsecond's resolution."""
        return float(first.elapsed_time(last))


@dataclass(frozen=True)
class DeviceSample:
    """The device at one moment.

    `energy_j` counts up from a start of the device's choice, over the whole device; `load_average_1m` is the host's: how many
    processes wanted a core in the last minute.
    """

    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    energy_j: float | None = None
    load_average_1m: float | None = None


class DeviceMonitor(Protocol):
    """A device's own account of itself."""

    clock: Timer
    memory_kind: str | None
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Name, threads, clocks' upper ends: what does not change meanwhile."""

    def read(self) -> DeviceSample:
        """Clocks, energy and load now."""

    def memory_bytes(self) -> int | None:
        """Memory in use now, of the kind `memory_kind`."""

    def reset_peak(self) -> None:
        """Forget the peak of memory so far."""

    def peak_bytes(self) -> int | None:
        """The most memory in use since `reset_peak`."""


def device_monitor(device: torch.device) -> DeviceMonitor:
    """The instruments of a CPU or a CUDA device."""
    return CudaMonitor(device) if device.type == "cuda" else HostMonitor()


class HostMonitor:
    """The processor that this process runs on. Peaks are Linux's `VmHWM`; elsewhere they cannot be reset, and none is told."""

    def __init__(self) -> None:
        self.clock: Timer = HostTimer()
        self.memory_kind: str | None = "resident memory of the process" if _resets_peak() else None
        absent = "energy: no counter is read on a CPU"
        no_peak = "memory: this system does not let a process reset the peak of its resident memory"
        self.notes: tuple[str, ...] = (absent,) if self.memory_kind else (absent, no_peak)

    def facts(self) -> dict[str, Any]:
        """The model's name and torch's threads; a network call has one thread, as everywhere in the engine."""
        name, threads = processor_name(), torch.get_num_threads()
        return {"kind": "cpu", "name": name, "num_threads": threads, "num_threads_of_a_network_call": 1}

    def read(self) -> DeviceSample:
        """The cores' mean clock where the system tells it, and the load."""
        import psutil

        frequency = psutil.cpu_freq()
        return DeviceSample(clock_mhz=None if frequency is None else float(frequency.current), load_average_1m=_load_average())

    def memory_bytes(self) -> int | None:
        """Resident bytes."""
        return _status_bytes("VmRSS") if self.memory_kind else None

    def reset_peak(self) -> None:
        """Set the peak to what is resident now."""
        if self.memory_kind:
            _CLEAR_REFS.write_text(_RESET_PEAK)

    def peak_bytes(self) -> int | None:
        """The most resident bytes since `reset_peak`."""
        return _status_bytes("VmHWM") if self.memory_kind else None


class CudaMonitor:
    """A CUDA device. Clocks, temperature and energy where `pynvml` (package nvidia-ml-py) is there and the device tells."""

    memory_kind: str | None = "memory allocated by torch on the device"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock: Timer = CudaTimer(device)
        self.nvml, refused = open_nvml(str(torch.cuda.get_device_properties(device).uuid))
        self.notes: tuple[str, ...] = (f"clocks and energy: {refused}",) if refused else ()

    def facts(self) -> dict[str, Any]:
        """The device's name, CUDA's version, the upper end of its clock, and torch's threads on the host."""
        facts = {"kind": "cuda", "name": torch.cuda.get_device_name(self.device), "cuda_version": torch.version.cuda}
        most = self.nvml.most_clock_mhz() if self.nvml else None
        return {**facts, "most_clock_mhz": most, "num_threads": torch.get_num_threads()}

    def read(self) -> DeviceSample:
        """What NVML tells, and the host's load."""
        load = _load_average()
        return self.nvml.read(load) if self.nvml else DeviceSample(load_average_1m=load)

    def memory_bytes(self) -> int | None:
        """Bytes of live tensors."""
        return int(torch.cuda.memory_allocated(self.device))

    def reset_peak(self) -> None:
        """Set the peak to what is allocated now."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """`torch.cuda.max_memory_allocated`."""
        return int(torch.cuda.max_memory_allocated(self.device))


class Nvml:
    """One device through NVML; a question that it does not answer gives None."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    def read(self, load_average_1m: float | None = None) -> DeviceSample:
        """Clocks in MHz, degrees Celsius, and joules since the driver was loaded."""
        nvml = self._library
        millijoules = self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption)
        return DeviceSample(
            clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            energy_j=None if millijoules is None else millijoules / 1000,
            load_average_1m=load_average_1m,
        )

    def most_clock_mhz(self) -> float | None:
        """The upper end of the multiprocessors' clock."""
        return self._ask(self._library.nvmlDeviceGetMaxClockInfo, self._library.NVML_CLOCK_SM)

    def _ask(self, question: Callable[..., int], *about: int) -> float | None:
        try:
            return float(question(self._handle, *about))
        except self._library.NVMLError:
            return None


def open_nvml(uuid: str) -> tuple[Nvml | None, str]:
    """NVML's device of torch's `uuid`, or None and why there is none."""
    try:
        import pynvml
    except ImportError:
        return None, "pynvml is absent; `pip install nvidia-ml-py` brings it"
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")), ""
    except pynvml.NVMLError as error:
        return None, f"NVML does not tell them: {error}"


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _resets_peak() -> bool:
    """Whether this system lets the process reset the peak of its resident memory."""
    if _status_bytes("VmHWM") is None:
        return False
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int | None:
    """A line of Linux's account of this process; None where there is none."""
    if not _STATUS.is_file():
        return None
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == f"{key}:"), None)


def best_device() -> torch.device:
    """A CUDA device where there is one - under torchrun the one of this process - and else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
