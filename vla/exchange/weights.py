"""Weights under other names: a strict translation that lists what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def refuse(kind: str, options: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise a CheckpointError where a configuration asks for something that is not translated."""
    for name, value in expected.items():
        got = options.get(name, value)
        if got != value:
            raise CheckpointError(f"{kind} with {name}={got} is not converted: expected {name}={value}")


def normalisation(options: Mapping[str, Any], default: str) -> dict[str, str]:
    """Modes of state and action, from the configuration's ``normalization_mapping`` where it has one."""
    modes = {"MEAN_STD": "mean_std", "QUANTILES": "quantile", "MIN_MAX": "min_max"}
    asked = options.get("normalization_mapping") or {}
    found = {}
    for key, name in (("STATE", "state"), ("ACTION", "action")):
        mode = asked.get(key)
        if mode is not None and mode not in modes:
            raise CheckpointError(f"normalisation {mode} of {key} is not converted: expected one of {sorted(modes)}")
        found[f"{name}_normalization"] = default if mode is None else modes[mode]
    return found


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
