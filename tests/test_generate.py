"""Rows to pictures with a planted engine and decoder: placing, order, broken rows."""

import random
from types import SimpleNamespace

import pytest
import torch

from isocost.config.sampling import SamplerSpec
from isocost.diffusion.noise_schedule import Schedule
from isocost.diffusion.solvers import build_table
from isocost.sampling.generate import DECODE_BATCH, generate
from isocost.sampling.request import FinishedRow, Row

TABLE = build_table(SamplerSpec(), 1, Schedule.scaled_linear())


class PlantedCodec:
    """A picture is its latent's number, spoilt by its place in the call and by the size of the call."""

    def __init__(self):
        self.shapes = set()

    def decode(self, latents):
        self.shapes.add(tuple(latents.shape))
        value = latents[:, 0, 0, 0] + 40 * torch.arange(len(latents)) + len(latents)
        return (value % 251).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def finished(picture_id, point, finite=True):
    row = Row(picture_id, 0, TABLE, 1.0, tag=(point, picture_id))
    latent = torch.full((4, 1, 1), float(picture_id + 7 * point) if finite else float("nan"))
    return FinishedRow(row, latent, 1, 1, finite, 8)


def pictures_of(stream):
    codec = PlantedCodec()
    drawn = list(generate(SimpleNamespace(run=lambda _: iter(stream)), codec, []))
    assert len(codec.shapes) <= 1
    assert all(len(one.rows) == len(one.pictures) for one in drawn)
    made = {row.row.tag: picture for one in drawn for row, picture in zip(one.rows, one.pictures, strict=True)}
    return made, [row.row.tag for one in drawn for row in one.broken]


def test_a_picture_is_decoded_at_its_own_place_whatever_its_company():
    stream = [finished(picture_id, point) for point in range(3) for picture_id in range(2 * DECODE_BATCH + 5)]
    alone = {tag: picture for row in stream for tag, picture in pictures_of([row])[0].items()}
    for order in (stream, random.Random(0).sample(stream, len(stream))):
        together, broken = pictures_of(order)
        assert together.keys() == alone.keys()
        assert not broken
        assert all(torch.equal(together[tag], alone[tag]) for tag in alone)


@pytest.mark.parametrize("num_pictures", [0, 1, DECODE_BATCH + 1])
def test_a_row_that_is_not_finite_has_no_picture_and_is_named(num_pictures):
    stream = [finished(picture_id, 0, finite=picture_id % 3 != 1) for picture_id in range(num_pictures)]
    made, broken = pictures_of(stream)
    assert set(made) == {(0, i) for i in range(num_pictures) if i % 3 != 1}
    assert broken == [(0, i) for i in range(num_pictures) if i % 3 == 1]
