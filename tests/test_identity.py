"""What parts are made of: the same in another process, another where anything counts."""

import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.cli.compose import load
from brachium.identity import described, digest


@dataclass
class Point:
    x: float
    y: tuple[int, ...] = ()


class Thing:
    def __init__(self, size, hidden=0):
        self.size, self._hidden = size, hidden


def make(*, size, parts=()):
    return size, parts


def test_equal_parts_are_equal_and_other_parts_are_not():
    base = partial(make, size=3, parts=[Thing(2), Point(1.0, (1, 2))])
    assert digest(base) == digest(partial(make, size=3, parts=[Thing(2, hidden=9), Point(1.0, (1, 2))]))
    others = [
        partial(make, size=4, parts=[Thing(2), Point(1.0, (1, 2))]),
        partial(make, size=3, parts=[Thing(3), Point(1.0, (1, 2))]),
        partial(make, size=3, parts=[Thing(2), Point(1.0, (1, 3))]),
        partial(make, size=3, parts=[Thing(2)]),
        partial(digest, size=3),
    ]
    assert len({digest(each) for each in (base, *others)}) == len(others) + 1
    assert digest(np.arange(3)) == digest([0, 1, 2]) != digest([0, 1, 3])


def test_a_ring_of_objects_ends():
    one, other = Thing(1), Thing(2)
    one.size, other.size = other, one
    assert described(one)


nested = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(nested)
def test_plain_data_is_described_as_it_is(value):
    assert described(value) == value


def test_factories_from_configs_are_the_same_in_every_process():
    names = ("env/tabletop/place", "env/metaworld", "env/fetch")
    mine = [digest(load(name)) for name in names]
    assert len(set(mine)) == len(names)
    code = f"""
from brachium.cli.compose import load
from brachium.identity import digest
print(*[digest(load(name)) for name in {names!r}])"""
    for seed in ("1", "2"):
        said = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": "", "HOME": str(Path.home())},
        ).stdout
        assert said.split() == mine
