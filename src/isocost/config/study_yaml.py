"""A study's YAML: read with its smaller forms and with overrides, and written back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError


def load_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudySpec:
    """Read a study from YAML; `overrides` maps dotted keys to values ("train.num_images": 5000).

    A file may hold smaller forms of itself, `scales: {tiny: {train.num_images: 400, ...}}`; the key `scale` chooses one.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key or value is wrong; one line names file, key and remedy.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such study file; `isocost demo` runs the one that is built in")
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{file}: a study is a mapping of keys (name, data, autoencoder, family, train, sweep, ...)")
    given = dict(overrides or {})
    scales, scale = plain.pop("scales", {}), given.pop("scale", plain.pop("scale", None))
    for key, value in {**_scaled(scales, scale, file), **given}.items():
        _set_dotted(plain, key, value, file)
    return parse_spec(StudySpec, plain, str(file))


def dump_study(study: StudySpec) -> str:
    """YAML text with every field resolved, stable under load and dump."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _scaled(scales: Any, scale: Any, file: Path) -> dict[str, Any]:
    """The dotted keys that `scale` sets, out of the file's block `scales: {NAME: {KEY: VALUE, ...}}`."""
    if scale is None:
        return {}
    if not isinstance(scales, dict) or not isinstance(scales.get(scale), dict):
        known = ", ".join(map(str, scales)) if isinstance(scales, dict) and scales else "the file has no `scales:` block"
        raise ConfigError(f"{file}: scale = {scale!r}: known here: {known}")
    return dict(scales[scale])


def _set_dotted(plain: dict[str, Any], key: str, value: Any, file: Path) -> None:
    *parents, last = key.split(".")
    node: Any = plain
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{file}: --set {key}: '{parent}' is not a mapping")
    node[last] = value
