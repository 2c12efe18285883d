"""The base class of all specs, their digests, and one-line messages for mistakes in them.

Every stage of isocost is a function from a spec (and the artefacts that it names) to an artefact named by the spec's digest. A
field at its default does not enter the digest, so a new field changes no existing digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from isocost.errors import ConfigError

S = TypeVar("S", bound="Spec")


MAX_INT = 2**63 - 1
"""The largest number that a database column and a random generator take."""
MAX_LIST_DEPTH = 3
"""Lists in lists in a field: guidance_schedules has lists of lists of pairs."""
_SHOWN_CHARACTERS = 100
_MESSAGES = {
    "string_type": "this is not text; give text, in quotes if it looks like a number",
    "tuple_type": "give a list, such as [1, 2]",
    "dict_type": "give a mapping of keys to values",
    "model_type": "give a mapping of keys to values",
    "model_attributes_type": "give a mapping of keys to values",
    "invalid_key": "this key is not text; put it in quotes",
}
"""Messages of pydantic that name Python's types, in the words of a study file."""


class Spec(BaseModel):
    """A frozen description of a stage; an unknown key is an error.

    A number is never read from text or from a truth value, is finite, and has at most 64 bits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _scalars_of_their_type(cls, plain: Any) -> Any:
        for name, value in plain.items() if isinstance(plain, dict) else ():
            if name not in cls.model_fields:
                continue
            annotation = cls.model_fields[name].annotation
            types, scalars = scalar_types(annotation), dict(_scalars(name, value))
            if isinstance(value, dict) and get_origin(annotation) is dict:
                scalars = {f"{name}.{key}": scalar for key, scalar in value.items()}
            for key, scalar in scalars.items():
                if (problem := _problem_of(scalar, types)) is not None:
                    raise PydanticCustomError("scalar", "{problem}", {"problem": problem, "key": key, "shown": _shown(scalar)})
        return plain

    def canonical(self) -> dict[str, Any]:
        """Plain data without the fields at their default, for the digest."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _scalars(key: str, value: Any, depth: int = MAX_LIST_DEPTH) -> Iterator[tuple[str, Any]]:
    """The scalars in a value and in the lists in it, by key: "guidance.0"."""
    if isinstance(value, list | tuple) and depth:
        for index, item in enumerate(value):
            yield from _scalars(f"{key}.{index}", item, depth - 1)
    else:
        yield key, value


def _expanded(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~/") else path


LocalPath = Annotated[str, AfterValidator(_expanded)]
"""A path, in which ~ is the home folder; or a Hub id or a built-in name."""


def digest(*parts: Spec | Mapping[str, Any] | str | int) -> str:
    """The name of an artefact: 16 hex digits of SHA-256 over the canonical JSON of `parts`."""
    plain = [part.canonical() if isinstance(part, Spec) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_spec_to_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spec_to_plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.canonical()
    raise TypeError(f"{type(value).__name__} cannot enter a digest")


def scalar_types(annotation: Any) -> frozenset[Any]:
    """The scalar types and literal values that a field accepts, alone or in a tuple.

    Args:
        annotation: type annotation of the field.

    Returns:
        Types such as `int`, and values of literals such as "auto"; nothing of the specs and mappings in the annotation.
    """
    origin = get_origin(annotation)
    if origin is Literal:
        return frozenset(get_args(annotation))
    if origin is dict or annotation is Ellipsis:
        return frozenset()
    if origin is not None or get_args(annotation):
        return frozenset().union(*(scalar_types(part) for part in get_args(annotation)))
    return frozenset({annotation}) if annotation in (bool, int, float, str) else frozenset()


def _problem_of(value: Any, types: frozenset[Any]) -> str | None:
    """The reason why a scalar cannot be a value of these types, or None."""
    is_number = bool(types & {int, float})
    if isinstance(value, str):
        if is_number and str not in types and value not in types:
            return "this is text; give a number, without quotes and leading zeros"
        if "\0" in value:
            return "it has a character that no text and no file name has; remove it"
    elif isinstance(value, bool):
        if is_number and bool not in types:
            return "this is a truth value; give a number"
    elif isinstance(value, int) and abs(value) > MAX_INT:
        return "it has more than 64 bits; give a smaller number"
    return None


def _shown(value: Any) -> str:
    """A value in a message, cut when it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return "the number"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


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
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: {_shown(error.object)} has a lone surrogate, which is not a character; remove it"
        ) from error


def _format_error(error: ValidationError, spec_type: type[Spec], where: str) -> str:
    problem = error.errors()[0]
    tags = _union_tags(spec_type)  # pydantic adds the tag of a discriminated union to the location
    location = [part for part in problem["loc"] if part not in tags or part == problem["loc"][-1]]
    location = [part for part in location if "[" not in str(part)]  # pydantic's names of validators and of union members
    value = problem.get("input")
    if problem["type"] == "scalar":
        location, shown = [*location, problem["ctx"]["key"]], f" = {problem['ctx']['shown']}"
    else:
        shown = "" if problem["type"] == "missing" or isinstance(value, dict | list | Spec) else f" = {_shown(value)}"
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        owner = _spec_at(spec_type, problem["loc"][:-1])
        allowed = f"; allowed here: {', '.join(owner.model_fields)}" if owner else ""
        return f"{where}: {key}: unknown key{allowed}"
    if problem["type"] == "union_tag_invalid":
        return f"{where}: {key}.kind = {_shown(value['kind'])}: give one of {problem['ctx']['expected_tags']}"
    message = _MESSAGES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return f"{where}: {key}{shown}: {message}" if key else f"{where}: {message}"


def _spec_at(spec_type: type[Spec], location: tuple[int | str, ...]) -> type[Spec] | None:
    """The spec class that owns the keys at `location` of a validation error."""
    current: Any = spec_type
    for part in location:
        if isinstance(part, int):
            continue
        if isinstance(current, type) and issubclass(current, Spec) and part in current.model_fields:
            current = current.model_fields[part].annotation
        choices = specs_in(current)
        tagged = [choice for choice in choices if part in _kinds(choice)]
        if tagged or len(choices) == 1:
            current = (tagged or choices)[0]
    choices = specs_in(current)
    return choices[0] if len(choices) == 1 else None


def specs_in(annotation: Any) -> list[type[Spec]]:
    """All spec classes in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return [annotation]
    return [spec for part in getattr(annotation, "__args__", ()) for spec in specs_in(part)]


def _kinds(spec_type: type[Spec]) -> tuple[str, ...]:
    """The values of the literal field `kind`."""
    field = spec_type.model_fields.get("kind")
    return tuple(getattr(field.annotation, "__args__", ())) if field else ()


def _union_tags(spec_type: type[Spec]) -> frozenset[str]:
    """The kinds of all discriminated unions in `spec_type` and in the specs that it contains."""
    tags: frozenset[str] = frozenset()
    for field in spec_type.model_fields.values():
        specs = specs_in(field.annotation)
        if len(specs) > 1:
            tags = tags.union(*(_kinds(spec) for spec in specs))
        tags = tags.union(*(_union_tags(spec) for spec in specs))
    return tags
