"""Image files: formats that are opened, pixels in every reader, suffixes, files that are ignored, links, names."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from isocost.config.data import FolderSource, HubSource, WebdatasetSource
from isocost.data.datasets import Sample, UnreadableSample, name_hash, read_source, source_fingerprint
from isocost.data.dreambooth import read_subjects
from isocost.data.image_files import FORMATS, IMAGE_SUFFIXES, UnreadableImage, list_images, read_image_file, read_rgb
from isocost.errors import ConfigError
from isocost.evaluation.image_sources import image_id, images_by_id, iter_images
from isocost.evaluation.protocol_presets import Crops
from isocost.evaluation.reference_stats import _iter_crops

SRC = Path(__file__).resolve().parents[1] / "src" / "isocost"
R = 16
CAPTION = "a can"


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: int = R) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def folder_of(root: Path, files: dict[str, bytes], listed: bool = True) -> FolderSource:
    """A folder of files; those with images are listed, or have a .txt file."""
    lines = []
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
        lines.append(json.dumps({"file": name, "caption": CAPTION}))
        if not listed:
            (root / name).with_suffix(".txt").write_text(CAPTION)
    if listed:
        (root / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return FolderSource(kind="folder", path=str(root))


def tar_of(file: Path, members: dict[str, bytes]) -> WebdatasetSource:
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return WebdatasetSource(kind="webdataset", path=str(file))


def split(items: Any) -> tuple[dict[str, Sample], dict[str, str]]:
    """The samples, and the reasons of the unreadable ones, by name."""
    items = list(items)
    return (
        {item.name: item for item in items if isinstance(item, Sample)},
        {item.name: item.reason for item in items if isinstance(item, UnreadableSample)},
    )


# --- every reader of images, as a function from the content of a .png file to its pixels ------------------------------


def by_folder(root: Path, data: bytes) -> np.ndarray:
    return one_sample(folder_of(root, {"0.png": data}))


def by_shard(root: Path, data: bytes) -> np.ndarray:
    return one_sample(tar_of(root / "x.tar", {"0.png": data, "0.txt": b"a"}))


def by_parquet(root: Path, data: bytes) -> np.ndarray:
    images = pa.array([{"bytes": data, "path": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": images, "captions": pa.array([["a"]])}), root / "train.parquet")
    return one_sample(HubSource(kind="hub", path=str(root / "train.parquet")))


def one_sample(source: Any) -> np.ndarray:
    (item,) = read_source(source, R)
    if isinstance(item, UnreadableSample):
        raise ConfigError(item.reason)
    assert isinstance(item, Sample)
    return item.image


def by_score_folder(root: Path, data: bytes) -> np.ndarray:
    (root / "0.png").write_bytes(data)
    (image,) = iter_images(str(root), resolution=R, exact=False)
    return image.pixels.permute(1, 2, 0).numpy()


def by_score_pairs(root: Path, data: bytes) -> np.ndarray:
    (root / "0.png").write_bytes(data)
    return images_by_id(str(root), resolution=R, exact=False)["0"]().pixels.permute(1, 2, 0).numpy()


def by_crops(root: Path, data: bytes) -> np.ndarray:
    (root / "0.png").write_bytes(data)
    (image,) = _iter_crops(root, Crops(num=1, num_sources=1, side=R))
    return image.pixels.permute(1, 2, 0).numpy()


def by_dreambooth(root: Path, data: bytes) -> np.ndarray:
    (root / "prompts_and_classes.txt").write_text(
        "can,can\nPrompts\nprompt_list = [\n'a {0} {1}'.format(unique_token, class_token)\n]\nprompt_list = [\n]\n"
    )
    (root / "can").mkdir()
    (root / "can" / "0.png").write_bytes(data)
    (subject,) = read_subjects(root, (), R)
    return subject.images[0].permute(1, 2, 0).numpy()


def by_upscale(root: Path, data: bytes) -> np.ndarray:
    from isocost.sampling.upscale import _read

    (root / "0.png").write_bytes(data)
    return _read(root / "0.png").permute(1, 2, 0).numpy()


def by_report(root: Path, data: bytes) -> np.ndarray:
    from isocost.report.report_data import read_image_row

    (root / "0.png").write_bytes(data)
    return read_image_row(root / "0.png")[0]


READERS: list[Callable[[Path, bytes], np.ndarray]] = [
    *(by_folder, by_shard, by_parquet, by_score_folder, by_score_pairs, by_crops, by_dreambooth, by_upscale, by_report)
]
with_every_reader = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)

# --- formats ----------------------------------------------------------------------------------------------------------

EPS = encoded(Image.new("RGB", (R, R), "red"), "EPS")
FOREIGN = {
    "EPS": EPS,
    "EPS with a preview": b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + len(EPS).to_bytes(4, "little") + bytes(20) + EPS,
    "PDF": encoded(Image.new("RGB", (R, R)), "PDF"),
    "ICO": encoded(Image.new("RGB", (R, R)), "ICO"),
    "TGA": encoded(Image.new("RGB", (R, R)), "TGA"),
    "XBM": encoded(Image.new("1", (R, R)), "XBM"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "nothing": b"",
}


@with_every_reader
@pytest.mark.parametrize("kind", FOREIGN)
def test_another_format_named_png_starts_no_program_and_gives_one_line(
    reader: Callable[[Path, bytes], np.ndarray], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *args, **kwargs: started.append(args))
    with pytest.raises(ConfigError, match=r"image (cannot be read|bytes)|no image bytes") as refused:
        reader(tmp_path, FOREIGN[kind])
    assert not started
    assert "\n" not in str(refused.value)
    if kind.startswith("EPS"):
        assert "PostScript" in str(refused.value)


READS_IMAGES = {"open", "imread", "read_image", "decode_image", "decode_png", "decode_jpeg", "default_loader", "ImageFolder"}
IMAGE_MODULES = ("PIL", "torchvision.io", "torchvision.datasets", "imageio", "cv2", "skimage", "matplotlib.image")


def image_readers_of(code: str) -> list[str]:
    """Calls in a module that decode an image file with the default list of formats."""
    tree = ast.parse(code)
    modules, functions = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full.startswith(IMAGE_MODULES):
                    (functions if alias.name in READS_IMAGES else modules).add(alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            modules |= {
                alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name.startswith(IMAGE_MODULES)
            }
    calls = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in READS_IMAGES and ast.unparse(node.value).split(".")[0] in modules:
            calls.append(ast.unparse(node))
        if isinstance(node, ast.Name) and node.id in functions:
            calls.append(node.id)
    return calls


def test_only_one_module_opens_images_and_it_names_its_formats() -> None:
    found = {
        str(file.relative_to(SRC)): calls
        for file in SRC.rglob("*.py")
        if (calls := image_readers_of(file.read_text(encoding="utf-8")))
    }
    jpeg_only = {"data/degradations.py": ["decode_jpeg"]}  # of tensors that it has encoded itself
    assert found == {"data/image_files.py": ["Image.open"], **jpeg_only}
    code = (SRC / "data" / "image_files.py").read_text(encoding="utf-8")
    (call,) = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "Image.open"
    ]
    assert [ast.unparse(keyword) for keyword in call.keywords] == ["formats=FORMATS"]


@pytest.mark.parametrize(
    "code",
    [
        "from PIL import Image\nImage.open('x')",
        "from PIL import Image as I\nI.open('x')",
        "import PIL.Image\nPIL.Image.open('x')",
        "from PIL.Image import open as read\nread('x')",
        "from torchvision.io import read_image\nread_image('x')",
        "import matplotlib.image as m\nm.imread('x')",
        "from PIL import Image\nmap(Image.open, files)",
    ],
)
def test_the_check_finds_other_ways_to_open_an_image(code: str) -> None:
    assert image_readers_of(code)


def test_there_is_one_list_of_image_suffixes() -> None:
    others = [
        file.name
        for file in SRC.rglob("*.py")
        if file.name != "image_files.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in (".jpeg", ".jpg", ".bmp", ".gif", r"\.(jpe?g|png|webp|bmp)$")
    ]
    assert not others


# --- pixels -----------------------------------------------------------------------------------------------------------


def clear_half(mode: str) -> bytes:
    image = Image.new(mode, (R, R), {"LA": (90, 255), "RGBA": (90, 90, 90, 255)}[mode])
    image.paste({"LA": (0, 0), "RGBA": (0, 0, 0, 0)}[mode], (0, 0, R, R // 2))
    return encoded(image)


def palette_with_a_hole() -> bytes:
    image = Image.new("P", (R, R), 1)
    image.putpalette([0, 0, 0, 90, 90, 90])
    image.paste(0, (0, 0, R, R // 2))
    return encoded(image, transparency=0)


GREY16 = np.full((R, R), 90 * 257, dtype=np.uint16)
GREY16[: R // 2] = 65535
TRANSPARENT16 = np.where(GREY16 == 65535, 1000, GREY16).astype(np.uint16)


def with_transparent_level(levels: np.ndarray, level: int) -> bytes:
    """A 16-bit grey PNG with a tRNS chunk, which Pillow does not write itself."""
    import zlib

    data = encoded(Image.fromarray(levels))
    body = b"tRNS" + level.to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return data.replace(data[data.index(b"IDAT") - 4 :], chunk + data[data.index(b"IDAT") - 4 :])


PIXELS = {
    "RGBA": clear_half("RGBA"),
    "LA": clear_half("LA"),
    "palette": palette_with_a_hole(),
    "16-bit grey": encoded(Image.fromarray(GREY16)),
    "16-bit grey TIFF": encoded(Image.fromarray(GREY16), "TIFF"),
    "16-bit grey PGM": b"P5 %d %d 65535\n" % (R, R) + GREY16.astype(">u2").tobytes(),
    "16-bit grey with a transparent level": with_transparent_level(TRANSPARENT16, 1000),
    "transparent TIFF": encoded(Image.open(io.BytesIO(clear_half("RGBA"))), "TIFF"),
    "transparent GIF": encoded(Image.open(io.BytesIO(palette_with_a_hole())), "GIF", transparency=0),
}


@with_every_reader
@pytest.mark.parametrize("kind", PIXELS)
def test_transparent_and_16_bit_images_have_the_same_pixels_in_every_reader(
    reader: Callable[[Path, bytes], np.ndarray], kind: str, tmp_path: Path
) -> None:
    image = reader(tmp_path, PIXELS[kind])
    assert image.shape == (R, R, 3)
    assert (image[: R // 2] == 255).all()
    assert (image[R // 2 :] == 90).all()


@with_every_reader
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF"])
def test_every_reader_turns_an_image_by_its_orientation(
    reader: Callable[[Path, bytes], np.ndarray], kind: str, tmp_path: Path
) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    options: dict[str, Any] = {"quality": 100} if kind in ("JPEG", "AVIF", "WEBP") else {}
    data = encoded(noise(4).resize((R, R), Image.Resampling.NEAREST), kind, exif=tags.tobytes(), **options)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.array_equal(reader(tmp_path, data), expected)


@pytest.mark.parametrize("values", [np.zeros((R, R), np.float32), np.full((R, R), 70000, np.int32)], ids=["float", "int32"])
def test_pixels_without_a_known_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(UnreadableImage, match="of unknown range"):
        read_rgb(encoded(Image.fromarray(values), "TIFF"))


SMALL = {kind: encoded(noise(), kind) for kind in FORMATS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_is_read_or_unreadable_and_nothing_else(kind: str) -> None:
    rng = random.Random(kind)
    messages = []
    for _ in range(150):
        content = bytearray(SMALL[kind])
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(min(len(content), rng.choice((32, 400, len(content)))))] = rng.randrange(256)
        content = content[: rng.randrange(len(content))] if rng.random() < 0.3 else content
        try:
            assert read_rgb(bytes(content)).mode == "RGB"
        except UnreadableImage as error:
            messages.append(str(error))
    assert all(message and "\n" not in message for message in messages)


# --- suffixes ---------------------------------------------------------------------------------------------------------

FORMAT_OF = {".avif": "AVIF", ".gif": "GIF", ".jfif": "JPEG", ".jpe": "JPEG", ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF"}
FORMAT_OF |= {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".pnm": "PPM", ".png": "PNG", ".webp": "WEBP", ".TIF": "TIFF"}
FORMAT_OF |= {".pbm": "PPM", ".pgm": "PPM"}


def test_every_suffix_of_the_list_is_tried() -> None:
    assert {suffix.lower() for suffix in FORMAT_OF} == IMAGE_SUFFIXES


@pytest.mark.parametrize("suffix", FORMAT_OF)
def test_every_suffix_is_read_by_every_reader_of_folders(suffix: str, tmp_path: Path) -> None:
    data = encoded(noise(), FORMAT_OF[suffix])
    folder_of(tmp_path / "listed", {f"7{suffix}": data})
    folder_of(tmp_path / "sidecars", {f"7{suffix}": data}, listed=False)
    for kind in ("listed", "sidecars"):
        samples, bad = split(read_source(FolderSource(kind="folder", path=str(tmp_path / kind)), R))
        assert (list(samples), bad) == ([f"7{suffix}"], {})
    shard = tar_of(tmp_path / "x.tar", {f"7{suffix}": data, "7.txt": b"a"})
    assert list(split(read_source(shard, R))[0]) == ["x.tar/7"]
    assert [image.id for image in iter_images(str(tmp_path / "listed"), resolution=R, exact=False)] == ["7"]
    assert image_id(f"COCO_val2014_00{suffix}") == image_id("0")


@pytest.mark.parametrize("suffix", [".heic", ".jp2", ".jxl", ".svg", ".psd", ".exr", ".cr2"])
def test_other_suffixes_are_counted_and_named(suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder_of(tmp_path / "data", {"0.png": encoded(noise())})
    for number in range(3):
        (tmp_path / "data" / f"{number}{suffix}").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, "isocost"):
        assert len(split(read_source(source, R))[0]) == 1
        list_images(tmp_path / "data")
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'data'}: 3 files are ignored: 3 {suffix}"]
    (tmp_path / "data" / "0.png").unlink()
    with pytest.raises(ConfigError, match=f"no images.*3 {suffix}"):
        list(read_source(source, R))


# --- files that are ignored -----------------------------------------------------------------------------------------

SYSTEM_FILES = [
    ".ipynb_checkpoints/0-checkpoint.png",
    "sub/.ipynb_checkpoints/0.png",
    "._0.png",
    "sub/._1.jpg",
    "__MACOSX/._0.png",
    "__MACOSX/0.png",
    "@eaDir/0.png/SYNOFILE_THUMB_M.jpg",
    ".git/annex/objects/ab/0.png",
    ".thumbnails/0.png",
    "#recycle/0.png",
]


@pytest.mark.parametrize("name", SYSTEM_FILES)
@pytest.mark.parametrize("listed", [True, False])
def test_files_of_systems_and_hidden_files_are_ignored_and_counted(
    name: str, listed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data"
    source = folder_of(root, {"0.png": encoded(noise())}, listed)
    before = source_fingerprint(source)
    for junk in (name, f"{name}.xml"):
        (root / junk).parent.mkdir(parents=True, exist_ok=True)
        (root / junk).write_bytes(b"\x00\x05\x16\x07 no image")
    with caplog.at_level(logging.WARNING, "isocost"):
        samples, bad = split(read_source(source, R))
        assert (list(samples), bad) == (["0.png"], {})
        assert [image.id for image in iter_images(str(root), resolution=R, exact=False)] == ["0"]
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith(f"{root}: 1 files are ignored: 1 in ")
    assert source_fingerprint(source) == before


def test_system_files_in_a_shard_and_among_parquet_files_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = encoded(noise())
    members = {"./._0.png": b"x", "./0.png": data, "./._0.txt": b"x", "./0.txt": b"a", "__MACOSX/0.png": b"x", "README": b"x"}
    with caplog.at_level(logging.WARNING, "isocost"):
        samples, bad = split(read_source(tar_of(tmp_path / "x.tar", members), R))
    assert (list(samples), bad) == (["x.tar/./0"], {})
    assert "3 files are ignored: 1 in ._*, 1 in __MACOSX, 1 in names without a suffix" in caplog.text
    by_parquet(tmp_path, data)
    (tmp_path / "._train.parquet").write_bytes(b"x")
    assert len(split(read_source(HubSource(kind="hub", path=str(tmp_path)), R))[0]) == 1


def test_a_dreambooth_folder_passes_over_system_files(tmp_path: Path) -> None:
    expected = by_dreambooth(tmp_path, encoded(noise()))
    (tmp_path / "can" / "._0.png").write_bytes(b"x")
    (tmp_path / "can" / "1.tif").write_bytes(encoded(noise(), "TIFF"))
    (subject,) = read_subjects(tmp_path, (), R)
    assert [np.array_equal(image.permute(1, 2, 0).numpy(), expected) for image in subject.images] == [True, True]


# --- tar keys ---------------------------------------------------------------------------------------------------------


def test_dots_in_member_names_count_every_image_as_unreadable(tmp_path: Path) -> None:
    members = {"good.png": encoded(noise()), "good.txt": b"a"}
    for number in range(4):
        members |= {f"img_1.5_{number:04d}.png": encoded(noise()), f"img_1.5_{number:04d}.txt": b"a"}
    samples, bad = split(read_source(tar_of(tmp_path / "x.tar", members), R))
    assert list(samples) == ["x.tar/good"]
    assert list(bad) == [f"x.tar/img_1.5_{number:04d}.png" for number in range(4)]
    assert all("first dot" in reason and "4 images have the key img_1" in reason for reason in bad.values())


def test_further_members_of_a_key_do_not_lose_its_sample(tmp_path: Path) -> None:
    members = {"0.mask.png": b"x", "0.png": encoded(noise()), "0.cls": b"7", "0.json": b'{"caption": "a"}', "0.seg.tif": b"x"}
    samples, bad = split(read_source(tar_of(tmp_path / "x.tar", members), R))
    assert (list(samples), bad) == (["x.tar/0"], {})


@pytest.mark.parametrize("twice", ["0.png", "0.txt"])
def test_a_member_that_appears_twice_is_reported(twice: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("0.png", "0.txt", twice):
            data = encoded(noise()) if name == "0.png" else b"a"
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    items = list(read_source(WebdatasetSource(kind="webdataset", path=str(tmp_path / "x.tar")), R))
    reasons = [item.reason for item in items if isinstance(item, UnreadableSample)]
    assert reasons == [f"two members of the key end in {twice[1:]}; keep one"] * (2 if twice == "0.png" else 1)
    assert len(items) == len(reasons)


def test_hard_links_in_a_shard_are_read(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("a")
    (tmp_path / "0.png").write_bytes(encoded(noise()))
    os.link(tmp_path / "0.png", tmp_path / "1.png")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("0.png", "0.txt", "1.png", "1.txt"):
            archive.add(tmp_path / name, name)
    samples, bad = split(read_source(WebdatasetSource(kind="webdataset", path=str(tmp_path / "x.tar")), R))
    assert (len(samples), bad) == (2, {})


# --- links ------------------------------------------------------------------------------------------------------------


def test_listed_links_into_a_store_are_read_and_the_fingerprint_covers_their_content(tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "data"
    store.mkdir()
    source = folder_of(root, {"0.png": encoded(noise()), "sub/1.png": b""})
    (store / "SHA256-abc").write_bytes(encoded(Image.new("RGB", (R, R), "red")))
    (root / "sub" / "1.png").unlink()
    (root / "sub" / "1.png").symlink_to("../../store/SHA256-abc")
    (store / "more").mkdir()
    (store / "more" / "2.png").write_bytes(encoded(noise()))
    (root / "linked").symlink_to(store / "more", target_is_directory=True)
    with (root / "captions.jsonl").open("a") as stream:
        stream.write('{"file": "linked/2.png", "caption": "a"}\n')
    samples, bad = split(read_source(source, R))
    assert (sorted(samples), bad) == (["0.png", "linked/2.png", "sub/1.png"], {})
    assert (samples["sub/1.png"].image == (255, 0, 0)).all()
    before = source_fingerprint(source)
    (store / "more" / "2.png").write_bytes(encoded(Image.new("RGB", (R, R), "blue")))
    assert source_fingerprint(source) != before


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "a\\..\\..\\secret.png", "/etc/secret.png"])
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(noise()))
    source = folder_of(tmp_path / "data", {"0.png": encoded(noise())})
    with (tmp_path / "data" / "captions.jsonl").open("a") as stream:
        stream.write(json.dumps({"file": name, "caption": "a"}) + "\n")
    samples, bad = split(read_source(source, R))
    assert list(samples) == ["0.png"]
    assert "outside" in bad[name]


@pytest.mark.parametrize("listed", [True, False])
def test_a_link_without_target_is_counted_with_its_remedy(listed: bool, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "data", {"0.png": encoded(noise()), "1.png": b""}, listed)
    (tmp_path / "data" / "1.png").unlink()
    (tmp_path / "data" / "1.png").symlink_to("../store/absent")
    samples, bad = split(read_source(source, R))
    assert list(samples) == ["0.png"]
    assert "git annex get" in bad["1.png"]
    with pytest.raises(ConfigError, match=r"1\.png: a link whose target is missing"):
        list(iter_images(str(tmp_path / "data"), resolution=R, exact=False))


def test_a_link_to_its_own_folder_ends(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "data", {"0.png": encoded(noise())})
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data", target_is_directory=True)
    assert list(split(read_source(source, R))[0]) == ["0.png"]


@pytest.mark.parametrize(
    "content", ["version https://git-lfs.github.com/spec/v1\noid sha256:0", "/annex/objects/SHA256E-s1.png"]
)
def test_a_pointer_in_the_position_of_an_image_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_text(content)
    with pytest.raises(ConfigError, match=r"a (Git LFS|git-annex) pointer; run `git (lfs pull|annex get)`"):
        read_image_file(tmp_path / "0.png")


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False])
def test_file_names_that_are_not_utf_8_are_read(listed: bool, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    source = folder_of(tmp_path / "data", {"0.png": encoded(noise()), name: encoded(noise())}, listed)
    samples, bad = split(read_source(source, R))
    assert (list(samples), bad) == (["0.png", "caf\\udce9.png"], {})
    assert source_fingerprint(source)
    for subset in ("train", "test"):
        list(read_source(source.model_copy(update={"subset": subset}), R))
    images = list(iter_images(str(tmp_path / "data"), resolution=R, exact=False))
    assert sorted(image.id for image in images) == ["0", "caf\\udce9"]
    for image in images:
        (image.id + image.name).encode("utf-8")


def test_member_names_that_are_not_utf_8_are_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    source = tar_of(tmp_path / "x.tar", {f"{name}.png": encoded(noise()), f"{name}.txt": b"a"})
    assert list(split(read_source(source, R))[0]) == ["x.tar/caf\\udce9"]


def test_the_hash_of_a_valid_name_is_that_of_its_utf_8_bytes() -> None:
    import hashlib

    assert name_hash("Bär.png") == hashlib.sha256("Bär.png".encode()).digest()


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "\ud83d.png", ".hidden.png"])
def test_a_listed_name_that_cannot_be_a_file_is_one_unreadable_image(name: str, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "data", {"0.png": encoded(noise())})
    with (tmp_path / "data" / "captions.jsonl").open("a") as stream:
        stream.write(json.dumps({"file": name, "caption": "a"}) + "\n")
    samples, bad = split(read_source(source, R))
    assert (list(samples), len(bad)) == (["0.png"], 1)
    assert "\n" not in next(iter(bad.values()))


def test_a_file_without_permission_is_one_unreadable_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "data", {"0.png": encoded(noise()), "1.png": encoded(noise())})
    opened = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "1.png":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", lambda self: refuse(self, "rb").read())
    samples, bad = split(read_source(source, R))
    assert (list(samples), bad) == (["0.png"], {"1.png": "the file cannot be read: Permission denied"})
    assert source_fingerprint(source)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprints_of_folders_that_were_read_the_same_way_before_are_unchanged(tmp_path: Path) -> None:
    import hashlib

    root = tmp_path / "data"
    source = folder_of(root, {"0.png": b"one", "sub/1.jpg": b"two", "listed.gif": b"three"})
    sha = hashlib.sha256()
    for file in sorted(file for file in root.rglob("*") if file.is_file()):
        sha.update(str(file.relative_to(root)).encode() + file.read_bytes())
    assert source_fingerprint(source) == sha.hexdigest()[:16]
    (root / "unlisted.gif").write_bytes(b"four")
    sha.update(b"unlisted.giffour")
    assert source_fingerprint(source) != sha.hexdigest()[:16]
