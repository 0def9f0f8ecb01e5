"""Environments that others wrote, with our spec, instructions, seeds, success and cameras."""
