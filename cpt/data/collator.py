"""Token rows become a padded batch that still knows each row's origin."""

from dataclasses import dataclass
from typing import Any

import torch

from cpt.data.tokens import IGNORED


@dataclass
class Collator:
    """Right-pads to the longest row (or a multiple), keeps `origin` and `row`.

    Packed rows come without attention mask: positions that start again at 0 keep their parts from seeing
    one another. Padding behind a packed row is a part of its own.

    beside: origin of the rows that stand beside others (`template_ids`): they follow behind the batch's own.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    packed: bool = False
    beside: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows with input_ids, labels, origin, row -> tensors (B, T), origin and row (B,)."""
        rows = rows + [self._template(row) for row in rows if row.get("template_ids") is not None]
        length = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        ids = torch.full((len(rows), length), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED, dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n] = torch.as_tensor(row["input_ids"])
            labels[i, :n] = torch.as_tensor(row["labels"])
            mask[i, :n] = 1
        batch = {"input_ids": ids, "labels": labels}
        if self.packed:
            batch["position_ids"] = torch.stack([_positions(row["seq_lengths"], length) for row in rows])
            # The first token of a part would be predicted from the part before it.
            labels[batch["position_ids"] == 0] = IGNORED
        else:
            batch["attention_mask"] = mask
        batch["origin"] = torch.tensor([row["origin"] for row in rows])
        batch["row"] = torch.tensor([row["row"] for row in rows])
        return batch

    def _template(self, row: dict[str, Any]) -> dict[str, Any]:
        own = {"input_ids": row["template_ids"], "labels": row["template_labels"], "row": row["template_row"]}
        return own | {"origin": self.beside}


def _positions(parts: list[int], length: int) -> torch.Tensor:
    """0..n-1 for every part, and for the padding behind the last one."""
    rest = length - sum(parts)
    return torch.cat([torch.arange(n) for n in [*parts, rest] if n])
