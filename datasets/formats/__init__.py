"""Importers: one file for each foreign episode format."""
