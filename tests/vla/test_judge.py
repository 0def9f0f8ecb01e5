"""The judge: its scores against brute force, its calibration, and what it says after it is loaded."""

import numpy as np
import pytest
import torch

from brachium.errors import CheckpointError
from brachium.vla.judge import Features, Judge, JudgeNet, auroc, calibrate, expected_calibration_error
from brachium.vla.judge_train import Examples, fit_judge
from brachium.vla.optim import Optimization
from brachium.vla.pretrained import Pretrained


@pytest.fixture(scope="module")
def nano():
    return Pretrained.load("nano")


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    p, label = np.round(rng.random(60), 1), rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in p[label] for b in p[~label]]
    assert auroc(p, label) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(p, np.ones(60, bool)))


def test_calibration_error_in_closed_form():
    p = np.array([0.05, 0.05, 0.95, 0.95])
    assert expected_calibration_error(p, np.array([0.0, 0.0, 1.0, 1.0])) == pytest.approx(0.05)
    assert expected_calibration_error(p, np.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.95)


def test_calibration_undoes_overconfidence():
    """Logits made three times too large and shifted come out honest; at the maximum of the likelihood errors cancel."""
    rng = np.random.default_rng(1)
    true = rng.normal(size=4000)
    label = (rng.random(4000) < 1.0 / (1.0 + np.exp(-true))).astype(float)
    wrong = torch.from_numpy(np.stack([3.0 * true + 1.0, true], axis=1)).float()
    labels = torch.from_numpy(np.stack([label, np.full(4000, np.nan)], axis=1)).float()
    scale, shift = calibrate(wrong, labels)
    x = wrong[:, 0].double().numpy()
    p = 1.0 / (1.0 + np.exp(-(float(scale[0]) * x + float(shift[0]))))
    assert np.mean(p - label) == pytest.approx(0.0, abs=1e-4)  # the likelihood's first-order conditions
    assert np.mean((p - label) * x) == pytest.approx(0.0, abs=1e-3)
    assert float(scale[0]) == pytest.approx(1 / 3, abs=0.03)
    assert expected_calibration_error(p, label) < 0.03 < expected_calibration_error(1.0 / (1.0 + np.exp(-x)), label)
    assert (float(scale[1]), float(shift[1])) == (1.0, 0.0)  # nothing is known of the second: it stays


@pytest.fixture
def trained(tmp_path, nano):
    """A judge of made-up features: the first tells what can be done, the second what is."""
    rng = np.random.default_rng(0)
    width = Features(nano)(
        torch.zeros(1, 2, 96, 96, 3, dtype=torch.uint8), torch.ones(1, 1, 20, dtype=torch.long), torch.zeros(1, 16)
    ).shape[-1]
    features = torch.from_numpy(rng.normal(size=(6000, width))).float()
    labels = torch.stack([(features[:, 0] > 0).float(), (features[:, 1] > 1.0).float()], dim=1)
    labels[labels[:, 1] > 0, 0] = float("nan")
    examples = Examples(
        features=features, labels=labels, part=np.repeat([0, 1, 2], [5000, 500, 500]), task=np.array(["a"] * 6000)
    )
    options = Optimization(steps=250, batch_size=128, lr=3e-3, warmup=5, log_every=1000, save_every=1000)
    return fit_judge(examples, nano, optimization=options, width=32, folder=tmp_path / "run")


def test_it_learns_and_says_the_same_after_it_is_loaded(tmp_path, trained):
    assert trained.notes["scores"]["all/can"]["auroc"] > 0.85
    assert trained.notes["scores"]["all/done"]["auroc"] > 0.85
    path = trained.save(tmp_path / "judge")
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 255, (96, 96, 3), dtype=np.uint8) for _ in range(2)]
    state = rng.normal(size=16).astype(np.float32)
    texts = ["open the drawer", "put the red cube in the drawer"]
    said = trained(images, state, texts)
    assert said.shape == (2, 2)
    assert ((said > 0) & (said < 1)).all()
    assert np.array_equal(Judge.load(path)(images, state, texts), said)
    assert trained(images, state, texts[1:])[0] == pytest.approx(said[1], abs=1e-5)  # others are no matter


def test_bad_input(tmp_path, trained):
    path = trained.save(tmp_path / "judge")
    with pytest.raises(CheckpointError, match="no judge"):
        Judge.load(tmp_path)
    text = (path / "judge.json").read_text()
    (path / "judge.json").write_text(text.replace('"identity": "', '"identity": "0'))
    with pytest.raises(CheckpointError, match="another than it was trained on"):
        Judge.load(path)
    (path / "judge.json").write_text(text)
    whole = (path / "judge.safetensors").read_bytes()
    (path / "judge.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no judge"):
        Judge.load(path)


def test_unknown_labels_teach_nothing(nano):
    net = JudgeNet(4, 8)
    logits = net(torch.randn(3, 4))
    assert logits.shape == (3, 2)
