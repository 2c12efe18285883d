"""A destination that cannot be one is refused in one line before anything is touched, by every command."""

from __future__ import annotations

import errno
import itertools
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import SafetensorError

from conftest import assert_refused, plain_study
from isocost.errors import ConfigError, RunError
from isocost.pipeline import merge as merging
from isocost.pipeline.merge import archive, merge, take_artefacts
from isocost.sweep.results_db import ResultsDB
from isocost.training.state_checkpoint import newest_state_images
from isocost.utils.artifact_store import Store, write_atomically
from isocost.utils.host import host_name
from isocost.utils.output_paths import check_separate, private_folder
from output_folders import AUTOENCODER, CHECKPOINT, contents, plain_user, read_only, write_output_folder

DEAD_PID = 2**31 - 7


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_output_folder(tmp_path_factory.mktemp("template") / "out")


@pytest.fixture
def out(template: Path, tmp_path: Path) -> Path:
    """An output folder with an autoencoder and a checkpoint."""
    merging.copy_folder(template, tmp_path / "out")
    return tmp_path / "out"


# --- paths that cannot be a folder ------------------------------------------------------------------------------------


def a_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("mine")
    return folder / "notes.txt"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "sub" / "deeper"


def a_dangling_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link"


def below_a_dangling_link(folder: Path) -> Path:
    return a_dangling_link(folder) / "sub"


def a_link_to_itself(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def a_long_name(folder: Path) -> Path:
    return folder / ("n" * 300)


def a_long_name_above(folder: Path) -> Path:
    return folder / ("n" * 300) / "sub"


def a_long_path(folder: Path) -> Path:
    return folder.joinpath(*["n" * 200] * 25)


BAD_FOLDERS = [
    *(a_file, a_dangling_link, a_long_name),
    *(
        pytest.param(bad, marks=pytest.mark.slow)
        for bad in (below_a_file, below_a_dangling_link, a_link_to_itself, a_long_name_above, a_long_path)
    ),
]
WRITING = {
    **{name: [name, "STUDY", "--out", "BAD"] for name in ("run", "train", "sweep", "autoencoder", "report", "remeasure")},
    "dry run": ["run", "STUDY", "--out", "BAD", "--dry-run"],
    "demo": ["demo", "--out", "BAD"],
    "archive": ["archive", "OUT", "BAD"],
    "merge": ["merge", "BAD", "OUT"],
    "merge --artefacts": ["merge", "BAD", "OUT", "--artefacts"],
    "export": ["export", "CHECKPOINT", "BAD"],
    "reference": ["reference", "scenes:40", "BAD", "--protocol", "mmd-efficientnet-64"],
    "sample": ["sample", "CHECKPOINT", "--prompt", "a ring", "--out", "BAD"],
    "compare": ["compare", "OUT", "OUT", "--out", "BAD"],
}


@pytest.mark.parametrize("bad", BAD_FOLDERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("command", WRITING)
def test_a_path_that_cannot_be_a_folder_is_one_line(
    isocost: Any, command: str, bad: Any, template: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(plain_study()))
    words = {
        "STUDY": study,
        "BAD": bad(tmp_path),
        "OUT": template,
        "CHECKPOINT": template / "artefacts" / "checkpoint" / CHECKPOINT,
    }
    before, other = contents(tmp_path), contents(template)
    outcome = isocost(*(words.get(word, word) for word in WRITING[command]))
    if command == "reference" and bad is a_file:
        assert_refused(outcome, "exists already")
    else:
        assert_refused(outcome)
    assert contents(tmp_path) == before
    assert contents(template) == other


@pytest.mark.parametrize("bad", BAD_FOLDERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(("command", "suffix"), [("latency", ".json"), ("upscale", ".png")])
def test_a_path_that_cannot_be_a_file_is_one_line(
    isocost: Any, command: str, suffix: str, bad: Any, template: Path, tmp_path: Path
) -> None:
    file, checkpoint = bad(tmp_path) / f"x{suffix}", template / "artefacts" / "checkpoint" / CHECKPOINT
    before = contents(tmp_path)
    arguments = ["--out", file] if command == "latency" else ["image.png", file]
    assert_refused(isocost(command, checkpoint, *arguments))
    assert contents(tmp_path) == before


def test_an_image_is_not_replaced_by_its_enlargement(isocost: Any, template: Path, tmp_path: Path) -> None:
    image, link = tmp_path / "a.png", tmp_path / "b.png"
    image.write_bytes(b"the only copy")
    link.symlink_to(image)
    for target in (image, link):
        assert_refused(
            isocost("upscale", template / "artefacts" / "checkpoint" / CHECKPOINT, image, target), "the input itself"
        )
    assert image.read_bytes() == b"the only copy"


# --- the destination and the source -----------------------------------------------------------------------------------


def itself(out: Path) -> Path:
    return out


def itself_by_another_name(out: Path) -> Path:
    return out / "artefacts" / ".."


def inside(out: Path) -> Path:
    return out / "sub" / "archive"


def in_report_data(out: Path) -> Path:
    return out / "report_data"


def linked(out: Path) -> Path:
    (out.parent / "link").symlink_to(out, target_is_directory=True)
    return out.parent / "link"


def inside_by_a_link(out: Path) -> Path:
    return linked(out) / "sub"


def linked_inside(out: Path) -> Path:
    (out.parent / "link").symlink_to(out / "artefacts", target_is_directory=True)
    return out.parent / "link" / "sub"


def above(out: Path) -> Path:
    return out.parent


NESTED = [itself, itself_by_another_name, inside, in_report_data, linked, inside_by_a_link, linked_inside, above]


@pytest.mark.parametrize("nested", NESTED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("command", ["archive", "merge", "merge --artefacts", "compare"])
def test_a_destination_that_shares_files_with_its_source_is_refused(
    isocost: Any, command: str, nested: Any, out: Path, tmp_path: Path
) -> None:
    (out / "report_data").mkdir()
    (out / "report_data" / "page.json").write_text("{}")
    target, before = nested(out), None
    before = contents(tmp_path)
    arguments = {
        "archive": ["archive", out, target],
        "merge": ["merge", target, out],
        "merge --artefacts": ["merge", target, out, "--artefacts"],
        "compare": ["compare", out, out, "--out", target],
    }
    assert_refused(isocost(*arguments[command]))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("sub", ["", "unet", "new", "new/deeper"])
def test_a_checkpoint_is_not_exported_into_itself(isocost: Any, sub: str, out: Path) -> None:
    checkpoint, before = out / "artefacts" / "checkpoint" / CHECKPOINT, contents(out)
    assert_refused(isocost("export", checkpoint, checkpoint / sub))
    assert_refused(isocost("sample", checkpoint, "--prompt", "a", "--out", checkpoint / sub))
    assert contents(out) == before


def test_reference_statistics_do_not_go_among_their_images(isocost: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    arguments = ["--protocol", "mmd-efficientnet-64"]
    assert_refused(isocost("reference", tmp_path / "images", tmp_path / "images" / "stats", *arguments), "lies inside")
    assert contents(tmp_path) == {"images": "folder"}


@pytest.mark.parametrize("command", ["archive", "merge", "merge --artefacts", "export"])
def test_a_folder_with_other_files_is_refused(isocost: Any, command: str, out: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "study.png").write_bytes(b"mine")
    before = contents(tmp_path)
    arguments = {
        "archive": ["archive", out, photos],
        "merge": ["merge", photos, out],
        "merge --artefacts": ["merge", photos, out, "--artefacts"],
        "export": ["export", out / "artefacts" / "checkpoint" / CHECKPOINT, photos],
    }
    assert_refused(isocost(*arguments[command]), str(photos))
    assert contents(tmp_path) == before


def test_paths_are_separate_if_and_only_if_no_real_path_contains_the_other(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a" / "b" / "c").mkdir(parents=True)
    (root / "b" / "c").mkdir(parents=True)
    (root / "to-b").symlink_to(root / "a" / "b", target_is_directory=True)
    (root / "to-a").symlink_to(root / "a", target_is_directory=True)
    parts, num_refused = ("a", "b", "c", "..", "to-b", "to-a"), 0
    targets = [root.joinpath(*names) for length in range(4) for names in itertools.product(parts, repeat=length)]
    sources = [root, root / "a", root / "a" / "b", root / "a" / "b" / "c", root / "b", root / "to-b", root / "absent"]
    for read, written in itertools.product(sources, targets):
        first, second = os.path.realpath(read), os.path.realpath(written)
        if not read.exists() or os.path.commonpath([first, second]) not in (first, second):
            check_separate(written, read)
        else:
            num_refused += 1
            with pytest.raises(ConfigError):
                check_separate(written, read)
    assert num_refused > 100


# --- read-only and full disks -----------------------------------------------------------------------------------------


def test_a_read_only_folder_is_archived_and_merged(template: Path) -> None:
    with plain_user() as folder:
        source = folder / "out"
        merging.copy_folder(template, source)
        archive(template, folder / "warm-up")  # modules are imported before the privileges are given up
        before = contents(source)
        with read_only(source):
            archive(source, folder / "archive")
            merge(folder / "merged", [source])
            assert take_artefacts(folder / "taken", [source]) == 2
            archive(source, folder / "archive")  # continues
        assert contents(source) == before
        for name in ("archive", "merged"):
            assert (folder / name / "artefacts" / "autoencoder" / AUTOENCODER / "isocost.json").is_file()
            assert [event["subject"] for event in ResultsDB(folder / name / "results.sqlite").events()] == ["1.png"]


READ_ONLY = {
    "run": ["run", "STUDY", "--out", "OUT"],
    "train": ["train", "STUDY", "--out", "OUT"],
    "archive": ["archive", "SOURCE", "OUT"],
    "merge": ["merge", "OUT", "SOURCE"],
    "merge --artefacts": ["merge", "OUT", "SOURCE", "--artefacts"],
    "compare": ["compare", "SOURCE", "SOURCE", "--out", "OUT"],
}


@pytest.mark.slow
def test_a_destination_on_a_read_only_disk_is_one_line(isocost: Any, template: Path) -> None:
    with plain_user() as folder:
        source, study = folder / "source", folder / "study.yaml"
        merging.copy_folder(template, source)
        study.write_text(yaml.safe_dump(plain_study()))
        words = {"STUDY": study, "SOURCE": source}
        warm_up = {**words, "OUT": template / "notes"}  # modules are imported before the privileges are given up
        (template / "notes").write_text("a file")
        for arguments in READ_ONLY.values():
            assert isocost(*(warm_up.get(word, word) for word in arguments)).status == 2
        before = contents(folder)
        with read_only(folder):
            for name, arguments in READ_ONLY.items():
                outcome = isocost(*({**words, "OUT": folder / "new" / "out"}.get(word, word) for word in arguments))
                assert outcome.status in (1, 2), name
                assert "Traceback" not in outcome.err, name
                assert outcome.line.startswith("isocost: "), outcome.err
                assert "ermission" in outcome.line or name == "compare", outcome.line
        assert contents(folder) == before
        (template / "notes").unlink()


def test_points_that_are_only_in_the_log_of_a_read_only_database_are_read(template: Path) -> None:
    with plain_user() as folder:
        source = folder / "source"
        source.mkdir()
        live = ResultsDB(source / "live.sqlite")
        live.set_events("data.train", [("2.png", "new")])
        with sqlite3.connect(source / "live.sqlite") as reader:  # keeps the log from being moved into the file
            reader.execute("SELECT count(*) FROM events").fetchall()
            for suffix in ("", "-wal"):
                (source / f"results.sqlite{suffix}").write_bytes((source / f"live.sqlite{suffix}").read_bytes())
        assert (source / "results.sqlite-wal").stat().st_size
        with read_only(source):
            copy = ResultsDB(source / "results.sqlite")
            assert [event["subject"] for event in copy.events()] == ["2.png"]
            with pytest.raises(RunError, match=f"the results database {source / 'results.sqlite'}: .*readonly database"):
                copy.set_events("data.train", [("3.png", "lost")])


FAILURES = {
    "full": (OSError(errno.ENOSPC, "No space left on device", "archive/weights"), 1, "free some disk space"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "archive"), 1, "folder on a writable disk"),
    "too large": (OSError(errno.EFBIG, "File too large", "archive/weights"), 1, "ulimit -f"),
    "not mounted": (OSError(errno.ESTALE, "Stale file handle", "archive"), 1, "mount it again"),
    "denied": (PermissionError(errno.EACCES, "Permission denied", "archive"), 1, "permissions"),
    "too long": (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), 2, "shorter path"),
    "without a number": (OSError("the server\ndid not answer"), 1, "the server did not answer"),
    "weights": (SafetensorError("Error while serializing: I/O error:\nNo space left on device"), 1, "No space left"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_of_the_disk_is_one_line(
    isocost: Any, name: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, status, remedy = FAILURES[name]

    def failing(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(merging, "copy_artefact", failing)
        outcome = isocost("archive", template, tmp_path / "archive")
    assert outcome.status == status
    assert "Traceback" not in outcome.err
    assert outcome.line.startswith("isocost: ")
    assert remedy in outcome.line
    assert isocost("archive", template, tmp_path / "archive").answer["artefacts"] == 2, "the next call goes on"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status.json"
    write_atomically(file, "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(file, "new")
    assert contents(tmp_path) == {"status.json": b"old"}


# --- what killed processes and people leave ---------------------------------------------------------------------------


def test_leftovers_of_killed_processes_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    store, partial = Store(tmp_path), tmp_path / "artefacts" / ".partial"
    mine, other = host_name(), "another.machine"
    gone = [f"point-abc.{mine}.{DEAD_PID}", f"point-abc.old.{mine}.{DEAD_PID}", f"copy-abc.{other}.17"]
    stay = [f"point-abc.{mine}.{os.getpid()}", f"point-def.{other}.{DEAD_PID}", "mine", "x.y.z"]
    for name in (*gone, *stay):
        (partial / name).mkdir(parents=True)
        (partial / name / "file").write_text("x")
    (partial / "README").write_text("by a person")
    (partial / ".gitkeep").touch()
    old = time.time() - 30 * 24 * 3600
    os.utime(partial / gone[2], (old, old))
    files = [f".status.json.{DEAD_PID}", f".status.json.{mine}.{DEAD_PID}", f".study.yaml.{mine}.{DEAD_PID}"]
    kept = [f".status.json.{mine}.{os.getpid()}", ".hidden.txt.123", "status.json.1", ".status.json.backup"]
    for name in (*files, *kept):
        (tmp_path / name).write_text("x")
    store.remove_partial()
    assert {path.name for path in partial.iterdir()} == {*stay, "README", ".gitkeep"}
    assert {path.name for path in tmp_path.iterdir()} == {"artefacts", *kept}


def test_other_files_among_training_states_and_artefacts_are_ignored(isocost: Any, out: Path, tmp_path: Path) -> None:
    run = next((out / "artefacts" / "run").iterdir())
    for name in ("state-old", "state-000000000064.bak", "state-99"):
        (run / name).mkdir()
    (run / "state-000000000099").write_text("a file")
    for path in (out / "artefacts" / "README", out / "artefacts" / "checkpoint" / "notes.txt", out / "notes.txt"):
        path.write_text("by a person")
    (out / "artefacts" / "checkpoint" / "mine").mkdir()
    assert newest_state_images(run) == 32
    assert isocost("archive", out, tmp_path / "archive").answer["artefacts"] == 2
    assert isocost("merge", tmp_path / "merged", out).answer["artefacts"] == 3
    assert isocost("merge", tmp_path / "taken", out, "--artefacts").answer["artefacts"] == 2


def test_a_private_folder_belongs_to_one_attempt_and_is_removed(tmp_path: Path) -> None:
    final = tmp_path / "stats"
    stale = tmp_path / f".stats.partial.{host_name()}.{DEAD_PID}~abc"
    stale.mkdir()

    def attempt() -> None:
        with private_folder(final) as first, private_folder(final) as second:
            assert first != second
            assert not stale.exists()
            (first / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt()
    assert contents(tmp_path) == {}
