"""Planners over skills in a world with physics: scripted skills as the oracle, looks now and then, chains of tasks."""

import json
from dataclasses import replace

import numpy as np
import pytest

from brachium.__main__ import main
from brachium.envs.longhorizon.physical import PhysicalTable
from brachium.errors import ConfigError
from brachium.policies.planners.base import PlanContext
from brachium.policies.planners.chains import run_chain, summarise_chains
from brachium.policies.planners.episode import run_episode, summarise
from brachium.policies.planners.executing import ScriptedSkills, holding, observed
from brachium.policies.planners.search import OfLength
from brachium.policies.planners.symbolic import SymbolicPlanner
from brachium.policies.planners.wiring import assemble
from brachium.spec import FeatureSpec, Observation


@pytest.fixture(scope="module")
def world(make_arm):
    only = OfLength(least=3, most=3)
    return PhysicalTable(embodiment=make_arm("arm6_ee"), images=False, only=only, families=("store", "stack"))


def runner_of(world, **options):
    parts = {"goals": None, "lm": None, "affordance": None, "fallback": None, "gate": None, "look_error": 0.05}
    return assemble(world, planner=SymbolicPlanner, options=options, **parts)[0]


def test_search_over_scripted_skills_does_the_work_and_stops(world):
    rows = [run_episode(world, runner_of(world, look_every=3), seed, "train") for seed in range(3)]
    assert [row["ended"] for row in rows] == ["done"] * 3
    assert summarise(rows)["success"]["success"] == 3
    assert all(row["skills"] >= row["optimum"] == 3 for row in rows)


def test_looks_are_as_seldom_as_asked(world):
    """With `look_every` the scene is read on those steps only, and when a skill is to be chosen."""
    runner, steps = runner_of(world, look_every=5), []
    tell = runner.scenes.tell
    runner.scenes.tell = lambda lane: steps.append(world.steps) or tell(lane)
    run_episode(world, runner, 0, "train")
    chosen = {event["step"] for event in runner.log(0) if event["event"] in ("begin", "end")}
    assert [s for s in steps if s % 5 and s not in chosen] == []
    assert len(steps) < 0.4 * world.steps


def test_a_policy_is_told_the_skills_not_the_work(world):
    runner, told = runner_of(world), []
    skills = runner.policy.policy
    act = skills.act
    skills.act = lambda seen, lanes: told.extend(o.instruction for o in seen) or act(seen, lanes)
    run_episode(world, runner, 1, "train")
    assert set(told) <= set(world.instructions)
    assert len(set(told)) >= 3


def test_the_hand_comes_up_before_every_skill(world):
    """Each skill's policy is asked first when the tool is high, however the one before it ended."""
    runner, heights = runner_of(world), {}
    skills = runner.policy.policy
    act = skills.act

    def spy(seen, lanes):
        begun = sum(event["event"] == "begin" for event in runner.log(0))
        heights.setdefault(begun, float(seen[0].state[2]))
        return act(seen, lanes)

    skills.act = spy
    run_episode(world, runner, 1, "train")
    assert len(heights) >= 3
    assert min(heights.values()) > 0.13


def test_chains_are_done_in_a_row_until_one_fails(world):
    free = PhysicalTable(embodiment=world.embodiment, images=False, max_steps=2000)
    rows = [run_chain(free, ScriptedSkills(free), seed) for seed in (1, 3)]
    assert [row["done"] for row in rows] == [5, 5]
    assert len(rows[0]["tasks"]) == 5
    none = run_chain(free, ScriptedSkills(free), 1, limit=1)
    assert none["done"] == 0
    told = summarise_chains([*rows, none])
    assert told["mean"] == pytest.approx(10 / 3, abs=1e-3)
    assert told["at_least_5"]["success"] == 2


def test_every_task_of_a_chain_is_possible_after_those_before(world):
    free = PhysicalTable(embodiment=world.embodiment, images=False)
    for seed in range(5):
        calls, facts = free.chain(seed), free.facts
        for call in calls:
            assert call.applicable(facts)
            facts = call.apply(facts)
            assert all(f in facts or not f.value for f in call.success)


def test_holding_still(world, make_arm):
    spec = world.spec_embodiment
    state = np.arange(spec.state.dim, dtype=np.float32)
    held = holding(spec)(Observation(state=state, instruction=""))
    assert held[:6].tolist() == [0.0] * 6
    assert held[6] == state[spec.state.names.index("gripper")]
    pose = make_arm("arm6_pose").spec
    still = holding(pose)(Observation(state=state, instruction=""))
    assert still.tolist() == [float(state[pose.state.names.index(name)]) for name in pose.action.names]
    strange = replace(spec, action=FeatureSpec(name="action", shape=(1,), names=("valve",), reference="absolute"))
    with pytest.raises(ConfigError, match="valve"):
        holding(strange)


def test_observations_are_as_policies_take_them(world):
    seen, _ = world.reset(seed=0)
    made = observed(seen, world.spec_embodiment, 1.5)
    assert made.timestamp == 1.5
    assert made.images == {}
    assert np.array_equal(made.state, seen["state"])
    context = PlanContext(instruction="x", observation=made)
    assert context.observation.instruction == seen["instruction"]


def test_the_command_goes_on_where_it_stopped(tmp_path, capsys):
    words = ["eval", "planner=default", "env=longhorizon/physical", "env.images=false", "~goals", "~lm", "look_every=3"]
    words += ["env.families=[stack]", f"out={tmp_path}"]
    assert main([*words, "episodes=2"]) == 0
    assert main([*words, "episodes=3"]) == 0
    assert "going on after 2 finished episodes" in capsys.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["total"]["episodes"] == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["checkpoint=/nowhere"], "are for a world with physics"),
        (["env=longhorizon/physical", "checkpoint=/nowhere"], "nowhere"),
        (["env=longhorizon/physical", "eyes=vlm", "eyes.model=/nowhere"], "no pretrained model at /nowhere"),
        (["env=longhorizon/physical", "eyes=reader", "eyes.reader=/nowhere"], "no scene reader"),
        (["env=longhorizon/physical", "detector=learned", "detector.judge=/nowhere"], "no judge"),
        (["env=longhorizon/physical", "look_every=0"], "look_every"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, expected):
    assert main(["eval", "planner=default", *words, "episodes=1", f"out={tmp_path}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert expected in error[-1]
