"""U-Nets: the paper's parameters to the digit, costs against an independent count, small widths by the same rule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from isocost.config.model import ModelSpec
from isocost.errors import ConfigError
from isocost.models.flops import family_table, model_cost
from isocost.models.paper_table import BY_SIZE, TABLE_1
from isocost.models.unet import build_unet, check_width, num_groups, num_heads, size_name, width_of
from isocost.models.unet_with_text_encoder import UNetWithTextEncoder

PARAMETERS_MILLION = (38.8, 83.4, 144.8, 223.0, 318.0, 429.8, 558.3, 703.7, 865.9, 2191.7, 4900.2)


@pytest.fixture(scope="module")
def family() -> list[dict[str, object]]:
    return family_table([row.width for row in TABLE_1], ModelSpec(width=64))


@pytest.mark.slow
def test_the_eleven_sizes_have_the_papers_parameters(family: list[dict]) -> None:
    assert tuple(row["parameters_million"] for row in family) == PARAMETERS_MILLION
    assert [row["size"] for row in family] == [row.size for row in TABLE_1]


@pytest.mark.slow
def test_gflop_are_within_three_percent_of_the_papers_column(family: list[dict]) -> None:
    for ours, paper in zip(family, TABLE_1, strict=True):
        if paper.size == "39M":
            assert "misprint" not in paper.note
            assert paper.note
            assert ours["gflop_per_forward"] == pytest.approx(0.07 * BY_SIZE["866M"].gflop, rel=0.06)
        else:
            assert ours["gflop_per_forward"] == pytest.approx(paper.gflop, rel=0.03)
            assert ours["normalized_cost_per_step"] == pytest.approx(paper.normalized_cost_per_step, rel=0.05)


def test_the_papers_figures_are_given_only_for_the_papers_shape() -> None:
    (row,) = family_table([64], ModelSpec(width=64, latent_size=8, cross_attention_dim=384), 16)
    assert row["reference_gflop"] is None
    assert row["size"] != "39M"


def test_gflop_are_what_the_layers_multiply() -> None:
    """Convolutions and linear layers counted from their own shapes by hooks; attention products from its sequence lengths."""
    spec, tokens = ModelSpec(width=16, latent_size=8, cross_attention_dim=32), 5
    network = build_unet(spec).eval()
    total = 0.0

    def convolution(module: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * module.in_channels * module.kernel_size[0] ** 2

    def linear(module: nn.Linear, _: object, output: torch.Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * module.in_features

    def attention(module: nn.Module, inputs: tuple[torch.Tensor, ...], kwargs: dict, output: torch.Tensor) -> None:
        nonlocal total
        prompt_embeds = kwargs.get("encoder_hidden_states")
        keys = inputs[0].shape[1] if prompt_embeds is None else prompt_embeds.shape[1]
        total += 2 * 2 * output.shape[1] * keys * output.shape[2]

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(convolution)
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(linear)
        elif type(module).__name__ == "Attention":
            module.register_forward_hook(attention, with_kwargs=True)
    with torch.inference_mode():
        network(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, tokens, 32))
    assert model_cost(spec, tokens).gflop_per_forward == pytest.approx(total / 1e9, rel=1e-6)


@pytest.mark.parametrize("width", [8, 16, 24, 32, 48])
def test_small_members_are_built_and_run(width: int) -> None:
    network = build_unet(ModelSpec(width=width, latent_channels=4, latent_size=8, cross_attention_dim=32))
    assert tuple(network.config.block_out_channels) == (width, 2 * width, 4 * width, 4 * width)
    out = network(torch.zeros(2, 4, 8, 8), torch.tensor([0, 999]), torch.zeros(2, 3, 32)).sample
    assert out.shape == (2, 4, 8, 8)


def test_one_rule_gives_the_papers_groups_and_heads_from_64_on() -> None:
    assert {(num_groups(row.width), num_heads(row.width)) for row in TABLE_1} == {(32, 8)}
    assert [(num_groups(width), num_heads(width)) for width in (4, 8, 16, 24, 32, 48)] == [
        (2, 1),
        (4, 1),
        (8, 2),
        (8, 2),
        (16, 4),
        (16, 4),
    ]


def test_the_smallest_member_takes_a_forward_pass() -> None:
    check_width(4)
    network = build_unet(ModelSpec(width=4, latent_channels=8, latent_size=8, cross_attention_dim=384))
    assert sum(parameter.numel() for parameter in network.parameters()) == 257_172
    output = network(torch.zeros(2, 8, 8, 8), torch.tensor([1.0, 500.0]), torch.ones(2, 16, 384), return_dict=False)[0]
    assert output.shape == (2, 8, 8, 8)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("width", "remedy"),
    [(12, "8 or 16"), (2, "8 or 16"), (0, "8 or 16"), (-8, "8 or 16"), (72, "64 or 96"), (100, "96 or 128")],
)
def test_a_width_that_groups_cannot_divide_is_refused_with_neighbours(width: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"width {width}: group norms and heads cannot divide it.*{remedy}"):
        check_width(width)


def test_a_latent_size_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ConfigError, match="latent size 12"):
        build_unet(ModelSpec(width=8, latent_size=12))


def test_sizes_are_named_as_in_the_paper_and_by_parameters_elsewhere() -> None:
    assert width_of("145M") == 128
    assert size_name(128, 144_800_000, 1024) == "145M"
    assert size_name(128, 137_000_000, 384) == "137M"
    assert [size_name(1, n, 384) for n in (777_000, 9_400_000, 35_600_000, 2_190_000_000)] == ["0.8M", "9.4M", "36M", "2.2B"]
    with pytest.raises(ConfigError, match="39M, 83M"):
        width_of("40M")


def test_a_unet_is_saved_with_the_trained_weights_of_its_text_encoder(tmp_path: Path) -> None:
    text_encoder = BertModel(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    unet = build_unet(ModelSpec(width=4, latent_size=8, cross_attention_dim=16))
    network = UNetWithTextEncoder(unet, text_encoder, padding_id=0)
    weights = {name: parameter.detach() + 1 for name, parameter in network.named_parameters()}
    network.save(tmp_path, BertTokenizer(vocab={"[UNK]": 0, "a": 1}), "epsilon", False, weights.items())
    saved = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert {name for name in saved if not name.startswith("pooler.")} == dict(text_encoder.named_parameters()).keys()
    for name, value in weights.items():
        if name.startswith("text_encoder."):
            assert torch.equal(saved[name.removeprefix("text_encoder.")], value)
    assert {name for name in saved if name.startswith("pooler.")} == {"pooler.dense.weight", "pooler.dense.bias"}
