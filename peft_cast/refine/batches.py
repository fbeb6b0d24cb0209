"""Batches of aligned texts, with texts that hold the target in place between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..align import AlignedPair, collate_pairs
from ..text import ANCHOR_EVERY


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
    """Texts of about one length together, in a random order that is another in every epoch: a batch is padded to its
    longest.

    `transformers`' `LengthGroupedSampler` goes from long to short texts and draws an order that no resumed run draws
    again.

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
