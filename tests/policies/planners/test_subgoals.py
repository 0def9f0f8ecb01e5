"""Planners that generate pictures, and the pursuit of pictures under the loop of all planners."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sliding_squares import FLOW, make_spec, picture

from brachium.errors import ConfigError, SpecMismatchError
from brachium.policies.executor import RecedingHorizon
from brachium.policies.planners.album import Album
from brachium.policies.planners.base import (
    Candidate,
    ImageSubgoal,
    LanguageSubgoal,
    PlanContext,
    Proposal,
    VideoSubgoal,
)
from brachium.policies.planners.imagine import NativeImaginer
from brachium.policies.planners.pursuit import GOAL, Pursuit
from brachium.policies.planners.runner import HierarchicalRunner
from brachium.policies.planners.subgoals import SubgoalRunner
from brachium.policies.planners.video import VideoPlanner
from brachium.policies.planners.visual import VisualPlanner
from brachium.spec import Observation
from brachium.vla.generative.generator import Guidance
from brachium.vla.generative.others import Others
from brachium.vla.generative.reading import Reader
from brachium.vla.generative.system import SubgoalSystem

EXECUTOR = partial(RecedingHorizon, execute_horizon=1)


def make_system(frames=1, seed=0):
    torch.manual_seed(seed)
    system = SubgoalSystem(
        kind="visual" if frames == 1 else "video",
        embodiment=make_spec(),
        cameras=("front",),
        reader=Reader.load("nano"),
        generator={"size": 16, "frames": frames, "steps": 3 if frames == 1 else 2, "widths": [16, 32], "patch": 2},
        policy={"head": FLOW, "action_horizon": 2, "width": 16, "keypoints": 4},
        progress={"width": 16},
    )
    strange = {name: np.stack([picture(20), picture(24)]) for name in ("front", "wrist")}
    system.others = Others(frames=strange, texts=("go left", "stay"))
    for parameter in system.generator.net.leave.parameters():  # as built it says that nothing changes
        torch.nn.init.normal_(parameter, std=0.05)
    return system.eval()


@pytest.fixture(scope="module")
def system():
    return make_system()


def observation(x=8, text="go right"):
    state = np.zeros(10, np.float32)
    state[0] = x
    return Observation(images={"front": picture(x), "wrist": picture(x)}, state=state, instruction=text)


def context(seed=3, step=0, x=8):
    return PlanContext(instruction="go right", observation=observation(x), seed=seed, step=step)


def test_candidates_are_ranked_by_progress_and_the_same_seed_gives_the_same(system):
    planner = VisualPlanner(system=system, candidates=5, guidance=Guidance(steps=2))
    first, again = planner.propose(context()), planner.propose(context())
    scores = [candidate.score for candidate in first.candidates]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    for one, other in zip(first.candidates, again.candidates):
        assert np.array_equal(one.subgoal.images["front"], other.subgoal.images["front"])
    moved = planner.propose(context(step=1)).candidates[0].subgoal.images["front"]
    assert not np.array_equal(moved, first.candidates[0].subgoal.images["front"])
    subgoal = first.candidates[0].subgoal
    assert (subgoal.horizon, subgoal.text, subgoal.images["front"].shape) == (3, "go right", (16, 16, 3))


def test_without_the_filter_candidates_come_as_they_were_drawn(system):
    planner = VisualPlanner(system=system, candidates=3, rank=False, guidance=Guidance(steps=2), horizon=7)
    found = planner.propose(context())
    imagined = NativeImaginer(system, Guidance(steps=2)).imagine(
        context().observation.images, "go right", 3, [3, 0, 0x5B6]
    )
    for k, candidate in enumerate(found.candidates):
        assert np.array_equal(candidate.subgoal.images["front"], imagined.frames["front"][k, -1])
        assert candidate.terms == {}
        assert candidate.subgoal.horizon == 7


@pytest.mark.parametrize("shuffle", ["image", "text"])
def test_shuffled_subgoals_are_of_something_else(system, shuffle):
    honest = VisualPlanner(system=system, rank=False, guidance=Guidance(steps=2))
    shuffled = VisualPlanner(system=system, rank=False, guidance=Guidance(steps=2), shuffle=shuffle)
    mine, other = (planner.propose(context()).candidates[0].subgoal for planner in (honest, shuffled))
    assert not np.array_equal(mine.images["front"], other.images["front"])
    assert other.text == "go right"  # the log says what was asked
    if shuffle == "image":  # what is seen does not matter then
        elsewhere = shuffled.propose(context(x=20)).candidates[0].subgoal
        assert np.array_equal(other.images["front"], elsewhere.images["front"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "at least 1 candidate"),
        ({"shuffle": "txt"}, "Did you mean 'text'"),
        ({"horizon": 0}, "horizon"),
    ],
)
def test_planners_that_cannot_be_are_refused(system, options, message):
    with pytest.raises(ConfigError, match=message):
        VisualPlanner(system=system, **options)


def test_a_planner_wants_a_system_of_its_kind(system):
    with pytest.raises(ConfigError, match="train-visual: type planner=visual"):
        VideoPlanner(system=system)
    with pytest.raises(ConfigError, match="train-video: type planner=video"):
        VisualPlanner(system=make_system(frames=3))


def test_a_video_is_followed_frame_by_frame():
    system = make_system(frames=3)
    planner = VideoPlanner(system=system, candidates=1, follow=2, guidance=Guidance(steps=2))
    subgoal = planner.propose(context()).candidates[0].subgoal
    assert isinstance(subgoal, VideoSubgoal)
    assert subgoal.frames["front"].shape == (2, 16, 16, 3)
    pursuit = Pursuit(system, EXECUTOR)
    shown = []
    inner = pursuit.executor.act

    def watched(observations, lanes):
        shown.append(observations[0].images[f"{GOAL}front"])
        return inner(observations, lanes)

    pursuit.executor.act = watched
    pursuit.reset(0, 1)
    pursuit.pursue(0, subgoal, observation())
    for _ in range(6):
        pursuit.act([observation()], [0])
    for step, frame in enumerate((0, 0, 1, 1, 1, 1)):  # each for `steps` steps, then the last one goes on
        assert np.array_equal(shown[step], subgoal.frames["front"][frame])


def test_an_episode_does_not_depend_on_what_runs_beside_it(system):
    def actions(lanes):
        runner = SubgoalRunner(system, EXECUTOR, partial(VisualPlanner, candidates=2, guidance=Guidance(steps=2)))
        for lane in lanes:
            runner.reset(lane, 100 + lane)
        return [runner.act([observation(8 + lane + k) for lane in lanes], lanes)[lanes.index(1)] for k in range(5)]

    assert np.array_equal(actions([1]), actions([0, 1, 2]))


def test_the_runner_hands_subgoals_on_and_asks_anew_when_their_time_is_over(system):
    runner = SubgoalRunner(system, EXECUTOR, partial(VisualPlanner, candidates=2, guidance=Guidance(steps=2)))
    runner.reset(0, 25)
    for k in range(8):
        runner.act([observation(8 + k)], [0])
    begins = [event["step"] for event in runner.log(0) if event["event"] == "begin"]
    assert begins == [0, 3, 6]
    entries = runner.album.entries
    assert len(entries) == 2  # the third is still pursued
    assert np.array_equal(entries[0].seen["front"], picture(8))
    assert np.array_equal(entries[0].came["front"], picture(11))


class Pictures:
    name = "pictures"

    def propose(self, context):
        subgoal = ImageSubgoal(images={"front": picture(3)}, horizon=2, text="go")
        return Proposal(candidates=(Candidate(subgoal=subgoal),))


def test_a_policy_that_reads_words_says_that_it_cannot_pursue_pictures(system):
    class Words:
        embodiment = make_spec()

        def reset(self, lane, seed):
            pass

        def act(self, observations, lanes):
            return np.zeros((len(lanes), 2), np.float32)

    runner = HierarchicalRunner(
        planner=Pictures(), policy=Words(), hold=lambda o: np.zeros(2, np.float32), termination="planner"
    )
    runner.reset(0, 0)
    with pytest.raises(
        ConfigError, match="Words follows instructions in words, and planner pictures proposes ImageSub"
    ):
        runner.act([observation()], [0])


def test_a_pursuit_takes_pictures_of_its_cameras_and_nothing_else(system):
    pursuit = Pursuit(system, EXECUTOR)
    pursuit.reset(0, 0)
    with pytest.raises(ConfigError, match="act before pursue"):
        pursuit.act([observation()], [0])
    with pytest.raises(ConfigError, match="reads no words, got 'go right'"):
        pursuit.pursue(0, LanguageSubgoal(text="go right"), observation())
    with pytest.raises(SpecMismatchError, match=r"pictures of \['front'\], got \['wrist'\]"):
        pursuit.pursue(0, ImageSubgoal(images={"wrist": picture(3)}, horizon=2), observation())
    pursuit.pursue(0, ImageSubgoal(images={"front": picture(3)}, horizon=2), observation())
    assert pursuit.act([observation()], [0]).shape == (1, 2)
    blind = replace(observation(), images={"front": picture(3)})
    with pytest.raises(ConfigError, match=r"missing \['wrist'\]"):
        VisualPlanner(system=system).propose(replace(context(), observation=blind))


def test_the_album_draws_what_it_kept(tmp_path):
    album = Album()
    assert album.write(tmp_path / "none.png") is None
    album.begin(0, 50)
    album.begin(1, 51)  # not one of those that are kept
    for k in range(3):
        for lane in (0, 1):
            album.pursue(lane, observation(8 + k), {"front": picture(3 + k)[None]}, "go right")
    assert len(album.entries) == 2
    assert album.write(tmp_path / "subgoals.png").stat().st_size > 300
