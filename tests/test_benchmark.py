"""The verb ``brachium benchmark``: from nothing to a report, once more with nothing left, and what experts fail."""

import json
from functools import partial

import numpy as np
import pytest
from external_helpers import failing

from brachium.__main__ import main
from brachium.benchmark import Protocol, Published, ranking
from brachium.datasets.store import EpisodeStore
from brachium.envs.external.fetch import FetchEnv
from brachium.envs.record import RecordingOptions, recorded_seeds
from brachium.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = [
    "benchmark",
    "fetch_pick_and_place",
    "protocol.suite.pick_and_place.cameras.front=32",
    "protocol.suite.pick_and_place.cameras.side=32",
    "protocol.model.backbone.image_size=32",
    "protocol.model.backbone.channels=[8,8,8]",
    "protocol.model.head.width=32",
    "protocol.demos=6",
    "protocol.episodes=2",
    "protocol.seeds=2",
    "protocol.snapshots=1",
    "protocol.curve_episodes=1",
    "protocol.optimization.steps=6",
    "protocol.optimization.batch_size=8",
    "protocol.executor.execute_horizon=8",
    "vector=threads",
    "device=cpu",
    "workers=1",
    "videos=1",
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "reach"
    assert main([*QUICK, f"out={out}"]) == 0
    return out


def test_a_run_leaves_a_result_and_a_report(done):
    result = json.loads((done / "result.json").read_text())
    assert result["episodes"] == 4
    assert len(result["seeds"]) == 2
    assert result["demos"] == 6
    (run,) = done.glob("run-0-*")
    rows = [json.loads(line) for line in (run / "eval" / "episodes.jsonl").read_text().splitlines()]
    wins = [[row["success"] for row in sorted(rows, key=lambda r: r["seed"])][k : k + 2] for k in (0, 2)]
    assert result["seeds"] == [100 * float(np.mean(each)) for each in wins]
    assert [point["step"] for point in result["curve"]] == [3, 6]
    assert result["curve"][0]["seconds"] <= result["curve"][1]["seconds"]
    curve = [json.loads(line) for line in next((run / "curve").glob("*/episodes.jsonl")).open()]
    assert not {row["seed"] for row in curve} & {row["seed"] for row in rows}  # shown on other episodes than the result
    report = (done / "report.html").read_text()
    for words in ("Beside published figures", "Success over training", "video/mp4", " cores", "evaluation seed"):
        assert words in report
    assert "50 steps, success if the cube" in report


def test_a_second_run_finds_everything_done(done, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("model.safetensors")}
    assert len(before) == 2
    assert main([*QUICK, f"out={done}"]) == 0
    said = "".join(capsys.readouterr())
    assert "has all 6 demonstrations of pick_and_place already" in said
    assert "trained already on this data" in said
    assert "all 4 episodes are there already" in said
    assert before == {path: path.stat().st_mtime_ns for path in done.rglob("model.safetensors")}


def test_other_settings_are_counted_apart_and_nothing_is_lost(done):
    (run,) = done.glob("run-0-*")
    (run / "snapshots" / "0000004.partial").mkdir()  # what a kill leaves
    assert main([*QUICK, f"out={done}", "protocol.episodes=1", "protocol.seed=1000050"]) == 0
    result = json.loads((done / "result.json").read_text())
    assert result["episodes"] == 2
    assert len((run / "eval" / "episodes.jsonl").read_text().splitlines()) == 6  # the earlier ones are still there
    assert main([*QUICK, f"out={done}", "protocol.optimization.log_every=1", "protocol.snapshots=0"]) == 0
    assert [path.name for path in done.glob("run-0-*")] == [run.name]  # nothing of this changes the weights
    assert json.loads((done / "result.json").read_text())["episodes"] == 4


def test_seeds_that_the_expert_fails_are_replaced(tmp_path, monkeypatch):
    from brachium import benchmark

    monkeypatch.setattr(benchmark, "make_source", partial(failing, bad={0, 2, 6}))
    protocol = make_protocol(demos=5)
    assert benchmark._record(protocol.suite["reach"], tmp_path / "store", protocol, workers=1)
    store = EpisodeStore.open(tmp_path / "store")
    assert recorded_seeds(store, "reach") == {1, 3, 4, 5, 7}
    assert not benchmark._record(protocol.suite["reach"], tmp_path / "store", protocol, workers=1)


def test_an_expert_that_never_succeeds_is_given_up(tmp_path, monkeypatch):
    from brachium import benchmark

    monkeypatch.setattr(benchmark, "make_source", partial(failing, bad=set(range(999))))
    monkeypatch.setattr(benchmark, "TRIES", 2)
    protocol = make_protocol(demos=1)
    with pytest.raises(ConfigError, match=r"succeeded in 0 of 2 episodes\. Type: protocol.recording.noise=0"):
        benchmark._record(protocol.suite["reach"], tmp_path / "store", protocol, workers=1)


def make_protocol(**options):
    from brachium.vla.loop import Optimization
    from brachium.vla.recipe import Recipe

    return Protocol(
        title="Reach",
        rules="",
        suite={"reach": partial(FetchEnv, task="reach", cameras={"front": 16})},
        model=Recipe(backbone={"_target_": "x"}, head={"_target_": "y"}),
        optimization=Optimization(),
        executor=None,
        recording=RecordingOptions(noise=0.0, stumble=0.0, drop=0.0),
        **options,
    )


def test_ours_stands_among_the_published_in_order():
    result = {
        "head": "FlowHead",
        "parameters": 3_000_000,
        "success_rate": 0.7,
        "ci95": [0.6, 0.8],
        "seconds": {"train": 60.0},
        "hardware": "2 cores",
        "demos": 50,
        "seeds": [70.0],
        "published": [
            vars(Published(name="a", success=80.0, source="x")),
            vars(Published(name="b", success=9.0, source="y")),
        ],
    }
    rows = ranking(result)
    assert [row["ours"] for row in rows] == [False, True, False]
    assert rows[1]["ci95"] == [60.0, 80.0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["benchmark", "metaworld_mt11"], "metaworld_mt10"),
        (["benchmark", "metaworld_mt10", "protocol.suite.tasks=reech"], "Did you mean 'reach'"),
        (["benchmark", "metaworld_mt10", "protocol.demos=0"], "expected at least 1"),
        (["benchmark", "metaworld_mt10", "protocol.demoes=3"], "demos"),
    ],
)
def test_mistakes_are_one_line_that_helps(words, said, capsys, tmp_path):
    assert main([*words, f"out={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_a_checkpoint_of_another_embodiment_is_refused(done, capsys, tmp_path):
    (checkpoint,) = done.glob("run-0-*/checkpoint")
    words = ["eval", f"checkpoint={checkpoint}", "env=pusht", f"out={tmp_path}"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "do not fit" in told
    assert "Traceback" not in told
