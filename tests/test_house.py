"""The house stands as docs/architecture.md says: imports run down, and nothing stands outside the list."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import isocost

SOURCE = Path(isocost.__file__).parent
FLOORS = (
    {"__main__"},
    {"cli"},
    {"report"},
    {"joining", "merging"},
    {"pipeline"},
    {"forecasting", "sweeping", "status"},
    {"experiments"},
    {"materials"},
    {"analysis", "sweep", "sampling", "upscaling", "timing", "exporting"},
    {"score", "train"},
    {"diffusion"},
    {"data"},
    {"models", "metrics"},
    {"study_file"},
    {"study"},
    {"downstream"},
    {"stages"},
    {"spec"},
    {"store", "progress", "stopping", "device"},
    {"provenance"},
    {"errors", "assets"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py")


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_down(file: Path) -> None:
    own = room_of(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            parts = module.split(".")
            if parts[0] == "isocost" and len(parts) > 1 and parts[1] != own:
                assert LEVEL[parts[1]] > LEVEL[own], f"{own} imports {module}"


def test_rooms_stay_small() -> None:
    long = {file.name: lines for file in FILES if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 450}
    assert not long


def test_the_package_names_what_it_says() -> None:
    for name in isocost.__all__:
        assert getattr(isocost, name).__doc__, name
    with pytest.raises(AttributeError, match="it has Pipeline"):
        isocost.absent  # noqa: B018


def test_a_name_stays_a_function_after_its_module_is_imported() -> None:
    import isocost.exporting
    import isocost.sampling

    assert callable(isocost.sample)
    assert callable(isocost.export)


def test_no_weights_are_pickled_or_read_unsafely() -> None:
    for file in FILES:
        for call in re.findall(r"torch\.(?:load|save)\(.*", file.read_text(encoding="utf-8")):
            assert "weights_only=True" in call, f"{file.name}: {call}"
