"""From requests to images with a stub engine and decoder: positions in a call, order, and images with NaN."""

import random
from types import SimpleNamespace

import pytest
import torch

from isocost.config.sampling import SolverSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.models.autoencoder import MAX_IMAGES_PER_CALL, images_per_call
from isocost.sampling.generate import generate
from isocost.sampling.request import SampleRequest, SampleResult

COEFFICIENTS = solver_coefficients(SolverSpec(), 1, NoiseSchedule.scaled_linear())


class StubAutoencoder:
    """An image shows the number in its latent, changed by its position in the call and by the size of the call."""

    def __init__(self, factor):
        self.factor = factor
        self.shapes = set()

    def decode(self, latents):
        self.shapes.add(tuple(latents.shape))
        value = latents[:, 0, 0, 0] + 40 * torch.arange(len(latents)) + len(latents)
        return (value % 251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def finished(sample_index, point, finite=True):
    request = SampleRequest(sample_index, 0, COEFFICIENTS, 1.0, tag=(point, sample_index))
    latent = torch.full((4, 1, 1), float(sample_index + 7 * point) if finite else float("nan"))
    return SampleResult(request, latent, 1, 1, finite, 8)


def images_by_tag(stream, resolution=64):
    """The images by tag, and the tags of results without an image."""
    autoencoder = StubAutoencoder(factor=resolution)
    engine = SimpleNamespace(run=lambda _: iter(stream), latent_shape=(4, 1, 1))
    batches = list(generate(engine, autoencoder, []))
    assert autoencoder.shapes <= {(images_per_call(resolution), 4, 1, 1)}
    assert all(len(batch.results) == len(batch.images) for batch in batches)
    images = {result.request.tag: image for batch in batches for result, image in zip(batch.results, batch.images, strict=True)}
    return images, [result.request.tag for batch in batches for result in batch.nonfinite]


@pytest.mark.parametrize(
    ("resolution", "expected"), [(32, 32), (64, 32), (80, 2), (96, 1), (128, 1), (256, 1), (512, 1), (1024, 1)]
)
def test_large_images_are_decoded_a_few_at_a_time(resolution, expected):
    assert images_per_call(resolution) == expected
    images, _ = images_by_tag([finished(sample_index, 0) for sample_index in range(9)], resolution)
    assert len(images) == 9


def test_an_image_is_decoded_at_its_own_position_whatever_shares_the_call():
    stream = [finished(sample_index, point) for point in range(3) for sample_index in range(2 * MAX_IMAGES_PER_CALL + 5)]
    single = {tag: image for result in stream for tag, image in images_by_tag([result])[0].items()}
    for order in (stream, random.Random(0).sample(stream, len(stream))):
        together, nonfinite = images_by_tag(order)
        assert together.keys() == single.keys()
        assert not nonfinite
        assert all(torch.equal(together[tag], single[tag]) for tag in single)


@pytest.mark.parametrize("num_images", [0, 1, MAX_IMAGES_PER_CALL + 1])
def test_a_nonfinite_latent_has_no_image_and_its_request_is_named(num_images):
    stream = [finished(sample_index, 0, finite=sample_index % 3 != 1) for sample_index in range(num_images)]
    images, nonfinite = images_by_tag(stream)
    assert set(images) == {(0, i) for i in range(num_images) if i % 3 != 1}
    assert nonfinite == [(0, i) for i in range(num_images) if i % 3 == 1]
