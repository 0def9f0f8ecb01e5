"""The whole way, tiny: record, inspect, train, evaluate, report; killed on the way, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from brachium.__main__ import main
from brachium.demo import StageClock

EPISODES = 4
SMALL = [
    "tables=80",
    "demos=6",
    f"episodes={EPISODES}",
    "workers=1",
    "num_envs=3",
    "videos=1",
    "grounding.heldout=20",
    "grounding.optimization.steps=4",
    "grounding.optimization.batch_size=4",
    "optimization.steps=20",
    "optimization.batch_size=16",
    "executor.execute_horizon=3",
]
ENVIRONMENT = {**os.environ, "MUJOCO_GL": "egl"}


def command(out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "brachium", "demo", f"out={out}", *SMALL, *words]


def run(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *words), capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


class Killed(NamedTuple):
    """A demo that was killed in its evaluation, and typed again."""

    out: Path
    finished: list[str]
    weights: bytes
    took: dict[str, float]
    again: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    out = tmp_path_factory.mktemp("killed") / "demo"
    process = subprocess.Popen(
        command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=ENVIRONMENT
    )
    log = out / "flow-0" / "eval" / "episodes.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = log.read_text().splitlines()[:3]
    weights = (out / "flow-0" / "checkpoint" / "model.safetensors").read_bytes()
    return Killed(out, finished, weights, json.loads((out / "seconds.json").read_text()), run(out))


def rows_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_demo_writes_its_result_reuses_everything_and_survives_kills(killed: Killed, tmp_path: Path) -> None:
    out, again = killed.out, killed.again
    log = out / "flow-0" / "eval" / "episodes.jsonl"
    assert len(killed.finished) == 3
    assert again.returncode == 0, again.stderr[-3000:]
    assert "nothing to record" in again.stderr
    assert "trained already" in again.stderr
    assert "going on after" in again.stderr
    assert log.read_text().splitlines()[:3] == killed.finished
    assert (out / "flow-0" / "checkpoint" / "model.safetensors").read_bytes() == killed.weights

    result = json.loads((out / "result.json").read_text())
    assert result["episodes"] == 3 * EPISODES
    assert set(result["tasks"]) == {"reach", "push", "place"}
    for part in (result, *result["tasks"].values()):
        assert part["success_rate"] == pytest.approx(part["success"] / part["episodes"])
        assert 0 <= part["ci95"][0] <= part["success_rate"] <= part["ci95"][1] <= 1
    rows = rows_of(log)
    assert result["success"] == sum(row["success"] for row in rows)
    assert len({(row["task"], row["seed"]) for row in rows}) == 3 * EPISODES
    seconds = result["seconds"]
    now = json.loads((out / "seconds.json").read_text())
    assert {k: now[k] for k in killed.took} == killed.took  # what was found done takes no time again
    example = Path(__file__).parent.parent / "examples" / "closed_loop.py"
    words = [sys.executable, str(example), str(out / "flow-0" / "checkpoint"), str(tmp_path / "episode.mp4")]
    said = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "steps\nvideo: " in said
    assert (tmp_path / "episode.mp4").stat().st_size > 1000
    assert seconds["total"] == pytest.approx(seconds["record"] + seconds["train"] + seconds["eval"], abs=0.2)
    assert result["demos"] >= 15
    assert result["head"] == "FlowHead"
    assert (out / "report.html").stat().st_size > 10_000
    assert "brachium eval" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("count", [8])
def test_evaluation_does_not_depend_on_the_number_of_envs(killed: Killed, count: int, tmp_path: Path) -> None:
    """The demo evaluated with three at once, and was killed on the way."""
    words = [f"checkpoint={killed.out / 'flow-0' / 'checkpoint'}", f"out={tmp_path}", f"num_envs={count}"]
    words.append("executor.execute_horizon=3")
    assert (
        main(["eval", *words, f"episodes={EPISODES}", "videos=0", "report=false", "~suite.reach", "~suite.push"]) == 0
    )
    key = ("task", "seed", "success", "steps", "actions", "instruction")
    first = {(row["task"], row["seed"]): row for row in rows_of(killed.out / "flow-0" / "eval" / "episodes.jsonl")}
    rows = rows_of(tmp_path / "episodes.jsonl")
    assert len(rows) == EPISODES
    for row in rows:
        assert {k: row[k] for k in key} == {k: first[row["task"], row["seed"]][k] for k in key}


@pytest.mark.slow
def test_rounds_of_corrections_are_recorded_trained_on_and_reused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    words = ["experiment=realtime", "~suite.push", "~suite.place", "corrections.rounds=1", "corrections.episodes=2"]
    words += ["corrections.steps=5", "videos=0", "episodes=1", "optimization.batch_size=16"]
    assert main(["demo", f"out={out}", *SMALL, *words]) == 0
    capsys.readouterr()
    meta = json.loads((out / "flow-0" / "checkpoint" / "meta.json").read_text())
    assert meta["init"] == str(out / "rounds" / "flow-0-0" / "checkpoint")
    result = json.loads((out / "result.json").read_text())
    assert 0 < result["corrections"] <= 2
    assert result["embodiment"] == "arm6_pose"
    assert set(result["seconds"]) == {"record", "train", "correct", "eval", "total"}
    weights = (out / "flow-0" / "checkpoint" / "model.safetensors").read_bytes()
    assert main(["demo", f"out={out}", *SMALL, *words]) == 0
    said = capsys.readouterr().err
    assert "has the corrections of this policy already" in said
    assert said.count("trained already on this data") == 2
    assert json.loads((out / "result.json").read_text())["seconds"] == result["seconds"]
    assert (out / "flow-0" / "checkpoint" / "model.safetensors").read_bytes() == weights


def test_a_missing_encoder_is_refused_before_anything_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", f"out={tmp_path / 'demo'}", *SMALL, f"encoder={tmp_path / 'nowhere'}"]) == 2
    assert "no pretrained model at" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_run_begun_anew_forgets_what_the_one_before_took(tmp_path: Path) -> None:
    clock = StageClock(tmp_path / "seconds.json")
    for run in (None, tmp_path / "flow-0", tmp_path / "flow-1"):
        with clock.stage("train", run):
            pass
    clock.forget(tmp_path / "flow-0")
    with clock.stage("eval", tmp_path / "flow-0"):
        pass
    assert set(json.loads(clock.path.read_text())) == {"train", "flow-1/train", "flow-0/eval"}
