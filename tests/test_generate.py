"""Rows to images with a planted engine and decoder: placing, order, broken rows."""

import random
from types import SimpleNamespace

import pytest
import torch

from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.sampling.generate import DECODE_BATCH, generate
from isocost.sampling.request import SampleRequest, SampleResult

TABLE = solver_coefficients(SolverSpec(), 1, NoiseSchedule.scaled_linear())


class PlantedAutoencoder:
    """An image is its latent's number, spoilt by its place in the call and by the size of the call."""

    def __init__(self):
        self.shapes = set()

    def decode(self, latents):
        self.shapes.add(tuple(latents.shape))
        value = latents[:, 0, 0, 0] + 40 * torch.arange(len(latents)) + len(latents)
        return (value % 251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def finished(sample_index, point, finite=True):
    row = SampleRequest(sample_index, 0, TABLE, 1.0, tag=(point, sample_index))
    latent = torch.full((4, 1, 1), float(sample_index + 7 * point) if finite else float("nan"))
    return SampleResult(row, latent, 1, 1, finite, 8)


def iter_images(stream):
    autoencoder = PlantedAutoencoder()
    drawn = list(generate(SimpleNamespace(run=lambda _: iter(stream)), autoencoder, []))
    assert len(autoencoder.shapes) <= 1
    assert all(len(one.rows) == len(one.images) for one in drawn)
    made = {row.row.tag: image for one in drawn for row, image in zip(one.rows, one.images, strict=True)}
    return made, [row.row.tag for one in drawn for row in one.broken]


def test_a_image_is_decoded_at_its_own_place_whatever_its_company():
    stream = [finished(sample_index, point) for point in range(3) for sample_index in range(2 * DECODE_BATCH + 5)]
    alone = {tag: image for row in stream for tag, image in iter_images([row])[0].items()}
    for order in (stream, random.Random(0).sample(stream, len(stream))):
        together, broken = iter_images(order)
        assert together.keys() == alone.keys()
        assert not broken
        assert all(torch.equal(together[tag], alone[tag]) for tag in alone)


@pytest.mark.parametrize("num_images", [0, 1, DECODE_BATCH + 1])
def test_a_row_that_is_not_finite_has_no_image_and_is_named(num_images):
    stream = [finished(sample_index, 0, finite=sample_index % 3 != 1) for sample_index in range(num_images)]
    made, broken = iter_images(stream)
    assert set(made) == {(0, i) for i in range(num_images) if i % 3 != 1}
    assert broken == [(0, i) for i in range(num_images) if i % 3 == 1]
