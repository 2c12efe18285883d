"""The structure of the package: imports run one way between layers and in no circle, errors are documented, prose is plain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import isocost

SOURCE = Path(isocost.__file__).parent
LAYERS = (
    {"__main__"},
    {"cli", "api"},
    {"report"},
    {"pipeline"},
    {"estimate"},
    {"experiments"},
    {"analysis", "sweep"},
    {"evaluation", "training", "sampling"},
    {"data"},
    {"models", "diffusion"},
    {"metrics", "config"},
    {"utils"},
    {"errors", "assets"},
)
"""From the top to the bottom; a package imports only from layers below its own (docs/architecture.md)."""
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
FILES = sorted(file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py")
MAX_LINES = 600


def package_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(file: Path) -> str:
    return ".".join(("isocost", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def imports_of(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of what the import statements among `nodes` import."""
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_package_is_in_a_layer_and_two_modules_are_loose() -> None:
    names = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if path.name not in ("__pycache__", "__init__.py")}
    assert names == set(LEVEL)
    assert {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"} == {"api", "errors"}


def test_imports_run_down() -> None:
    upward = []
    for file in FILES:
        own = package_of(file)
        for module in imports_of(ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
            parts = module.split(".")
            if parts[0] == "isocost" and len(parts) > 1 and parts[1] != own and not LEVEL.get(parts[1], 99) > LEVEL[own]:
                upward.append(f"{module_of(file)} imports {module}")
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {module_of(file): file for file in FILES if file.name != "__init__.py"}
    graph = {
        name: {module for module in imports_of(iter(ast.parse(file.read_text(encoding="utf-8")).body)) if module in modules}
        for name, file in modules.items()
    }
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph


def test_files_stay_small() -> None:
    long = {file.name: lines for file in FILES if (lines := len(file.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert not long


def test_every_public_name_is_documented() -> None:
    for name in set(isocost.__all__) - {"__version__"}:
        assert getattr(isocost, name).__doc__, name
    with pytest.raises(AttributeError, match="it has ConfigError"):
        isocost.absent  # noqa: B018


def errors_raised_in(function: ast.FunctionDef) -> set[str]:
    """Names of the errors that a function raises itself, without the functions inside it."""
    names, nodes = set(), list(ast.iter_child_nodes(function))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            names.add(node.exc.func.id)
        nodes += ast.iter_child_nodes(node)
    return names


def public_functions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a module and the methods of its classes whose names have no leading underscore."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if isinstance(child, ast.FunctionDef):
                yield owner + child.name, child
            else:
                yield from public_functions(child, f"{child.name}.")


def test_docstrings_name_the_errors_that_functions_raise() -> None:
    """Under `Raises:`, or in a docstring of one line. The docstring of a command is its help and has no such section."""
    silent = [
        f"{module_of(file)}.{name}: {error}"
        for file in FILES
        if package_of(file) != "cli"
        for name, function in public_functions(ast.parse(file.read_text(encoding="utf-8")))
        for error in errors_raised_in(function) & {"ConfigError", "RunError"}
        if not is_documented(error, ast.get_docstring(function) or "")
    ]
    assert not silent


def is_documented(error: str, docstring: str) -> bool:
    return error in docstring.partition("Raises:")[2] or (error in docstring and "\n" not in docstring.strip())


def test_no_weights_are_pickled_or_read_unsafely() -> None:
    for file in FILES:
        for call in re.findall(r"torch\.(?:load|save)\(.*", file.read_text(encoding="utf-8")):
            assert "weights_only=True" in call, f"{file.name}: {call}"


def test_the_prose_has_no_word_of_the_reject_list() -> None:
    checker = Path(__file__).resolve().parents[1] / "tools" / "check_prose.py"
    done = subprocess.run([sys.executable, checker], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_prose_check_finds_old_words_and_hard_sentences() -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("check_prose", Path(__file__).resolve().parents[1] / "tools" / "check_prose.py")
    assert spec is not None
    assert spec.loader is not None
    checker = module_from_spec(spec)
    spec.loader.exec_module(checker)
    lines = {
        "the picture": 1,  # prose example
        "a codec beside it": 2,  # prose example
        "What exists is skipped": 1,  # prose example
        "Images in one place.": 1,  # prose example
        "In place of images, put the file in place.": 0,
    }
    assert {line: sum(bool(pattern.search(line)) for pattern, _ in checker.RULES) for line in lines} == lines
