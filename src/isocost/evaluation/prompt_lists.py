"""Readers of prompt lists with ids: CSV tables, tar shards, Hub data sets, DreamBooth's text file, embedded scenes."""

from __future__ import annotations

from pathlib import Path

from isocost.data.caption_files import read_caption_table
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
        prompts = _read_samples(source)
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
    prompts: dict[str, str] = {}
    for row in read_caption_table(file, _ID_COLUMNS, _PROMPT_COLUMNS):
        if (key := image_id(row.id)) in prompts:
            raise ConfigError(f"{file}: line {row.line}: id {key} appears twice; keep one of its rows")
        prompts[key] = row.caption
    return prompts


def _read_samples(source: str) -> dict[str, str]:
    """The first caption of every sample."""
    prompts: dict[str, str] = {}
    for sample in iter_samples(source, 32):
        if (key := image_id(sample.name)) in prompts:
            raise ConfigError(f"{source}: {sample.name}: id {key} appears twice; rename or remove one of the samples")
        prompts[key] = sample.captions[0]
    return prompts


def _read_dreambooth(file: Path) -> dict[str, str]:
    """`prompts_and_classes.txt`: object prompts for things, live prompts for cats and dogs, without the unique token."""
    classes, prompts = read_prompts(file)
    return {
        f"{subject}/{number:02d}": " ".join(template.format("", name).split())
        for subject, name in classes.items()
        for number, template in enumerate(prompts[subject])
    }
