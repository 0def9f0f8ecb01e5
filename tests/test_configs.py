"""Every YAML under conf/ composes, every `_target_` exists, and every key fits the signature it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf

from brachium.__main__ import VARIANTS, VERBS
from brachium.catalog import describe
from brachium.cli.compose import Composer
from brachium.cli.signature import HYDRA_KEYS, check_tree, fits, locate, parameters_of
from brachium.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
FILES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
PARTS = [name for name in FILES if "/" in name]


def plain(node: Any) -> Any:
    """The tree as plain values; what is missing or refers to the config around it becomes None."""
    if isinstance(node, DictConfig):
        known = {}
        for key in node:
            if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
                known[str(key)] = None
            else:
                known[str(key)] = plain(node[key])
        return known
    if isinstance(node, ListConfig):
        return [None if OmegaConf.is_interpolation(node, i) else plain(node[i]) for i in range(len(node))]
    return node


def given(node: Any) -> Any:
    """A plain tree less what is not known here."""
    if isinstance(node, dict):
        return {name: given(value) for name, value in node.items() if value is not None}
    return node


def targets(node: Any, key: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every (dotted key, node) with a `_target_` in a plain tree."""
    found = []
    if isinstance(node, dict):
        found += [(key, node)] if "_target_" in node else []
        for name, value in node.items():
            found += targets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            found += targets(value, f"{key}.{index}")
    return found


def test_every_verb_has_a_config_and_no_config_lacks_a_verb() -> None:
    assert {name for name in FILES if "/" not in name} == {
        *(config for config, _ in VERBS.values()),
        *(config for variants in VARIANTS.values() for config in variants.values()),
    }


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_verb_calls_something_that_exists(verb: str) -> None:
    config = Composer().compose(VERBS[verb][0]).config
    for key, node in targets(plain(config)):
        locate(node["_target_"], key)
    tree = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    for key in OmegaConf.missing_keys(tree):
        OmegaConf.update(tree, key, None)
    keys_fit(plain(tree))


def keys_fit(tree: Any) -> None:
    """Raise unless all keys of all nodes are arguments of their targets and present values have the right type."""
    for key, node in targets(tree):
        parameters = parameters_of(locate(node["_target_"], key))
        if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        unknown = [name for name in node if name not in HYDRA_KEYS and name not in parameters]
        assert not unknown, f"{key}: {node['_target_']} takes no argument {unknown}"
        check_tree(given(node), "test", key, completed_later=True)


@pytest.mark.filterwarnings("ignore:.*missing `_self_`")  # a part is no primary config; only this test makes it one
@pytest.mark.parametrize("name", FILES)
def test_a_file_composes_and_its_keys_fit(name: str) -> None:
    group, _, choice = name.partition("/")
    whole = group == "experiment"  # overrides of a verb's config, nothing by itself
    config = Composer().compose("demo", [f"experiment={choice}"]).config if whole else Composer().compose(name).config
    keys_fit(plain(config))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_says_what_it_is(name: str) -> None:
    assert describe(name), f"conf/{name}.yaml: expected a first line '# what it is', for brachium list"


def test_the_check_can_fail() -> None:
    with pytest.raises(ConfigError, match=r"has no 'EmbodimentSpek'\. Did you mean 'EmbodimentSpec'"):
        keys_fit({"_target_": "brachium.spec.EmbodimentSpek"})
    with pytest.raises(AssertionError, match="takes no argument"):
        keys_fit({"_target_": "brachium.spec.FeatureSpec", "name": "x", "shap": [3]})
    with pytest.raises(ConfigError, match="dtype: expected a text, got 3"):
        keys_fit({"head": {"_target_": "brachium.spec.FeatureSpec", "name": "x", "dtype": 3}})


def test_arguments_may_be_missing_only_where_code_adds_them() -> None:
    part = {"_target_": "brachium.spec.FeatureSpec", "name": "x"}
    with pytest.raises(ConfigError, match="needs shape"):
        check_tree({"head": part}, "train")
    check_tree({"head": {**part, "_partial_": True}}, "train")
    check_tree({"_target_": "builtins.dict", "_recursive_": False, "head": part}, "train")


@pytest.mark.parametrize(
    ("value", "expected", "good"),
    [
        (3, int, True),
        (True, int, False),
        ("3", int, False),
        (3, float, True),
        (None, int | None, True),
        (None, int, False),
        ([1, 2], tuple[int, ...], True),
        ([1, "a"], list[int], False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ("a/b", Path, True),
        ({"_target_": "x"}, int, False),
        ({"_target_": "x"}, DictConfig, True),
        ({"a": 1}, dict[str, int], True),
        (3, dict[str, int], False),
    ],
)
def test_fits(value: Any, expected: Any, good: bool) -> None:
    assert fits(value, expected) is good
