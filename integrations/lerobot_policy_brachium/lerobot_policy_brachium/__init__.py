"""Checkpoints of brachium as policies of LeRobot; only the configuration is imported before one is used."""

from .configuration_brachium import BrachiumConfig

__all__ = ["BrachiumConfig"]
