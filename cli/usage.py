"""The page `brachium VERB --help` prints: options with their present values, groups with their choices, examples."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from ..errors import ConfigError
from .compose import Composed, Composer, leaves
from .signature import arguments, locate, summary


def help_page(verb: str, config_name: str, composer: Composer, overrides: Sequence[str], about: str) -> str:
    """Return the help of a verb as text; a config that cannot be composed yet is explained instead of listed."""
    usage = f"usage: brachium {verb} [key=value ...] [--dry-run] [--multirun] [--config-dir DIR]"
    try:
        composed = composer.compose(config_name, overrides)
    except ConfigError as error:
        return f"brachium {verb}: {about}\n\n{usage}\n\n{error}\n"
    groups = composer.groups()
    target_path = str(composed.config.get("_target_", ""))
    try:
        about = summary(locate(target_path, verb)) or about
    except ConfigError as error:
        about = f"{about}\n\n({error})"
    sections = [f"brachium {verb}: {about}", usage]
    if options := _option_lines(composed):
        sections.append("options\n" + "\n".join(options))
    if chosen := _group_lines(composed, composer, groups):
        sections.append("groups (key=OPTION picks a part; brachium list shows what each one is)\n" + "\n".join(chosen))
    sections.append("examples\n" + "\n".join(f"  {line}" for line in examples(verb, composed, composer)))
    return "\n\n".join(sections) + "\n"


def _option_lines(composed: Composed) -> list[str]:
    """One entry for each key of the config, parts of the top level first."""
    entries = sorted(leaves(composed.config), key=lambda item: "." in item[0])
    width = min(38, max((len(f"{key}={show(value)}") for key, value in entries), default=0))
    lines = []
    for key, value in entries:
        head = f"  {key}={show(value)}"
        text = description(composed, key)
        room = max(40, shutil.get_terminal_size((120, 24)).columns - width - 5)
        wrapped = textwrap.wrap(text, room) or [""]
        if len(head) > width + 3:
            lines.append(head)
            lines += [" " * (width + 4) + line for line in wrapped if line]
        else:
            lines.append(f"{head:<{width + 4}}{wrapped[0]}".rstrip())
            lines += [" " * (width + 4) + line for line in wrapped[1:]]
    return lines


def show(value: Any) -> str:
    """Return a value as one would type it; ``???`` marks one that must be given."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{show(v)}" for k, v in value.items()) + "}"
    return str(value)


def description(composed: Composed, key: str) -> str:
    """Return what the docstring of the nearest `_target_` says about `key`; empty when it says nothing."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(composed.config, parent) if parent else composed.config
    target = node.get("_target_") if OmegaConf.is_dict(node) else None
    if not target:
        return ""
    try:
        return arguments(locate(str(target), key)).get(name, "")
    except ConfigError as error:
        return f"({str(error).splitlines()[0]})"


def _group_lines(composed: Composed, composer: Composer, groups: Sequence[str]) -> list[str]:
    lines = []
    for key, choice in composed.choices.items():
        group = key.partition("@")[0]  # embodiment@env.embodiment: an option of `embodiment` put at env.embodiment
        if group in groups:
            lines.append(f"  {key}={choice}")
            text = "choices: " + ", ".join(composer.choices(group))
            lines += textwrap.wrap(text, 112, initial_indent="      ", subsequent_indent="      ")
    return lines


def examples(verb: str, composed: Composed, composer: Composer) -> list[str]:
    """Return three commands that compose."""
    missing = sorted(str(key) for key in OmegaConf.missing_keys(composed.config))
    base = " ".join([f"brachium {verb}", *(f"{key}=VALUE" for key in missing)])
    variants = []
    for key, choice in composed.choices.items():
        others = [option for option in composer.choices(key.partition("@")[0]) if option != choice]
        if others and choice != "null":
            variants.append(f"{base} {key}={others[0]}")
            break
    scalars = [(k, v) for k, v in leaves(composed.config) if isinstance(v, (bool, int)) and "." not in k]
    for key, value in scalars:
        other = show(not value) if isinstance(value, bool) else str(value * 2)
        if isinstance(value, bool):
            variants.append(f"{base} {key}={other}")
        else:
            variants.append(f"{base} --multirun {key}={value},{other}")
    return [base, *[*variants, f"{base} --help", f"BRACHIUM_TRACEBACK=1 {base}"][:1], f"{base} --dry-run"]
