"""Latency: statistics of known times, stages of a planted clock, network calls counted, the whole way from the command line.

Nothing here asserts how fast anything is.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isocost.cli import main
from isocost.config.model import ModelSpec, TextEncoderSpec
from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.autoencoder import load_autoencoder
from isocost.models.checkpoint import CheckpointInfo, load_checkpoint, save_networks
from isocost.models.factory import build_network
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.latency import BatchLatency, Memory, latency, notes_of_load
from isocost.sampling.latency_stages import BatchedPipeline, LoadedModel, Summary, time_pass, time_passes
from isocost.sampling.sample import sample
from isocost.utils.artifact_store import publish
from isocost.utils.device import DeviceSample, HostMonitor, Nvml, open_nvml

GIVEN_MS = [5.0, 1.0, 2.0, 4.0, 3.0, 100.0, 7.0, 6.0, 9.0, 8.0]
PRECISE_MS = [1.0000001, 1.0000002, 1.0000004]
STUDENT = {"distilled": "consistency", "task": "distill", "guidance_range": (1.0, 4.0)}


def write_checkpoint(folder: Path, model: dict[str, Any] | None = None, **facts: Any) -> Path:
    """A shallow checkpoint of random weights for the shipped autoencoder: 32 x 32 pixels, 4 x 8 x 8 latents."""
    shape = {
        "width": 8,
        "latent_channels": 4,
        "latent_size": 8,
        "cross_attention_dim": 384,
        "layers_per_block": 1,
        "num_levels": 2,
    }
    spec = ModelSpec(**shape | (model or {}))
    torch.manual_seed(0)
    network = build_network(spec)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir()
    save_networks(partial, network, "v_prediction")
    info = CheckpointInfo(
        model=spec,
        size="0.2M",
        num_parameters=sum(one.numel() for one in network.parameters()),
        images_seen=0,
        gflop_per_forward=0.125,
        normalized_cost_per_step=0.5,
        prediction_type="v_prediction",
        autoencoder="scenes",
        text_encoder=TextEncoderSpec(path="minilm", max_tokens=8),
        resolution=32,
        **facts,
    )
    publish(partial, folder, {"kind": "checkpoint", "digest": folder.name, "info": info.model_dump(mode="json")})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of every kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    embeds, beside = {"guidance_embed_dim": 16}, {"extra_input_channels": 4}
    return {
        "base": write_checkpoint(root / "base"),
        "student": write_checkpoint(root / "student", embeds, **STUDENT),
        "codi": write_checkpoint(root / "codi", {**embeds, "adapter": "noisy"}, **{**STUDENT, "distilled": "codi"}),
        "progressive": write_checkpoint(root / "progressive", embeds, **{**STUDENT, "distilled": "progressive"}),
        "superres": write_checkpoint(root / "superres", beside, task="superres", scale=2),
    }


@pytest.fixture
def isocost(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run `isocost latency` in this process: status, standard output, standard error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["isocost", "latency", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return command


# --- statistics ---


def test_summaries_of_known_times() -> None:
    found = Summary.of(GIVEN_MS)
    assert (found.median_ms, found.mad_ms) == (5.5, 2.5)
    assert found.p90_ms == pytest.approx(9 + 0.1 * 91)  # 90 % of the way from the first of ten sorted times to the last
    assert found.raw_ms == tuple(GIVEN_MS)
    assert Summary.of([4.0, 4.0, 4.0]) == Summary(4.0, 0.0, 4.0, (4.0, 4.0, 4.0))
    assert Summary.of(PRECISE_MS).median_ms == PRECISE_MS[1]
    with pytest.raises(ConfigError, match="at least 3"):
        Summary.of([1.0, 2.0])


class PlantedClock:
    """Stands still but for the work."""

    name = "planted"

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.num_waits = 0

    def wait(self) -> None:
        self.num_waits += 1

    def record(self) -> float:
        return self.now_ms

    def elapsed_ms(self, first: float, last: float) -> float:
        return last - first


def test_stages_are_the_time_between_their_ends() -> None:
    clock, lasting = PlantedClock(), iter([0.5, 2.0, 0.125, 1.0, 4.0, 0.25])

    def work(ended: Any) -> None:
        for stage in ("text", "denoiser", "decoder"):
            clock.now_ms += next(lasting)
            ended(stage)

    times = time_passes(work, clock, 2, outer=clock)
    assert times == {"text": [0.5, 1.0], "denoiser": [2.0, 4.0], "decoder": [0.125, 0.25], "whole": [2.625, 5.25]}
    assert list(times) == ["text", "denoiser", "decoder", "whole"]
    assert clock.num_waits == 4  # a device is idle before and after each pass


def planted_batch(*loads: float | None) -> BatchLatency:
    summary = Summary.of(GIVEN_MS)
    before, after = (DeviceSample(load_average_1m=load) for load in loads)
    memory = Memory(None, None, None, None)
    return BatchLatency(1, {"whole": summary}, 5.5, 5.5, 1, 1, 1, (5.5,), memory, None, None, before, after)


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert notes_of_load([planted_batch(0.5, 2.0), planted_batch(None, None)]) == []
    assert "up to 3.5 processes wanted one of 2 cores" in notes_of_load([planted_batch(0.5, 1.0), planted_batch(3.5, 3.0)])[0]


# --- what is run ---


@lru_cache
def prepared_of(folder: Path) -> LoadedModel:
    opened = load_checkpoint(folder)
    return LoadedModel(opened.info, Denoiser(opened.network), load_autoencoder("scenes"), text_autoencoder(opened.text_encoder))


@lru_cache
def text_autoencoder(spec: TextEncoderSpec) -> MiniLMTextEncoder:
    return MiniLMTextEncoder(spec)


def batch_of(folder: Path, guidance: float, size: int, num_steps: int = 3, name: str = "ddim") -> BatchedPipeline:
    table = solver_coefficients(SolverSpec(name=name), num_steps, NoiseSchedule.scaled_linear())
    return BatchedPipeline(prepared_of(folder), table, guidance, size)


@pytest.mark.parametrize(
    ("kind", "name", "guidance", "size", "calls", "rows"),
    [
        ("base", "ddim", 1.0, 1, 3, 3),
        ("base", "ddim", 0.0, 2, 3, 6),
        ("base", "ddim", 2.0, 1, 3, 6),
        ("base", "ddim", 2.0, 5, 3, 30),
        ("base", "heun", 2.0, 2, 5, 20),
        ("base", "ddim", 2.0, 33, 3, 198),
        ("student", "lcm", 4.0, 3, 3, 9),
        ("codi", "lcm", 4.0, 2, 3, 6),
        ("superres", "ddim", 1.0, 2, 3, 6),
        ("superres", "ddim", 2.0, 2, 3, 12),
    ],
)
def test_every_pass_is_a_row_of_a_counted_call(
    folders: dict[str, Path], kind: str, name: str, guidance: float, size: int, calls: int, rows: int
) -> None:
    work = batch_of(folders[kind], guidance, size, name=name)
    for _ in range(2):
        ended: list[str] = []
        work(ended.append)
        assert (work.calls.num_calls, work.calls.num_rows) == (calls, rows)
    assert ended == ["text", *(["encoder"] if kind == "superres" else []), "denoiser", "decoder"]
    assert [done.nfe * size for done in work.finished] == [rows] * size
    assert work.images.shape == (size, 3, 32, 32)
    work.check()


def test_the_images_are_those_of_sample(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is what is made elsewhere: the same captions, noise and solver give the same images."""
    work = batch_of(folders["base"], 2.0, 3)
    work(lambda _: None)
    drawn = sample(folders["base"], work.prompts, num_steps=3, guidance=2.0, num_images=1).images[:, 0]
    apart = work.images.permute(0, 2, 3, 1).int() - torch.from_numpy(drawn).int()
    assert apart.abs().max() <= 1
    assert work.images.float().std() > 1


def test_each_pass_encodes_its_captions_and_small_images_anew(folders: dict[str, Path]) -> None:
    work = batch_of(folders["superres"], 1.0, 2)
    work(lambda _: None)
    first = work.images
    work.small = 255 - work.small
    work(lambda _: None)
    assert not torch.equal(work.images, first)
    told = batch_of(folders["base"], 1.0, 1)
    told(lambda _: None)
    before = told.finished[0].latent
    told.prompts = ["something else"]
    told(lambda _: None)
    assert not torch.equal(told.finished[0].latent, before)


def test_stages_add_up_to_the_whole(folders: dict[str, Path]) -> None:
    work = batch_of(folders["base"], 2.0, 2)
    clock = HostMonitor().clock
    times = [time_pass(work, clock) for _ in range(4)]
    shares = [sum(value for stage, value in one.items() if stage != "whole") / one["whole"] for one in times]
    assert max(shares) <= 1
    assert statistics.median(shares) > 0.95


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_student_takes_its_guidance_in_every_precision(folders: dict[str, Path], dtype: Any) -> None:
    opened = load_checkpoint(folders["student"])
    network = Denoiser(opened.network, dtype)
    projected = network.project(torch.zeros(2, 8, 384))
    with torch.inference_mode():
        output = network.denoise()(torch.zeros(2, 4, 8, 8), torch.tensor([5.0, 9.0]), projected, torch.tensor([1.0, 4.0]))
    assert output.dtype == network.dtype
    assert not torch.equal(output[0], output[1])


def test_numbers_that_are_not_finite_are_refused(folders: dict[str, Path]) -> None:
    prepared_of.cache_clear()
    work = batch_of(folders["base"], 1.0, 2)
    prepared_of.cache_clear()
    next(work.prepared.network.network.parameters()).fill_(torch.nan)
    work(lambda _: None)
    with pytest.raises(ConfigError, match="image 0 of 2 is not finite numbers"):
        work.check()


# --- what the device tells ---


def test_the_peak_of_memory_is_of_the_batch_and_not_of_before() -> None:
    monitor = HostMonitor()
    if monitor.memory_kind is None:
        pytest.skip("this system does not let a process reset its peak")
    size = 2**27
    torch.ones(size, dtype=torch.uint8)
    gc.collect()
    monitor.reset_peak()
    loaded = monitor.memory_bytes()
    assert loaded is not None
    assert monitor.peak_bytes() - loaded < size / 4  # type: ignore[operator]
    held = torch.ones(size, dtype=torch.uint8)
    assert 0.9 * size < monitor.peak_bytes() - loaded < 1.5 * size  # type: ignore[operator]
    del held


class Refused(Exception):
    """NVML's own kind of error."""


def planted_nvml(**changes: Any) -> SimpleNamespace:
    def refuse(*_: Any) -> int:
        raise Refused("Not Supported")

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetTotalEnergyConsumption": lambda _: 12_345,
        "nvmlDeviceGetClockInfo": lambda _, kind: {1: 1980, 2: 2619}[kind],
        "nvmlDeviceGetTemperature": refuse,
        "nvmlDeviceGetMaxClockInfo": lambda *_: 1980,
    }
    names = {"NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0, "NVMLError": Refused}
    return SimpleNamespace(**answers | names | changes)


def test_what_nvml_does_not_tell_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", planted_nvml())
    opened, refused = open_nvml("0-1")
    assert isinstance(opened, Nvml)
    assert refused == ""
    told = opened.read()
    assert (told.clock_mhz, told.memory_clock_mhz, told.energy_j, told.temperature_c) == (1980, 2619, 12.345, None)
    assert opened.most_clock_mhz() == 1980


def test_without_nvml_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml("0-1") == (None, "pynvml is absent; `pip install nvidia-ml-py` brings it")

    def missing() -> None:
        raise Refused("Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", planted_nvml(nvmlInit=missing))
    assert open_nvml("0-1") == (None, "NVML does not tell them: Shared Library Not Found")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("kind", ["base", "student", "superres"])
def test_a_cuda_device_is_timed_by_its_events(folders: dict[str, Path], kind: str) -> None:
    found = latency(folders[kind], num_steps=2, batches=[2], repeats=5, dtype="fp16", device="cuda").document()
    assert found["settings"]["timer"] == {"stages": "cuda_events", "whole": "perf_counter"}
    one = found["batches"][0]
    parts = sum(times["median_ms"] for stage, times in one["stages"].items() if stage != "whole")
    assert parts == pytest.approx(one["stages"]["whole"]["median_ms"], rel=0.2)
    assert one["memory"]["peak_bytes"] > one["memory"]["loaded_bytes"] > 0


# --- the whole way ---


def test_the_command_says_everything(folders: dict[str, Path], isocost: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "base.json"
    arguments = ("--steps", 2, "--batch", 4, "--batch", 1, "--repeats", 5, "--device", "cpu", "--out", out)
    status, printed, progress = isocost(folders["base"], *arguments)
    assert status == 0, progress
    assert len(printed.splitlines()) == 1
    found = json.loads(printed)
    assert json.loads(out.read_text()) == found
    assert (found["checkpoint"]["digest"], found["checkpoint"]["size"]) == ("base", "0.2M")
    settings = found["settings"]
    assert (settings["solver"], settings["num_steps"], settings["num_function_evaluations"]) == ("ddim/trailing", 2, 2)
    assert (settings["guidance"], settings["passes_per_evaluation"]) == (2.0, 2)
    assert settings["dtype"] == {"text": "fp32", "denoiser": "fp32", "decoder": "fp32"}
    assert (settings["compiled"], settings["repeats"], settings["warm_up"]) == (False, 5, 3)
    assert settings["timer"] == {"stages": "perf_counter", "whole": "perf_counter"}
    assert settings["gflop_per_image"] == 4 * 0.125
    assert found["device"]["name"]
    assert found["device"]["num_threads"] == torch.get_num_threads()
    assert found["notes"]
    assert [one["batch"] for one in found["batches"]] == [1, 4]
    for one in found["batches"]:
        size = one["batch"]
        assert list(one["stages"]) == ["text", "denoiser", "decoder", "whole"]
        for times in one["stages"].values():
            assert len(times["raw_ms"]) == 5
            assert times["median_ms"] == statistics.median(times["raw_ms"])
            assert times["median_ms"] <= times["p90_ms"] <= max(times["raw_ms"])
        whole = one["stages"]["whole"]
        assert any(value != round(value, 3) for value in whole["raw_ms"])
        assert (one["network_calls"], one["network_rows"], one["nfe_per_image"]) == (2, 4 * size, 4)
        assert one["ms_per_image"] == whole["median_ms"] / size == found["ms_per_image_by_batch"][str(size)]
        assert one["ms_per_evaluation"] == one["stages"]["denoiser"]["median_ms"] / 2
        assert len(one["warm_up_ms"]) == 3
        memory = one["memory"]
        assert memory["growth_bytes"] is None or memory["growth_bytes"] == memory["peak_bytes"] - memory["loaded_bytes"]
        assert (one["energy_j"], one["energy_j_per_image"]) == (None, None)
        assert set(one["before"]) == set(one["after"])
    for words in ("text", "denoiser", "decoder", "whole", "2 passes each", "ms an image"):
        assert words in progress


@pytest.mark.parametrize(
    ("kind", "solver", "steps", "guidance", "passes"),
    [
        ("base", "ddim/trailing", 16, 2.0, 2),
        ("student", "lcm/trailing", 4, 2.0, 1),
        ("progressive", "ddim/trailing", 4, 2.0, 1),
        ("superres", "ddim/trailing", 16, 1.0, 1),
    ],
)
def test_nothing_said_is_what_sample_and_upscale_take(
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    solver: str,
    steps: int,
    guidance: float,
    passes: int,
) -> None:
    monkeypatch.setattr("isocost.sampling.latency.NUM_WARM_UP", 1)
    found = latency(folders[kind], batches=[1], repeats=3, device="cpu").document()
    settings = found["settings"]
    assert (settings["solver"], settings["num_steps"]) == (solver, steps)
    assert (settings["guidance"], settings["passes_per_evaluation"]) == (guidance, passes)
    assert found["batches"][0]["network_calls"] == steps
    assert found["batches"][0]["nfe_per_image"] == steps * passes


@pytest.mark.slow
def test_every_batch_size_is_compiled(folders: dict[str, Path]) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    found = latency(folders["student"], num_steps=1, batches=[1, 2], repeats=3, compiled=True, device="cpu")
    assert counters["stats"]["unique_graphs"] == 2
    assert [one.network_calls for one in found.batches] == [1, 1]


# --- mistakes ---


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("absent", [], "no such checkpoint folder; a run writes them to"),
        ("base", ["--batch", 0], "batch = 0: give one or more sizes of at least 1"),
        ("base", ["--batch", 4, "--batch", -1], "batch = -1"),
        ("base", ["--repeats", 2], "repeats = 2: a median and its spread take at least 3"),
        ("base", ["--steps", 0], "num_steps = 0: a solver takes at least one step"),
        ("base", ["--solver", "huen"], "unknown solver 'huen'; did you mean heun?"),
        ("base", ["--guidance", -1], "give a finite number that is not negative"),
        ("base", ["--dtype", "fp16", "--device", "cpu"], "on a CPU take --dtype fp32 or bf16"),
        ("base", ["--device", "tpu"], "device = tpu: cpu or cuda"),
        ("base", ["--out", "times.txt"], "times.txt: give a file that ends in .json"),
        ("student", ["--guidance", 7.5], "this student was taught 1 to 4"),
    ],
)
def test_a_mistake_is_one_line(
    folders: dict[str, Path], isocost: Any, kind: str, arguments: list[object], said: str, tmp_path: Path
) -> None:
    status, printed, progress = isocost(folders.get(kind, tmp_path / kind), *arguments)
    assert (status, printed) == (2, "")
    assert progress.startswith("isocost: ")
    assert len(progress.splitlines()) == 1
    assert said in progress


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(folders: dict[str, Path], isocost: Any) -> None:
    status, _, progress = isocost(folders["base"], "--device", "cuda")
    assert status == 2
    assert "take --device cpu" in progress
