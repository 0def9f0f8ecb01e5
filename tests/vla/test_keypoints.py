"""The keypoint backbone: places against closed forms, shifts against slices, and what must not matter."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.errors import ConfigError
from brachium.vla.backbones.keypoints import KeypointBackbone, keypoints, shifted

SIDE = 32


def make(**options):
    torch.manual_seed(0)
    options = {"width": 32, "channels": (8, 16, 16), "keypoints": 6, "image_size": SIDE, "heads": 2, **options}
    return KeypointBackbone(vocab_size=30, **options).eval()


def inputs(b=3, n=2, length=5, side=SIDE):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (b, n, side, side, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(2, 30, (b, length), generator=generator)
    mask = torch.arange(length) >= torch.tensor([0, 2, 3])[:b, None]
    return images, tokens, mask


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(0, 12), st.floats(0.5, 3.0))
def test_a_sharp_peak_is_where_it_is(row, column, sharpness):
    scores = torch.zeros(1, 1, 10, 13)
    scores[0, 0, row, column] = 60.0
    where, height = keypoints(scores, torch.full((1, 1), sharpness).log())
    expected = torch.tensor([-1 + 2 * column / 12, -1 + 2 * row / 9])
    torch.testing.assert_close(where[0, 0], expected, atol=1e-5, rtol=0)
    flat = np.zeros(130)
    flat[0] = 60 * sharpness
    peak = np.log(np.exp(flat - flat.max()).sum()) + flat.max() - np.log(130)
    np.testing.assert_allclose(height.item(), peak / 4, rtol=1e-5)


def test_places_are_means_of_the_softmax():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(4, 5, 6, 7, generator=generator)
    log_sharpness = torch.randn(5, 1, generator=generator)
    where, _ = keypoints(scores, log_sharpness)
    for i in range(4):
        for k in range(5):
            shares = np.exp(scores[i, k].numpy().astype(float) * np.exp(log_sharpness[k].item()))
            shares /= shares.sum()
            u, v = (shares * np.linspace(-1, 1, 7)).sum(), (shares * np.linspace(-1, 1, 6)[:, None]).sum()
            np.testing.assert_allclose(where[i, k].numpy(), [u, v], atol=1e-5)


def test_a_shift_moves_each_picture_as_a_whole():
    torch.manual_seed(5)
    pictures = torch.rand(40, 3, 9, 9)
    moved = shifted(pictures, 2)
    found = set()
    for picture, after in zip(pictures, moved):
        padded = np.pad(picture.numpy(), ((0, 0), (2, 2), (2, 2)), mode="edge")
        places = [(y, x) for y in range(5) for x in range(5) if np.array_equal(padded[:, y : y + 9, x : x + 9], after)]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 12  # of 25: not all by the same


def test_training_shifts_and_acting_does_not():
    backbone = make(shift=3)
    images, tokens, mask = inputs()
    first, again = (backbone.read(images, tokens, mask).states for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    backbone.train().requires_grad_(False)
    torch.manual_seed(1)
    moved = backbone.read(images, tokens, mask).states
    torch.manual_seed(1)
    torch.testing.assert_close(moved, backbone.read(images, tokens, mask).states, rtol=0, atol=0)  # by the seed alone
    assert (moved - first).abs().max() > 1e-3


def test_fresh_tokens_tell_pictures_apart():
    """Small squares on one ground, of which a fresh network sees little."""
    rng = np.random.default_rng(0)
    images = np.full((64, 2, SIDE, SIDE, 3), 200, np.uint8)
    for k, (y, x) in enumerate(rng.integers(0, SIDE - 3, (64, 2))):
        images[k, :, y : y + 3, x : x + 3] = 20
    tokens = torch.full((64, 4), 5)
    backbone = make(shift=0).train()
    spread = backbone.read(torch.from_numpy(images), tokens, tokens > 0).states[:, 1:3].std(0).mean()
    assert spread > 0.6, spread  # 0.3 without centring; tokens have a norm of one a channel


def test_features_are_centred_by_the_first_batches_and_by_no_other(monkeypatch):
    monkeypatch.setattr("brachium.vla.backbones.keypoints.WATCHED", 2)
    images, tokens, mask = inputs(b=3)
    backbone = make(shift=0, cameras=3).train()
    features = []
    backbone.centre.register_forward_pre_hook(lambda _, args: features.append(args[0].detach()))
    backbone.requires_grad_(False)  # frozen: what it read says nothing about what it will be trained on
    backbone.read(images, tokens, mask)
    assert (backbone.centre.count == 0).all()
    backbone.requires_grad_(True)
    backbone.read(images, tokens, mask)
    backbone.read(images.flip(0) // 2, tokens, mask)
    seen = torch.cat(features[1:])
    torch.testing.assert_close(backbone.centre.mean[:2], seen.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(backbone.centre.square[:2], seen.square().mean(0), atol=1e-5, rtol=1e-4)
    assert backbone.centre.count.flatten().tolist() == [2, 2, 0]  # a camera that was not there
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.read(images // 3, tokens, mask)
    backbone.eval()
    backbone.read(images, tokens, mask)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_tokens_are_one_for_the_words_one_a_camera_and_what_is_added():
    backbone = make()
    images, tokens, mask = inputs()
    extra = torch.randn(3, 2, 32)
    prefix = backbone.read(images, tokens, mask, extra=extra, image_mask=torch.tensor([[1, 0], [1, 1], [0, 1]]).bool())
    assert prefix.states.shape == (3, 5, 32)
    assert prefix.spans == {"text": slice(0, 1), "images": slice(1, 3), "extra": slice(3, 5)}
    assert prefix.mask.tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [1, 0, 1, 1, 1]]
    torch.testing.assert_close(prefix.states[:, 3:], extra)


def test_padding_before_the_words_does_not_matter():
    backbone = make()
    images, tokens, _ = inputs(b=2)
    plain = backbone.read(images, tokens, torch.ones_like(tokens).bool()).states
    longer = torch.nn.functional.pad(tokens, (4, 0))
    padded = backbone.read(images, longer, longer > 0).states
    torch.testing.assert_close(plain, padded, atol=1e-5, rtol=1e-5)


def test_words_decide_what_is_looked_for():
    """Two instructions, two squares: keypoints must come to lie on the named one, from pictures alone."""
    torch.manual_seed(0)
    backbone = make(shift=2, channels=(16, 16, 16)).train()
    read_off = torch.nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*backbone.parameters(), *read_off.parameters()], 3e-3)
    rng = np.random.default_rng(0)

    def batch(count):
        images, places = np.full((count, 1, SIDE, SIDE, 3), 90, np.uint8), rng.integers(2, SIDE - 6, (count, 2, 2))
        for k in range(count):
            for which, color in enumerate(((230, 30, 30), (30, 30, 230))):
                y, x = places[k, which]
                images[k, 0, y : y + 4, x : x + 4] = color
        asked = rng.integers(2, size=count)
        target = places[np.arange(count), asked] / SIDE
        return torch.from_numpy(images), torch.from_numpy(asked[:, None] + 2), torch.from_numpy(target).float()

    for _ in range(220):
        images, tokens, target = batch(48)
        seen = backbone.read(images, tokens, tokens > 0).states[:, 1]
        loss = (read_off(seen) - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    backbone.eval()
    images, tokens, target = batch(100)
    with torch.no_grad():
        found = read_off(backbone.read(images, tokens, tokens > 0).states[:, 1])
    error = (found - target).abs().mean() * SIDE
    assert error < 2.5, error  # pixels; whoever does not listen is off by 5 and more


def test_what_does_not_fit_is_said():
    with pytest.raises(ConfigError, match="multiples of 8"):
        make(channels=(8, 12, 16))
    with pytest.raises(ConfigError, match="image_size as a multiple of 8"):
        make(image_size=30)
    with pytest.raises(ConfigError, match="a width of even heads"):
        make(width=30)
    images, tokens, mask = inputs()
    backbone = make(cameras=1)
    with pytest.raises(ConfigError, match="2 cameras and 5 words, more than cameras=1"):
        backbone.read(images, tokens, mask)
    prefix = make().read(images, tokens, mask)
    with pytest.raises(ConfigError, match="no layers to go on reading"):
        backbone.extend(prefix, torch.zeros(3, 1, 32), torch.ones(3, 1).bool())
    with pytest.raises(ConfigError, match="writes no words"):
        backbone.embed(tokens)
    with pytest.raises(ConfigError, match="writes no words"):
        backbone.next_words(torch.zeros(3, 32))
