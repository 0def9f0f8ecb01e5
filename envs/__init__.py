"""Gymnasium tasks, scripted experts and vector environments."""
