"""How fast a chunk is sampled and a step is trained, beside LeRobot's own PI0 and SmolVLA with the same weights.

    python benchmarks/engine.py
    python benchmarks/engine.py --kinds pi0 --sizes 0 1 --rounds 15

One process; LeRobot's policy is built with random weights, written, and read by brachium, so that both hold the same;
that both say the same is checked before anything is measured. The two take turns, and what counts is the ratio of each
turn. Memory is the most that the process took above what it had before (Linux), each side alone. LeRobot runs as its
defaults say, in float32 and uncompiled. Writes ``benchmarks/results/engine.json``.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lerobot_peers as peers
import numpy as np
import torch

from brachium.console import log, table
from brachium.hardware import hardware
from brachium.spec import Observation
from brachium.vla.accelerate import Acceleration, QuickSampler
from brachium.vla.exchange.lerobot import read_lerobot
from brachium.vla.loop import TrainLoop
from brachium.vla.model import stack_images
from brachium.vla.optim import Optimization

NAMES = {"sampling": "sampling", "training": "training", "compiled": "sampling, compiled here"}
TARGET = Path(__file__).resolve().parent / "results" / "engine.json"
TEXT, WINDOWS = "put the red cube in the bowl", 4


class Pair:
    """A policy of LeRobot and the same one here."""

    def __init__(self, kind: str, sizes: peers.Sizes, folder: Path) -> None:
        self.kind = kind
        made = peers.make_pi0(sizes) if kind == "pi0" else peers.make_smolvla(folder / "vlm", sizes)
        peers.stir(made)
        self.before, self.after = peers.save(made, folder / "policy")
        options = {"vision_heads": sizes.vision_heads, "head_dim": sizes.head_dim}
        self.theirs, self.sizes = made, sizes
        self.ours = read_lerobot(folder / "policy", tokenizer=peers.tokenizer(), control_hz=10.0, options=options)
        (self.name,) = self.ours.embodiments
        self.folder = folder

    def inputs(self, count: int) -> tuple[dict[str, Any], tuple[Any, Any, Any], torch.Tensor, torch.Tensor]:
        """Observations for them and for us, noise, and actions."""
        rng, side = np.random.default_rng(1), self.sizes.side
        images = {n: rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8) for n in peers.CAMERAS}
        state = torch.from_numpy(rng.normal(0, 0.7, (count, peers.STATE)).astype(np.float32))
        action = torch.from_numpy(rng.normal(0, 0.7, (count, peers.CHUNK, peers.ACTION)).astype(np.float32))
        noise = torch.randn(count, peers.CHUNK, peers.PAD, generator=torch.Generator().manual_seed(2))
        words = peers.tokenizer()([f"{TEXT}\n"] * count, padding="max_length", max_length=48, padding_side="right")
        batch = {f"observation.images.{k}": torch.from_numpy(v).permute(0, 3, 1, 2) / 255.0 for k, v in images.items()}
        batch |= self.before._normalize_observation({"observation.state": state}, inverse=False)
        batch["observation.language.tokens"] = torch.tensor(words["input_ids"])
        batch["observation.language.attention_mask"] = torch.tensor(words["attention_mask"]).bool()
        batch["action"] = self.before._normalize_action(action, inverse=False)
        stacked = stack_images(images, self.ours.embodiments[self.name], torch.device("cpu"))
        return batch, (stacked, self.ours.tokens([TEXT] * count, state, self.name), state), noise, action

    def sampling(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """A chunk of one observation, from its images to actions."""
        batch, seen, noise, _ = self.inputs(1)
        self.theirs.eval()
        self.ours.eval()

        @torch.no_grad()
        def theirs() -> Any:
            if self.kind == "smolvla":
                return self.theirs.predict_action_chunk(batch, noise=noise)
            images, masks = self.theirs._preprocess_images(batch)
            words = [batch[f"observation.language.{key}"] for key in ("tokens", "attention_mask")]
            return self.theirs.model.sample_actions(
                images, masks, *words, self.theirs.prepare_state(batch), noise=noise
            )

        @torch.no_grad()
        def ours() -> Any:
            return self.ours.sample(self.ours.encode(*seen, self.name), seen[-1], noise, self.name)

        wanted = self.after._normalize_action(theirs()[..., : peers.ACTION], inverse=True)
        torch.testing.assert_close(ours(), wanted, atol=1e-4, rtol=1e-4)
        return theirs, ours

    def compiled(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """The same chunk, here with ``acceleration=compiled``; LeRobot's is what it is by default."""
        theirs, ours = self.sampling()
        sampler = QuickSampler(copy.deepcopy(self.ours), self.name, Acceleration(compile=True))
        rng, side = np.random.default_rng(1), self.sizes.side
        images = {n: rng.integers(0, 256, (1, side, side, 3), dtype=np.uint8) for n in peers.CAMERAS}
        state = rng.normal(0, 0.7, (1, peers.STATE)).astype(np.float32)
        seen = Observation(images=images, state=state, instruction=(TEXT,))
        noise = torch.randn(1, peers.CHUNK, peers.PAD, generator=torch.Generator().manual_seed(2)).numpy()

        def quick() -> Any:
            return torch.from_numpy(sampler.predict(seen, noise))

        torch.testing.assert_close(quick(), ours(), atol=1e-4, rtol=1e-4)
        return theirs, quick

    def training(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """A step of a few windows: forward, backward, clipping, AdamW; here with averaged weights too."""
        batch, seen, noise, action = self.inputs(WINDOWS)
        t = torch.linspace(0.05, 0.95, WINDOWS)
        self.theirs.train()
        self.ours.train()
        self.ours.encoder.requires_grad_(self.kind == "pi0")  # LeRobot's SmolVLA trains the expert alone
        weights = [p for p in self.theirs.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-12, betas=(0.9, 0.95))
        pad = torch.zeros(WINDOWS, peers.CHUNK, dtype=torch.bool)

        def theirs() -> Any:
            if self.kind == "smolvla":
                loss, _ = self.theirs.forward(batch, noise=noise, time=t)
            else:
                images, masks = self.theirs._preprocess_images(batch)
                words = [batch[f"observation.language.{key}"] for key in ("tokens", "attention_mask")]
                prepared = self.theirs.prepare_state(batch), self.theirs.prepare_action(batch)
                loss = self.theirs.model.forward(images, masks, *words, *prepared, noise, t)[..., : peers.ACTION].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        def objective(_: Any, generator: Any) -> Any:
            context = self.ours.context(self.ours.encode(*seen, self.name), seen[-1], self.name)
            normalised, active = self.ours.normalised_action(action, self.name, seen[-1])
            return self.ours.head.loss_at(context, normalised, ~pad, active, self.name, noise, t).mean(), {}

        loop = TrainLoop(
            name="act",
            module=self.ours,
            make_batch=lambda step: None,
            loss=objective,
            options=Optimization(steps=10**9, batch_size=WINDOWS, lr=1e-12, warmup=0, precision="float32"),
            folder=self.folder / "run",
            resume=False,
        )

        def ours() -> Any:
            return loop.update([None])[0]["loss"].item()

        wanted = theirs()
        assert abs(ours() - wanted) < 1e-4 * abs(wanted), (ours(), wanted)
        return theirs, ours


def compare(theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Times in turns, their ratios, and memory."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, found in zip((theirs, ours), times):
            begin = time.perf_counter()
            run()
            found.append(time.perf_counter() - begin)
    ratios = sorted(a / b for a, b in zip(*times))
    memory = [statistics.median(extra_memory(run) for _ in range(3)) for run in (theirs, ours)]
    return {
        "lerobot_ms": round(1e3 * statistics.median(times[0]), 2),
        "brachium_ms": round(1e3 * statistics.median(times[1]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratios[0], 3), round(ratios[-1], 3)],
        "lerobot_mb": round(memory[0] / 1e6, 1),
        "brachium_mb": round(memory[1] / 1e6, 1),
    }


def extra_memory(run: Callable[[], Any]) -> float:
    """Most memory that a call takes above what the process has before [bytes]."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024.0 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(peers.SIZES), default=list(peers.SIZES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[0, 1, 2], help="0 is the smallest")
    parser.add_argument("--parts", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {"rows": {}}
    found |= {"hardware": hardware("cpu"), "threads": torch.get_num_threads(), "windows": WINDOWS}
    rows = []
    for kind in options.kinds:
        for number in options.sizes:
            size, sizes = list(peers.SIZES[kind].items())[number]
            with tempfile.TemporaryDirectory() as folder:
                pair = Pair(kind, sizes, Path(folder))
                for what in options.parts:
                    row = compare(*getattr(pair, what)(), options.rounds)
                    found["rows"][f"{kind}, {size}, {NAMES[what]}"] = row
                    TARGET.write_text(json.dumps(found, indent=1) + "\n")
                    log(f"{kind}, {size}, {what}: {row}")
    for name, row in found["rows"].items():
        times = [f"{row[key]:.0f}" for key in ("lerobot_ms", "brachium_ms")]
        memory = [f"{row[key]:.0f}" for key in ("lerobot_mb", "brachium_mb")]
        rows.append([name, *times, f"{row['ratio']:.2f} ({row['ratios'][0]:.2f}-{row['ratios'][1]:.2f})", *memory])
    columns = ["", "LeRobot [ms]", "brachium [ms]", "times faster", "LeRobot [MB]", "brachium [MB]"]
    table(f"{found['hardware']}, {options.rounds} turns", columns, rows)


if __name__ == "__main__":
    main()
