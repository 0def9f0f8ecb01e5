"""brachium: train and run vision-language-action policies for robots."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first use, so that `import brachium` imports no torch.
_PUBLIC = {
    "ActionChunk": ".spec",
    "EmbodimentSpec": ".spec",
    "FeatureSpec": ".spec",
    "Observation": ".spec",
    "BrachiumError": ".errors",
    "EpisodeStore": ".datasets.store",
    "VLAPolicy": ".policies.vla_policy",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .datasets.store import EpisodeStore as EpisodeStore
    from .errors import BrachiumError as BrachiumError
    from .policies.vla_policy import VLAPolicy as VLAPolicy
    from .spec import ActionChunk as ActionChunk
    from .spec import EmbodimentSpec as EmbodimentSpec
    from .spec import FeatureSpec as FeatureSpec
    from .spec import Observation as Observation


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module 'brachium' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
