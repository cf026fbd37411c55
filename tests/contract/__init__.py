"""The battery that every registered method passes."""
