"""Skills as they are carried out: what is kept of them, and a judge that is trained on it."""

import numpy as np
import pytest

from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.envs.longhorizon.skills import SkillTask
from brachium.envs.record import write_episode
from brachium.envs.tabletop import TabletopEnv
from brachium.errors import ConfigError, StoreError
from brachium.executions import AFTER, Executions, record_executions
from brachium.vla.judge import DONE, Judge
from brachium.vla.judge_train import examples_of, fit_judge, show
from brachium.vla.optim import Optimization
from brachium.vla.pretrained import Pretrained


class Expert:
    """The task's own expert as a policy."""

    def __init__(self, env):
        self.env, self.embodiment = env, env.spec_embodiment

    def reset(self, lane, seed):
        pass

    def act(self, observations, lanes):
        return np.array([self.env.expert_action()], np.float32)


def executions(make_arm, skill, **options):
    env = TabletopEnv(task=SkillTask(skill=skill, **options), embodiment=make_arm("arm6_ee"))
    return Executions(env, Expert(env), identity="expert")


@pytest.fixture(scope="module")
def store(make_arm, tmp_path_factory):
    """Closings of the drawer by the expert, and tries to close one that is closed."""
    source = executions(make_arm, "close")
    made = EpisodeStore.create(tmp_path_factory.mktemp("executed") / "s", source.schema)
    with EpisodeWriter(made, source="test") as writer:
        for seed in range(12):
            for episode in source.record(seed):
                write_episode(writer, episode)
        never = executions(make_arm, "open", max_steps=5)  # too little time to open one
        for seed in range(6):
            for episode in never.record(seed):
                write_episode(writer, episode)
    return made.refresh()


def test_what_is_done_is_told_step_by_step(make_arm):
    source = executions(make_arm, "close")
    (episode,) = source.record(3)
    done = [bool(step.extras[DONE][0]) for step in episode.steps]
    assert episode.success
    assert not done[0]
    first = done.index(True)
    assert len(done) == first + AFTER  # the policy goes on a little after it has succeeded
    (again,) = source.record(3)
    assert [s.action.tolist() for s in again.steps] == [s.action.tolist() for s in episode.steps]


def test_what_cannot_be_done_fails(make_arm):
    (episode,) = executions(make_arm, "store", possible=0.0, max_steps=25).record(0)
    assert episode.success is False
    assert not any(step.extras[DONE][0] for step in episode.steps)


def test_a_judge_is_trained_on_executions(store, tmp_path):
    nano = Pretrained.load("nano")
    examples = examples_of(store, nano, seed=1)
    assert set(examples.part.tolist()) <= {0, 1, 2}
    assert set(examples.task.tolist()) == {"close", "open"}
    can, done = examples.labels[:, 0], examples.labels[:, 1]
    assert can[examples.task == "open"].max() == 0.0  # none was opened
    assert bool(can[(done > 0).numpy()].isnan().all())  # of what is done nobody asks whether it can be
    assert done.sum() > 0
    options = Optimization(steps=40, batch_size=32, lr=3e-3, warmup=2, log_every=1000, save_every=1000)
    judge = fit_judge(examples, nano, optimization=options, width=16, folder=tmp_path)
    show(judge, tmp_path)
    assert (tmp_path / "reliability.png").stat().st_size > 5000
    loaded = Judge.load(judge.save(tmp_path / "judge"))
    images = [store.read_images(name, np.array([0]))[0] for name in ("front", "wrist")]
    state = store.lowdim("state")[0].astype(np.float32)
    can_close, can_open = loaded(images, state, ["close the drawer", "open the drawer"])[:, 0]
    assert can_close > can_open


def test_bad_input(store, make_env, tmp_path):
    env = make_env("reach")
    other = EpisodeStore.create(tmp_path / "other", Executions(env, Expert(env)).schema)
    plain = EpisodeStore.create(tmp_path / "plain", type(other.schema)(embodiment=other.embodiment))
    with pytest.raises(StoreError, match="with the field"):
        examples_of(plain, Pretrained.load("nano"))
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="another policy"):
        record_executions(
            policy=str(tmp_path / "policy"), env=lambda: env, executor=Expert, out=str(store.path), episodes=1
        )
