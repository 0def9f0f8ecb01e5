"""The verbs ``brachium import-policy`` and ``brachium export-policy``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...console import log, require_disk
from ...datasets.statistics import pooled_statistics
from ...datasets.store import EpisodeStore
from ...errors import ConfigError
from ...spec import EmbodimentSpec, Observation
from ..checkpoint import load_checkpoint, make_golden, save_checkpoint
from ..tokenizer import load_tokenizer
from .lerobot import read_config, read_lerobot, write_lerobot
from .lerobot_plugin import KIND, write_plugin

GOLDEN_INPUTS = 4


def import_policy(
    *,
    policy: str,
    tokenizer: str = "google/paligemma-3b-pt-224",
    out: str = "outputs/imported",
    control_hz: float | None = None,
    embodiment: Callable[..., Any] | Any | None = None,
    store: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> int:
    """A policy of LeRobot or openpi (pi0, pi0.5, pi0-FAST, SmolVLA) as a checkpoint that proves itself.

    Every weight is translated, and a name or shape that does not fit is an error that lists it. The golden batch is of
    random inputs: it holds the checkpoint to what it answers now, on this machine.

    Args:
        policy: Folder that ``save_pretrained`` wrote: config.json, model.safetensors, statistics.
        tokenizer: Folder or hub name of the text tokenizer; their checkpoints do not hold it. SmolVLA's is
            HuggingFaceTB/SmolVLM2-500M-Video-Instruct.
        out: Folder of the checkpoint.
        control_hz: Rate that the policy was trained for [Hz]; their files do not say. Taken from the store or the
            embodiment where one is given.
        embodiment: Whose policy it is; made up from the names in config.json where null.
        store: Take embodiment and statistics from this store, for a base model that has none for your robot.
        options: What to take in place of their configuration, as {vision_heads: 16}.
    """
    read_config(Path(policy))  # says what is wrong before anything is fetched
    require_disk(Path(out), 200e6, "importing a policy")
    spec, statistics = _spec(embodiment), None
    if store is not None:
        data = EpisodeStore.open(store)
        spec, statistics = data.embodiment, pooled_statistics([(data, range(data.num_episodes))])
    if control_hz is not None and spec is not None and spec.control_hz != control_hz:
        raise ConfigError(f"control_hz={control_hz} against {spec.control_hz} of {spec.name}: leave one of them out")
    rate = control_hz if control_hz is not None else getattr(spec, "control_hz", None)
    if rate is None:
        raise ConfigError(
            "the rate of a policy is not in its files: give control_hz=HZ, embodiment=NAME or store=STORE"
        )
    words = load_tokenizer(tokenizer)
    model = read_lerobot(
        policy, tokenizer=words, control_hz=rate, embodiment=spec, options=options, statistics=statistics
    )
    name, made = next(iter(model.embodiments.items()))
    rng = np.random.default_rng(0)
    inputs = [Observation.fake(made, rng, "pick up the block") for _ in range(GOLDEN_INPUTS)]
    golden = make_golden(model, name, Observation.stack(inputs))
    notes = {
        "head": type(model.head).__name__,
        "parameters": model.parameter_count(),
        "imported": {"from": policy, "tokenizer": tokenizer, "options": dict(options or {})},
    }
    path = save_checkpoint(Path(out), model, [golden], notes)
    load_checkpoint(path)
    log(f"{path}: {model.parameter_count() / 1e6:.2f} M weights of {policy}, saved and verified")
    return 0


def export_policy(
    *, checkpoint: str, kind: str, out: str, options: Mapping[str, Any] | None = None, robot: Any | None = None
) -> int:
    """A checkpoint as a policy of LeRobot: translated, where it has the parts of one, or run by a plugin.

    Args:
        checkpoint: Folder of a checkpoint; to be translated, with one embodiment.
        kind: ``pi0``, ``pi05``, ``pi0_fast`` or ``smolvla``; or ``brachium``, a folder that refers to any checkpoint,
            for LeRobot with the plugin in integrations/lerobot_policy_brachium.
        out: Folder to write config.json, and model.safetensors and statistics or processors, to.
        options: More of their configuration; for ``brachium``: embodiment, n_action_steps, seed, temperature,
            batch_size, instruction, device.
        robot: For ``brachium``: a robot of LeRobot (so101), whose YAML has units, keys and cameras; null for
            environments.
    """
    model = load_checkpoint(checkpoint)
    if kind == KIND:
        folder = write_plugin(model, checkpoint, out, options or {}, _inside_lerobot(robot))
        log(f"{folder}: for lerobot-eval --policy.path={folder}; it refers to {checkpoint}")
        return 0
    if robot is not None:
        raise ConfigError(f"kind={kind}: expected no robot, which is for kind={KIND}")
    path = write_lerobot(model, out, kind, options or {})
    log(f"{path}: {kind} with {model.parameter_count() / 1e6:.2f} M weights of {checkpoint}")
    return 0


def _inside_lerobot(robot: Any) -> dict[str, Any] | None:
    """What a driver says of LeRobot's keys."""
    if robot is None:
        return None
    if not hasattr(robot, "inside_lerobot"):
        raise ConfigError(f"expected a robot that LeRobot drives, such as so101, got {type(robot).__name__}")
    found: dict[str, Any] = robot.inside_lerobot()
    return found


def _spec(embodiment: Any) -> EmbodimentSpec | None:
    """A spec, or that of a simulated robot."""
    if embodiment is None or isinstance(embodiment, EmbodimentSpec):
        return embodiment
    spec: EmbodimentSpec = embodiment.spec
    return spec
