"""How several texts on one image prefix are laid out in one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a sequence ``[prefix][text 1]...[text k]`` is laid out.

    Attributes:
        prefix: Who in the prefix sees whom, (m, m).
        own: Who in a text sees whom in it, (b, k, e, e).
    """

    prefix: Bool[Tensor, "m m"]
    own: Bool[Tensor, "b k e e"]
