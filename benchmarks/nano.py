"""What the shipped model costs: loading, a forward and a backward pass a sample, memory.

Type: .venv/bin/python benchmarks/nano.py    (figures go to ``benchmarks/results/nano.json``)

A sample is one observation: two images and one instruction, or a scene of pretraining with nine texts. Loading is
measured in a fresh process after the libraries are imported; each figure is the best of several.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from demo_controls import ROOT

from brachium.hardware import processor

TARGET = ROOT / "benchmarks" / "results" / "nano.json"
LOAD = """
import time, torch, transformers
from brachium.vla.pretrained import Pretrained
begin = time.perf_counter(); Pretrained.load("nano"); print(time.perf_counter() - begin)
"""


def best(work: Callable[[], object], times: int = 7) -> float:
    """Seconds of the quickest run, after one to warm up."""
    work()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found)


def peak() -> float:
    """Largest resident memory so far [MB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # --help must not measure and write
    import torch

    from brachium.vla.pretrained import Pretrained, find_pretrained

    loads = [
        float(subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    before = peak()
    model = Pretrained.load("nano")
    encoder = model.encoder
    images = torch.randint(0, 256, (16, 2, 96, 96, 3), dtype=torch.uint8)
    state = torch.zeros(16, 1 + max(encoder.body))
    results: dict[str, object] = {
        "machine": f"{os.cpu_count()} cores, {processor()}, no GPU",
        "megabytes": sum(f.stat().st_size for f in find_pretrained("nano").iterdir()) / 1e6,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "load_s": min(loads),
        "load_mb": peak() - before,
    }
    for name, texts, length in (("one", 1, 12), ("nine", 9, 20)):
        tokens = torch.randint(4, 700, (16, texts, length))

        def forward(tokens: torch.Tensor = tokens) -> torch.Tensor:
            points, words = encoder.points_of(encoder.read(images, tokens), state)
            return points.uv.square().mean() + points.position.square().mean() + words.square().mean()

        def backward() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward()
            loss.backward()

        encoder.eval()
        with torch.no_grad():
            results[f"forward_ms_{name}"] = 1000 * best(forward) / 16
        encoder.train()
        results[f"train_ms_{name}"] = 1000 * best(backward) / 16
    results["peak_mb"] = peak()
    Path(TARGET).write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
