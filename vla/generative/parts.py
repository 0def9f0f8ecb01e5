"""Training of a system part by part: what is trained on what, what is finished already, and what is saved."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ...console import human_time, log, require_disk
from ...errors import ConfigError
from ..checkpoint import checksums
from ..loop import TrainLoop
from ..optim import Optimization
from .frames import FrameData
from .generator import Guidance, inflated
from .others import COUNT, Others
from .reading import Reader, identity_of, read_store
from .sheet import write_sheet
from .stages import Augmentation, Objective, Stages
from .system import FORMAT, SubgoalSystem


def node_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """A factory as plain data that travels with the weights: ``_target_`` and arguments."""
    arguments: dict[str, Any] = {}
    made: Any = factory
    if isinstance(factory, partial):
        made, arguments = factory.func, dict(factory.keywords)
    return {"_target_": f"{made.__module__}.{made.__qualname__}", **arguments}


class Plan:
    """What is trained on what."""

    def __init__(
        self,
        kind: str,
        store: str,
        encoder: str,
        out: str,
        cameras: list[str],
        generator: dict[str, Any],
        policy: dict[str, Any],
        augmentation: Augmentation,
        goals: int,
        spread: int,
        heldout: float,
        resume: bool,
        seed: int,
    ) -> None:
        if goals < 1 or spread < 0 or spread >= generator["steps"]:
            raise ConfigError(
                f"expected goals from 1 and spread from 0 to below ahead={generator['steps']}, got {goals} and {spread}"
            )
        self.scaled, self.begun = False, list[str]()
        self.earlier: dict[str, float] = {}
        """Seconds of training that went into what it begins with."""
        self.kind, self.folder, self.resume = kind, Path(out), resume
        reader = Reader.load(encoder)
        self.data = FrameData.open(store, int(generator["size"]), heldout, cameras)
        patches = len(self.data.store.embodiment.camera_names) * reader.grid[0] ** 2 * reader.vision
        require_disk(
            self.folder, 200e6 + 2.0 * patches * len(self.data.owner), "training, with the vision of all frames"
        )
        reader.require(self.data.store.embodiment.camera_names)
        self.identity = {
            "format": FORMAT,
            "kind": kind,
            "data": self.data.store.fingerprint,
            "encoder": identity_of(encoder),
            "cameras": cameras,
            "generator": {**generator, "spread": spread},
            "noise": [augmentation.words, augmentation.places],
            "heldout": heldout,
            "seed": seed,
        }
        self.acting: dict[str, Any] = {"policy": policy, "augmentation": vars(augmentation), "goals": goals}
        torch.manual_seed(seed)  # of the initial weights
        self.system = SubgoalSystem(
            kind=kind,
            embodiment=self.data.store.embodiment,
            cameras=cameras,
            reader=reader,
            generator=generator,
            policy=policy,
            progress={},
        )
        own, other = read_store(reader, self.data, self.folder, encoder)
        self.stages = Stages(
            system=self.system,
            data=self.data,
            own=own,
            other=other,
            augmentation=augmentation,
            goals=goals,
            spread=spread,
        )

    def begin_with(self, init: str, parts: Sequence[str] = ("generator", "policy", "progress")) -> None:
        """Take what fits of some parts of another system."""
        other = SubgoalSystem.load(init)
        self.system.embodiment.require_same(other.embodiment, "the store", f"checkpoint {init}")
        if self.identity["encoder"] != identity_of(Path(init) / "encoder"):
            raise ConfigError(
                f"init={init} sees and reads with another pretrained model. Type: encoder={Path(init) / 'encoder'}"
            )
        for name in parts:
            mine, theirs = getattr(self.system, name), getattr(other, name).state_dict()
            own = mine.state_dict()
            if name == "generator":
                theirs = inflated(theirs, own)
            taken = {k: v for k, v in theirs.items() if k in own and own[k].shape == v.shape}
            mine.load_state_dict({**own, **taken})
            log(f"{name}: begins with {len(taken)} of {len(own)} tensors of {init}")
        meta = json.loads((Path(init) / "meta.json").read_text())
        self.scaled = self.scaled or "policy" in parts
        spent = sum(float(v) for k, v in meta["seconds"].items() if k != "total" and (k in parts or len(parts) == 3))
        self.earlier["init"] = self.earlier.get("init", 0.0) + spent
        self.begun.append(checksums(Path(init))["model.safetensors"])
        self.identity["init"] = self.begun


def train_parts(plan: Plan, parts: Mapping[str, Optimization], guidance: Guidance, samples: int) -> int:
    """Train the parts in this order, or take those that are finished; save the system, and draw held-out samples."""
    begin = time.process_time()
    system, stages, folder = plan.system, plan.stages, plan.folder
    rows = torch.from_numpy(plan.data.training)
    if not plan.scaled:  # what it begins with knows the scales that its weights were trained with
        system.policy.fit(plan.data.state[rows], plan.data.action[rows])
    notes: dict[str, Any] = {"seconds": dict(plan.earlier), "metrics": {}}
    made = 0.0
    for name, options in parts.items():
        if name == "policy" and stages.augmentation.round_trips > 0.0:
            before = time.monotonic()
            stages.make_round_trips(options.seed)
            made = time.monotonic() - before
        seconds, metrics = _part(plan, name, options)
        notes["seconds"][name], notes["metrics"][name] = round(seconds, 1), metrics
    notes["seconds"]["round_trips"] = round(made, 1)
    notes["seconds"]["total"] = round(sum(notes["seconds"].values()), 1)
    notes["process_cpu_seconds"] = round(time.process_time() - begin, 1)
    notes["threads"] = torch.get_num_threads()
    notes["parameters"] = sum(p.numel() for p in system.parameters())
    notes["head"] = f"{plan.kind} subgoals, {type(system.policy.head).__name__}"
    notes["seed"] = parts["generator"].seed
    store = plan.data.store
    notes["store"] = {
        "path": str(store.path),
        "fingerprint": store.fingerprint,
        "episodes": len(np.unique(plan.data.owner[plan.data.training])),
    }
    notes["optimization"] = {name: options.noted() for name, options in parts.items()}
    notes["identity"] = plan.identity | plan.acting
    system.eval()
    system.others = _others(stages)
    checkpoint = system.save(folder / "checkpoint", notes)
    SubgoalSystem.load(checkpoint)  # a checkpoint that cannot be loaded is no result
    if samples:
        log(f"held-out samples: {write_sheet(checkpoint / 'samples.png', stages, guidance, samples)}")
    log(f"{checkpoint}: saved and loaded, {human_time(notes['seconds']['total'])} of training")
    return 0


def _others(stages: Stages) -> Others:
    """First frames of held-out episodes, evenly chosen: where they begin, everything is still to be done."""
    data = stages.data
    pool = data.testing if len(data.testing) else data.training
    first = pool[np.unique(data.owner[pool], return_index=True)[1]]
    chosen = first[np.linspace(0, len(first) - 1, min(COUNT, len(first))).astype(int)]
    frames = {name: data.store.read_images(name, chosen) for name in data.store.embodiment.camera_names}
    return Others(frames=frames, texts=tuple(data.instructions(chosen)))


def _part(plan: Plan, name: str, options: Optimization) -> tuple[float, dict[str, float]]:
    """Train a part, or take it as it was finished before; seconds and metrics."""
    stages = plan.stages
    module: nn.Module = getattr(plan.system, name)
    make, loss, evaluate = (getattr(stages, f"{name}_{what}") for what in ("batch", "loss", "error"))
    identity = {**plan.identity, "part": name, "optimization": options.noted()}
    identity |= plan.acting if name == "policy" else {}
    path = plan.folder / f"part-{name}.safetensors"
    done = _finished(path, identity) if plan.resume else None
    vision = plan.folder / "vision.npy"
    vision.unlink(missing_ok=True)  # of a run that was killed
    if done is not None:
        module.load_state_dict(load_file(path), strict=True)
        log(f"{name}: finished before; reusing {path}")
        return done
    path.unlink(missing_ok=True)
    objective: Objective = loss
    loop = TrainLoop(
        name=name,
        module=module,
        make_batch=lambda step: make(step, options.seed, options.batch_size),
        loss=objective,
        options=options,
        folder=plan.folder,
        resume=plan.resume,
        evaluate=evaluate,
        identity=identity,
    )
    begun = time.monotonic()
    try:
        if name == "policy":
            stages.see(vision)
        seeing = time.monotonic() - begun
        metrics = loop.run()
    finally:
        stages.patches = None
        vision.unlink(missing_ok=True)
    loop.use_average()
    module.eval()
    meta = {"identity": json.dumps(identity, sort_keys=True, default=str), "seconds": str(loop.spent + seeing)}
    temporary = path.with_suffix(".partial")
    weights = {k: v.contiguous() for k, v in module.state_dict().items()}
    save_file(weights, temporary, meta | {"metrics": json.dumps(metrics)})
    temporary.replace(path)
    (plan.folder / f"resume-{name}.safetensors").unlink(missing_ok=True)
    return loop.spent + seeing, metrics


def _finished(path: Path, identity: Mapping[str, Any]) -> tuple[float, dict[str, float]] | None:
    """Seconds and metrics of a part that was trained with the same options on the same data; else None."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        same = meta["identity"] == json.dumps(dict(identity), sort_keys=True, default=str)
        return (float(meta["seconds"]), dict(json.loads(meta["metrics"]))) if same else None
    except (SafetensorError, KeyError, TypeError, ValueError):
        log(f"{path} is damaged; training this part again")
        return None
