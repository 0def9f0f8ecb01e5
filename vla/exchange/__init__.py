"""Policies of other frameworks, brought in and out."""
