"""Rows: where they come from, how they become tokens, and how sources share an effective batch."""
