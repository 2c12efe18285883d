"""Captions, names and paths of data sets and results databases are never executed; addresses are used unchanged."""

from __future__ import annotations

import io
import json
import shlex
import sqlite3
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from conftest import tiny_study
from isocost.analysis.recommend import recommend
from isocost.config.data import WebdatasetSource
from isocost.data.latent_cache import load_images
from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.pipeline.workers import run_on_ray
from isocost.sweep.results_db import ResultsDB
from synthetic_results import synthetic_table

NASTY = "'); DROP TABLE points; --"
SHELL = "$(touch owned); `touch owned`; 'x\" | touch owned"


def test_names_in_a_results_database_are_parameters_never_sql(tmp_path: Path) -> None:
    results_db = ResultsDB(tmp_path / "results.sqlite")
    results_db.set_events("data.train", [(NASTY, "<script>alert(1)</script>")])
    results_db.add_shard(NASTY, NASTY, range(4))
    row = {
        **{"point": "a", "checkpoint": NASTY, "protocol": "p", "task": NASTY, "size": NASTY, "solver": NASTY},
        **{"width": 8, "num_parameters": 1, "images_seen": 1, "training_gflop": 1.0, "num_steps": 1, "guidance": 1.0},
        **{"num_images": 32, "num_nonfinite": 0, "seed": 0, "dtype": "fp32", "compiled": False, "batch_size": 1},
        **{"min_batch_size": 1, "normalized_cost": 1.0, "nfe": 1.0, "gflop_denoiser": 1.0, "ms_per_image": 1.0, "seconds": 1.0},
        "has_too_few_samples": False,
    }
    results_db.add_point(row, {NASTY: Interval(1.0, 0.5, 1.5)}, {}, {"captions": NASTY})
    table = results_db.table()
    assert table.loc[0, "size"] == NASTY
    assert table.loc[0, NASTY] == 1.0
    assert results_db.points() == {"a"}
    assert results_db.events()[0]["subject"] == NASTY
    with sqlite3.connect(tmp_path / "results.sqlite") as plain:
        assert plain.execute("SELECT count(*) FROM points").fetchone() == (1,)


def test_a_recommended_command_is_one_line_of_quoted_words(tmp_path: Path) -> None:
    table = synthetic_table()
    table["checkpoint"] = SHELL
    command = recommend(table, "nfe", 64, out=SHELL).command
    words = shlex.split(command)
    assert words[:2] == ["isocost", "sample"]
    assert words[2] == f"{SHELL}/artefacts/checkpoint/{SHELL}"


def test_tar_members_never_leave_their_shard(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).save(buffer, "PNG")
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name in ("../../outside", "/absolute", "fine", SHELL.replace("/", "_")):
            for suffix, data in (("png", buffer.getvalue()), ("txt", NASTY.encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = set(tmp_path.rglob("*"))
    images = load_images(WebdatasetSource(kind="webdataset", path=str(folder / "*.tar")), 16, 0.5)
    assert len(images.images) == 4
    assert {captions[0] for captions in images.captions} == {NASTY}
    assert set(tmp_path.rglob("*")) == before
    assert not (tmp_path.parent / "outside.png").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "", "x; rm -rf", "-option", "ü"])
def test_a_studys_name_is_a_plain_word(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        tiny_study(name=name)


def test_addresses_are_used_unchanged_and_passwords_are_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        ResultsDB("postgresql://user:secret@127.0.0.1:9/none")
    assert "secret" not in str(refused.value)
    assert "127.0.0.1" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="no cluster answers there") as refused:
        run_on_ray("127.0.0.1:9", tmp_path, None, 1, None, None)
    assert "\n" not in str(refused.value)


def test_a_results_database_of_a_newer_version_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "results.sqlite"
    ResultsDB(file).engine.dispose()
    with sqlite3.connect(file) as plain:
        plain.execute("UPDATE schema SET version = 99")
    with pytest.raises(ConfigError, match=r"version 99.*upgrade isocost"):
        ResultsDB(file)


def test_the_text_of_a_table_is_data_not_code(tmp_path: Path) -> None:
    table = synthetic_table()
    table["size"] = table["size"].replace({"0.2M": '=HYPERLINK("http://x")'})
    table.to_csv(tmp_path / "table.csv", index=False)
    assert set(pd.read_csv(tmp_path / "table.csv")["size"]) == set(table["size"])
    assert json.loads(json.dumps(recommend(table, "nfe", 64).command))
