"""Several robots in one model: mixed batches, parts of their own, one more added to a checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brachium.datasets.schema import EXECUTED, StoreSchema
from brachium.datasets.store import EpisodeStore
from brachium.datasets.writer import EpisodeWriter
from brachium.errors import ConfigError, SpecMismatchError
from brachium.policies.vla_policy import VLAPolicy
from brachium.vla.action_tokens.fast import FastTokenizer
from brachium.vla.build import fit_tokenizers, owned_by
from brachium.vla.checkpoint import load_checkpoint, predict, read_goldens, read_meta
from brachium.vla.encoder import Encoding
from brachium.vla.heads.written import Written
from brachium.vla.optim import Optimization
from brachium.vla.policy_data import joined
from brachium.vla.sources import MixedData, embodiments_of, open_sources, sampled_chunks, statistics_of
from brachium.vla.tokenizer import word_tokenizer
from brachium.vla.train import train

from .conftest import HEADS, TEXTS, episode_steps, make_embodiment, make_model, make_recipe, record_demos

EXPERT = {"_target_": "brachium.vla.heads.expert.ExpertHead", "width": 16, "mlp": 24, "steps": 2}


def other_robot(name="five"):
    """Five actions, one camera, another rate, a longer state."""
    spec = make_embodiment(name, names=("x", "y", "z", "grip", "w"), actions=5, cameras=("front",))
    return replace(spec, control_hz=25.0)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robots")
    one = record_demos(folder / "one", range(6))
    two = record_demos(folder / "two", range(6, 14), spec=other_robot())
    return str(one.path), str(two.path)


def options(steps=4, **more):
    return Optimization(steps=steps, batch_size=8, warmup=1, precision="float32", log_every=2, **more)


def run(store, out, recipe=None, **more):
    recipe = recipe or make_recipe(soft_prompts=2)
    assert train(store=store, model=recipe, optimization=options(), out=str(out), device="cpu", **more) == 0
    return out / "checkpoint"


@pytest.fixture(scope="module", params=["flow", "expert"])
def both(request, stores, tmp_path_factory):
    recipe = make_recipe(soft_prompts=2)
    if request.param == "expert":
        recipe = replace(recipe, head=EXPERT)
    return run(list(stores), tmp_path_factory.mktemp("both"), recipe, heldout=0.3)


def test_one_model_acts_for_robots_of_different_actions_cameras_and_rates(both):
    model = load_checkpoint(both)
    assert list(model.embodiments) == ["tiny", "five"]
    goldens = read_goldens(both)
    assert {name: golden.actions.shape[2] for name, golden in goldens.items()} == {"tiny": 3, "five": 5}
    assert {name: len(golden.observation.images) for name, golden in goldens.items()} == {"tiny": 2, "five": 1}
    metrics = read_meta(both)["metrics"]
    assert metrics.keys() >= {"loss/tiny", "loss/five", "eval/loss", "eval/action_error/five", "eval/action_error/tiny"}
    assert read_meta(both)["store"]["episodes"] == sum(e["episodes"] for e in read_meta(both)["store"]["sources"])
    assert VLAPolicy.from_checkpoint(both, like=other_robot("renamed")).name == "five"
    with pytest.raises(SpecMismatchError, match=r"control_hz: 25\.0 against 26\.0"):
        VLAPolicy.from_checkpoint(both, like=replace(other_robot(), control_hz=26.0))
    with pytest.raises(SpecMismatchError, match="which embodiment"):
        VLAPolicy.from_checkpoint(both)


def test_a_robot_added_to_a_checkpoint_changes_nothing_for_the_others(both, tmp_path):
    """One more store, trained with tune=embodiment: every weight and every answer of before is the same bit for bit."""
    third = replace(make_embodiment("third", actions=4), control_hz=5.0)
    store = record_demos(tmp_path / "store", range(4), spec=third)
    path = run(str(store.path), tmp_path / "run", init=str(both), tune="embodiment")
    before, after = load_file(both / "model.safetensors"), load_file(path / "model.safetensors")
    assert all(torch.equal(after[k], v) for k, v in before.items())
    model = load_checkpoint(path)
    assert list(model.embodiments) == ["tiny", "five", "third"]
    new = set(after) - set(before)
    assert new == {k for k in owned_by(model, ["third"]) if k in after}
    for name, golden in read_goldens(both).items():
        np.testing.assert_array_equal(predict(model, name, golden.observation, golden.noise), golden.actions)
    fresh = load_checkpoint(both).recipe.build(model.embodiments, model.tokenizer, seed=0).state_dict()
    trained = {k for k in new if not k.startswith(("state_", "action_")) or k.startswith("state_in")}
    assert trained
    assert all(not torch.equal(after[k], fresh[k]) for k in trained)


def test_what_one_robot_learns_leaves_the_parts_of_the_other_alone(stores):
    sources = open_sources(list(stores), 0.0)
    model = make_model(make_recipe(soft_prompts=2), embodiments_of(sources))
    for name, statistics in statistics_of(sources).items():
        model.set_statistics(name, statistics)
    data = MixedData(sources, model, weights=None, batch_size=4, seed=0, cached=False)
    batch = data.training[1].make(0)
    args = (batch.state, batch.action, batch.action_pad, batch.embodiment, torch.Generator().manual_seed(0))
    model.loss(batch.encode(model), *args).sum().backward()
    gradients = {k: p.grad for k, p in model.named_parameters()}
    assert all(gradients[k] is None for k in owned_by(model, ["tiny"]) if k in gradients)
    moved = {k for k in owned_by(model, ["five"]) if k in gradients}
    assert len(moved) == 7  # state, action in and out with their biases, and the soft prompt
    assert all(gradients[k] is not None and gradients[k].abs().sum() > 0 for k in moved)


def test_soft_prompts_are_read_by_the_backbone(stores):
    sources = open_sources(list(stores), 0.0)
    model = make_model(make_recipe(soft_prompts=3), embodiments_of(sources))
    batch = MixedData(sources, model, weights=None, batch_size=4, seed=0, cached=False).training[0].make(0)
    before = batch.encode(model).prefix
    assert before.spans["extra"] == slice(16, 19)
    with torch.no_grad():
        model.soft_prompts["tiny"].add_(1.0)
    after = batch.encode(model).prefix
    assert (before.states[:, 16:] - after.states[:, 16:]).abs().min() > 0
    torch.testing.assert_close(before.states[:, :16], after.states[:, :16])  # what stands before does not see them


def test_batches_are_mixed_by_weights(stores):
    sources = open_sources(list(stores), 0.0)
    model = make_model(make_recipe(), embodiments_of(sources))

    def share(weights):
        data = MixedData(sources, model, weights=weights, batch_size=16, seed=0, cached=False)
        parts = [part for step in range(40) for part in data.make(step)]
        assert all(part.state.shape[1] == len(model.embodiments[part.embodiment].state.names) for part in parts)
        rows = {name: sum(len(p.state) for p in parts if p.embodiment == name) for name in model.embodiments}
        assert sum(rows.values()) == 640
        return rows["five"] / 640

    windows = [sum(source.store.episodes[i].length for i in source.training) for source in sources]
    assert share(None) == pytest.approx(windows[1] / sum(windows), abs=0.03)
    assert share([1.0, 3.0]) == pytest.approx(0.75, abs=0.03)
    assert share([1.0, 0.0]) == 0.0


def test_windows_of_one_robot_come_as_one_batch_whatever_stores_they_are_of(stores, tmp_path):
    more = record_demos(tmp_path / "more", range(20, 23))
    sources = open_sources([stores[0], str(more.path)], 0.0)
    model = make_model(make_recipe(head={**HEADS["flow"], "max_delay": 1}), embodiments_of(sources))
    data = MixedData(sources, model, weights=[1.0, 1.0], batch_size=16, seed=0, cached=False)
    (batch,) = data.make(3)
    source, window = data.sampler.draws(48, 16)
    parts = [data.training[k].batch(window[source == k]) for k in (0, 1)]
    assert {len(part.state) for part in parts} != {16}
    assert batch.executed is None
    for field in ("state", "action", "action_pad", "tokens", "images"):
        assert torch.equal(getattr(batch, field), torch.cat([getattr(part, field) for part in parts]))
    done = replace(parts[1], executed=parts[1].action + 1.0)
    told = joined([parts[0], done])
    assert torch.equal(told.executed, torch.cat([parts[0].action, done.executed]))
    with torch.no_grad():
        encodings = [part.encode(model) for part in parts]
    cached = [replace(part, encoding=Encoding(words=e.words, points=e.points)) for part, e in zip(parts, encodings)]
    assert torch.equal(joined(cached).encoding.words, torch.cat([e.words for e in encodings]))


def test_where_it_is_not_known_what_was_executed_the_action_was(tmp_path):
    """A merged store lacks the field in episodes that nothing disturbed; it reads as not a number there."""
    spec = make_embodiment()
    executed = replace(spec.action, name=EXECUTED, low=(), high=())
    store = EpisodeStore.create(tmp_path / "s", StoreSchema(embodiment=spec, extras=(executed,), optional=(EXECUTED,)))
    with EpisodeWriter(store, fsync=False) as writer:
        for seed in (0, 1):
            writer.begin("pick")
            for step in episode_steps(spec, seed, 6):
                writer.step(**step, extras={EXECUTED: step["action"] + 1.0} if seed else None)
            writer.end(True)
    sources = open_sources(str(tmp_path / "s"), 0.0)
    model = make_model(make_recipe({**HEADS["flow"], "max_delay": 1}), embodiments_of(sources))
    data = MixedData(sources, model, weights=None, batch_size=12, seed=0, cached=False)
    batch = data.training[0].batch(np.arange(12))
    torch.testing.assert_close(batch.executed[:6], batch.action[:6], rtol=0, atol=0)
    torch.testing.assert_close(batch.executed[6:], batch.action[6:] + 1.0)


def test_resuming_a_mixture_gives_the_same_weights(stores, tmp_path, monkeypatch):
    whole = load_file(run(list(stores), tmp_path / "whole", heldout=0.0) / "model.safetensors")
    from brachium.vla import loop

    update, calls = loop.TrainLoop._update_average, []

    def stop(self):
        update(self)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainLoop, "_update_average", stop)
        with pytest.raises(KeyboardInterrupt):
            run(list(stores), tmp_path / "halves", heldout=0.0)
    again = load_file(run(list(stores), tmp_path / "halves", heldout=0.0, resume=True) / "model.safetensors")
    assert all(torch.equal(again[k], v) for k, v in whole.items())


def test_two_stores_of_one_robot_share_its_statistics(stores, tmp_path):
    more = record_demos(tmp_path / "more", range(20, 23))
    sources = open_sources([stores[0], str(more.path)], 0.0)
    assert list(embodiments_of(sources)) == ["tiny"]
    found = statistics_of(sources)["tiny"]["state"]
    rows = np.concatenate([EpisodeStore.open(p).lowdim("state") for p in (stores[0], more.path)])
    np.testing.assert_allclose(found.mean, rows.mean(0), atol=1e-6)
    assert found.count == len(rows)


def test_an_action_tokenizer_is_fitted_to_all_robots_and_travels_with_the_checkpoint(stores, tmp_path):
    sources = open_sources(list(stores), 0.0)
    tokenizer = {"_target_": "brachium.vla.action_tokens.fast.FastTokenizer", "vocabulary": 300}
    head = {"_target_": "brachium.vla.heads.tokenized.TokenizedHead", "tokenizer": tokenizer, "width": 16, "heads": 2}
    statistics = statistics_of(sources)
    chunks = sampled_chunks(sources, statistics, "min_max", 4)
    assert [chunk.shape[1:] for chunk in chunks] == [(4, 2), (4, 2)]  # the third action and what follows never change
    assert all(chunk.abs().max() <= 1.0 + 1e-6 for chunk in chunks)
    fitted = fit_tokenizers(replace(make_recipe(), head=head), lambda mode, h: chunks)
    assert fitted.head["tokenizer"]["merges"]
    path = run(list(stores), tmp_path / "run", replace(make_recipe(), head=head), heldout=0.0)
    assert load_checkpoint(path).recipe.head["tokenizer"]["merges"] == fitted.head["tokenizer"]["merges"]


def test_a_robot_of_other_cameras_is_no_addition_where_each_camera_has_a_mean_image(stores, tmp_path):
    """A backbone from scratch keeps a mean image of each camera of its one robot; those of others would not fit."""
    path = run(stores[0], tmp_path / "one")
    with pytest.raises(SpecMismatchError, match="looks like on average; five has"):
        run(stores[1], tmp_path / "two", init=str(path), tune="embodiment")


def test_tokens_are_written_in_full_precision_under_autocast(stores, tmp_path):
    chunks = torch.rand(64, 8, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokenizer = FastTokenizer(**FastTokenizer(vocabulary=400).fit([chunks]))
    steps, dims = torch.ones(64, 8, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    exact = Written.of(tokenizer, chunks, steps, dims).tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Written.of(tokenizer, chunks, steps, dims).tokens, exact)


def test_nothing_to_train_is_said(stores, tmp_path):
    bins = {"_target_": "brachium.vla.action_tokens.bins.BinTokenizer", "bins": 8}
    head = {"_target_": "brachium.vla.heads.vocabulary.VocabularyHead", "tokenizer": bins}
    recipe = replace(make_recipe(), head=head, state="prompt", prompt="{instruction} {state}", max_tokens=16)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        run(stores[0], tmp_path / "out", recipe)
    with pytest.raises(ConfigError, match="goes on reading with the backbone's own layers"):
        run(stores[0], tmp_path / "out", replace(recipe, speech=head, insulate=True), tune="full")
    with pytest.raises(ConfigError, match="brings its own encoder"):
        run(stores[0], tmp_path / "out", init="x", encoder="nano")


def test_a_delay_cannot_be_added_to_a_checkpoint(stores, both, tmp_path):
    recipe = make_recipe({**HEADS["flow"], "max_delay": 2})
    with pytest.raises(ConfigError, match="has max_delay=0"):
        run(stores[0], tmp_path / "more", recipe, init=str(both))


def test_mistakes_with_several_stores(stores, both, tmp_path):
    other = record_demos(tmp_path / "other", range(3), spec=replace(make_embodiment(), control_hz=11.0))
    with pytest.raises(SpecMismatchError, match=r"control_hz: 11\.0 against 10\.0"):
        run([stores[0], str(other.path)], tmp_path / "out")
    with pytest.raises(SpecMismatchError, match=r"control_hz: 11\.0 against 10\.0"):
        run(str(other.path), tmp_path / "out", init=str(both))
    with pytest.raises(ConfigError, match="a weight for each of 2 stores"):
        run(list(stores), tmp_path / "out", weights=[1.0])
    with pytest.raises(ConfigError, match="expected init=CHECKPOINT"):
        run(stores[0], tmp_path / "out", tune="embodiment")
    with pytest.raises(ConfigError, match=r"knows \['tiny'\] already"):
        run(stores[0], tmp_path / "out", init=str(both), tune="embodiment")
    with pytest.raises(ConfigError, match="expected a store"):
        run([], tmp_path / "out")
    spec = replace(make_embodiment(), state=replace(make_embodiment().state, shape=(6,), names=()))
    with pytest.raises(SpecMismatchError, match="6 dimensions, but the model pads to 4"):
        make_recipe(state_pad=4).build({"tiny": spec}, word_tokenizer(TEXTS))
