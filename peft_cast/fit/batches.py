"""Batches of aligned texts, with texts that hold the target in place between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..align import AlignedPair


ANCHOR_EVERY = 4  # texts per anchor


class TrainingTexts(Dataset):
    """What the refinement reads: texts to imitate the teacher on, and general text to stay as the target is on.

    Args:
        pairs: Aligned texts that the adapter changes.
        anchors: General texts; item i brings one along whenever `i % every == 0`.
        every (`int`): Texts per anchor.
    """

    def __init__(
        self, pairs: Sequence[AlignedPair], anchors: Sequence[AlignedPair] = (), every: int = ANCHOR_EVERY
    ) -> None:
        self.pairs, self.anchors, self.every = pairs, anchors, every

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[AlignedPair, AlignedPair | None]:
        brings_one = self.anchors and i % self.every == 0
        return self.pairs[i], self.anchors[i // self.every % len(self.anchors)] if brings_one else None


class ByLength(Sampler[int]):
    """Texts of about one length together, in a random order that is another in every epoch: a batch is padded to its longest.

    `transformers`' `LengthGroupedSampler` goes from long to short texts and draws an order that no resumed run draws again.

    Args:
        lengths: Of each text.
        batch_size (`int`): Texts per step, of all processes and accumulated batches together.
        seed (`int`): Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=draw)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        whole = len(order) // self.batch_size  # what is left over stays at the end, or all that follows would shift
        for i in [*torch.randperm(whole, generator=draw).tolist(), *range(whole, len(batches))]:
            yield from batches[i]


def collate_items(items: Sequence[tuple[AlignedPair, AlignedPair | None]]) -> dict[str, Any]:
    """Pad items of `TrainingTexts` to one batch; under `texts` lie the texts themselves, (pairs, anchors)."""
    texts = [pair for pair, _ in items], [anchor for _, anchor in items if anchor is not None]
    return {**collate_pairs(*texts), "texts": texts}


def anchor_length(max_length: int) -> int:
    """Tokens that an anchor has at most where a text has `max_length`: many short stretches say more than a few long ones."""
    return max(max_length // 2, 16)


def anchor_positions(anchor: AlignedPair) -> tuple[int, ...]:
    """Where an anchor is compared: at every second position, because neighbours say much the same and the head is dear."""
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
        is on the right, where causal models never see it. And `longest`, the most target tokens of a text and of an anchor.
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
