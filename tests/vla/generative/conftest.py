"""Shared parts of the tests of generated subgoals."""

import pytest
from sliding_squares import record

from brachium.vla.generative.reading import Reader


@pytest.fixture(scope="session")
def reader():
    return Reader.load("nano")


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    return record(tmp_path_factory.mktemp("slides") / "store")
