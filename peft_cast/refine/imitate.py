"""A refinement with what it reached: the distance to the teacher on held-out text before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..align import AlignedPair, collate_pairs
from ..source import Pair, count_parameters
from ..text import PairTexts
from ..utils import Phases, distributed, within_memory
from .batches import TrainingTexts
from .losses import kl_divergence
from .teacher import Teacher
from .trainer import Refinement, refine


@torch.no_grad()
def distance_to_teacher(
    model: PeftModel, teacher: Teacher, pairs: Sequence[AlignedPair], batch_size: int = 8
) -> float:
    """KL(teacher ‖ model) in nats per aligned position over some texts, at temperature 1; several processes share
    them.

    Args:
        model: The translated model; put `model.disable_adapter()` around the call for the untouched target.
        teacher: The teacher.
        pairs: The texts.
        batch_size (`int`): Texts per pass, of all processes together.
    """
    nats = positions = 0.0
    for own, texts in _parts(pairs, batch_size):
        batch = collate_pairs(texts)
        goal, _ = teacher.goals(model, batch)
        logits, _ = teacher.student(model, model, batch)
        if own:
            nats += float(kl_divergence(goal, logits).double().sum())
            positions += len(batch["rows"])
    nats, positions = distributed.sum_numbers(nats, positions)
    return nats / positions


def _parts(
    pairs: Sequence[AlignedPair], batch_size: int
) -> Iterator[tuple[Sequence[AlignedPair], Sequence[AlignedPair]]]:
    """This process's part of each batch, and what it reads: something in any case, so that all make as many passes."""
    for i in range(0, len(pairs), batch_size):
        chunk = pairs[i : i + batch_size]
        own = distributed.split(chunk)
        yield own, own or chunk[:1]


@dataclass(frozen=True)
class Imitation:
    """What a refinement reached.

    Args:
        kl (`dict[str, float]`): KL from the teacher on held-out texts, nats per aligned position, of the untouched
            `target`, at the `start` and at the `end`.
        refinement (`Refinement`): What it did.
        excitement (`list[torch.Tensor]`): For each held-out text the adapter's KL, see `Teacher.excitement`, shape
            (positions,).
    """

    kl: dict[str, float]
    refinement: Refinement
    excitement: list[torch.Tensor]

    def metrics(self, pair: Pair, texts: PairTexts, trained: int) -> dict[str, Any]:
        """What every refinement says of itself in `TranslationResult.metrics`, JSON-ready.

        Args:
            pair (`Pair`): The models.
            texts (`PairTexts`): What was read.
            trained (`int`): How many parameters were trained.
        """
        return {
            "excitement": float(torch.cat(self.excitement).mean()),
            "parameters": {"trained": trained, "source_lora": count_parameters(pair.kernels)},
            "refinement": self.refinement.metrics,
            "text": texts.metrics,
        }


def imitate(
    pair: Pair,
    model: PeftModel,
    teacher: Teacher,
    texts: PairTexts,
    phases: Phases,
    *,
    output_dir: str | Path | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
    enough: float = 1.0,
) -> Imitation:
    """Refine, and measure the distance to the teacher on held-out texts before and after.

    Args:
        pair (`Pair`): The models, whose heads are cut meanwhile to what the teacher is compared on.
        model, teacher, output_dir, progress, checkpoint: As in `refine`.
        texts (`PairTexts`): What is trained on, its anchors, and what is held out.
        phases: Where the costs are noted, as `evaluate` and `refine`.
        enough (`float`): Share of the way to the teacher from which there is no refinement.
    """
    batch_size = teacher.training.batch_size

    def distance() -> float:
        return within_memory(lambda size: distance_to_teacher(model, teacher, texts.held_out, size), batch_size)

    def excited(size: int) -> list[torch.Tensor]:
        batches = []
        for own, read in _parts(texts.held_out, size):
            nats = teacher.excitement(model, collate_pairs(read)).cpu()
            batches.append(list(nats.split([len(one.source_positions) for one in read]))[: len(own)])
        of_each = distributed.gather([batches])
        return [nats for batch in zip(*of_each) for part in batch for nats in part]

    with teacher.heads(pair):
        with phases.measure("evaluate"):
            excitement = within_memory(excited, batch_size)
            with model.disable_adapter():
                kl = {"target": distance()}
            kl["start"] = distance()
        if kl["start"] <= (1 - enough) * kl["target"]:
            teacher = teacher.with_training(replace(teacher.training, steps=0))
        with phases.measure("refine"):
            read = TrainingTexts(texts.train, texts.anchors)
            refinement = refine(model, teacher, read, output_dir=output_dir, progress=progress, checkpoint=checkpoint)
        with phases.measure("evaluate"):
            kl["end"] = distance() if refinement.steps else kl["start"]
    return Imitation(kl, refinement, excitement)
