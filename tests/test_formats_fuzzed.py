"""Every file that a user or another program writes, damaged at random: a value or one line, and nothing is written.

The examples are the same in every run.
"""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from conftest import plain_study
from isocost.config.base import parse_spec
from isocost.config.data import FolderSource, ScenesSource, WebdatasetSource
from isocost.config.model import TextEncoderSpec
from isocost.config.study import StudySpec
from isocost.config.yaml_text import parse_yaml
from isocost.data.datasets import Sample, UnreadableSample, read_source, source_fingerprint
from isocost.data.dreambooth import read_prompts
from isocost.data.latent_cache import LatentCache, load_images, write_cache, write_index
from isocost.data.row_store import ShardStore
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError, RunError
from isocost.evaluation.image_sources import image_id
from isocost.evaluation.prompt_lists import _read_csv
from isocost.models.checkpoint import load_checkpoint, read_info
from isocost.models.pretrained.files import check_complete, weight_files
from isocost.models.pretrained.scheduler_config import read_scheduler
from isocost.models.pretrained.scheduler_fields import SCHEDULER_FIELDS
from isocost.models.text_encoder import MiniLMTextEncoder
from isocost.pipeline.compatibility import DATA_FILE, read_content
from isocost.pipeline.status import STATUS_FILE, Best, SizeStatus, Status, read_status
from isocost.utils.artifact_store import MANIFEST, Store, verified_manifest
from isocost.utils.output_paths import check_output_file, check_output_folder
from isocost.utils.tensor_files import read_tensors
from output_folders import contents, pca_autoencoder, write_checkpoint

NUM_EXAMPLES = 40
fuzzed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=NUM_EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.sampled_from([10**400, -(10**400), 2**63, 10**9, 1e308, 1e-308, float("nan"), float("inf"), -float("inf"), -1e308]),
        st.floats(),
        st.text(max_size=6),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)
"""Any value of JSON, also those that Python writes and other programs do not."""


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes of a file with one to three changes: bytes replaced, inserted, removed or repeated, or the end cut off."""
    data = whole
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.integers(0, 12)))
        added = draw(
            st.one_of(st.binary(max_size=8), st.just(data[start:stop] * 2), st.sampled_from([b'"', b"\n", b"\r", b"\0"]))
        )
        data = draw(st.sampled_from([data[:start] + added + data[stop:], data[:start], data[:start] + data[stop:]]))
    return data


def paths_of(document: Any, parents: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    yield parents
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        yield from paths_of(value, (*parents, key))


@st.composite
def with_another_value(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document in which one value, at any depth, is another one or absent."""
    path = draw(st.sampled_from(list(paths_of(document))))
    if not path:
        return draw(VALUES)
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if draw(st.booleans()) and draw(st.booleans()):
        del inner[path[-1]]
    else:
        inner[path[-1]] = draw(VALUES)
    return changed


@contextmanager
def new_folder() -> Iterator[Path]:
    """A new folder, whose content `value_or_line` compares."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def value_or_line(folder: Path, read: Callable[[], Any]) -> Any:
    """The value that a reader returns; None if it refuses in one line. It writes nothing into the folder."""
    before = contents(folder)
    try:
        value = read()
    except (ConfigError, RunError) as error:
        message = str(error)
        assert message
        assert "\n" not in message
        assert len(message) < 2000
        value = None
    assert contents(folder) == before
    return value


def png(side: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (9, 99, 199)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()

# --- captions ---------------------------------------------------------------------------------------------------------

TABLE = 'image_id,prompt\n203564,"a ""red"" disc, on white"\n203571,"two\nlines"\n203578,blüte\n'
LINES = (
    '{"file": "0.png", "caption": "a disc"}\n{"file_name": "1.png", "captions": ["a", "\\ud83d\\ude00"]}\n'
    '{"file": "sub/2.png", "caption": "blüte"}\n'
)
SUBJECTS = """Classes

subject_name,class
can,can
cat,cat

Prompts

prompt_list = [
'a {0} {1}'.format(unique_token, class_token),
"the {0} {1}'s bed"
]

prompt_list = [
'a {0} {1} in a hat'.format(unique_token, class_token)
]
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_damaged_caption_table(encoding: str) -> None:
    @fuzzed
    @given(st.one_of(damaged(TABLE.encode(encoding)), damaged(TABLE.replace(",", ";").encode(encoding))))
    def check(data: bytes) -> None:
        with new_folder() as folder:
            (folder / "prompts.csv").write_bytes(data)
            prompts = value_or_line(folder, lambda: _read_csv(folder / "prompts.csv"))
            assert prompts is None or all(isinstance(text, str) for pair in prompts.items() for text in pair)

    check()


@fuzzed
@given(name=st.sampled_from(["captions.jsonl", "metadata.jsonl", "metadata.csv", "0.json", "0.txt"]), data=st.data())
def test_a_damaged_caption_list(name: str, data: st.DataObject) -> None:
    whole = {
        "metadata.csv": "file_name,text\n0.png,a disc\n1.png,b\n",
        "0.json": '{"captions": ["a", "b"]}',
        "0.txt": "a disc\n",
    }
    with new_folder() as folder:
        (folder / "sub").mkdir()
        for image in ("0.png", "1.png", "sub/2.png"):
            (folder / image).write_bytes(PNG)
        (folder / name).write_bytes(data.draw(damaged(whole.get(name, LINES).encode())))
        source = FolderSource(kind="folder", path=str(folder))
        items = value_or_line(folder, lambda: list(read_source(source, 4)))
        value_or_line(folder, lambda: source_fingerprint(source))
        for item in items or ():
            assert isinstance(item, Sample | UnreadableSample)
            texts = item.captions if isinstance(item, Sample) else (item.reason,)
            assert all(text.encode("utf-8") for text in (item.name, *texts))


@fuzzed
@given(damaged(SUBJECTS.encode()))
def test_damaged_prompts_and_classes(data: bytes) -> None:
    with new_folder() as folder:
        (folder / "prompts_and_classes.txt").write_bytes(data)
        value_or_line(folder, lambda: read_prompts(folder / "prompts_and_classes.txt"))


# --- names ------------------------------------------------------------------------------------------------------------

FILE_NAMES = st.one_of(
    st.binary(min_size=1, max_size=12), st.text(min_size=1, max_size=8).map(lambda text: text.encode("utf-8", "replace"))
).filter(lambda name: not {b"/", b"\0"} & {name[i : i + 1] for i in range(len(name))} and name not in (b".", b".."))


@settings(fuzzed, max_examples=NUM_EXAMPLES // 2)
@given(names=st.lists(FILE_NAMES, min_size=1, max_size=3), suffix=st.sampled_from([b".png", b".PNG", b".jpg.png", b""]))
def test_images_with_any_names(names: list[bytes], suffix: bytes) -> None:
    with new_folder() as folder:
        for name in names:
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name + suffix)).write_bytes(PNG)
        source = FolderSource(kind="folder", path=str(folder))
        for item in value_or_line(folder, lambda: list(read_source(source, 4))) or ():
            assert item.name.encode("utf-8")
            assert image_id(item.name).encode("utf-8") or item.name
        value_or_line(folder, lambda: source_fingerprint(source))


@fuzzed
@given(st.lists(st.tuples(st.text(max_size=12), st.sampled_from([".png", ".txt", ".json", ""])), max_size=5))
def test_members_of_a_shard_with_any_names(members: list[tuple[str, str]]) -> None:
    with new_folder() as folder:
        with tarfile.open(folder / "x.tar", "w", errors="surrogatepass") as archive:
            for name, suffix in members:
                content = PNG if suffix == ".png" else b"a disc"
                member = tarfile.TarInfo(name + suffix)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        source = WebdatasetSource(kind="webdataset", path=str(folder / "x.tar"))
        for item in value_or_line(folder, lambda: list(read_source(source, 4))) or ():
            assert item.name.encode("utf-8")


@fuzzed
@given(st.text(max_size=300))
@example("a" * 5000)
@example("\0")
@example("\ud800")
def test_any_text_as_a_destination(text: str) -> None:
    with new_folder() as folder:
        for check in (check_output_folder, lambda path: check_output_file(path, ".json")):
            value_or_line(folder, lambda check=check: check(folder / text.lstrip("/").replace("..", "")))  # type: ignore[misc]


# --- safetensors ------------------------------------------------------------------------------------------------------

TENSORS = save({"a.weight": torch.ones(3, 2), "b": torch.zeros(2, dtype=torch.bfloat16)}, {"format": "pt"})
HEADER_BYTES = struct.unpack("<Q", TENSORS[:8])[0]
HEADER = json.loads(TENSORS[8 : 8 + HEADER_BYTES])


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + TENSORS[8 + HEADER_BYTES :]


@fuzzed
@given(st.one_of(damaged(TENSORS), with_another_value(HEADER).map(with_header)))
def test_a_damaged_file_of_weights(data: bytes) -> None:
    with new_folder() as folder:
        file = folder / "diffusion_pytorch_model.safetensors"
        file.write_bytes(data)
        value_or_line(folder, lambda: check_complete(file))
        value_or_line(folder, lambda: weight_files(folder))
        value_or_line(folder, lambda: read_tensors(file, "b"))


INDEX = {"metadata": {"total_size": 28}, "weight_map": {"a.weight": "one.safetensors", "b": "one.safetensors"}}


@fuzzed
@given(st.one_of(damaged(json.dumps(INDEX).encode()), with_another_value(INDEX).map(lambda index: json.dumps(index).encode())))
def test_a_damaged_index_of_weights(data: bytes) -> None:
    with new_folder() as folder:
        (folder / "one.safetensors").write_bytes(TENSORS)
        (folder / "model.safetensors.index.json").write_bytes(data)
        found = value_or_line(folder, lambda: weight_files(folder))
        assert found is None or found == ("", [folder / "one.safetensors"])


# --- published schedulers ---------------------------------------------------------------------------------------------


@st.composite
def scheduler_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A scheduler config with up to three fields of any value."""
    name = draw(st.sampled_from(sorted(SCHEDULER_FIELDS)))
    fields = draw(st.dictionaries(st.sampled_from(sorted(SCHEDULER_FIELDS[name])), VALUES, max_size=3))
    return {"_class_name": name, "prediction_type": "epsilon", **fields}


@fuzzed
@given(config=scheduler_configs(), num_patches=st.sampled_from([None, 16]))
def test_any_values_of_a_scheduler(config: dict[str, Any], num_patches: int | None) -> None:
    with new_folder() as folder:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        found = value_or_line(folder, lambda: read_scheduler(folder, False, num_patches))
        if found is not None:
            schedule = value_or_line(folder, lambda: NoiseSchedule.from_spec(found.noise))
            if schedule is not None:
                value_or_line(folder, lambda: solver_coefficients(found.solver, 2, schedule))


# --- files of an output folder ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(Store(tmp_path_factory.mktemp("checkpoint")))


def test_a_manifest_with_any_value(checkpoint: Path) -> None:
    assert load_checkpoint(checkpoint).info.resolution == 32
    whole = json.loads((checkpoint / MANIFEST).read_text())
    plain = {key: value for key, value in whole.items() if not key.endswith("_sha256")}

    @fuzzed
    @given(st.one_of(with_another_value(plain), with_another_value(whole)))
    def check(content: Any) -> None:
        with new_folder() as folder:
            (folder / MANIFEST).write_text(json.dumps(content))
            value_or_line(folder, lambda: verified_manifest(folder))
            if value_or_line(folder, lambda: read_info(folder)) is not None:
                value_or_line(folder, lambda: load_checkpoint(folder))

    check()


RECORDS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    DATA_FILE: ({"train": "0" * 16, "autoencoder": {"path": "vae", "content": "1" * 16}}, read_content),
    STATUS_FILE: (
        asdict(
            Status(
                *("tiny", "done", "2026-11-30T00:00:00+00:00", 1, 1.0, None),
                [SizeStatus("width 8", "0.8M", 64, 64, 1, 5, 0, 1.0, Best("mmd", 0.5, 0.4, 0.6, "0.8M", "ddim", 1, 1.0))],
            )
        ),
        read_status,
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_of_an_output_folder(name: str) -> None:
    document, read = RECORDS[name]
    with new_folder() as folder:
        (folder / name).write_text(json.dumps(document))
        assert value_or_line(folder, lambda: read(folder))

    @fuzzed
    @given(
        st.one_of(damaged(json.dumps(document).encode()), with_another_value(document).map(lambda d: json.dumps(d).encode()))
    )
    def check(data: bytes) -> None:
        with new_folder() as folder:
            (folder / name).write_bytes(data)
            value_or_line(folder, lambda: read(folder))

    check()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    images = load_images(ScenesSource(kind="scenes", num_images=4), 32, 0)
    encoder = MiniLMTextEncoder(TextEncoderSpec(max_tokens=8))
    write_index(ShardStore(folder), write_cache(ShardStore(folder), images.read, pca_autoencoder(), encoder))
    return folder


def read_everything(folder: Path) -> None:
    cache = LatentCache(folder)
    for images in (torch.arange(len(cache)), torch.arange(4)):
        cache.moments(images)
        cache.prompt_embeds(cache.captions(images)[:, 0])
    assert isinstance(cache.token_note, str)


def test_the_index_of_a_latent_cache_with_any_value(cache: Path) -> None:
    read_everything(cache)
    whole = json.loads((cache / MANIFEST).read_text())
    others = [file for file in cache.iterdir() if file.name != MANIFEST]

    @fuzzed
    @given(with_another_value({key: value for key, value in whole.items() if key != "provenance"}))
    def check(index: Any) -> None:
        with new_folder() as folder:
            for file in others:
                (folder / file.name).symlink_to(file)
            (folder / MANIFEST).write_text(json.dumps(index))
            value_or_line(folder, lambda: read_everything(folder))

    check()


# --- study files ------------------------------------------------------------------------------------------------------

STUDY = yaml.safe_dump(plain_study()).encode()


@fuzzed
@given(damaged(STUDY))
def test_a_damaged_study_file(data: bytes) -> None:
    with new_folder() as folder:

        def read() -> StudySpec:
            return parse_spec(StudySpec, parse_yaml(data.decode("utf-8", "replace"), "study.yaml"), "study.yaml")

        study = value_or_line(folder, read)
        assert study is None or study.name
