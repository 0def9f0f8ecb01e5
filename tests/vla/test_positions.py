"""Learning positions: what the network can and cannot know, what it leaves alone, and what comes from a folder."""

import json

import pytest
import torch

from brachium.datasets.schema import StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.envs.record import write_episode
from brachium.envs.scenes import SceneSampler
from brachium.envs.tasks.stack import Stack
from brachium.errors import ConfigError, StoreError
from brachium.vla.grounding import METRES, Glimpse, PointReadout
from brachium.vla.optim import Optimization
from brachium.vla.positions_train import Seen, errors_of, joined, seen_of, train_positions
from brachium.vla.pretrained import Pretrained


def synthetic(count, seed, told=True):
    """One camera that looks straight down from 1 m: u and v say where only if something else says how high."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.rand(count, 1, 1, 3, generator=generator) * 0.2
    position[..., 2] = (torch.rand(count, 1, 1, generator=generator) < 0.5) * 0.2
    uv = 0.5 + position[..., None, :2] / (1.0 - position[..., None, 2:])
    seen = torch.zeros(count, 1, 1, 1, 4)
    if told:
        seen[..., 0] = position[..., None, 2] * 10
    found = Glimpse(
        logits=torch.zeros(count, 1, 1, 1, 0),
        uv=uv,
        visible=torch.full((count, 1, 1, 1), 9.0),
        seen=seen,
        role=torch.zeros(count, 1, 1, 3),
    )
    return Seen(found=found, body=torch.zeros(count, 3), position=position)


def fitted(data, steps=250):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        readout = PointReadout(width=3, vision_width=4, cameras=1, state_dim=3, tool=(0, 1, 2), hidden=64)
    readout.fit(data.body, data.position.flatten(0, -2).mean(0))
    optimizer = torch.optim.Adam(readout.parameters(), 5e-3)
    for _ in range(steps):
        loss = (readout.locate(data.found, data.body) - data.position).abs().mean() / METRES
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return readout


def test_one_camera_knows_a_height_only_by_what_it_sees():
    """Two heights are equally likely: without looks the best guess is off by a good part of 0.2 m half of the time."""
    told, blind = (errors_of(fitted(synthetic(512, 0, t)), synthetic(256, 1, t)) for t in (True, False))
    assert told["position_mm_p90"] < 15
    assert blind["position_mm_p90"] > 100


def test_errors_in_closed_form():
    """A network that says the middle of the work space: the error is the distance from it."""
    readout = PointReadout(width=3, vision_width=4, cameras=1, state_dim=3, tool=(0, 1, 2))
    for parameter in readout.position.parameters():
        torch.nn.init.zeros_(parameter)
    data = synthetic(64, 2)
    readout.fit(data.body, torch.zeros(3))
    # Half of the guess is the tool, which stands in the origin, as the middle does.
    distance = data.position.norm(dim=-1).flatten() * 1000
    lifted = distance[data.position[..., 2].flatten() > 0.1]
    found = errors_of(readout, data)
    assert found["position_mm"] == pytest.approx(float(distance.quantile(0.5)), abs=0.1)
    assert found["lifted_mm_p90"] == pytest.approx(float(lifted.quantile(0.9)), abs=0.1)


def test_joining_keeps_rows():
    a, b = synthetic(3, 0), synthetic(2, 1)
    both = joined([a, b])
    assert len(both) == 5
    assert torch.equal(both.rows(slice(3, None)).position, b.position)
    assert torch.equal(both.found.uv[:3], a.found.uv)


@pytest.fixture(scope="module")
def store(make_arm, tmp_path_factory):
    sampler = SceneSampler(tasks=(Stack(),), embodiment=make_arm("arm6_ee"), poses=4, moving=1.0, sentences=2)
    path = tmp_path_factory.mktemp("positions") / "moving"
    made = EpisodeStore.create(path, sampler.schema)
    with EpisodeWriter(made, fsync=False) as writer:
        for seed in range(30):
            for episode in sampler.record(seed):
                write_episode(writer, episode)
    return path


def options(**changes):
    return Optimization(**{"steps": 150, "batch_size": 32, "lr": 3e-3, "warmup": 10, "precision": "float32"} | changes)


def test_the_verb_teaches_positions_and_nothing_else(store, tmp_path):
    """From a network that knows nothing: held-out errors fall to a few centimetres, all other weights stay."""
    blank = Pretrained.load("nano")
    for parameter in blank.encoder.point_readout.position[-1].parameters():
        torch.nn.init.zeros_(parameter)
    blank.save(tmp_path / "blank")
    assert (
        train_positions(
            stores=[str(store)],
            optimization=options(),
            vlm=str(tmp_path / "blank"),
            heldout=24,
            out=str(tmp_path / "out"),
        )
        == 0
    )
    made = Pretrained.load(tmp_path / "out" / "model")
    before, after = blank.encoder.state_dict(), made.encoder.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    parts = ("appearance", "position", "state_", "centre")
    assert {name for name in changed if not name.startswith(tuple(f"point_readout.{part}" for part in parts))} == set()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    seen = seen_of(EpisodeStore.open(store), blank, 2).rows(slice(-24, None))
    old = errors_of(blank.encoder.point_readout, seen)["position_mm"]
    assert scores["eval/moving/position_mm"] < 0.5 * old
    assert scores["eval/moving/position_mm"] == pytest.approx(
        errors_of(made.encoder.point_readout, seen)["position_mm"], abs=0.5
    )


def test_scenes_that_cannot_teach_are_refused(store, tmp_path, monkeypatch, make_arm):
    bare = EpisodeStore.create(tmp_path / "bare", StoreSchema(embodiment=make_arm("arm6_ee").spec)).path
    with pytest.raises(StoreError, match="env=scenes_moving"):
        train_positions(stores=[str(bare)], optimization=options(), out=str(tmp_path))
    with pytest.raises(ConfigError, match="heldout from 1 to 119"):
        train_positions(stores=[str(store)], optimization=options(), heldout=500, out=str(tmp_path))
    monkeypatch.setattr("brachium.vla.positions_train.same_body", lambda stores: (3, tuple(range(10))))
    with pytest.raises(ConfigError, match="has 2 cameras and the tool pose at"):
        train_positions(stores=[str(store)], optimization=options(), out=str(tmp_path))
