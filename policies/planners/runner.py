"""One loop for every planner: propose, check, execute, look, and end by two keys."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...errors import ConfigError, ServerError
from ...spec import EmbodimentSpec, Observation
from ...symbols import Literal, Scene
from ..base import Policy
from .base import (
    Ask,
    Candidate,
    Done,
    GoalChecker,
    ImageSubgoal,
    Infeasible,
    LanguageSubgoal,
    LatentSubgoal,
    Outcome,
    PlanContext,
    Planner,
    Proposal,
    Rejection,
    SceneEstimator,
    StepRecord,
    Subgoal,
    SuccessDetector,
    VideoSubgoal,
    Violation,
    describe,
    subgoal_row,
    unclear,
)
from .evidence import OPEN, YES, Evidence
from .gate import Gate
from .goals import HOLDERS, Past, Unclear
from .lm.base import Unreadable

TERMINATIONS = ("two_key", "planner", "goal")
"""Who ends the work: the planner and the goal check together, either of them alone."""
MOST_INSISTED = 5
"""How often a refused end is checked again although nothing changed, where nobody knows anything else to do."""
FAILED = "failed: "
"""What the raw text of a proposal begins with where its planner failed."""
DEFAULT_LIMIT_S = 10.0
"""Of a subgoal that states none [s]."""


@dataclass
class _Request:
    """A proposal that was asked for at a step, and will be here at another, or when its worker is ready."""

    planner: Planner
    asked: int
    due: int
    answer: Future[Proposal]


@dataclass
class _Lane:
    """What one robot is doing."""

    seed: int = 0
    step: int = 0
    instruction: str | None = None
    begun: Scene | None = None
    history: list[StepRecord | Rejection] = field(default_factory=list)
    past: Past = ()
    subgoal: Subgoal | None = None
    began: int = 0
    before: Scene | None = None
    looks: list[bool] = field(default_factory=list)
    """Whether the present subgoal, or while `verifying` the whole work, is reached: fresh looks."""
    verifying: bool = False
    streak: int = 0
    refused_at: frozenset[Any] | None = None
    """Facts at which the end was last refused: it is not proposed again before something changes."""
    refused: int = 0
    counted: int = -1
    """Step at which a refusal was last counted."""
    insisted: int = 0
    first: int = 0
    """Where in the history the present instruction began."""
    waiting: _Request | None = None
    ended: Subgoal | None = None
    log: list[dict[str, Any]] = field(default_factory=list)


class HierarchicalRunner:
    """A planner over a policy; itself a policy.

    The planner proposes subgoals, best first; the first that the gate lets through is executed by the policy, which is
    told it as its instruction. Detectors end it; the planner is told how. The work ends when the planner says so *and*
    an independent check of the goal agrees over several fresh looks ("two keys"); or when that check says so several
    times in a row although the planner would go on. A refused end is told to the planner with the reason; where there
    is a fallback it does not count again before the scene changes, and after more than `patience` refusals only the
    fallback is asked; where nobody knows anything else to do, the goal is looked at again. Another instruction begins
    another piece of work, also after the end of one: that is how a question is answered.

    Args:
        planner: Says what to do next.
        policy: Does it.
        hold: The action (a,) that keeps the robot where it is.
        scenes: Says what is there; planners and gate do without where None.
        detector: Says whether a subgoal is reached; where None a subgoal runs until its time is over.
        goal: Says whether the work is finished; needed for every termination but ``planner``.
        gate: Refuses what cannot be.
        fallback: Asked when the planner proposes nothing that may be done, or insists on an end that is refused.
        termination: One of `TERMINATIONS`.
        evidence: How many looks at the goal it takes to end.
        confirm: Looks in a row that tell that a subgoal is reached.
        streak: Looks in a row that end the work although the planner goes on; 0 for never.
        patience: Refused ends before the fallback is asked.
        every: Ask again after so many steps of a subgoal, which goes on until the answer is there; only at its end when
            None.
        latency: Steps that a proposal takes to come, for measuring what slow planners cost.
        asynchronous: Ask in a thread of its own; meanwhile the robot goes on, or holds still if it has nothing to do.
        retries: How often the planner is asked anew when all it proposed was refused; it is told why.
        look_every: Steps between two looks at the scene, the subgoal and the goal, for scenes that cost time to read.
    """

    def __init__(
        self,
        *,
        planner: Planner,
        policy: Policy,
        hold: Callable[[Observation], np.ndarray],
        scenes: SceneEstimator | None = None,
        detector: SuccessDetector | None = None,
        goal: GoalChecker | None = None,
        gate: Gate | None = None,
        fallback: Planner | None = None,
        termination: str = "two_key",
        evidence: Evidence | None = None,
        confirm: int = 1,
        streak: int = 3,
        patience: int = 2,
        every: int | None = None,
        latency: int = 0,
        asynchronous: bool = False,
        retries: int = 2,
        look_every: int = 1,
    ) -> None:
        if termination not in TERMINATIONS:
            raise ConfigError(f"expected termination to be one of {TERMINATIONS}, got {termination!r}")
        if termination != "planner" and goal is None:
            raise ConfigError(f"termination={termination} needs a check of the goal; or type termination=planner")
        if termination == "goal" and streak < 1:
            raise ConfigError("termination=goal ends the work by looks in a row: expected streak of at least 1, got 0")
        if latency < 0 or min(confirm, look_every) < 1 or (every is not None and every < 1):
            raise ConfigError(
                "expected latency of at least 0, confirm, look_every and every of at least 1, got "
                f"{latency}, {confirm}, {look_every} and {every}"
            )
        self.planner, self.policy, self.hold = planner, policy, hold
        self.embodiment: EmbodimentSpec = policy.embodiment
        self.scenes, self.detector, self.goal = scenes, detector, goal
        self.gate, self.fallback, self.termination = gate or Gate(), fallback, termination
        self.evidence, self.confirm = evidence or Evidence(), confirm
        self.streak, self.patience, self.every, self.latency = streak, patience, every, latency
        self.retries, self.asynchronous, self.look_every = retries, asynchronous, look_every
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner") if asynchronous else None
        self._lanes: dict[int, _Lane] = {}

    # -- as a policy ---------------------------------------------------------------------------------------------------

    def reset(self, lane: int, seed: int) -> None:
        """Begin a piece of work."""
        self._lanes[lane] = _Lane(seed=seed)
        self.policy.reset(lane, seed)
        if self.scenes is not None:
            self.scenes.reset(lane)

    def act(self, observations: Sequence[Observation], lanes: Sequence[int]) -> np.ndarray:
        """Actions (n, a): of the policy where it has a subgoal, else those that hold still."""
        actions = np.zeros((len(lanes), self.embodiment.action.dim), np.float32)
        told: list[tuple[int, Observation, int]] = []
        for row, (observation, lane) in enumerate(zip(observations, lanes)):
            subgoal = self._decide(observation, lane)
            if subgoal is None:
                actions[row] = self.hold(observation)
            else:
                told.append((row, replace(observation, instruction=_told(subgoal)), lane))
        if told:
            chosen = self.policy.act([seen for _, seen, _ in told], [lane for _, _, lane in told])
            actions[[row for row, _, _ in told]] = chosen
        return actions

    # -- what people ask -----------------------------------------------------------------------------------------------

    def tell(self, lane: int, past: Past) -> None:
        """What was done before the work began."""
        self._lanes[lane].past = past

    def ended(self, lane: int) -> Subgoal | None:
        """How the work ended: `Done`, `Ask` or `Infeasible`; None while it goes on."""
        return self._lanes[lane].ended

    def log(self, lane: int) -> list[dict[str, Any]]:
        """Every decision so far: proposals with their verdicts, beginnings and ends of subgoals."""
        return self._lanes[lane].log

    # -- the loop ------------------------------------------------------------------------------------------------------

    def _decide(self, observation: Observation, lane: int) -> Subgoal | None:
        """What the policy is told now; None to hold still."""
        state = self._lanes[lane]
        if state.ended is not None and str(observation.instruction) == state.instruction:
            return None
        state.ended = None  # another instruction, or the answer to a question
        busy = state.subgoal is not None or state.verifying
        if busy and state.step % self.look_every and str(observation.instruction) == state.instruction:
            state.step += 1
            return state.subgoal
        context = self._context(observation, lane)
        state.step += 1
        finished = False
        if self.goal is not None and context.step > 0 and (state.verifying or self.streak):
            finished = self.goal.check(context, lane).ok
        state.streak = state.streak + 1 if finished else 0
        if self.termination != "planner" and self.streak and state.streak >= self.streak:
            self._end(state, Done(reason="the goal was seen to be reached"))
            return None
        if state.verifying:
            self._verify(state, context, finished)
            return None
        if state.subgoal is not None:
            self._look(state, context, lane)
        if state.subgoal is not None and not (self.every and state.step - 1 - state.began >= self.every):
            return state.subgoal
        return self._plan(state, replace(context, history=tuple(state.history[state.first :])))

    def _context(self, observation: Observation, lane: int) -> PlanContext:
        state, told = self._lanes[lane], str(observation.instruction)
        scene = None if self.scenes is None else self.scenes.estimate(observation, lane)
        if told != state.instruction:
            self._instruct(state, told, scene)
        return PlanContext(
            instruction=told,
            observation=observation,
            scene=scene,
            begun=state.begun,
            history=tuple(state.history[state.first :]),
            past=state.past,
            step=state.step,
            seed=state.seed,
        )

    def _instruct(self, state: _Lane, told: str, scene: Scene | None) -> None:
        """Take up an instruction; one that changes on the way ends what was done for the other."""
        if state.instruction is not None:
            if state.subgoal is not None:
                self._abort(state)
            state.waiting, state.verifying, state.looks = None, False, []
            state.refused_at, state.refused, state.insisted, state.streak = None, 0, 0, 0
            done = [record for record in state.history[state.first :] if isinstance(record, StepRecord)]
            state.past = (*state.past, *(entry for record in done if (entry := _undoable(record)) is not None))
            state.first = len(state.history)
        state.instruction, state.begun = told, scene
        self._note(state, "instruction", text=told)

    def _look(self, state: _Lane, context: PlanContext, lane: int) -> None:
        """End the present subgoal where it is reached or its time is over."""
        assert state.subgoal is not None
        spent = state.step - 1 - state.began
        outcome = None
        if self.detector is not None and spent > 0:
            state.looks.append(self.detector.check(context, state.subgoal, lane).ok)
            last = state.looks[-self.confirm :]
            outcome = Outcome.SUCCESS if len(last) == self.confirm and all(last) else None
        if outcome is None and spent >= self._limit(state.subgoal):
            outcome = Outcome.TIMEOUT if self.detector is not None else Outcome.SUCCESS
        if outcome is not None:
            if self.every is None:
                state.waiting = None  # what was asked for before this ended is no answer to it
            record = StepRecord(subgoal=state.subgoal, outcome=outcome, steps=spent, before=state.before)
            state.history.append(record)
            self._note(state, "end", outcome=str(outcome), **subgoal_row(state.subgoal))
            state.subgoal = None

    def _limit(self, subgoal: Subgoal) -> int:
        """Steps of control that a subgoal may take."""
        if isinstance(subgoal, ImageSubgoal):
            return max(1, subgoal.horizon)
        if isinstance(subgoal, VideoSubgoal):
            return max(1, subgoal.steps * min(len(frames) for frames in subgoal.frames.values()))
        seconds = DEFAULT_LIMIT_S
        if isinstance(subgoal, LanguageSubgoal) and subgoal.call is not None:
            seconds = subgoal.call.spec.time_limit_s
        return max(1, math.ceil(seconds * self.embodiment.control_hz))

    def _plan(self, state: _Lane, context: PlanContext) -> Subgoal | None:
        """Ask for a subgoal, and begin the first one that may be begun; the present one until then."""
        if state.waiting is None:
            state.waiting = self._request(state, context)
        request = state.waiting
        if state.step < request.due or not request.answer.done():
            return state.subgoal
        state.waiting = None
        proposal = request.answer.result()
        accepted = self._first(state, context, request, proposal)
        if accepted is None and state.subgoal is not None:
            return state.subgoal
        for _ in range(0 if self.asynchronous else self.retries):
            if accepted is None:
                context = replace(context, history=tuple(state.history[state.first :]))
                again = _Request(request.planner, state.step, state.step, request.answer)
                accepted = self._first(state, context, again, self._ask(request.planner, context))
        if accepted is None and self.fallback is not None:
            second = _Request(self.fallback, state.step, state.step, request.answer)
            accepted = self._first(state, context, second, self._ask(self.fallback, context))
        if accepted is None and self.termination == "goal" and self._all_say_done(state):
            return None  # hold still: the check of the goal decides
        if accepted is None and state.refused_at is not None and self._all_say_done(state):
            state.insisted += 1  # perhaps the check was wrong
            state.verifying, state.looks = state.insisted <= MOST_INSISTED, []
            if state.verifying:
                return None
        if accepted is None:
            kind, reason = "stuck", "no planner proposes what may be done"
            if proposal.raw.startswith(FAILED):
                kind, reason = "planner", proposal.raw.removeprefix(FAILED)
            self._end(state, Infeasible(kind=kind, reason=reason))
            return None
        return self._begin(state, context, accepted.subgoal)

    @staticmethod
    def _all_say_done(state: _Lane) -> bool:
        """Whether whoever was asked in this step said first that the work is finished."""
        asked = [e for e in state.log if e["event"] == "proposal" and e["step"] == state.step - 1]
        return bool(asked) and all(e["candidates"] and e["candidates"][0]["kind"] == "Done" for e in asked)

    def _request(self, state: _Lane, context: PlanContext) -> _Request:
        planner = self.planner
        if self.fallback is not None and state.refused > self.patience:
            planner = self.fallback  # the other one insists that all is done
        if self._pool is not None:
            answer = self._pool.submit(self._ask, planner, context)
        else:
            answer = Future()
            answer.set_result(self._ask(planner, context))
        return _Request(planner, state.step, state.step + self.latency, answer)

    def _begin(self, state: _Lane, context: PlanContext, subgoal: Subgoal) -> Subgoal | None:
        if isinstance(subgoal, (Ask, Infeasible)):
            self._end(state, subgoal)
            return None
        if isinstance(subgoal, Done):
            if self.termination == "planner":
                self._end(state, subgoal)
                return None
            if state.subgoal is not None:
                self._abort(state)
            state.verifying, state.looks = True, []
            return None
        if isinstance(subgoal, LatentSubgoal) and isinstance(state.subgoal, LatentSubgoal):
            self._pursue(state, context, subgoal)  # a newer one of the same stream: nothing ends
            state.subgoal, state.began = subgoal, state.step - 1
            return subgoal
        if state.subgoal is not None:
            if state.subgoal == subgoal:
                return subgoal  # it goes on
            self._abort(state)
        self._pursue(state, context, subgoal)
        state.subgoal, state.began, state.before, state.looks = subgoal, state.step - 1, context.scene, []
        self._note(state, "begin", **subgoal_row(subgoal))
        return subgoal

    def _pursue(self, state: _Lane, context: PlanContext, subgoal: Subgoal) -> None:
        """Hand a subgoal to a policy that pursues more than words (an optional method ``pursue``)."""
        if hasattr(self.policy, "pursue"):
            lane = next(lane for lane, other in self._lanes.items() if other is state)
            self.policy.pursue(lane, subgoal, context.observation)
        elif not isinstance(subgoal, LanguageSubgoal):
            raise ConfigError(
                f"{type(self.policy).__name__} follows instructions in words, and planner {self.planner.name} proposes "
                f"{type(subgoal).__name__}s. Expected a policy with pursue(lane, subgoal, observation), such as "
                "policies.planners.pursuit.Pursuit with a checkpoint of brachium train-visual or train-video"
            )

    def _abort(self, state: _Lane) -> None:
        """End the present subgoal for another."""
        assert state.subgoal is not None
        record = StepRecord(
            subgoal=state.subgoal, outcome=Outcome.ABORTED, steps=state.step - 1 - state.began, before=state.before
        )
        state.history.append(record)
        self._note(state, "end", outcome=str(Outcome.ABORTED), **subgoal_row(state.subgoal))
        state.subgoal = None

    @staticmethod
    def _ask(planner: Planner, context: PlanContext) -> Proposal:
        """What a planner proposes; nothing where what it asks is gone or answers nonsense."""
        begin = time.monotonic()
        try:
            proposal = planner.propose(context)
        except Unclear as error:
            proposal = Proposal(candidates=(Candidate(subgoal=unclear(error)),))
        except (ServerError, Unreadable) as error:
            proposal = Proposal(candidates=(), raw=f"{FAILED}{error}")
        return replace(proposal, latency_s=time.monotonic() - begin)

    def _first(self, state: _Lane, context: PlanContext, request: _Request, proposal: Proposal) -> Candidate | None:
        """The best candidate that nothing speaks against; the others' faults become history."""
        row: dict[str, Any] = {"planner": request.planner.name, "latency_s": round(proposal.latency_s, 6)}
        row |= {"age": state.step - request.asked, "candidates": []}
        accepted = None
        for candidate in proposal.candidates:
            violations = self._violations(state, context, candidate.subgoal)
            row["candidates"].append(
                {
                    **subgoal_row(candidate.subgoal),
                    "score": round(candidate.score, 4),
                    "terms": {k: round(v, 4) for k, v in candidate.terms.items()},
                    "violations": [f"{v.kind}: {v.text}" for v in violations],
                }
            )
            if not violations:
                accepted = candidate
                break
            state.history.append(Rejection(subgoal=candidate.subgoal, violations=violations))
        self._note(state, "proposal", raw=proposal.raw, accepted=accepted is not None, **row)
        return accepted

    def _violations(self, state: _Lane, context: PlanContext, subgoal: Subgoal) -> tuple[Violation, ...]:
        if not isinstance(subgoal, Done) or self.termination == "planner":
            return self.gate.check(context, subgoal)
        if self.termination == "goal":
            return (Violation(kind="not_done", text="only the check of the goal ends this work"),)
        unchanged = state.refused_at is not None and state.refused_at == _facts(context)
        if unchanged and (self.fallback is not None or state.refused > self.patience):
            if state.counted != state.step:  # several are asked within a step
                state.refused, state.counted = state.refused + 1, state.step
            return (Violation(kind="not_done", text="that was refused, and nothing has changed since"),)
        return ()

    def _verify(self, state: _Lane, context: PlanContext, finished: bool) -> None:
        """One more look at whether the work is finished."""
        state.looks.append(finished)
        decision = self.evidence.decide(tuple(state.looks))
        if decision == OPEN:
            return
        state.verifying = False
        self._note(state, "verdict", accepted=decision == YES, looks=len(state.looks))
        if decision == YES:
            self._end(state, Done(reason="planner and goal check agree"))
            return
        state.refused_at, state.refused = _facts(context), state.refused + 1
        violation = Violation(kind="not_done", text="the goal is not reached yet")
        state.history.append(Rejection(subgoal=Done(), violations=(violation,)))
        return

    def _end(self, state: _Lane, how: Subgoal) -> None:
        state.ended, state.subgoal = how, None
        self._note(state, "ended", **subgoal_row(how))

    @staticmethod
    def _note(state: _Lane, event: str, **row: Any) -> None:
        state.log.append({"step": state.step - 1, "event": event, **row})


def _undoable(record: StepRecord) -> tuple[str, tuple[Literal, ...]] | None:
    """A skill that succeeded, as something that can be undone: what it was, and what held before and no longer does."""
    subgoal = record.subgoal
    if record.outcome is not Outcome.SUCCESS or record.before is None or not isinstance(subgoal, LanguageSubgoal):
        return None
    if subgoal.call is None:
        return None
    before, after = record.before.facts, subgoal.call.apply(record.before.facts)
    lost = [fact for fact in sorted(before - after) if fact.pred in (*HOLDERS, "open")]
    gained = [-fact for fact in sorted(after - before) if fact.pred == "open"]
    return subgoal.text, (*lost, *gained)


def _told(subgoal: Subgoal) -> str:
    """The instruction of the policy."""
    return subgoal.text if hasattr(subgoal, "text") else describe(subgoal)


def _facts(context: PlanContext) -> frozenset[Any]:
    """What a refusal is bound to: the scene, or where nobody knows it what was executed so far."""
    return context.scene.facts if context.scene is not None else frozenset({("records", len(context.records))})
