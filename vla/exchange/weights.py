"""Weights under other names: a strict translation that lists what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...errors import CheckpointError

SHOWN = 8


def require_fit(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], source: str) -> None:
    """Raise a CheckpointError that lists missing and unexpected weights and wrong shapes, if there are any."""
    missing = sorted(set(expected) - set(got))
    surplus = sorted(set(got) - set(expected))
    wrong = [
        f"{key}: expected {tuple(expected[key].shape)}, got {tuple(got[key].shape)}"
        for key in sorted(set(expected) & set(got))
        if expected[key].shape != got[key].shape
    ]
    lines = []
    for what, names in (("missing", missing), ("unexpected", surplus), ("of another shape", wrong)):
        if names:
            shown = "".join(f"\n    {name}" for name in names[:SHOWN])
            more = f"\n    and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"\n  {len(names)} {what}:{shown}{more}")
    if lines:
        raise CheckpointError(f"{source}: its weights do not fit the model they are for.{''.join(lines)}")


class Translation:
    """Names here and there, by prefixes and exact names.

    Args:
        pairs: (ours, theirs): of prefixes that end in ``.``, or of whole names.
    """

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self.pairs = sorted(pairs, key=lambda pair: -len(pair[1]))

    def ours(self, key: str) -> str | None:
        """The name here of one of theirs; None where it has none."""
        return _swap(key, [(b, a) for a, b in self.pairs])

    def theirs(self, key: str) -> str | None:
        """The name there of one of ours; None where it has none."""
        return _swap(key, sorted(self.pairs, key=lambda pair: -len(pair[0])))


def _swap(key: str, pairs: list[tuple[str, str]]) -> str | None:
    for old, new in pairs:
        if key == old:
            return new
        if old.endswith(".") and key.startswith(old):
            return new + key[len(old) :]
    return None
