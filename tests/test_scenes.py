"""The embedded scenes: pure, readable, and described by their captions. Oracles: Pillow, Little CMS, scipy, geometry."""

import hashlib
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from scipy import ndimage

from isocost.data.synthetic import scenes
from isocost.data.synthetic.scenes import Group, Scene
from isocost.errors import ConfigError

MANY = [scenes.scene(11, index) for index in range(10_000)]
PRINT_DIGEST = "import test_scenes; print(test_scenes.digest_of_some())"


def group(shape="circle", colour="white", size="large", texture="plain", centres=((16.0, 16.0),), diameter=12.0):
    return Group(shape, colour, size, texture, diameter, centres)


def digest_of_some():
    picked = [scenes.scene(5, index) for index in (3, 99, 10**12)]
    drawn = [scenes.render(one, 32).tobytes() + repr((one, scenes.captions(one))).encode() for one in picked]
    return hashlib.sha256(b"".join(drawn)).hexdigest()


def backdrop(background, resolution):
    return scenes.render(Scene((), background, None), resolution)


def lab(colours):
    """[..., 3] uint8 sRGB to CIELAB by Little CMS."""
    flat = np.asarray(colours, dtype=np.uint8).reshape(1, -1, 3)
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    raw = np.array(ImageCms.applyTransform(Image.fromarray(flat), transform))[0]
    return np.concatenate([raw[:, :1] * (100 / 255), raw[:, 1:].view(np.int8)], axis=1)


# --- a pure function of (seed, index) ---------------------------------------------------------------------------------


def test_order_and_global_state_do_not_matter():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    indices = [7, 0, 3, 2**63, 1]
    forward = {index: scenes.scene(4, index) for index in indices}
    backward = {index: scenes.scene(4, index) for index in reversed(indices)}
    assert forward == backward
    for one in forward.values():
        first = scenes.render(one, 32)
        first_copy = first.copy()
        first[:] = 0  # the caller may write on what it gets
        assert np.array_equal(scenes.render(one, 32), first_copy)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_another_process_draws_the_same():
    printed = subprocess.check_output([sys.executable, "-c", PRINT_DIGEST], cwd=Path(__file__).parent, text=True)
    assert printed.strip() == digest_of_some()


def test_seed_and_index_both_count():
    assert len({scenes.scene(seed, index) for seed in range(20) for index in range(20)}) == 400


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (2**64, 0), (0, 2**64)])
def test_keys_out_of_range_are_refused(seed, index):
    with pytest.raises(ConfigError, match="must lie between"):
        scenes.scene(seed, index)


# --- variety ----------------------------------------------------------------------------------------------------------


def test_over_a_million_attribute_combinations_and_all_are_drawn():
    """The arithmetic of the grammar, from what is seen in draws: every look of a group occurs, every colour and background."""

    def looks(num_groups):
        chosen = [one for one in MANY if len(one.groups) == num_groups]
        return {(each.shape, each.size, each.texture, each.count) for one in chosen for each in one.groups}

    colours = {background: set() for background in scenes.BACKGROUNDS}
    for one in MANY:
        colours[one.background] |= {each.colour for each in one.groups}
    num_colours = [len(seen) for seen in colours.values()]
    one_group = sum(num_colours) * len(looks(1))
    two_groups = sum(n * (n - 1) for n in num_colours) * len(looks(2)) ** 2 * 2
    assert scenes.num_attribute_combinations() == one_group + two_groups > 10**6


def test_scenes_hardly_repeat():
    """Of n draws from N equal combinations n^2 / 2N pairs coincide; with over 10^6 even of uneven weight, few of 5000."""
    labels = [tuple(scenes.attribute_labels(one)) for one in MANY if one.relation]
    assert 4800 < len(labels) < 5200  # about half of the scenes have two groups
    assert len(labels) - len(set(labels)) < 13
    images = {scenes.render(one, 32).tobytes() for one in MANY[:1000]}
    assert len(images) == 1000


def test_every_class_occurs():
    labels = np.stack([scenes.attribute_labels(one) for one in MANY])
    assert labels.dtype == np.int64
    for column, num_classes in zip(labels.T, scenes.ATTRIBUTES.values(), strict=True):
        assert set(column.tolist()) == set(range(num_classes))
    relations = [one.relation for one in MANY if one.relation]
    assert all(0.22 < relations.count(relation) / len(relations) < 0.28 for relation in scenes.RELATIONS)


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [32, 64])
def test_finer_is_the_same_image(resolution):
    """An image at twice the resolution, averaged by Pillow over 2 x 2 pixels, is the image."""
    for one in MANY[:150]:
        fine = Image.fromarray(scenes.render(one, 2 * resolution)).resize((resolution, resolution), Image.Resampling.BOX)
        difference = np.abs(np.asarray(fine, dtype=float) - scenes.render(one, resolution))
        assert difference.mean() < 1.4, one
        assert difference.max() < 100, one  # a corner's pixel


R = 6.0
NOTCH, TIP = 0.52 * R, 1.06 * R
AREAS = {  # of shapes of diameter 12
    "circle": math.pi * R**2,
    "square": (2 * 0.94 * R) ** 2,
    "triangle": 2 * R * 1.9 * R / 2,
    "diamond": 2 * R**2,
    "star": 10 * NOTCH * TIP * math.sin(math.pi / 5) / 2,
    "cross": 2 * (2 * R) * (0.68 * R) - (0.68 * R) ** 2,
    "ring": math.pi * (R**2 - (R / 2) ** 2),
    "heart": (1.65 * R) ** 2 * (math.pi / 8 + 1 / 2),  # two half discs of radius sqrt(2)/4 on a square of area 1/2
}


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("resolution", [32, 96])
def test_area_is_that_of_the_shape(shape, resolution):
    """Analytic anti-aliasing keeps the area, wherever the object stands between the pixels."""
    for centre in ((16.0, 16.0), (15.37, 16.81)):
        image = scenes.render(Scene((group(shape, "white", centres=(centre,)),), "black", None), resolution)
        ground = float(backdrop("black", resolution)[0, 0, 0])
        cover = (image[..., 0].astype(float) - ground) / (255 - ground)
        assert cover.sum() * (32 / resolution) ** 2 == pytest.approx(AREAS[shape], rel=0.025)


def test_objects_stand_apart_and_are_as_many_as_the_labels_say():
    """Connected components of what is not background, assigned to a group by colour: number, order and size."""
    resolution, pixel = 96, 32 / 96
    for one in MANY[:250]:
        image, ground = (a.astype(int) for a in (scenes.render(one, resolution), backdrop(one.background, resolution)))
        components, number = ndimage.label(np.abs(image - ground).sum(axis=-1) > 30, structure=np.ones((3, 3)))
        inks = np.array([scenes.COLOURS[each.colour][0] for each in one.by_position()])
        boxes = [[] for _ in inks]
        for label, box in enumerate(ndimage.find_objects(components), start=1):
            colours = image[components == label]
            counts = [(np.abs(colours - ink).sum(axis=-1) < 12).sum() for ink in inks]
            boxes[int(np.argmax(counts))].append([(extent.start * pixel, extent.stop * pixel) for extent in box[::-1]])
        assert number == sum(each.count for each in one.groups), one
        assert [len(found) for found in boxes] == [each.count for each in one.by_position()], one
        for each, found in zip(one.by_position(), boxes, strict=True):
            across = [max(stop - start for start, stop in box) for box in found]
            low, high = (6, 7.4) if each.size == "small" else (11, 13.2)
            assert low <= min(across) <= max(across) <= high, one
        if one.relation:
            axis = 0 if one.relation in ("left of", "right of") else 1
            first, second = (np.array(found) for found in boxes)
            assert first[:, axis, 1].max() < second[:, axis, 0].min(), one


def test_left_of_does_not_look_like_above():
    for one in MANY:
        if one.relation:
            here, there = (np.mean(each.centres, axis=0) for each in one.groups)
            along, across = np.abs(there - here)[:: 1 if one.relation in ("left of", "right of") else -1]
            assert across < 0.75 * along, one


def test_nothing_leaves_the_image():
    for one in MANY:
        for each in one.groups:
            assert np.min(each.centres) - each.diameter / 2 > 0
            assert np.max(each.centres) + each.diameter / 2 < 32


def test_colours_contrast():
    """CIE76 distances of at least 45 to every height of the background, 30 between colours, 35 to the texture's shade."""
    inks, shades = (lab([pair[which] for pair in scenes.COLOURS.values()]) for which in (0, 1))
    names = list(scenes.COLOURS)
    for background in scenes.BACKGROUNDS:
        ground = lab(backdrop(background, 32)[:, 0])
        visible = scenes.visible_colours(background)
        assert len(visible) >= 5
        for colour in visible:
            assert np.linalg.norm(ground - inks[names.index(colour)], axis=1).min() > 45, (colour, background)
    between = np.linalg.norm(inks[:, None] - inks, axis=-1) + 1000 * np.eye(len(inks))
    assert between.min() > 30
    assert np.linalg.norm(inks - shades, axis=1).min() > 35
    assert all(each.colour in scenes.visible_colours(one.background) for one in MANY for each in one.groups)
    assert all(len({each.colour for each in one.groups}) == len(one.groups) for one in MANY)


@pytest.mark.parametrize("shape", [shape for shape in scenes.SHAPES if shape not in scenes.SLENDER])
def test_textures_can_be_told_apart_at_32(shape):
    """Each texture, at any place between the pixels, is nearer to its own drawing elsewhere than to the other textures'."""

    def spectrum(texture, x, y):
        image = scenes.render(Scene((group(shape, "black", texture=texture, centres=((x, y),)),), "white", None), 32)
        return np.abs(np.fft.fft2(image[..., 0].astype(float)))

    drawn = {texture: [spectrum(texture, 16 + d, 16 + e) for d in (0, 0.5) for e in (0, 0.5)] for texture in scenes.TEXTURES}
    for texture in scenes.TEXTURES:
        probe = spectrum(texture, 13.25, 18.7)
        distance = {other: min(np.linalg.norm(probe - each) for each in drawn[other]) for other in scenes.TEXTURES}
        mine = distance.pop(texture)
        assert mine < 0.6 * min(distance.values()), (texture, mine, distance)


@pytest.mark.parametrize(("texture", "number", "aspect"), [("striped", 3, 5), ("dotted", 9, 1), ("checkered", 8, 1)])
def test_textures_are_what_their_names_say(texture, number, aspect):
    """On a square: three bars, nine round dots, or every second one of sixteen cells."""
    image = scenes.render(Scene((group("square", "black", texture=texture),), "white", None), 256)[..., 0]
    ink, shade = (pair[0] for pair in scenes.COLOURS["black"])
    assert np.ptp(image[84, 86:170]) == 0  # the outline is whole
    patches, found = ndimage.label(np.abs(image.astype(int) - shade) < 0.3 * (shade - ink))
    sizes = np.array([[box[1].stop - box[1].start, box[0].stop - box[0].start] for box in ndimage.find_objects(patches)])
    sizes = sizes[sizes.min(axis=1) > 4]  # leaves out the line where the outer edge passes through the shade's grey
    filled = ndimage.sum_labels(np.ones_like(image), patches, range(1, found + 1)) / sizes.prod(axis=1)
    assert len(sizes) == number
    assert np.allclose(sizes[:, 0] / sizes[:, 1], aspect, rtol=0.45)
    assert np.all(filled < 0.85) if texture == "dotted" else np.all(filled > 0.95)


def test_small_and_slender_objects_are_plain():
    for one in MANY:
        for each in one.groups:
            assert each.texture == "plain" or (each.size == "large" and each.shape not in ("star", "cross", "ring"))


def test_backgrounds_differ():
    grounds = [lab(backdrop(background, 32)[:, 0]) for background in scenes.BACKGROUNDS]
    for i, here in enumerate(grounds):
        for there in grounds[:i]:
            assert np.linalg.norm(here - there, axis=1).mean() > 20


def test_too_few_pixels_are_refused():
    assert scenes.render(MANY[0], 8).shape == (8, 8, 3)
    with pytest.raises(ConfigError, match="use 8 or more"):
        scenes.render(MANY[0], 7)


# --- captions and labels ----------------------------------------------------------------------------------------------


def test_captions_by_hand():
    pair = group("circle", "red", "small", "plain", ((6, 8), (6, 20)), 6.5)
    star = group("star", "blue", centres=((24, 16),))
    assert scenes.captions(Scene((pair, star), "grey", "left of")) == (
        "two small plain red circles to the left of a large plain blue star on a grey background",
        "a large plain blue star to the right of two small plain red circles on a grey background",
        "a grey background with two small plain red circles left of a large plain blue star",
    )
    crosses = group("cross", "orange", "small", "plain", ((4, 20), (12, 20), (20, 20)), 6.5)
    heart = group("heart", "pink", texture="dotted", centres=((16, 8),))
    assert scenes.captions(Scene((crosses, heart), "olive", "below")) == (
        "three small plain orange crosses below a large dotted pink heart on an olive background",
        "a large dotted pink heart above three small plain orange crosses on an olive background",
        "an olive background with three small plain orange crosses below a large dotted pink heart",
    )
    assert scenes.captions(Scene((heart,), "sky", None)) == (
        "a large dotted pink heart on a sky background",
        "there is a large dotted pink heart on a sky background",
        "a sky background with a large dotted pink heart",
    )
    assert (
        scenes.captions(Scene((crosses,), "navy", None))[1] == "there are three small plain orange crosses on a navy background"
    )
    assert [scenes.with_article(noun) for noun in ("orange heart", "blue ring")] == ["an orange heart", "a blue ring"]
    assert [scenes.plural(noun) for noun in ("cross", "square")] == ["crosses", "squares"]


def test_labels_by_hand():
    crosses = group("cross", "orange", "small", "plain", ((4, 20), (12, 20), (20, 20)), 6.5)
    heart = group("heart", "pink", texture="dotted", centres=((16, 8),))
    wanted = ("olive", "stacked", "one", "heart", "pink", "large", "dotted", "three", "cross", "orange", "small", "plain")
    for one in (Scene((crosses, heart), "olive", "below"), Scene((heart, crosses), "olive", "above")):
        assert named(scenes.attribute_labels(one)) == wanted
    alone = named(scenes.attribute_labels(Scene((heart,), "sky", None)))
    assert alone == ("sky", "one group", "one", "heart", "pink", "large", "dotted", *["none"] * 5)


def named(labels):
    return tuple(classes[label] for classes, label in zip(scenes.CLASSES.values(), labels, strict=True))


GROUP = r"(a|two|three|four) (small|large) (plain|striped|dotted|checkered) (\w+) (\w+)"
READINGS = [
    re.compile(
        rf"^(?:there (?:is|are) )?{GROUP}(?: (to the left of|to the right of|above|below) {GROUP})? on an? (\w+) background$"
    ),
    re.compile(rf"^an? (\w+) background with {GROUP}(?: (left of|right of|above|below) {GROUP})?$"),
]
SINGULAR = {"crosses": "cross", **{f"{shape}s": shape for shape in scenes.SHAPES if shape != "cross"}}


def reread(caption):
    """Labels by words from a caption alone."""
    found = next(reading.match(caption) for reading in READINGS if reading.match(caption))
    words = list(found.groups())
    background = words.pop(0) if found.re is READINGS[1] else words.pop()
    here, relation, there = words[:5], words[5], words[6:]

    def look(count, size, texture, colour, shape):
        return ("one", shape, colour, size, texture) if count == "a" else (count, SINGULAR[shape], colour, size, texture)

    if relation is None:
        return (background, "one group", *look(*here), *["none"] * 5)
    if "right" in relation or relation == "below":
        here, there = there, here
    return (background, "side by side" if "of" in relation else "stacked", *look(*here), *look(*there))


def test_captions_say_what_the_labels_say():
    for one in MANY[:2000]:
        said = scenes.captions(one)
        assert len(set(said)) == 3
        for caption in said:
            assert reread(caption) == named(scenes.attribute_labels(one)), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)
