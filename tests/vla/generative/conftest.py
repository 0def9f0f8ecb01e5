"""Shared parts of the tests of generated subgoals."""

import pytest
from brachium.vla.generative.reading import Reader
from sliding_squares import record


@pytest.fixture(scope="session")
def reader():
    return Reader.load("nano")


@pytest.fixture(scope="session")
def slides(tmp_path_factory):
    return record(tmp_path_factory.mktemp("slides") / "store")
