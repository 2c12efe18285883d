"""Check that the project speaks plain English: no word of the reject list, no sentence pattern that readers stumble over.

    python tools/check_prose.py [FILE ...]

Reads the Python sources, the tests, the benchmarks, the documents, the studies and the report's templates. Prints one line per
hit and exits with 1 if there is any.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = (
    *("src/isocost/**/*.py", "tests/*.py", "benchmarks/*.py", "src/isocost/report/templates/*"),
    *("*.md", "docs/*.md", "docs/*.ipynb", "docs/reference/README.md", "docs/reference/*/README.md"),
    *("studies/*.yaml", "src/isocost/assets/*.yaml"),
)
EXAMPLE = "# prose example"
"""A line of code with this comment may hold a word of the reject list."""
OLD_NAMES_START, OLD_NAMES_END = "<!-- old names -->", "<!-- end of old names -->"
"""Between these lines a document may list names of earlier versions."""

WORDS: dict[str, str] = {
    r"\bpictur\w*": "image, sample",
    r"(?<!import )\bcodecs?\b(?!\.BOM)": "autoencoder",
    r"\bcaption states?\b": "prompt embeddings",
    r"\bbeside\b": "next to, along with, concat_cond",
    r"\b(re|fore)?told\b|\bforetells?\b": "predicted, named, shown",
    r"\bluck\b": "seed variance",
    r"\b(house|cellar|ladder)s?\b": "package, utilities, grid",
    r"\brooms?\b": "package, memory, space",
    r"\blanes?\b": "parallel calls",
    r"\bcaption embeddings?\b": "prompt embeddings",
    r"\bledgers?\b": "results database",
    r"\bredraws?\b": "bootstrap replicates",
    r"\b(training|each|every|the|last|first|of|at|train\.) ?marks?\b|\bmarks_": "snapshot, marker",
    r"(?<!in )(?<!into )(?<!in its )(?<!in their )(?<!take )(?<!takes )(?<!such/)\bplaces?\b(?! of\b)(?! \w+s\b)": (
        "slot, index, position, path, source"
    ),
    r"\bnormalised\b": "normalized",
    r"\bsampler(s|'s)?\b": "solver",
    r"\bpassed over\b": "ignored, skipped",
    r"\bcommand goes on\b": "run the same command again",
    r"\bRequestError\b|\bWorkError\b": "ConfigError, RunError",
}
SENTENCES = {
    r"(^|[.;:!?]\s+|\"\"\")What (?!if\b)[a-z]": "a noun as the subject, not a clause with 'what'",
    r"\b(says|said|tells) (what|how|which|of)\b": "shows, reports, names",
    r"\bas it stands\b|\bhow .{1,30} stands\b": "status, state",
    r"\bis asked for\b|\bare asked for\b": "is requested",
    r"\bby hand\b": "manually",
}
RULES = [(re.compile(pattern, re.IGNORECASE if pattern in WORDS else 0), hint) for pattern, hint in (WORDS | SENTENCES).items()]


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers; of a notebook the text of its cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(text)["cells"]):
            yield from ((number, line) for line in "".join(cell["source"]).splitlines())
        return
    is_listing = False
    for number, line in enumerate(text.splitlines(), start=1):
        is_listing = (is_listing or OLD_NAMES_START in line) and OLD_NAMES_END not in line
        if not is_listing and EXAMPLE not in line:
            yield number, line


def hits(path: Path) -> Iterator[str]:
    """One line per hit: file, line, the word, what to write instead."""
    for number, line in lines_of(path):
        for pattern, hint in RULES:
            if found := pattern.search(line):
                yield f"{path.relative_to(ROOT)}:{number}: {found.group().strip()!r}: write {hint}: {line.strip()[:100]}"


def main() -> None:
    """Check the given files, or all."""
    paths = [Path(name).resolve() for name in sys.argv[1:]] or sorted({path for glob in FILES for path in ROOT.glob(glob)})
    found = [hit for path in paths for hit in hits(path)]
    print("\n".join(found))
    if found:
        sys.exit(f"{len(found)} lines need plainer words")


if __name__ == "__main__":
    main()
