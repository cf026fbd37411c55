"""Losses as pure tensor functions: no model, no trainer, no files."""
