"""The synthetic scenes are pure functions, recognisable and fully described. Oracles: Pillow, Little CMS, scipy, geometry."""

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

SCENES = [scenes.scene(11, index) for index in range(10_000)]
PRINT_DIGEST = "import test_scenes; print(test_scenes.digest_of_scenes())"


def make_group(shape="circle", colour="white", size="large", texture="plain", centres=((16.0, 16.0),), diameter=12.0):
    return Group(shape, colour, size, texture, diameter, centres)


def digest_of_scenes():
    picked = [scenes.scene(5, index) for index in (3, 99, 10**12)]
    contents = [scenes.render(scene, 32).tobytes() + repr((scene, scenes.captions(scene))).encode() for scene in picked]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def render_background(background, resolution):
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
    for scene in forward.values():
        first = scenes.render(scene, 32)
        first_copy = first.copy()
        first[:] = 0  # the caller may change the result
        assert np.array_equal(scenes.render(scene, 32), first_copy)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.slow
def test_another_process_renders_the_same():
    printed = subprocess.check_output([sys.executable, "-c", PRINT_DIGEST], cwd=Path(__file__).parent, text=True)
    assert printed.strip() == digest_of_scenes()


def test_a_scene_depends_on_seed_and_index():
    assert len({scenes.scene(seed, index) for seed in range(20) for index in range(20)}) == 400


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (2**64, 0), (0, 2**64)])
def test_keys_out_of_range_are_refused(seed, index):
    with pytest.raises(ConfigError, match="must be between"):
        scenes.scene(seed, index)


# --- variety ----------------------------------------------------------------------------------------------------------


def test_there_are_over_a_million_attribute_combinations():
    """The number follows from the group attributes and colours in sampled scenes; all of the grammar occurs in them."""

    def looks(num_groups):
        selected = [scene for scene in SCENES if len(scene.groups) == num_groups]
        return {(group.shape, group.size, group.texture, group.count) for scene in selected for group in scene.groups}

    colours = {background: set() for background in scenes.BACKGROUNDS}
    for scene in SCENES:
        colours[scene.background] |= {group.colour for group in scene.groups}
    num_colours = [len(seen) for seen in colours.values()]
    one_group = sum(num_colours) * len(looks(1))
    two_groups = sum(n * (n - 1) for n in num_colours) * len(looks(2)) ** 2 * 2
    assert scenes.num_attribute_combinations() == one_group + two_groups > 10**6


def test_scenes_rarely_repeat():
    """n draws from N equally likely combinations have n^2 / 2N equal pairs: few of 5000, even if the weights are uneven."""
    labels = [tuple(scenes.attribute_labels(scene)) for scene in SCENES if scene.relation]
    assert 4800 < len(labels) < 5200  # about half of the scenes have two groups
    assert len(labels) - len(set(labels)) < 13
    images = {scenes.render(scene, 32).tobytes() for scene in SCENES[:1000]}
    assert len(images) == 1000


def test_every_class_occurs():
    labels = np.stack([scenes.attribute_labels(scene) for scene in SCENES])
    assert labels.dtype == np.int64
    for column, num_classes in zip(labels.T, scenes.ATTRIBUTES.values(), strict=True):
        assert set(column.tolist()) == set(range(num_classes))
    relations = [scene.relation for scene in SCENES if scene.relation]
    assert all(0.22 < relations.count(relation) / len(relations) < 0.28 for relation in scenes.RELATIONS)


# --- rendering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [32, 64])
def test_a_finer_image_shows_the_same(resolution):
    """An image at twice the resolution, averaged by Pillow over 2 x 2 pixels, equals the image."""
    for scene in SCENES[:150]:
        fine = Image.fromarray(scenes.render(scene, 2 * resolution)).resize((resolution, resolution), Image.Resampling.BOX)
        difference = np.abs(np.asarray(fine, dtype=float) - scenes.render(scene, resolution))
        assert difference.mean() < 1.4, scene
        assert difference.max() < 100, scene  # a pixel at a corner


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
def test_the_rendered_area_is_the_area_of_the_shape(shape, resolution):
    """Analytic anti-aliasing preserves the area at any subpixel position."""
    for centre in ((16.0, 16.0), (15.37, 16.81)):
        image = scenes.render(Scene((make_group(shape, "white", centres=(centre,)),), "black", None), resolution)
        ground = float(render_background("black", resolution)[0, 0, 0])
        cover = (image[..., 0].astype(float) - ground) / (255 - ground)
        assert cover.sum() * (32 / resolution) ** 2 == pytest.approx(AREAS[shape], rel=0.025)


def test_objects_do_not_touch_and_their_number_and_size_agree_with_the_labels():
    """Connected components of the foreground, assigned to a group by colour: number, order and size."""
    resolution, pixel = 96, 32 / 96
    for scene in SCENES[:250]:
        image = scenes.render(scene, resolution).astype(int)
        ground = render_background(scene.background, resolution).astype(int)
        components, number = ndimage.label(np.abs(image - ground).sum(axis=-1) > 30, structure=np.ones((3, 3)))
        inks = np.array([scenes.COLOURS[group.colour][0] for group in scene.by_position()])
        boxes = [[] for _ in inks]
        for label, box in enumerate(ndimage.find_objects(components), start=1):
            colours = image[components == label]
            counts = [(np.abs(colours - ink).sum(axis=-1) < 12).sum() for ink in inks]
            boxes[int(np.argmax(counts))].append([(extent.start * pixel, extent.stop * pixel) for extent in box[::-1]])
        assert number == sum(group.count for group in scene.groups), scene
        assert [len(group_boxes) for group_boxes in boxes] == [group.count for group in scene.by_position()], scene
        for group, group_boxes in zip(scene.by_position(), boxes, strict=True):
            sizes = [max(stop - start for start, stop in box) for box in group_boxes]
            low, high = (6, 7.4) if group.size == "small" else (11, 13.2)
            assert low <= min(sizes) <= max(sizes) <= high, scene
        if scene.relation:
            axis = 0 if scene.relation in ("left of", "right of") else 1
            first, second = (np.array(group_boxes) for group_boxes in boxes)
            assert first[:, axis, 1].max() < second[:, axis, 0].min(), scene


def test_horizontal_and_vertical_relations_are_distinguishable():
    for scene in SCENES:
        if scene.relation:
            first, second = (np.mean(group.centres, axis=0) for group in scene.groups)
            along, across = np.abs(second - first)[:: 1 if scene.relation in ("left of", "right of") else -1]
            assert across < 0.75 * along, scene


def test_objects_are_inside_the_image():
    for scene in SCENES:
        for group in scene.groups:
            assert np.min(group.centres) - group.diameter / 2 > 0
            assert np.max(group.centres) + group.diameter / 2 < 32


def test_colours_contrast():
    """CIE76 distances: at least 45 to every height of the background, 30 between colours, 35 to the texture's colour."""
    inks, shades = (lab([pair[index] for pair in scenes.COLOURS.values()]) for index in (0, 1))
    names = list(scenes.COLOURS)
    for background in scenes.BACKGROUNDS:
        ground = lab(render_background(background, 32)[:, 0])
        visible = scenes.visible_colours(background)
        assert len(visible) >= 5
        for colour in visible:
            assert np.linalg.norm(ground - inks[names.index(colour)], axis=1).min() > 45, (colour, background)
    between = np.linalg.norm(inks[:, None] - inks, axis=-1) + 1000 * np.eye(len(inks))
    assert between.min() > 30
    assert np.linalg.norm(inks - shades, axis=1).min() > 35
    assert all(group.colour in scenes.visible_colours(scene.background) for scene in SCENES for group in scene.groups)
    assert all(len({group.colour for group in scene.groups}) == len(scene.groups) for scene in SCENES)


@pytest.mark.parametrize("shape", [shape for shape in scenes.SHAPES if shape not in scenes.SLENDER])
def test_textures_are_distinguishable_at_32_pixels(shape):
    """A texture is closer to its own renderings at other subpixel positions than to those of the other textures."""

    def spectrum(texture, x, y):
        image = scenes.render(Scene((make_group(shape, "black", texture=texture, centres=((x, y),)),), "white", None), 32)
        return np.abs(np.fft.fft2(image[..., 0].astype(float)))

    shifts = [(dx, dy) for dx in (0, 0.5) for dy in (0, 0.5)]
    spectra = {texture: [spectrum(texture, 16 + dx, 16 + dy) for dx, dy in shifts] for texture in scenes.TEXTURES}
    for texture in scenes.TEXTURES:
        query = spectrum(texture, 13.25, 18.7)
        distances = {name: min(np.linalg.norm(query - candidate) for candidate in spectra[name]) for name in scenes.TEXTURES}
        own_distance = distances.pop(texture)
        assert own_distance < 0.6 * min(distances.values()), (texture, own_distance, distances)


@pytest.mark.parametrize(("texture", "number", "aspect"), [("striped", 3, 5), ("dotted", 9, 1), ("checkered", 8, 1)])
def test_textures_look_as_their_names_say(texture, number, aspect):
    """On a square: three bars, nine round dots, or every second of sixteen cells."""
    image = scenes.render(Scene((make_group("square", "black", texture=texture),), "white", None), 256)[..., 0]
    ink, shade = (pair[0] for pair in scenes.COLOURS["black"])
    assert np.ptp(image[84, 86:170]) == 0  # the outline has no gap
    patches, num_patches = ndimage.label(np.abs(image.astype(int) - shade) < 0.3 * (shade - ink))
    sizes = np.array([[box[1].stop - box[1].start, box[0].stop - box[0].start] for box in ndimage.find_objects(patches)])
    sizes = sizes[sizes.min(axis=1) > 4]  # removes the line where the anti-aliased outer edge has the grey of the texture
    filled = ndimage.sum_labels(np.ones_like(image), patches, range(1, num_patches + 1)) / sizes.prod(axis=1)
    assert len(sizes) == number
    assert np.allclose(sizes[:, 0] / sizes[:, 1], aspect, rtol=0.45)
    assert np.all(filled < 0.85) if texture == "dotted" else np.all(filled > 0.95)


def test_small_and_slender_objects_are_plain():
    for scene in SCENES:
        for group in scene.groups:
            assert group.texture == "plain" or (group.size == "large" and group.shape not in ("star", "cross", "ring"))


def test_backgrounds_differ():
    grounds = [lab(render_background(background, 32)[:, 0]) for background in scenes.BACKGROUNDS]
    for i, first in enumerate(grounds):
        for second in grounds[:i]:
            assert np.linalg.norm(first - second, axis=1).mean() > 20


def test_too_few_pixels_are_refused():
    assert scenes.render(SCENES[0], 8).shape == (8, 8, 3)
    with pytest.raises(ConfigError, match="use 8 or more"):
        scenes.render(SCENES[0], 7)


# --- captions and labels ----------------------------------------------------------------------------------------------


def test_captions_of_known_scenes():
    pair = make_group("circle", "red", "small", "plain", ((6, 8), (6, 20)), 6.5)
    star = make_group("star", "blue", centres=((24, 16),))
    assert scenes.captions(Scene((pair, star), "grey", "left of")) == (
        "two small plain red circles to the left of a large plain blue star on a grey background",
        "a large plain blue star to the right of two small plain red circles on a grey background",
        "a grey background with two small plain red circles left of a large plain blue star",
    )
    crosses = make_group("cross", "orange", "small", "plain", ((4, 20), (12, 20), (20, 20)), 6.5)
    heart = make_group("heart", "pink", texture="dotted", centres=((16, 8),))
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


def test_labels_of_known_scenes():
    crosses = make_group("cross", "orange", "small", "plain", ((4, 20), (12, 20), (20, 20)), 6.5)
    heart = make_group("heart", "pink", texture="dotted", centres=((16, 8),))
    expected = ("olive", "stacked", "one", "heart", "pink", "large", "dotted", "three", "cross", "orange", "small", "plain")
    for scene in (Scene((crosses, heart), "olive", "below"), Scene((heart, crosses), "olive", "above")):
        assert class_names(scenes.attribute_labels(scene)) == expected
    single_group = class_names(scenes.attribute_labels(Scene((heart,), "sky", None)))
    assert single_group == ("sky", "one group", "one", "heart", "pink", "large", "dotted", *["none"] * 5)


def class_names(labels):
    return tuple(classes[label] for classes, label in zip(scenes.CLASSES.values(), labels, strict=True))


GROUP = r"(a|two|three|four) (small|large) (plain|striped|dotted|checkered) (\w+) (\w+)"
CAPTION_PATTERNS = [
    re.compile(
        rf"^(?:there (?:is|are) )?{GROUP}(?: (to the left of|to the right of|above|below) {GROUP})? on an? (\w+) background$"
    ),
    re.compile(rf"^an? (\w+) background with {GROUP}(?: (left of|right of|above|below) {GROUP})?$"),
]
SINGULAR = {"crosses": "cross", **{f"{shape}s": shape for shape in scenes.SHAPES if shape != "cross"}}


def labels_from_caption(caption):
    """Class names read from a caption only."""
    match = next(pattern.match(caption) for pattern in CAPTION_PATTERNS if pattern.match(caption))
    words = list(match.groups())
    background = words.pop(0) if match.re is CAPTION_PATTERNS[1] else words.pop()
    first, relation, second = words[:5], words[5], words[6:]

    def look(count, size, texture, colour, shape):
        return ("one", shape, colour, size, texture) if count == "a" else (count, SINGULAR[shape], colour, size, texture)

    if relation is None:
        return (background, "one group", *look(*first), *["none"] * 5)
    if "right" in relation or relation == "below":
        first, second = second, first
    return (background, "side by side" if "of" in relation else "stacked", *look(*first), *look(*second))


def test_captions_agree_with_the_labels():
    for scene in SCENES[:2000]:
        captions = scenes.captions(scene)
        assert len(set(captions)) == 3
        for caption in captions:
            assert labels_from_caption(caption) == class_names(scenes.attribute_labels(scene)), caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)
