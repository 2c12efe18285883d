"""The Monge Inception Distance: torch-fidelity's values, closed forms, and influences against planted truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from isocost.evaluation.metric_registry import metric_columns, metric_of
from isocost.metrics.sliced_wasserstein import sliced_wasserstein


def test_values_are_those_of_torch_fidelity() -> None:
    """The values are from `mind_features_to_metric` of torch-fidelity's main branch (2026-05), with its default seed."""
    steps = torch.arange(200 * 8, dtype=torch.float64).reshape(200, 8)
    a, b = torch.sin(steps * 0.7).float(), (torch.cos(steps * 1.3) * 1.5 + 0.2).float()
    assert sliced_wasserstein(a, b).value == pytest.approx(10.962242, abs=1e-5)
    assert sliced_wasserstein(a.numpy(), b.numpy(), num_directions=100).value == pytest.approx(10.633282, abs=1e-5)
    assert sliced_wasserstein(a[:150], b).value == pytest.approx(10.844462871551514, abs=1e-5)


def test_a_shift_counts_three_times_its_squared_length_and_equal_sets_are_at_zero() -> None:
    features = torch.randn(500, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.linspace(-0.5, 0.5, 32, dtype=torch.float64)
    distance = sliced_wasserstein(features, features + shift, num_directions=4000)
    assert distance.value == pytest.approx(3 * float(shift.square().sum()), rel=0.05)
    assert sliced_wasserstein(features, features.flip(0)).value == 0


def test_the_influence_predicts_what_leaving_an_image_out_changes() -> None:
    generator = np.random.default_rng(0)
    features, reference = generator.standard_normal((400, 6)), 1.3 * generator.standard_normal((400, 6)) + 0.4
    full = sliced_wasserstein(features, reference, num_directions=50)
    rows = (3, 77, 210)
    for row in rows:
        # twice the weight of one image: the set with the image repeated, against every reference image as often as before
        doubled = np.concatenate([np.repeat(features, 400, 0), np.repeat(features[row : row + 1], 400, 0)])
        both = sliced_wasserstein(doubled, np.repeat(reference, 401, 0), num_directions=50).value
        assert (both - full.value) * 401 == pytest.approx(full.influence[row], abs=0.05 * np.abs(full.influence).max())


def test_intervals_have_the_spread_that_repeated_draws_have() -> None:
    generator = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(100):
        features, reference = generator.standard_normal((250, 8)), 1.2 * generator.standard_normal((200, 8)) + 0.5
        distance = sliced_wasserstein(features, reference, num_directions=50)
        values.append(distance.value)
        errors.append(
            math.hypot(*(part.std() / math.sqrt(len(part)) for part in (distance.influence, distance.reference_influence)))
        )
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="two sets of two or more images"):
        sliced_wasserstein(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match="two sets of two or more images"):
        sliced_wasserstein(np.zeros((1, 3)), np.zeros((5, 3)))


def test_the_name_of_the_paper_is_for_inception_features_only() -> None:
    assert metric_columns("sliced_wasserstein", "inception") == ("mind",)
    assert metric_of("mind").better == "lower"
    assert metric_columns("sliced_wasserstein", "efficientnet-lite0") == ("sliced_wasserstein_efficientnet",)
