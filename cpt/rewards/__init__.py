"""What a completion is worth: bundled rewards in TRL's own signature, their configuration, how they are asked."""

from cpt.rewards.numbers import math, numeric
from cpt.rewards.text import exact_match, format

__all__ = ["exact_match", "format", "math", "numeric"]
