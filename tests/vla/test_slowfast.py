"""The slow-fast pair: delays in training, a latent that is used, and what comes back from a folder."""

import numpy as np
import pytest
import torch

from brachium.errors import CheckpointError
from brachium.spec import Observation
from brachium.vla.judge import Features
from brachium.vla.pretrained import Pretrained
from brachium.vla.slowfast import Sizes, SlowFast, SlowFastModel, is_pair, shrunk
from brachium.vla.slowfast_train import Frames

SIZES = Sizes(latent=16, width=64, image=24, horizon=3, oldest=10)


@pytest.fixture(scope="module")
def nano():
    return Pretrained.load("nano")


@pytest.fixture(scope="module")
def spec(make_arm):
    return make_arm("arm6_ee").spec


@pytest.fixture(scope="module")
def frames(spec):
    """Made-up episodes of 12 and 8 steps in which the action is what the slow system saw when the episode began."""
    g = torch.Generator().manual_seed(0)
    n, lengths = 20, [12, 8]
    first = np.repeat([0, 12], lengths)
    slow = torch.randn(2, 30, generator=g)[torch.from_numpy((first > 0).astype(np.int64))]
    slow = slow + 0.01 * torch.randn(n, 30, generator=g)
    action = slow[:, : spec.action.dim].tanh()
    return Frames(
        slow=slow,
        images=torch.randint(0, 255, (n, 2, 24, 24, 3), dtype=torch.uint8, generator=g),
        state=torch.randn(n, spec.state.dim, generator=g),
        action=action,
        first=first,
        last=first + np.repeat(lengths, lengths) - 1,
    )


def made(spec, features=30, seed=0):
    torch.manual_seed(seed)
    return SlowFast(features, spec, SIZES)


def test_images_are_averaged_down():
    images = torch.randint(0, 255, (2, 3, 96, 96, 3), dtype=torch.uint8)
    expected = images.double().reshape(2, 3, 24, 4, 24, 4, 3).mean((3, 5))
    assert (shrunk(images, 24).double() - expected).abs().max() <= 0.5 + 1e-4


def test_latents_are_as_old_as_drawn_but_never_of_another_episode(frames):
    some, delays = np.array([5, 13, 19, 0]), np.array([3, 6, 2, 9])
    slow, age, _, _, action, real, share = frames.batch(some, delays, 3)
    assert age.tolist() == [3.0, 1.0, 2.0, 0.0]
    for row, frame in enumerate([2, 12, 17, 0]):
        assert torch.equal(slow[row], frames.slow[frame])
    assert real.tolist() == [[True] * 3, [True] * 3, [True, False, False], [True] * 3]
    assert share.tolist() == pytest.approx([5 / 11, 1 / 7, 1.0, 0.0])
    assert torch.equal(action[0, 2], frames.action[7])


def test_it_learns_what_only_the_latent_tells(frames, spec):
    """One batch is learnt; without its latent, or with another's, the same pair does much worse."""
    net = made(spec)
    net.fit(frames.slow, frames.state, frames.action)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    rows, generator = np.arange(20), torch.Generator().manual_seed(0)
    slow, age, images, state, action, real, share = frames.batch(rows, np.zeros(20, np.int64), 3)
    for _ in range(150):
        loss, _ = net.loss(net.slow(slow), age, images * 0, state, action, real, share, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    noise = torch.randn(20, 3, spec.action.dim, generator=generator)

    def error(z):
        found, _ = net.act(z, age, images * 0, state, noise)
        return float((found - action).abs()[real].mean())

    z = net.slow(slow).detach()
    right = error(z)
    assert right < 0.1
    assert error(z.flip(0)) > 2.0 * right
    assert error(z * 0) > 1.5 * right


@pytest.fixture
def pair(nano, spec):
    width = Features(nano)(
        torch.zeros(1, 2, 96, 96, 3, dtype=torch.uint8), torch.ones(1, 1, 20, dtype=torch.long), torch.zeros(1, 16)
    ).shape[-1]
    return SlowFastModel(net=made(spec, width).eval(), model=nano, embodiment=spec)


def seen(text="reach the red cube", seed=0):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 255, (96, 96, 3), dtype=np.uint8) for name in ("front", "wrist")}
    return Observation(images=images, state=rng.normal(size=16).astype(np.float32), instruction=text)


def test_it_is_the_same_after_it_is_loaded(tmp_path, pair):
    path = pair.save(tmp_path / "pair")
    loaded = SlowFastModel.load(path)
    assert is_pair(path)
    assert not is_pair(tmp_path)
    assert np.array_equal(loaded.think([seen()]), pair.think([seen()]))
    assert loaded.embodiment == pair.embodiment


def test_the_slow_system_reads_words(pair):
    one, other = pair.think([seen("reach the red cube"), seen("reach the blue ball")])
    assert np.abs(one - other).max() > 1e-3
    assert pair.think([seen("reach the blue ball")])[0] == pytest.approx(other, abs=1e-5)


def test_bad_input(tmp_path, pair):
    path = pair.save(tmp_path / "pair")
    with pytest.raises(CheckpointError, match="no slow-fast pair"):
        SlowFastModel.load(tmp_path)
    text = (path / "slowfast.json").read_text()
    (path / "slowfast.json").write_text(text.replace('"identity": "', '"identity": "0'))
    with pytest.raises(CheckpointError, match="another than it was trained on"):
        SlowFastModel.load(path)
    (path / "slowfast.json").write_text(text.replace('"latent": 16', '"latent": 17'))
    with pytest.raises(CheckpointError, match="no slow-fast pair"):
        SlowFastModel.load(path)
