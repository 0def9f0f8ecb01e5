"""Check a composed config against the functions it calls: do the names exist, do the values fit?"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

from ..errors import BrachiumError, ConfigError, did_you_mean

# Hydra's own keys beside `_target_`; everything else in such a node is a keyword argument.
HYDRA_KEYS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})


def locate(path: str, where: str) -> Callable[..., Any]:
    """Import the function or class that a `_target_` names; `where` is the node's key, for messages."""
    try:
        found = _import_path(path)
    except BrachiumError:  # says what to type better than we could, for example where rendering is broken
        raise
    except Exception as error:
        root = _root_cause(error)
        if isinstance(root, ModuleNotFoundError) and root.name and not path.startswith(root.name):
            raise ConfigError(
                f"{where}: {path} needs the package {root.name!r}, which is not installed.\n"
                f"Type: pip install {root.name.partition('.')[0]}"
            ) from error
        raise ConfigError(f"{where}: expected _target_ to name a function or class, got {path!r}: {root}") from error
    if not callable(found):
        raise ConfigError(f"{where}: expected _target_ to name a function or class, got {path!r} ({type(found)})")
    return typing.cast("Callable[..., Any]", found)


def _import_path(path: str) -> Any:
    """Return what a dotted path names: the longest importable module, then attributes of it."""
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError("not a dotted name")
    parts = path.split(".")
    found = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=1):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[: index + 1]))
            except ModuleNotFoundError as error:
                if error.name != ".".join(parts[: index + 1]):
                    raise  # the module is there, but something it imports is not
                names = [name for name in dir(found) if not name.startswith("_")]
                raise ImportError(f"{'.'.join(parts[:index])} has no {part!r}. {_close(part, names)}".strip()) from None
        found = getattr(found, part)
    return found


def _close(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else ""


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def check_tree(node: Any, verb: str, key: str = "", *, completed_later: bool = False) -> None:
    """Raise ConfigError unless every `_target_` in the resolved tree `node` accepts its keywords and values.

    Below a node with ``_recursive_: false`` nothing is instantiated here: whoever gets that plain data adds arguments,
    so missing ones are no error there.

    Args:
        node: Plain lists, dictionaries and scalars.
        verb: For messages.
        key: Dotted key of `node`; empty at the top.
        completed_later: Whether the arguments of `node` may be incomplete.
    """
    if isinstance(node, list):
        for index, item in enumerate(node):
            check_tree(item, verb, f"{key}.{index}" if key else str(index), completed_later=completed_later)
    elif isinstance(node, dict):
        if "_target_" in node:
            _check_call(node, verb, key, completed_later)
        below = completed_later or node.get("_recursive_") is False
        for name, item in node.items():
            check_tree(item, verb, f"{key}.{name}" if key else str(name), completed_later=below)


def _check_call(node: dict[str, Any], verb: str, key: str, completed_later: bool) -> None:
    target = locate(str(node["_target_"]), key or verb)
    parameters = parameters_of(target)
    if parameters is None:
        return
    accepted = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = [str(name) for name in node if name not in HYDRA_KEYS]
    prefix = f"{key}." if key else ""
    for name in given:
        if name not in accepted and not open_ended:
            raise ConfigError(
                f"{prefix}{name}: {node['_target_']} takes no argument {name!r}. {did_you_mean(name, accepted)}"
            )
        if name in parameters:
            _check_value(node[name], annotation(target, parameters[name]), verb, prefix + name)
    by_position = len(node.get("_args_") or ())
    required = [
        p.name
        for p in list(parameters.values())[by_position:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in required if name not in given]
    if missing and not node.get("_partial_") and not completed_later:
        typed = " ".join(f"+{prefix}{name}=VALUE" for name in missing)
        raise ConfigError(
            f"{key or verb}: {node['_target_']} needs {', '.join(missing)}, which the config does not give.\n"
            f"Type: brachium {verb} {typed}"
        )


def _check_value(value: Any, expected: Any, verb: str, key: str) -> None:
    if fits(value, expected):
        return
    shown = describe(expected)
    example = f"{key}=VALUE"
    options = typing.get_args(expected) if typing.get_origin(expected) is Literal else ()
    if options:
        close = did_you_mean(str(value), map(str, options))
        raise ConfigError(f"{key}: expected {shown}, got {value!r}. {close}")
    if isinstance(value, float) and value.is_integer() and fits(int(value), expected):
        example = f"{key}={int(value)}"
    elif not isinstance(value, str) and fits(str(value), expected):
        example = f"\"{key}='{value}'\""
    raise ConfigError(
        f"{key}: expected {shown}, got {value!r} ({type(value).__name__}).\nType: brachium {verb} {example}"
    )


def parameters_of(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a function or class, or None where Python cannot tell (some C functions)."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def annotation(target: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Return the parameter's annotation as a type; Any where it is absent or cannot be evaluated at run time."""
    note = parameter.annotation
    if note is parameter.empty:
        return Any
    if not isinstance(note, str):
        return note
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)  # type: ignore[misc]
    names = dict(getattr(function, "__globals__", {}))
    module = inspect.getmodule(target)  # a dataclass's __init__ has globals of its own
    names.update(vars(module) if module else {})
    try:
        return eval(note, names)
    except Exception:  # a name imported under TYPE_CHECKING only: such types are not scalars anyway
        return Any


def fits(value: Any, expected: Any) -> bool:
    """Say whether a plain YAML value fits an annotation; types other than plain data are taken on trust."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if isinstance(value, dict) and "_target_" in value:
        return expected not in (bool, int, float, str)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in args)
    if origin is Literal:
        return value in args
    if expected is None or expected is type(None):
        return value is None
    scalars = {bool: (bool,), int: (int,), float: (int, float), str: (str,), Path: (str,)}
    if expected in scalars:
        return isinstance(value, scalars[expected]) and (expected is bool or not isinstance(value, bool))
    base = origin or expected
    if inspect.isclass(base) and issubclass(base, (Sequence, AbstractSet)) and base not in (str, bytes):
        if not isinstance(value, list):
            return False
        inner = [arg for arg in args if arg is not Ellipsis]
        if base is tuple and len(inner) > 1 and Ellipsis not in args:
            return len(value) == len(inner) and all(fits(v, t) for v, t in zip(value, inner))
        return all(fits(item, inner[0]) for item in value) if inner else True
    if inspect.isclass(base) and issubclass(base, Mapping):
        return isinstance(value, dict)
    return True


def describe(expected: Any) -> str:
    """Return an annotation in words a user knows."""
    origin, args = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if expected is type(None):
        return "null"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    if expected in words:
        return words[expected]
    if inspect.isclass(origin) and issubclass(origin, (Sequence, AbstractSet)):
        inner = [arg for arg in args if arg is not Ellipsis]
        return f"a list of {', '.join(describe(arg).removeprefix('an ').removeprefix('a ') for arg in inner)}"
    return getattr(expected, "__name__", str(expected))


def summary(target: Callable[..., Any]) -> str:
    """Return the first paragraph of the docstring."""
    return inspect.cleandoc(target.__doc__ or "").partition("\n\n")[0]


def arguments(target: Callable[..., Any]) -> dict[str, str]:
    """Return name -> description from the docstring's `Args` (or, for a dataclass, `Attributes`) section."""
    texts = [target.__doc__, target.__init__.__doc__ if inspect.isclass(target) else None]  # type: ignore[misc]
    found: dict[str, str] = {}
    for text in texts:
        name, inside = "", False
        for line in inspect.cleandoc(text or "").splitlines():
            entry = re.match(r" {2,4}\*{0,2}(\w+)(?: \([^)]*\))?: *(.*)", line)
            if not line.startswith(" ") and line.strip():
                inside, name = line.strip() in ("Args:", "Arguments:", "Attributes:"), ""
            elif inside and entry:
                name = entry[1]
                found[name] = entry[2].strip()
            elif inside and name and line.strip():
                found[name] += " " + line.strip()
    return found
