"""Figures and per-item numbers from published logs: what our metrics must reproduce."""
