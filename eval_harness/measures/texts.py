"""Plain text: what a byte of it costs the model, and what the tokenizer loses of it."""

from __future__ import annotations

import math
from collections import Counter

from eval_harness.items import Item, Measured
from eval_harness.measures.base import TEXT, Measure, ratio, window
from eval_harness.results import Result


def bits_per_byte(measured: Measured) -> Result:
    """Bits of all tokens over the bytes that survive tokenisation, over the whole set.

    Windows of the model's context; each starts with the last token of the one before (the first with bos,
    else eos), so every token is predicted once. The end of a text is not predicted. The standard error is
    that of a ratio of sums: sqrt(n / (n - 1) * sum (bits_i - r bytes_i)^2) / sum bytes.
    """
    items, excluded = measured.kept("text")
    survivors = [item for item in items if _bytes(item)]
    excluded["no_byte_survives"] += len(items) - len(survivors)
    triples = [(item.row.id, _bits(item), float(_bytes(item))) for item in survivors]
    lost = lost_bytes_share(measured).value
    note = None if not lost else f"the tokenizer loses {lost:.2%} of the text's bytes; they are not counted"
    return ratio(triples, f"bits_per_byte@1(window={window(measured)},surviving_bytes)", excluded, note)


def lost_bytes_share(measured: Measured) -> Result:
    """Share of the text's bytes that are gone after decode(encode(text)), over the whole set."""
    triples = []
    for item in measured.items:
        total = len((item.row.text or "").encode())
        triples.append((item.row.id, float(total - _bytes(item)), float(total)))
    return ratio(triples, "lost_bytes_share@1(characters_as_multiset)", Counter(), None)


def surviving_bytes(text: str, decoded: str) -> int:
    """UTF-8 bytes of the characters of `text` that are still there in `decoded`, counted as multisets:
    exact where a tokenizer drops or replaces characters, which is how bytes are lost."""
    kept = Counter(text) & Counter(decoded)
    return sum(count * len(character.encode("utf-8", "surrogatepass")) for character, count in kept.items())


def _bytes(item: Item) -> int:
    return item.records["text"].surviving_bytes


def _bits(item: Item) -> float:
    return -math.fsum(one.log_prob for one in item.answers("text")) / math.log(2)


MEASURES = {
    "bits_per_byte": Measure(bits_per_byte, ("text",), TEXT, higher_is_better=False),
    "lost_bytes_share": Measure(lost_bytes_share, ("text",), TEXT, higher_is_better=False),
}
