"""Read and write a study as YAML, with overrides and scales."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from isocost.config.base import parse_spec, specs_in
from isocost.config.study import StudySpec
from isocost.config.yaml_text import format_yaml, parse_yaml, read_yaml
from isocost.errors import ConfigError

PROTOCOL_WORDS: dict[str, dict[str, Any]] = {
    "offline": {
        "protocol.features": ["efficientnet-lite0"],
        "protocol.weights": {},
        "protocol.metrics": ["mmd"],
        "report.metric": "mmd_efficientnet",
    }
}
"""`protocol: WORD` -> the values that it sets, by dotted key. Numbers of images and all other keys of the protocol stay."""


def load_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> StudySpec:
    """Read a study from YAML.

    A file may define smaller versions of the study, `scales: {tiny: {train.num_images: 400, ...}}`; `scale` selects one.
    `protocol` can be a word of `PROTOCOL_WORDS`: `offline` takes the features that come with isocost and need no download.

    Args:
        path: the YAML file.
        overrides: values by dotted key, such as {"train.num_images": 5000}.

    Raises:
        ConfigError: the file is missing or is not YAML, or a key or value is wrong; one line names file, key and remedy.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such study file; `isocost demo` runs the built-in study")
    plain = read_yaml(file)
    if not isinstance(plain, dict):
        raise ConfigError(f"{file}: a study must be a mapping with the keys name, data, autoencoder, family, train, sweep, ...")
    values = dict(overrides or {})
    scales, scale = plain.pop("scales", {}), values.pop("scale", plain.pop("scale", None))
    if isinstance(word := plain.get("protocol"), str):
        plain["protocol"] = {}
        values_of_word = _expand_words({"protocol": word}, file)
    else:
        values_of_word = {}
    for level in (values_of_word, _expand_words(_scale_overrides(scales, scale, file), file), _expand_words(values, file)):
        for key, value in level.items():
            _set_dotted(plain, key, value, file)
    return parse_spec(StudySpec, plain, str(file))


def dump_study(study: StudySpec) -> str:
    """YAML text with the values of all fields; loading and dumping it again gives the same text."""
    return format_yaml(study.model_dump(mode="json"))


def parse_override(key: str, text: str) -> Any:
    """The value of `--set KEY=TEXT`.

    The text of a setting that is itself text, such as a path, is taken as it was typed; one pair of quotes around all of it is
    removed. Every other text is YAML.

    Raises:
        ConfigError: the text is not YAML.
    """
    where = f"--set {key}={text}"
    if not _is_text(StudySpec, tuple(key.split("."))):
        return parse_yaml(text, where)
    if text in ("", "~", "null"):
        return None if text else ""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _is_text(annotation: Any, path: tuple[str, ...]) -> bool:
    """Whether the setting at `path` below a spec, a union or a mapping is a single text."""
    if not path:
        is_union = get_origin(annotation) in (Union, UnionType)
        return annotation is str or (is_union and any(_is_text(part, ()) for part in get_args(annotation)))
    if get_origin(annotation) is dict:
        return _is_text(get_args(annotation)[1], path[1:])
    fields = [spec.model_fields[path[0]] for spec in specs_in(annotation) if path[0] in spec.model_fields]
    return any(_is_text(field.annotation, path[1:]) for field in fields)


def _expand_words(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Values by dotted key, with the keys that `protocol: WORD` sets in its place."""
    expanded: dict[str, Any] = {}
    for key, value in values.items():
        if key != "protocol" or not isinstance(value, str):
            expanded[key] = value
        elif value in PROTOCOL_WORDS:
            expanded |= deepcopy(PROTOCOL_WORDS[value])
        else:
            raise ConfigError(f"{file}: protocol = {value!r}: give a mapping, or one of the words {', '.join(PROTOCOL_WORDS)}")
    return expanded


def _scale_overrides(scales: Any, scale: Any, file: Path) -> dict[str, Any]:
    """Values by dotted key of `scale`, from the file's section `scales: {NAME: {KEY: VALUE, ...}}`."""
    if scale is None:
        return {}
    by_name = {str(name): values for name, values in scales.items()} if isinstance(scales, dict) else {}
    values = by_name.get(str(scale))
    if not isinstance(values, dict):
        known = ", ".join(by_name) or "none; the file has no section `scales:`"
        raise ConfigError(f"{file}: scale = {scale!r} is unknown; the file defines: {known}")
    return {str(key): value for key, value in values.items()}


def _set_dotted(plain: dict[str, Any], key: str, value: Any, file: Path) -> None:
    *parents, last = key.split(".")
    section: Any = plain
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{file}: --set {key}: '{parent}' is not a mapping")
    section[last] = value
