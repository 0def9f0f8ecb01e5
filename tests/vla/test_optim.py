"""Schedules and groups of parameters against their formulas, and layers that keep no activations."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from brachium.errors import ConfigError
from brachium.vla.activations import keep_again, recompute
from brachium.vla.optim import Optimization, make_optimizers
from brachium.vla.parallel import repeated_layers

from .test_families import CONFIGS
from .test_heads import make_backbone
from .test_prefix import inputs

BASE = Optimization(steps=100, warmup=10, lr=0.5, final_lr=0.1)


def test_schedules_are_their_formulas():
    for step in range(10):
        for schedule in ("cosine", "constant", "inverse_sqrt"):
            assert replace(BASE, schedule=schedule).learning_rate(step) == pytest.approx(0.5 * (step + 1) / 10)
    for step in (10, 37, 99):
        cosine = 0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90)))
        assert BASE.learning_rate(step) == pytest.approx(cosine)
        assert replace(BASE, schedule="constant").learning_rate(step) == 0.5
        falling = replace(BASE, schedule="inverse_sqrt")
        assert falling.learning_rate(step) == pytest.approx(0.5 * math.sqrt(10 / (step + 1)))
    assert replace(BASE, schedule="inverse_sqrt").learning_rate(9) == pytest.approx(0.5)
    assert replace(BASE, schedule="inverse_sqrt", warmup=0).learning_rate(3) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "expected cosine, constant or inverse_sqrt, got 'linear'"),
        ({"parallel": "tp"}, "expected ddp or fsdp, got 'tp'"),
        ({"accumulate": 0}, "expected at least 1, got 0"),
        ({"groups": {"head": {"rate": 1.0}}}, r"optimization.groups.head: expected lr .* got {'rate': 1.0}"),
        ({"groups": {"head": {"lr": -1.0}}}, "from 0, got"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        Optimization(**options)


def test_groups_have_their_own_rate_and_decay_and_the_first_that_fits_decides():
    model = nn.ModuleDict({"head": nn.Linear(3, 3), "body": nn.Linear(3, 3), "rest": nn.Linear(3, 3)})
    groups = {r"head\.weight": {"lr": 0.0}, "head|body": {"lr": 0.1, "weight_decay": 0.3}}
    ((optimizer, _),) = make_optimizers(dict(model.named_parameters()), replace(BASE, groups=groups, weight_decay=0.02))
    found = {
        id(p): (group["times"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    named = {name: found.pop(id(p)) for name, p in model.named_parameters()}
    assert not found
    assert named == {
        "head.weight": (0.0, 0.02),
        "head.bias": (0.1, 0.3),
        "body.weight": (0.1, 0.3),
        "body.bias": (0.1, 0.3),
        "rest.weight": (1.0, 0.02),
        "rest.bias": (1.0, 0.0),
    }


def test_a_group_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="no trained parameter's name has 'hed' in it; they begin with head"):
        make_optimizers(
            dict(nn.ModuleDict({"head": nn.Linear(2, 2)}).named_parameters()), replace(BASE, groups={"hed": {}})
        )


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("kind", [*CONFIGS, "octo"])
def test_layers_computed_again_give_the_same_gradients(kind, states):
    """With keys and values that leave a layer by the side, and with a last layer that is broken off."""
    found = []
    for again in (False, True):
        backbone = make_backbone(kind).train()
        layers = repeated_layers(backbone)
        assert len(layers) >= 3
        if again:
            recompute(layers)
        prefix = backbone.read(*inputs(), states=states)
        total = sum(t.square().sum() for t in prefix.keys + prefix.values) + prefix.states.square().sum()
        total.backward()
        found.append({k: p.grad for k, p in backbone.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        assert torch.equal(found[0][key], found[1][key]), key
    keep_again(layers)
    assert not any(type(layer.forward).__name__ == "Recomputed" for layer in layers)
