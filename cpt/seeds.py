"""Seeds: one number in the stream, one derived per stage, so that a stage's draw never depends on the others."""

import hashlib


def stage_seed(seed: int, index: int, name: str) -> int:
    """A stage's seed from the stream's, its place and its name; below 2**31, as numpy and torch want it."""
    key = hashlib.sha256(f"{seed}/{index}/{name}".encode()).digest()
    return int.from_bytes(key[:4], "big") % 2**31
