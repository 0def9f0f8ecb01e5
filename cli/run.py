"""Run a verb: split the words, compose, check, then show help, print the plan, or call the function."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..console import human_time, table
from ..errors import BrachiumError, ConfigError, did_you_mean
from .compose import Composer, parse_overrides
from .launch import is_for_hydra, launch
from .signature import arguments, check_tree, locate

FLAGS = ("--help", "--dry-run", "--multirun", "--config-dir")
SHORT = {"-h": "--help", "-m": "--multirun"}


@dataclass(frozen=True, kw_only=True)
class Words:
    """What was typed after the verb.

    Attributes:
        flags: Those of `FLAGS` that were given.
        overrides: Hydra overrides, less the search path.
        search_path: From ``hydra.searchpath=[...]`` and ``--config-dir``.
        hydra: Which launcher or sweeper of Hydra runs the jobs of a sweep, and how, as typed.
    """

    flags: frozenset[str]
    overrides: tuple[Override, ...]
    search_path: tuple[str, ...]
    hydra: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """The overrides as typed."""
        return [str(override.input_line) for override in self.overrides]


def run_verb(verb: str, config_name: str, words: Sequence[str], about: str = "") -> int:
    """Run `verb` with the words typed after it and return the exit code; raise BrachiumError for mistakes."""
    choose_renderer()
    flags, plain, folders = split_flags(verb, words)
    if verb == "verify":
        from ..verify import named

        plain = named(plain)
    typed = read_overrides(verb, flags, plain, folders)
    composer = Composer(typed.search_path)
    trust_packages(typed.search_path)
    if "--help" in typed.flags:
        from .usage import help_page

        print(help_page(verb, config_name, composer, typed.lines, about))
        return 0
    if any(word.startswith("hydra/sweeper=") for word in typed.hydra):  # which knows what its intervals mean
        if "--dry-run" in typed.flags:
            raise ConfigError("--dry-run: what a sweeper will try is not known beforehand: leave hydra/sweeper out")
        return launch(verb, config_name, typed.search_path, [*typed.lines, *typed.hydra])
    jobs = sweep(typed.overrides) if "--multirun" in typed.flags else [typed.lines]
    plans = [plan(verb, config_name, composer, job) for job in jobs]  # every job is checked before the first one runs
    if "--dry-run" in typed.flags and all("dry_run" in tree for tree in plans):
        plans = [{**tree, "dry_run": True} for tree in plans]  # the verb itself says what it would do
    elif "--dry-run" in typed.flags:
        for job, tree in zip(jobs, plans):
            if len(plans) > 1:
                print(f"# {' '.join(job)}")
            print(f"# {tree['_target_']}\n{OmegaConf.to_yaml(OmegaConf.create(tree))}", end="")
        return 0
    if typed.hydra:
        return launch(verb, config_name, typed.search_path, [*typed.lines, *typed.hydra])
    if "--multirun" in typed.flags:
        return _run_jobs(verb, jobs, plans)
    return call(plans[0])


def trust_packages(search_path: Sequence[str]) -> None:
    """Who takes configs from a package trusts it: checkpoints may name its classes."""
    named = [place.removeprefix("pkg://").partition(".")[0] for place in search_path if place.startswith("pkg://")]
    if named:
        from ..vla.recipe import trust

        trust(*named)


def choose_renderer() -> None:
    """Make MuJoCo render through EGL on a Linux machine without a display; must come before `import mujoco`."""
    headless = not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if sys.platform == "linux" and headless:
        os.environ.setdefault("MUJOCO_GL", "egl")


# -- words ------------------------------------------------------------------------------------------------------------


def split_flags(verb: str, words: Sequence[str]) -> tuple[frozenset[str], list[str], list[str]]:
    """Return the flags, the other words, and the folders given with ``--config-dir``."""
    flags, plain, folders = set(), [], []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        name = SHORT.get(name, name)
        if not word.startswith("-"):
            plain.append(word)
        elif name == "--config-dir":
            folder = value if equals else next(rest, "")
            if not Path(folder).is_dir() or not folder:
                raise ConfigError(f"--config-dir: expected a folder with YAML files, got {folder!r}.")
            folders.append(folder)
        elif name in FLAGS and not equals:
            flags.add(name)
        else:
            key = name.lstrip("-").replace("-", "_")
            likely = f"\nType: brachium {verb} {key}={value or 'VALUE'}" if equals and key else ""
            raise ConfigError(
                f"{word}: unknown flag; options are written key=value, without dashes. "
                f"{did_you_mean(name, FLAGS)}{likely}"
            )
    return frozenset(flags), plain, folders


def read_overrides(verb: str, flags: frozenset[str], plain: Sequence[str], folders: Sequence[str]) -> Words:
    """Parse the overrides and take the search path out of them."""
    for word in plain:
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(
                f"{word}: expected key=value, got a word without '='.\n"
                f"Type: brachium {verb} KEY={word}   (brachium {verb} --help lists the keys)"
            )
    search_path = [f"file://{Path(folder).resolve()}" for folder in folders]
    overrides, hydra = [], []
    for override in parse_overrides(plain):
        if override.key_or_group == "hydra.searchpath":
            value = override.value()
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ConfigError(
                    f"{override.input_line}: expected a list of places.\nType: 'hydra.searchpath=[pkg://package.conf]'"
                )
            for place in value:
                _check_place(place)
            search_path += value
        elif is_for_hydra(override.key_or_group):
            if "--multirun" not in flags:
                raise ConfigError(f"{override.input_line}: how a sweep is run. Add --multirun")
            hydra.append(str(override.input_line))
        elif override.is_sweep_override() and "--multirun" not in flags:
            key, _, value = str(override.input_line).partition("=")
            raise ConfigError(
                f"{override.input_line}: one value expected, got several.\n"
                f'Add --multirun to run once for each; or type "{key}=[{value}]" for a list, '
                f"or \"{key}='{value}'\" for a text."
            )
        else:
            overrides.append(override)
    return Words(flags=flags, overrides=tuple(overrides), search_path=tuple(search_path), hydra=tuple(hydra))


def _check_place(place: str) -> None:
    """Raise ConfigError unless a place of the search path exists; Hydra would only warn."""
    scheme, _, where = place.rpartition("://")
    if scheme == "pkg":
        try:
            found = importlib.util.find_spec(where) is not None
        except ModuleNotFoundError:  # the parent package is not there either
            found = False
        if not found:
            raise ConfigError(
                f"hydra.searchpath: there is no package {where!r} to import. Is it installed, with an __init__.py?"
            )
    elif not Path(where).is_dir():
        raise ConfigError(f"hydra.searchpath: there is no folder {where!r}.")


def sweep(overrides: Sequence[Override]) -> list[list[str]]:
    """Return the override lines of each job: the product of all sweeps, the last varying fastest."""
    axes = []
    for override in overrides:
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise ConfigError(f"{override.input_line}: expected key=1,2,3 or key=range(1,4), got an interval.")
            key = override.get_key_element()
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([str(override.input_line)])
    return [list(job) for job in itertools.product(*axes)]


# -- plan and call ----------------------------------------------------------------------------------------------------


def plan(verb: str, config_name: str, composer: Composer, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the resolved and checked config of one job as plain values."""
    try:
        config = composer.compose(config_name, overrides).config
    except ConfigError as error:  # which knows the config's name; people type the verb's
        told = str(error).replace(f"`{config_name}`", f"`{verb}`")
        raise ConfigError(told.replace(f"brachium {config_name} ", f"brachium {verb} ")) from error
    if config.get("_target_") is None:
        raise ConfigError(f"conf/{config_name}.yaml: expected a _target_ (the function `{verb}` runs), got none.")
    try:
        missing = sorted(_missing(config))
        if missing:
            raise ConfigError(_missing_text(verb, missing, config, overrides))
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}{str(error).splitlines()[0]}") from error
    assert isinstance(tree, dict)
    check_tree(tree, verb)
    return {str(key): value for key, value in tree.items()}


def _missing(node: Any, prefix: str = "") -> list[str]:
    """Keys whose value must be given; OmegaConf's own list breaks off where another value refers to one of them."""
    found = []
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        if OmegaConf.is_interpolation(node, key):
            continue
        if OmegaConf.is_missing(node, key):
            found.append(f"{prefix}{key}")
        elif OmegaConf.is_config(node[key]):
            found += _missing(node[key], f"{prefix}{key}.")
    return found


def _missing_text(verb: str, missing: Sequence[str], config: Any, typed: Sequence[str]) -> str:
    """Say which values are missing, with their descriptions where they can be had."""
    lines = []
    for key in missing:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        try:
            text = arguments(locate(node["_target_"], key)).get(name, "")
        except (BrachiumError, KeyError, TypeError, OmegaConfBaseException):
            text = ""
        lines.append(f"  {key}: {text}" if text else f"  {key}")
    words = shlex.join([verb, *typed, *(f"{key}=VALUE" for key in missing)])
    return f"expected a value for\n{chr(10).join(lines)}\nType: brachium {words}"


def call(tree: dict[str, Any]) -> int:
    """Build the parts that `tree` describes, call its function and return the exit code."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        # `_partial_` builds the arguments only: the call below is ours, so that errors keep their own traceback.
        prepared = instantiate({**tree, "_partial_": True}, _convert_="all")
    except InstantiationException as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    result = prepared.func(*prepared.args, **prepared.keywords)
    return result if type(result) is int else 0


def _run_jobs(verb: str, jobs: Sequence[list[str]], plans: Sequence[dict[str, Any]]) -> int:
    """Run the jobs one after another, go on after a failed one, and print a table; return the worst exit code."""
    constant = set.intersection(*[set(job) for job in jobs]) if len(jobs) > 1 else set()
    rows, worst = [], 0
    for number, (job, tree) in enumerate(zip(jobs, plans), start=1):
        label = " ".join(line for line in job if line not in constant) or verb
        print(f"[{number}/{len(jobs)}] brachium {verb} {' '.join(job)}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            code, note = call(tree), ""
        except BrachiumError as error:
            code, note = 2, str(error).splitlines()[0]
            print(f"brachium {verb}: {error}", file=sys.stderr)
        worst = max(worst, code)
        rows.append(
            [str(number), label, "ok" if code == 0 else f"exit {code}", human_time(time.monotonic() - start), note]
        )
    table(f"brachium {verb}: {len(jobs)} runs", ["#", "overrides", "result", "time", "error"], rows)
    return worst
