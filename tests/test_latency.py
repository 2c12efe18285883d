"""Latency: statistics of known times, stages by a fake clock, counted network calls, and the command line.

No test asserts a speed.
"""

from __future__ import annotations

import gc
import itertools
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
from isocost.config.types import PredictionType
from isocost.diffusion.guidance import guidance_per_evaluation
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.models.autoencoder import load_autoencoder
from isocost.models.checkpoint import CheckpointInfo, load_checkpoint, save_networks
from isocost.models.factory import build_network
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.sampling.denoiser import Denoiser
from isocost.sampling.latency import BatchLatency, Memory, latency, load_notes
from isocost.sampling.latency_stages import (
    NUM_WARM_UP,
    BatchedPipeline,
    LoadedGuide,
    LoadedModel,
    Summary,
    measure_latency_ms,
    time_run,
    time_runs,
)
from isocost.sampling.sample import sample
from isocost.utils.artifact_store import publish
from isocost.utils.device import DeviceSample, HostMonitor, Nvml, open_nvml

TIMES_MS = [5.0, 1.0, 2.0, 4.0, 3.0, 100.0, 7.0, 6.0, 9.0, 8.0]
PRECISE_MS = [1.0000001, 1.0000002, 1.0000004]
STUDENT = {"distilled": "consistency", "task": "distill", "guidance_range": (1.0, 4.0)}


def write_checkpoint(
    folder: Path, model: dict[str, Any] | None = None, prediction_type: PredictionType = "v_prediction", **fields: Any
) -> Path:
    """A small checkpoint with random weights for the built-in autoencoder: 32 x 32 pixels, 4 x 8 x 8 latents."""
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
    if spec.kind == "dit":  # its output layer starts at zero
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir()
    save_networks(partial, network, prediction_type)
    info = CheckpointInfo(
        model=spec,
        size="0.2M",
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        images_seen=0,
        gflop_per_forward=0.125,
        normalized_cost_per_step=0.5,
        prediction_type=prediction_type,
        autoencoder="scenes",
        text_encoder=TextEncoderSpec(path="minilm", max_tokens=8),
        resolution=32,
        **fields,
    )
    publish(partial, folder, {"kind": "checkpoint", "digest": folder.name, "info": info.model_dump(mode="json")})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of every kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    embeds, concat = {"guidance_embed_dim": 16}, {"extra_input_channels": 4}
    return {
        "base": write_checkpoint(root / "base"),
        "small": write_checkpoint(root / "small", {"width": 4}),
        "student": write_checkpoint(root / "student", embeds, **STUDENT),
        "codi": write_checkpoint(root / "codi", {**embeds, "adapter": "noisy"}, **{**STUDENT, "distilled": "codi"}),
        "progressive": write_checkpoint(root / "progressive", embeds, **{**STUDENT, "distilled": "progressive"}),
        "superres": write_checkpoint(root / "superres", concat, task="superres", scale=2),
    }


@pytest.fixture
def isocost(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run `isocost latency` in this process; return exit status, stdout and stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["isocost", "latency", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return command


# --- statistics ---


def test_summaries_of_known_times() -> None:
    summary = Summary.from_times(TIMES_MS)
    assert (summary.median_ms, summary.mad_ms) == (5.5, 2.5)
    assert summary.p90_ms == pytest.approx(9 + 0.1 * 91)  # 90 % of the way from the first of ten sorted times to the last
    assert summary.raw_ms == tuple(TIMES_MS)
    assert Summary.from_times([4.0, 4.0, 4.0]) == Summary(4.0, 0.0, 4.0, (4.0, 4.0, 4.0))
    assert Summary.from_times(PRECISE_MS).median_ms == PRECISE_MS[1]
    with pytest.raises(ConfigError, match="at least 3"):
        Summary.from_times([1.0, 2.0])


class FakeClock:
    """A clock that only the timed work advances."""

    name = "fake"

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.num_waits = 0

    def wait(self) -> None:
        self.num_waits += 1

    def record(self) -> float:
        return self.now_ms

    def elapsed_ms(self, first: float, last: float) -> float:
        return last - first


def test_the_time_of_a_stage_is_between_the_ends_of_two_stages() -> None:
    clock, durations_ms = FakeClock(), iter([0.5, 2.0, 0.125, 1.0, 4.0, 0.25])

    def run(on_stage_end: Any) -> None:
        for stage in ("text", "denoiser", "decoder"):
            clock.now_ms += next(durations_ms)
            on_stage_end(stage)

    times = time_runs(run, clock, 2, host_clock=clock)
    assert times == {"text": [0.5, 1.0], "denoiser": [2.0, 4.0], "decoder": [0.125, 0.25], "whole": [2.625, 5.25]}
    assert list(times) == ["text", "denoiser", "decoder", "whole"]
    assert clock.num_waits == 4  # the device is idle before and after each run


@pytest.mark.parametrize(
    ("run_ms", "num_runs"), [(600.0, 3), (260.0, 4), (1.0, 20)], ids=["slow", "until a second has passed", "fast"]
)
def test_a_latency_is_the_median_after_the_warm_up(run_ms: float, num_runs: int) -> None:
    clock, durations_ms = FakeClock(), itertools.chain([5000.0] * NUM_WARM_UP, itertools.repeat(run_ms))

    def run(on_stage_end: Any) -> None:
        clock.now_ms += next(durations_ms)
        on_stage_end("denoiser")

    latency_ms, num_measured = measure_latency_ms(run, clock, clock)
    assert latency_ms == pytest.approx(run_ms)
    assert num_measured == num_runs


def fake_latency(*loads: float | None) -> BatchLatency:
    summary = Summary.from_times(TIMES_MS)
    before, after = (DeviceSample(load_average_1m=load) for load in loads)
    memory = Memory(None, None, None, None)
    return BatchLatency(1, {"whole": summary}, 5.5, 5.5, 1, 1, 1, 0, 0, 0, (5.5,), memory, None, None, before, after)


def test_a_busy_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert load_notes([fake_latency(0.5, 2.0), fake_latency(None, None)]) == []
    assert "up to 3.5 processes competed for 2 cores" in load_notes([fake_latency(0.5, 1.0), fake_latency(3.5, 3.0)])[0]


# --- the timed run ---


@lru_cache
def loaded_model(folder: Path) -> LoadedModel:
    opened = load_checkpoint(folder)
    return LoadedModel(opened.info, Denoiser(opened.network), load_autoencoder("scenes"), text_encoder(opened.text_encoder))


@lru_cache
def text_encoder(spec: TextEncoderSpec) -> MiniLMTextEncoder:
    return MiniLMTextEncoder(spec)


def batched_pipeline(folder: Path, guidance: float, size: int, num_steps: int = 3, name: str = "ddim") -> BatchedPipeline:
    coefficients = solver_coefficients(SolverSpec(name=name), num_steps, NoiseSchedule.scaled_linear())
    return BatchedPipeline(loaded_model(folder), coefficients, guidance, size)


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
@pytest.mark.fast_cases(3)
def test_every_pass_is_a_row_of_a_counted_call(
    folders: dict[str, Path], kind: str, name: str, guidance: float, size: int, calls: int, rows: int
) -> None:
    pipeline = batched_pipeline(folders[kind], guidance, size, name=name)
    for _ in range(2):
        stages: list[str] = []
        pipeline(stages.append)
        assert (pipeline.call_counter.num_calls, pipeline.call_counter.num_rows) == (calls, rows)
    assert stages == ["text", *(["encoder"] if kind == "superres" else []), "denoiser", "decoder"]
    assert [result.nfe * size for result in pipeline.results] == [rows] * size
    assert pipeline.images.shape == (size, 3, 32, 32)
    pipeline.check()


@lru_cache
def loaded_guide(folder: Path, main: Path, has_own_text_encoder: bool = False) -> LoadedGuide:
    opened = load_checkpoint(folder)
    own = text_encoder(opened.text_encoder) if has_own_text_encoder else None
    return LoadedGuide(opened.info, Denoiser(opened.network), own, loaded_model(main))


@pytest.mark.parametrize(
    ("guide", "null_prompt", "weights", "rows", "guide_calls"),
    [
        (None, False, (1.0, 2.0, 2.0), 5, 0),
        (None, False, (1.0, 1.0, 1.0), 3, 0),
        ("small", False, (1.0, 2.0, 2.0), 3, 2),
        ("small", True, (2.0, 2.0, 2.0), 3, 3),
    ],
)
@pytest.mark.parametrize("size", [1, 3])
def test_an_evaluation_without_guidance_takes_one_row_and_no_guide(
    folders: dict[str, Path],
    guide: str | None,
    null_prompt: bool,
    weights: tuple[float, ...],
    rows: int,
    guide_calls: int,
    size: int,
) -> None:
    coefficients = solver_coefficients(SolverSpec(), 3, NoiseSchedule.scaled_linear())
    network = None if guide is None else loaded_guide(folders[guide], folders["base"])
    pipeline = BatchedPipeline(loaded_model(folders["base"]), coefficients, 2.0, size, weights, network, null_prompt)
    for _ in range(2):
        pipeline(lambda _: None)
        assert (pipeline.call_counter.num_calls, pipeline.call_counter.num_rows) == (3, rows * size)
        if pipeline.guide_counter is not None:
            assert (pipeline.guide_counter.num_calls, pipeline.guide_counter.num_rows) == (guide_calls, guide_calls * size)
    assert [result.nfe for result in pipeline.results] == [rows + guide_calls] * size
    assert [result.guide_nfe for result in pipeline.results] == [guide_calls] * size


@pytest.mark.parametrize("has_own_text_encoder", [False, True])
def test_the_timed_images_of_a_pair_equal_those_of_sample(folders: dict[str, Path], has_own_text_encoder: bool) -> None:
    coefficients = solver_coefficients(SolverSpec(), 3, NoiseSchedule.scaled_linear())
    guide = loaded_guide(folders["small"], folders["base"], has_own_text_encoder)
    weights = guidance_per_evaluation(coefficients.alpha, coefficients.sigma, 2.0, (-3.0, None))
    assert set(weights) == {1.0, 2.0}
    pipeline = BatchedPipeline(loaded_model(folders["base"]), coefficients, 2.0, 3, weights, guide)
    pipeline(lambda _: None)
    settings = {"num_steps": 3, "guidance": 2.0, "num_images": 1, "guidance_interval": (-3.0, None)}
    expected = sample(folders["base"], pipeline.prompts, guide=folders["small"], **settings).array[:, 0]
    assert (pipeline.images.permute(0, 2, 3, 1).int() - torch.from_numpy(expected).int()).abs().max() <= 1


def test_the_timed_images_equal_those_of_sample(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts, noise and solver give the same images as `sample`."""
    pipeline = batched_pipeline(folders["base"], 2.0, 3)
    pipeline(lambda _: None)
    expected = sample(folders["base"], pipeline.prompts, num_steps=3, guidance=2.0, num_images=1).array[:, 0]
    difference = pipeline.images.permute(0, 2, 3, 1).int() - torch.from_numpy(expected).int()
    assert difference.abs().max() <= 1
    assert pipeline.images.float().std() > 1


def test_each_run_encodes_its_prompts_and_small_images_again(folders: dict[str, Path]) -> None:
    superres = batched_pipeline(folders["superres"], 1.0, 2)
    superres(lambda _: None)
    first = superres.images
    superres.low_resolution = 255 - superres.low_resolution
    superres(lambda _: None)
    assert not torch.equal(superres.images, first)
    base = batched_pipeline(folders["base"], 1.0, 1)
    base(lambda _: None)
    before = base.results[0].latent
    base.prompts = ["something else"]
    base(lambda _: None)
    assert not torch.equal(base.results[0].latent, before)


def test_the_stages_add_up_to_the_end_to_end_time(folders: dict[str, Path]) -> None:
    pipeline = batched_pipeline(folders["base"], 2.0, 2)
    clock = HostMonitor().clock
    runs = [time_run(pipeline, clock) for _ in range(4)]
    fractions = [sum(ms for stage, ms in times.items() if stage != "whole") / times["whole"] for times in runs]
    assert max(fractions) <= 1
    assert statistics.median(fractions) > 0.95


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_student_accepts_guidance_as_an_input_in_every_dtype(folders: dict[str, Path], dtype: Any) -> None:
    opened = load_checkpoint(folders["student"])
    network = Denoiser(opened.network, dtype)
    projected = network.project(torch.zeros(2, 8, 384))
    with torch.inference_mode():
        output = network.denoise()(torch.zeros(2, 4, 8, 8), torch.tensor([5.0, 9.0]), projected, torch.tensor([1.0, 4.0]))
    assert output.dtype == network.dtype
    assert not torch.equal(output[0], output[1])


def test_nonfinite_images_are_rejected(folders: dict[str, Path]) -> None:
    loaded_model.cache_clear()
    pipeline = batched_pipeline(folders["base"], 1.0, 2)
    loaded_model.cache_clear()
    next(pipeline.model.network.network.parameters()).fill_(torch.nan)
    pipeline(lambda _: None)
    with pytest.raises(ConfigError, match="image 0 of 2 contains NaN or inf"):
        pipeline.check()


# --- readings of the device ---


@pytest.mark.slow
def test_the_memory_peak_excludes_earlier_use() -> None:
    monitor = HostMonitor()
    if monitor.memory_kind is None:
        pytest.skip("this system does not let a process reset its peak")
    # The system may take memory back from the process at any moment, so one of three measurements is enough.
    growths = [memory_growth(monitor, 2**27) for _ in range(3)]
    assert any(before < 0.25 and 0.9 < after < 1.5 for before, after in growths), growths


def memory_growth(monitor: HostMonitor, size: int) -> tuple[float, float]:
    """Peaks over the memory in use, after `size` bytes were freed and after they were held, as fractions of `size`."""
    torch.ones(size, dtype=torch.uint8)
    gc.collect()
    monitor.reset_peak()
    loaded = monitor.memory_bytes()
    assert loaded is not None
    before = monitor.peak_bytes()
    held = torch.ones(size, dtype=torch.uint8)
    after = monitor.peak_bytes()
    assert before is not None
    assert after is not None
    del held
    return (before - loaded) / size, (after - loaded) / size


class FakeNvmlError(Exception):
    """Stands for NVMLError."""


def fake_nvml(**changes: Any) -> SimpleNamespace:
    def unsupported(*_: Any) -> int:
        raise FakeNvmlError("Not Supported")

    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetTotalEnergyConsumption": lambda _: 12_345,
        "nvmlDeviceGetClockInfo": lambda _, kind: {1: 1980, 2: 2619}[kind],
        "nvmlDeviceGetTemperature": unsupported,
        "nvmlDeviceGetMaxClockInfo": lambda *_: 1980,
    }
    names = {"NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0, "NVMLError": FakeNvmlError}
    return SimpleNamespace(**functions | names | changes)


def test_a_reading_that_nvml_does_not_support_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    opened, reason = open_nvml("0-1")
    assert isinstance(opened, Nvml)
    assert reason == ""
    reading = opened.read()
    assert (reading.clock_mhz, reading.memory_clock_mhz, reading.energy_j, reading.temperature_c) == (1980, 2619, 12.345, None)
    assert opened.max_clock_mhz() == 1980


def test_without_nvml_the_note_gives_the_reason_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml("0-1") == (None, "pynvml is not installed; `pip install nvidia-ml-py` installs it")

    def missing() -> None:
        raise FakeNvmlError("Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=missing))
    assert open_nvml("0-1") == (None, "NVML cannot read them: Shared Library Not Found")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["base", "student", "superres"])
def test_cuda_events_time_a_cuda_device(folders: dict[str, Path], kind: str) -> None:
    document = latency(folders[kind], num_steps=2, batches=[2], repeats=5, dtype="fp16", device="cuda").document()
    assert document["settings"]["timer"] == {"stages": "cuda_events", "whole": "perf_counter"}
    batch = document["batches"][0]
    total_ms = sum(times["median_ms"] for stage, times in batch["stages"].items() if stage != "whole")
    assert total_ms == pytest.approx(batch["stages"]["whole"]["median_ms"], rel=0.2)
    assert batch["memory"]["peak_bytes"] > batch["memory"]["loaded_bytes"] > 0


# --- the command ---


def test_the_command_prints_every_value(folders: dict[str, Path], isocost: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "base.json"
    arguments = ("--steps", 2, "--batch", 4, "--batch", 1, "--repeats", 5, "--device", "cpu", "--out", out)
    status, printed, progress = isocost(folders["base"], *arguments)
    assert status == 0, progress
    assert len(printed.splitlines()) == 1
    document = json.loads(printed)
    assert json.loads(out.read_text()) == document
    assert (document["checkpoint"]["digest"], document["checkpoint"]["size"]) == ("base", "0.2M")
    settings = document["settings"]
    assert (settings["solver"], settings["num_steps"], settings["num_function_evaluations"]) == ("ddim/trailing", 2, 2)
    assert (settings["guidance"], settings["passes_per_evaluation"]) == (2.0, 2)
    assert settings["dtype"] == {"text": "fp32", "denoiser": "fp32", "decoder": "fp32"}
    assert (settings["compiled"], settings["repeats"], settings["warm_up"]) == (False, 5, 3)
    assert settings["timer"] == {"stages": "perf_counter", "whole": "perf_counter"}
    assert settings["gflop_parts"]["denoiser"] == 4 * 0.125
    assert settings["gflop_per_image"] == pytest.approx(sum(settings["gflop_parts"].values()))
    assert min(settings["gflop_parts"][part] for part in ("text", "decoder")) > 0
    assert document["device"]["name"]
    assert document["device"]["num_threads"] == torch.get_num_threads()
    assert document["notes"]
    assert [batch["batch"] for batch in document["batches"]] == [1, 4]
    for batch in document["batches"]:
        size = batch["batch"]
        assert list(batch["stages"]) == ["text", "denoiser", "decoder", "whole"]
        for times in batch["stages"].values():
            assert len(times["raw_ms"]) == 5
            assert times["median_ms"] == statistics.median(times["raw_ms"])
            assert times["median_ms"] <= times["p90_ms"] <= max(times["raw_ms"])
        end_to_end = batch["stages"]["whole"]
        assert any(value != round(value, 3) for value in end_to_end["raw_ms"])
        assert (batch["network_calls"], batch["network_rows"], batch["nfe_per_image"]) == (2, 4 * size, 4)
        assert batch["ms_per_image"] == end_to_end["median_ms"] / size == document["ms_per_image_by_batch"][str(size)]
        assert batch["ms_per_evaluation"] == batch["stages"]["denoiser"]["median_ms"] / 2
        assert len(batch["warm_up_ms"]) == 3
        memory = batch["memory"]
        assert memory["growth_bytes"] is None or memory["growth_bytes"] == memory["peak_bytes"] - memory["loaded_bytes"]
        assert (batch["energy_j"], batch["energy_j_per_image"]) == (None, None)
        assert set(batch["before"]) == set(batch["after"])
    for fragment in ("text", "denoiser", "decoder", "whole", "2 passes each", "ms per image"):
        assert fragment in progress


def test_the_command_measures_a_pair_by_its_own_mix_of_passes(folders: dict[str, Path], isocost: Any) -> None:
    arguments = ("--steps", 2, "--batch", 2, "--repeats", 3, "--device", "cpu", "--guidance", 3, "--guidance-interval", "-3:")
    status, printed, progress = isocost(folders["base"], "--guide", folders["small"], *arguments)
    assert status == 0, progress
    document = json.loads(printed)
    settings, batch = document["settings"], document["batches"][0]
    assert (settings["guide"]["digest"], settings["guide"]["null_prompt"]) == ("small", False)
    assert (settings["guidance_interval"], settings["guided_evaluations"]) == ([-3.0, None], 1)
    assert (batch["nfe_per_image"], batch["guide_nfe_per_image"]) == (3, 1)
    assert (batch["network_calls"], batch["network_rows"], batch["guide_calls"], batch["guide_rows"]) == (2, 4, 1, 2)
    assert settings["gflop_parts"]["denoiser"] == 3 * 0.125, "both networks of the test state the same cost"
    assert "3 network passes per image: 2 of the network and 1 of the guide 0.2M" in progress
    status, printed, progress = isocost(folders["base"], *arguments)
    assert status == 0, progress
    assert json.loads(printed)["batches"][0]["network_rows"] == 3 * 2
    assert "2 solver evaluations, 1 of them with guidance, which takes 2 passes" in " ".join(progress.split())


@pytest.mark.parametrize(
    ("kind", "solver", "steps", "guidance", "passes"),
    [
        ("base", "ddim/trailing", 16, 2.0, 2),
        ("student", "lcm/trailing", 4, 2.0, 1),
        ("progressive", "ddim/trailing", 4, 2.0, 1),
        ("superres", "ddim/trailing", 16, 1.0, 1),
    ],
)
@pytest.mark.fast_cases(2)
def test_the_defaults_equal_those_of_sample_and_upscale(
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    solver: str,
    steps: int,
    guidance: float,
    passes: int,
) -> None:
    monkeypatch.setattr("isocost.sampling.latency.NUM_WARM_UP", 1)
    document = latency(folders[kind], batches=[1], repeats=3, device="cpu").document()
    settings = document["settings"]
    assert (settings["solver"], settings["num_steps"]) == (solver, steps)
    assert (settings["guidance"], settings["passes_per_evaluation"]) == (guidance, passes)
    assert document["batches"][0]["network_calls"] == steps
    assert document["batches"][0]["nfe_per_image"] == steps * passes


@pytest.mark.slow
def test_every_batch_size_is_compiled(folders: dict[str, Path]) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    measured = latency(folders["student"], num_steps=1, batches=[1, 2], repeats=3, compiled=True, device="cpu")
    assert counters["stats"]["unique_graphs"] == 2
    assert [batch.network_calls for batch in measured.batches] == [1, 1]


# --- mistakes ---


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("absent", [], "no such checkpoint folder; `isocost run` writes checkpoints to"),
        ("base", ["--batch", 0], "--batch 0: it should be greater than or equal to 1"),
        ("base", ["--batch", 4, "--batch", -1], "--batch -1: it should be greater than or equal to 1"),
        ("base", ["--repeats", 2], "--repeats 2: it should be greater than or equal to 3"),
        ("base", ["--steps", 0], "--steps 0: it should be greater than or equal to 1"),
        ("base", ["--solver", "huen"], "unknown solver 'huen'; did you mean heun?"),
        ("base", ["--guidance", -1], "--guidance -1.0: it should be greater than or equal to 0"),
        ("base", ["--dtype", "fp16", "--device", "cpu"], "on a CPU use --dtype fp32 or bf16"),
        ("base", ["--device", "tpu"], "device = tpu: choose cpu or cuda"),
        ("base", ["--out", "times.txt"], "times.txt: give a file that ends in .json"),
        ("student", ["--guidance", 7.5], "this student was trained on guidance 1 to 4"),
    ],
)
def test_a_mistake_is_a_one_line_message(
    folders: dict[str, Path], isocost: Any, kind: str, arguments: list[object], message: str, tmp_path: Path
) -> None:
    status, printed, progress = isocost(folders.get(kind, tmp_path / kind), *arguments)
    assert (status, printed) == (2, "")
    assert progress.startswith("isocost: ")
    assert len(progress.splitlines()) == 1
    assert message in progress


@pytest.mark.parametrize(
    ("guide", "arguments", "message"),
    [
        ("base", [], "a model cannot guide itself; give a smaller or less trained one"),
        ("student", [], "was trained with its guidance as an input"),
        ("superres", [], "choose a guide of the same task"),
        ("absent", [], "no such checkpoint folder"),
        ("small", ["--guidance", 0.5], "would lead to the images of the guide; give 1 or more"),
        ("small", ["--guidance-interval", "20:30"], "the log-SNR of this noise schedule goes from"),
        ("small", ["--guidance-schedule", "1:2,0:1"], "rising log-SNR"),
        (None, ["--guide-null-prompt"], "there is no guide to give the empty prompt to"),
    ],
)
def test_a_wrong_guide_is_a_one_line_message(
    folders: dict[str, Path], isocost: Any, guide: str | None, arguments: list[object], message: str, tmp_path: Path
) -> None:
    named = [] if guide is None else ["--guide", folders.get(guide, tmp_path / guide)]
    status, printed, progress = isocost(folders["base"], *named, *arguments)
    assert (status, printed) == (2, "")
    assert len(progress.splitlines()) == 1
    assert message in progress


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_rejected(folders: dict[str, Path], isocost: Any) -> None:
    status, _, progress = isocost(folders["base"], "--device", "cuda")
    assert status == 2
    assert "use --device cpu" in progress
