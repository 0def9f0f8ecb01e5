"""Hydra configs: one primary YAML a verb, one folder a group."""
