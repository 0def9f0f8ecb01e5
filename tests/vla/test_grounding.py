"""Points: targets by their definition, the loss, and learning to point."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brachium.datasets.store import EpisodeStore
from brachium.errors import StoreError
from brachium.vla.encoder import word_loss
from brachium.vla.ground import Grounding, SceneData, evaluate_grounding, ground
from brachium.vla.grounding import (
    METRES,
    Points,
    bilinear_target,
    grounding_loss,
    inside,
    patch_centres,
    patches_around,
)
from brachium.vla.optim import Optimization

from .conftest import make_model, make_recipe, record_demos, record_scenes

CORPUS = ("put red green blue on",)


def point_model(seed=0, **options):
    return make_model(make_recipe(points=True, **options), seed=seed, corpus=CORPUS)


def options(store, **changes):
    changes = {"steps": 4, "batch_size": 4, "precision": "float32", "warmup": 1, "lr": 3e-3, **changes}
    return Grounding(store=str(store.path), heldout=4, sentences=2, optimization=Optimization(**changes))


@settings(max_examples=300, deadline=None)
@given(
    u=st.floats(-0.5, 1.5, width=32),
    v=st.floats(-0.5, 1.5, width=32),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
)
def test_a_target_is_a_distribution_whose_mean_is_the_point(u, v, rows, columns):
    uv = torch.tensor([u, v])
    target = bilinear_target(uv, (rows, columns))
    assert target.shape == (rows * columns,)
    assert target.min() >= 0
    assert target.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (target > 0).sum() <= 4
    centres = patch_centres((rows, columns), uv)
    expected = torch.minimum(torch.maximum(uv, centres[0]), centres[-1])
    torch.testing.assert_close(target @ centres, expected, atol=2e-5, rtol=0)


def test_targets_keep_leading_axes():
    uv = torch.rand(2, 3, 4, 2)
    target = bilinear_target(uv, (5, 7))
    torch.testing.assert_close(target[1, 2, 3], bilinear_target(uv[1, 2, 3], (5, 7)))


def test_patch_centres_run_row_by_row():
    centres = patch_centres((2, 4), torch.zeros(1))
    assert centres.tolist() == [[u, v] for v in (0.25, 0.75) for u in (0.125, 0.375, 0.625, 0.875)]


def test_inside_is_in_the_image_and_before_the_camera():
    rows = [
        (0.5, 0.5, 1, True),
        (0.5, 0.5, -1, False),
        (0.5, 0.5, 0, False),
        (1.0, 0.5, 1, False),
        (-0.1, 0.5, 1, False),
    ]
    rows += [(0.5, 1.1, 1, False), (0.01, 0.99, 0.01, True)]
    label = torch.tensor([r[:3] for r in rows], dtype=torch.float32)
    assert inside(label).tolist() == [r[3] for r in rows]


def made_points(objects, grid, sharp=30.0):
    """Points that answer the labels exactly."""
    label = objects[..., 3:].unflatten(-1, (-1, 3))
    target = bilinear_target(label[..., :2].clamp(0, 1), grid)
    seen = inside(label)
    return Points(
        logits=target.clamp(min=1e-9).log(),
        uv=label[..., :2].clamp(0, 1),
        visible=torch.where(seen, sharp, -sharp),
        position=objects[..., :3].clone(),
    )


def made_labels(b=2, k=3, cameras=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    objects = torch.rand(b, k, 2, 3 + 3 * cameras, generator=g)
    objects[0, 0, 0, 3:6] = torch.tensor([0.5, 0.5, -1.0])  # behind the first camera
    return objects


def test_a_perfect_answer_costs_only_the_entropy_of_the_targets():
    objects, grid = made_labels(), (4, 4)
    _, parts = grounding_loss(made_points(objects, grid), objects, grid)
    for name in ("shift", "visible", "position"):
        assert parts[name] < 1e-5, name
    label = objects[..., 3:].unflatten(-1, (-1, 3))
    target = bilinear_target(label[..., :2].clamp(0, 1), grid)
    entropy = -torch.special.xlogy(target, target).sum(-1)[inside(label)].mean()
    assert parts["cells"].item() == pytest.approx(entropy.item(), abs=1e-4)


def test_each_part_by_hand():
    objects, grid = made_labels(), (4, 4)
    points = made_points(objects, grid)
    wrong = dataclasses.replace(
        points, uv=points.uv + 0.1, position=points.position + 0.02, visible=torch.zeros_like(points.visible)
    )
    total, parts = grounding_loss(wrong, objects, grid)
    assert parts["shift"].item() == pytest.approx(0.2, abs=1e-4)
    assert parts["position"].item() == pytest.approx(0.02 / METRES, abs=1e-4)
    assert parts["visible"].item() == pytest.approx(np.log(2), abs=1e-4)
    assert total > grounding_loss(points, objects, grid)[0] + 0.5


def test_what_a_camera_does_not_see_trains_no_point_there():
    objects, grid = made_labels(), (4, 4)
    points = made_points(objects, grid)
    moved = points.uv.clone()
    moved[0, 0, 0, 0] = 0.9
    logits = points.logits.clone()
    logits[0, 0, 0, 0] = torch.randn(16)
    before, after = (
        grounding_loss(p, objects, grid)[0] for p in (points, dataclasses.replace(points, uv=moved, logits=logits))
    )
    torch.testing.assert_close(before, after)


def test_nothing_visible_is_no_division_by_zero():
    objects = made_labels()
    objects[..., 5::3] = -1.0
    value, _ = grounding_loss(made_points(objects, (4, 4)), objects, (4, 4))
    assert value.isfinite()


def test_word_loss_against_loops():
    logits = torch.randn(2, 1, 6)
    tokens = torch.tensor([[[0, 4, 4]], [[2, 0, 5]]])
    expected = []
    for b, words in enumerate(({4}, {2, 5})):
        for w in range(6):
            p = logits[b, 0, w].sigmoid()
            expected.append(-(p.log() if w in words else (1 - p).log()))
    torch.testing.assert_close(word_loss(logits, tokens, 0), torch.stack(expected).mean())


def test_points_of_an_encoder_have_their_shapes_and_lie_near_the_image(scenes):
    model = point_model()
    data = SceneData(scenes, model.instructions, options(scenes), torch.device("cpu"))
    batch = data.batch(data.train[:3], None)
    with torch.no_grad():
        points, words, grid = model.encoder.point(batch.images, batch.tokens, batch.state)
    assert points.uv.shape == (3, 2, 2, 2, 2)
    assert points.logits.shape == (3, 2, 2, 2, grid[0] * grid[1])
    assert points.position.shape == (3, 2, 2, 3)
    assert words.shape == (3, 2, len(model.tokenizer))
    assert points.uv.min() > -0.3
    assert points.uv.max() < 1.3


def test_scene_batches_depend_on_the_step_alone_and_match_the_store(scenes):
    model = point_model()
    opts = options(scenes)
    first, second = (SceneData(scenes, model.instructions, opts, torch.device("cpu")) for _ in range(2))
    for step in (0, 7, 3):
        a, b = first.make(step), second.make(step)
        for name in ("images", "tokens", "state", "objects"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert not torch.equal(first.make(0).images, first.make(1).images)
    assert not set(first.train) & set(first.heldout)
    clean = first.batch(first.train[:2], None)
    for row, scene in enumerate(first.train[:2]):
        texts = scenes.episodes[scene].meta["sentences"]
        for k in range(2):
            text = model.tokenizer.decode([t for t in clean.tokens[row, k].tolist() if t != model.instructions.pad])
            assert text == texts[k]["text"]
            for r, role in enumerate(("object", "goal")):
                expected = scenes.lowdim("objects")[scene, texts[k]["roles"][role]]
                np.testing.assert_array_equal(clean.objects[row, k, r].numpy(), expected)


def test_dropped_words_become_unknown_and_padding_stays(scenes):
    model = point_model()
    data = SceneData(
        scenes, model.instructions, dataclasses.replace(options(scenes), word_dropout=1.0), torch.device("cpu")
    )
    batch = data.make(0)
    pad = batch.clean_tokens == model.instructions.pad
    assert pad.any()
    assert (batch.tokens[pad] == model.instructions.pad).all()
    assert (batch.tokens[~pad] == model.instructions.unknown).all()


def test_one_batch_of_scenes_is_learnt(scenes):
    model = point_model()
    data = SceneData(scenes, model.instructions, options(scenes), torch.device("cpu"))
    batch = data.batch(data.train[:4], None)
    encoder = model.encoder.train()
    encoder.backbone.fit_pixels(batch.images)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(350):
        points, _, grid = encoder.point(batch.images, batch.tokens, batch.state)
        loss, parts = grounding_loss(points, batch.objects, grid)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
    assert parts["shift"] < 0.06
    assert parts["position"] * METRES < 0.03


def test_grounding_leaves_averaged_weights_and_finite_metrics(scenes, tmp_path):
    model = point_model()
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    metrics = ground(model, options(scenes), tmp_path, resume=False)
    assert all(np.isfinite(v) for v in metrics.values())
    assert metrics.keys() >= {"eval/front_px", "eval/wrist_px_p90", "eval/position_mm"}
    assert any(not torch.equal(before[k], v) for k, v in model.encoder.state_dict().items())
    assert not model.encoder.training


def test_pixel_errors_against_loops(scenes):
    model = point_model()
    data = SceneData(scenes, model.instructions, options(scenes), torch.device("cpu"))
    got = evaluate_grounding(model.encoder, data)
    batch = data.batch(data.heldout, None)
    with torch.no_grad():
        points, _, _ = model.encoder.point(batch.images, batch.tokens, batch.state)
    pixels, metres = [], []
    for index in np.ndindex(4, 2, 2):
        label = batch.objects[index].numpy()
        metres.append(np.linalg.norm(points.position[index].numpy() - label[:3]))
        u, v, depth = label[3:6]
        if 0 < u < 1 and 0 < v < 1 and depth > 0:
            pixels.append(np.hypot(*((points.uv[index][0].numpy() - (u, v)) * 32)))
    assert got["front_px"] == pytest.approx(np.median(pixels), rel=1e-4)
    assert got["front_px_p90"] == pytest.approx(np.quantile(pixels, 0.9), rel=1e-4)
    assert got["position_mm"] == pytest.approx(1000 * np.median(metres), rel=1e-4)


def test_no_held_out_scenes_is_allowed(scenes, tmp_path):
    metrics = ground(point_model(), dataclasses.replace(options(scenes), heldout=0), tmp_path, resume=False)
    assert not any(k.startswith("eval/") for k in metrics)


def test_what_is_no_store_of_scenes(tmp_path, scenes):
    model = point_model()
    demos = record_demos(tmp_path / "demos", range(2))
    with pytest.raises(StoreError, match="no field 'objects'"):
        ground(model, options(demos), tmp_path / "out", resume=False)
    few = dataclasses.replace(options(scenes), heldout=12)
    with pytest.raises(StoreError, match="expected more than 12 scenes"):
        ground(model, few, tmp_path / "out", resume=False)
    uneven = record_scenes(tmp_path / "uneven", range(3))
    record_more(uneven)
    with pytest.raises(StoreError, match="the same number of sentences"):
        ground(model, dataclasses.replace(options(uneven), heldout=0), tmp_path / "out", resume=False)
    with pytest.raises(StoreError, match="a model that points"):
        ground(make_model(corpus=CORPUS), options(scenes), tmp_path / "out", resume=False)
    assert not (tmp_path / "out").exists()


def record_more(store):
    """Add an episode without sentences."""
    from brachium.datasets.writer import EpisodeWriter

    step = {
        "images": {c.name: np.zeros(c.shape, np.uint8) for c in store.embodiment.cameras},
        "state": np.zeros(4, np.float32),
        "action": np.zeros(3, np.float32),
        "extras": {"objects": np.zeros((3, 9), np.float32)},
    }
    with EpisodeWriter(EpisodeStore.open(store.path), fsync=False, profile="raw") as writer:
        writer.begin("put red on blue", meta={"seed": 99})
        writer.step(**step)
        writer.end(True)


def test_patches_around_points_against_a_loop():
    """Oracle: bilinear interpolation by hand, patch centres at (k + 1/2) / n, nothing outside."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = 4, 5
    vision = torch.randn(2, 3, rows * columns, 6, generator=generator)
    uv = torch.rand(2, 2, 3, 2, generator=generator)
    found = patches_around(vision, (rows, columns), uv)
    assert found.shape == (2, 2, 3, 9, 6)
    maps = vision.unflatten(2, (rows, columns))
    for b, role, camera, k in itertools.product(range(2), range(2), range(3), range(9)):
        x = float(uv[b, role, camera, 0]) * columns - 0.5 + (k % 3 - 1)
        y = float(uv[b, role, camera, 1]) * rows - 0.5 + (k // 3 - 1)
        expected = torch.zeros(6)
        for i, j in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= i < rows and 0 <= j < columns:
                expected += (1 - abs(y - i)) * (1 - abs(x - j)) * maps[b, camera, i, j]
        torch.testing.assert_close(found[b, role, camera, k], expected, atol=1e-5, rtol=1e-5)
