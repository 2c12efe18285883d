"""Situations that people reported about other tools, rebuilt. Each test names its report."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tiny_pipelines
from isocost.cli.app import print_json
from isocost.config.data import FolderSource, HubSource, WebdatasetSource
from isocost.data.datasets import Sample, UnreadableSample, read_source, source_fingerprint
from isocost.data.latent_cache import load_images
from isocost.errors import ConfigError
from isocost.evaluation.image_sources import iter_images
from isocost.models.checkpoint import load_checkpoint, read_info
from isocost.sweep.results_db import ResultsDB

R = 16


def encoded(level: int = 0, size: int = R, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (level,) * 3).save(buffer, image_format)
    return buffer.getvalue()


def folder(root: Path, files: dict[str, bytes]) -> FolderSource:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return FolderSource(kind="folder", path=str(root))


def shard(file: Path, members: list[tuple[str, bytes]]) -> WebdatasetSource:
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return WebdatasetSource(kind="webdataset", path=str(file))


def table(file: Path, rows: list[tuple[bytes, str | None, Any]]) -> HubSource:
    columns = {
        "image": [{"bytes": data, "path": None} for data, _, _ in rows],
        "captions": [caption for _, caption, _ in rows],
        "label": [label for _, _, label in rows],
    }
    pq.write_table(pa.table(columns), file)
    return HubSource(kind="hub", path=str(file.parent))


def captions_of(source: Any) -> dict[str, tuple[str, ...]]:
    return {item.name: item.captions for item in read_source(source, R) if isinstance(item, Sample)}


def reasons_of(source: Any) -> list[str]:
    return [item.reason for item in read_source(source, R) if isinstance(item, UnreadableSample)]


def pixel_of(source: Any) -> list[int]:
    (item,) = read_source(source, R)
    assert isinstance(item, Sample)
    return [int(value) for value in item.image[R // 2, R // 2]]


# --- data sets --------------------------------------------------------------------------------------------------------


def test_other_suffixes_of_a_shard_are_named(tmp_path: Path) -> None:
    """open_clip 480: `sample.input.jpg` and `sample.outputs.txt`."""
    source = shard(tmp_path / "a.tar", [("s0.input.jpg", encoded(image_format="JPEG")), ("s0.outputs.txt", b"a cat")])
    (reason,) = reasons_of(source)
    assert "needs an image and a .json or .txt of the same name up to the first dot" in reason
    assert "the members end in .input.jpg, .outputs.txt" in reason


def test_members_that_are_not_next_to_each_other_are_explained(tmp_path: Path) -> None:
    """webdataset 140: all captions of a shard, then all images."""
    source = shard(tmp_path / "a.tar", [("a.txt", b"a"), ("b.txt", b"b"), ("a.png", encoded()), ("b.png", encoded())])
    reasons = reasons_of(source)
    assert len(reasons) == 4
    assert all("next to each other in the shard" in reason for reason in reasons)


def test_a_damaged_image_is_one_unreadable_sample(tmp_path: Path) -> None:
    """webdataset 206 and datasets 6470: a truncated image in a shard, and in Parquet."""
    source = shard(
        tmp_path / "a.tar", [("a.png", encoded(size=64)[:60]), ("a.txt", b"a"), ("b.png", encoded()), ("b.txt", b"b")]
    )
    assert captions_of(source) == {"a.tar/b": ("b",)}
    rows = table(tmp_path / "train.parquet", [(encoded()[:40], "a", 0), (encoded(), "b", 0), (encoded(), None, 0)])
    assert captions_of(rows) == {"train/1": ("b",)}
    assert len(reasons_of(rows)) == 2


def test_a_replaced_parquet_file_is_read_again(tmp_path: Path) -> None:
    """datasets 2956: the cache of `datasets` knows a file by its path and time."""
    file = tmp_path / "train.parquet"
    source = table(file, [(encoded(1), "old", 0)])
    before, status = source_fingerprint(source), file.stat()
    assert captions_of(source) == {"train/0": ("old",)}
    table(file, [(encoded(1), "new", 0)])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert captions_of(source) == {"train/0": ("new",)}
    assert source_fingerprint(source) != before


def test_a_label_that_is_text_is_one_unreadable_image(tmp_path: Path) -> None:
    """A column of class names in place of their numbers."""
    source = table(tmp_path / "train.parquet", [(encoded(), "a", "cat")]).model_copy(update={"label_column": "label"})
    assert reasons_of(source) == ["its label is no integer: cat"]


def test_a_row_with_a_text_for_its_image_or_a_huge_label_is_one_unreadable_image(tmp_path: Path) -> None:
    """A text in the place of the image's bytes is no path: the file with this name is not read."""
    (tmp_path / "secret.png").write_bytes(encoded())
    columns = {
        "image": [{"bytes": str(tmp_path / "secret.png"), "path": None}],
        "captions": ["a"],
        "label": pa.array([2**64 - 1], pa.uint64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    source = HubSource(kind="hub", path=str(tmp_path / "train.parquet"))
    assert reasons_of(source) == ["no image bytes in the image column"]
    pq.write_table(pa.table(columns | {"image": [{"bytes": encoded(), "path": None}]}), tmp_path / "train.parquet")
    (reason,) = reasons_of(source.model_copy(update={"label_column": "label"}))
    assert reason.startswith("its label is no integer")


def test_caption_files_of_sd_scripts_are_read(tmp_path: Path) -> None:
    """taggui 57 and kohya_ss 1370: `.caption` is the default of sd-scripts."""
    files = {"0.png": encoded(), "0.caption": b"a cat", "1.png": encoded(), "1.caption": b"less", "1.txt": b"more"}
    source = folder(tmp_path / "data", files)
    assert captions_of(source) == {"0.png": ("a cat",), "1.png": ("more",)}
    members = [("0.png", encoded()), ("0.caption", b"a cat")]
    assert captions_of(shard(tmp_path / "a.tar", members)) == {"a.tar/0": ("a cat",)}


def test_suffixes_in_capital_letters_are_read(tmp_path: Path) -> None:
    """Files of cameras and of Windows."""
    source = folder(tmp_path / "data", {"0.PNG": encoded(), "0.TXT": b"a", "1.JPG": encoded(), "1.Json": b'{"caption": "b"}'})
    assert captions_of(source) == {"0.PNG": ("a",), "1.JPG": ("b",)}
    both = folder(tmp_path / "both", {"0.png": encoded(), "0.TXT": b"other", "0.txt": b"one"})
    assert captions_of(both) == {"0.png": ("one",)}


def test_small_images_are_enlarged_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """sd-scripts 130: small images are enlarged without a word."""
    files = {f"{number}.png": encoded(number, 8 if number < 3 else R) for number in range(5)}
    source = folder(tmp_path / "data", files | {f"{number}.txt": b"a" for number in range(5)})
    with caplog.at_level(logging.WARNING, "isocost"):
        assert len(load_images(source, R, 0)) == 5
    assert "3 images are smaller than data.resolution, 16 pixels, and enlarged to it" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "isocost"):
        load_images(source, 8, 0)
    assert not caplog.text


def test_images_of_cameras_are_read(tmp_path: Path) -> None:
    """Pillow 1138: a JPEG with a second image has the format MPO. Pillow 6563: colours of a CMYK file."""
    (tmp_path / "mpo").mkdir()
    Image.new("RGB", (R, R), (9, 200, 9)).save(
        tmp_path / "mpo" / "0.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    )
    assert pixel_of(folder(tmp_path / "mpo", {"0.txt": b"a"})) == pytest.approx([9, 200, 9], abs=2)
    (tmp_path / "cmyk").mkdir()
    Image.new("RGB", (R, R), (250, 10, 10)).convert("CMYK").save(tmp_path / "cmyk" / "0.jpg")
    assert pixel_of(folder(tmp_path / "cmyk", {"0.txt": b"a"})) == pytest.approx([250, 10, 10], abs=2)


def test_files_that_are_no_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pipe named like an image is not opened, and HEIC photographs of a telephone are named."""
    source = folder(tmp_path / "data", {"1.png": encoded(), "1.txt": b"a", "2.HEIC": b"x"})
    os.mkfifo(tmp_path / "data" / "0.png")
    with caplog.at_level(logging.WARNING, "isocost"):
        assert captions_of(source) == {"1.png": ("a",)}
    assert "2 files are ignored: 1 .heic, 1 in special files" in caplog.text


# --- arrays and scores ------------------------------------------------------------------------------------------------


def test_the_images_of_an_array_file_are_found(tmp_path: Path) -> None:
    """Sample files of guided-diffusion have labels next to the images."""
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "labels-first.npz", y=np.arange(3), x=images)
    assert len(list(iter_images(str(tmp_path / "labels-first.npz"), resolution=None, exact=True))) == 3
    np.savez(tmp_path / "two.npz", x=images, z=images + 9)
    with pytest.raises(ConfigError, match=r"2 arrays can be images \(x, z\)"):
        list(iter_images(str(tmp_path / "two.npz"), resolution=None, exact=True))


def test_a_score_of_images_of_other_sizes_has_a_note(tmp_path: Path, isocost: Any) -> None:
    """clean-fid 2: two folders with images of other sizes are compared. stylegan3 174: replaced reference images count."""
    generator = np.random.default_rng(0)
    for name, size in (("generated", 32), ("reference", 64)):
        (tmp_path / name).mkdir()
        for number in range(32):
            pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    arguments = ("score", tmp_path / "generated", "--reference", tmp_path / "reference", "--protocol", "mmd-efficientnet-64")
    first = isocost(*arguments).answer
    assert any("the images have 32 x 32 pixels, the reference 64 x 64" in note for note in first["notes"])
    Image.new("RGB", (64, 64)).save(tmp_path / "reference" / "0.png")
    assert isocost(*arguments).answer["protocol"] != first["protocol"]


# --- output -----------------------------------------------------------------------------------------------------------


def test_the_last_line_is_json_whatever_the_numbers_are(capsys: pytest.CaptureFixture[str]) -> None:
    """helm 1765 and MEDS-DEV 239: NaN is no JSON."""
    print_json({"a": float("nan"), "b": [float("-inf"), 1.5, np.float32("nan")]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["b"][:2] == [None, 1.5]


@pytest.mark.slow
def test_names_that_a_terminal_cannot_show_do_not_end_a_command() -> None:
    """dupeguru 335 and the like: names that are not UTF-8, and terminals that are not."""
    code = (
        "import os, sys; from isocost.cli import main; from isocost.cli.app import print_json;"
        "print_json({'file': os.fsdecode(b'caf\\xe9'), 'prompt': 'blüte 花'});"
        "sys.argv = ['isocost', 'score', os.fsdecode(b'caf\\xe9 ') + '花\\nb', '--reference', 'x', '--protocol',"
        "'mmd-efficientnet-64']; main()"
    )
    for encoding in ("ascii", "utf-8", "latin-1"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
        assert done.returncode == 2, done.stderr
        printed = json.loads(done.stdout.decode(encoding))
        assert printed == {"file": "caf\udce9", "prompt": "blüte 花"}
        (line,) = done.stderr.decode(encoding).strip().splitlines()
        assert line.startswith("isocost: ")
        assert "no such folder of images" in line
        assert "\\nb" in line


def test_an_output_folder_with_any_name_has_its_own_database(tmp_path: Path) -> None:
    """sqlalchemy 11234: in an address, `?` ends the path of the file."""
    for name in ("what?b=c", "100%", "a#b", "a b", "s3:x", "[1]"):
        (tmp_path / name).mkdir()
        ResultsDB(tmp_path / name / "results.sqlite").engine.dispose()
        assert (tmp_path / name / "results.sqlite").is_file()
    assert len(list(tmp_path.iterdir())) == 6


# --- checkpoints ------------------------------------------------------------------------------------------------------

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path_factory.mktemp("reports") / "base")


def update(base: Path, source: str, name: str) -> float:
    """The largest change of a layer's weights by a LoRA."""
    before, after = (
        next(value for key, value in load_checkpoint(path).network.named_parameters() if key.endswith(f"{LAYER}.{name}.weight"))
        for path in (base, source)
    )
    return float((after - before).abs().max())


def test_every_layer_of_a_lora_has_the_scale_of_its_own_rank(base: Path, tmp_path: Path) -> None:
    """diffusers 14409: ranks differ and the file has no alphas."""
    tensors = {}
    for name, rank in (("to_q", 2), ("to_k", 4)):
        tensors[f"unet.{LAYER}.{name}.lora_A.weight"] = torch.full((rank, 32), 0.01)
        tensors[f"unet.{LAYER}.{name}.lora_B.weight"] = torch.ones(32, rank)
    save_file(tensors, tmp_path / "mixed.safetensors")
    source = f"{base} + {tmp_path / 'mixed.safetensors'}"
    assert update(base, source, "to_q") == pytest.approx(0.02, abs=1e-6)
    assert update(base, source, "to_k") == pytest.approx(0.04, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "result"),
    [
        ({"lora_alpha": 8}, 0.08),  # diffusers 6087
        ({"use_rslora": True}, "rank-stabilised scales"),  # peft 2733
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),  # peft 1929
        ({"alpha_pattern": {"to_q": 16}}, "alphas by pattern"),
    ],
)
def test_the_config_of_an_adapter_counts(base: Path, tmp_path: Path, options: dict[str, Any], result: float | str) -> None:
    prefix = f"base_model.model.{LAYER}.to_q"
    tensors = {f"{prefix}.lora_A.weight": torch.full((4, 32), 0.01), f"{prefix}.lora_B.weight": torch.ones(32, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, **options}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if isinstance(result, float):
        assert update(base, f"{base} + {tmp_path}", "to_q") == pytest.approx(result, abs=1e-6)
    else:
        with pytest.raises(ConfigError, match=result):
            read_info(Path(f"{base} + {tmp_path}"))


def test_a_lora_whose_keys_nobody_knows_is_refused(tmp_path: Path) -> None:
    """diffusers 9950: a LoRA for SD 3.5 loads without a word, and without a key."""
    flow = tiny_pipelines.written(tiny_pipelines.sd3(with_t5=False), tmp_path / "flow")
    key = "lora_unet_joint_blocks_0_context_block_attn_proj"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 32), f"{key}.lora_up.weight": torch.ones(32, 2)}
    save_file({**tensors, f"{key}.alpha": torch.tensor(2.0)}, tmp_path / "kohya.safetensors")
    with pytest.raises(ConfigError, match=r"kohya\.safetensors"):
        read_info(Path(f"{flow} + {tmp_path / 'kohya.safetensors'}"))


def test_networks_of_one_pipeline_may_have_other_variants(tmp_path: Path) -> None:
    """diffusers 11182: bf16 weights of one network, plain weights of the others."""
    mixed = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "mixed")
    weights = mixed / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bf16.safetensors"))
    assert load_checkpoint(mixed).info.num_parameters > 0


def test_a_length_beyond_the_file_is_one_line(tmp_path: Path) -> None:
    """A safetensors header that claims more bytes than the file has."""
    broken = tiny_pipelines.written(tiny_pipelines.stable_diffusion(), tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError, match="not a complete safetensors file; download it again"):
        read_info(broken)
