"""What to type where a source does not say what its numbers mean: a YAML with all that it does say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import SpecMismatchError
from ...spec import GRIPPERS, REFERENCES, ROTATIONS

ASK = "???"


def ask_for_embodiment(
    source: Path,
    importer: str,
    *,
    control_hz: float | None,
    robot: str | None,
    cameras: Mapping[str, Sequence[int]],
    state: tuple[int, Sequence[str]],
    action: tuple[int, Sequence[str]],
) -> SpecMismatchError:
    """Return the error that asks for an embodiment, with a draft of it.

    Args:
        source: The data.
        importer: Option of the group ``data`` that the draft builds on.
        control_hz: Rate, if the data says it [Hz].
        robot: Name of the robot, if the data says it.
        cameras: Camera -> (height, width, 3).
        state: Number of elements, and their names as far as they are said.
        action: As `state`.
    """
    lines = [
        "# What the data means. It does not say itself what stands as ??? here.",
        "defaults:",
        f"  - {importer}",
        "  - _self_",
        "embodiment:",
        "  _target_: brachium.spec.EmbodimentSpec",
        f"  name: {ASK}",
        f"  robot: {robot or ASK}",
        f"  control_hz: {control_hz or ASK}",
        "  cameras:" + ("" if cameras else " []"),
        *(f"    - {{name: {name}, shape: {list(shape)}, dtype: uint8}}" for name, shape in cameras.items()),
    ]
    for name, (dim, names) in (("state", state), ("action", action)):
        said = f"[{', '.join(names)}]" if len(names) == dim else f"{ASK}  # {dim} words"
        lines += [
            f"  {name}:",
            f"    name: {name}",
            f"    shape: [{dim}]",
            f"    names: {said}",
            f'    units: {ASK}      # {dim} of them: m, rad, m/s, "1" for none',
            f"    reference: {ASK}  # {' or '.join(REFERENCES)}",
            f"    rotation: {ASK}   # {', '.join(ROTATIONS)}",
            f"    gripper: {ASK}    # {', '.join(GRIPPERS)}",
            '    frame: ""        # base, world, tool ...; empty for joints',
        ]
    draft = "\n".join(lines)
    return SpecMismatchError(
        f"{source} does not say what its numbers mean, and nothing is guessed. Save this as my_conf/data/mine.yaml, "
        f"fill in what stands as {ASK}, and type:\n"
        f"  brachium convert source={source} data=mine out=OUT --config-dir my_conf\n\n"
        f"{draft}\n"
    )
