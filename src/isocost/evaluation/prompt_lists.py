"""Captions with ids, from where people keep them: a CSV table, tar shards, a Hub set, DreamBooth's text file, the scenes."""

from __future__ import annotations

import csv
from pathlib import Path

from isocost.data.dreambooth import read_prompts
from isocost.errors import ConfigError
from isocost.evaluation.image_sources import image_id, is_source, iter_samples
from isocost.evaluation.protocol_presets import PromptList
from isocost.metrics.download import text_sha256

_ID_COLUMNS, _PROMPT_COLUMNS = ("image_id", "id"), ("prompt", "caption")


def read_prompt_list(place: str, wanted: PromptList) -> dict[str, str]:
    """Caption by id, in order, checked to be the list that a protocol fixes.

    Raises:
        ConfigError: the place cannot be read, or holds another list.
    """
    if is_source(place):
        prompts = {image_id(sample.name): sample.captions[0] for sample in iter_samples(place, 32)}
    elif place.endswith(".csv"):
        prompts = _from_csv(Path(place))
    elif place.endswith(".txt"):
        prompts = _from_dreambooth(Path(place))
    else:
        raise ConfigError(f"--prompts {place}: give a .csv with columns image_id and prompt, tar shards, or {wanted.source}")
    found = prompts_sha256(prompts)
    if found != wanted.sha256:
        raise ConfigError(
            f"--prompts {place}: {len(prompts)} captions of hash {found[:16]}..., the protocol fixes {wanted.num} of "
            f"{wanted.sha256[:16]}...: {wanted.source}"
        )
    return prompts


def prompts_sha256(prompts: dict[str, str]) -> str:
    """SHA-256 of the JSON of [[id, caption], ...] in order, captions stripped of space around them."""
    return text_sha256([[key, prompt.strip()] for key, prompt in prompts.items()])


def _from_csv(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise ConfigError(f"--prompts {file}: no such file")
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        columns = rows.fieldnames or []
        ids = next((name for name in _ID_COLUMNS if name in columns), None)
        words = next((name for name in _PROMPT_COLUMNS if name in columns), None)
        if ids is None or words is None:
            raise ConfigError(f"--prompts {file}: needs a column image_id or id and one prompt or caption, has {columns}")
        return {image_id(row[ids]): row[words] for row in rows}


def _from_dreambooth(file: Path) -> dict[str, str]:
    """`prompts_and_classes.txt`: object prompts for things, live prompts for cats and dogs; the unique token left out."""
    classes, prompts = read_prompts(file)
    return {
        f"{subject}/{number:02d}": " ".join(template.format("", name).split())
        for subject, name in classes.items()
        for number, template in enumerate(prompts[subject])
    }
