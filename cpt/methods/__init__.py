"""Techniques against forgetting: `base` is the contract, `registry` finds classes, then one file per method."""
