"""Success in closed loop while training goes on; trackers that are told what is logged, real ones without a net."""

import json
import sqlite3
from functools import partial
from pathlib import Path

import pytest

from brachium.errors import ConfigError
from brachium.policies.report_data import Run
from brachium.policies.report_plots import training_plots
from brachium.vla import trackers
from brachium.vla.optim import Optimization
from brachium.vla.trackers import Trackers, check_trackers

from .test_train import run


class Env:
    """Of the demonstrations' embodiment."""

    def __init__(self, spec):
        self.spec_embodiment = spec

    def close(self):
        pass


def rows_of(out):
    return [json.loads(line) for line in (out / "log-act.jsonl").read_text().splitlines()]


def test_rollouts_on_the_way_are_logged_and_drawn_and_change_nothing(tmp_path, demos):
    called = []

    def evaluator(checkpoint, env, out, videos=4, report=True):
        called.append((checkpoint, videos, report))
        rate = 0.2 * len(called)
        Path(out).mkdir(parents=True)
        total = {"success_rate": rate, "ci95": [rate - 0.1, rate + 0.1]}
        (Path(out) / "summary.json").write_text(json.dumps({"total": total}))

    options = Optimization(steps=7, batch_size=4, warmup=1, log_every=1, save_every=100)
    out = tmp_path / "out"
    run(demos, out, optimization=options, env=partial(Env, demos.embodiment), evaluator=evaluator, rollout_every=2)
    run(demos, tmp_path / "plain", optimization=options)
    assert [(path.rsplit("/", 1)[-1], videos, report) for path, videos, report in called] == [
        ("0000002", 0, False),
        ("0000004", 0, False),
        ("0000006", 0, False),
        ("checkpoint", 4, True),
    ]
    found = [row for row in rows_of(out) if "eval/success_rate" in row]
    assert [row["step"] for row in found] == [2, 4, 6]
    assert [row["eval/success_rate"] for row in found] == pytest.approx([0.2, 0.4, 0.6])
    assert 0 < found[0]["eval/trained_s"] <= found[1]["eval/trained_s"] <= found[2]["eval/trained_s"]
    losses = [[row["loss"] for row in rows_of(place) if "loss" in row] for place in (out, tmp_path / "plain")]
    assert losses[0] == losses[1]
    drawn = {title: svg for title, svg, _ in training_plots(Run(summary={}, logs={"act": rows_of(out)}))}
    assert drawn["Success over training"].startswith("<svg")


def test_rollouts_need_somewhere_to_go(tmp_path, demos):
    with pytest.raises(ConfigError, match="expected env="):
        run(demos, tmp_path / "out", rollout_every=2)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def test_both_trackers_are_told_and_go_on_in_the_same_run(offline, tmp_path, demos, monkeypatch):
    out = tmp_path / "out"
    options = Optimization(steps=4, batch_size=4, warmup=1, log_every=2, save_every=2)
    run(demos, out, optimization=options, track=["wandb", "trackio"])
    assert len(list((out / "wandb").glob("offline-run-*/*.wandb"))) == 1
    name = json.loads((out / "tracked.json").read_text())["act"]
    assert name in next(iter((out / "wandb").glob("offline-run-*"))).name
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as opened:
        rows = opened.execute("select step, metrics from metrics order by step").fetchall()
    told = {}
    for step, values in rows:
        told.setdefault(step, {}).update(json.loads(values))
    logged = {row["step"]: row for row in rows_of(out) if "loss" in row}
    assert set(logged) == {2, 4}
    for step, row in logged.items():
        assert told[step]["loss"] == pytest.approx(row["loss"])
    assert Trackers((), out, "act", {}, resumed=True).run_id == name
    assert Trackers((), out, "ground", {}, resumed=True).run_id != name
    assert Trackers((), out, "act", {}).run_id != name  # begun anew


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path, demos, monkeypatch, capfd):
    class Broken:
        def log(self, values, step):
            raise OSError("no route to host")

    monkeypatch.setitem(trackers.START, "trackio", lambda run: Broken())
    monkeypatch.setitem(trackers.START, "wandb", lambda run: 1 / 0)
    options = Optimization(steps=4, batch_size=4, warmup=1, log_every=1, save_every=100)
    run(demos, tmp_path / "out", optimization=options, track=["wandb", "trackio"])
    told = capfd.readouterr().err
    assert told.count("trackio failed and is left out from here on: OSError: no route to host") == 1
    assert told.count("wandb failed and is left out from here on: ZeroDivisionError") == 1
    assert (tmp_path / "out" / "checkpoint").is_dir()


def test_trackers_that_are_not_there_are_said_before_anything_runs(tmp_path, demos, monkeypatch):
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        run(demos, tmp_path / "out", track=["wandbb"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"uv pip install 'brachium\[tracking\]'"):
        check_trackers(["trackio"])
