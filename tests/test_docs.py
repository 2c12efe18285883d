"""The documents are true: links, studies, commands with their options, the cells of the notebook, the citation."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import isocost
from isocost.cli import app
from isocost.config.base import parse_spec
from isocost.config.study import StudySpec

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
COMMANDS: Any = typer.main.get_command(app)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose_of(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """The names that a heading of a page goes by."""
    titles = re.findall(r"^#+ (.*)", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@of_each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", [*PAGES, *STUDIES, DOCS / "notebook.ipynb"], ids=lambda page: page.name)
def test_every_study_that_is_named_is_there(page: Path) -> None:
    for name in re.findall(r"studies/[\w.-]+\.yaml", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


# --- commands ---------------------------------------------------------------------------------------------------------


def lines_of(code: str) -> Iterator[list[str]]:
    """The words after `isocost` of every line that calls it; a line may go on after a backslash.

    Comments are left out, and so are error messages of isocost.
    """
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("isocost:") or not re.search(r"(?<![\w./-])isocost [a-z]", line.split("#")[0]):
            continue
        words = shlex.split(line, comments=True)
        at = max(number for number, word in enumerate(words) if word == "isocost")
        yield words[at + 1 :]


def check(words: list[str]) -> None:
    """Parse a command as the command line does, without running it.

    Raises:
        UsageError: no command is called so, or it has no such option, or the value is of another kind.
    """
    context = COMMANDS.make_context("isocost", list(words))
    name, command, rest = COMMANDS.resolve_command(context, list(words))
    command.make_context(name, rest, parent=context)


@of_each_page
def test_every_command_in_a_block_of_code_is_one(page: Path) -> None:
    for _, code in FENCE.findall(page.read_text(encoding="utf-8")):
        for words in lines_of(code):
            try:
                check(words)
            except Exception as error:  # noqa: BLE001  whatever click says, with the line
                pytest.fail(f"isocost {shlex.join(words)}: {error}")


@pytest.mark.parametrize("page", [*PAGES, *STUDIES], ids=lambda page: page.name)
def test_every_command_in_running_text_has_the_options_it_is_given(page: Path) -> None:
    text = page.read_text(encoding="utf-8") if page in STUDIES else prose_of(page)
    for span in re.findall(r"`isocost ([a-z][^`]*)`", text.replace("\n# ", " ")):
        name, *words = span.replace("[", " ").replace("]", " ").split()
        assert name in COMMANDS.commands, span
        options = {
            option for parameter in COMMANDS.commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words if word.startswith("--")} <= options, span


def test_the_page_of_commands_has_all_of_them() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    listed = {words[0] for _, code in FENCE.findall(page) for words in lines_of(code)}
    assert listed == set(COMMANDS.commands)


@pytest.mark.parametrize(
    "line",
    [
        "isocost rum STUDY.yaml",
        "isocost run STUDY.yaml --outs OUT",
        "isocost recommend OUT --budget-nfe few",
        "isocost sample X",
    ],
)
def test_a_command_that_is_none_is_found(line: str) -> None:
    (words,) = lines_of(f"$ {line}  # a comment\n")
    with pytest.raises(Exception, match=r"No such|a valid number|Missing"):
        check(words)


# --- studies, notebook, citation --------------------------------------------------------------------------------------


@of_each_page
def test_every_whole_study_in_a_block_of_code_is_valid(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        plain = yaml.safe_load(code) if language == "yaml" else None
        if isinstance(plain, dict) and {"name", "data"} <= plain.keys():
            parse_spec(StudySpec, plain, page.name)


def test_the_notebooks_cells_run_and_print_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(DOCS)
    scope: dict[str, Any] = {}
    for cell in json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("%")]
        exec("\n".join(lines), scope)
        shown = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
        assert capsys.readouterr().out == shown
        assert cell["outputs"] or "import" in lines[0], "the notebook is kept as it was run"


def test_the_notebook_uses_nothing_but_the_public_interface() -> None:
    cells = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert set(re.findall(r"^(?:from|import) .*", code, re.MULTILINE)) == {"import isocost"}


def test_the_python_example_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (
        code for language, code in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8")) if language == "python"
    )
    monkeypatch.chdir(ROOT)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert "2.6M" in capsys.readouterr().out
    assert len(scope["samples"].images) == 2
    assert scope["study"].train.lr == 2e-4


def test_the_citation_has_what_its_format_demands() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()
    (paper,) = cited["references"]
    assert {"authors", "title", "type"} <= paper.keys()
    assert "2404.01367" in paper["url"]
    assert f'version = "{cited["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_what_the_documents_call_of_the_package_is_exported() -> None:
    for page in [*PAGES, DOCS / "notebook.ipynb"]:
        for name in re.findall(r"(?<![\w/`.])isocost\.(\w+)\(", page.read_text(encoding="utf-8")):
            assert name in isocost.__all__, f"{page.name}: isocost.{name}"
