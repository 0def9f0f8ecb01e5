"""The verb ``brachium benchmark``: from nothing to a report, once more with nothing left, and what experts fail."""

import json
from functools import partial

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from external_helpers import failing
from hydra.utils import instantiate

from brachium.__main__ import main
from brachium.benchmark import Protocol, Published, ranking
from brachium.cli.compose import Composer
from brachium.datasets.store import EpisodeStore
from brachium.envs.external import libero
from brachium.envs.external.aloha import AlohaEnv
from brachium.envs.external.fetch import FetchEnv
from brachium.envs.external.pusht import PushTEnv
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
    assert json.loads((run / "result.json").read_text()) == result
    spent = json.loads((done / "seconds.json").read_text())
    assert result["seconds"]["record"] == round(sum(v for k, v in spent.items() if k.endswith("/record")), 1) > 0


def test_a_second_run_finds_everything_done(done, capsys):
    kept = ("model.safetensors", "*.mp4")
    before = {path: path.stat().st_mtime_ns for name in kept for path in done.rglob(name)}
    assert len(before) == 3
    (note,) = done.glob("run-0-*/trained_on.json")
    trained_on = note.read_text()
    note.write_text('{"hardware": ["a machine of others"]}')  # a report made anew elsewhere does not claim the training
    assert main([*QUICK, f"out={done}"]) == 0
    assert json.loads((done / "result.json").read_text())["hardware"] == "a machine of others"
    note.write_text(trained_on)
    said = "".join(capsys.readouterr())
    assert "has all 6 demonstrations of pick_and_place already" in said
    assert "trained already on this data" in said
    assert "all 4 episodes are there already" in said
    assert before == {path: path.stat().st_mtime_ns for name in kept for path in done.rglob(name)}


def test_other_settings_are_counted_apart_and_nothing_is_lost(done):
    (run,) = done.glob("run-0-*")
    (run / "snapshots" / "0000004.partial").mkdir()  # what a kill leaves
    assert main([*QUICK, f"out={done}", "protocol.episodes=1", "protocol.seed=3000050"]) == 0
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
    from brachium.vla.optim import Optimization
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


RESULT = {
    "head": "FlowHead",
    "parameters": 3_000_000,
    "success_rate": 0.7,
    "ci95": [0.6, 0.8],
    "seconds": {"train": 60.0},
    "hardware": "2 cores",
    "demos": 50,
    "seeds": [70.0],
}


def test_ours_stands_among_the_published_in_order():
    published = [Published(name="a", success=80.0, source="x"), Published(name="b", success=9.0, source="y")]
    result = RESULT | {"published": [vars(each) for each in published]}
    rows = ranking(result)
    assert [row["ours"] for row in rows] == [False, True, False]
    assert rows[1]["ci95"] == [60.0, 80.0]


def test_means_over_groups_stand_apart_from_rates_over_episodes():
    made = [
        {"name": "a", "success": 65.0, "source": "x", "note": "", "over": "episodes"},
        {"name": "b", "success": 60.0, "source": "y", "note": "", "over": "groups"},
    ]
    result = RESULT | {"groups": {"success_rate": 0.55, "ci95": [0.45, 0.65]}, "published": made}
    rows = ranking(result)
    assert [(row["over"], row["success"], row["ours"]) for row in rows] == [
        ("groups", 60.0, False),
        ("groups", pytest.approx(55.0), True),
        ("episodes", 70.0, True),
        ("episodes", 65.0, False),
    ]
    assert "rate over groups of tasks" in rows[1]["name"]
    assert rows[1]["ci95"] == pytest.approx([45.0, 65.0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["benchmark", "metaworld_mt11"], "metaworld_mt10"),
        (["benchmark", "metaworld_mt10", "protocol.suite.tasks=reech"], "Did you mean 'reach'"),
        (["benchmark", "metaworld_mt10", "protocol.demos=0"], "expected at least 1"),
        (["benchmark", "metaworld_mt10", "protocol.demoes=3"], "demos"),
        (["benchmark", "metaworld_mt1"], "protocol.suite.tasks=VALUE"),
        (["benchmark", "pusht"], "Type: brachium benchmark protocol=pusht out="),
        (["benchmark", "metaworld_mt50", "protocol.suite.tasks=reach"], "type: ~protocol.groups"),
        (["benchmark", "fetch_pick_and_place", "protocol.seed=5"], "demonstrations have seeds below"),
        (["benchmark", "fetch_pick_and_place", "protocol.seed=4999950"], "episodes of the curve above"),
        (["benchmark", "fetch_pick_and_place", "protocol.executor.execute_horizon=9"], "replan every 1..8"),
        (["benchmark", "fetch_pick_and_place", "num_envs=0"], "num_envs and workers of at least 1"),
    ],
)
def test_mistakes_are_one_line_that_helps(words, said, capsys, tmp_path):
    assert main([*words, f"out={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())  # nothing was recorded before it was said


def test_a_checkpoint_of_another_embodiment_is_refused(done, capsys, tmp_path):
    (checkpoint,) = done.glob("run-0-*/checkpoint")
    words = ["eval", f"checkpoint={checkpoint}", "env=pusht", f"out={tmp_path}"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "do not fit" in told
    assert "Traceback" not in told


@pytest.fixture(scope="module")
def peoples(tmp_path_factory):
    """Two episodes of PushT as LeRobot's data set has them, converted."""
    root = tmp_path_factory.mktemp("pusht")
    (root / "meta").mkdir()
    (root / "data").mkdir()
    picture = {"dtype": "image", "shape": [96, 96, 3], "names": ["height", "width", "channels"]}
    numbers = {"dtype": "float32", "shape": [2], "names": ["x", "y"]}
    info = {
        "codebase_version": "v2.1",
        "robot_type": "unknown",
        "fps": 10,
        "total_episodes": 2,
        "chunks_size": 1000,
        "data_path": "data/{episode_index}.parquet",
        "features": {"observation.image": picture, "observation.state": numbers, "action": numbers},
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "Push the T-shaped block"}\n')
    rows = [{"episode_index": k, "tasks": ["Push the T-shaped block"], "length": 12} for k in range(2)]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    rng = np.random.default_rng(0)
    for k in range(2):
        images = [cv2.imencode(".png", rng.integers(0, 255, (96, 96, 3), np.uint8))[1].tobytes() for _ in range(12)]
        columns = {
            "observation.image": [{"bytes": image, "path": None} for image in images],
            "observation.state": rng.uniform(0, 512, (12, 2)).astype(np.float32).tolist(),
            "action": rng.uniform(0, 512, (12, 2)).astype(np.float32).tolist(),
            "timestamp": np.arange(12, dtype=np.float32) / 10,
            "frame_index": np.arange(12),
            "episode_index": np.full(12, k),
            "index": np.arange(12),
            "task_index": np.zeros(12, int),
        }
        pq.write_table(pa.table(columns), root / "data" / f"{k}.parquet")
    store = root / "store"
    assert main(["convert", "data=lerobot_pusht", f"source={root}", f"out={store}"]) == 0
    return store


def test_a_suite_without_experts_is_measured_on_demonstrations_of_people(peoples, tmp_path):
    words = ["benchmark", "pusht", f"protocol.store={peoples}", "protocol.episodes=1", "protocol.seeds=1"]
    words += ["protocol.snapshots=0", "protocol.optimization.steps=2", "protocol.optimization.batch_size=4"]
    words += ["protocol.model.backbone.channels=[8,8,8]", "protocol.model.head.width=32", "vector=threads", "videos=0"]
    assert main([*words, "device=cpu", f"out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["episodes"], result["demos"]) == (1, 2)
    assert "record" not in result["seconds"]
    assert [row["success"] for row in result["published"]] == [64.2, 63.8]


def test_demonstrations_of_another_robot_are_refused_before_training(peoples, capsys, tmp_path):
    assert main(["benchmark", "fetch_pick_and_place", f"protocol.store={peoples}", f"out={tmp_path}"]) == 2
    assert "do not fit" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "make"),
    [
        ("lerobot_pusht", lambda: PushTEnv(cameras={"image": 96}).spec_embodiment),
        ("lerobot_aloha_sim", lambda: AlohaEnv(task="transfer_cube", cameras={"top": [480, 640]}).spec_embodiment),
        ("lerobot_libero", lambda: libero.embodiment({"agentview": 256, "robot0_eye_in_hand": 256})),
    ],
)
def test_data_of_people_means_what_the_environment_means(data, make):
    config = Composer().compose("convert", [f"data={data}", "source=x", "out=y"]).config
    mine = instantiate(config.data).embodiment
    assert not mine.differences(make())
