"""The `brachium` command: help, plans, sweeps, exit codes, and one clear sentence for each kind of bad input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from brachium.__main__ import VERBS, main
from brachium.console import Progress, human_bytes, human_time, progress, require_disk
from brachium.errors import DiskSpaceError

MODULE = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True, kw_only=True)
class Head:
    """A head.

    Attributes:
        depth: Number of layers.
        kind: Which sort.
    """
    depth: int = 2
    kind: Literal["flow", "token"] = "flow"

class Model:
    """A model."""
    def __init__(self, *, width: int = 8, head: Head | None = None) -> None:
        if width < 1:
            raise ValueError("width is not positive")
        self.width, self.head = width, head

def train(*, store: str, model: Model, steps: int = 3, lr: float = 1e-3, tags: tuple[str, ...] = (),
          schedule: dict[str, int], fail: str | None = None) -> int | None:
    """Train a small thing.

    Not shown.

    Args:
        store: Path of the episode
            store.
        steps: Number of optimiser steps.
    """
    from brachium.errors import StoreError
    if fail == "user":
        raise StoreError("store is empty. Type: brachium record")
    if fail == "bug":
        raise RuntimeError("a bug")
    if fail == "stop":
        raise KeyboardInterrupt
    print("trained", steps, type(lr).__name__, store, type(tags).__name__, model.head)
    return 3 if fail == "code" else None
'''
FILES = {
    "train.yaml": """
        defaults: [{model: tiny}, {model/head: flow}, {rate@schedule: fast}, _self_]
        _target_: fakeparts.train
        store: ???
        steps: 3
        lr: 0.001
        tags: []
        fail: null
        """,
    "rate/fast.yaml": "# Fast\n_target_: builtins.dict\nhz: 10",
    "rate/slow.yaml": "# Slow\n_target_: builtins.dict\nhz: 1",
    "doctor.yaml": "_target_: brachium.doctor.check",
    "model/tiny.yaml": "# A tiny model\n_target_: fakeparts.Model\nwidth: 8",
    "model/large/wide.yaml": "# A wide model\n_target_: fakeparts.Model\nwidth: 64",
    "model/head/flow.yaml": "# Flow\n_target_: fakeparts.Head\ndepth: 2\nkind: flow",
    "model/head/token.yaml": "# Tokens\n_target_: fakeparts.Head\ndepth: 4\nkind: token",
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def fake_conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package with a model, two heads and a `train` verb, in place of brachium.conf."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "fakeparts.py").write_text(MODULE)
    for name, text in FILES.items():
        path = folder / "fakeconf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (folder / "fakeconf" / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr("brachium.cli.compose.CONF_MODULE", "fakeconf")
        yield folder / "fakeconf"


@pytest.fixture
def brachium(fake_conf: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process; gives exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], ["Did you mean 'train'?", "brachium --help"]),
        (["train"], ["store: Path of the episode store.", "Type: brachium train store=VALUE"]),
        (["train", "store=x", "model/head=flwo"], ["no option 'flwo'. Did you mean 'flow'?"]),
        (["train", "store=x", "model=large/wiide"], ["Did you mean 'large/wide'?", "Choices: large/wide, tiny."]),
        (["train", "store=x", "rate=slow"], ["picks rate in another place", "brachium train rate@schedule=slow"]),
        (["train", "store=x", "rate@schedule=slw"], ["rate has no option 'slw'. Did you mean 'slow'?"]),
        (["train", "store=x", "model/hed=flow"], ["no option or group 'model/hed'", "model/head=flow"]),
        (["train", "store=x", "trian.steps=3"], ["no option or group 'trian.steps'", "Did you mean steps=3"]),
        (["train", "store=x", "stpes=3"], ["Did you mean steps=3"]),
        (["train", "store=x", "depth=3"], ["Did you mean model.head.depth=3"]),
        (["train", "store=x", "model.head.dpeth=3"], ["Did you mean model.head.depth=3"]),
        (["train", "store=x", "+model.head.deep=3"], ["takes no argument 'deep'", "depth"]),
        (["train", "store=x", "steps=many"], ["steps: expected an integer, got 'many'"]),
        (["train", "store=x", "steps=true"], ["steps: expected an integer, got True"]),
        (["train", "store=x", "steps=1e4"], ["got 10000.0", "Type: brachium train steps=10000"]),
        (["train", "store=12"], ["store: expected a text, got 12", "store='12'"]),
        (["train", "store=x", "tags=a"], ["tags: expected a list of text"]),
        (["train", "store=x", "model.head.kind=flwo"], ["expected one of flow, token", "Did you mean 'flow'?"]),
        (["train", "store=x", "tags=[a,b"], ["tags=[a,b: expected key=value", "Quote values"]),
        (["train", "outputs/reach"], ["outputs/reach: expected key=value", "brachium train KEY=outputs/reach"]),
        (["train", "store=x", "steps=1,2"], ["one value expected, got several", "--multirun"]),
        (["train", "store=x", "-m", "steps=interval(1,2)"], ["got an interval"]),
        (["train", "--steps=3"], ["without dashes", "brachium train steps=3"]),
        (["train", "--dryrun"], ["Did you mean '--dry-run'?"]),
        (["train", "--config-dir", "/no/such/folder"], ["--config-dir: expected a folder"]),
        (["train", "hydra.searchpath=here"], ["expected a list of places"]),
        (["train", "store=x", "hydra.searchpath=[pkg://no.such.conf]"], ["no package 'no.such.conf'"]),
        (["train", "store=x", "hydra.searchpath=[file:///no/such]"], ["no folder '/no/such'"]),
        (["train", "store=x", "model=null"], ["expected model=OPTION, got null", "'~model'"]),
        (["train", "store=x", "~nothing"], ["~nothing"]),
        (["train", "store=x", "+steps=3"], ["+steps=3"]),
        (["train", "store=x", "store=${nope}"], ["'nope' not found"]),
        (["train", "store=x", "model._target_=fakeparts.Modl"], ["fakeparts has no 'Modl'. Did you mean 'Model'?"]),
        (["train", "store=x", "fail=user"], ["store is empty. Type: brachium record"]),
        (["completion", "tcsh"], ["expected a shell, got 'tcsh'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_explained(brachium: Run, words: list[str], said: list[str]) -> None:
    code, out, err = brachium(*words)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    for text in said:
        assert text in err
    assert len(err.splitlines()) <= 6


def test_the_function_gets_plain_typed_values(brachium: Run) -> None:
    assert brachium("train", "store=x", "lr=1", "tags=[a,b]") == (
        0,
        "trained 3 int x list Head(depth=2, kind='flow')\n",
        "",
    )


def test_a_key_may_come_before_its_group(brachium: Run) -> None:
    code, out, _ = brachium("train", "store=x", "model.head.depth=9", "model/head=token")
    assert code == 0
    assert "Head(depth=9, kind='token')" in out


def test_exit_codes(brachium: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert brachium("train", "store=x", "fail=code")[0] == 3
    assert brachium("train", "store=x", "fail=stop")[::2] == (130, "interrupted\n")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "store=x", "fail=bug"])
    with pytest.raises(ValueError, match="width is not positive"):  # while a part is built, not only inside the verb
        main(["train", "store=x", "model.width=0"])
    monkeypatch.setenv("BRACHIUM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="flwo"):
        main(["train", "store=x", "model/head=flwo"])


def test_dry_run_prints_the_plan_and_runs_nothing(brachium: Run) -> None:
    code, out, err = brachium("train", "store=x", "fail=bug", "--dry-run", "model/head=token")
    assert (code, err) == (0, "")
    assert out.startswith("# fakeparts.train\n")
    assert "    depth: 4\n" in out
    assert "trained" not in out


def test_help_lists_options_groups_and_examples(brachium: Run) -> None:
    code, out, _ = brachium("train", "--help", "steps=7")
    assert code == 0
    for text in (
        "brachium train: Train a small thing.\n",
        "steps=7",
        "Number of optimiser steps.",
        "store=???",
        "model.head.depth=2",
        "Number of layers.",
        "choices: flow, token",
        "choices: tiny, large/wide",
        "rate@schedule=fast",
    ):
        assert text in out
    shown = [line.strip() for line in out.partition("examples\n")[2].splitlines() if line.strip()]
    assert len(shown) == 3
    for example in shown:
        assert main([*example.replace("VALUE", "x").split()[1:], "--dry-run"]) == 0


def test_multirun_sweeps_in_order_and_goes_on_after_a_failure(brachium: Run) -> None:
    code, out, err = brachium("train", "store=x", "-m", "steps=1,2", "model/head=flow,token")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("trained")] == ["1", "1", "2", "2"]
    assert "steps=2 model/head=token  ok" in out
    assert "[4/4]" in err
    code, out, err = brachium("train", "store=x", "-m", "steps=range(1,3)", "fail=null,user")
    assert code == 2
    assert out.count("trained") == 2
    assert out.count("exit 2") == 2


def test_multirun_checks_every_job_before_the_first_runs(brachium: Run) -> None:
    code, out, err = brachium("train", "store=x", "-m", "steps=1,two")
    assert (code, out) == (2, "")
    assert "got 'two'" in err


def test_third_parties_bring_parts(brachium: Run, tmp_path: Path) -> None:
    extra = tmp_path / "model" / "head" / "mine.yaml"
    extra.parent.mkdir(parents=True)
    extra.write_text("# Mine\n_target_: fakeparts.Head\ndepth: 77")
    for place in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"]):
        code, out, _ = brachium("train", "store=x", "model/head=mine", *place)
        assert code == 0
        assert "depth=77" in out


def test_what_to_type_for_an_option(fake_conf: Path) -> None:
    from brachium.cli.compose import Composer

    composer = Composer()
    assert composer.groups() == ["model", "model/head", "model/large", "rate"]
    assert [composer.pick(group, "NAME") for group in composer.groups()] == [
        "model=NAME",
        "model/head=NAME",
        "model=large/NAME",
        "rate=NAME",
    ]


def test_list_shows_third_party_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = tmp_path / "gripper" / "mine.yaml"
    extra.parent.mkdir()
    extra.write_text("# A gripper of mine\na: 1")
    words = [sys.executable, "-m", "brachium", "list", "what=grippers", "--config-dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gripper=NAME" in done.stdout
    assert "mine  A gripper of mine" in done.stdout


def test_list_knows_a_store_and_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from brachium import catalog

    (tmp_path / "reach").mkdir()
    (tmp_path / "reach" / "zarr.json").write_text('{"attributes": {"format": "x"}}')
    (tmp_path / "run" / "last").mkdir(parents=True)
    (tmp_path / "run" / "last" / "model.safetensors").write_bytes(b"0" * 2_000_000)
    assert catalog.show(what="stores", outputs=str(tmp_path)) == 0
    assert catalog.show(what="checkpoints", outputs=str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'reach'}" in out
    assert "2.0 MB of weights" in out


# -- start-up -----------------------------------------------------------------------------------------------------


HEAVY = ("torch", "hydra", "omegaconf", "mujoco", "zarr", "numpy", "rich", "gymnasium", "transformers")


@pytest.mark.parametrize("code", ["import brachium", "from brachium.__main__ import main; main(['--help'])"])
def test_nothing_heavy_is_imported_at_the_start(code: str) -> None:
    probe = f"{code}\nimport sys\nprint('HEAVY', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_the_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("brachium")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("brachium 0.")
    done = subprocess.run([command, "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("brachium: expected a verb")


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)


@pytest.mark.skipif(sys.platform != "linux", reason="EGL is Linux's")
def test_a_machine_without_a_display_renders_with_egl(monkeypatch: pytest.MonkeyPatch) -> None:
    from brachium.cli.run import choose_renderer

    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    choose_renderer()
    assert os.environ["MUJOCO_GL"] == "egl"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("DISPLAY", ":0")
    choose_renderer()
    assert "MUJOCO_GL" not in os.environ


# -- completion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "tr",
            {
                "train",
                "train-judge",
                "train-latent",
                "train-lm",
                "train-positions",
                "train-reader",
                "train-video",
                "train-visual",
            },
        ),
        ("train model=", {"model=tiny", "model=large/wide"}),
        ("train model/h", {"model/head="}),
        ("train model/head=", {"model/head=flow", "model/head=token"}),
        ("train model/head=fl", {"model/head=flow"}),
        ("train -m model/head=flow,t", {"model/head=flow,token"}),
        ("train model.head.", {"model.head.depth=", "model.head.kind="}),
        ("train ste", {"steps="}),
        ("train --d", {"--dry-run"}),
        ("train model=nope ste", set()),
        ("nope ", set()),
        ("completion z", {"zsh"}),
    ],
)
def test_completion(brachium: Run, line: str, expected: set[str]) -> None:
    code, out, err = brachium("__complete", line)
    assert (code, err) == (0, "")
    assert set(out.split()) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("line", "words", "expected"),
    [
        ("brachium insp", ["brachium", "insp"], ["inspect "]),
        ("brachium list wha", ["brachium", "list", "wha"], ["what="]),
        ("brachium doctor json=", ["brachium", "doctor", "json", "="], ["false "]),
    ],
)
def test_completion_in_a_real_bash(line: str, words: list[str], expected: list[str]) -> None:
    script = f"""
        eval "$(brachium completion bash)"
        COMP_LINE='{line}' COMP_POINT={len(line)} COMP_CWORD={len(words) - 1}
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)})
        _brachium_complete
        printf '[%s]\\n' "${{COMPREPLY[@]}}"
        complete -p brachium >&2
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert "_brachium_complete" in done.stderr
    assert done.stdout.splitlines() == [f"[{text}]" for text in expected]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_parse(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "__complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


# -- console and doctor -------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_prints_few_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("brachium.console.time.monotonic", lambda: now[0])
    with progress("recording reach", total=40, unit="episodes") as bar:
        for _ in range(40):
            now[0] += 1.0
            bar.update(success=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "recording reach: 5/40 episodes (12 %), 1 episodes/s, ETA 35 s, success 0.5"
    assert lines[-1] == "recording reach: 40/40 episodes (100 %), 1 episodes/s, 40 s, success 0.5, done"
    assert len(lines) == 9


def test_progress_says_when_it_was_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("reading")
    with pytest.raises(ZeroDivisionError), bar:
        bar.update(1 // 0)
    assert capsys.readouterr().err.endswith("stopped\n")


def test_human_numbers() -> None:
    assert [human_time(t) for t in (0.84, 42, 185, 7800, float("inf"))] == [
        "0.8 s",
        "42 s",
        "3 min 05 s",
        "2 h 10 min",
        "unknown",
    ]
    assert [human_bytes(n) for n in (512, 1500, 20e9, 3e12)] == ["512 B", "1.5 kB", "20 GB", "3 TB"]


def test_require_disk(tmp_path: Path) -> None:
    require_disk(tmp_path / "not" / "yet", 1, "a store")
    with pytest.raises(DiskSpaceError, match=r"a store: expected 1e\+06 TB of free disk .*got"):
        require_disk(tmp_path, 1e18, "a store")


@pytest.mark.parametrize(
    ("text", "reason", "advice"),
    [
        ("AttributeError: 'NoneType' object has no attribute 'eglQueryString'", "libEGL is not", "libegl1"),
        ("ImportError: Cannot initialize a EGL device display. This", "no GPU driver", "libgl1-mesa-dri"),
        ("AttributeError: 'NoneType' object has no attribute 'glGetError'", "libOSMesa", "libosmesa6"),
        ("GLFWError: X11: The DISPLAY\nmujoco.FatalError: gladLoadGL error", "no display", "MUJOCO_GL=egl"),
        ("RuntimeError: something else", "RuntimeError: something else", "osmesa"),
    ],
)
def test_render_errors_are_translated(text: str, reason: str, advice: str) -> None:
    from brachium.doctor import explain_render_error

    found = explain_render_error(text)
    assert reason in found[0]
    assert advice in found[1]


def test_doctor_without_rendering(capsys: pytest.CaptureFixture[str]) -> None:
    from brachium import doctor

    assert doctor.check(only="packages") == 0
    assert doctor.check(only="machine", json=True) in (0, 1)
    out = capsys.readouterr().out
    assert "mujoco" in out
    assert '"area": "machine"' in out


def test_doctor_draws() -> None:
    from brachium.doctor import render_with

    passed, found, _ = render_with(os.environ.get("MUJOCO_GL", ""))
    assert passed, found


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        (["train-reader", "stores=[x]", "detials=1"], "train-reader"),
        (["eval", "planner=default", "plannr.x=1"], "eval"),
    ],
)
def test_what_is_told_to_type_names_the_verb_and_not_its_config(words, verb, capsys):
    assert main(words) == 2
    told = capsys.readouterr().err
    assert f"`{verb}` has no option or group" in told
    assert told.rstrip().endswith(f"Type: brachium {verb} --help")
