"""Policies towards pictures, inverse dynamics, the progress filter, and what readings are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sliding_squares import CAMERAS, FLOW, REGRESSION, make_reading, make_spec, picture

from brachium.errors import CheckpointError, SpecMismatchError
from brachium.vla.generative.augment import blur, degrade, relight
from brachium.vla.generative.frames import FrameData, shrink
from brachium.vla.generative.goal_policy import GoalPolicy
from brachium.vla.generative.progress import ProgressFilter
from brachium.vla.generative.reading import Reading, other_texts

SIZES = {"vision": 48, "grid": 8, "goal_size": 16, "goals": CAMERAS, "action_horizon": 2, "width": 16}


def pair(now, later, size=32):
    """Images of both cameras with the square at two places: uint8 (1, n, size, size, 3) each."""
    return tuple(torch.from_numpy(np.stack([picture(x, size)] * len(CAMERAS)))[None] for x in (now, later))


def batch_of(places, ahead):
    """The present in patches (b, n, 64, 48), goals, states, actions of squares moved by an action of `ahead` / 6."""
    pairs = [pair(x, x + d) for x, d in zip(places, ahead)]
    now, goal = (torch.cat(each) for each in zip(*pairs))
    now = (
        now.unflatten(2, (8, 4)).unflatten(4, (8, 4)).transpose(3, 4).flatten(4).flatten(2, 3) / 255.0
    )  # patches of 4 px
    state = torch.zeros(len(places), 10)
    state[:, 0] = torch.as_tensor(places, dtype=torch.float32)
    action = torch.zeros(len(places), 2, 2)
    action[:, :, 0] = torch.as_tensor(ahead, dtype=torch.float32)[:, None] / 6.0
    return now, goal, state, action


@pytest.mark.parametrize("head", [REGRESSION, FLOW], ids=["inverse dynamics", "goal policy"])
def test_motion_between_two_frames_is_read_off_them(head):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    policy = GoalPolicy(embodiment=make_spec(), head=head, keypoints=8, **SIZES)
    training = batch_of(rng.integers(6, 20, 400).tolist(), rng.integers(-6, 7, 400).tolist())
    policy.fit(training[2], training[3][:, 0])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    draws, steps = torch.Generator().manual_seed(0), 160
    for k in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1.0 - k / steps)
        rows = torch.from_numpy(rng.integers(0, 400, 48))
        now, goal, state, action = (each[rows] for each in training)
        loss = policy.loss(now, shrink(goal, 16), state, action, torch.ones(48, 2, dtype=torch.bool), draws).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    now, goal, state, action = batch_of([7, 9, 12, 16, 18], [5, -3, 0, -6, 4])
    found = policy.eval().predict(now, shrink(goal, 16), state, torch.zeros(5, 2, 2))
    assert float((found - action)[:, 0, 0].abs().max()) < 0.25  # a pixel and a half of twelve
    assert torch.equal(found[:, :, 1], torch.zeros(5, 2))  # what never moves in the data never moves
    blurred = degrade(shrink(goal, 16).movedim(-1, -3).float() / 127.5 - 1.0, draws)
    seen = ((blurred.movedim(-3, -1) + 1.0) * 127.5).clamp(0, 255).to(torch.uint8)
    assert float((policy.predict(now, seen, state, torch.zeros(5, 2, 2)) - action)[:, 0, 0].abs().max()) < 0.4


def test_actions_stay_within_the_limits_of_the_robot():
    torch.manual_seed(0)
    policy = GoalPolicy(embodiment=make_spec(), head=FLOW, keypoints=4, **SIZES)
    policy.get_buffer("action_scale").fill_(100.0)
    now, goal, state, _ = batch_of([8, 9], [3, -3])
    found = policy.predict(now, shrink(goal, 16), state, torch.randn(2, 2, 2))
    assert float(found.abs().max()) <= 1.0


def test_what_was_executed_is_the_label_of_near_goals_only(slides):
    data = FrameData.open(str(slides.path), 16, 0.0)
    data = replace(data, executed=data.action + 5.0)
    chunk, real = data.chunk(np.array([0, 0]), 3, np.array([2, 0]))
    torch.testing.assert_close(chunk[0, :2], data.action[:2] + 5.0)
    torch.testing.assert_close(chunk[0, 2], data.action[2])
    torch.testing.assert_close(chunk[1], data.action[:3])
    assert bool(real.all())
    last = int(data.last[0])
    _, real = data.chunk(np.array([last - 1]), 3)
    assert real.tolist() == [[True, True, False]]
    assert data.ahead(np.array([last - 1]), 5).tolist() == [last]  # the last frame repeats


def test_degrading_by_nothing_changes_nothing_and_blur_keeps_the_mean():
    images = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    draws = torch.Generator().manual_seed(0)
    assert torch.equal(degrade(images, draws, 0.0), images)
    assert torch.equal(relight(images, draws, 0.0), images)
    torch.testing.assert_close(blur(images, torch.zeros(2)), images)
    flat = torch.full((2, 1, 3, 8, 8), 0.3)
    torch.testing.assert_close(blur(flat, torch.tensor([0.5, 1.5])), flat)
    dot = torch.zeros(1, 1, 3, 9, 9)
    dot[..., 4, 4] = 1.0
    spread = blur(dot, torch.tensor([1.0]))
    assert float(spread.sum()) == pytest.approx(3.0, rel=1e-4)
    assert float(spread[0, 0, 0, 4, 4]) < 0.3


def test_progress_is_told_from_its_reverse_and_from_another_instruction():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = ProgressFilter(size=16, cameras=2, words=96, width=32)
    said = {1: make_reading(1, seed=1), -1: make_reading(1, seed=2)}

    def batch(count):
        ways, right = rng.choice([-1, 1], count), rng.random(count) < 0.5
        places = rng.integers(8, 18, count)
        pairs = [pair(x, x + 6 * (way if ok else -way)) for x, way, ok in zip(places, ways, right)]
        present, later = (shrink(torch.cat(each), 16) for each in zip(*pairs))
        rows = [said[int(way)] for way in ways]
        reading = Reading(**{k: torch.cat([getattr(r, k) for r in rows]) for k in ("words", "uv", "visible")})
        return present, later, reading, torch.from_numpy(right.astype(np.float32))

    optimizer, draws = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.Generator().manual_seed(0)
    for _ in range(150):
        present, later, reading, label = batch(32)
        loss = model.loss(present, later, reading, label, draws).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    present, later, reading, label = batch(64)
    scores = model.eval().score(present, later, reading)
    assert float(scores.max()) <= 0.0  # logarithms of probabilities
    good, bad = scores[label > 0.5], scores[label < 0.5]
    # The share of pairs in which a future that was asked for is ranked before one that was not.
    assert float((good[:, None] > bad[None]).float().mean()) > 0.95


def test_spots_are_where_a_reading_points_and_as_bright_as_it_is_visible():
    reading = Reading(
        words=torch.zeros(1, 4),
        uv=torch.tensor([[[[0.25, 0.75], [0.5, 0.5]], [[0.9, 0.1], [0.0, 0.0]]]]),
        visible=torch.tensor([[[1.0, 0.5], [1.0, 0.0]]]),
    )
    spots = reading.spots(32)
    assert spots.shape == (1, 4, 32, 32)
    place = spots[0, 0].flatten().argmax()
    assert (int(place) % 32 + 0.5) / 32 == pytest.approx(0.25, abs=0.02)
    assert (int(place) // 32 + 0.5) / 32 == pytest.approx(0.75, abs=0.02)
    assert float(spots[0, 1].max()) == pytest.approx(0.5, abs=0.05)
    assert float(spots[0, 3].max()) == 0.0


def test_the_shipped_model_points_at_what_is_named_whatever_is_read_beside_it(reader):
    image = np.full((96, 96, 3), 150, np.uint8)
    image[60:72, 20:32] = (220, 30, 30)
    images = torch.from_numpy(np.stack([image, image]))[None]
    alone = reader(images, ["reach the red cube"])
    first, second = reader.read(images, [["reach the red cube"], ["push the blue cube to the green zone"]])
    torch.testing.assert_close(alone.uv, first.uv, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(first.words, second.words)
    u, v = first.uv[0, 0, 0].tolist()
    assert (u, v) == (pytest.approx(26 / 96, abs=0.08), pytest.approx(66 / 96, abs=0.08))


def test_readers_refuse_robots_with_other_cameras(reader):
    with pytest.raises(SpecMismatchError, match="trained with cameras"):
        reader.require(("front", "side"))


def test_another_instruction_is_another_one(slides):
    data = FrameData.open(str(slides.path), 16, 0.0)
    for own, other in zip(slides.instructions, other_texts(data)):
        assert own != other


def test_policies_name_only_trusted_classes(slides, reader):
    from brachium.vla.generative.system import SubgoalSystem

    with pytest.raises(CheckpointError, match="refusing to import"):
        SubgoalSystem(
            kind="visual",
            embodiment=make_spec(),
            cameras=("front",),
            reader=reader,
            generator={"size": 16, "frames": 1, "steps": 2, "widths": [16, 32], "patch": 2},
            policy={"head": {"_target_": "subprocess.Popen"}},
            progress={},
        )
