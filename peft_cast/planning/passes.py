"""One batch of every phase, run through the package's own code on fake tensors, and what it would take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from ..align import AlignedPair, ModuleMap, collate_pairs, side_of
from ..fit.closed_form import _pass, _Regressions
from ..models import capture, shared_head
from ..options import Training
from ..refine import Logits, Teacher, TopKLogProbs, kl_divergence, training_precision
from ..source import LoraKernel
from .fake import Cost, counted


def texts_of(count: int, length: int, aligned: float) -> list[AlignedPair]:
    """Different texts of one length, aligned at their first positions."""
    positions = tuple(range(max(1, int(aligned * length))))
    ids = [tuple([number] + [0] * (length - 1)) for number in range(count)]
    return [AlignedPair(one, one, positions, positions) for one in ids]


def closed_form_costs(
    source: PreTrainedModel,
    target: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    vocabulary: int,
    kernels: Mapping[str, LoraKernel],
    modules: ModuleMap,
) -> tuple[Cost, Cost, Cost]:
    """Cost of both models' passes, of the moments of one batch, which are kept, and of holding it out instead."""
    sources = {s for names in modules.kernels.values() for s in names}
    regressions = _Regressions({s: kernels[s] for s in sources}, modules)
    ids = torch.arange(vocabulary)
    with (
        shared_head(source, ids),
        shared_head(target, ids),
        capture(source, sources) as at_source,
        capture(target, modules.kernels) as at_target,
    ):
        with counted() as passes:
            for side, model in (("source", source), ("target", target)):
                inputs, *_ = side_of(batch, side, model.device)
                _pass(model, inputs, ids)
        at = {side: (batch["rows"], batch[f"{side}_positions"]) for side in ("source", "target")}
        with counted() as moments:
            regressions.update(at_source, at_target, at["source"], at["target"], False)
        with counted() as held_out:
            regressions.update(at_source, at_target, at["source"], at["target"], True)
    return passes, moments, held_out


def refinement_costs(
    source, model, rows: int, aligned: float, vocabulary: int, training: Training, held: int, length: int, anchors: int
) -> tuple[Cost, Cost, Cost]:
    """Cost of the teacher's predictions, of one step, and of the evaluation, of `rows` texts of some length and
    anchors of `held`.
    """
    texts = texts_of(rows, length, aligned)
    held_texts = texts_of(anchors, held, 1.0)
    batch, ids = collate_pairs(texts, held_texts), torch.arange(vocabulary)
    teacher = Teacher(source, training)
    base = source.get_base_model(), model.get_base_model()
    with shared_head(base[0], ids), shared_head(base[1], ids):
        wanted: TopKLogProbs | Logits
        with counted() as goal, torch.no_grad():
            wanted = (
                teacher.cached_goals(model, texts, held_texts)
                if training.teacher_top_k
                else teacher.goals(model, batch)[0]
            )
        model.train()
        with counted() as step:
            with training_precision(model):
                logits, _ = teacher.student(model, model, batch)
            by_position = (
                wanted.kl_divergence(logits) if isinstance(wanted, TopKLogProbs) else kl_divergence(wanted, logits)
            )
            by_position.mean().backward()
        del logits, by_position, wanted
        batch = collate_pairs(texts)
        with counted() as check, torch.no_grad():
            goals, _ = teacher.goals(model, batch)
            kl_divergence(goals, teacher.student(model, model, batch)[0])
    return goal, step, check
