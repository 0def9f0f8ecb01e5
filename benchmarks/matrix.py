"""Every backbone with every head: does it learn one batch, how large is it, how fast? Figures go to
``benchmarks/results/matrix.json``, and with those of ``heads.py`` to the tables of ``docs/models.md``.

Type: .venv/bin/python benchmarks/matrix.py [--backbones octo nano] [--heads flow pi0] [--page]

Backbones are small members of their families with random weights, so that all of a row run in minutes on one core; what
is compared is whether a cell learns at all, and what it costs beside its neighbours. A cell has learnt when the chunks
that it samples are off by less than `BOUND` of the range (what always answering the batch's mean gives is noted too).
What is there is kept: a run that was interrupted goes on. ``--times`` measures the times alone, once nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import yaml
from demo_controls import ROOT

from brachium.console import log
from brachium.hardware import processor
from brachium.vla.backbones.base import Backbone
from brachium.vla.backbones.hf import HFBackbone
from brachium.vla.heads.base import Context, HeadInputs
from brachium.vla.recipe import instantiate

TARGET = ROOT / "benchmarks" / "results" / "matrix.json"
CONF = ROOT / "conf" / "model"
BATCH, HORIZON, DIMS, STATE, CAMERAS, WORDS, SIDE = 8, 8, 7, 10, 2, 8, 48
STEPS, BOUND = 600, 0.1
SMALL = {"width": 96, "depth": 2, "mlp": 128, "draws": 4}
VOCABULARY = 512
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIGLIP = {**VISION, "image_size": SIDE, "patch_size": 8}
QWEN = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN |= {"hidden_size": 48, "intermediate_size": 96, "out_hidden_size": 64}
MARKS = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
CONFIGS: dict[str, dict[str, Any]] = {
    "smolvlm": {
        "model_type": "smolvlm",
        "scale_factor": 2,
        "image_token_id": 1,
        "pad_token_id": 0,
        "vision_config": SIGLIP,
        "text_config": {"model_type": "llama", **TEXT},
    },
    "paligemma": {
        "model_type": "paligemma",
        "projection_dim": 64,
        "image_token_id": 1,
        "vision_config": {"model_type": "siglip_vision_model", "projection_dim": 64, **SIGLIP},
        "text_config": {"model_type": "gemma", **TEXT},
    },
    "paligemma2": {
        "model_type": "paligemma",
        "projection_dim": 64,
        "image_token_id": 1,
        "vision_config": {"model_type": "siglip_vision_model", "projection_dim": 64, **SIGLIP},
        "text_config": {"model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 256, **TEXT},
    },
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl",
        **MARKS,
        "vision_config": {**QWEN, "window_size": 32, "fullatt_block_indexes": [1]},
        "text_config": {**TEXT, "rope_parameters": ROPE, "rope_scaling": ROPE, "max_position_embeddings": 512},
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        **MARKS,
        "vision_config": {**QWEN, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
        "text_config": {**TEXT, "rope_parameters": ROPE, "rope_scaling": ROPE, "max_position_embeddings": 512},
    },
}
BACKBONES = ("nano", *CONFIGS, "octo")
HEADS = tuple(sorted(path.stem for path in (CONF / "head").glob("*.yaml")))


def make_backbone(name: str) -> Any:
    """A small member of a family, with the seed's weights."""
    torch.manual_seed(0)
    if name == "octo":
        node = yaml.safe_load((CONF / "backbone" / "octo.yaml").read_text())
        return instantiate({**node, "width": 64, "depth": 3, "image_size": SIDE}, vocab_size=VOCABULARY)
    if name == "nano":
        node = yaml.safe_load((CONF / "backbone" / "nano.yaml").read_text())
        return instantiate({**node, "image_size": SIDE}, vocab_size=VOCABULARY)
    config: dict[str, Any] = {**CONFIGS[name], "_resolved": True}
    return HFBackbone(config=config, image_size=SIDE)


def chunks(count: int, seed: int) -> torch.Tensor:
    """Smooth chunks in [-1, 1]."""
    rng = np.random.default_rng(seed)
    walk = rng.uniform(-0.7, 0.7, (count, 1, DIMS)) + rng.normal(0, 0.15, (count, HORIZON, DIMS)).cumsum(1)
    return torch.from_numpy(np.clip(walk, -1, 1).astype(np.float32))


def make_head(name: str, backbone: Backbone) -> Any:
    """A head of the group with small sizes, its tokenizer fitted to other chunks of the same kind."""
    node = yaml.safe_load((CONF / "head" / f"{name}.yaml").read_text())
    node |= {k: v for k, v in SMALL.items() if k in node}
    if "tokenizer" in node:
        tokenizer = dict(node["tokenizer"])
        tokenizer |= {k: v for k, v in {"vocabulary": 300, "points": 6, "degree": 3}.items() if k in tokenizer}
        node["tokenizer"] = {**tokenizer, **(instantiate(tokenizer).fit([chunks(500, 9), chunks(BATCH, 1)]) or {})}
    if "rows" in node and not backbone.vocabulary:
        node["rows"] = "own"
    inputs = HeadInputs(
        context_dim=STATE,
        token_dim=backbone.width,
        layers=backbone.layers,
        vocabulary=backbone.vocabulary,
        action_horizon=HORIZON,
        action_dims={"robot": DIMS},
    )
    torch.manual_seed(1)
    return instantiate(node, inputs=inputs)


def cell(backbone_name: str, head_name: str, count: int = STEPS) -> dict[str, Any]:
    """Train backbone and head on one batch for some steps, and time both."""
    backbone = make_backbone(backbone_name)
    head = make_head(head_name, backbone)
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (BATCH, CAMERAS, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(5, 200, (BATCH, WORDS), generator=generator)
    state = torch.randn(BATCH, STATE, generator=generator)
    target, mask = chunks(BATCH, 1), torch.ones(BATCH, WORDS, dtype=torch.bool)
    steps, dims = torch.ones(BATCH, HORIZON, dtype=torch.bool), torch.ones(DIMS, dtype=torch.bool)
    if head.discrete:  # the best that tokens can say
        coded = head.tokenizer.encode(target, steps)
        reach = head.tokenizer.decode(coded[0], coded[1], HORIZON, DIMS)
    else:
        reach = target

    def context() -> Context:
        prefix = backbone.read(images, tokens, mask, keep=head.reads == "layers")
        return Context(vector=state, prefix=prefix, backbone=backbone)

    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count, 1e-4)
    backbone.train()
    head.train()
    torch.manual_seed(3)

    def step(number: int) -> float:
        draws = torch.Generator().manual_seed(number)
        loss = head.loss(context(), target, steps, dims, "robot", draws).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        return float(loss.detach())

    losses, seconds = [], []
    for number in range(count):
        begin = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - begin)
    backbone.eval()
    head.eval()
    with torch.no_grad():
        noise = torch.randn(BATCH, HORIZON, DIMS, generator=generator)
        error = float((head.sample(context(), noise, dims, "robot") - reach).abs().mean())
        latency = best_of(lambda: head.sample(one(context()), noise[:1], dims, "robot"), 5)
    return {
        "learnt": error < BOUND,
        "error": round(error, 4),
        "mean_error": round(float((target.mean(0) - target).abs().mean()), 4),
        "loss": [round(losses[0], 4), round(float(np.mean(losses[-10:])), 4)],
        "parameters": sum(p.numel() for p in parameters),
        "head_parameters": sum(p.numel() for p in head.parameters()),
        "step_ms": round(1e3 * float(np.median(seconds[5:])), 2),
        "sample_ms": round(1e3 * latency, 2),
    }


def one(context: Context) -> Context:
    """The first row of a context."""
    first = torch.tensor([0])
    return replace(context, vector=context.vector[:1], prefix=context.prefix.rows(first) if context.prefix else None)


def best_of(call: Callable[[], object], times: int) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return float(np.median(found))


def two_modes(name: str) -> dict[str, float] | None:
    """Share of samples near either of two right answers; None for heads that need a backbone."""
    node = yaml.safe_load((CONF / "head" / f"{name}.yaml").read_text())
    node |= {k: v for k, v in SMALL.items() if k in node}
    target = torch.where(torch.arange(256) % 2 == 0, 0.8, -0.8).reshape(256, 1, 1).expand(-1, 4, -1).contiguous()
    if "tokenizer" in node:
        fitted = instantiate(node["tokenizer"]).fit([target])
        node["tokenizer"] = {**node["tokenizer"], **(fitted or {})}
    torch.manual_seed(0)
    try:
        head = instantiate(node, inputs=HeadInputs(context_dim=2, action_horizon=4, action_dims={"robot": 1}))
    except ValueError:
        return None
    steps, dims = torch.ones(256, 4, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for number in range(600):
        draws = torch.Generator().manual_seed(number)
        loss = head.loss(Context(vector=torch.zeros(256, 2)), target, steps, dims, "robot", draws).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        noise = torch.randn(1000, 4, 1, generator=torch.Generator().manual_seed(9))
        got = head.sample(Context(vector=torch.zeros(1000, 2)), noise, dims, "robot").mean(1).flatten()
    near = {str(mode): round(float(((got - mode).abs() < 0.25).float().mean()), 3) for mode in (-0.8, 0.8)}
    return {**near, "elsewhere": round(1.0 - sum(near.values()), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="*", default=BACKBONES, choices=BACKBONES)
    parser.add_argument("--heads", nargs="*", default=HEADS, choices=HEADS)
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--times", action="store_true", help="only time anew what is there, on a quiet machine")
    parser.add_argument("--page", action="store_true", help="only write docs/models.md from the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"cells": {}, "modes": {}}
    if options.times:
        time_again(results)
    elif not options.page:
        measure(results, options)
    from models_page import write_models_page

    write_models_page(ROOT)


def time_again(results: dict[str, Any]) -> None:
    """Times of every cell from 20 steps; what it learnt stays."""
    for name, found in results["cells"].items():
        short = cell(*name.split(" x "), 20)
        found |= {key: short[key] for key in ("step_ms", "sample_ms")}
        log(f"{name}: {found['step_ms']} ms a step, {found['sample_ms']} ms a chunk")
    TARGET.write_text(json.dumps(results, indent=1) + "\n")


def measure(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Fill in what is missing, and keep it at once."""
    results |= {"machine": f"one core of {processor()}", "steps": STEPS, "bound": BOUND, "batch": BATCH}
    for head in options.heads:
        if head not in results["modes"] or options.again:
            results["modes"][head] = two_modes(head)
            log(f"two modes, {head}: {results['modes'][head]}")
    for backbone in options.backbones:
        for head in options.heads:
            name = f"{backbone} x {head}"
            if name in results["cells"] and not options.again:
                continue
            results["cells"][name] = found = cell(backbone, head)
            log(f"{name}: error {found['error']}, {found['step_ms']} ms a step, {found['sample_ms']} ms a chunk")
            TARGET.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
