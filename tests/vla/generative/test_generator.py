"""The generator: guidance by its formula, flows against closed forms, and a batch learnt by heart."""

import pytest
import torch
from sliding_squares import make_reading
from torch import nn

from brachium.errors import ConfigError
from brachium.vla.generative.frames import to_pixels, to_unit
from brachium.vla.generative.generator import LEAST, FrameGenerator, Guidance, inflated
from brachium.vla.generative.unet import UNet
from brachium.vla.heads.solvers import integrate

SIZE = 16


def make_generator(frames=1, widths=(16, 32), patch=2, seed=0, **options):
    torch.manual_seed(seed)
    return FrameGenerator(size=SIZE, cameras=2, frames=frames, steps=2, words=96, widths=widths, patch=patch, **options)


class Linear(nn.Module):
    """In place of the network: a change that is known for every combination of conditions."""

    scale = 1

    def __init__(self, frames):
        super().__init__()
        self.frames = frames

    def forward(self, x, t, condition):
        seen, told = condition[:, -2], condition[:, -1]
        level = 0.1 + 0.2 * seen + 0.4 * told
        return level[:, None, None, None, None].expand(len(x), self.frames, 6, SIZE, SIZE)


@pytest.mark.parametrize(("image", "text"), [(1.0, 1.0), (1.0, 2.5), (2.0, 3.0), (1.5, 1.5), (0.0, 0.0)])
def test_two_weight_guidance_is_the_formula_of_instructpix2pix(image, text):
    model = make_generator()
    model.net = Linear(1)
    b, t = 3, 0.7
    x = torch.randn(b, 1, 2, 3, SIZE, SIZE)
    present = torch.randn(b, 2, 3, SIZE, SIZE)
    found = model.field(x, t, present, make_reading(b), Guidance(image=image, text=text))

    def v(seen, told):  # the field of each combination: (x - data) / t, the data being the change plus what is seen
        return (x - (present[:, None] * seen + 0.1 + 0.2 * seen + 0.4 * told)) / t

    expected = v(0, 0) + image * (v(1, 0) - v(0, 0)) + text * (v(1, 1) - v(1, 0))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_a_plain_sample_asks_for_one_field_only():
    assert Guidance(image=1.0, text=1.0).terms == ((True, True, 1.0),)
    assert [term[:2] for term in Guidance(image=1.0, text=2.0).terms] == [(True, False), (True, True)]
    assert len(Guidance(image=2.0, text=3.0).terms) == 3
    assert sum(term[2] for term in Guidance(image=2.2, text=3.1).terms) == pytest.approx(1.0)


class GaussianData(nn.Module):
    """In place of the network: the best guess of data from N(mean, deviation^2), which is known in closed form."""

    scale = 1

    def __init__(self, mean, deviation):
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, x, t, condition):
        noisy = x[:, :, :6]
        t = t[:, None, None, None, None]
        # E[data | t noise + (1 - t) data = x] of two Gaussians
        gain = (1 - t) * self.deviation**2 / (t**2 + (1 - t) ** 2 * self.deviation**2)
        guess = self.mean + gain * (noisy - (1 - t) * self.mean)
        return guess - x[:, :, 6:12]  # the network says the change from the present


def test_the_sampler_recovers_a_known_gaussian():
    model, mean, deviation = make_generator(), 0.3, 0.2
    model.net = GaussianData(mean, deviation)
    b = 64
    present = torch.randn(b, 2, 3, SIZE, SIZE)
    noise = model.noise(b, torch.Generator().manual_seed(0))
    guidance = Guidance(text=1.0, steps=60, solver="midpoint")
    reading = make_reading(b)
    found = integrate(lambda x, t: model.field(x, t, present, reading, guidance), noise, 60, "midpoint")
    assert float(found.mean()) == pytest.approx(mean, abs=0.01)
    assert float(found.std()) == pytest.approx(deviation, rel=0.06)


def test_the_last_euler_step_lands_on_the_guess():
    model = make_generator()
    present = to_unit(torch.randint(0, 255, (2, 2, SIZE, SIZE, 3), dtype=torch.uint8))
    reading, x = make_reading(2), torch.randn(2, 1, 2, 3, SIZE, SIZE)
    for size in (0.5, LEAST):
        landed = x - size * model.field(x, size, present, reading, Guidance(text=1.0))
        seen = torch.ones(2, dtype=torch.bool)
        torch.testing.assert_close(landed, model.guess(x, torch.full((2,), size), present, reading, seen, seen))


def test_an_untrained_editor_says_that_nothing_changes():
    model = make_generator()
    present = torch.randint(0, 256, (2, 2, SIZE, SIZE, 3), dtype=torch.uint8)
    noise = model.noise(2, torch.Generator().manual_seed(1))
    found = model.sample(present, make_reading(2), noise, Guidance(text=1.0, steps=4))
    assert torch.equal(found[:, 0], present)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_batch_is_learnt_by_heart(frames):
    model = make_generator(frames, widths=(32, 64), drop=0.0)
    draws = torch.Generator().manual_seed(0)
    present = torch.full((2, 2, SIZE, SIZE, 3), 60, dtype=torch.uint8)
    future = present[:, None].repeat(1, frames, 1, 1, 1, 1)
    future[0, :, :, 2:8, 2:8, 0] = 250  # the words decide: the present is the same
    future[1, :, :, 8:14, 8:14, 2] = 250
    reading = make_reading(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = torch.arange(2).repeat(3)
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1.0 - step / 120)
        loss = model.loss(to_unit(future)[rows], to_unit(present)[rows], reading.rows(rows), draws).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = model.noise(2, torch.Generator().manual_seed(5))
    found = model.eval().sample(present, reading, noise, Guidance(text=1.0, steps=6))
    error = (found.float() - future.float()).abs().mean()
    unmoved = (present[:, None].float() - future.float()).abs().mean()
    assert float(error) < 0.35 * float(unmoved)
    swapped = model.sample(present, reading.rows(torch.tensor([1, 0])), noise, Guidance(text=1.0, steps=6))
    assert float((swapped.float() - future.flip(0).float()).abs().mean()) < 0.5 * float(unmoved)


def test_a_short_round_trip_stays_near_and_a_whole_one_is_a_sample():
    model = make_generator()
    present = torch.randint(0, 256, (1, 2, SIZE, SIZE, 3), dtype=torch.uint8)
    future = torch.randint(0, 256, (1, 1, 2, SIZE, SIZE, 3), dtype=torch.uint8)
    noise, reading = model.noise(1, torch.Generator().manual_seed(2)), make_reading(1)
    whole = model.round_trip(future, present, reading, noise, 1.0, 4)
    assert torch.equal(whole, model.sample(present, reading, noise, Guidance(text=1.0, steps=4)))
    with pytest.raises(ConfigError, match="level above 0"):
        model.round_trip(future, present, reading, noise, 0.0, 4)


def test_an_inflated_editor_makes_its_picture_in_every_frame():
    editor, video = make_generator(1), make_generator(3, seed=1)
    nn.init.normal_(editor.net.leave[-1].weight, std=0.1)
    nn.init.normal_(editor.net.attention.answer.weight, std=0.1)
    own = video.state_dict()
    taken = inflated(editor.state_dict(), own)
    video.load_state_dict({**own, **taken})
    x, present = torch.randn(2, 1, 2, 3, SIZE, SIZE), torch.randn(2, 2, 3, SIZE, SIZE)
    reading = make_reading(2)
    one = editor.field(x, 0.6, present, reading, Guidance(text=1.0))
    three = video.field(x.expand(-1, 3, -1, -1, -1, -1), 0.6, present, reading, Guidance(text=1.0))
    torch.testing.assert_close(three, one.expand_as(three), atol=1e-4, rtol=1e-4)


def test_frames_of_a_video_see_each_other():
    torch.manual_seed(0)
    net = UNet(inputs=2, outputs=1, frames=4, widths=(8, 16), condition=3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 4, 2, 8, 8)
    t, condition = torch.full((1,), 0.5), torch.randn(1, 3)
    base = net(x, t, condition)
    changed = x.clone()
    changed[:, 3] += 1.0
    assert float((net(changed, t, condition) - base)[:, 0].detach().abs().max()) > 1e-4


def test_pixels_survive_the_way_to_floats_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(1, 32, 32, 3)
    assert torch.equal(to_pixels(to_unit(pixels)), pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"frames": 0}, "frames and steps from 1"), ({"drop": 0.7}, "drop in"), ({"widths": (12, 20)}, "multiples of 8")],
)
def test_impossible_generators_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_generator(**options)
    with pytest.raises(ConfigError, match="multiple of"):
        FrameGenerator(size=18, cameras=1, frames=1, steps=1, words=4, widths=(16, 32), patch=2)
