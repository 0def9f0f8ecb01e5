"""Turns measured figures (``benchmarks/results/``) into ``docs/models.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results_page import TASKS, cell, table

FAMILIES = {
    "nano": "nano (SmolVLM, ours)",
    "smolvlm": "SmolVLM, Idefics3",
    "paligemma": "PaliGemma",
    "paligemma2": "PaliGemma 2",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "octo": "Octo's transformer",
}
HEADS = {
    "flow": "flow matching, residual network over the pooled context",
    "diffusion": "diffusion (DDIM), the same network",
    "dit": "flow matching, DiT with cross-attention (GR00T)",
    "pi0": "flow matching, expert with joint attention (pi0)",
    "pi05": "flow matching, expert with adaRMS (pi0.5)",
    "smolvla": "flow matching, joint and cross layers in turn (SmolVLA)",
    "regression": "L1 regression, pooled",
    "parallel": "L1 regression, parallel decoding (OpenVLA-OFT)",
    "tokenized": "256 bins, a small decoder of its own",
    "fast": "FAST, a small decoder of its own",
    "beast": "BEAST, a small decoder of its own",
    "rt2": "256 bins said by the language model (RT-2)",
    "pi0_fast": "FAST said by the language model (pi0-FAST)",
    "spoken_beast": "BEAST said by the language model",
}


def write_models_page(root: Path) -> None:
    """Write ``docs/models.md``; every figure comes from the files in ``benchmarks/results``."""
    matrix, heads = (_read(root / "benchmarks" / "results" / f"{name}.json") for name in ("matrix", "heads"))
    parts = [INTRODUCTION, _matrix(matrix), _modes(matrix), _closed_loop(heads), _robots(heads), NUMERICS]
    (root / "docs" / "models.md").write_text("\n\n".join(part.strip() for part in parts if part) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _matrix(found: Mapping[str, Any]) -> str:
    cells = found.get("cells", {})
    if not cells:
        return ""
    backbones = [name for name in FAMILIES if any(key.startswith(f"{name} x ") for key in cells)]
    heads = [name for name in HEADS if any(key.endswith(f" x {name}") for key in cells)]

    def row(head: str, show: str) -> list[str]:
        return [head, *(_shown(cells.get(f"{backbone} x {head}"), show) for backbone in backbones)]

    learnt = sum(cell["learnt"] for cell in cells.values())
    worst = max(cells.items(), key=lambda item: item[1]["error"])
    chance = next(iter(cells.values()))["mean_error"]
    columns = ["head", *backbones]
    return f"""## Every backbone with every head

`benchmarks/matrix.py` on {found["machine"]}: each cell trains backbone and head for {found["steps"]} steps on one batch
of {found["batch"]} chunks (8 steps, 7 dimensions, 2 cameras of 48 px); it has learnt it when sampled chunks are off by
less than {found["bound"]} of the range (half of which is 1; always answering the batch's mean is off by {chance:.2f};
heads that write tokens are held to the nearest chunk that tokens can say). {learnt} of {len(cells)} cells have; the
worst is {worst[0]} at {worst[1]["error"]:.3f}. Backbones are small members of their families with random weights.

Error of the sampled chunks:

{table(columns, [row(head, "error") for head in heads])}

Milliseconds a training step of {found["batch"]} (one core, nothing else running, median of 15 steps; `--times`):

{table(columns, [row(head, "step_ms") for head in heads])}

Milliseconds a chunk for one observation, prefix included:

{table(columns, [row(head, "sample_ms") for head in heads])}

Thousands of parameters, of which the head's:

{table(columns, [row(head, "parameters") for head in heads])}
"""


def _shown(cell_: Mapping[str, Any] | None, what: str) -> str:
    if cell_ is None:
        return "not measured"
    if what == "error":
        return f"{cell_['error']:.3f}" if cell_["learnt"] else f"**{cell_['error']:.3f}**"
    if what == "parameters":
        return f"{cell_['parameters'] / 1e3:.0f} / {cell_['head_parameters'] / 1e3:.0f}"
    return f"{cell_[what]:.0f}"


def _modes(found: Mapping[str, Any]) -> str:
    modes = {name: value for name, value in found.get("modes", {}).items() if value}
    if not modes:
        return ""
    rows = [[HEADS[name], f"{v['-0.8']:.0%}", f"{v['0.8']:.0%}", f"{v['elsewhere']:.0%}"] for name, v in modes.items()]
    return f"""## Which heads keep two right answers apart

The same question, answered -0.8 in half of the data and +0.8 in the other: what 1000 samples say after 600 steps.
Regression answers what lies between; heads that write tokens greedily take one of them.

{table(["head", "near -0.8", "near +0.8", "elsewhere"], rows)}
"""


def _closed_loop(found: Mapping[str, Any]) -> str:
    if "heads" not in found:
        return ""
    rows = []
    for name in HEADS:
        run = found["heads"].get(name)
        if run:
            tasks = run["tasks"]["arm6_ee"]
            size, minutes = f"{run['parameters'] / 1e6:.1f} M", f"{run['seconds'] / 60:.0f}"
            rows.append([HEADS[name], *(cell(tasks[t]) for t in TASKS), size, minutes])
    return f"""## Heads in closed loop

`benchmarks/heads.py heads` on {found["machine"]}: the shipped encoder, frozen; {found["demos"]} demonstrations a task
of the six-joint arm, {found["steps"]} steps of 128 windows, {found["episodes"]} episodes a task that share no seed with
a demonstration, 95 % Wilson intervals. The minutes are of training beside other work on the same two cores.

{table(["head", *TASKS, "parameters", "minutes"], rows)}
"""


def _robots(found: Mapping[str, Any]) -> str:
    if "embodiments" not in found:
        return ""
    runs = found["embodiments"]
    rows = []
    for robot, about in (("arm6_ee", "six joints, 7 tool deltas"), ("arm7_joint", "seven joints, 8 joint targets")):
        for name, label in ((robot, "its own model"), ("both", "one model for both")):
            if name in runs:
                tasks = runs[name]["tasks"][robot]
                rows.append([f"{robot}: {about}", label, *(cell(tasks[t]) for t in TASKS)])
    return f"""## Two robots in one model

`benchmarks/heads.py embodiments`: two simulated arms that differ in joints, state and action. Encoder, pooling and
field are shared, each robot has its own state encoder, action encoder and decoder; the model for both saw as many
windows of each robot as its own model ({found["steps"]} steps of 128).

{table(["robot", "model", *TASKS], rows)}
"""


INTRODUCTION = """# Models

Made by `benchmarks/models_page.py` from `benchmarks/results/`. A model is a backbone, a head and the parts of each
embodiment, chosen by config:

```bash
brachium train store=STORE model=pi0 model.backbone.path=FOLDER tune=full        # a published recipe
brachium train store=STORE model=pi0 model/backbone=qwen3_vl model/head=dit      # any backbone, any head
brachium train store=[A,B] weights=[2,1] model=octo model.soft_prompts=8         # several robots
brachium import-policy policy=FOLDER tokenizer=FOLDER control_hz=20 out=OUT      # LeRobot's and openpi's checkpoints
brachium verify OUT                                                              # golden batches, checksums
```

- **Backbones** (`model/backbone=`): SmolVLM and Idefics3, PaliGemma and PaliGemma 2, Qwen2.5-VL, Qwen3-VL (`hf` takes
  any of them from a folder or hub name), `nano` (ours), `octo` (from scratch, T5 optional). One reads images and words
  once; the head attends to its last states, or layer by layer to its keys and values, or lets it go on writing.
  `layers` cuts the language model, `tune=full freeze=[vision]` keeps parts, `tune=lora` adapts by peft.
- **Heads** (`model/head=`): the table below. Solvers `euler`, `midpoint`, `heun`; several noise draws a prefix
  (`draws`); `insulate=true` with `model.speech` is knowledge insulation: no gradient of the expert in the language
  model, which learns to say the actions as tokens beside it.
- **Recipes** (`model=`): `pi0`, `pi05`, `pi0_fast`, `smolvla`, `groot`, `rt2`, `openvla_oft`, `octo`, `nano`. The
  published ones name weights on the hub; give `model.backbone.path` to train on others.

Write your own: [a head](extend/head.md), [a backbone](extend/backbone.md), [an embodiment](extend/embodiment.md).
"""

NUMERICS = """## What is proven, and against what

- PI0, PI05, SmolVLA and PI0-FAST of LeRobot 0.6.1, small and with the same random weights, in float32 on a CPU: prefix
  embeddings, every layer's keys and values, velocities, losses and ten-step actions within 1e-5; what PI0-FAST says is
  the same token for token. Their files load here, and what is exported loads there, weights bit for bit
  (`tests/vla/test_lerobot_policies.py`). The published weights themselves could not be reached where this was written.
- Every family against transformers' own forward; going on from a prefix against one pass over everything, to 1e-5; what
  stands in padding or in a missing camera changes nothing, not one bit (`tests/vla/test_prefix.py`).
- Flow fields, solvers' orders, time sampling and diffusion against closed forms of a Gaussian; masks by brute force;
  the cosine transform and splines against scipy; FAST against an implementation written from its paper on transformers;
  constrained decoding fuzzed (`test_flow.py`, `test_heads.py`, `test_action_tokens.py`).
- Under insulation the gradient of the flow loss in the language model is exactly 0, and that of its tokens is the one
  without an expert, bit for bit (`test_recipes.py`).
- An embodiment added to a checkpoint leaves every weight and answer of the others as they were, bit for bit
  (`test_embodiments.py`).

Where it differs on purpose: padded steps and constant dimensions never train (LeRobot's PI0 trains repeated actions
past the end of an episode); LeRobot's PI0-FAST reads its begin token with the prompt in sampling but after it in
training, here it stands after the prompt in both; tokens that write no action are an error, never zeros. Octo's own JAX
weights are not converted.
"""


if __name__ == "__main__":
    write_models_page(Path(__file__).resolve().parent.parent)
