"""Costs around the denoiser: equal to counts of diffusers' and transformers' own modules, and summed to the whole image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from sqlalchemy import text
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_study
from finished_study import finished_spec
from isocost.analysis.formatting import format_row
from isocost.analysis.pareto import pareto
from isocost.analysis.recommend import recommend
from isocost.analysis.results_table import read_table
from isocost.config.model import TextEncoderSpec
from isocost.config.sampling import VaeSpec
from isocost.errors import ConfigError
from isocost.estimate.component_shapes import KNOWN_TEXT_ENCODERS, autoencoder_shape
from isocost.experiments.component_costs import study_component_costs
from isocost.models.component_costs import (
    ComponentCosts,
    autoencoder_cost,
    pipeline_components,
    text_encoder_gflop,
)
from isocost.pipeline.gflop_parts import with_gflop_parts
from isocost.pipeline.pipeline import Pipeline
from isocost.report.build import report
from isocost.report.matplotlib_backend import draw_cost_parts
from isocost.report.plot_data_costs import cost_parts
from isocost.report.plotly_backend import plotly_cost_parts
from isocost.report.report_data import Page, rebuild, render
from isocost.report.scope import Scope
from published_configs import PIPELINES, PUBLISHED, PublishedPipeline, published_info
from synthetic_results import synthetic_table

KL = {"kind": "kl", "block_widths": [8, 16], "num_channels": 4, "num_images": 64}
NAMES = [pytest.param(name, marks=() if "xl" in name or "schnell" in name else pytest.mark.slow) for name in PIPELINES]


def own_text_gflop(pipeline: PublishedPipeline) -> float:
    """GFLOP of transformers' own text encoders on the meta device."""
    total = 0.0
    for class_name, config, num_tokens in pipeline.text_encoders.values():
        encoder_class: Any = getattr(transformers, class_name)
        arguments = {key: value for key, value in config.items() if key != "model_type"}
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder_class(encoder_class.config_class(**arguments)).eval()(torch.zeros(1, num_tokens, dtype=torch.long))
        total += counter.get_total_flops() / 1e9
    return total


def multiply_adds(network: nn.Module, call: Any) -> float:
    """GFLOP of the convolutions and linear layers of a call, by a count that is independent of torch's."""
    total = 0

    def count(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            weights = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        else:
            assert isinstance(module, nn.Linear)
            weights = module.in_features
        total += 2 * weights * output.numel()

    hooks = [part.register_forward_hook(count) for part in network.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    with torch.no_grad(), torch.device("meta"):
        call()
    for hook in hooks:
        hook.remove()
    return total / 1e9


@pytest.mark.parametrize("name", NAMES)
def test_published_pipelines_cost_what_their_own_modules_do(name: str, tmp_path: Path) -> None:
    pipeline, resolution = PIPELINES[name], PUBLISHED[name].resolution
    pipeline.write_configs(tmp_path / "pipeline")
    costs = pipeline_components(published_info(name, tmp_path / "pipeline"))
    assert costs.gflop_text == pytest.approx(own_text_gflop(pipeline), rel=0.01)
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(pipeline.autoencoder).eval()
    latents = torch.empty(1, pipeline.autoencoder["latent_channels"], resolution // 8, resolution // 8, device="meta")
    layers = multiply_adds(autoencoder, lambda: autoencoder.decode(latents))
    attention = 4 * 512 * (resolution // 8) ** 4 / 1e9
    assert costs.gflop_decoder == pytest.approx(layers + attention, rel=0.01)
    assert costs.gflop_encoder == 0
    assert costs.total == costs.gflop_text + costs.gflop_decoder


def test_a_few_step_model_spends_much_of_its_cost_outside_of_the_denoiser(tmp_path: Path) -> None:
    """Stable Diffusion 1.5 in 4 steps of LCM: 3.2 TFLOP of the denoiser, 2.5 of the decoder."""
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    PIPELINES[name].write_configs(tmp_path / "pipeline")
    info = published_info(name, tmp_path / "pipeline")
    costs = pipeline_components(info)
    assert 4 * info.gflop_per_forward == pytest.approx(3.2e3, rel=0.02)
    assert costs.gflop_decoder == pytest.approx(2.5e3, rel=0.02)
    assert costs.gflop_text == pytest.approx(13.3, rel=0.01)


def test_the_t5_of_stable_diffusion_3_is_optional(tmp_path: Path) -> None:
    name = "stabilityai/stable-diffusion-3-medium-diffusers"
    whole = PIPELINES[name]
    without = PublishedPipeline(whole.pipeline, dict(list(whole.text_encoders.items())[:2]), whole.autoencoder, 2)
    without.write_configs(tmp_path / "pipeline")
    costs = pipeline_components(published_info(name, tmp_path / "pipeline"))
    assert costs.gflop_text == pytest.approx(own_text_gflop(without), rel=0.01)


def test_a_guide_encodes_the_prompt_again(tmp_path: Path) -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    PIPELINES[name].write_configs(tmp_path / "pipeline")
    info = published_info(name, tmp_path / "pipeline")
    alone, guided = pipeline_components(info), pipeline_components(info, info)
    assert guided.gflop_text == 2 * alone.gflop_text
    assert guided.gflop_decoder == alone.gflop_decoder


def test_tiles_overlap_and_cost_more() -> None:
    config = PIPELINES["stabilityai/stable-diffusion-xl-base-1.0"].autoencoder
    whole, tiled = autoencoder_cost(config, 1024), autoencoder_cost(config, 1024, VaeSpec(tile_size=512))
    attention_of_whole = 4 * 512 * 128**4 / 1e9
    assert whole.decode_gflop < tiled.decode_gflop + attention_of_whole
    assert 1.2 < tiled.decode_gflop / whole.decode_gflop < 2.5
    assert autoencoder_cost(config, 1024, VaeSpec(dtype="bf16", slicing=True)) == whole


def test_known_text_encoders_agree_with_their_networks() -> None:
    """The estimate's table of shapes against transformers' own module."""
    shape = KNOWN_TEXT_ENCODERS["minilm"][1]
    assert text_encoder_gflop(TextEncoderSpec(path="minilm", max_tokens=16)) == pytest.approx(shape.gflop(16), rel=0.01)


@pytest.mark.parametrize("autoencoder", [{"kind": "pca", "patch": 4, "num_channels": 4}, KL, {"path": "scenes"}])
def test_a_study_costs_the_same_in_an_estimate(autoencoder: dict[str, Any]) -> None:
    study = tiny_study(autoencoder={"kind": "pretrained", **autoencoder} if "path" in autoencoder else autoencoder)
    costs, shape = study_component_costs(study, VaeSpec()), autoencoder_shape(study)
    assert costs.gflop_decoder == pytest.approx(shape.decode_gflop)
    assert costs.gflop_text == text_encoder_gflop(study.text_encoder)
    assert costs.gflop_encoder == 0
    with_encoder = study_component_costs(study, VaeSpec(), with_encoder=True)
    assert with_encoder.gflop_encoder == pytest.approx(shape.encode_gflop)
    assert with_encoder.total == pytest.approx(costs.total + shape.encode_gflop)


# --- tables of earlier versions ---------------------------------------------------------------------------------------


def table_of_an_earlier_version() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "checkpoint": ["a", "a", "b"],
            "gflop_denoiser": [1.0, 2.0, 3.0],
            "guide_checkpoint": [None, "g", None],
            "vae_dtype": [None, None, "bf16"],
            "vae_tile_size": [None, None, 64],
            "vae_slicing": [None, None, True],
        }
    )


def test_missing_parts_are_filled_from_the_study() -> None:
    asked = []

    def components(checkpoint: str, vae: VaeSpec, guide: str | None) -> ComponentCosts:
        asked.append((checkpoint, vae, guide))
        return ComponentCosts(0.5, 0.0, 0.25)

    table = with_gflop_parts(table_of_an_earlier_version(), components)
    assert list(table["gflop"]) == [1.75, 2.75, 3.75]
    assert asked == [
        ("a", VaeSpec(), None),
        ("a", VaeSpec(), "g"),
        ("b", VaeSpec(dtype="bf16", tile_size=64, slicing=True), None),
    ]
    known = table.assign(gflop_text=7.0)
    assert list(with_gflop_parts(known, components)["gflop"]) == [8.25, 9.25, 10.25], "parts that are known stay"


def test_parts_stay_unknown_where_a_component_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    def components(checkpoint: str, vae: VaeSpec, guide: str | None) -> ComponentCosts:
        raise ConfigError("FOLDER: no config.json")

    table = with_gflop_parts(table_of_an_earlier_version(), components)
    assert table["gflop"].isna().all()
    assert list(table["gflop_denoiser"]) == [1, 2, 3]
    assert "GFLOP of the whole image is unknown for 3 points: FOLDER: no config.json" in caplog.text


def test_the_column_of_version_0_1_is_read_as_the_denoisers_part(tmp_path: Path) -> None:
    table = pd.DataFrame({"point": ["a"], "gflop": [2.0]})
    table.to_parquet(tmp_path / "table.parquet")
    read = read_table(tmp_path)
    assert list(read["gflop_denoiser"]) == [2.0]
    assert read["gflop"].isna().all(), "the cost of the whole image is not known"


# --- the figure -------------------------------------------------------------------------------------------------------

METRIC = "mmd_efficientnet"


def with_parts(num_steps: tuple[int, ...] = (2, 4, 8)) -> pd.DataFrame:
    table = synthetic_table(sizes=("0.2M", "3.2M"), num_steps=num_steps, snapshots=())
    parts = {"gflop_text": 1.0, "gflop_encoder": 0.0, "gflop_decoder": 3.0}
    return table.assign(**parts, gflop=table["gflop_denoiser"] + 4.0)


def test_the_bars_are_the_frontier_and_add_up_to_the_whole_image() -> None:
    table = with_parts()
    parts = cost_parts(table, METRIC)
    frontier = pareto(table, "gflop", METRIC)
    assert list(parts.totals) == list(frontier["gflop"])
    assert parts.labels == tuple(map(format_row, frontier.to_dict("records")))
    assert list(parts.shares) == ["prompt (text encoder)", "denoiser, all passes", "image (decoder)"], "no encoder"
    assert sum(parts.shares.values()) == pytest.approx(np.full(len(frontier), 100.0))
    assert parts.shares["image (decoder)"] == pytest.approx(3 * parts.shares["prompt (text encoder)"])
    assert parts.shares["denoiser, all passes"] == pytest.approx(100 * frontier["gflop_denoiser"] / frontier["gflop"])
    assert "image (decoder): " in parts.note("image (decoder)", 0)
    assert "3 GFLOP" in parts.note("image (decoder)", 0)


def test_a_long_frontier_is_thinned_and_says_so() -> None:
    parts = cost_parts(with_parts(tuple(range(1, 41))), METRIC)
    assert len(parts.labels) == 16
    assert "16 of them" in parts.setting
    assert list(parts.totals) == sorted(parts.totals)


def test_both_backends_draw_the_same_bars() -> None:
    parts = cost_parts(with_parts(), METRIC)
    drawn = draw_cost_parts(parts).axes[0]
    widths = [patch.get_width() for container in drawn.containers for patch in container]
    figure = go.Figure(plotly_cost_parts(parts))
    assert [value for trace in figure.data for value in trace.x] == pytest.approx(widths)
    assert [trace.name for trace in figure.data] == list(parts.shares)
    assert [label.get_text() for label in drawn.get_yticklabels()] == list(figure.layout.yaxis.ticktext) == list(parts.labels)


def test_the_figure_needs_the_parts() -> None:
    with pytest.raises(ConfigError, match="GFLOP of the text encoder and the decoder are not known"):
        cost_parts(with_parts().drop(columns="gflop_text"), METRIC)
    with pytest.raises(ConfigError, match="are not known"):
        cost_parts(with_parts().assign(gflop_text=np.nan), METRIC)


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_a_budget_for_the_whole_image_buys_fewer_steps() -> None:
    table = with_parts()
    whole, denoiser = recommend(table, "gflop", 5.0, METRIC), recommend(table, "gflop_denoiser", 5.0, METRIC)
    rows = table.set_index("point").loc[[whole.configuration.point, denoiser.configuration.point]]
    assert rows["gflop"].iloc[0] <= 5
    assert rows["gflop_denoiser"].iloc[1] <= 5 < rows["gflop"].iloc[1]


# --- databases of earlier versions ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_report_writes_the_parts_into_the_database(family_copy: Path, isocost: Any) -> None:
    pipeline = Pipeline(finished_spec(), family_copy)
    expected = pipeline.results_db.table()["gflop"]
    assert expected.notna().all()
    with pipeline.results_db.engine.begin() as connection:
        connection.execute(text("UPDATE points SET gflop_text = NULL, gflop_encoder = NULL, gflop_decoder = NULL"))
    assert pipeline.results_db.table()["gflop"].isna().all()
    report(Pipeline(finished_spec(), family_copy), figure_formats=())
    assert pipeline.results_db.table()["gflop"].tolist() == pytest.approx(expected.tolist())


def test_points_without_a_known_cost_are_noted() -> None:
    table = with_parts()
    partly = table.assign(gflop=table["gflop"].where(table["size"] == "0.2M"))
    notes = recommend(partly, "gflop", 100.0, METRIC).notes
    missing = int((table["is_final"] & (table["size"] != "0.2M")).sum())
    assert f"{missing} points are left out because gflop is not known" in notes


def test_a_guide_with_the_empty_prompt_encodes_none(tmp_path: Path) -> None:
    rows = table_of_an_earlier_version().assign(guide_checkpoint="g", guide_null_prompt=[True, False, True])
    guides: list[str | None] = []

    def components(checkpoint: str, vae: VaeSpec, guide: str | None) -> ComponentCosts:
        guides.append(guide)
        return ComponentCosts(0.5, 0.0, 0.25)

    with_gflop_parts(rows, components)
    assert guides == [None, "g", None]


def test_a_page_of_published_checkpoints_that_are_absent_keeps_its_budgets(tmp_path: Path) -> None:
    """The budgets of version 0.1 were GFLOP of the denoiser."""
    table = with_parts().drop(columns=["gflop_text", "gflop_encoder", "gflop_decoder", "gflop"])
    old = table.rename(columns={"gflop_denoiser": "gflop"})
    page = Page("study", METRIC, {}, {}, [], [1.0], {}, {}, "floor", None, [], scope=Scope("gflop", trained=False))
    _save_page_for(tmp_path, page, old)
    written = rebuild(tmp_path, figure_formats=())
    assert {choice.cost for choice in written.choices} == {"gflop_denoiser"}
    assert "GFLOP of the denoiser" in written.summary


def _save_page_for(out: Path, page: Page, table: pd.DataFrame) -> None:
    render(out, {"text2image": (page, table.assign(gflop_denoiser=table["gflop"], ms_per_image=np.nan), {})}, figure_formats=())
    table.to_parquet(out / "table.parquet")
