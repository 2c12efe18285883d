"""YAML text to plain data and back, by the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3).

PyYAML follows YAML 1.1, in which `yes` and `no` are booleans, `0100` is 64 and `1:30` is 90. Here they are text, and a setting
that needs a number rejects text. A key that occurs twice in one mapping is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from isocost.errors import ConfigError

_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
"""Regular expression of each type, and the characters with which it can start. A decimal number with leading zeros is text,
because YAML 1.1 reads it as octal."""


class _Loader(yaml.SafeLoader):
    """Reads the core schema and the merge key `<<`; every other tag is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in first_lines:
                raise ConfigError(
                    f"line {line}: the key '{key.value}' is already in line {first_lines[key.value]}; remove one of the two"
                )
            first_lines[key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that the core schema or YAML 1.1 reads as another type."""


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _construct_bool(loader: _Loader, node: yaml.ScalarNode) -> bool:
    return {"true": True, "false": False}[loader.construct_scalar(node).lower()]


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix("tag:yaml.org,2002:") in ("null", "str", "seq", "map")
}
_YAML_1_1 = yaml.SafeDumper.yaml_implicit_resolvers
_Dumper.yaml_implicit_resolvers = {first: list(rules) for first, rules in _YAML_1_1.items()}
for _name, (_pattern, _first) in _CORE_SCHEMA.items():
    _rule = f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), ["" if c == "\0" else c for c in _first]
    _Loader.add_implicit_resolver(*_rule)
    if _name != "merge":
        _Dumper.add_implicit_resolver(*_rule)
_Loader.add_constructor("tag:yaml.org,2002:bool", _construct_bool)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data from YAML text.

    Args:
        text: one YAML document.
        where: file or option that `text` comes from, for the message.

    Raises:
        ConfigError: the text is not YAML, or a mapping has a key twice; one line with `where` and the line.
    """
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (yaml.YAMLError, ValueError, KeyError) as error:  # the latter: `!!int x`, `!!bool x`, 5000 digits
        raise ConfigError(f"{where}: this is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: its lists or mappings are nested too deeply; remove some levels") from error


def read_yaml(file: Path) -> Any:
    """Plain data from a YAML file in UTF-8.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a key twice.
    """
    try:
        return parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: this is not UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from error


def format_yaml(plain: Any) -> str:
    """YAML text of plain data; `parse_yaml` gives the same data again."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
