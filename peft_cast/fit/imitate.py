"""A refinement with what it reached: the distance to the teacher on held-out text before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel

from .. import ranks
from ..align import AlignedPair
from ..phases import Phases
from .batches import TrainingTexts, collate_pairs
from .losses import kl_divergence
from .out_of_memory import within_memory
from .refine import Refinement, refine
from .teacher import Teacher


@torch.no_grad()
def distance_to_teacher(
    model: PeftModel, teacher: Teacher, pairs: Sequence[AlignedPair], batch_size: int = 8
) -> float:
    """KL(teacher ‖ model) in nats per aligned position over some texts, at temperature 1; several processes share them.

    Args:
        model: The translated model; put `model.disable_adapter()` around the call for the untouched target.
        teacher: The teacher.
        pairs: The texts.
        batch_size (`int`): Texts per pass, of all processes together.
    """
    nats = positions = 0.0
    for own, texts in _shares(pairs, batch_size):
        batch = collate_pairs(texts)
        goal, _ = teacher.goals(model, batch)
        logits, _ = teacher.student(model, model, batch)
        if own:
            nats += float(kl_divergence(goal, logits).double().sum())
            positions += len(batch["rows"])
    nats, positions = ranks.totals(nats, positions)
    return nats / positions


def _shares(
    pairs: Sequence[AlignedPair], batch_size: int
) -> Iterator[tuple[Sequence[AlignedPair], Sequence[AlignedPair]]]:
    """This process's part of each batch, and what it reads: something in any case, so that all make as many passes."""
    for i in range(0, len(pairs), batch_size):
        chunk = pairs[i : i + batch_size]
        own = ranks.share(chunk)
        yield own, own or chunk[:1]


def imitate(
    model: PeftModel,
    teacher: Teacher,
    texts: TrainingTexts,
    held_out: Sequence[AlignedPair],
    batch_size: int,
    phases: Phases,
    **options: Any,
) -> tuple[dict[str, float], Refinement, list[torch.Tensor]]:
    """Refine, and measure the distance to the teacher on held-out texts before and after.

    Args:
        model, teacher, texts, batch_size: As in `refine`, which takes the `options` as well.
        held_out: Texts that are not in `texts`.
        phases: Where the costs are noted, as `evaluate` and `refine`.

    Returns:
        KL in nats per position of the untouched `target`, the `start` and the `end`; what the refinement did; and for each
        held-out text how much it excites the adapter, nats at its aligned positions, shape (positions,).
    """

    def distance() -> float:
        return within_memory(lambda size: distance_to_teacher(model, teacher, held_out, size), batch_size)

    def excited(size: int) -> list[torch.Tensor]:
        batches = []
        for own, read in _shares(held_out, size):
            nats = teacher.excitement(collate_pairs(read)).cpu()
            batches.append(list(nats.split([len(pair.source_positions) for pair in read]))[: len(own)])
        of_each = ranks.gathered([batches])
        return [nats for batch in zip(*of_each) for part in batch for nats in part]

    with phases.measure("evaluate"):
        excitement = within_memory(excited, batch_size)
        with model.disable_adapter():
            kl = {"target": distance()}
        kl["start"] = distance()
    with phases.measure("refine"):
        refinement = refine(model, teacher, texts, batch_size=batch_size, **options)
    with phases.measure("evaluate"):
        kl["end"] = distance() if refinement.steps else kl["start"]
    return kl, refinement, excitement
