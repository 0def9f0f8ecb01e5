"""The verb `train`: refusals before anything is written, kills and resumes, caches, determinism, held-out numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brachium.__main__ import main
from brachium.datasets.normalize import Normalizer
from brachium.datasets.statistics import compute_statistics
from brachium.datasets.store import EpisodeStore
from brachium.errors import CheckpointError, ConfigError, NotFoundError, SpecMismatchError, StoreError
from brachium.vla.checkpoint import load_checkpoint, predict, read_goldens, read_meta
from brachium.vla.ground import Grounding
from brachium.vla.heldout import evaluate_heldout
from brachium.vla.loop import TrainLoop
from brachium.vla.optim import Optimization
from brachium.vla.policy_data import PolicyData, cached_encodings, encoding_key, episode_key
from brachium.vla.sources import usable_episodes
from brachium.vla.train import train

from .conftest import make_embodiment, make_model, make_recipe, record_demos, record_scenes, vlm_config
from .test_loop import OF_THE_MACHINE

FAST = Optimization(
    steps=12, batch_size=8, warmup=2, precision="float32", log_every=3, save_every=4, lr=3e-3, ema=0.9, seed=1
)


def grounding_of(scenes, **changes):
    return Grounding(store=str(scenes.path), optimization=replace(FAST, steps=6), sentences=2, heldout=3, **changes)


def weights_of(folder):
    return load_file(folder / "checkpoint" / "model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def run(demos, out, **options):
    options = {"model": make_recipe(), "optimization": FAST, "heldout": 0.3, "device": "cpu", **options}
    return train(store=str(getattr(demos, "path", demos)), out=str(out), **options)


# Refusals: each names what is wrong, and nothing is left behind.


@pytest.mark.parametrize("out", ["new", "deep/er"])
def test_a_missing_store(tmp_path, out):
    with pytest.raises(NotFoundError, match="no episode store at"):
        run(tmp_path / "none", tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_success(tmp_path):
    demos = record_demos(tmp_path / "store", range(3), success=False)
    with pytest.raises(StoreError, match=r"no successful episode to train on \(3 in all\)"):
        run(demos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_episodes_nobody_labelled_are_all_used(tmp_path, demos):
    unlabelled = record_demos(tmp_path / "store", range(3), success=None)
    assert len(usable_episodes(unlabelled)) == 3
    assert usable_episodes(demos) == list(range(6))


def test_a_store_that_cannot_be_written_to_is_trained_on_all_the_same(tmp_path, demos, capsys):
    model = make_model(make_recipe(points=True))
    (tmp_path / "cache").write_text("a file where the folder should be")
    expected = cached_encodings(model, demos, tmp_path / "elsewhere")
    found = cached_encodings(model, demos, tmp_path / "cache")
    assert torch.equal(found.points, expected.points)
    assert "features are not kept" in "".join(capsys.readouterr())


def test_training_ends_with_an_evaluation_in_the_environment_it_is_given(tmp_path, demos):
    called = []

    class Env:
        spec_embodiment = make_embodiment()

        def close(self):
            pass

    run(demos, tmp_path / "out", env=Env, evaluator=lambda **options: called.append(options))
    checkpoint, out = str(tmp_path / "out" / "checkpoint"), str(tmp_path / "out" / "eval")
    assert called == [{"checkpoint": checkpoint, "env": Env, "out": out}]
    run(demos, tmp_path / "other", env=Env, evaluator=None)
    run(demos, tmp_path / "third", evaluator=lambda **options: called.append(options))
    assert len(called) == 1


def test_failures_are_left_out(tmp_path):
    store = record_demos(tmp_path / "store", (5, 2))
    record = EpisodeStore.open(store.path)
    from brachium.datasets.writer import EpisodeWriter

    from .conftest import episode_steps

    with EpisodeWriter(record, fsync=False, profile="raw") as writer:
        for success in (False, None):
            writer.begin("reach the blue ball", meta={"seed": 0, "task": "toy"})
            for step in episode_steps(record.embodiment, 9, 3):
                writer.step(**step)
            writer.end(success)
    assert usable_episodes(record.refresh()) == [1, 0]


class FakeEnv:
    closed = 0

    def __init__(self, spec):
        self.spec_embodiment = spec

    def close(self):
        FakeEnv.closed += 1


def test_an_environment_of_another_embodiment(tmp_path, demos):
    other = make_embodiment(names=("x", "y", "z", "tilt"))
    before = FakeEnv.closed
    with pytest.raises(SpecMismatchError, match=r"(?s)do not fit.*state.names"):
        run(demos, tmp_path / "out", env=lambda: FakeEnv(other))
    assert FakeEnv.closed == before + 1
    assert not (tmp_path / "out").exists()


def test_points_without_grounding(tmp_path, demos):
    with pytest.raises(ConfigError, match=r"must be grounded first.*grounding.store.*encoder=.*model.points=false"):
        run(demos, tmp_path / "out", model=make_recipe(points=True))
    assert not (tmp_path / "out").exists()


def test_grounding_on_what_is_no_store_of_scenes(tmp_path, demos):
    model = make_recipe(points=True)
    with pytest.raises(StoreError, match="no field 'objects'"):
        run(demos, tmp_path / "out", model=model, grounding=replace(Grounding(store=str(demos.path)), heldout=0))
    with pytest.raises(NotFoundError, match="no episode store at"):
        run(demos, tmp_path / "out", model=model, grounding=Grounding(store=str(tmp_path / "none")))
    assert not (tmp_path / "out").exists()


def test_points_without_a_tool_position(tmp_path, scenes):
    demos = record_demos(tmp_path / "store", range(2), spec=make_embodiment(names=("a", "b", "c", "d")))
    with pytest.raises(SpecMismatchError, match="needs the tool position"):
        run(demos, tmp_path / "out", model=make_recipe(points=True), grounding=grounding_of(scenes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("heldout", [-0.1, 1.0, 7])
def test_a_held_out_share_that_makes_no_sense(tmp_path, demos, heldout):
    with pytest.raises(ConfigError, match=r"expected heldout in \[0, 1\)"):
        run(demos, tmp_path / "out", heldout=heldout)
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_other_cameras_or_none(tmp_path, demos):
    with pytest.raises(NotFoundError, match=r"no checkpoint or pretrained model at .* encoder=nano"):
        run(demos, tmp_path / "out", encoder=str(tmp_path / "none"))
    run(demos, tmp_path / "first", optimization=replace(FAST, steps=1))
    other = record_demos(tmp_path / "store", range(2), spec=make_embodiment(cameras=("top",)))
    with pytest.raises(SpecMismatchError, match=r"was trained for cameras \('front', 'wrist'\)"):
        run(other, tmp_path / "out", encoder=str(tmp_path / "first" / "checkpoint"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(tmp_path, demos):
    with pytest.raises(ConfigError, match="no CUDA device here"):
        run(demos, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


# What comes out.


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demos, scenes):
    out = tmp_path_factory.mktemp("trained")
    run(demos, out, model=make_recipe(points=True), grounding=grounding_of(scenes), evaluate_every=6)
    return out


def test_a_training_leaves_a_checkpoint_that_proves_itself(trained, demos):
    model = load_checkpoint(trained / "checkpoint")
    meta = read_meta(trained / "checkpoint")
    assert meta["store"]["fingerprint"] == demos.fingerprint
    assert meta["metrics"].keys() >= {"loss", "eval/loss", "eval/action_error", "eval/mean_error", "eval/last_error"}
    assert meta["grounding"].keys() >= {"eval/front_px", "eval/position_mm"}
    (golden,) = read_goldens(trained / "checkpoint").values()
    states = demos.lowdim("state")
    assert all((states == row).all(1).any() for row in golden.observation.state)
    statistics = compute_statistics(demos, episodes=[i for i in range(6) if i in trained_episodes(demos)])
    expected = Normalizer(mode="min_max", statistics=statistics["action"])
    torch.testing.assert_close(
        model.get_buffer("action_scale_tiny").double(), torch.from_numpy(expected.scale).double(), atol=1e-6, rtol=0
    )
    assert model.get_buffer("action_active_tiny").tolist() == [True, True, False]
    assert not list(trained.rglob("resume-*")) + list(trained.rglob("*.partial"))
    steps = [json.loads(line)["step"] for line in (trained / "log-act.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 6, 9, 12, 12]


def trained_episodes(demos):
    from brachium.datasets.split import is_heldout

    return [e.index for e in demos.episodes if not is_heldout(episode_key(e), 0.3, 0)]


def test_some_episodes_are_held_out(demos):
    assert 0 < len(trained_episodes(demos)) < 6


def test_the_saved_weights_are_the_averaged_ones(trained, demos, scenes, tmp_path):
    """The same training with averages that follow at once ends elsewhere, with the same encoder."""
    shutil.copytree(trained, tmp_path / "out")
    run(
        demos,
        tmp_path / "out",
        model=make_recipe(points=True),
        grounding=grounding_of(scenes),
        optimization=replace(FAST, ema=0.0),
    )
    a, b = weights_of(trained), weights_of(tmp_path / "out")
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("encoder."))
    assert any(not torch.equal(a[k], b[k]) for k in a if k.startswith("head."))


def test_a_frozen_encoder_of_another_checkpoint_is_taken_as_it_is(trained, demos, tmp_path):
    run(demos, tmp_path / "out", encoder=str(trained / "checkpoint"), model=make_recipe("tokenized"))
    a, b = weights_of(trained), weights_of(tmp_path / "out")
    theirs = [k for k in a if k.startswith("encoder.")]
    assert theirs
    assert all(torch.equal(a[k], b[k]) for k in theirs)
    model = load_checkpoint(tmp_path / "out" / "checkpoint")
    assert model.recipe.points
    assert model.tokenizer.get_vocab() == load_checkpoint(trained / "checkpoint").tokenizer.get_vocab()


def test_grounding_does_not_depend_on_the_seed_of_acting(trained, demos, scenes, tmp_path):
    options = {"model": make_recipe(points=True), "grounding": grounding_of(scenes)}
    run(demos, tmp_path / "out", optimization=replace(FAST, seed=2), **options)
    a, b = weights_of(trained), weights_of(tmp_path / "out")
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("encoder."))
    assert any(not torch.equal(a[k], b[k]) for k in a if k.startswith("head."))


def test_a_finished_grounding_is_reused_only_for_the_same_options(trained, demos, scenes, tmp_path, capfd):
    for change, reused in (({}, True), ({"word_dropout": 0.5}, False)):
        out = tmp_path / f"out{len(change)}"
        shutil.copytree(trained, out)
        run(demos, out, model=make_recipe(points=True), grounding=replace(grounding_of(scenes), **change))
        assert ("grounding is done already" in capfd.readouterr().err) is reused


def test_a_damaged_grounding_is_made_anew(trained, demos, scenes, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    file = out / "grounded.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    run(demos, out, model=make_recipe(points=True), grounding=grounding_of(scenes))
    assert_same(weights_of(trained), weights_of(out))


@pytest.mark.parametrize("points", [True, False])
def test_the_order_of_recording_has_no_say(tmp_path, points):
    """Recorders in parallel finish in any order; the same episodes give the same weights."""
    seeds = np.random.default_rng(4).permutation(9).tolist()
    folders = []
    for name, order in (("a", range(9)), ("b", seeds)):
        demos = record_demos(tmp_path / f"demos-{name}", order, length=9)
        scenes = record_scenes(tmp_path / f"scenes-{name}", order)
        grounding = grounding_of(scenes) if points else None
        folders.append(tmp_path / f"out-{name}")
        run(demos, folders[-1], model=make_recipe(points=points), grounding=grounding)
    assert_same(weights_of(folders[0]), weights_of(folders[1]))
    metrics = [read_meta(f / "checkpoint")["metrics"] for f in folders]
    assert metrics[0] == metrics[1]


def test_a_hurried_training_learns_more_than_the_mean(tmp_path):
    demos = record_demos(tmp_path / "demos", range(12), length=12)
    optimization = replace(FAST, steps=250, batch_size=32, lr=5e-3, save_every=1000, log_every=50)
    recipe = replace(make_recipe(), head={**make_recipe().head, "draws": 4, "steps": 5})
    recipe = replace(recipe, action_horizon=1)
    run(demos, tmp_path / "out", model=recipe, optimization=optimization, heldout=0.2)
    metrics = read_meta(tmp_path / "out" / "checkpoint")["metrics"]
    assert metrics["eval/action_error"] < 0.6 * metrics["eval/mean_error"]


# Caches and held-out numbers.


@pytest.mark.parametrize("surround", [0, 8])
def test_cached_encodings_are_fresh_encodings(demos, tmp_path, surround):
    model = make_model(make_recipe(points=True, surround=surround))
    cached = cached_encodings(model, demos, tmp_path)
    options = {"batch_size": 8, "seed": 0}
    with_cache = PolicyData(demos, [4, 1, 2], model, **options, encodings=cached)
    without = PolicyData(demos, [4, 1, 2], model, **options, encodings=None)
    assert len(cached.words) == demos.total_frames
    for step in (0, 3):
        a, b = with_cache.make(step), without.make(step)
        assert a.images is None
        with torch.no_grad():
            fresh = b.encode(model)
        torch.testing.assert_close(a.encode(model).words, fresh.words, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a.encode(model).points, fresh.points, atol=1e-5, rtol=1e-4)
        if surround:
            torch.testing.assert_close(a.encode(model).around.float(), fresh.around, atol=2e-3, rtol=2e-3)
        else:
            assert a.encode(model).around is fresh.around is None
        assert torch.equal(a.action, b.action)
        assert torch.equal(a.state, b.state)
        assert torch.equal(a.action_pad, b.action_pad)


def test_cached_encodings_are_reused_for_the_same_weights_and_data_only(demos, tmp_path, monkeypatch):
    made = []
    original = sys.modules["brachium.vla.policy_data"]._encode_all
    monkeypatch.setattr("brachium.vla.policy_data._encode_all", lambda m, s: made.append(0) or original(m, s))
    model = make_model(make_recipe(points=True))
    cached_encodings(model, demos, tmp_path)
    again = cached_encodings(model, EpisodeStore.open(demos.path), tmp_path)
    assert len(made) == 1
    torch.testing.assert_close(again.words, original(model, demos)["words"])
    with torch.no_grad():
        model.encoder.backbone.readouts[0, 0] += 1e-6
    cached_encodings(model, demos, tmp_path)
    other = record_demos(tmp_path / "store", range(2))
    cached_encodings(model, other, tmp_path)
    shorter = make_model(make_recipe(points=True, max_tokens=2))
    shorter.encoder.load_state_dict(model.encoder.state_dict())
    cached_encodings(shorter, demos, tmp_path)
    assert len(made) == 4
    assert len(list(tmp_path.glob("encodings-*"))) == 4


def test_the_key_of_a_cache_depends_on_the_encoder_not_the_head(demos):
    model = make_model(make_recipe(points=True))
    key = encoding_key(model, demos)
    with torch.no_grad():
        next(model.head.parameters()).add_(1.0)
    assert encoding_key(model, demos) == key


def test_policy_batches_against_the_store(demos):
    model = make_model()
    data = PolicyData(demos, [5, 0, 3], model, batch_size=8, seed=0, encodings=None)
    batch = data.batch(np.arange(len(data.windows)))
    row = 0
    for index in (5, 0, 3):
        episode = demos.episode(index)
        for t in range(len(episode)):
            for h in range(4):
                pad = t + h >= len(episode)
                assert bool(batch.action_pad[row, h]) == pad
                expected = episode.action[min(t + h, len(episode) - 1)]
                np.testing.assert_array_equal(batch.action[row, h].numpy(), expected)
            np.testing.assert_array_equal(batch.state[row].numpy(), episode.state[t])
            np.testing.assert_array_equal(batch.images[row, 1].numpy(), episode.images["wrist"][t])
            assert bool(batch.first[row]) == (t == 0)
            if t:
                np.testing.assert_array_equal(batch.previous[row].numpy(), episode.action[t - 1])
            row += 1
    assert row == len(batch.state)


def test_episode_keys_are_what_an_episode_is():
    from brachium.datasets.episode import EpisodeInfo

    def info(meta):
        return EpisodeInfo(
            id="ULID", index=0, segment="s", start=0, length=1, instruction="", success=True, tags=(), meta=meta
        )

    assert episode_key(info({})) == "ULID"
    keys = [episode_key(info({"seed": s, "task": "reach"})) for s in (2, 10, 100)]
    assert keys == sorted(keys)
    assert episode_key(info({"seed": 2, "task": "push"})) != keys[0]


def test_held_out_numbers_by_loops(demos):
    model = make_model(make_recipe("tokenized"))
    statistics = compute_statistics(demos, episodes=[0, 1, 2])
    model.set_statistics("tiny", statistics)
    data = PolicyData(demos, [3, 4], model, batch_size=8, seed=0, encodings=None)
    got = evaluate_heldout(model, data, "tiny", statistics)
    scale = Normalizer(mode="min_max", statistics=statistics["action"]).scale
    mean = statistics["action"].mean
    totals = {"action_error": [], "mean_error": [], "last_error": []}
    for index in (3, 4):
        episode = demos.episode(index)
        for t in range(len(episode)):
            chunk = predict(model, "tiny", read_observation(demos, index, t), np.zeros((1, 4, 3), np.float32))[0]
            for h in range(min(4, len(episode) - t)):
                for a in (0, 1):  # the third never changes
                    truth = episode.action[t + h, a]
                    last = episode.action[t - 1, a] if t else mean[a]
                    totals["action_error"].append(abs(chunk[h, a] - truth) / scale[a])
                    totals["mean_error"].append(abs(mean[a] - truth) / scale[a])
                    totals["last_error"].append(abs(last - truth) / scale[a])
    for name, values in totals.items():
        assert got[name] == pytest.approx(np.mean(values), rel=1e-4), name
    assert np.isfinite(got["loss"])


def read_observation(demos, index, t):
    from brachium.spec import Observation

    episode = demos.episode(index)
    return Observation(
        images={k: episode.images[k][t : t + 1] for k in demos.embodiment.camera_names},
        state=episode.state[t : t + 1],
        instruction=(episode.info.instruction,),
    )


# Kills.


def flat(key, node):
    for name, value in node.items():
        yield from flat(f"{key}.{name}", value) if isinstance(value, dict) else [f"{key}.{name}={value}"]


def words(demos, out, *, head="flow", freeze=True, scenes=None, steps=16, save_every=4):
    """What a user types."""
    common = {"batch_size": 8, "warmup": 2, "log_every": 4, "save_every": save_every}
    typed = [
        "train",
        f"store={demos.path}",
        f"out={out}",
        f"model/head={head}",
        f"tune={'frozen' if freeze else 'full'}",
    ]
    typed += ["device=cpu", "heldout=0.3", "model.action_horizon=4"]
    typed += flat("model.backbone.config", vlm_config())
    typed += flat("optimization", {**common, "steps": steps})
    typed += ["model.head.width=16", "model.head.depth=1"]
    typed += ["model.head.heads=2"] if head == "tokenized" else []
    if scenes is None:
        return [*typed, "model.points=false"]
    typed += ["grounding=scenes", f"grounding.store={scenes.path}", "grounding.heldout=3", "grounding.sentences=2"]
    return typed + list(flat("grounding.optimization", {**common, "steps": 8}))


def killed_in_a_child(typed, stage, step, place):
    """Run in a forked process that kills itself with SIGKILL inside step `step` of `stage`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            method = {"update": "_update_average", "save": "save"}[place]
            original = getattr(TrainLoop, method)

            def fatal(self):
                if self.name == stage and self.step == step:
                    if place == "save":  # half a file is there, the old one too
                        (self.folder / f"resume-{stage}.partial").write_bytes(b"half")
                    os.kill(os.getpid(), signal.SIGKILL)
                original(self)

            setattr(TrainLoop, method, fatal)
            main(typed)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


CASES = [
    # head, freeze, points, where it dies
    ("flow", True, True, [("act", 10, "update")]),
    ("flow", False, True, [("ground", 6, "update"), ("act", 12, "save")]),
    ("tokenized", True, True, [("ground", 4, "save"), ("act", 7, "update")]),
    ("tokenized", False, False, [("act", 3, "update"), ("act", 9, "update")]),
]


@pytest.mark.parametrize(("head", "freeze", "points", "deaths"), CASES)
def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path, demos, scenes, head, freeze, points, deaths):
    options = {"head": head, "freeze": freeze, "scenes": scenes if points else None}
    assert main(words(demos, tmp_path / "whole", **options)) == 0
    typed = words(demos, tmp_path / "parts", **options)
    for stage, step, place in deaths:
        killed_in_a_child([*typed, "resume=true"], stage, step, place)
        assert not (tmp_path / "parts" / "checkpoint").exists()
    assert main([*typed, "resume=true"]) == 0
    whole, parts = (weights_of(tmp_path / name) for name in ("whole", "parts"))
    assert_same(whole, parts)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in OF_THE_MACHINE}
            for line in (tmp_path / name / "log-act.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_kill_9_of_the_command_at_any_moment(tmp_path, demos):
    """A process of its own, killed from outside while it trains."""
    typed = words(demos, tmp_path / "parts", steps=150, save_every=10)
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}  # as here: sums depend on it
    process = subprocess.Popen(
        [sys.executable, "-m", "brachium", *typed], env={**os.environ, **one_thread}, stderr=subprocess.DEVNULL
    )
    save = tmp_path / "parts" / "resume-act.safetensors"
    deadline = time.monotonic() + 120
    while not save.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert save.exists()
    assert main([*typed, "resume=true"]) == 0
    assert main(words(demos, tmp_path / "whole", steps=150, save_every=10)) == 0
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))


def test_a_run_goes_on_with_other_logging_and_saving(tmp_path, demos, scenes):
    assert main(words(demos, tmp_path / "whole", scenes=scenes)) == 0
    typed = words(demos, tmp_path / "parts", scenes=scenes)
    killed_in_a_child(typed, "act", 6, "update")
    changed = [word for word in typed if not word.startswith(("optimization.log_every", "optimization.save_every"))]
    assert len(changed) == len(typed) - 2
    assert main([*changed, "optimization.log_every=3", "optimization.save_every=5", "resume=true"]) == 0
    assert_same(*(weights_of(tmp_path / name) for name in ("whole", "parts")))


def test_another_training_is_not_resumed(tmp_path, demos, scenes):
    typed = words(demos, tmp_path / "out", scenes=scenes)
    killed_in_a_child(typed, "act", 6, "update")
    other = record_demos(tmp_path / "store", range(5))
    changes = {
        "optimization.lr=0.5": "lr=0.001 against 0.5",
        f"store={other.path}": "encoder_and_data=",
        "model.head.steps=2": "recipe.head.steps=5 against 2",
        "heldout=0.4": "heldout=0.3 against 0.4",
        "tune=full": "tune=['frozen', None, False, None, None] against ['full', None, False, None, None]",
        "grounding.word_dropout=0.4": "encoder_and_data=",
    }
    for change, complaint in changes.items():
        out = tmp_path / "copy"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "out", out)
        changed = [w for w in typed if w.split("=")[0] not in (change.split("=")[0], "out")]
        os.environ["BRACHIUM_TRACEBACK"] = "1"
        try:
            with pytest.raises(CheckpointError) as caught:
                main([*changed, f"out={out}", change, "resume=true"])
        finally:
            del os.environ["BRACHIUM_TRACEBACK"]
        assert complaint in str(caught.value)
        assert "resume=false" in str(caught.value)
