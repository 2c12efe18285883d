"""Read JSON without the traps of `json.loads`: an object with one key twice, and text that is nested too deeply."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Args:
        text: the text, or its bytes in UTF-8.

    Raises:
        ValueError: it is not JSON, an object has a key twice, or it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {ascii(repeated)[:80]} appears twice")
    return content
