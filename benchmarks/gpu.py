"""Full-size pi0 on a GPU, in one call of less than ten minutes: latency of a chunk, and training.

    python benchmarks/gpu.py                 # all of it; needs an NVIDIA GPU of 80 GB or more
    python benchmarks/gpu.py --small         # the same steps on tiny models, anywhere: to see that it runs
    python benchmarks/gpu.py --parts chunk training --minutes 6

The model has pi0's shapes (3.3 B weights: SigLIP So400m, Gemma 2B, an expert of 300 M) and random weights; chunk of 50,
10 solver steps, views of 224 px. *Chunk*: 1, 2 and 3 views; plain in bf16, compiled, as a CUDA graph and with float8;
median and 99th percentile of 100, from pictures in memory to actions in memory, beside the floor
(`brachium.vla.roofline`), and how far the numbers are from the plain float32 model's. *LeRobot*: its own PI0 of the
same shapes, eager and compiled, where LeRobot 0.6 is installed. *Training*: all weights, float32 masters and averages,
bf16 arithmetic, activations recomputed: tokens a second, MFU, memory. Each figure is written when it is there, to
``benchmarks/results/gpu.json``; what there is no time for is left out and said.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from brachium.console import human_bytes, log, table
from brachium.hardware import hardware
from brachium.policies.profile import make_step, random_observation
from brachium.spec import EmbodimentSpec, FeatureSpec
from brachium.vla.accelerate import Acceleration, sampler_of
from brachium.vla.device_limits import bandwidth, peak_flops
from brachium.vla.meter import Meter, forget_peak_memory, peak_memory
from brachium.vla.model import VLAModel
from brachium.vla.optim import Optimization
from brachium.vla.profiling import profile_pass
from brachium.vla.recipe import Recipe
from brachium.vla.tokenizer import word_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("chunk", "training", "lerobot")
HOW = {
    "bf16": Acceleration(precision="bf16"),
    "bf16, compiled": Acceleration(precision="bf16", compile=True),
    "bf16, compiled, CUDA graph": Acceleration(precision="bf16", compile=True, graph=True),
    "fp8, compiled, CUDA graph": Acceleration(precision="fp8", compile=True, graph=True),
}
TINY = {
    "model_type": "paligemma",
    "text_config": {
        "model_type": "gemma",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 14,
        "image_size": 56,
        "projection_dim": 64,
    },
    "projection_dim": 64,
}


class Clock:
    """What there is time for.

    Args:
        minutes: In all.
    """

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60.0 * minutes

    def has(self, seconds: float, what: str) -> bool:
        """Whether so much is left; says so where it is not."""
        left = self.end - time.monotonic()
        if left < seconds:
            log(f"left out, {left:.0f} s are left: {what}")
        return left >= seconds


class Results:
    """Figures, on disk as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, *keys: str, value: Any) -> None:
        """Write a figure down."""
        node = self.found
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = value
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        log(f"{' / '.join(keys)}: {value}")


def spec_of(views: int, side: int) -> EmbodimentSpec:
    """A 7-axis arm with so many cameras."""
    names = (*(f"joint_{k}" for k in range(7)), "gripper")
    return EmbodimentSpec(
        name="arm",
        robot="arm",
        control_hz=50.0,
        cameras=tuple(FeatureSpec(name=f"view{k}", shape=(side, side, 3), dtype="uint8") for k in range(views)),
        state=FeatureSpec(name="state", shape=(8,), names=names),
        action=FeatureSpec(name="action", shape=(8,), names=names),
    )


def make_model(views: int, small: bool, place: torch.device) -> VLAModel:
    """pi0 as configured, with random weights."""
    with initialize_config_module("brachium.conf", version_base="1.3"):
        node = OmegaConf.to_container(compose("profile", ["model=pi0"]).model, resolve=True)
    node.pop("_target_"), node.pop("_recursive_")
    node["backbone"] = {**node["backbone"], "path": None, "config": {"model_type": "paligemma", "_resolved": True}}
    if small:
        node["backbone"]["config"] = TINY
        node |= {"head": {**node["head"], "width": 32, "mlp": 64}, "width": 32}
    with place:
        made = Recipe.from_dict(node).build({"arm": spec_of(views, 56 if small else 224)}, word_tokenizer(["a b"]))
    return made.to(place)


def wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def time_of(run: Callable[[], Any], place: torch.device, count: int) -> dict[str, float]:
    """Latency, each call awaited [ms]."""
    for _ in range(5):
        run()
    times = []
    for _ in range(count):
        wait(place)
        begin = time.perf_counter()
        run()
        wait(place)
        times.append(1e3 * (time.perf_counter() - begin))
    p50, p99 = np.quantile(times, [0.5, 0.99])
    return {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3), "count": count}


def free(place: torch.device) -> None:
    gc.collect()
    torch._dynamo.reset()
    if place.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place)


def measure_chunks(results: Results, clock: Clock, small: bool, place: torch.device, count: int) -> None:
    """Chunks of one observation."""
    ways = {k: v for k, v in HOW.items() if place.type == "cuda" or not (v.graph or v.precision == "fp8")}
    limits = peak_flops(place, "bf16"), bandwidth(place)
    for views in (2, 1, 3):
        key = f"{views} views" if views > 1 else "1 view"
        model = make_model(views, small, place).eval()
        observation = random_observation(model.embodiments["arm"], 1)
        shape = (1, model.recipe.action_horizon, model.noise_dim("arm"))
        noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        wanted = sampler_of(model, "arm", None)(observation, noise, None)
        for name, how in ways.items():
            if not clock.has(60.0 if how.compile else 15.0, f"chunk, {key}, {name}"):
                continue
            begin = time.monotonic()
            run = partial(sampler_of(model, "arm", how), observation, noise, None)
            far = float(np.abs(run() - wanted).max())
            first = time.monotonic() - begin
            forget_peak_memory(place)
            figures = time_of(run, place, count)
            noted = {"first_s": round(first, 1), "largest_difference_from_float32": round(far, 4)}
            results.put("chunk", key, name, value={**figures, **noted, "memory": peak_memory(place)})
            if name == "bf16":
                found = profile_pass(run, place, repeats=10, flops_per_s=limits[0], bytes_per_s=limits[1])
                parts = {
                    k: {"ms": round(p.ms, 3), "floor_ms": p.floor_ms, "bound": p.bound} for k, p in found.parts.items()
                }
                results.put("chunk", key, "floor", value={"ms": found.floor_ms, "parts": parts, "kinds": found.kinds})
            del run
        del model
        free(place)


def measure_lerobot(results: Results, clock: Clock, small: bool, place: torch.device, count: int) -> None:
    """LeRobot's own PI0 of the same shapes, with random weights."""
    try:
        import lerobot_peers as peers
        from lerobot.configs.types import FeatureType, PolicyFeature
        from lerobot.policies.pi0.configuration_pi0 import PI0Config
        from lerobot.policies.pi0.modeling_pi0 import PI0Policy
    except ImportError as error:
        log(f"LeRobot is not here ({error}): left out")
        return
    side = 112 if small else 224
    for views, compiled in ((2, False),) if small else ((2, False), (1, False), (3, False), (2, True)):
        name = "compiled" if compiled else "eager"
        if not clock.has(150.0 if compiled else 30.0, f"LeRobot, {views} views, {name}"):
            continue
        if small:
            policy = peers.make_pi0(next(iter(peers.SIZES["pi0"].values()))).to(place)
            views = len(peers.CAMERAS)
        else:
            inputs = {
                f"observation.images.view{k}": PolicyFeature(FeatureType.VISUAL, (3, side, side)) for k in range(views)
            }
            inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (8,))
            config = PI0Config(
                dtype="bfloat16",
                compile_model=compiled,
                device=place.type,
                input_features=inputs,
                output_features={"action": PolicyFeature(FeatureType.ACTION, (8,))},
            )
            policy = PI0Policy(config).to(place)
        policy.eval()
        images = [torch.rand(1, 3, side, side, device=place) * 2 - 1 for _ in range(views)]
        masks = [torch.ones(1, dtype=torch.bool, device=place) for _ in images]
        words = torch.ones(1, 48, dtype=torch.long, device=place)
        real = words.bool()
        state = torch.randn(1, 32, device=place)

        @torch.no_grad()
        def run(policy: Any = policy, given: Any = (images, masks, words, real, state)) -> Any:
            return policy.model.sample_actions(*given).float().cpu()

        begin = time.monotonic()
        run()
        first = round(time.monotonic() - begin, 1)
        key = f"{views} views" if views > 1 else "1 view"
        results.put("lerobot", key, name, value={**time_of(run, place, count), "first_s": first})
        del policy, run
        free(place)


def measure_training(results: Results, clock: Clock, small: bool, place: torch.device) -> None:
    """Steps of all weights."""
    for windows in (4, 2) if small else (32, 16, 8):
        for compiled in (False, True):
            name = f"{windows} windows" + (", compiled" if compiled else "")
            if not clock.has(90.0 if compiled else 45.0, f"training, {name}"):
                continue
            options = Optimization(
                steps=10**9,
                batch_size=windows,
                lr=1e-6,
                warmup=0,
                schedule="constant",
                ema=0.999,
                precision="bf16",
                checkpointing=True,
                compile=compiled,
            )
            model = make_model(2, small, place).train()
            try:
                with tempfile.TemporaryDirectory() as folder:
                    loop, batches, _ = make_step(model, "arm", options, "full", 8, Path(folder))
                    meter = Meter(place, "bf16", checkpointing=True)
                    if not compiled:
                        loop.count_arithmetic(batches, meter)
                        results.put("training", f"{windows} windows, arithmetic", value=meter.flops)
                    flops = meter.flops or results.found["training"].get(f"{windows} windows, arithmetic")
                    for _ in range(3):
                        loop.update(batches)
                    wait(place)
                    begin, steps = time.perf_counter(), 8
                    for _ in range(steps):
                        loop.update(batches)
                    wait(place)
                    seconds = (time.perf_counter() - begin) / steps
                    memory = peak_memory(place)
                    del loop
            except torch.OutOfMemoryError:
                log(f"training, {name}: out of memory")
                break
            finally:
                del model
                free(place)
            peak = peak_flops(place, "bf16")
            tokens = windows * (2 * (16 if small else 256) + 48 + 1 + 50)
            figures = {
                "ms": round(1e3 * seconds, 1),
                "windows_per_s": round(windows / seconds, 2),
                "tokens_per_s": round(tokens / seconds),
                "mfu": None if not peak or not flops else round(flops / seconds / peak, 3),
                "memory": memory,
            }
            results.put("training", name, value=figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit is left out")
    parser.add_argument("--count", type=int, default=100, help="chunks that are timed")
    parser.add_argument("--small", action="store_true", help="tiny models, on whatever is here")
    parser.add_argument("--out", default="", help="benchmarks/results/gpu.json by default")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        raise SystemExit("no CUDA device: expected an NVIDIA GPU of 80 GB or more. Type --small to try the steps here")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = Path(options.out) if options.out else ROOT / "benchmarks" / "results" / "gpu.json"
    results, clock = Results(target), Clock(options.minutes)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    results.put("hardware", value=hardware(place.type))
    results.put("versions", value={"torch": torch.__version__, "commit": commit})
    count = min(options.count, 5) if options.small else options.count
    if "chunk" in options.parts:
        measure_chunks(results, clock, options.small, place, count)
    if "training" in options.parts:
        measure_training(results, clock, options.small, place)
    if "lerobot" in options.parts:
        measure_lerobot(results, clock, options.small, place, count)
    rows = []
    for key, ways in results.found.get("chunk", {}).items():
        floor = ways.get("floor", {}).get("ms")
        theirs = {f"LeRobot, {k}": v for k, v in results.found.get("lerobot", {}).get(key, {}).items()}
        for name, figures in {**ways, **theirs}.items():
            if "p50_ms" in figures:
                rows.append([key, name, figures["p50_ms"], figures["p99_ms"], "" if not floor else f"{floor:.2f}"])
    table("a chunk", ["views", "", "p50 [ms]", "p99 [ms]", "floor [ms]"], rows)
    rows = [
        [name, f["ms"], f["windows_per_s"], f["tokens_per_s"], f["mfu"] or "", human_bytes(f["memory"])]
        for name, f in results.found.get("training", {}).items()
        if isinstance(f, dict)
    ]
    table("training, 2 views", ["", "ms", "windows/s", "tokens/s", "MFU", "memory"], rows)


if __name__ == "__main__":
    main()
