"""Digests of the report pages of docs/reference, which are too large for the repository.

`make reference-report` writes them to docs/reference/page_digests.json. tests/test_report_data.py rebuilds the pages and
compares.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

from isocost.report.report_data import rebuild

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "reference"
STUDIES = [REFERENCE, *sorted(file.parent for file in REFERENCE.glob("*/study.yaml"))]
"""The reference study, then the studies in its folder."""
FILE = REFERENCE / "page_digests.json"
LONG_NUMBER = re.compile(r"-?\d+\.\d{10,}(?:e[+-]?\d+)?")


def page_digests(study: Path, folder: Path) -> dict[str, str]:
    """Rebuild the pages of a study in `folder`, without figures, and return path -> SHA-256 of each page.

    Numbers are rounded to nine digits first, because the last digits depend on the processor.
    """
    ignored = shutil.ignore_patterns("artefacts", "report", *(other.name for other in STUDIES[1:]))
    shutil.copytree(study, folder, ignore=ignored)
    rebuild(folder, figure_formats=())
    digests = {}
    for page in sorted((folder / "report").rglob("*.html")):
        text = LONG_NUMBER.sub(lambda number: f"{float(number[0]):.9g}", page.read_text(encoding="utf-8"))
        digests[page.relative_to(folder).as_posix()] = hashlib.sha256(text.encode()).hexdigest()
    return digests


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        written = {study.name: page_digests(study, Path(temporary) / study.name) for study in STUDIES}
    FILE.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {sum(map(len, written.values()))} digests to {FILE}")
