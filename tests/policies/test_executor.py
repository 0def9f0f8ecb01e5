"""Chunk executors against brute force over all chunks that were ever predicted."""

from dataclasses import replace

import numpy as np
import pytest

from brachium.errors import ConfigError
from brachium.policies.executor import RealTimeChunking, RecedingHorizon, TemporalEnsemble
from brachium.policies.timeline import Timeline
from brachium.spec import ActionChunk, EmbodimentSpec, FeatureSpec, Observation

DIM, HORIZON = 3, 5


def embodiment(gripper="open_is_1"):
    return EmbodimentSpec(
        name="tiny",
        robot="tiny",
        control_hz=10.0,
        cameras=(),
        state=FeatureSpec(name="state", shape=(2,)),
        action=FeatureSpec(name="action", shape=(DIM,), names=("x", "y", "grip"), gripper=gripper),
    )


class Noisy:
    """Chunks that depend on the state and on the noise, one row at a time; remembers what it was asked."""

    def __init__(self, gripper="open_is_1"):
        self.embodiment, self.action_horizon = embodiment(gripper), HORIZON
        self.noise_dim = self.embodiment.action.dim
        self.asked = []

    def chunk(self, state, noise):
        rows = np.arange(HORIZON)[:, None] * [0.1, -0.2, 0.3]
        return (np.float32(state[0]) + rows + np.tanh(noise) * np.float32(state[1])).astype(np.float32)

    def predict(self, observations, noise):
        self.asked.append((len(observations), noise.copy()))
        actions = np.stack([self.chunk(o.state, n) for o, n in zip(observations, noise)])
        return ActionChunk(actions=actions, control_hz=10.0)


def see(rng):
    return Observation(state=rng.standard_normal(2).astype(np.float32))


def by_hand(policy, states, seed, every):
    """(start, chunk) of each chunk of an episode: one is asked for every `every` steps."""
    rng = np.random.default_rng([seed, 0xAC7])
    return [
        (t, policy.chunk(states[t], rng.standard_normal((HORIZON, DIM), np.float32)))
        for t in range(0, len(states), every)
    ]


@pytest.mark.parametrize("every", range(1, HORIZON + 1))
def test_receding_horizon_executes_the_first_actions_of_each_chunk(every):
    policy, rng = Noisy(), np.random.default_rng(0)
    executor = RecedingHorizon(policy, execute_horizon=every)
    executor.reset(0, seed=4)
    seen = [see(rng) for _ in range(17)]
    done = np.concatenate([executor.act([o], [0]) for o in seen])
    assert done.dtype == np.float32
    chunks = dict(by_hand(policy, [o.state for o in seen], 4, every))
    expected = [chunks[t - t % every][t % every] for t in range(17)]
    np.testing.assert_array_equal(done, expected)
    assert len(policy.asked) == len(range(0, 17, every))


@pytest.mark.parametrize("gripper", ["open_is_1", "none"])
@pytest.mark.parametrize("average_gripper", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.7, -0.3])
def test_temporal_ensemble_is_the_formula_of_act(decay, average_gripper, gripper):
    """Zhao et al. 2023, algorithm 2: w_i = exp(-m i), w_0 for the oldest prediction, over all that cover the step."""
    policy, rng = Noisy(gripper), np.random.default_rng(1)
    executor = TemporalEnsemble(policy, decay=decay, average_gripper=average_gripper)
    executor.reset(0, seed=9)
    seen = [see(rng) for _ in range(13)]
    done = np.concatenate([executor.act([o], [0]) for o in seen])
    chunks = by_hand(policy, [o.state for o in seen], 9, 1)
    for t in range(13):
        live = [chunk[t - start] for start, chunk in chunks if 0 <= t - start < HORIZON]
        assert len(live) == min(t + 1, HORIZON)
        weights = [np.exp(-decay * i) for i in range(len(live))]
        expected = sum(w * row.astype(float) for w, row in zip(weights, live)) / sum(weights)
        if gripper != "none" and not average_gripper:
            expected[-1] = live[-1][-1]
        np.testing.assert_allclose(done[t], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [lambda p: RecedingHorizon(p, execute_horizon=2), lambda p: TemporalEnsemble(p)],
    ids=["receding", "ensemble"],
)
def test_a_lane_does_what_it_would_do_alone(make):
    """Lanes start, end, skip steps and swap order; none changes another."""
    rng = np.random.default_rng(2)
    episodes = {lane: [see(rng) for _ in range(9)] for lane in (0, 3, 7)}
    alone = {}
    for lane, seen in episodes.items():
        executor = make(Noisy())
        executor.reset(lane, seed=100 + lane)
        alone[lane] = [executor.act([o], [lane])[0] for o in seen]

    executor, together = make(Noisy()), {lane: [] for lane in episodes}
    executor.reset(0, seed=100)
    executor.reset(3, seed=103)
    position = dict.fromkeys(episodes, 0)
    for step in range(40):
        if step == 4:
            executor.reset(7, seed=107)
        ready = [k for k in episodes if position[k] < 9 and (k != 7 or step >= 4) and rng.random() < 0.7]
        rng.shuffle(ready)
        if not ready:
            continue
        actions = executor.act([episodes[k][position[k]] for k in ready], ready)
        for lane, action in zip(ready, actions):
            together[lane].append(action)
            position[lane] += 1
    for lane, expected in alone.items():
        np.testing.assert_array_equal(together[lane], expected)


def test_lanes_that_need_a_chunk_ask_in_one_batch():
    policy, rng = Noisy(), np.random.default_rng(3)
    executor = RecedingHorizon(policy, execute_horizon=3)
    for lane in range(4):
        executor.reset(lane, seed=lane)
    for _ in range(3):
        executor.act([see(rng) for _ in range(4)], range(4))
    assert [count for count, _ in policy.asked] == [4]


class Led(Noisy):
    """Takes guidance, and remembers it."""

    takes_guidance = True

    def __init__(self):
        super().__init__()
        self.guides = []

    def predict(self, observations, noise, guidance=None):
        self.guides += list(guidance or [None] * len(observations))
        return super().predict(observations, noise)


@pytest.mark.parametrize("delay", range(4))
@pytest.mark.parametrize("every", [1, 2])
def test_what_a_chunk_goes_on_from_is_what_is_executed_until_it_comes(delay, every):
    """One request at a time; its frozen rows are the very actions of the steps between its picture and its arrival."""
    policy, rng = Led(), np.random.default_rng(6)
    executor = RealTimeChunking(policy, execute_horizon=every, inference_delay=delay)
    executor.reset(0, seed=3)
    done, asked = [], []
    for t in range(24):
        before = len(policy.guides)
        done.append(executor.act([see(rng)], [0])[0])
        asked += [t] * (len(policy.guides) - before)
    assert asked == [0, *range(every, 24, max(every, delay))], "the first chunk is waited for"
    assert policy.guides[0] is None
    frozen = 0
    for before, t, guide in zip(asked, asked[1:], policy.guides[1:]):
        count = int((guide.weights == 1.0).sum()) if guide is not None else 0
        assert count == min(delay, HORIZON - every, HORIZON - (t - before))
        for k in range(min(count, 24 - t)):
            np.testing.assert_array_equal(guide.actions[k], done[t + k])
            frozen += 1
    assert frozen or not delay


def test_a_plan_of_poses_is_met_between_its_rows_but_for_the_gripper():
    policy = Led()
    policy.embodiment = replace(policy.embodiment, action=replace(policy.embodiment.action, reference="absolute"))
    executor, timeline = RealTimeChunking(policy), Timeline()
    rows = np.random.default_rng(8).standard_normal((HORIZON, DIM)).astype(np.float32)
    timeline.add(2.0, rows)
    guide = executor.guidance(timeline, 2.3, 2.0)
    np.testing.assert_allclose(guide.actions[:2, :-1], (0.7 * rows[:2] + 0.3 * rows[1:3])[:, :-1], atol=1e-6)
    np.testing.assert_array_equal(guide.actions[:2, -1], rows[:2, -1])
    assert guide.actions.dtype == np.float32
    np.testing.assert_array_equal(guide.weights[:3] == 1.0, [True, True, False])


@pytest.mark.parametrize("delay", range(3))
def test_a_delayed_chunk_is_executed_from_the_row_of_its_arrival(delay):
    policy, rng = Noisy(), np.random.default_rng(7)
    executor = RecedingHorizon(policy, execute_horizon=2, inference_delay=delay)
    executor.reset(0, seed=5)
    seen = [see(rng) for _ in range(15)]
    done = [executor.act([o], [0])[0] for o in seen]
    noise = np.random.default_rng([5, 0xAC7])
    drawn = {t: noise.standard_normal((HORIZON, DIM), np.float32) for t in range(0, 15, 2)}
    chunks = {t: policy.chunk(seen[t].state, draw) for t, draw in drawn.items()}
    for t, action in enumerate(done):
        newest = max(start for start in chunks if start == 0 or start + delay <= t)
        np.testing.assert_array_equal(action, chunks[newest][t - newest])


def test_a_reset_starts_the_episode_again_from_its_seed():
    policy, rng = Noisy(), np.random.default_rng(4)
    executor, seen = TemporalEnsemble(policy), [see(rng) for _ in range(6)]

    def episode(seed):
        executor.reset(0, seed=seed)
        return np.stack([executor.act([o], [0])[0] for o in seen])

    first = episode(1)
    assert not np.array_equal(episode(2), first)
    np.testing.assert_array_equal(episode(1), first)


def test_the_executor_does_not_write_into_the_policys_chunks():
    policy, rng = Noisy(), np.random.default_rng(5)
    given, predict = [], policy.predict

    def keep(observations, noise):
        chunk = predict(observations, noise)
        given.append((chunk.actions, chunk.actions.copy()))
        return chunk

    policy.predict = keep
    executor = TemporalEnsemble(policy)
    executor.reset(0, seed=0)
    for _ in range(8):
        executor.act([see(rng)], [0])[:] = 1e9  # nor does the caller
    for now, before in given:
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("every", [0, -1, HORIZON + 1])
def test_replanning_outside_the_chunk_is_refused(every):
    with pytest.raises(ConfigError, match=rf"1\.\.{HORIZON} steps .*got {every}"):
        RecedingHorizon(Noisy(), execute_horizon=every)


def test_acting_before_a_reset_is_refused():
    executor = RecedingHorizon(Noisy())
    executor.reset(0, seed=0)
    with pytest.raises(ConfigError, match=r"lanes \[2\] act before reset"):
        executor.act([see(np.random.default_rng(0))] * 2, [0, 2])
