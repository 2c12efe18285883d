"""Readers of prompt lists with ids: CSV tables, tar shards, Hub data sets, DreamBooth's text file, embedded scenes."""

from __future__ import annotations

import csv
from pathlib import Path

from isocost.data.dreambooth import read_prompts
from isocost.errors import ConfigError
from isocost.evaluation.image_sources import image_id, is_dataset, iter_samples
from isocost.evaluation.protocol_presets import PromptList
from isocost.metrics.download import text_sha256

_ID_COLUMNS, _PROMPT_COLUMNS = ("image_id", "id"), ("prompt", "caption")


def read_prompt_list(source: str, expected: PromptList) -> dict[str, str]:
    """Read the prompts by id, in order, and check that they are the list that a protocol fixes.

    Args:
        source: a .csv file, DreamBooth's .txt file, tar shards, `hub:...` or `scenes:NUMBER`.
        expected: the list of the protocol.

    Raises:
        ConfigError: the source cannot be read, or is another list.
    """
    if is_dataset(source):
        prompts = {image_id(sample.name): sample.captions[0] for sample in iter_samples(source, 32)}
    elif source.endswith(".csv"):
        prompts = _read_csv(Path(source))
    elif source.endswith(".txt"):
        prompts = _read_dreambooth(Path(source))
    else:
        raise ConfigError(f"--prompts {source}: give a .csv with columns image_id and prompt, tar shards, or {expected.source}")
    sha256 = prompts_sha256(prompts)
    if sha256 != expected.sha256:
        raise ConfigError(
            f"--prompts {source}: {len(prompts)} prompts with hash {sha256[:16]}..., but the protocol needs {expected.num} "
            f"with {expected.sha256[:16]}...: {expected.source}"
        )
    return prompts


def prompts_sha256(prompts: dict[str, str]) -> str:
    """SHA-256 of the JSON of [[id, prompt], ...] in order; spaces around a prompt are removed."""
    return text_sha256([[key, prompt.strip()] for key, prompt in prompts.items()])


def _read_csv(file: Path) -> dict[str, str]:
    if not file.is_file():
        raise ConfigError(f"--prompts {file}: no such file")
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        columns = rows.fieldnames or []
        id_column = next((name for name in _ID_COLUMNS if name in columns), None)
        prompt_column = next((name for name in _PROMPT_COLUMNS if name in columns), None)
        if id_column is None or prompt_column is None:
            raise ConfigError(
                f"--prompts {file}: needs a column image_id or id and a column prompt or caption; it has {columns}"
            )
        return {image_id(row[id_column]): row[prompt_column] for row in rows}


def _read_dreambooth(file: Path) -> dict[str, str]:
    """`prompts_and_classes.txt`: object prompts for things, live prompts for cats and dogs, without the unique token."""
    classes, prompts = read_prompts(file)
    return {
        f"{subject}/{number:02d}": " ".join(template.format("", name).split())
        for subject, name in classes.items()
        for number, template in enumerate(prompts[subject])
    }
