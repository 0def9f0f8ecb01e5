"""Compose a verb's config with Hydra, and say in one sentence what is wrong when that fails."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import ConfigError, did_you_mean
from .signature import locate, parameters_of

CONF_MODULE = "brachium.conf"
# Hydra raises bare ValueErrors too, for example for `model=null`.
COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError)


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A composed config.

    Attributes:
        config: The tree, interpolations unresolved.
        choices: Group -> chosen option, in the order of the defaults list.
    """

    config: DictConfig
    choices: dict[str, str]


class Composer:
    """Composes the configs of `brachium.conf` and of every folder or package on the search path.

    Args:
        search_path: Further places of configs: ``pkg://package.module`` or ``file://folder``.
    """

    def __init__(self, search_path: Sequence[str] = ()) -> None:
        self.search_path = tuple(search_path)

    @contextmanager
    def _hydra(self) -> Iterator[ConfigLoader]:
        # conf/list.yaml reads the search path back with ${brachium.search_path:}
        OmegaConf.register_new_resolver("brachium.search_path", lambda: list(self.search_path), replace=True)
        with initialize_config_module(config_module=CONF_MODULE, version_base="1.3"):
            yield GlobalHydra.instance().config_loader()

    def _with_path(self, overrides: Sequence[str]) -> list[str]:
        quoted = ",".join(f"'{path}'" for path in self.search_path)
        return [*([f"hydra.searchpath=[{quoted}]"] if quoted else []), *overrides]

    def compose(self, config_name: str, overrides: Sequence[str] = ()) -> Composed:
        """Return the composed config; raise ConfigError when a name or value does not exist or fit."""
        try:
            with self._hydra():
                config = compose(config_name, overrides=self._with_path(overrides), return_hydra_config=True)
        except COMPOSE_ERRORS as error:
            completed = self._completed(config_name, overrides)
            if completed != list(overrides):
                return self.compose(config_name, completed)
            raise self._explain(config_name, overrides, error) from error
        picked = {str(k): v for k, v in config.hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
        choices = {key: "null" if option is None else str(option) for key, option in picked.items()}
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        return Composed(config=config, choices=choices)

    def options(self, group: str, *, groups: bool = False) -> list[str]:
        """Return the options of a group, or with `groups` the groups inside it."""
        kind = ObjectType.GROUP if groups else ObjectType.CONFIG
        with self._hydra() as loader:
            # a config name is needed for Hydra to look at the search path at all
            found = loader.get_group_options(group, kind, config_name="doctor", overrides=self._with_path(()))
        return sorted(name for name in found if not (group == "" and name == "hydra") and name != "__pycache__")

    def groups(self, parent: str = "") -> list[str]:
        """Return every group that has options, such as ``model/head``."""
        found = []
        for name in self.options(parent, groups=True):
            path = f"{parent}/{name}" if parent else name
            found += [*([path] if self.options(path) else []), *self.groups(path)]
        return found

    @cached_property
    def chosen_groups(self) -> frozenset[str]:
        """Groups from which some verb picks an option; any other folder in such a group only sorts its options."""
        found: set[str] = set()
        for name in self.options(""):
            try:
                found |= {key.partition("@")[0] for key in self.compose(name).choices}
            except ConfigError:  # some verbs cannot be composed before a choice is made
                continue
        return frozenset(found)

    def choices(self, group: str) -> list[str]:
        """Return all that can be typed behind ``group=``, such as ``reach`` or ``tabletop/reach``."""
        found = self.options(group)
        for folder in self.options(group, groups=True):
            if f"{group}/{folder}" not in self.chosen_groups:
                found += [f"{folder}/{option}" for option in self.choices(f"{group}/{folder}")]
        return found

    def pick(self, group: str, option: str) -> str:
        """Return what to type for an option, for example ``env=tabletop/reach`` for group ``env/tabletop``."""
        parts = group.split("/")
        for length in range(len(parts), 0, -1):
            if (owner := "/".join(parts[:length])) in self.chosen_groups:
                return f"{owner}={'/'.join([*parts[length:], option])}"
        return f"{group}={option}"

    def _completed(self, config_name: str, overrides: Sequence[str]) -> list[str]:
        """The overrides, with ``+`` before those that name an argument which a class takes and no YAML writes out."""
        parsed = parse_overrides(overrides)
        plain = [o for o in parsed if not (o.is_add() or o.is_delete() or o.is_force_add())]
        suspects = {o.key_or_group for o in plain if "." in o.key_or_group}
        others = [str(o.input_line) for o in parsed if o.key_or_group not in suspects]
        try:
            with self._hydra():
                config = compose(config_name, overrides=self._with_path(others))
        except COMPOSE_ERRORS:
            return list(overrides)
        taken = {key for key in suspects if _is_argument(config, key)}
        return [f"+{line}" if o.key_or_group in taken else str(line) for o, line in zip(parsed, overrides)]

    # -- what went wrong ------------------------------------------------------------------------------------------

    def _explain(self, config_name: str, overrides: Sequence[str], error: Exception) -> ConfigError:
        """Find the override that breaks the composition and describe it; else translate Hydra's message."""
        groups = self.groups()
        good: list[str] = []
        parsed = parse_overrides(overrides)
        # A key may be typed before the group that brings it in, so groups come first.
        parsed.sort(key=lambda o: o.key_or_group not in groups)
        for override in parsed:
            line = str(override.input_line)
            try:
                with self._hydra():
                    compose(config_name, overrides=self._with_path([*good, line]))
            except COMPOSE_ERRORS as culprit:
                if not str(culprit).startswith("You must specify"):
                    return self._explain_override(config_name, override, good, groups, culprit)
            good.append(line)
        return _explain_message(config_name, error)

    def _explain_override(
        self, verb: str, override: Override, good: list[str], groups: list[str], error: Exception
    ) -> ConfigError:
        key, line = override.key_or_group, str(override.input_line)
        if key == "hydra.searchpath" or override.is_hydra_override():
            return ConfigError(f"{line}: {_first_line(error)}")
        if key in groups and isinstance(error, MissingConfigException) and not override.is_delete():
            value = str(override.get_value_element_as_str())
            return ConfigError(
                f"{line}: {key} has no option {value!r}. {did_you_mean(value, self.choices(key))}\n"
                f"Type: brachium list what={key}"
            )
        if key in groups and not override.is_delete() and not isinstance(override.value(), str):
            remove = f" Type '~{key}' to leave it out." if override.value() is None else ""
            return ConfigError(
                f"{line}: expected {key}=OPTION, got {override.get_value_element_as_str() or 'nothing'}. "
                f"Choices: {', '.join(self.choices(key))}.{remove}"
            )
        value = str(override.get_value_element_as_str())
        placed = [name for name in self._choices_so_far(verb, good) if name.partition("@")[0] == key]
        if key in groups and placed and not (override.is_add() or override.is_delete()):
            typed = " or ".join(f"{name}={value}" for name in placed)
            return ConfigError(f"{line}: `{verb}` picks {key} in another place.\nType: brachium {verb} {typed}")
        known = self._known_keys(verb, good)
        if override.is_delete() or override.is_add() or key in known:
            return ConfigError(f"{line}: {_first_line(error)}")
        hint = closest_keys(key, [name for name, is_node in known.items() if not is_node], groups)
        tail = "" if not hint else f" Did you mean {' or '.join(f'{name}={value}' for name in hint)}?"
        return ConfigError(f"{line}: `{verb}` has no option or group {key!r}.{tail}\nType: brachium {verb} --help")

    def _choices_so_far(self, verb: str, overrides: list[str]) -> dict[str, str]:
        try:
            return self.compose(verb, overrides).choices
        except ConfigError:
            return {}

    def _known_keys(self, verb: str, overrides: list[str]) -> dict[str, bool]:
        """Return each dotted key, with True for those that hold further keys."""
        try:
            with self._hydra():
                config = compose(verb, overrides=self._with_path(overrides))
        except COMPOSE_ERRORS:
            return {}
        return {key: isinstance(value, DictConfig) for key, value in leaves(config, nodes=True)}


def _is_argument(config: Any, key: str) -> bool:
    """Whether `key` is not in a config, but the class that its node names takes it."""
    parent, _, name = key.rpartition(".")
    try:
        node = OmegaConf.select(config, parent)
        if not isinstance(node, DictConfig) or name in node or "_target_" not in node:
            return False
        parameters = parameters_of(locate(str(node["_target_"]), parent))
    except (OmegaConfBaseException, ConfigError):
        return False
    return parameters is not None and name in parameters and name != "inputs"


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Parse Hydra overrides; raise ConfigError that shows the word Hydra could not read."""
    parser, parsed = OverridesParser.create(), []
    for word in words:
        try:
            parsed.append(parser.parse_override(word))
        except HydraException as error:
            reason = _first_line(error).strip().rstrip(".")
            raise ConfigError(
                f"{word}: expected key=value, got something Hydra cannot read ({reason}).\n"
                "Quote values that hold spaces, commas, brackets or '=': \"key='a b'\"; a list is \"key=[1,2]\"."
            ) from error
    return parsed


def leaves(config: Any, prefix: str = "", *, nodes: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of each scalar or list in `config`; with `nodes` the inner mappings too."""
    items = config.items_ex(resolve=False) if isinstance(config, DictConfig) else config.items()
    for name, value in items:
        key = f"{prefix}{name!s}"
        if isinstance(value, (DictConfig, dict)) and not (isinstance(value, DictConfig) and value._is_none()):
            if nodes or (not value and not str(name).startswith("_")):
                yield key, value
            if not (isinstance(value, DictConfig) and (value._is_missing() or value._is_interpolation())):
                yield from leaves(value, f"{key}.", nodes=nodes)
        elif not str(name).startswith("_"):
            yield key, value


def closest_keys(key: str, keys: Sequence[str], groups: Sequence[str] = ()) -> list[str]:
    """Return up to three names that `key` was probably meant to be."""
    last = key.rpartition(".")[2]
    same_end = [name for name in keys if name.rpartition(".")[2] == last]
    by_end = {name.rpartition(".")[2]: name for name in reversed(keys) if "." not in key}
    near = difflib.get_close_matches(key, [*keys, *groups], n=3, cutoff=0.6)
    near += [by_end[end] for end in difflib.get_close_matches(last, by_end, n=2, cutoff=0.75)]
    return list(dict.fromkeys([*same_end, *near]))[:3]


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or str(error.__cause__ or error.__class__.__name__)
    return text.splitlines()[0]


def _explain_message(verb: str, error: Exception) -> ConfigError:
    """Translate a composition error that no single override causes."""
    text = str(error)
    must = re.search(r"You must specify '([^']+)'", text)
    if must:
        options = re.findall(r"^\t(\S+)", text, re.MULTILINE)
        return ConfigError(
            f"`{verb}` needs a choice of {must[1]}. Choices: {', '.join(options)}.\n"
            f"Type: brachium {verb} {must[1]}={options[0] if options else 'OPTION'}"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        name = str(error.missing_cfg_file)
        options = [str(option) for option in error.options or ()]
        hint = did_you_mean(name.rpartition("/")[2], options) if options else ""
        return ConfigError(f"conf/{name}.yaml does not exist, and `{verb}` needs it. {hint}".strip())
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        text = f"{text} ({_first_line(error.__cause__)})" if text else _first_line(error.__cause__)
    return ConfigError(f"the config of `{verb}` cannot be composed: {text.strip()}")


def load(part: str, *overrides: str) -> Any:
    """Make one part of the configuration from Python: ``load("env/tabletop/reach")`` is an environment factory.

    Args:
        part: Group and option, for example ``embodiment/arm7_ee``.
        overrides: Changes below the part, for example ``task.max_steps=50``.

    Raises:
        ConfigError: No such part or key.
    """
    from hydra.utils import instantiate

    group, _, option = part.partition("/")
    with initialize_config_module(config_module=CONF_MODULE, version_base="1.3"):
        try:
            config = compose(overrides=[f"+{group}@part={option}", *(f"part.{o}" for o in overrides)])
        except COMPOSE_ERRORS as error:
            raise ConfigError(f"cannot compose {part!r} with {list(overrides)}: {_first_line(error)}") from error
    return instantiate(config.part, _convert_="all")
