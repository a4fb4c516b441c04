"""Names of mixer parts and stages -> the classes behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from linearize.errors import LinearizeError, UnknownNameError

T = TypeVar("T")
Entry = TypeVar("Entry")


class Registry(Generic[T]):
    """A table from names to classes, filled by a decorator beside each class.

    Args:
        kind: what it holds, as a noun; used in errors.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that enters its argument under `name`.

        Raises:
            LinearizeError: `name` is taken by another class.
        """

        def enter(entry: Entry) -> Entry:
            taken = self._entries.get(name)
            if taken is not None and getattr(taken, "__qualname__", taken) != getattr(entry, "__qualname__", entry):
                raise LinearizeError(
                    f"The {self.kind} {name!r} is already registered by {taken!r}; choose another name."
                )
            self._entries[name] = cast(T, entry)
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return what is registered as `name`.

        Raises:
            UnknownNameError: nothing is; the message lists near matches.
        """
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        """Return every registered name, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


feature_maps: Registry[type] = Registry("feature map")
gates: Registry[type] = Registry("gate")
memories: Registry[type] = Registry("memory")
combines: Registry[type] = Registry("combine")
families: Registry[Any] = Registry("model family")

register_feature_map = feature_maps.register
register_gate = gates.register
register_memory = memories.register
register_combine = combines.register
