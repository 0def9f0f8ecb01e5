"""What ``config.json`` of an exported folder holds; ``brachium export-policy kind=brachium`` writes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig


@PreTrainedConfig.register_subclass("brachium")
@dataclass
class BrachiumConfig(PreTrainedConfig):
    """A reference to a checkpoint, and how it is run.

    Attributes:
        checkpoint: Folder of the checkpoint; a relative one is looked for beside config.json.
        identity: Of the checkpoint that was exported.
        embodiment: For whom it acts.
        chunk_size: Actions in a chunk.
        n_action_steps: Actions that are executed before the next chunk is asked for.
        seed: Episode k draws its noise from seed + k.
        temperature: Factor of the noise.
        batch_size: Rows of a forward pass where there is more than one environment.
        instruction: What to do where LeRobot gives no task.
        axes: What the robot's keys mean, as JSON, in the order of its keys; empty where state and action are the
            embodiment's own.
        camera_keys: Camera of the embodiment -> LeRobot's name of it, where that differs.
        fit: Camera of the embodiment -> ``crop`` or ``squeeze``; the size of others must be right.
        action_feature_names: Keys of the action's elements.
        normalization_mapping: None: the model normalises by itself.
    """

    checkpoint: str = ""
    identity: str = ""
    embodiment: str = ""
    chunk_size: int = 1
    n_action_steps: int = 4
    seed: int = 1000
    temperature: float = 1.0
    batch_size: int = 8
    instruction: str = ""
    axes: str = ""
    camera_keys: dict[str, str] = field(default_factory=dict)
    fit: dict[str, str] = field(default_factory=dict)
    action_feature_names: list[str] | None = None
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    @property
    def observation_delta_indices(self) -> None:
        """One observation at a time."""
        return

    @property
    def action_delta_indices(self) -> list[int]:
        """A chunk from now on."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return

    def get_optimizer_preset(self) -> AdamWConfig:
        """Never used: policies are trained by ``brachium train``."""
        return AdamWConfig()

    def get_scheduler_preset(self) -> None:
        """None."""
        return

    def validate_features(self) -> None:
        """The policy compares them with the checkpoint."""
