"""Batches of aligned texts, with texts that hold the target in place between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .tokens import AlignedPair


def anchor_positions(anchor: AlignedPair) -> tuple[int, ...]:
    """Where an anchor is compared: at every second position, because neighbors say much the same and the head is
    dear.
    """
    return anchor.target_positions[::2]


def collate_pairs(pairs: Sequence[AlignedPair], anchors: Sequence[AlignedPair] = ()) -> dict[str, Any]:
    """Pad a list of aligned texts, and anchors that only the target reads, to one batch.

    Args:
        pairs: n aligned texts.
        anchors: a more texts; they become the last rows of the target's inputs.

    Returns:
        `source_input_ids`, `source_attention_mask` (n, longest source), `target_input_ids`, `target_attention_mask`
        (n + a, longest target); for the m aligned positions of the batch `rows`, `source_positions`,
        `target_positions` (m,); for the positions of the anchors `anchor_rows`, `anchor_positions`. All int64. Padding
        is on the right, where causal models never see it. And `longest`, the most target tokens of a text and of an
        anchor.
    """
    batch: dict[str, Any] = {}
    for side, texts in (("source", pairs), ("target", [*pairs, *anchors])):
        ids = [torch.tensor(getattr(pair, f"{side}_ids")) for pair in texts]
        batch[f"{side}_input_ids"] = _pad(ids)
        batch[f"{side}_attention_mask"] = _pad([torch.ones_like(i) for i in ids])
        batch[f"{side}_positions"] = torch.tensor([p for pair in pairs for p in getattr(pair, f"{side}_positions")])
    batch["rows"] = torch.tensor([row for row, p in enumerate(pairs) for _ in p.source_positions], dtype=torch.long)
    kept = [anchor_positions(anchor) for anchor in anchors]
    batch["anchor_rows"] = torch.tensor([len(pairs) + row for row, p in enumerate(kept) for _ in p], dtype=torch.long)
    batch["anchor_positions"] = torch.tensor([p for positions in kept for p in positions], dtype=torch.long)
    batch["longest"] = tuple(max((len(pair.target_ids) for pair in part), default=0) for part in (pairs, anchors))
    return batch


def _pad(ids: Sequence[torch.Tensor]) -> torch.Tensor:
    return pad_sequence(ids, batch_first=True) if ids else torch.zeros(0, 0, dtype=torch.long)


def side_of(batch: dict[str, Any], side: str, device: torch.device) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Model inputs of one side (`"source"` or `"target"`) and the index (rows, positions) of its aligned positions."""
    inputs = {
        "input_ids": batch[f"{side}_input_ids"].to(device),
        "attention_mask": batch[f"{side}_attention_mask"].to(device),
        "use_cache": False,
    }
    return inputs, batch["rows"].to(device), batch[f"{side}_positions"].to(device)


def anchors_of(batch: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The index (rows, positions) of the anchors' positions in the target's inputs."""
    return batch["anchor_rows"].to(device), batch["anchor_positions"].to(device)
