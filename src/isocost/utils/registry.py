"""Named entries that one decorator adds: solvers, metrics, feature extractors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Generic, TypeVar

from isocost.errors import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name, in the order in which they were added."""

    def __init__(self, kind: str) -> None:
        """
        Args:
            kind: what an entry is, for messages: "solver".
        """
        self.kind = kind
        self._entries: dict[str, T] = {}
        self.num_changes = 0
        """Entries that were added or removed so far, so that what follows from the entries can be computed once."""

    def add(self, name: str, entry: T) -> None:
        """Add an entry.

        Raises:
            ConfigError: the name is taken.
        """
        if name in self._entries:
            raise ConfigError(f"{self.kind} {name!r} is registered already; choose another name")
        self._entries[name] = entry
        self.num_changes += 1

    def remove(self, name: str) -> None:
        """Remove an entry, for tests and notebooks that register one again."""
        del self._entries[name]
        self.num_changes += 1

    def check(self, name: str, where: str = "") -> None:
        """
        Raises:
            ConfigError: no entry has the name; one line with `where` it was requested, the nearest names, and the known ones.
        """
        if name not in self._entries:
            nearest = get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            prefix = f"{where}: " if where else ""
            raise ConfigError(f"{prefix}unknown {self.kind} {name!r}; {hint}known: {', '.join(self._entries)}")

    def __getitem__(self, name: str) -> T:
        self.check(name)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
