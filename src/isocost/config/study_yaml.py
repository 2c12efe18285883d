"""Read and write a study as YAML, with overrides and scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from isocost.config.base import parse_spec
from isocost.config.study import StudySpec
from isocost.errors import ConfigError


def load_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudySpec:
    """Read a study from YAML.

    A file may define smaller versions of the study, `scales: {tiny: {train.num_images: 400, ...}}`; `scale` selects one.

    Args:
        path: the YAML file.
        overrides: values by dotted key, such as {"train.num_images": 5000}.

    Raises:
        ConfigError: the file is missing or is not YAML, or a key or value is wrong; one line names file, key and remedy.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such study file; `isocost demo` runs the built-in study")
    try:
        plain = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: this is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{file}: a study must be a mapping with the keys name, data, autoencoder, family, train, sweep, ...")
    values = dict(overrides or {})
    scales, scale = plain.pop("scales", {}), values.pop("scale", plain.pop("scale", None))
    for key, value in {**_scale_overrides(scales, scale, file), **values}.items():
        _set_dotted(plain, key, value, file)
    return parse_spec(StudySpec, plain, str(file))


def dump_study(study: StudySpec) -> str:
    """YAML text with the values of all fields; loading and dumping it again gives the same text."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _scale_overrides(scales: Any, scale: Any, file: Path) -> dict[str, Any]:
    """Values by dotted key of `scale`, from the file's section `scales: {NAME: {KEY: VALUE, ...}}`."""
    if scale is None:
        return {}
    if not isinstance(scales, dict) or not isinstance(scales.get(scale), dict):
        known = (
            ", ".join(map(str, scales)) if isinstance(scales, dict) and scales else "none; the file has no section `scales:`"
        )
        raise ConfigError(f"{file}: scale = {scale!r} is unknown; the file defines: {known}")
    return dict(scales[scale])


def _set_dotted(plain: dict[str, Any], key: str, value: Any, file: Path) -> None:
    *parents, last = key.split(".")
    section: Any = plain
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{file}: --set {key}: '{parent}' is not a mapping")
    section[last] = value
