"""Errors that users can act on.

Every error brachium raises for a user's mistake is a `BrachiumError` and also a built-in error, so that code
which knows nothing of brachium can catch it. Messages follow one pattern: what was expected, what came, and what
to type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BrachiumError(Exception):
    """Base of all errors meant for the user; the command line prints it without a traceback and exits with 2."""


class ConfigError(BrachiumError, ValueError):
    """A verb, config group, option or value that does not exist or does not fit."""


class NotFoundError(BrachiumError, FileNotFoundError):
    """A store, checkpoint or file that is not where it was said to be."""

    def __str__(self) -> str:  # FileNotFoundError formats (errno, strerror) pairs; ours is one sentence
        return str(self.args[0]) if self.args else ""


class SpecMismatchError(BrachiumError, ValueError):
    """Two specs that should describe the same thing do not."""


class StoreError(BrachiumError, RuntimeError):
    """An episode store that is damaged, empty or used against its rules."""


class CheckpointError(BrachiumError, RuntimeError):
    """A checkpoint that is incomplete, damaged, or does not reproduce its golden batch."""


class RenderError(BrachiumError, RuntimeError):
    """No working MuJoCo rendering backend."""


class DecodeError(BrachiumError, ValueError):
    """Model output that is no valid action."""


class WireError(BrachiumError, ValueError):
    """A message that is not what the protocol allows."""


class ServerError(BrachiumError, ConnectionError):
    """A policy server that cannot be reached, refuses, or answers with an error."""

    def __str__(self) -> str:  # ConnectionError formats (errno, strerror) pairs; ours is one sentence
        return str(self.args[0]) if self.args else ""


class RobotError(BrachiumError, RuntimeError):
    """A robot, camera or teleoperation device that is missing, faulty, or does not fit."""


class SafetyError(BrachiumError, RuntimeError):
    """Something that may not be sent to a robot."""


class DeviceMemoryError(BrachiumError, MemoryError):
    """Not enough memory on the device for what was asked."""


class DiskSpaceError(BrachiumError, OSError):
    """Not enough free disk space for what was asked."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return a hint such as ``Did you mean 'train'? Choices: eval, train.`` for a word that is none of `options`."""
    choices = sorted(set(options))
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Choices: {', '.join(choices)}."
