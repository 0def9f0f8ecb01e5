"""The examples of docs/extend run as they stand there, from a package outside of brachium."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The page about robots is run by tests/real_robot/test_extend_robot.py.
PAGES = sorted(page for page in (ROOT / "docs" / "extend").glob("*.md") if page.stem != "robot")
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.S)
RUN = re.compile(r"<!-- run -->\n```bash\n(.*?)```", re.S)
QUICK = {
    "train": ["optimization.steps=3", "optimization.batch_size=4", "device=cpu"],
    "benchmark": [
        *(f"protocol.{words}" for words in ("demos=2", "episodes=1", "seeds=2", "snapshots=1", "curve_episodes=1")),
        *(f"protocol.optimization.{words}" for words in ("steps=4", "batch_size=4")),
        *("device=cpu", "videos=1", "workers=1", "vector=threads"),
    ],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A small store of the simulated arm."""
    from brachium.__main__ import main

    path = tmp_path_factory.mktemp("extend") / "store"
    assert main(["record", "env=tabletop/reach", "episodes=4", "workers=1", f"out={path}"]) == 0
    return path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_example_runs(page, store, tmp_path, monkeypatch, capsys):
    from brachium.__main__ import main

    text = page.read_text()
    for name, content in FILE.findall(text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        if "conf" in path.parts:
            (tmp_path / Path(name).parts[0] / "conf" / "__init__.py").touch()
            (tmp_path / Path(name).parts[0] / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    if (tmp_path / "make_store.py").exists():
        monkeypatch.setattr(sys, "argv", ["make_store.py", str(tmp_path / "scara")])
        runpy.run_path(str(tmp_path / "make_store.py"), run_name="__main__")
    commands = [line for block in RUN.findall(text) for line in block.splitlines() if line]
    assert commands
    for command in commands:
        words = shlex.split(command.replace("STORE", str(store)).replace("SCARA", str(tmp_path / "scara")))
        words = [word.replace("OUT", str(tmp_path / "out")) for word in words]
        quick = QUICK.get(words[1], [])
        capsys.readouterr()
        assert words[0] == "brachium"
        assert main([*words[1:], *quick]) == 0
        said = "".join(capsys.readouterr())
        told = {"train": "saved and verified", "eval": "ended too early", "benchmark": "Over training"}
        assert told.get(words[1], "golden batches within") in said
