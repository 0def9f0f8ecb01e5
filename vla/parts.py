"""Names for the parts of a pass: whoever profiles listens, nobody else pays for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol


class Listener(Protocol):
    """Told when a part begins and when the innermost one ends."""

    def enter(self, name: str) -> None:
        """A part begins."""

    def leave(self) -> None:
        """The innermost part ends."""


_listening: list[Listener] = []


class part:
    """``with part("vision"): ...``; parts may stand in each other, and time counts for the innermost.

    Args:
        name: Of the part.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        for listener in _listening:
            listener.enter(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listener in _listening:
            listener.leave()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of the parts of what runs inside, in this process."""
    _listening.append(listener)
    try:
        yield
    finally:
        _listening.remove(listener)
