"""The scene reader: which places it may say, its loss in closed form, that it learns, and what comes from a folder."""

import json
import math

import numpy as np
import pytest
import torch

from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.envs.longhorizon.skills import SkillTask
from brachium.envs.record import write_episode
from brachium.envs.scenes import SceneSampler
from brachium.errors import CheckpointError, ConfigError
from brachium.vla.optim import Optimization
from brachium.vla.pretrained import Pretrained
from brachium.vla.scene_reader import (
    SHARP,
    ReaderNet,
    Reading,
    SceneReader,
    Spotter,
    Universe,
    _seen_near,
    reading_loss,
    spot_loss,
)
from brachium.vla.scene_reader_train import Scenes, _details, _go_on, details_of, score, train_reader

NAMES = ("red cube", "blue cube", "green ball", "red bowl", "green zone", "drawer")
UNIVERSE = Universe(names=NAMES)


@pytest.fixture(scope="module")
def nano():
    return Pretrained.load("nano")


def test_only_what_can_hold_a_thing_is_said_to():
    allowed = UNIVERSE.may_hold()
    told = {(NAMES[i], NAMES[j]) for i, j in zip(*np.nonzero(allowed))}
    assert told == {
        *((x, y) for x in ("red cube", "blue cube", "green ball") for y in ("red bowl", "green zone", "drawer")),
        ("red cube", "blue cube"),
        ("blue cube", "red cube"),
    }
    net = ReaderNet(UNIVERSE, vision=5, patches={"front": 4}, body=3, width=16, depth=1)
    place = net(torch.randn(2, 4, 5), torch.randn(2, 3)).place
    assert place.shape == (2, 6, 8)
    assert torch.isinf(place[:, :, :6][:, ~torch.from_numpy(allowed)]).all()
    assert place[:, :, 6:].isfinite().all()


def test_loss_in_closed_form():
    """One thing in a bowl, with even odds everywhere: ln 2 for what is there, ln of the candidates for the place."""
    place = torch.full((1, 6, 8), -torch.inf)
    place[:, 0, [3, 4, 5, 6, 7]] = 0.0  # bowl, zone, drawer, table, gripper
    reading = Reading(present=torch.zeros(1, 6), place=place, open=torch.zeros(1))
    present = torch.tensor([[True, False, False, True, False, False]])
    target = torch.full((1, 6), -1)
    target[0, 0] = 3
    value, parts = reading_loss(reading, present, target, torch.tensor([1.0]))
    assert float(parts["place"]) == pytest.approx(math.log(3))  # zone and drawer are not there
    assert float(value) == pytest.approx(4.0 * math.log(2) + math.log(3) + 0.3 * math.log(2))
    nothing, parts = reading_loss(reading, present, torch.full((1, 6), -1), torch.tensor([float("nan")]))
    assert float(nothing) == pytest.approx(4.0 * math.log(2))


def test_it_learns_scenes_that_patches_tell():
    """Patches that spell out the scene: after training every held-out scene is read right."""
    g = torch.Generator().manual_seed(0)
    n = 400
    present = torch.rand(n, 6, generator=g) < 0.7
    place = torch.full((n, 6), -1)
    for row in range(n):
        for i in (0, 1, 2):
            options = [j for j in (3, 4) if present[row, j]] + [6]
            if present[row, i]:
                place[row, i] = options[int(torch.randint(len(options), (1,), generator=g))]
    opened = (torch.rand(n, generator=g) < 0.5).float()
    patches = torch.zeros(n, 7, 16)
    for i in range(6):  # patch i shows thing i: whether it is there and what holds it
        patches[:, i, i] = present[:, i].float() * 3.0
        patches[:, i, 6:14] = torch.nn.functional.one_hot(place[:, i].clamp(min=0), 8).float() * 3.0
    patches[:, 6, 14] = opened * 3.0
    hidden = torch.zeros_like(present)
    labels = {"present": present, "place": place, "open": opened, "hidden": hidden}
    scenes = Scenes(patches=patches.half(), body=torch.zeros(n, 3), **labels)
    torch.manual_seed(0)
    net = ReaderNet(UNIVERSE, vision=16, patches={"front": 7}, body=3, width=32, depth=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    for step in range(300):
        rows = torch.from_numpy(np.random.default_rng(step).integers(300, size=64))
        some = scenes.rows(rows)
        value, _ = reading_loss(some.read(net), some.present, some.place, some.open)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    found = score(net.eval(), scenes, torch.arange(300, 400))
    assert found["things"] > 0.95
    assert found["place"] > 0.95
    assert found["drawer"] > 0.95
    assert found["scene"] > 0.85


@pytest.fixture
def reader(nano):
    torch.manual_seed(0)
    patches = nano.patches(torch.zeros(1, 2, 96, 96, 3, dtype=torch.uint8))
    net = ReaderNet(
        UNIVERSE,
        vision=patches.shape[3],
        patches={"front": 144, "wrist": 144},
        body=len(nano.encoder.body),
        details={"front": 192},
        width=16,
        depth=1,
    )
    return SceneReader(net=net.eval(), universe=UNIVERSE, model=nano)


def test_it_is_the_same_after_it_is_loaded(tmp_path, reader):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (96, 96, 3), dtype=np.uint8) for _ in range(2)]
    state = rng.normal(size=16).astype(np.float32)
    closer = {"front": rng.integers(0, 255, (192, 192, 3), dtype=np.uint8)}
    path = reader.save(tmp_path / "reader").rename(tmp_path / "elsewhere")
    said, again = reader.read(images, state, closer), SceneReader.load(path).read(images, state, closer)
    assert torch.equal(said.present, again.present)
    assert torch.equal(said.place, again.place)
    assert not torch.equal(said.place, reader.read(images[::-1], state, closer).place)  # cameras are told apart
    blank = {"front": np.zeros((192, 192, 3), np.uint8)}
    assert not torch.equal(said.present, reader.read(images, state, blank).present)  # detail is looked at


def test_pictures_in_detail_come_with_their_scenes(recorded):
    """The detailed picture of every drawn row is the same view as its own small one, whichever store it is from."""
    stores = [EpisodeStore.open(path) for path in recorded]
    details, n = details_of(stores), [store.num_episodes for store in stores]
    blank = torch.zeros(sum(n), 0)
    labels = {"patches": blank, "body": blank, "present": blank, "place": blank, "open": blank, "hidden": blank}
    scenes = Scenes(**labels, stores=stores, details=details)
    rows = torch.tensor([n[0] + 3, 0, n[0] - 1, n[0], sum(n) - 1])
    found = scenes.rows(rows).details["front"].float()
    small = [stores[int(r >= n[0])].read_images("front", [int(r) - n[0] * int(r >= n[0])])[0] for r in rows]
    seen = torch.from_numpy(np.stack(small)).float()
    seen = torch.nn.functional.avg_pool2d(seen.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    apart = (found[:, None] - seen[None]).abs().mean((2, 3, 4))
    assert apart.argmin(1).tolist() == list(range(5))


def test_what_is_told_of_a_place_is_told_by_what_is_around_it():
    """A thing that moves by a cell moves the logits by a cell, and nothing far away."""
    torch.manual_seed(0)
    spotter = Spotter(96, 5, 24).eval()
    picture = torch.zeros(2, 96, 96, 3, dtype=torch.uint8)
    picture[0, 40:48, 40:48] = picture[1, 40:48, 48:56] = 200
    found = spotter(picture)
    assert found.shape == (2, 5, 12, 12)
    torch.testing.assert_close(found[0, :, 3:8, 3:8], found[1, :, 3:8, 4:9])
    empty = spotter(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))
    torch.testing.assert_close(found[0, :, :, 10], empty[0, :, :, 10])
    for size in (24, 100):
        with pytest.raises(ConfigError, match=rf"expected a multiple of 8 px from 32 on, got {size}"):
            Spotter(size, 5)


def test_spot_loss_against_its_equation():
    """Written out cell by cell, as in equation 1 of 1904.07850."""
    g = torch.Generator().manual_seed(0)
    spots = torch.randn(2, 3, 4, 6, generator=g)
    uv = torch.rand(2, 3, 2, generator=g)
    uv[0, 1], uv[1, 2] = torch.nan, torch.tensor([0.5, 1.2])
    total, count = 0.0, 0
    for b in range(2):
        for n in range(3):
            u, v = uv[b, n].tolist()
            inside = 0 <= u < 1 and 0 <= v < 1
            count += inside
            for y in range(4):
                for x in range(6):
                    p = 1 / (1 + math.exp(-float(spots[b, n, y, x])))
                    cx, cy = (math.floor(u * 6), math.floor(v * 4)) if inside else (99, 99)
                    near = math.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2) if inside else 0.0
                    if near == 1.0:
                        total -= (1 - p) ** 2 * math.log(p)
                    else:
                        total -= (1 - near) ** 4 * p**2 * math.log(1 - p)
    assert float(spot_loss(spots, uv)) == pytest.approx(total / count, rel=1e-5)
    assert float(spot_loss(spots, torch.full_like(uv, torch.nan))) > 0.0  # nothing is anywhere


def test_what_cannot_be_seen_teaches_nothing_of_its_presence():
    place = torch.full((1, 6, 8), -torch.inf)
    place[:, :, 6:] = 0.0
    present, nowhere = torch.tensor([[True, False, False, False, False, False]]), torch.full((1, 6), -1)
    logits = torch.tensor([[-9.0, -9.0, -9.0, -9.0, -9.0, -9.0]])
    reading = Reading(present=logits, place=place, open=torch.zeros(1))
    args = (reading, present, nowhere, torch.tensor([float("nan")]))
    assert float(reading_loss(*args)[0]) > 5.0
    assert float(reading_loss(*args, present.clone())[0]) < 0.01


def test_what_is_there_is_what_is_spotted_somewhere():
    net = _net({"front": 96}, 0)
    spots = {"front": torch.full((1, 6, 12, 12), -3.0)}
    spots["front"][0, 4, 7, 2] = 5.0
    assert net.there(spots).tolist() == [[-3.0, -3.0, -3.0, -3.0, 5.0, -3.0]]
    picture = {"front": torch.randint(0, 255, (2, 96, 96, 3), dtype=torch.uint8)}
    said = net(torch.randn(2, 144, 5), torch.randn(2, 3), picture)
    torch.testing.assert_close(said.present, net.there(said.spots))


def _net(details, seed, **more):
    torch.manual_seed(seed)
    return ReaderNet(UNIVERSE, vision=5, patches={"front": 144}, body=3, details=details, width=16, depth=1, **more)


def test_what_is_seen_near_a_thing_is_a_mean_over_where_it_seems_to_be():
    rng = np.random.default_rng(0)
    spots, features = rng.normal(0, 3, (2, 3, 4, 5)), rng.normal(0, 1, (2, 6, 4, 5))
    found = _seen_near(torch.from_numpy(spots), torch.from_numpy(features)).numpy()
    for b, n in np.ndindex(2, 3):
        share = np.exp(SHARP * spots[b, n]) / np.exp(SHARP * spots[b, n]).sum()
        seen = [(share * features[b, k]).sum() for k in range(6)]
        at = [(share * np.linspace(-1, 1, 5)).sum(), (share.T * np.linspace(-1, 1, 4)).sum()]
        np.testing.assert_allclose(found[b, n], [*seen, *at, 1 / (1 + np.exp(-spots[b, n].max()))], rtol=1e-5)


def test_queries_know_where_their_thing_is_seen():
    """Blind patches: what holds what is told by the picture in detail alone, and not without `near`."""
    count, n = 8, len(UNIVERSE.names)
    places, picture = torch.arange(count) % 2, torch.zeros(count, 32, 32, 3, dtype=torch.uint8)
    for k, place in enumerate(places):
        picture[k, 4:12, 4 + 16 * place : 12 + 16 * place] = 255
    inputs = torch.zeros(count, 4, 5), torch.zeros(count, 3), {"front": picture}
    present, there = torch.ones(count, n, dtype=torch.bool), torch.full((count, n), -1)
    there[:, 0] = n + places  # the first thing: on the table, or in the gripper
    uv, right = torch.full((count, n, 2), torch.nan), {}
    uv[:, 0] = torch.stack([0.25 + 0.5 * places, torch.full((count,), 0.25)], dim=1)
    for near in (False, True):
        torch.manual_seed(0)
        sizes = {"vision": 5, "patches": {"front": 4}, "body": 3, "width": 16, "depth": 1}
        net = ReaderNet(UNIVERSE, details={"front": 32}, near=near, **sizes)
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(70):
            reading = net(*inputs)
            loss, _ = reading_loss(reading, present, there, torch.full((count,), torch.nan))
            loss = loss + spot_loss(reading.spots["front"], uv)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right[near] = float((net(*inputs).place[:, 0].argmax(1) == there[:, 0]).float().mean())
    assert right[True] == 1.0
    assert right[False] == 0.5


def test_who_goes_on_from_a_reader_that_sees_nothing_near_begins_as_it_is():
    begun, net = _net({"front": 64}, 0, near=False), _net({"front": 64}, 1)
    _go_on(net, begun)
    inputs = torch.randn(2, 144, 5), torch.randn(2, 3), {"front": torch.randint(0, 255, (2, 64, 64, 3)).byte()}
    for ours, theirs in zip((net(*inputs).place, net(*inputs).present), (begun(*inputs).place, begun(*inputs).present)):
        assert torch.equal(ours, theirs)


def test_going_on_takes_sight_in_detail_whole_or_not_at_all():
    begun, inputs = _net({"front": 192}, 0), (torch.randn(2, 144, 5), torch.randn(2, 3))
    same, other, without = _net({"front": 192}, 1), _net({"front": 96}, 1), _net({}, 1)
    fresh = {name: value.clone() for name, value in other.spotters.state_dict().items()}
    picture = {"front": torch.randint(0, 255, (2, 192, 192, 3), dtype=torch.uint8)}
    for net in (same, other, without):
        _go_on(net, begun)
        small = {name: picture[name][:, :: 192 // size, :: 192 // size] for name, size in net.details.items()}
        assert torch.equal(net(*inputs, small).open, begun(*inputs, picture).open)
    assert torch.equal(same(*inputs, picture).present, begun(*inputs, picture).present)
    for name, value in other.spotters.state_dict().items():
        assert torch.equal(value, fresh[name]), "another size begins from nothing"
    with pytest.raises(ConfigError, match="of other sizes"):
        _go_on(ReaderNet(UNIVERSE, vision=5, patches={"front": 144}, body=3, width=24, depth=1), begun)


def test_details_are_checked_before_anything_is_computed(recorded):
    stores = [EpisodeStore.open(path) for path in recorded]
    assert _details(None, stores) == {"front": 48}
    assert _details({}, stores) == {}
    with pytest.raises(ConfigError, match=r"not every store has 96 px of camera 'front'; all have \{'front': 48\}"):
        _details({"front": 96}, stores)


def test_bad_input(tmp_path, reader):
    with pytest.raises(ConfigError, match="an image of each"):
        reader.read([np.zeros((96, 96, 3), np.uint8)], np.zeros(16, np.float32))
    with pytest.raises(ConfigError, match=r"pictures in detail of \{'front': 192\}"):
        reader.read([np.zeros((96, 96, 3), np.uint8)] * 2, np.zeros(16, np.float32))
    path = reader.save(tmp_path / "reader")
    with pytest.raises(CheckpointError, match="no scene reader"):
        SceneReader.load(tmp_path)
    text = (path / "reader.json").read_text()
    (path / "reader.json").write_text(json.dumps({**json.loads(text), "patches": 288}))
    with pytest.raises(CheckpointError, match="made by another version"):
        SceneReader.load(path)
    (path / "reader.json").write_text(text.replace('"identity": "', '"identity": "0'))
    with pytest.raises(CheckpointError, match="another than it was trained on"):
        SceneReader.load(path)
    (path / "reader.json").write_text(text.replace('"width": 16', '"width": 20'))
    with pytest.raises(CheckpointError, match="no scene reader"):
        SceneReader.load(path)


@pytest.fixture(scope="module")
def recorded(make_arm, tmp_path_factory):
    """Stores of a few labelled scenes: with cubes and bowls, and with a drawer too."""
    paths = []
    for name, skill, family in (("bowls", "place_in", "gather"), ("drawers", "store", "store")):
        task = SkillTask(skill=skill, families=(family,))
        sampler = SceneSampler(
            tasks=(task,), embodiment=make_arm("arm6_ee"), poses=2, skills=True, split="all", details={"front": 48}
        )
        paths.append(tmp_path_factory.mktemp("reader") / name)
        store = EpisodeStore.create(paths[-1], sampler.schema)
        with EpisodeWriter(store, fsync=False) as writer:
            for seed in range(25):
                for episode in sampler.record(seed):
                    write_episode(writer, episode)
    return [str(path) for path in paths]


def test_the_verb_trains_and_goes_on_from_a_reader(recorded, tmp_path):
    def train(stores, out, steps, **more):
        options = Optimization(steps=steps, batch_size=16, lr=1e-3, warmup=1, ema=0.0, precision="float32")
        sizes = {"width": 16, "depth": 1, "heldout": 10}
        assert train_reader(stores=stores, optimization=options, out=str(tmp_path / out), **sizes, **more) == 0
        return SceneReader.load(tmp_path / out / "reader")

    first = train(recorded, "first", 30)
    assert json.loads((tmp_path / "first" / "scores.json").read_text())["thing"] > 0.6
    assert first.details == {"front": 48}
    assert float(first.net.spotted.weight.detach() - 1.0) != 0.0, "what is seen in detail is learnt from"
    again = train(recorded[:1], "again", 1, init=str(tmp_path / "first" / "reader"))
    assert again.universe == first.universe, "what it knew it knows"
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(first.net.parameters(), again.net.parameters()))
    assert 0.0 < moved < 3e-3, "one step away from where it began"
    bowls = train(recorded[:1], "bowls", 1)
    assert "drawer" not in bowls.universe.names
    with pytest.raises(ConfigError, match="does not know drawer"):
        train(recorded, "wrong", 1, init=str(tmp_path / "bowls" / "reader"))
