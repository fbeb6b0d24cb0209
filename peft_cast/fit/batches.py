"""Batches of aligned texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..align import AlignedPair


def collate_pairs(pairs: Sequence[AlignedPair]) -> dict[str, torch.Tensor]:
    """Pad a list of aligned texts to one batch.

    Args:
        pairs: n aligned texts.

    Returns:
        `source_input_ids`, `source_attention_mask` (n, longest source), `target_input_ids`, `target_attention_mask`
        (n, longest target), and for the m aligned positions of the batch `rows`, `source_positions`,
        `target_positions` (m,), all int64. Padding is on the right, where causal models never see it.
    """
    batch = {}
    for side in ("source", "target"):
        ids = [torch.tensor(getattr(pair, f"{side}_ids")) for pair in pairs]
        mask = [torch.ones(len(i), dtype=torch.long) for i in ids]
        batch[f"{side}_input_ids"] = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        batch[f"{side}_attention_mask"] = torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)
        batch[f"{side}_positions"] = torch.tensor([p for pair in pairs for p in getattr(pair, f"{side}_positions")])
    batch["rows"] = torch.tensor([row for row, pair in enumerate(pairs) for _ in pair.source_positions])
    return batch


def side_of(
    batch: dict[str, torch.Tensor], side: str, device: torch.device
) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Model inputs of one side (`"source"` or `"target"`) and the index (rows, positions) of its aligned positions."""
    inputs = {
        "input_ids": batch[f"{side}_input_ids"].to(device),
        "attention_mask": batch[f"{side}_attention_mask"].to(device),
        "use_cache": False,
    }
    return inputs, batch["rows"].to(device), batch[f"{side}_positions"].to(device)
