"""Slow and fast at their own rates: when the slow one is asked, what the fast one acts on, and what ends it."""

import numpy as np
import pytest
import torch

from brachium.errors import ConfigError
from brachium.policies.executor import RecedingHorizon
from brachium.policies.planners.base import LanguageSubgoal, LatentSubgoal, PlanContext
from brachium.policies.planners.latent import Completion, FastPolicy, LatentPlanner, SlowFastRunner
from brachium.spec import Observation
from brachium.vla.judge import Features
from brachium.vla.pretrained import Pretrained
from brachium.vla.slowfast import Sizes, SlowFast, SlowFastModel


@pytest.fixture(scope="module")
def pair(make_arm):
    nano, spec = Pretrained.load("nano"), make_arm("arm6_ee").spec
    width = Features(nano)(
        torch.zeros(1, 2, 96, 96, 3, dtype=torch.uint8), torch.ones(1, 1, 20, dtype=torch.long), torch.zeros(1, 16)
    ).shape[-1]
    torch.manual_seed(0)
    net = SlowFast(width, spec, Sizes(latent=8, width=32, image=24, horizon=2)).eval()
    return SlowFastModel(net=net, model=nano, embodiment=spec)


def executor(policy):
    return RecedingHorizon(policy, execute_horizon=1)


def seen(step, text="reach the red cube", seed=0):
    rng = np.random.default_rng([seed, step])
    images = {name: rng.integers(0, 255, (96, 96, 3), dtype=np.uint8) for name in ("front", "wrist")}
    state = rng.normal(size=16).astype(np.float32)
    return Observation(images=images, state=state, instruction=text, timestamp=step / 10.0)


def runner_of(pair, **options):
    return SlowFastRunner(pair, executor, lambda system: LatentPlanner(system=system, **options))


def asked(runner):
    return [event["step"] for event in runner.log(0) if event["event"] == "proposal"]


@pytest.mark.parametrize(("period", "latency", "expected"), [(5, 0, [0, 5, 10, 15]), (1, 0, list(range(18)))])
def test_the_slow_system_is_asked_once_a_period(pair, period, latency, expected):
    runner = runner_of(pair, period=period, latency=latency)
    runner.reset(0, 7)
    for step in range(18):
        runner.act([seen(step)], [0])
    assert asked(runner) == expected
    assert not [event for event in runner.log(0) if event["event"] == "end"]  # a newer latent ends nothing


def test_a_late_latent_tells_of_when_it_was_asked_for(pair):
    runner = runner_of(pair, period=4, latency=3)
    runner.reset(0, 7)
    held = [runner.act([seen(step)], [0])[0] for step in range(3)]
    for step, action in enumerate(held):  # nothing to act on yet: it holds still
        assert action[:6].tolist() == [0.0] * 6
        assert action[6] == pytest.approx(seen(step).state[9])
    for step in range(3, 12):
        runner.act([seen(step)], [0])
    latent = runner.policy._latents[0]
    assert latent.stamp == pytest.approx(0.7)  # asked for at 7, here at 10
    assert latent.z[0] == pytest.approx(pair.think([seen(7)])[0], abs=1e-6)


def test_another_instruction_acts_within_a_period(pair):
    """The latent of the new words is acted on at once where thinking takes no time, and after it where it does."""
    for latency in (0, 2):
        runner = runner_of(pair, period=6, latency=latency)
        runner.reset(0, 7)
        for step in range(14):
            runner.act([seen(step, "reach the red cube" if step < 9 else "reach the blue ball")], [0])
            if step == 9 + latency:
                assert runner.policy._latents[0].text == "reach the blue ball"


def test_ablations_change_the_latent_only(pair):
    contexts = [
        PlanContext(instruction="reach the red cube", observation=seen(0, seed=k), seed=k, step=0) for k in range(3)
    ]
    plain = [LatentPlanner(system=pair).propose(c).candidates[0].subgoal.z for c in contexts]
    zero = LatentPlanner(system=pair, ablation="zero")
    assert all(not zero.propose(c).candidates[0].subgoal.z.any() for c in contexts)
    shuffle = LatentPlanner(system=pair, ablation="shuffle")
    mixed = [shuffle.propose(c).candidates[0].subgoal.z for c in contexts]
    assert not mixed[0].any()  # there is no other yet
    assert np.array_equal(mixed[1], plain[0])
    assert any(np.array_equal(mixed[2], other) for other in plain[:2])


def test_a_latent_that_is_too_old_is_not_acted_on(pair):
    fast = FastPolicy(pair, executor)
    fast.reset(0, 0)
    latent = LatentSubgoal(z=np.zeros((1, 8), np.float32), stamp=0.0, ttl_s=0.5)
    fast.pursue(0, latent, seen(0))
    assert np.abs(fast.act([seen(5)], [0])[0, :6]).max() > 0.0
    assert 0.0 < fast.share[0] < 1.0
    assert np.abs(fast.act([seen(6)], [0])[0, :6]).max() == 0.0


def test_lanes_do_not_depend_on_one_another(pair):
    def last(lanes):
        runner = runner_of(pair, period=3)
        for lane in lanes:
            runner.reset(lane, lane)
        for step in range(5):
            actions = runner.act([seen(step, seed=lane) for lane in lanes], lanes)
        return dict(zip(lanes, actions))

    alone, together = last([2]), last([1, 2, 5])
    assert np.array_equal(alone[2], together[2])


def test_completion_ends_by_what_the_fast_system_says(pair):
    fast = FastPolicy(pair, executor)
    fast.chunks.share[0] = 0.95
    context = PlanContext(instruction="x", observation=seen(0))
    assert Completion(fast).check(context, 0).ok
    assert not Completion(fast, threshold=0.97).check(context, 0).ok
    assert not Completion(fast).check(context, 1).ok


def test_bad_input(pair):
    with pytest.raises(ConfigError, match="Did you mean 'zero'"):
        LatentPlanner(system=pair, ablation="zeros")
    with pytest.raises(ConfigError, match="period"):
        LatentPlanner(system=pair, period=0)
    fast = FastPolicy(pair, executor)
    fast.reset(0, 0)
    with pytest.raises(ConfigError, match="reads no words"):
        fast.pursue(0, LanguageSubgoal(text="do it"), seen(0))
    with pytest.raises(ConfigError, match="before pursue"):
        fast.act([seen(0)], [0])
