"""A checkpoint of brachium behind LeRobot's interface of policies, with the checks that LeRobot leaves out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from brachium.errors import CheckpointError, ConfigError
from brachium.policies.executor import RecedingHorizon
from brachium.policies.vla_policy import VLAPolicy
from brachium.vla.exchange.lerobot_plugin import identity_of

from .configuration_brachium import BrachiumConfig
from .translation import Translation

logger = logging.getLogger(__name__)


class BrachiumPolicy(PreTrainedPolicy):
    """Runs a checkpoint; every batch is held against its embodiment.

    Args:
        config: What ``config.json`` says, with LeRobot's overrides.
        folder: Where it lies.

    Raises:
        CheckpointError: The checkpoint is not the one that was exported, or does not prove itself.
        SpecMismatchError: Environment or robot take other actions.
    """

    config_class = BrachiumConfig
    name = "brachium"

    def __init__(self, config: BrachiumConfig, *, folder: str | Path = ".", **kwargs: Any) -> None:
        super().__init__(config)
        if config.use_amp:
            raise ConfigError("expected --policy.use_amp=false: a checkpoint runs in the precision it was verified in")
        place = Path(folder) / Path(config.checkpoint).expanduser()
        found = identity_of(place)
        if found != config.identity:
            raise CheckpointError(
                f"{place} is another checkpoint than the one that was exported: expected identity {config.identity}, "
                f"got {found}. Type: brachium export-policy kind=brachium checkpoint={place} out={folder}"
            )
        self.chunks = VLAPolicy.from_checkpoint(
            place, embodiment=config.embodiment, device=str(config.device), batch_size=sorted({1, config.batch_size})
        )
        self.model = self.chunks.model  # a part of this module: LeRobot moves it to a device
        self.translation = Translation(config, self.chunks.embodiment)
        self.executor = RecedingHorizon(
            self.chunks, execute_horizon=config.n_action_steps, temperature=config.temperature
        )
        self._episodes, self._lanes, self._asked = 0, 0, 0
        logger.warning("this policy acts at %g Hz: give --fps or an environment so", self.chunks.embodiment.control_hz)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> BrachiumPolicy:
        """The policy of an exported folder; `config` overrides its config.json."""
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision)
        return cls(config, folder=pretrained_name_or_path).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        self.config._save_pretrained(save_directory)  # weights stay where they are

    def reset(self) -> None:
        """New episodes begin; each lane that acted was one, and the next draws from the next seeds."""
        self._episodes += self._lanes
        self._lanes = 0

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Actions (b, a), in the units of environment or robot."""
        seen = self.translation.observations(batch)
        if not self._lanes:
            self._lanes = len(seen)
            for lane in range(self._lanes):
                self.executor.reset(lane, self.config.seed + self._episodes + lane)
        if len(seen) != self._lanes:
            raise ConfigError(f"expected {self._lanes} observations as at the episode's beginning, got {len(seen)}")
        return torch.from_numpy(self.translation.actions(self.executor.act(seen, range(self._lanes))))

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Chunks (b, h, a); each call draws anew."""
        seen = self.translation.observations(batch)
        generator = np.random.default_rng([self.config.seed, self._asked, 0xC4])
        self._asked += 1
        shape = (len(seen), self.chunks.action_horizon, self.chunks.noise_dim)
        noise = self.config.temperature * generator.standard_normal(shape, np.float32)
        return torch.from_numpy(self.translation.actions(self.chunks.predict(seen, noise).actions))

    def get_optim_params(self) -> dict[str, Any]:
        """Not here."""
        raise NotImplementedError("a checkpoint of brachium is trained by: brachium train")

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
        """Not here."""
        raise NotImplementedError("a checkpoint of brachium is trained by: brachium train")
