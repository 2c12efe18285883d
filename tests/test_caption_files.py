"""Captions: several per image, repeated keys, encodings, tables, damaged lines, and captions that a text encoder loses."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conftest import plain_study, tiny_study
from isocost.config.data import FolderSource, ScenesSource, WebdatasetSource
from isocost.config.model import TextEncoderSpec
from isocost.data.caption_files import read_caption_lists
from isocost.data.datasets import Sample, UnreadableSample, read_source, source_fingerprint
from isocost.data.dreambooth import read_prompts, read_subjects
from isocost.data.latent_cache import ImageDataset, LatentCache, load_images, write_cache, write_index
from isocost.data.row_store import ShardStore
from isocost.errors import ConfigError, RunError
from isocost.evaluation.prompt_lists import _read_csv, read_prompt_list
from isocost.evaluation.protocol_presets import PromptList
from isocost.experiments.study_assets import StudyAssets
from isocost.models.autoencoder import PCAAutoencoder
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.sampling.generate import PromptEmbeds
from isocost.utils.artifact_store import Store

R = 16


def png(level: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((R, R, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(root: Path, lines: list[str] | bytes, num_images: int = 2, name: str = "captions.jsonl") -> FolderSource:
    """A folder of images 0.png, 1.png, ... with these lines in its caption list."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(num_images):
        (root / f"{number}.png").write_bytes(png(number))
    (root / name).write_bytes(lines if isinstance(lines, bytes) else "\n".join(lines).encode())
    return FolderSource(kind="folder", path=str(root))


def line(number: int, *captions: str) -> str:
    entry = {"captions": captions} if len(captions) > 1 else {"caption": captions[0]}
    return json.dumps({"file": f"{number}.png", **entry})


def captions_of(source: Any) -> dict[str, tuple[str, ...]]:
    return {item.name: item.captions for item in read_source(source, R) if isinstance(item, Sample)}


def bad_of(source: Any) -> dict[str, str]:
    return {item.name: item.reason for item in read_source(source, R) if isinstance(item, UnreadableSample)}


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        read()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- several captions of one image ------------------------------------------------------------------------------------


def test_all_lines_of_an_image_are_taken_as_in_coco(tmp_path: Path) -> None:
    lines = [line(image, f"caption {number} of image {image}") for image in range(40) for number in range(5)]
    source = folder(tmp_path / "data", lines, 40)
    captions = captions_of(source)
    assert len({caption for of_image in captions.values() for caption in of_image}) == 200
    assert captions["7.png"] == tuple(f"caption {number} of image 7" for number in range(5))
    assert len(load_images(source, R, 0).captions[0]) == 5


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([line(0, "a"), line(0, "b"), line(0, "c")], ("a", "b", "c")),
        ([line(0, "a", "b"), line(0, "c")], ("a", "b", "c")),
        ([line(0, "a"), line(0, "b", "a")], ("a", "b")),
        ([line(0, "a"), line(0, "a")], ("a",)),
        ([line(0, "a", "a")], ("a", "a")),
        ([line(0, "a"), '{"file": "./0.png", "caption": "b"}'], ("a", "b")),
    ],
)
def test_lines_of_one_image_add_up_and_a_repeated_line_adds_nothing(
    lines: list[str], expected: tuple[str, ...], tmp_path: Path
) -> None:
    assert captions_of(folder(tmp_path / "data", lines, 1)) == {"0.png": expected}


def test_the_fingerprint_changes_only_if_several_lines_add_captions(tmp_path: Path) -> None:
    import hashlib

    def plain(root: Path) -> str:
        sha = hashlib.sha256()
        for file in sorted(root.rglob("*")):
            sha.update(file.name.encode() + file.read_bytes())
        return sha.hexdigest()[:16]

    for number, lines in enumerate(
        ([line(0, "a"), line(1, "b")], [line(0, "a", "b"), line(1, "c")], [line(0, "a"), line(0, "a")])
    ):
        root = tmp_path / str(number)
        assert source_fingerprint(folder(root, lines)) == plain(root)
    root = tmp_path / "several"
    assert source_fingerprint(folder(root, [line(0, "a"), line(0, "b"), line(1, "c")])) != plain(root)


# --- the last one wins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repeated",
    [
        '{"file": "0.png", "caption": "a", "caption": "b"}',
        '{"file": "1.png", "file": "0.png", "caption": "a"}',
        '{"file": "0.png", "caption": "a", "more": {"x": 1, "x": 2}}',
    ],
)
def test_a_repeated_json_key_names_the_line(repeated: str, tmp_path: Path) -> None:
    message = refusal(lambda: captions_of(folder(tmp_path / "data", [line(1, "a"), repeated])))
    assert "line 2" in message
    assert "appears twice" in message


def test_a_repeated_json_key_in_a_caption_file_is_one_unreadable_image(tmp_path: Path) -> None:
    for number, text in enumerate(('{"caption": "a"}', '{"caption": "a", "caption": "b"}')):
        (tmp_path / f"{number}.png").write_bytes(png())
        (tmp_path / f"{number}.json").write_text(text)
    source = FolderSource(kind="folder", path=str(tmp_path))
    assert captions_of(source) == {"0.png": ("a",)}
    assert "key 'caption' appears twice" in bad_of(source)["1.png"]


def test_a_sample_of_a_prompt_list_that_appears_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("0.png", "0.txt", "1.png", "1.txt", "0.png", "0.txt"):
            data = png() if name.endswith("png") else b"a"
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    message = refusal(lambda: read_prompt_list(str(tmp_path / "x.tar"), PromptList(2, "0" * 64, "two prompts")))
    assert "id 0 appears twice" in message
    assert len(list(read_source(WebdatasetSource(kind="webdataset", path=str(tmp_path / "x.tar")), R))) == 3


# --- damaged captions -------------------------------------------------------------------------------------------------

HALF = '{"file": "1.png", "caption": "a disc \\ud83d"}'


def test_a_lone_surrogate_is_one_unreadable_image(tmp_path: Path) -> None:
    source = folder(tmp_path / "data", [line(number, f"disc {number}") for number in range(200) if number != 1] + [HALF], 200)
    loaded = load_images(source, R, 0.01)
    assert (len(loaded), [bad.name for bad in loaded.unreadable]) == (199, ["1.png"])
    assert "a lone surrogate" in loaded.unreadable[0].reason
    loaded.unreadable[0].reason.encode("utf-8")
    with pytest.raises(RunError, match=r"1 of 200 .*a lone surrogate"):
        load_images(source, R, 0.001)


@pytest.mark.parametrize("text", ['{"caption": "\\ud83d"}', '{"captions": ["a", "b \\udc00"]}'])
def test_a_lone_surrogate_in_a_caption_file_or_shard_is_one_unreadable_image(text: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number, content in enumerate(('{"caption": "a"}', text)):
            for name, data in ((f"{number}.png", png()), (f"{number}.json", content.encode())):
                (root / name).write_bytes(data)
                archive.add(root / name, name)
    for source in (
        FolderSource(kind="folder", path=str(root)),
        WebdatasetSource(kind="webdataset", path=str(tmp_path / "x.tar")),
    ):
        assert len(captions_of(source)) == 1
        assert "a lone surrogate" in next(iter(bad_of(source).values()))


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    source = folder(tmp_path / "data", ['{"file": "0.png", "caption": "\\ud83d\\ude00"}'], 1)
    assert captions_of(source) == {"0.png": ("😀",)}


def test_json_that_is_nested_deep_is_one_line(tmp_path: Path) -> None:
    deep = '{"file": "0.png", "caption": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert "nested too deeply" in refusal(lambda: captions_of(folder(tmp_path / "data", [deep])))
    (tmp_path / "data" / "captions.jsonl").unlink()
    (tmp_path / "data" / "0.json").write_text(deep)
    (tmp_path / "data" / "1.txt").write_text("b")
    assert "nested too deeply" in bad_of(FolderSource(kind="folder", path=str(tmp_path / "data")))["0.png"]


# --- encodings --------------------------------------------------------------------------------------------------------

UNICODE = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
TEXT = "eine Blüte, 花"


@pytest.mark.parametrize("encoding", UNICODE)
def test_captions_are_read_in_every_unicode_encoding(encoding: str, tmp_path: Path) -> None:
    lines = "\r\n".join(json.dumps({"file": f"{number}.png", "caption": TEXT}, ensure_ascii=False) for number in range(2))
    assert captions_of(folder(tmp_path / "listed", lines.encode(encoding))) == {"0.png": (TEXT,), "1.png": (TEXT,)}
    source = folder(tmp_path / "hub", lines.replace('"file"', '"file_name"').encode(encoding), name="metadata.jsonl")
    assert captions_of(source) == {"0.png": (TEXT,), "1.png": (TEXT,)}
    sidecars = tmp_path / "sidecars"
    sidecars.mkdir()
    for number, content in enumerate((TEXT, json.dumps({"caption": TEXT}, ensure_ascii=False))):
        (sidecars / f"{number}.png").write_bytes(png())
        (sidecars / f"{number}.{('txt', 'json')[number]}").write_bytes(content.encode(encoding))
    assert captions_of(FolderSource(kind="folder", path=str(sidecars))) == {"0.png": (TEXT,), "1.png": (TEXT,)}
    assert captions_of(FolderSource(kind="folder", path=str(sidecars), subset="all"))


def test_another_encoding_names_line_and_remedy(tmp_path: Path) -> None:
    lines = b'{"file": "0.png", "caption": "a"}\n' + '{"file": "1.png", "caption": "Blüte"}'.encode("cp1252")
    message = refusal(lambda: captions_of(folder(tmp_path / "listed", lines)))
    assert "line 2" in message
    assert "byte 0xfc is not UTF-8; save it as UTF-8" in message
    odd = '{"file": "0.png", "caption": "a"}'.encode("utf-16")[:-1]
    assert "UTF-16" in refusal(lambda: captions_of(folder(tmp_path / "odd", odd)))


# --- metadata.jsonl ---------------------------------------------------------------------------------------------------


def test_the_caption_list_of_imagefolder_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"image {number}", "width": 3}) for number in range(2)]
    source = folder(tmp_path / "data", lines, 3, "metadata.jsonl")
    assert captions_of(source) == {"0.png": ("image 0",), "1.png": ("image 1",)}
    assert bad_of(source) == {"2.png": "metadata.jsonl has no line for it"}


def test_captions_jsonl_and_caption_files_come_before_metadata_jsonl(tmp_path: Path) -> None:
    hub = [json.dumps({"file_name": f"{number}.png", "text": "hub"}) for number in range(2)]
    folder(tmp_path / "data", hub, name="metadata.jsonl")
    (tmp_path / "data" / "0.txt").write_text("own")
    source = FolderSource(kind="folder", path=str(tmp_path / "data"))
    assert captions_of(source) == {"0.png": ("own",), "1.png": ("hub",)}
    folder(tmp_path / "data", [line(0, "listed"), line(1, "listed")])
    assert captions_of(source) == {"0.png": ("listed",), "1.png": ("listed",)}


@pytest.mark.parametrize("text", ['{"file_name": "0.png"}', '{"text": "a"}', '{"file_name": "0.png", "text": 3}', "[]"])
def test_a_line_of_metadata_jsonl_without_caption_names_its_layout(text: str, tmp_path: Path) -> None:
    root = Path(folder(tmp_path / "d", [text], name="metadata.jsonl").path)
    message = refusal(lambda: read_caption_lists(root, [root / "metadata.jsonl"]))
    assert "line 1" in message
    assert '{"file_name": NAME, "text": TEXT}' in message


def test_metadata_csv_is_read(tmp_path: Path) -> None:
    rows = 'file_name,text,width\n0.png,"a ""red"" disc, on white",3\n1.png,blüte,3\n'
    source = folder(tmp_path / "data", rows.encode(), 3, "metadata.csv")
    assert captions_of(source) == {"0.png": ('a "red" disc, on white',), "1.png": ("blüte",)}
    assert bad_of(source) == {"2.png": "metadata.csv has no line for it"}
    message = refusal(lambda: captions_of(folder(tmp_path / "other", b"image,label\n0.png,3\n", name="metadata.csv")))
    assert "metadata.csv: needs a column file_name or file and a column text or caption or captions" in message


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl", "metadata.csv"])
def test_caption_lists_of_subfolders_are_read(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    for number, part in enumerate(("train", "train/deep", "test")):
        rows = ["file_name,text", f"0.png,{part}"]
        lines = [json.dumps({"file_name": "0.png", "text": part})]
        folder(root / part, rows if name.endswith("csv") else lines, 1 + number // 2, name)
    source = FolderSource(kind="folder", path=str(root))
    assert captions_of(source) == {f"{part}/0.png": (part,) for part in ("test", "train", "train/deep")}
    assert bad_of(source) == {"test/1.png": f"{name} has no line for it"}
    before = source_fingerprint(source)
    (root / "test" / name).write_bytes((root / "test" / name).read_bytes().replace(b"test", b"else"))
    assert source_fingerprint(source) != before


def test_rows_of_one_image_in_metadata_csv_add_up(tmp_path: Path) -> None:
    source = folder(tmp_path / "data", b"file_name,text\n0.png,a\n1.png,c\n0.png,b\n", name="metadata.csv")
    assert captions_of(source) == {"0.png": ("a", "b"), "1.png": ("c",)}


def test_lists_of_a_folder_and_of_its_subfolder_add_up(tmp_path: Path) -> None:
    root = tmp_path / "data"
    folder(root / "sub", [line(0, "of the subfolder"), line(1, "b")])
    outer = json.dumps({"file": "sub/0.png", "caption": "of the folder"})
    source = folder(root, [outer, line(0, "outer")], 1)
    expected = {"0.png": ("outer",), "sub/0.png": ("of the folder", "of the subfolder"), "sub/1.png": ("b",)}
    assert captions_of(source) == expected


def test_a_list_of_a_subfolder_is_for_this_subfolder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    folder(root / "listed", [line(0, "listed")], 2)
    (root / "0.png").write_bytes(png())
    (root / "0.txt").write_text("own file")
    (root / "listed" / "1.txt").write_text("not read: the folder has a list")
    source = FolderSource(kind="folder", path=str(root))
    assert captions_of(source) == {"0.png": ("own file",), "listed/0.png": ("listed",)}
    assert bad_of(source) == {"listed/1.png": "captions.jsonl has no line for it"}
    folder(root / "listed", [line(0, "listed"), json.dumps({"file": "../0.png", "caption": "outside"})], 2)
    assert "names a file outside its folder" in bad_of(source)["listed/../0.png"]


# --- tables -----------------------------------------------------------------------------------------------------------

ROWS = 'image_id,prompt\n203564,"a ""red"" disc, on white"\n203571,"two\nlines"\n203578,blüte\n'
PROMPTS = {"203564": 'a "red" disc, on white', "203571": "two\nlines", "203578": "blüte"}


def table(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "prompts.csv").write_bytes(content)
    return tmp_path / "prompts.csv"


@pytest.mark.parametrize("encoding", UNICODE)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_are_read_in_every_unicode_encoding_with_every_separator(
    encoding: str, separator: str, end: str, tmp_path: Path
) -> None:
    rows = ROWS.replace("id,", f"id{separator}").replace("4,", f"4{separator}").replace("1,", f"1{separator}")
    rows = rows.replace("8,", f"8{separator}").replace("\n", end)
    expected = {key: prompt.replace("\n", end) for key, prompt in PROMPTS.items()}
    assert _read_csv(table(tmp_path, rows.encode(encoding))) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROWS.encode("cp1252"), "line 5: byte 0xfc is not UTF-8; save it as UTF-8"),
        (ROWS.encode() + b"203599\n", "line 6 has 1 values for 2 columns"),
        (ROWS.encode() + b"203599,a red disc, on white\n", "line 6 has 3 values for 2 columns.*in double quotes"),
        (ROWS.encode() + b"203564,another\n", "line 6: id 203564 appears twice"),
        (ROWS.encode() + b"COCO_val2014_000000203564.jpg,another\n", "line 6: id 203564 appears twice"),
        (ROWS.encode("utf-16")[:-1], "UTF-16"),
        (b"a,b\n1,2\n", r"needs a column image_id or id and a column prompt or caption; it has \['a', 'b'\]"),
        (b"id,prompt,prompt\n1,a,b\n", "the column prompt appears twice; keep one of the two"),
        (b"id;prompt;id\n1;a;2\n", "the column id appears twice"),
        (b"", "needs a column image_id or id"),
        (b"id,prompt\n1,a\rb\rc\n", "line 3 has 1 values"),
        (b"id,prompt\n1," + b"x" * 200_000, "is not a table row .*field larger"),
    ],
    ids=[
        "cp1252",
        "short",
        "long",
        "twice",
        "twice by number",
        "odd UTF-16",
        "columns",
        "column twice",
        "id column twice",
        "empty",
        "lone CR",
        "endless",
    ],
)
def test_a_broken_table_names_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = table(tmp_path, content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_prompt_list(str(file), PromptList(3, "0" * 64, "three prompts"))
    assert "\n" not in str(refused.value)
    assert str(file) in str(refused.value)


# --- DreamBooth's prompts ---------------------------------------------------------------------------------------------


def subjects_file(
    root: Path, classes: str, objects: str = "'a {0} {1}'.format(unique_token, class_token)", live: str = ""
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    live = live or "'a {0} {1} in a hat'.format(unique_token, class_token)"
    file = root / "prompts_and_classes.txt"
    file.write_text(
        f"Classes\n\nsubject_name,class\n{classes}\n\nPrompts\n\nObject Prompts\n\nprompt_list = [\n{objects}\n]\n\n"
        f"Live Subject Prompts\n\nprompt_list = [\n{live}\n]\n",
        encoding="utf-8",
    )
    return file


@pytest.mark.parametrize(
    ("entry", "name", "word"),
    [
        ("rc-car,toy", "rc-car", "toy"),
        ("my dog,dog", "my dog", "dog"),
        ("teddy,plush-toy", "teddy", "plush-toy"),
        ("café,café cup", "café", "café cup"),
        ("chien,chien d'eau", "chien", "chien d'eau"),
        (" mug , cup ", "mug", "cup"),
        ("猫,猫", "猫", "猫"),
    ],
)
def test_subjects_and_classes_may_have_hyphens_spaces_and_accents(entry: str, name: str, word: str, tmp_path: Path) -> None:
    classes, prompts = read_prompts(subjects_file(tmp_path, f"can,can\n{entry}\nvase,vase"))
    assert classes == {"can": "can", name: word, "vase": "vase"}
    assert prompts[name] == (("a {0} {1} in a hat",) if word == "dog" else ("a {0} {1}",))
    for subject in ("can", name, "vase"):
        (tmp_path / subject).mkdir()
        (tmp_path / subject / "0.png").write_bytes(png())
    assert [subject.name for subject in read_subjects(tmp_path, (), R)] == ["can", name, "vase"]


def test_a_folder_with_a_decomposed_accent_belongs_to_its_subject(tmp_path: Path) -> None:
    subjects_file(tmp_path, "cafe\u0301,cup")
    (tmp_path / "cafe\u0301").mkdir()
    (tmp_path / "cafe\u0301" / "0.png").write_bytes(png())
    assert [subject.name for subject in read_subjects(tmp_path, ("caf\u00e9",), R)] == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("prompt", "template"),
    [
        ('"a {0} {1} in the snow".format(unique_token, class_token)', "a {0} {1} in the snow"),
        ('"the {0} {1}\'s bed".format(unique_token, class_token)', "the {0} {1}'s bed"),
        ("'the {0} {1}\\'s bed'.format(unique_token, class_token)", "the {0} {1}'s bed"),
        ("'a {} {}'.format(unique_token, class_token)", "a {} {}"),
        ("'a {0} {1}'", "a {0} {1}"),
        ("'a {0} {1} [night]'.format(unique_token, class_token)", "a {0} {1} [night]"),
    ],
)
def test_prompts_may_be_written_as_any_python_text(prompt: str, template: str, tmp_path: Path) -> None:
    first = "'first {0} {1}'.format(unique_token, class_token)"
    _, prompts = read_prompts(subjects_file(tmp_path, "can,can", f"{first},\n{prompt},  # a comment\n"))
    assert prompts["can"] == ("first {0} {1}", template)


@pytest.mark.parametrize(
    ("classes", "objects", "message"),
    [
        ("can,can\ndog", "", "line 5 is not SUBJECT,CLASS"),
        ("can,can\ndog,dog,7", "", "line 5 is not SUBJECT,CLASS"),
        ("can,can\n../dog,dog", "", "line 5 is not SUBJECT,CLASS"),
        ("can,can\n,dog", "", "line 5 is not SUBJECT,CLASS"),
        ("can,can\ndog,dog\ncan,tin", "", "line 6: subject can appears twice"),
        ("can,can", "f'a {unique_token} {class_token}'", "line 11 is not a prompt"),
        ("can,can", "'a {0} {1}'.format(class_token, unique_token)", "line 11 is not a prompt"),
        ("can,can", "'a {2}'.format(unique_token, class_token)", "line 11 is not a prompt"),
        ("can,can", "'a {0.x}'.format(unique_token, class_token)", "line 11 is not a prompt"),
        ("can,can", "'a {0} {1}'.format(unique_token, class_token),\n'a {0} {1}.format(x, y)", "line 12 is not a prompt"),
        ("can,can", "__import__('os').system('touch owned')", "line 11 is not a prompt"),
        ("can,can", "#", "the prompt list of subject can is empty"),
    ],
)
def test_a_line_of_prompts_and_classes_that_cannot_be_read_is_named(
    classes: str, objects: str, message: str, tmp_path: Path
) -> None:
    file = subjects_file(tmp_path, classes, objects or "'a {0} {1}'.format(unique_token, class_token)")
    with pytest.raises(ConfigError, match=message) as refused:
        read_prompts(file)
    assert "\n" not in str(refused.value)


def test_a_subject_that_a_study_names_twice_is_refused(tmp_path: Path) -> None:
    subjects_file(tmp_path, "can,can")
    assert "can appears twice" in refusal(lambda: read_subjects(tmp_path, ("can", "can"), R))


# --- captions that a text encoder loses -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> MiniLMTextEncoder:
    return MiniLMTextEncoder(TextEncoderSpec(path="minilm", max_tokens=8))


KNOWN = [f"a {colour} box" for colour in ("red", "blue", "green", "white")]


def javanese(number: int) -> str:
    return chr(0xA98F + number) * 3


@pytest.mark.parametrize(
    ("captions", "num_cut", "num_unknown", "num_token_rows"),
    [
        (KNOWN, 0, 0, 4),
        ([*KNOWN, "a red box next to a blue box and a green box"], 1, 0, 5),
        ([f"one two three four five six {number}" for number in range(16)], 16, 0, 1),
        ([javanese(number) for number in range(16)], 0, 16, 1),
        ([*KNOWN, "a 😀 box"], 0, 1, 5),
        (["a red box", "A red  box"], 0, 0, 1),
        (KNOWN * 2, 0, 0, 4),
        ([], 0, 0, 0),
    ],
)
def test_captions_that_are_cut_or_unknown_are_counted(
    encoder: MiniLMTextEncoder, captions: list[str], num_cut: int, num_unknown: int, num_token_rows: int
) -> None:
    counts = encoder.token_statistics(captions)
    assert (counts.num_cut, counts.num_unknown, counts.num_token_rows) == (num_cut, num_unknown, num_token_rows)
    assert counts.num_prompts == len(set(captions))
    assert len({tuple(row) for row in encoder.tokenize(captions or [""]).tolist()}) == max(num_token_rows, 1)
    assert bool(counts.note()) == bool(num_cut or num_unknown or num_token_rows < len(set(captions)))


def test_a_cache_saves_the_counts_and_its_note_names_them(encoder: MiniLMTextEncoder, tmp_path: Path) -> None:
    images: Tensor = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    captions = [(javanese(number % 16) * (1 + number // 16),) for number in range(64)]
    data = ImageDataset(images, captions, [str(number) for number in range(64)], None)
    autoencoder = PCAAutoencoder.fit(load_images(ScenesSource(kind="scenes", num_images=32), 32, 0).images, 8, 4)
    store = ShardStore(tmp_path)
    write_index(store, write_cache(store, data.read, autoencoder, encoder))
    assert LatentCache(store).index["token_statistics"]["num_token_rows"] == 1
    note = LatentCache(store).token_note
    assert "of 64 distinct captions, 64 (100.0%) have words that the text encoder does not know" in note
    assert "only 1 distinct token rows" in note


def test_a_study_warns_when_it_makes_its_cache_which_is_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = plain_study()
    data = {**plain["data"], "train": {"kind": "scenes", "num_images": 40}}
    autoencoder = {**plain["autoencoder"], "num_fit_images": 40}
    study = tiny_study(data=data, autoencoder=autoencoder, text_encoder={"path": "minilm", "max_tokens": 4})
    with caplog.at_level(logging.WARNING, "isocost"):
        StudyAssets(study, Store(tmp_path)).load_or_build_latent_cache()
    assert "data.train: of " in caplog.text
    assert "are longer than 4 tokens and are cut" in caplog.text
    assert "distinct token rows" in caplog.text


def test_prompts_that_are_cut_are_warned_about_once(encoder: MiniLMTextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [*KNOWN, "a red box next to a blue box, which nobody else has in a test"]
    with caplog.at_level(logging.WARNING, "isocost"):
        for _ in range(2):
            PromptEmbeds.encode(prompts, encoder)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "1 (20.0%) are longer than 8 tokens and are cut" in messages[0]
