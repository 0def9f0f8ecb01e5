"""The loop: subgoals begin and end as they should, refusals go back, and two keys end the work."""

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

from brachium.envs.longhorizon.symbolic import WAIT, SymbolicTable
from brachium.errors import ConfigError, ServerError
from brachium.policies.planners.base import (
    Ask,
    Candidate,
    Done,
    Infeasible,
    LanguageSubgoal,
    Outcome,
    Proposal,
    StepRecord,
    Verdict,
)
from brachium.policies.planners.calls import CallPolicy, wait
from brachium.policies.planners.chains import run_planned_chain
from brachium.policies.planners.detectors import Erring, LiteralGoal, LiteralSuccess, SceneOf
from brachium.policies.planners.evidence import Evidence
from brachium.policies.planners.gate import Gate
from brachium.policies.planners.runner import HierarchicalRunner
from brachium.policies.planners.symbolic import ScriptPlanner, SymbolicPlanner
from brachium.policies.planners.wiring import TrueGoals
from brachium.spec import Observation


class Told:
    """A planner that proposes what it is given, context -> subgoals."""

    name = "told"

    def __init__(self, answer):
        self.answer, self.contexts = answer, []

    def propose(self, context):
        self.contexts.append(context)
        found = self.answer(context)
        found = found if isinstance(found, list) else [found]
        return Proposal(candidates=tuple(Candidate(subgoal=s) for s in found))


class Sworn:
    """A goal check that says what it is given, look after look."""

    def __init__(self, answers):
        self.answers, self.asked = answers, 0

    def check(self, context, lane):
        self.asked += 1
        answer = self.answers(context) if callable(self.answers) else self.answers.pop(0)
        return Verdict(ok=answer)


def world(seed=0, **options):
    env = SymbolicTable(**{"failure": 0.0, "families": ("store_two",), **options})
    env.reset(seed=seed)
    return env


def loop(env, planner, **options):
    goals = TrueGoals(env)
    given = {
        "scenes": SceneOf(lambda lane: env.scene),
        "detector": LiteralSuccess(),
        "goal": LiteralGoal(goals=goals),
        "hold": wait,
        **options,
    }
    policy = CallPolicy(instructions=env.instructions, embodiment=env.spec_embodiment)
    runner = HierarchicalRunner(planner=planner, policy=policy, **given)
    runner.reset(0, 0)
    return runner


def go(env, runner, steps=40, instruction=None):
    """Actions until the system stops or the steps are over."""
    actions = []
    for _ in range(steps):
        seen = Observation(state=np.zeros(1, np.float32), instruction=instruction or env.errand.instruction)
        action = runner.act([seen], [0])[0]
        if runner.ended(0) is not None:
            break
        actions.append(float(action[0]))
        env.step(action)
    return actions


def does(env, text):
    call = next(c for c in env.library.calls(env.errand.scene.things) if c.instruction == text)
    return LanguageSubgoal(text=text, call=call)


def events(runner, kind):
    return [event for event in runner.log(0) if event["event"] == kind]


def best(env):
    return SymbolicPlanner(library=env.library, goals=TrueGoals(env))


def test_it_does_the_work_and_stops_by_itself():
    env = world()
    runner = loop(env, best(env))
    actions = go(env, runner)
    assert isinstance(runner.ended(0), Done)
    assert not env.scene.unmet(env.errand.goals[0])
    assert sum(a != WAIT for a in actions) == len(events(runner, "begin")) == len(events(runner, "end"))
    assert {e["outcome"] for e in events(runner, "end")} == {"success"}


def test_a_skill_that_fails_is_tried_again():
    env = world(seed=4, failure=0.5, drop=0.0)
    runner = loop(env, best(env))
    go(env, runner)
    assert isinstance(runner.ended(0), Done)
    assert not env.scene.unmet(env.errand.goals[0])
    assert {"success", "timeout"} == {e["outcome"] for e in events(runner, "end")}


def test_an_end_that_is_too_early_is_refused_and_the_planner_told():
    env = world()
    real = best(env)

    def hasty(context):
        if not context.rejections and len(context.records) < 2:
            return Done(reason="surely")
        return real.propose(context).candidates[0].subgoal

    planner = Told(hasty)
    runner = loop(env, planner)
    go(env, runner)
    assert isinstance(runner.ended(0), Done)
    assert not env.scene.unmet(env.errand.goals[0])
    verdicts = events(runner, "verdict")
    assert [v["accepted"] for v in verdicts][:2] == [False, False]
    refused = next(c for c in planner.contexts if c.rejections)
    assert refused.rejections[0].violations[0].kind == "not_done"


def test_without_the_second_key_the_hasty_end_stands():
    env = world()
    runner = loop(env, Told(lambda context: Done()), termination="planner", goal=None)
    assert go(env, runner) == []
    assert isinstance(runner.ended(0), Done)
    assert env.scene.unmet(env.errand.goals[0])


def test_a_refused_end_is_not_asked_about_again_before_something_changes():
    env = world()
    fallback = best(env)
    goal = Sworn(lambda context: False)
    planner = Told(lambda context: Done())
    runner = loop(env, planner, goal=goal, fallback=fallback, streak=0, retries=0)
    go(env, runner, steps=8)
    assert len(events(runner, "verdict")) >= 2, "after each change it may be asked again"
    begun = [e["step"] for e in events(runner, "begin")]
    verdicts = [e["step"] for e in events(runner, "verdict")]
    for first, second in itertools.pairwise(verdicts):
        assert any(first <= step < second for step in begun), "between two refusals something was done"


def test_the_goal_check_is_independent_and_looks_several_times():
    env = world()
    go(env, loop(env, best(env)))
    assert not env.scene.unmet(env.errand.goals[0])
    looks = [True, False, True, True, True, True]
    runner = loop(env, Told(lambda context: Done()), goal=Sworn(looks), streak=0)
    go(env, runner, steps=7)
    (verdict,) = events(runner, "verdict")
    assert verdict["accepted"]
    assert verdict["looks"] == 5, "a no in between costs two looks"


def test_a_goal_that_is_seen_several_times_in_a_row_ends_the_work_although_the_planner_goes_on():
    env = world()
    go(env, loop(env, best(env)))
    undo = Told(lambda context: does(env, "open the drawer"))
    runner = loop(env, undo, goal=Sworn([True, True, False, True, True, True]), streak=3)
    env.failure = 1.0  # nothing that it goes on with comes about
    go(env, runner, steps=9)
    assert isinstance(runner.ended(0), Done)
    assert runner.ended(0).reason == "the goal was seen to be reached"
    assert runner.log(0)[-1]["step"] == 6, "from the second step on it is looked at"


def test_the_goal_alone_may_end_the_work():
    env = world()
    runner = loop(env, best(env), termination="goal", streak=2)
    go(env, runner)
    assert runner.ended(0) == Done(reason="the goal was seen to be reached")
    assert not events(runner, "verdict")


def test_what_is_impossible_is_refused_with_a_reason_and_the_next_best_is_done():
    env = world(seed=1)
    env.facts = env.library.call("close", "drawer").apply(env.facts)
    ball = env.errand.goals[0][0].args[0]
    wanted = [does(env, f"put the {ball} in the drawer"), does(env, "open the drawer")]
    runner = loop(env, Told(lambda context: wanted))
    go(env, runner, steps=1)
    (proposal,) = events(runner, "proposal")
    assert proposal["candidates"][0]["violations"] == [f"precondition: put the {ball} in the drawer needs open(drawer)"]
    assert events(runner, "begin")[0]["text"] == "open the drawer"


@pytest.mark.parametrize(
    ("subgoal", "kind"),
    [
        (LanguageSubgoal(text="dance"), "unknown_skill"),
        (does(world(), "open the drawer"), ""),
    ],
)
def test_the_gate_knows_its_skills(subgoal, kind):
    env = world()
    env.facts = env.library.call("close", "drawer").apply(env.facts)
    runner = loop(env, Told(lambda context: subgoal), retries=0)
    go(env, runner, steps=1)
    found = events(runner, "proposal")[0]["candidates"][0]["violations"]
    assert [v.partition(":")[0] for v in found] == ([kind] if kind else [])
    assert isinstance(runner.ended(0), Infeasible if kind else type(None))


def test_what_is_not_there_is_no_object():
    env = world()
    call = env.library.call("place_in", "plaid cube", "red bowl")
    runner = loop(env, Told(lambda context: LanguageSubgoal(text=call.instruction, call=call)), retries=0)
    go(env, runner, steps=1)
    violations = events(runner, "proposal")[0]["candidates"][0]["violations"]
    assert "unknown_object: there is no plaid cube" in violations
    assert runner.ended(0).kind == "stuck"


def test_the_same_in_vain_is_a_loop():
    env = world(failure=1.0, drop=0.0)
    env.facts = env.library.call("close", "drawer").apply(env.facts)
    runner = loop(env, Told(lambda context: does(env, "open the drawer")), gate=Gate(repeats=3), retries=0)
    go(env, runner)
    assert len(events(runner, "begin")) == 3
    assert "loop" in events(runner, "proposal")[-1]["candidates"][0]["violations"][0]
    assert runner.ended(0).kind == "stuck"


@pytest.mark.parametrize(
    "subgoal", [Ask(question="which cube?", options=("a", "b")), Infeasible(kind="x", reason="no")]
)
def test_questions_and_refusals_hold_the_robot_still(subgoal):
    env = world()
    runner = loop(env, Told(lambda context: subgoal))
    assert go(env, runner) == []
    assert runner.ended(0) == subgoal
    seen = Observation(state=np.zeros(1, np.float32), instruction="anything")
    assert float(runner.act([seen], [0])[0, 0]) == WAIT


def test_the_fallback_is_asked_when_the_planner_knows_nothing():
    env = world()
    runner = loop(env, Told(lambda context: []), fallback=best(env))
    go(env, runner)
    assert isinstance(runner.ended(0), Done)
    assert {e["planner"] for e in events(runner, "proposal")} == {"told", "symbolic"}


def test_who_insists_on_an_end_that_is_refused_is_not_asked_any_more():
    env = world()
    real, said = best(env), []

    def insisting(context):
        said.append(context.step)
        nearest = real.propose(context).candidates[0].subgoal
        return [Done(), nearest] if len(said) % 2 else [nearest]

    runner = loop(env, Told(insisting), goal=Sworn(lambda c: False), fallback=best(env), streak=0, patience=1)
    env.failure = 1.0
    go(env, runner, steps=30)
    asked = [e["planner"] for e in events(runner, "proposal")]
    assert asked[0] == "told"
    assert asked[-1] == "symbolic"
    last = max(k for k, name in enumerate(asked) if name == "told")
    assert set(asked[last + 1 :]) == {"symbolic"}


def gone(context):
    raise ServerError("no language model at 127.0.0.1:1")


def test_a_planner_whose_server_is_gone_holds_the_robot_still_and_says_why():
    env = world()
    runner = loop(env, Told(gone))
    assert go(env, runner) == []
    assert runner.ended(0) == Infeasible(kind="planner", reason="no language model at 127.0.0.1:1")
    assert "no language model" in events(runner, "proposal")[0]["raw"]


def test_a_planner_whose_server_is_gone_is_stood_in_for():
    env = world()
    runner = loop(env, Told(gone), fallback=best(env))
    go(env, runner)
    assert isinstance(runner.ended(0), Done)
    assert not env.scene.unmet(env.errand.goals[0])


@pytest.mark.parametrize("latency", [0, 2])
def test_a_slow_planner_costs_its_steps_and_nothing_else(latency):
    env = world()
    runner = loop(env, best(env), latency=latency, streak=0)
    actions = go(env, runner)
    begun = [e["step"] for e in events(runner, "begin")]
    asked = len(events(runner, "proposal"))
    assert isinstance(runner.ended(0), Done)
    assert sum(a == WAIT for a in actions) == asked * latency + 3, "three looks at the end"
    assert begun[0] == latency


def test_a_planner_in_a_thread_of_its_own_is_waited_for_and_its_answer_stamped():
    env, gate = world(), threading.Event()
    real = best(env)

    def slow(context):
        gate.wait(10.0)
        return real.propose(context).candidates[0].subgoal

    planner = Told(slow)
    runner = loop(env, planner, asynchronous=True, streak=0)
    assert go(env, runner, steps=3) == [WAIT] * 3, "it holds still while nothing is known"
    gate.set()
    runner._lanes[0].waiting.answer.result(10.0)
    for _ in range(60):
        go(env, runner, steps=1)
        waiting = runner._lanes[0].waiting
        if waiting is not None:
            waiting.answer.result(10.0)
    assert isinstance(runner.ended(0), Done)
    assert not env.scene.unmet(env.errand.goals[0])
    assert events(runner, "proposal")[0]["age"] == 3
    assert planner.contexts[0].step == 0


def test_a_running_subgoal_goes_on_while_the_next_is_asked_for():
    env = world(failure=1.0, drop=0.0, max_steps=40)
    env.facts = env.library.call("close", "drawer").apply(env.facts)
    texts = iter(("first", "second", "third", "fourth"))
    runner = loop(
        env,
        Told(lambda context: LanguageSubgoal(text=next(texts))),
        gate=Gate(open_vocabulary=True),
        detector=None,
        goal=Sworn(lambda c: False),
        every=2,
        latency=3,
        streak=0,
    )
    runner._limit = lambda subgoal: 100
    told, act = [], runner.policy.act

    def watched(observations, lanes):
        told.extend(o.instruction for o in observations)
        return act(observations, lanes)

    runner.policy.act = watched
    go(env, runner, steps=14)
    assert told == ["first"] * 5 + ["second"] * 5 + ["third"], "asked for after two steps, there after three more"
    assert [e["outcome"] for e in events(runner, "end")] == ["aborted", "aborted"]


def test_a_proposal_is_of_what_was_seen_when_it_was_asked_for():
    env = world()
    planner = Told(lambda context: does(env, "open the drawer"))
    env.facts = env.library.call("close", "drawer").apply(env.facts)
    runner = loop(env, planner, latency=3)
    go(env, runner, steps=3)
    assert len(planner.contexts) == 1
    assert planner.contexts[0].step == 0


def test_an_instruction_that_changes_ends_what_was_begun():
    env = world(failure=1.0, drop=0.0)
    texts = []

    def answer(context):
        texts.append(context.instruction)
        return does(env, "open the drawer")

    env.facts = env.library.call("close", "drawer").apply(env.facts)
    runner = loop(env, Told(answer), goal=Sworn(lambda c: False), streak=0)
    go(env, runner, steps=1, instruction="first")
    runner._lanes[0].began = 0
    go(env, runner, steps=1, instruction="second")
    assert texts[0] == "first"
    assert texts[-1] == "second"
    assert [e["text"] for e in events(runner, "instruction")] == ["first", "second"]
    assert runner._lanes[0].begun is not None


def test_a_question_is_answered_by_another_instruction():
    env = world()
    real = best(env)

    def answer(context):
        if context.instruction == "that one":
            return real.propose(replace(context, instruction=env.errand.instruction)).candidates[0].subgoal
        return Ask(question="which?", options=("this one", "that one"))

    runner = loop(env, Told(answer))
    assert go(env, runner) == []
    assert isinstance(runner.ended(0), Ask)
    go(env, runner, instruction="that one")
    assert isinstance(runner.ended(0), Done)
    assert not env.scene.unmet(env.errand.goals[0])


def test_what_was_done_for_another_instruction_is_past_and_no_history():
    env = world()
    things = [literal.args[0] for literal in env.errand.goals[0][:2]]
    planner = Told(lambda context: does(env, "open the drawer") if not context.records else Done())
    env.facts = env.library.call("close", "drawer").apply(env.facts)
    runner = loop(env, planner, goal=Sworn(lambda c: False), streak=0, retries=0)
    go(env, runner, steps=2, instruction="first")
    planner.answer = lambda context: does(env, f"put the {things[0]} in the drawer")
    go(env, runner, steps=2, instruction="second")
    planner.answer = lambda context: Ask(question="what now?")
    go(env, runner, steps=1, instruction="third")
    last = planner.contexts[-1]
    assert last.instruction == "third"
    assert last.records == ()
    assert [(text, [str(p) for p in undone]) for text, undone in last.past] == [
        ("open the drawer", ["not open(drawer)"]),
        (f"put the {things[0]} in the drawer", [f"on({things[0]}, table)"]),
    ]


def test_a_check_that_errs_at_the_end_is_asked_again_where_nobody_knows_anything_else_to_do():
    env = world()
    go(env, loop(env, best(env)))
    looks = [False, False, False, True, True, True, True]
    runner = loop(env, best(env), goal=Sworn(looks), fallback=best(env), streak=0)
    go(env, runner, steps=12)
    assert isinstance(runner.ended(0), Done)


def test_an_end_that_is_never_true_is_stuck_in_the_end():
    env = world()
    runner = loop(env, Told(lambda context: Done()), goal=Sworn(lambda c: False), streak=0)
    go(env, runner, steps=60)
    assert runner.ended(0).kind == "stuck"


def test_lanes_do_not_disturb_each_other():
    envs = [world(seed=k, failure=0.3) for k in range(3)]

    def run(chosen):
        for env, seed in zip(envs, range(3)):
            env.reset(seed=seed)
        policy = CallPolicy(instructions=envs[0].instructions, embodiment=envs[0].spec_embodiment)
        goals = _ByContext(envs)
        runner = HierarchicalRunner(
            planner=SymbolicPlanner(library=envs[0].library, goals=goals),
            policy=policy,
            hold=wait,
            scenes=SceneOf(lambda lane: envs[lane].scene),
            detector=LiteralSuccess(),
            goal=Erring(inner=LiteralGoal(goals=goals), false_positive=0.1, false_negative=0.1, salt=3),
        )
        for lane in chosen:
            runner.reset(lane, lane)
        for _ in range(25):
            seen = [Observation(state=np.zeros(1, np.float32), instruction=envs[k].errand.instruction) for k in chosen]
            for lane, action in zip(chosen, runner.act(seen, chosen)):
                envs[lane].step(action)
        return {lane: [_without_time(e) for e in runner.log(lane)] for lane in chosen}

    together = run([0, 1, 2])
    for lane in range(3):
        assert run([lane])[lane] == together[lane]


class _ByContext:
    def __init__(self, envs):
        self.envs = envs

    def __call__(self, context):
        env = next(e for e in self.envs if e.errand.instruction == context.instruction)
        return TrueGoals(env)(context)


def _without_time(event):
    return {k: v for k, v in event.items() if k != "latency_s"}


def test_a_script_is_done_in_its_order():
    env = world()
    ball = env.errand.goals[0][0].args[0]
    env.facts = env.library.call("close", "drawer").apply(env.facts)
    script = ["open(drawer)", f"store({ball}, drawer)", "close(drawer)"]
    runner = loop(env, ScriptPlanner(library=env.library, script=script), termination="planner", goal=None)
    go(env, runner)
    assert [e["call"] for e in events(runner, "begin")] == script
    assert isinstance(runner.ended(0), Done)


def test_errors_of_looks_come_as_often_as_asked_and_by_seed():
    env = world()
    erring = Erring(inner=LiteralGoal(goals=TrueGoals(env)), false_positive=0.1, false_negative=0.3, salt=1)
    seen = Observation(state=np.zeros(1, np.float32), instruction=env.errand.instruction)
    runner = loop(env, best(env))
    context = runner._context(seen, 0)
    said = [erring.check(replace(context, step=k), 0).ok for k in range(3000)]
    assert 230 <= sum(said) <= 370
    assert said[:50] == [erring.check(replace(context, step=k), 0).ok for k in range(50)]


def test_records_tell_how_subgoals_ended():
    env = world(failure=1.0, drop=0.0)
    env.facts = env.library.call("close", "drawer").apply(env.facts)
    planner = Told(lambda context: does(env, "open the drawer"))
    runner = loop(env, planner)
    go(env, runner, steps=3)
    record = planner.contexts[-1].records[0]
    assert isinstance(record, StepRecord)
    assert record.outcome is Outcome.TIMEOUT
    assert record.steps == 1
    assert record.before.facts == env.facts


def test_mistakes_are_told():
    env = world()
    with pytest.raises(ConfigError, match="termination to be one of"):
        loop(env, best(env), termination="never")
    with pytest.raises(ConfigError, match="needs a check of the goal"):
        loop(env, best(env), goal=None)
    with pytest.raises(ConfigError, match="streak of at least 1"):
        loop(env, best(env), termination="goal", streak=0)
    with pytest.raises(ConfigError, match="latency"):
        loop(env, best(env), latency=-1)
    with pytest.raises(ConfigError, match="needs to know the scene"):
        go(env, loop(env, best(env), scenes=None))
    assert Evidence().decide(()) == "open"


def test_tasks_in_a_row_count_where_they_are_done_when_the_system_says_so():
    env = world(families=())
    whole = run_planned_chain(env, loop(env, best(env)), 5)
    assert (whole["done"], whole["ended"]) == (5, "done")
    assert whole["steps"] >= 5
    assert len(set(whole["tasks"])) > 1
    env = world(families=())
    hasty = loop(env, Told(lambda context: Done()), termination="planner")
    told = run_planned_chain(env, hasty, 5)
    assert (told["done"], told["ended"]) == (0, "not done"), "its word alone is no work"
    env = world(families=(), failure=1.0)
    slow = run_planned_chain(env, loop(env, best(env)), 5, limit=4)
    assert (slow["done"], slow["ended"], slow["steps"]) == (0, "out of time", 4)


def test_a_task_of_a_chain_is_what_success_is_from_then_on():
    env = world(families=())
    calls = env.chain(7)
    env.say(calls[0])
    assert env.observe()["instruction"] == calls[0].instruction
    number = env.instructions.index(calls[0].instruction)
    _, _, _, _, info = env.step(np.array([number], np.float32))
    assert info["success"]
    assert info["task"] == "chain"
    env.say(calls[1])
    _, _, _, _, info = env.step(np.array([-1], np.float32))
    assert not info["success"]
    assert not info["ever"]
