"""The house stands as docs/architecture.md says: imports run down, and nothing stands outside the list."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import isocost

SOURCE = Path(isocost.__file__).parent
LAYERS = (
    {"__main__"},
    {"cli"},
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
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
FILES = sorted(file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py")


def package_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_down(file: Path) -> None:
    own = package_of(file)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            parts = module.split(".")
            if parts[0] == "isocost" and len(parts) > 1 and parts[1] != own:
                assert LEVEL[parts[1]] > LEVEL[own], f"{own} imports {module}"


def test_files_stay_small() -> None:
    long = {file.name: lines for file in FILES if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 600}
    assert not long


def test_the_package_names_what_it_says() -> None:
    for name in isocost.__all__:
        assert getattr(isocost, name).__doc__, name
    with pytest.raises(AttributeError, match="it has ConfigError"):
        isocost.absent  # noqa: B018


def raised_in(function: ast.FunctionDef) -> set[str]:
    """Names of what a function raises itself, the functions inside it apart."""
    names, rest = set(), list(ast.iter_child_nodes(function))
    while rest:
        node = rest.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            names.add(node.exc.func.id)
        rest += ast.iter_child_nodes(node)
    return names


def public_functions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a module and the methods of its classes whose names have no underscore in front."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if isinstance(child, ast.FunctionDef):
                yield owner + child.name, child
            else:
                yield from public_functions(child, f"{child.name}.")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_what_refuses_says_so_in_its_docstring(file: Path) -> None:
    """Under `Raises:`, or in a docstring of one line. A command's docstring is its help, and has no such part."""
    if package_of(file) == "cli":
        return
    silent = [
        name
        for name, function in public_functions(ast.parse(file.read_text(encoding="utf-8")))
        for error in raised_in(function) & {"ConfigError", "RunError"}
        if not is_said(error, ast.get_docstring(function) or "")
    ]
    assert not silent


def is_said(error: str, docstring: str) -> bool:
    return error in docstring.partition("Raises:")[2] or (error in docstring and "\n" not in docstring.strip())


def test_a_name_stays_a_function_after_its_module_is_imported() -> None:
    import isocost.models.export_diffusers
    import isocost.sampling.sample

    assert callable(isocost.sample)
    assert callable(isocost.export)


def test_no_weights_are_pickled_or_read_unsafely() -> None:
    for file in FILES:
        for call in re.findall(r"torch\.(?:load|save)\(.*", file.read_text(encoding="utf-8")):
            assert "weights_only=True" in call, f"{file.name}: {call}"
