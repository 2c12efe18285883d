"""Telemetry of a device during a measurement: time, memory, clocks, energy. Unavailable readings are None."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from isocost.errors import ConfigError
from isocost.utils.environment import processor_name

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Written to `clear_refs`, it makes Linux set the peak of the resident memory of a process to its present value."""


class Timer(Protocol):
    """Measures the milliseconds between two events."""

    name: str

    def wait(self) -> None:
        """Return when the device has finished all submitted work."""

    def record(self) -> Any:
        """An event at the end of the work submitted so far."""

    def elapsed_ms(self, first: Any, last: Any) -> float:
        """Milliseconds between two events, unrounded; call `wait` before."""


class HostTimer:
    """Python's `perf_counter_ns`, or another clock in nanoseconds, for work that is done when its call returns."""

    name = "perf_counter"

    def __init__(self, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self.now_ns = now_ns

    def wait(self) -> None:
        """Do nothing: no work is pending on a CPU."""

    def record(self) -> int:
        """The current time in nanoseconds. Only differences between two such times have a meaning."""
        return self.now_ns()

    def elapsed_ms(self, first: int, last: int) -> float:
        """Milliseconds."""
        return (last - first) / 1e6


class CudaTimer:
    """Events in the current stream of a CUDA device, timed by the clock of the device."""

    name = "cuda_events"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Return when the device is idle."""
        torch.cuda.synchronize(self.device)

    def record(self) -> torch.cuda.Event:
        """An event at the end of the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def elapsed_ms(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Milliseconds, with a resolution of about half a microsecond."""
        return float(first.elapsed_time(last))


@dataclass(frozen=True)
class DeviceSample:
    """Readings of a device at one moment.

    Attributes:
        energy_j: energy of the whole device since an arbitrary origin.
        load_average_1m: mean number of processes of the host that used or waited for a core in the last minute.
    """

    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    energy_j: float | None = None
    load_average_1m: float | None = None


class DeviceMonitor(Protocol):
    """Reads the telemetry of a device."""

    clock: Timer
    memory_kind: str | None
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Constant facts: name, threads, maximum clock."""

    def read(self) -> DeviceSample:
        """Present clocks, energy and load."""

    def memory_bytes(self) -> int | None:
        """Memory in use, of the kind `memory_kind`."""

    def reset_peak(self) -> None:
        """Set the peak of memory to its present use."""

    def peak_bytes(self) -> int | None:
        """Peak of memory since `reset_peak`."""


def is_out_of_memory(error: Exception) -> bool:
    """True for the exceptions of torch when memory of a CUDA device or of a CPU runs out."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def free_memory_bytes(device: torch.device) -> int:
    """Bytes of memory that a device has free now; for a CPU, what the host can give to new work without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def device_monitor(device: torch.device) -> DeviceMonitor:
    """The monitor of a CPU or a CUDA device."""
    return CudaMonitor(device) if device.type == "cuda" else HostMonitor()


class HostMonitor:
    """Monitor of the host processor. The peak is Linux's `VmHWM`; other systems cannot reset it, and have no reading."""

    def __init__(self) -> None:
        self.clock: Timer = HostTimer()
        self.memory_kind: str | None = "resident memory of the process" if _resets_peak() else None
        no_energy = "energy: not measured on a CPU"
        no_peak = "memory: this system cannot reset the peak of the resident memory of a process"
        self.notes: tuple[str, ...] = (no_energy,) if self.memory_kind else (no_energy, no_peak)

    def facts(self) -> dict[str, Any]:
        """Name of the processor and torch's threads; a network call of the sampling engine has one thread."""
        name, threads = processor_name(), torch.get_num_threads()
        return {"kind": "cpu", "name": name, "num_threads": threads, "num_threads_of_a_network_call": 1}

    def read(self) -> DeviceSample:
        """Mean clock of the cores, where the system reports it, and the load."""
        import psutil

        frequency = psutil.cpu_freq()
        return DeviceSample(clock_mhz=None if frequency is None else float(frequency.current), load_average_1m=_load_average())

    def memory_bytes(self) -> int | None:
        """Resident bytes."""
        return _status_bytes("VmRSS") if self.memory_kind else None

    def reset_peak(self) -> None:
        """Set the peak to the present resident memory."""
        if self.memory_kind:
            _CLEAR_REFS.write_text(_RESET_PEAK)

    def peak_bytes(self) -> int | None:
        """Peak of the resident bytes since `reset_peak`."""
        return _status_bytes("VmHWM") if self.memory_kind else None


class CudaMonitor:
    """Monitor of a CUDA device. Clocks, temperature and energy need `pynvml` (package nvidia-ml-py)."""

    memory_kind: str | None = "memory allocated by torch on the device"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock: Timer = CudaTimer(device)
        self.nvml, reason = open_nvml(str(torch.cuda.get_device_properties(device).uuid))
        self.notes: tuple[str, ...] = (f"clocks and energy: {reason}",) if reason else ()

    def facts(self) -> dict[str, Any]:
        """Name of the device, CUDA version, maximum clock, and torch's threads on the host."""
        facts = {"kind": "cuda", "name": torch.cuda.get_device_name(self.device), "cuda_version": torch.version.cuda}
        max_clock_mhz = self.nvml.max_clock_mhz() if self.nvml else None
        return {**facts, "max_clock_mhz": max_clock_mhz, "num_threads": torch.get_num_threads()}

    def read(self) -> DeviceSample:
        """The readings of NVML, and the load of the host."""
        load = _load_average()
        return self.nvml.read(load) if self.nvml else DeviceSample(load_average_1m=load)

    def memory_bytes(self) -> int | None:
        """Bytes of live tensors."""
        return int(torch.cuda.memory_allocated(self.device))

    def reset_peak(self) -> None:
        """Set the peak to the present allocation."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """`torch.cuda.max_memory_allocated`."""
        return int(torch.cuda.max_memory_allocated(self.device))


class Nvml:
    """Readings of one device through NVML; a reading that it does not support is None."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    def read(self, load_average_1m: float | None = None) -> DeviceSample:
        """Clocks in MHz, temperature in degrees Celsius, and energy in joules since the driver was loaded."""
        nvml = self._library
        millijoules = self._query(nvml.nvmlDeviceGetTotalEnergyConsumption)
        return DeviceSample(
            clock_mhz=self._query(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._query(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            temperature_c=self._query(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            energy_j=None if millijoules is None else millijoules / 1000,
            load_average_1m=load_average_1m,
        )

    def max_clock_mhz(self) -> float | None:
        """Maximum clock of the multiprocessors."""
        return self._query(self._library.nvmlDeviceGetMaxClockInfo, self._library.NVML_CLOCK_SM)

    def _query(self, function: Callable[..., int], *arguments: int) -> float | None:
        try:
            return float(function(self._handle, *arguments))
        except self._library.NVMLError:
            return None


def open_nvml(uuid: str) -> tuple[Nvml | None, str]:
    """NVML's device with torch's `uuid` and an empty text, or None and the reason."""
    try:
        import pynvml
    except ImportError:
        return None, "pynvml is not installed; `pip install nvidia-ml-py` installs it"
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")), ""
    except pynvml.NVMLError as error:
        return None, f"NVML cannot read them: {error}"


def _load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _resets_peak() -> bool:
    """Whether the process can reset the peak of its resident memory on this system."""
    if _status_bytes("VmHWM") is None:
        return False
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int | None:
    """A value of `/proc/self/status` in bytes; None if the system has no such file or line."""
    if not _STATUS.is_file():
        return None
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == f"{key}:"), None)


_DEVICE: ContextVar[torch.device | None] = ContextVar("device", default=None)


@contextmanager
def use_device(device: torch.device | str | None) -> Iterator[None]:
    """Make `best_device` return `device` within the block; None changes nothing.

    Raises:
        ConfigError: there is no such device.
    """
    if device is None:
        yield
        return
    token = _DEVICE.set(check_device(device))
    try:
        yield
    finally:
        _DEVICE.reset(token)


def check_device(device: torch.device | str) -> torch.device:
    """The device, after a check that a tensor can be made on it.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {device}: not available here: {str(error).splitlines()[0]}") from error
    return checked


def best_device() -> torch.device:
    """The device of `use_device`; else the CUDA device of this process (under torchrun by its local rank), else the CPU."""
    if (device := _DEVICE.get()) is not None:
        return device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
