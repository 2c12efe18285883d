"""Every layout of images with captions: the samples read, their order, and the reasons for unreadable samples.

Oracles: Pillow, crop and resize of torchvision, tarfile, pyarrow and the loaders of `datasets`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from isocost.config.data import FolderSource, HubSource, ScenesSource, SourceSpec, WebdatasetSource
from isocost.data.datasets import Sample, UnreadableSample, num_classes, read_source, source_fingerprint
from isocost.data.latent_cache import load_images
from isocost.data.synthetic import scenes
from isocost.errors import ConfigError, RunError

R = 8
WHITE, GREY, RED = (255, 255, 255), (128, 128, 128), (255, 0, 0)
Entry = tuple[bytes | None, Any]
Layout = Callable[..., SourceSpec]


@pytest.fixture(autouse=True)
def _datasets_stay_offline_and_inside(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(value: int, kind: str = "PNG") -> bytes:
    """An image of a single grey level, by which it is recognised."""
    return encoded(Image.new("RGB", (R, R), (value, value, value)), kind)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_json(captions: Any) -> bytes:
    return json.dumps({"captions": captions}, ensure_ascii=False).encode()


# --- the same entries in each layout ----------------------------------------------------------------------------------


def listed_folder(root: Path, entries: Iterable[Entry], **options: Any) -> SourceSpec:
    root.mkdir(parents=True)
    lines = []
    for number, (data, captions) in enumerate(entries):
        if data is not None:
            (root / f"{number}.png").write_bytes(data)
        if captions is not None:
            lines.append(json.dumps({"file": f"{number}.png", "captions": captions}))
    (root / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return FolderSource(kind="folder", path=str(root), **options)


def folder_with_sidecars(root: Path, entries: Iterable[Entry], **options: Any) -> SourceSpec:
    root.mkdir(parents=True)
    for number, (data, captions) in enumerate(entries):
        if data is not None:
            (root / f"{number}.png").write_bytes(data)
        if captions is not None:
            (root / f"{number}.json").write_bytes(as_json(captions))
    return FolderSource(kind="folder", path=str(root), **options)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def tar_shard(root: Path, entries: Iterable[Entry], **options: Any) -> SourceSpec:
    members = []
    for number, (data, captions) in enumerate(entries):
        members += [(f"{number}.png", data)] if data is not None else []
        members += [(f"{number}.json", as_json(captions))] if captions is not None else []
    write_tar(root / "train-000.tar", members)
    return WebdatasetSource(kind="webdataset", path=str(root / "train-000.tar"), **options)


def write_parquet(path: Path, entries: Iterable[Entry], **columns: Any) -> None:
    images, captions = zip(*entries, strict=True)
    table = {
        "image": pa.array(
            [{"bytes": data, "path": None} for data in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        ),
        "captions": pa.array(captions, pa.list_(pa.string())),
        **columns,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)


def parquet_folder(root: Path, entries: Iterable[Entry], **options: Any) -> SourceSpec:
    write_parquet(root / "data" / "train-00000-of-00001.parquet", entries)
    return HubSource(kind="hub", path=str(root), **options)


LAYOUTS = {
    listed_folder: ("0.png", "1.png", "2.png"),
    folder_with_sidecars: ("0.png", "1.png", "2.png"),
    tar_shard: ("train-000.tar/0", "train-000.tar/1", "train-000.tar/2"),
    parquet_folder: ("train/0", "train/1", "train/2"),
}
in_each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def three(**changes: Entry) -> list[Entry]:
    """Three readable entries; `middle` replaces the second."""
    return [(plain(10), ["a"]), changes.get("middle", (plain(20), ["b", "c"])), (plain(30), ["d"])]


def read(source: SourceSpec, resolution: int = R) -> list[Sample | UnreadableSample]:
    return list(read_source(source, resolution))


def values(items: Iterable[Sample | UnreadableSample]) -> list[int]:
    """The grey levels, by which the images are recognised."""
    return [int(item.image[0, 0, 0]) for item in items if isinstance(item, Sample)]


def captions_of(items: Iterable[Sample | UnreadableSample]) -> list[tuple[str, ...]]:
    return [item.captions for item in items if isinstance(item, Sample)]


def only_bad(source: SourceSpec) -> UnreadableSample:
    """The only unreadable sample of a source."""
    items = read(source)
    bad = [item for item in items if isinstance(item, UnreadableSample)]
    assert len(bad) == 1, items
    assert bad[0].reason
    assert "\n" not in bad[0].reason
    return bad[0]


def refusal(source: SourceSpec) -> str:
    """The one-line error message with which the source is refused."""
    with pytest.raises(ConfigError) as caught:
        read(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@in_each_layout
def test_images_captions_and_names_are_read_in_order(layout: Layout, tmp_path: Path) -> None:
    items = read(layout(tmp_path / "data", three()))
    assert [item.name for item in items] == list(LAYOUTS[layout])
    assert values(items) == [10, 20, 30]
    assert captions_of(items) == [("a",), ("b", "c"), ("d",)]
    for item in items:
        assert item.image.dtype == np.uint8
        assert item.image.shape == (R, R, 3)
        assert item.labels is None


@in_each_layout
@pytest.mark.parametrize("limit", [1, 2, 7])
def test_the_limit_takes_the_first_images(layout: Layout, limit: int, tmp_path: Path) -> None:
    assert values(read(layout(tmp_path / "data", three(), limit=limit))) == [10, 20, 30][:limit]


@in_each_layout
def test_unreadable_samples_count_towards_the_limit(layout: Layout, tmp_path: Path) -> None:
    items = read(layout(tmp_path / "data", three(middle=(b"junk", ["b"])), limit=2))
    assert [type(item) for item in items] == [Sample, UnreadableSample]


@in_each_layout
def test_the_two_subsets_of_a_source_are_disjoint_and_complete(layout: Layout, tmp_path: Path) -> None:
    source = layout(tmp_path / "data", [(plain(value), ["a"]) for value in range(250)])
    subsets = {subset: values(read(source.model_copy(update={"subset": subset}))) for subset in ("train", "test")}
    assert sorted(subsets["train"] + subsets["test"]) == list(range(250))
    assert 10 <= len(subsets["test"]) <= 45


def test_the_first_images_of_the_test_subset_are_a_random_sample_even_if_names_are_sorted(tmp_path: Path) -> None:
    source = listed_folder(tmp_path / "data", [(plain(value), ["a"]) for value in range(250)], subset="test")
    test_subset = load_images(source, R, 0)
    levels = test_subset.images[:, 0, 0, 0].tolist()
    assert sorted(levels) == values(sorted(read(source), key=lambda item: int(item.name.removesuffix(".png"))))
    assert levels != sorted(levels)
    assert min(levels[: len(levels) // 2]) < 125 < max(levels[: len(levels) // 2])
    assert test_subset.names == [f"{value}.png" for value in levels]


def test_an_unreadable_shard_is_reported_in_both_subsets(tmp_path: Path) -> None:
    (tmp_path / "train-000.tar").write_bytes(b"no tar at all")
    for subset in ("train", "test"):
        source = WebdatasetSource(kind="webdataset", path=str(tmp_path / "train-000.tar"), subset=subset)  # type: ignore[arg-type]
        assert only_bad(source).name == "train-000.tar"


BROKEN_CHUNK = bytes(4)
BAD_ENTRIES = {
    "not an image": (b"no image at all", ["b"]),
    "empty file": (b"", ["b"]),
    "truncated jpeg": (encoded(noise(64, 64), "JPEG")[:1500], ["b"]),
    "truncated png": (encoded(noise(64, 64))[:1500], ["b"]),
    "png with a broken second chunk": (BROKEN_CHUNK.join(encoded(noise(200, 200)).rsplit(b"IDAT", 1)), ["b"]),
    "no caption": (plain(20), None),
    "empty list of captions": (plain(20), []),
    "empty caption": (plain(20), [""]),
    "blank caption": (plain(20), [" \t"]),
    "one of two captions empty": (plain(20), ["b", ""]),
}


@in_each_layout
@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_an_unreadable_entry_is_reported_with_its_reason_and_the_others_are_read(
    layout: Layout, kind: str, tmp_path: Path
) -> None:
    source = layout(tmp_path / "data", three(middle=BAD_ENTRIES[kind]))
    bad = only_bad(source)
    assert bad.name == LAYOUTS[layout][1]
    assert any(word in bad.reason for word in (("caption", ".json") if "caption" in kind else ("image",)))
    assert values(read(source)) == [10, 30]


@pytest.mark.parametrize("layout", [listed_folder, tar_shard, parquet_folder])
def test_a_caption_without_its_image_is_reported(layout: Layout, tmp_path: Path) -> None:
    assert only_bad(layout(tmp_path / "data", three(middle=(None, ["b"])))).name == LAYOUTS[layout][1]


def test_reasons_are_the_same_in_every_run(tmp_path: Path) -> None:
    assert " at 0x" not in only_bad(listed_folder(tmp_path / "data", three(middle=(b"no image at all", ["b"])))).reason


@in_each_layout
def test_the_fingerprint_depends_on_the_content_and_not_on_the_path(layout: Layout, tmp_path: Path) -> None:
    first = source_fingerprint(layout(tmp_path / "here", three()))
    other_path = layout(tmp_path / "far" / "away", three())
    for file in (tmp_path / "far" / "away").rglob("*"):
        os.utime(file, (1, 1))
    assert source_fingerprint(other_path) == first
    assert source_fingerprint(layout(tmp_path / "b", three(middle=(plain(21), ["b", "c"])))) != first
    assert source_fingerprint(layout(tmp_path / "c", three(middle=(plain(20), ["b", "e"])))) != first
    assert source_fingerprint(layout(tmp_path / "d", three()[:2])) != first


@in_each_layout
def test_all_layouts_give_the_same_images(layout: Layout, tmp_path: Path) -> None:
    entries = [(encoded(noise(21, 13), kind), ["a"]) for kind in ("PNG", "JPEG", "WEBP", "BMP")]
    images = [item.image for item in read(layout(tmp_path / "data", entries))]
    expected = [item.image for item in read(listed_folder(tmp_path / "other", entries))]
    assert len(images) == 4
    assert all(np.array_equal(*pair) for pair in zip(images, expected, strict=True))


# --- folders ----------------------------------------------------------------------------------------------------------


def one_listed(root: Path, *lines: str | bytes) -> SourceSpec:
    """A folder with one readable image `0.png` and these lines in captions.jsonl."""
    root.mkdir()
    (root / "0.png").write_bytes(plain(10))
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    (root / "captions.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    return FolderSource(kind="folder", path=str(root))


def test_a_folder_is_read_in_the_order_of_names_not_of_caption_lines(tmp_path: Path) -> None:
    root = tmp_path / "data"
    names = ["b/1.jpg", "a.webp", "b/0.JPEG", "c.bmp"]
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(plain(value))
    lines = [json.dumps({"file": name, "caption": name}) for name in names]
    (root / "captions.jsonl").write_text("\n".join(lines))
    items = read(FolderSource(kind="folder", path=str(root)))
    assert [item.name for item in items] == ["a.webp", "b/0.JPEG", "b/1.jpg", "c.bmp"]
    assert values(items) == [1, 2, 0, 3]
    assert captions_of(items) == [(item.name,) for item in items]


def test_a_sidecar_may_be_text_or_json_with_one_caption_or_several(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(plain(number))
    (tmp_path / "0.txt").write_text("  ein Täßchen \n", encoding="utf-8")
    (tmp_path / "1.json").write_text('{"caption": "one"}')
    (tmp_path / "2.json").write_text('{"captions": ["one", "two"], "category": "x"}')
    assert captions_of(read(FolderSource(kind="folder", path=str(tmp_path)))) == [("ein Täßchen",), ("one",), ("one", "two")]


@pytest.mark.parametrize(
    ("name", "content"),
    [("0.txt", b"caf\xe9"), ("0.txt", b"\n"), ("0.json", b"{"), ("0.json", b"[1]"), ("0.json", b'{"captions": null}')],
)
def test_an_unreadable_sidecar_is_reported(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(plain(10))
    (tmp_path / name).write_bytes(content)
    bad = only_bad(FolderSource(kind="folder", path=str(tmp_path)))
    assert bad.name == "0.png"
    assert name in bad.reason


@pytest.mark.parametrize("absolute", [False, True])
def test_captions_cannot_name_files_outside_their_folder(absolute: bool, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(plain(99))
    name = str(tmp_path / "secret.png") if absolute else "../secret.png"
    lines = [json.dumps({"file": file, "caption": "a"}) for file in ("0.png", name)]
    source = one_listed(tmp_path / "data", *lines)
    bad = only_bad(source)
    assert bad.name == name
    assert "outside" in bad.reason
    assert values(read(source)) == [10]


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "0.png", "caption": "a"',
        "no json",
        "[1]",
        "null",
        '{"file": "0.png"}',
        '{"caption": "a"}',
        '{"file": "0.png", "captions": null}',
        '{"file": "0.png", "captions": 3}',
        '{"file": "0.png", "captions": [3]}',
        '{"file": "0.png", "captions": {"en": "a"}}',
        b'{"file": "0.png", "caption": "caf\xe9"}',
    ],
)
def test_a_broken_caption_line_is_an_error_with_its_number_and_the_remedy(line: str | bytes, tmp_path: Path) -> None:
    good = '{"file": "0.png", "caption": "a"}'
    message = refusal(one_listed(tmp_path / "data", good, "", line, good))
    assert str(tmp_path / "data" / "captions.jsonl") in message
    assert "line 3" in message
    assert '{"file": NAME, "caption": TEXT}' in message


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_caption_line(separator: str, tmp_path: Path) -> None:
    """JSON strings may contain these characters; `str.splitlines` would split a line at them."""
    line = json.dumps({"file": "0.png", "caption": f"one{separator}two"}, ensure_ascii=False)
    assert captions_of(read(one_listed(tmp_path / "data", line))) == [(f"one{separator}two",)]


@pytest.mark.parametrize("listed", [False, True])
def test_a_byte_order_mark_is_not_part_of_a_caption(listed: bool, tmp_path: Path) -> None:
    line = '{"file": "0.png", "caption": "a"}'
    source = one_listed(tmp_path / "data", line.encode("utf-8-sig"))
    if not listed:
        (tmp_path / "data" / "captions.jsonl").rename(tmp_path / "elsewhere")
        (tmp_path / "data" / "0.txt").write_bytes("a".encode("utf-8-sig"))
    assert captions_of(read(source)) == [("a",)]


def test_an_image_moved_to_another_subfolder_changes_the_fingerprint(tmp_path: Path) -> None:
    source = one_listed(tmp_path / "data", '{"file": "x/0.png", "caption": "a"}')
    (tmp_path / "data" / "x").mkdir()
    (tmp_path / "data" / "0.png").rename(tmp_path / "data" / "x" / "0.png")
    before = source_fingerprint(source)
    assert values(read(source)) == [10]
    (tmp_path / "data" / "x").rename(tmp_path / "data" / "y")
    assert values(read(source)) == []
    assert source_fingerprint(source) != before


# --- tar shards -------------------------------------------------------------------------------------------------------


def numbered(first: int, last: int, folder: str = "") -> list[tuple[str, bytes]]:
    members = []
    for number in range(first, last):
        members += [(f"{folder}{number}.png", plain(number)), (f"{folder}{number}.json", as_json([f"c{number}", "same"]))]
    return members


def test_a_glob_reads_all_its_shards_in_order_as_datasets_does(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-001.tar", numbered(3, 6))
    write_tar(tmp_path / "train-000.tar", numbered(0, 3))
    write_tar(tmp_path / "valid-000.tar", numbered(90, 93))
    files = [str(tmp_path / f"train-00{shard}.tar") for shard in range(2)]
    oracle = list(datasets.load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True))
    items = read(WebdatasetSource(kind="webdataset", path=str(tmp_path / "train-*.tar")))
    assert [item.name.split("/")[-1] for item in items] == [row["__key__"] for row in oracle]
    assert values(items) == [np.asarray(row["png"])[0, 0, 0] for row in oracle] == list(range(6))
    assert captions_of(items) == [tuple(row["json"]["captions"]) for row in oracle]


@pytest.mark.parametrize("folder", ["./", "photos/", "v1.0/photos/", "./v1.0/"])
def test_folders_inside_a_shard_are_part_of_the_name_as_datasets_has_it(folder: str, tmp_path: Path) -> None:
    """`tar cf shard.tar .` writes `./0.png`; the suffix begins at the first dot of the last part of the path."""
    write_tar(tmp_path / "x.tar", numbered(0, 3, folder))
    files = {"train": [str(tmp_path / "x.tar")]}
    oracle = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    items = read(WebdatasetSource(kind="webdataset", path=str(tmp_path / "x.tar")))
    assert values(items) == [np.asarray(row["png"])[0, 0, 0] for row in oracle] == [0, 1, 2]
    assert len({item.name for item in items}) == 3


def test_members_of_a_shard_may_be_text_upper_case_folders_and_metadata(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in [("sub/0.JPG", plain(10, "JPEG")), ("sub/0.cls", b"7"), ("sub/0.txt", b" a cat\n")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    items = read(WebdatasetSource(kind="webdataset", path=str(tmp_path / "x.tar")))
    assert values(items) == [10]
    assert captions_of(items) == [("a cat",)]


def test_a_truncated_shard_is_reported_and_the_samples_before_are_read(tmp_path: Path) -> None:
    big = [(f"{n}.{kind}", data) for n in range(4) for kind, data in (("png", encoded(noise(64, 64))), ("txt", b"a"))]
    write_tar(tmp_path / "x.tar", big)
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: len(whole) // 2 + 3000])
    items = read(WebdatasetSource(kind="webdataset", path=str(tmp_path / "x.tar")))
    assert [type(item) for item in items] == [Sample, Sample, UnreadableSample]
    assert "x.tar" in items[-1].name


@pytest.mark.parametrize("kind", ["no tar", "half a gzip"])
def test_a_file_that_is_not_a_tar_shard_is_reported(kind: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", numbered(0, 50))
    packed = gzip.compress((tmp_path / "x.tar").read_bytes())
    (tmp_path / "x.tar").write_bytes(b"text" * 1000 if kind == "no tar" else packed[: len(packed) // 2])
    assert "x.tar" in only_bad(WebdatasetSource(kind="webdataset", path=str(tmp_path / "x.tar"))).name


def test_shards_of_real_photographs_are_read_with_all_their_captions(shared: Path) -> None:
    items = read(WebdatasetSource(kind="webdataset", path=str(shared / "aerial" / "train-*.tar"), limit=25), 64)
    with tarfile.open(shared / "aerial" / "train-000.tar") as archive:
        members = [archive.next() for _ in range(50)]
        texts = [json.load(archive.extractfile(member)) for member in members if member.name.endswith(".json")]
    assert captions_of(items) == [tuple(text["captions"]) for text in texts]
    assert {len(captions) for captions in captions_of(items)} == {5}


# --- hub layout -------------------------------------------------------------------------------------------------------


def test_parquet_is_read_as_datasets_reads_it_with_its_label(tmp_path: Path) -> None:
    rows = [(encoded(noise(12, 12), kind), [f"c{n}", "same"]) for n, kind in enumerate(("PNG", "JPEG", "PNG"))]
    labels = [[3, 1, 4], [1, 5, 9]]
    for shard in range(2):
        file = tmp_path / "data" / f"train-0000{shard}-of-00002.parquet"
        write_parquet(file, rows, label=pa.array(labels[shard], pa.int32()))
    oracle = datasets.load_dataset(str(tmp_path), split="train").cast_column("image", datasets.Image())
    items = read(HubSource(kind="hub", path=str(tmp_path), label_column="label"), 12)
    assert len(items) == len(oracle) == 6
    for item, row in zip(items, oracle, strict=True):
        assert np.array_equal(item.image, np.asarray(row["image"].convert("RGB")))
        assert item.captions == tuple(row["captions"])
        assert item.labels.dtype == np.int64
        assert item.labels.tolist() == [row["label"]]


def test_a_data_set_saved_by_datasets_is_read(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"photo": [noise(R, R), Image.new("L", (R, R), 7)], "text": ["a", "b"]})
    table.to_parquet(tmp_path / "train.parquet")
    source = HubSource(kind="hub", path=str(tmp_path / "train.parquet"), image_column="photo", caption_column="text")
    items = read(source)
    assert captions_of(items) == [("a",), ("b",)]
    assert np.array_equal(items[0].image, np.asarray(noise(R, R)))
    assert (items[1].image == 7).all()


def test_the_split_selects_the_files(tmp_path: Path) -> None:
    for value, name in enumerate(["test.parquet", "train-0.parquet", "train-1.parquet"]):
        write_parquet(tmp_path / name, [(plain(value), ["a"])])
    assert values(read(HubSource(kind="hub", path=str(tmp_path)))) == [1, 2]
    assert values(read(HubSource(kind="hub", path=str(tmp_path), split="test"))) == [0]


def test_a_split_must_be_a_whole_word_of_the_file_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "latest.parquet", [(plain(1), ["a"])])
    write_parquet(tmp_path / "test.parquet", [(plain(2), ["a"])])
    assert values(read(HubSource(kind="hub", path=str(tmp_path), split="test"))) == [2]


@pytest.mark.parametrize(("captions", "label"), [([None], 1), (["a", None], 1), (["a"], None)])
def test_a_row_without_caption_or_label_is_reported(captions: list[str | None], label: int | None, tmp_path: Path) -> None:
    entries = [(plain(10), ["a"]), (plain(20), captions), (plain(30), ["d"])]
    write_parquet(tmp_path / "train.parquet", entries, label=pa.array([0, label, 1], pa.int32()))
    bad = only_bad(HubSource(kind="hub", path=str(tmp_path), label_column="label"))
    assert bad.name == "train/1"
    assert ("label" if label is None else "caption") in bad.reason


def test_real_parquet_in_the_layout_of_the_hub_is_read(shared: Path) -> None:
    source = HubSource(kind="hub", path=str(shared / "fashion"), split="test", label_column="label", limit=20)
    items = read(source, 32)
    rows = pq.ParquetFile(shared / "fashion" / "test.parquet").read().slice(0, 20).to_pylist()
    assert captions_of(items) == [tuple(row["captions"]) for row in rows]
    assert [item.labels.tolist() for item in items] == [[row["label"]] for row in rows]
    for item, row in zip(items, rows, strict=True):
        grey = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert np.array_equal(item.image, np.repeat(grey[..., None], 3, axis=2))


# --- refused sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        FolderSource(kind="folder", path="no/such/place"),
        WebdatasetSource(kind="webdataset", path="no/such/place-*.tar"),
        HubSource(kind="hub", path="no/such/place.parquet"),
        HubSource(kind="hub", path="no-such/place"),
    ],
    ids=lambda source: source.path,
)
def test_a_missing_source_is_refused_in_one_line(source: SourceSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source.path in refusal(source)
    if source.kind != "hub":
        with pytest.raises(ConfigError, match="no such"):
            source_fingerprint(source)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a")
    assert "no images" in refusal(FolderSource(kind="folder", path=str(tmp_path)))


@pytest.mark.parametrize("pattern", ["", "*"])
def test_a_folder_instead_of_shards_is_refused(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    source = WebdatasetSource(kind="webdataset", path=str(tmp_path / "data" / pattern))
    assert str(tmp_path) in refusal(source)
    with pytest.raises(ConfigError):
        source_fingerprint(source)


def test_a_missing_split_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", three())
    source = HubSource(kind="hub", path=str(tmp_path), split="validation")
    assert "'validation'" in refusal(source)
    with pytest.raises(ConfigError, match="'validation'"):
        source_fingerprint(source)


@pytest.mark.parametrize("column", ["image_column", "caption_column", "label_column"])
def test_a_missing_column_is_refused_and_the_existing_columns_are_listed(column: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", three())
    message = refusal(HubSource(kind="hub", path=str(tmp_path), **{column: "nothing"}))
    assert "'nothing'" in message
    assert "image, captions" in message


@pytest.mark.parametrize("fraction", [0, 0.5, 1], ids=["junk", "half", "no rows"])
def test_an_unreadable_or_empty_parquet_file_is_refused_in_one_line(fraction: float, tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    write_parquet(file, three())
    if fraction == 1:
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    else:
        file.write_bytes(file.read_bytes()[: int(fraction * file.stat().st_size)] or b"junk")
    assert str(tmp_path) in refusal(HubSource(kind="hub", path=str(tmp_path)))


# --- one image ------------------------------------------------------------------------------------------------------


def image_of(data: bytes, root: Path, resolution: int = R) -> np.ndarray:
    (item,) = read(listed_folder(root / "one", [(data, ["a"])]), resolution)
    assert isinstance(item, Sample), item
    assert item.image.shape == (resolution, resolution, 3)
    assert item.image.dtype == np.uint8
    return item.image


def two_colours_with_a_hole() -> Image.Image:
    image = Image.new("P", (R, R), 1)
    image.putpalette([0, 200, 0, *RED])
    image.paste(0, (0, 0, R, R // 2))
    return image


@pytest.mark.parametrize(
    ("data", "top", "bottom"),
    [
        (encoded(Image.new("RGBA", (R, R), (0, 0, 0, 0))), WHITE, WHITE),
        (encoded(Image.new("RGBA", (R, R), (*RED, 255))), RED, RED),
        (encoded(Image.new("RGBA", (R, R), (*RED, 51))), (255, 204, 204), (255, 204, 204)),
        (encoded(Image.new("LA", (R, R), (0, 0))), WHITE, WHITE),
        (encoded(Image.new("LA", (R, R), (128, 255))), GREY, GREY),
        (encoded(two_colours_with_a_hole(), transparency=0), WHITE, RED),
        (encoded(two_colours_with_a_hole()), (0, 200, 0), RED),
        (encoded(two_colours_with_a_hole(), "GIF", transparency=0), WHITE, RED),
        (encoded(Image.new("RGB", (R, R), RED), transparency=RED), WHITE, WHITE),
        (encoded(Image.new("L", (R, R), 128)), GREY, GREY),
        (encoded(Image.new("L", (R, R), 128), "JPEG"), GREY, GREY),
        (encoded(Image.new("1", (R, R), 1)), WHITE, WHITE),
        (encoded(Image.new("CMYK", (R, R), (0, 0, 0, 127)), "JPEG"), GREY, GREY),
    ],
    ids=[
        "clear RGBA",
        "opaque RGBA",
        "a fifth of red",
        "clear LA",
        "opaque LA",
        "palette with a hole",
        "palette",
        "GIF with a hole",
        "RGB with a clear colour",
        "grey",
        "grey JPEG",
        "bilevel",
        "CMYK",
    ],
)
def test_every_mode_becomes_rgb_on_white(data: bytes, top: tuple[int, ...], bottom: tuple[int, ...], tmp_path: Path) -> None:
    image = image_of(data, tmp_path).astype(int)
    assert np.abs(image[: R // 2] - top).max() <= 1
    assert np.abs(image[R // 2 :] - bottom).max() <= 1


def test_16_bit_grey_keeps_its_levels(tmp_path: Path) -> None:
    levels = np.repeat(np.linspace(0, 65535, R).astype(np.uint16)[None], R, axis=0)
    image = image_of(encoded(Image.fromarray(levels)), tmp_path)
    assert np.abs(image[0, :, 0] - np.linspace(0, 255, R)).max() <= 1


@pytest.mark.parametrize(("kind", "orientation"), [("PNG", 6), ("WEBP", 6), *(("JPEG", number) for number in range(1, 9))])
def test_an_image_is_turned_by_its_exif_orientation(kind: str, orientation: int, tmp_path: Path) -> None:
    """`datasets` and image viewers turn a photograph by its EXIF orientation, and captions describe the turned image."""
    image = noise(3, 3).resize((24, 24), Image.Resampling.NEAREST)
    tags = Image.Exif()
    tags[0x0112] = orientation
    data = encoded(image, kind, exif=tags.tobytes())
    oracle = datasets.Image().decode_example({"bytes": data, "path": None}).convert("RGB")
    assert np.array_equal(image_of(data, tmp_path, 24), np.asarray(oracle))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_broken_exif_block_does_not_lose_the_image(kind: str, tmp_path: Path) -> None:
    tags = Image.Exif()
    tags.update({0x0112: 6, 0x010F: "maker", 0x011A: 72.0, 0x8769: {0x9000: b"0230"}})
    data = encoded(noise(R, R), kind, exif=tags.tobytes())
    start = data.find(b"MM\x00*") if b"MM\x00*" in data else data.find(b"II*\x00")
    rng = np.random.default_rng(0)
    entries: list[Entry] = []
    for _ in range(200):
        broken = bytearray(data)
        for position in rng.integers(start, start + len(tags.tobytes()) - 6, 3):
            broken[position] = rng.integers(256)
        entries.append((bytes(broken), ["a"]))
    assert [type(item) for item in read(tar_shard(tmp_path, entries))] == [Sample] * 200


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (40, 40), (12, 8), (6, 10)])
@pytest.mark.parametrize("resolution", [8, 40])
def test_crop_and_resize_equal_those_of_torchvision(width: int, height: int, resolution: int, tmp_path: Path) -> None:
    image = noise(width, height)
    square = functional.center_crop(image, [min(width, height)] * 2)
    expected = functional.resize(square, [resolution, resolution], InterpolationMode.LANCZOS)
    assert np.array_equal(image_of(encoded(image), tmp_path, resolution), np.asarray(expected))


@pytest.mark.parametrize("tall", [False, True])
def test_the_crop_takes_the_centre_and_nothing_of_the_borders(tall: bool, tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 30), RED)
    image.paste(GREY, (30, 0, 60, 30))
    image = image_of(encoded(image.rotate(90, expand=True) if tall else image), tmp_path)
    assert (image == 128).all()


def test_a_square_image_of_the_right_size_is_not_changed(tmp_path: Path) -> None:
    assert np.array_equal(image_of(encoded(noise(R, R)), tmp_path), np.asarray(noise(R, R)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_truncated_image_never_stops_the_reading(kind: str, tmp_path: Path) -> None:
    data = encoded(noise(24, 24), kind)
    cuts = np.linspace(0, len(data) - 64, 40).astype(int)
    items = read(tar_shard(tmp_path, [(data[:cut], ["a"]) for cut in cuts]))
    assert [type(item) for item in items] == [UnreadableSample] * len(cuts)


def test_a_decompression_bomb_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = listed_folder(tmp_path / "data", three(middle=(encoded(noise(100, 100)), ["b"])))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert only_bad(source).name == "1.png"


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_scenes_come_with_caption_and_labels_by_seed_and_index() -> None:
    items = read(ScenesSource(kind="scenes", num_images=4, first=3, seed=9), 16)
    expected = [scenes.scene(9, index) for index in range(3, 7)]
    assert captions_of(items) == [(scenes.captions(scene)[0],) for scene in expected]
    assert all(np.array_equal(item.image, scenes.render(scene, 16)) for item, scene in zip(items, expected, strict=True))
    assert all(np.array_equal(item.labels, scenes.attribute_labels(scene)) for item, scene in zip(items, expected, strict=True))
    assert len({item.name for item in items}) == 4


def test_only_scenes_have_classes_known_before_reading(tmp_path: Path) -> None:
    source = ScenesSource(kind="scenes", num_images=300)
    classes = num_classes(source)
    labels = np.stack([item.labels for item in read(source)])
    assert labels.shape[1] == len(classes)
    assert (labels < np.array(classes)).all()
    assert num_classes(FolderSource(kind="folder", path=str(tmp_path))) is None


def test_the_fingerprint_of_scenes_is_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ScenesSource(kind="scenes", num_images=4)
    before = source_fingerprint(source)
    assert source_fingerprint(source.model_copy(update={"num_images": 5})) == before
    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)
    assert source_fingerprint(source) != before


# --- loading into memory ----------------------------------------------------------------------------------------------


def many(num_good: int, num_bad: int) -> list[Entry]:
    return [(b"junk", ["a"])] * num_bad + [(plain(value), [f"c{value}"]) for value in range(num_good)]


def test_unreadable_samples_are_counted_and_skipped(tmp_path: Path) -> None:
    loaded = load_images(tar_shard(tmp_path, many(18, 2)), R, max_unreadable_fraction=0.1)
    assert len(loaded) == 18
    assert loaded.images.dtype == torch.uint8
    assert loaded.images.shape == (18, 3, R, R)
    assert loaded.images[:, 0, 0, 0].tolist() == list(range(18))
    assert loaded.captions == [(f"c{value}",) for value in range(18)]
    assert [bad.name for bad in loaded.unreadable] == ["train-000.tar/0", "train-000.tar/1"]
    assert loaded.names == [f"train-000.tar/{number}" for number in range(2, 20)]
    assert loaded.labels is None


@pytest.mark.parametrize(("num_good", "num_bad", "limit"), [(18, 2, 0.09), (5, 1, 0.0), (0, 3, 0.9)])
def test_too_many_unreadable_samples_are_an_error(num_good: int, num_bad: int, limit: float, tmp_path: Path) -> None:
    source = tar_shard(tmp_path, many(num_good, num_bad))
    with pytest.raises(RunError) as caught:
        load_images(source, R, max_unreadable_fraction=limit)
    message = str(caught.value)
    assert f"{num_bad} of {num_good + num_bad}" in message
    assert "max_unreadable_fraction" in message
    assert "train-000.tar/0" in message
    assert "\n" not in message


def test_a_source_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        load_images(tar_shard(tmp_path, []), R, max_unreadable_fraction=0.5)


def test_images_are_stacked_channels_first(tmp_path: Path) -> None:
    loaded = load_images(listed_folder(tmp_path / "data", [(encoded(noise(R, R)), ["a"])]), R, 0)
    assert np.array_equal(loaded.images[0].permute(1, 2, 0).numpy(), np.asarray(noise(R, R)))
    assert loaded.images.is_contiguous()


def test_labels_are_stacked_if_every_image_has_them(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", three(middle=(b"junk", ["b"])), label=pa.array([3, 1, 4], pa.int32()))
    labelled = load_images(HubSource(kind="hub", path=str(tmp_path), label_column="label"), R, 0.5)
    assert labelled.labels.dtype == torch.int64
    assert labelled.labels.tolist() == [[3], [4]]
    assert load_images(HubSource(kind="hub", path=str(tmp_path)), R, 0.5).labels is None
    synthetic = load_images(ScenesSource(kind="scenes", num_images=5), R, 0)
    assert synthetic.labels.tolist() == [scenes.attribute_labels(scenes.scene(0, index)).tolist() for index in range(5)]


def test_a_limit_of_load_images_takes_the_first_images() -> None:
    assert len(load_images(ScenesSource(kind="scenes", num_images=50), R, 0, limit=7)) == 7


def test_the_fingerprint_of_a_data_set_depends_on_images_and_captions(tmp_path: Path) -> None:
    def fingerprint(name: str, entries: list[Entry]) -> str:
        return load_images(listed_folder(tmp_path / name, entries), R, 0).fingerprint()

    first = fingerprint("a", three())
    assert fingerprint("b", three()) == first
    assert fingerprint("c", three(middle=(plain(21), ["b", "c"]))) != first
    assert fingerprint("d", three(middle=(plain(20), ["b"]))) != first
