"""The base class of all specs, their digests, and one-line messages for mistakes in them.

Every stage of isocost is a function from a spec (and the artefacts that it names) to an artefact named by the spec's digest. A
field at its default does not enter the digest, so a new field changes no existing digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from isocost.errors import ConfigError

S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    """A frozen description of a stage; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def canonical(self) -> dict[str, Any]:
        """Plain data without the fields at their default, for the digest."""
        return self.model_dump(mode="json", exclude_defaults=True)


def digest(*parts: Spec | Mapping[str, Any] | str | int) -> str:
    """The name of an artefact: 16 hex digits of SHA-256 over the canonical JSON of `parts`."""
    plain = [part.canonical() if isinstance(part, Spec) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_spec_to_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spec_to_plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.canonical()
    raise TypeError(f"{type(value).__name__} cannot enter a digest")


def parse_spec(spec_type: type[S], plain: Mapping[str, Any], where: str) -> S:
    """Validate `plain` as `spec_type`.

    Args:
        spec_type: class of the spec.
        plain: keys and values.
        where: file or option that `plain` comes from, for the message.

    Raises:
        ConfigError: one line with `where`, the key, the value and the allowed values.
    """
    try:
        return spec_type.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(_format_error(error, spec_type, where)) from error


def _format_error(error: ValidationError, spec_type: type[Spec], where: str) -> str:
    problem = error.errors()[0]
    tags = _union_tags(spec_type)  # pydantic adds the tag of a discriminated union to the location
    location = [part for part in problem["loc"] if part not in tags or part == problem["loc"][-1]]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        owner = _spec_at(spec_type, problem["loc"][:-1])
        allowed = f"; allowed here: {', '.join(owner.model_fields)}" if owner else ""
        return f"{where}: {key}: unknown key{allowed}"
    value = problem.get("input")
    shown = "" if problem["type"] == "missing" or isinstance(value, dict | list) else f" = {value!r}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {key}{shown}: {message}" if key else f"{where}: {message}"


def _spec_at(spec_type: type[Spec], location: tuple[int | str, ...]) -> type[Spec] | None:
    """The spec class that owns the keys at `location` of a validation error."""
    current: Any = spec_type
    for part in location:
        if isinstance(part, int):
            continue
        if isinstance(current, type) and issubclass(current, Spec) and part in current.model_fields:
            current = current.model_fields[part].annotation
        choices = _specs_in(current)
        tagged = [choice for choice in choices if part in _kinds(choice)]
        if tagged or len(choices) == 1:
            current = (tagged or choices)[0]
    choices = _specs_in(current)
    return choices[0] if len(choices) == 1 else None


def _specs_in(annotation: Any) -> list[type[Spec]]:
    """All spec classes in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for part in getattr(annotation, "__args__", ()) for spec in _specs_in(part)]


def _kinds(spec_type: type[Spec]) -> tuple[str, ...]:
    """The values of the literal field `kind`."""
    field = spec_type.model_fields.get("kind")
    return tuple(getattr(field.annotation, "__args__", ())) if field else ()


def _union_tags(spec_type: type[Spec]) -> frozenset[str]:
    """The kinds of all discriminated unions in `spec_type` and in the specs that it contains."""
    tags: frozenset[str] = frozenset()
    for field in spec_type.model_fields.values():
        specs = _specs_in(field.annotation)
        if len(specs) > 1:
            tags = tags.union(*(_kinds(spec) for spec in specs))
        tags = tags.union(*(_union_tags(spec) for spec in specs))
    return tags
