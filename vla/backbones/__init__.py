"""Backbones: from images and words to token features."""
