"""A refinement with what it reached: the distance to the teacher on held-out text before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel

from ..align import AlignedPair
from ..phases import Phases
from .batches import TrainingTexts, collate_pairs
from .losses import kl_divergence
from .out_of_memory import within_memory
from .refine import Refinement, Teacher, refine


@torch.no_grad()
def distance_to_teacher(
    model: PeftModel, teacher: Teacher, pairs: Sequence[AlignedPair], batch_size: int = 8
) -> float:
    """KL(teacher ‖ model) in nats per aligned position over some texts, at temperature 1.

    Args:
        model: The translated model; put `model.disable_adapter()` around the call for the untouched target.
        teacher: The teacher.
        pairs: The texts.
        batch_size (`int`): Texts per pass.
    """
    parts = []
    for i in range(0, len(pairs), batch_size):
        batch = collate_pairs(pairs[i : i + batch_size])
        goal, _ = teacher.goals(model, batch)
        logits, _ = teacher.student(model, model, batch)
        parts.append(kl_divergence(goal, logits))
    return float(torch.cat(parts).mean())


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
        nats = [teacher.excitement(collate_pairs(held_out[i : i + size])).cpu() for i in range(0, len(held_out), size)]
        return list(torch.cat(nats).split([len(pair.source_positions) for pair in held_out]))

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
