"""What parts are made of, as data: to tell whether results and recordings were made with the same parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

DEEP = 12
"""Levels that are looked into."""


def described(value: Any, depth: int = DEEP) -> Any:
    """JSON-ready data that is the same for equal parts in any process.

    A factory is its name and arguments, an object its class and attributes, a function its name.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth <= 0:
        return type(value).__qualname__
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, partial):
        arguments = [described(each, depth - 1) for each in value.args]
        return [_named(value.func), arguments, described(value.keywords, depth - 1)]
    if isinstance(value, Mapping):
        return {
            str(key): described(each, depth - 1) for key, each in sorted(value.items(), key=lambda pair: str(pair[0]))
        }
    if isinstance(value, (list, tuple)):
        return [described(each, depth - 1) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(described(each, depth - 1)) for each in value)
    if callable(value) and hasattr(value, "__qualname__"):
        return _named(value)
    if is_dataclass(value):
        held: dict[str, Any] = {field.name: getattr(value, field.name) for field in fields(value)}
    else:
        held = {key: each for key, each in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
    return [_named(type(value)), described(held, depth - 1)]


def digest(*values: Any, length: int = 12) -> str:
    """Hex digits that differ where `described` does."""
    told = json.dumps([described(value) for value in values], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:length]


def _named(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
