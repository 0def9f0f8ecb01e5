"""The README does what it says: commands compose, Python runs or compiles, links lead somewhere, a command comes early.

A comment on the line before a block decides: ``<!-- test: skip -->`` leaves the block out, ``<!-- test: run -->``
runs a Python block, which is otherwise compiled and has its brachium imports resolved.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from brachium.__main__ import VERBS, config_of, main, with_names
from brachium.cli.compose import Composer
from brachium.cli.run import plan, read_overrides
from brachium.errors import BrachiumError

FIRST_COMMAND_BY_LINE = 25
# Words of a shell line that stand before the command itself.
WRAPPERS = {"sudo", "time", "$", "uv", "run", "python", "-m"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line it starts at, its text, and what its marker says."""

    language: str
    line: int
    text: str
    marker: str


def blocks(text: str) -> list[Block]:
    found, lines = [], text.splitlines()
    start, language = -1, ""
    for number, line in enumerate(lines):
        fence = re.match(r"\s*```\s*(\w*)", line)
        if not fence:
            continue
        if start < 0:
            start, language = number, fence[1]
        else:
            before = next((lines[i] for i in range(start - 1, -1, -1) if lines[i].strip()), "")
            marker = re.match(r"\s*<!--\s*test:\s*(\w+)\s*-->", before)
            body = "\n".join(lines[start + 1 : number])
            found.append(Block(language, start + 1, body, marker[1] if marker else ""))
            start = -1
    return found


def commands(text: str) -> list[list[str]]:
    """Shell words of each command of a block that is brachium's or make's."""
    joined = text.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        piece: list[str] = []
        for word in [*words, ";"]:
            if word not in (";", "&&", "||", "|", ">", "2>", "&"):
                piece.append(word)
                continue
            while piece and (piece[0] in WRAPPERS or re.fullmatch(r"[A-Z_]+=.*", piece[0])):
                piece = piece[1:]
            if piece and Path(piece[0]).name in ("brachium", "make"):
                found.append([Path(piece[0]).name, *piece[1:]])
            piece = []
    return found


def complaint(words: list[str], root: Path) -> str:
    """Return what is wrong with a command; empty when it would run."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE)
        wrong = [word for word in words[1:] if "=" not in word and not word.startswith("-") and word not in targets]
        return f"make has no target {wrong}" if wrong else ""
    rest = [word for word in words[1:] if word != "--dry-run"]
    if not rest or rest[0] not in VERBS or "--help" in rest:
        code = main(rest)
        return f"exit code {code}" if code else ""
    try:  # all but the call itself: some verbs look at their stores even when they run dry
        options = with_names(rest[0], rest[1:])
        typed = read_overrides(rest[0], frozenset(), options, [])
        plan(rest[0], config_of(rest[0], options), Composer(typed.search_path), typed.lines)
    except BrachiumError as error:
        return str(error)
    return ""


def check_shell(text: str, root: Path) -> list[str]:
    found = []
    for block in blocks(text):
        if block.language in ("bash", "sh", "shell", "console") and block.marker != "skip":
            for words in commands(block.text):
                if wrong := complaint(words, root):
                    found.append(f"line {block.line}: {' '.join(words)}: {wrong}")
    return found


def check_python(text: str, folder: Path) -> list[str]:
    found = []
    for block in blocks(text):
        if block.language not in ("python", "py") or block.marker == "skip":
            continue
        if block.marker == "run":
            done = subprocess.run([sys.executable, "-c", block.text], cwd=folder, capture_output=True, text=True)
            found += [f"line {block.line}: {done.stderr}"] if done.returncode else []
            continue
        try:
            tree = ast.parse(block.text)
        except SyntaxError as error:
            found.append(f"line {block.line}: {error}")
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "brachium":
                module = importlib.import_module(node.module or "")
                absent = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                found += [f"line {block.line}: {node.module} has no {absent}"] if absent else []
    return found


def check_links(text: str, root: Path) -> list[str]:
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    places = re.findall(r"\]\(([^)\s]+)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    local = [place.partition("#")[0] for place in places if not re.match(r"[a-z]+:|#", place)]
    return [place for place in local if place and not (root / place).exists()]


def first_command(text: str) -> int:
    """Line of the first command; a large number when there is none."""
    shell = [block for block in blocks(text) if block.language in ("bash", "sh", "shell", "console")]
    return min((block.line + 1 for block in shell if commands(block.text)), default=10**6)


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def test_commands_of_the_readme_compose(readme: str, root: Path) -> None:
    assert check_shell(readme, root) == []


def test_python_of_the_readme_works(readme: str, tmp_path: Path) -> None:
    assert check_python(readme, tmp_path) == []


def test_links_of_the_readme_lead_somewhere(readme: str, root: Path) -> None:
    assert check_links(readme, root) == []


def test_the_readme_shows_a_command_early(readme: str) -> None:
    assert first_command(readme) <= FIRST_COMMAND_BY_LINE


@pytest.mark.parametrize(
    "name", ["CONTRIBUTING.md", "docs/benchmarks.md", "docs/deploy.md", "docs/robots.md", "docs/teleop.md"]
)
def test_commands_of_other_pages_compose(name: str, root: Path) -> None:
    text = (root / name).read_text(encoding="utf-8")
    assert check_shell(text, root) == []
    assert check_links(text, (root / name).parent) == []


GOOD = """
# brachium
```bash
git clone somewhere && cd brachium
make setup            # some minutes
brachium list what=stores \\
    outputs=elsewhere
MUJOCO_GL=egl brachium doctor --help | head -3
```
[the list](pyproject.toml), ![a picture](https://example.org/x.gif), <a href="Makefile#demo">make</a>
```python
from brachium.spec import FeatureSpec
```
<!-- test: run -->
```python
from brachium import FeatureSpec
assert FeatureSpec(name="a", shape=(3,)).dim == 3
```
<!-- test: skip -->
```bash
brachium nosuchverb
```
"""


def test_a_good_page_passes(root: Path, tmp_path: Path) -> None:
    assert check_shell(GOOD, root) == []
    assert check_python(GOOD, tmp_path) == []
    assert check_links(GOOD, root) == []
    assert first_command(GOOD) == 4


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("brachium list what", "brachium lsit what"),
        ("outputs=elsewhere", "outptus=elsewhere"),
        ("brachium doctor --help", "brachium doctr --help"),
        ("make setup", "make setpu"),
        ("import FeatureSpec\n```\n<!-- test: run", "import FeatureSpek\n```\n<!-- test: run"),
        ("dim == 3", "dim == 4"),
        ("assert FeatureSpec(", "assert FeatureSpec(("),
        ("pyproject.toml", "pyproject.tml"),
        ("Makefile#demo", "makefile.txt"),
    ],
)
def test_a_bad_page_is_caught(root: Path, tmp_path: Path, good: str, bad: str) -> None:
    assert good in GOOD
    text = GOOD.replace(good, bad, 1)
    assert check_shell(text, root) + check_python(text, tmp_path) + check_links(text, root)
