"""What the translated model is trained towards: the adapted source model's predictions and hidden states."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..align import AlignedPair, anchor_positions, anchors_of, collate_pairs, side_of
from ..fit import with_bias
from ..models import ends_in_head, in_eval_mode, layer_outputs, logits_at, sharding, shared_head, states_at
from ..options import Training
from ..source import Pair
from ..text import TextSample, align_samples
from .cache import TeacherCache, TopKLogProbs
from .losses import Logits, MixedLogits, Predictions, joined, kl_divergence, whole


# Share of the tokens, padding included, below which two passes are better than one (docs/lab-book.md, Speed).
APART = 0.9


class Teacher:
    """Teacher logits and hidden states at the aligned positions of a batch.

    `reads_with` is the index in `Pair.tokenizers` of what it reads with.

    Args:
        source (`PeftModel`): The source model with its LoRA.
        training (`Training`): Weights of the losses, what the teacher mixes, and how much of its predictions is kept.
        hidden_maps: Path of each target layer → (path of its source layer, map from source state and 1 to target
            state).
        cache (`TeacherCache`, *optional*): Where predictions are kept; one of its own when not given.
    """

    reads_with: ClassVar[int] = 0

    def __init__(
        self,
        source: PreTrainedModel | PeftModel,
        training: Training,
        hidden_maps: Mapping[str, tuple[str, torch.Tensor]] | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        self.source, self.training = source, training
        self.hidden_maps = dict(hidden_maps or {}) if training.beta else {}
        self.cache = None
        if training.teacher_top_k and not self.hidden_maps:  # hidden states are too large to keep
            self.cache = cache or TeacherCache(training.teacher_top_k, training.temperature)
        self.sharded = sharding.is_sharded(source)  # every process must make as many passes as the others
        self.layers = {"source": {path for path, _ in self.hidden_maps.values()}, "target": set(self.hidden_maps)}
        self.ends_in_head: dict[nn.Module, bool] = {}

    def with_training(self, training: Training) -> Teacher:
        """The same teacher, with what it has cached, for a refinement with other settings."""
        other = copy.copy(self)
        other.training = training
        return other

    @contextmanager
    def heads(self, pair: Pair) -> Iterator[None]:
        """Within the context both models predict the tokens that this teacher is compared on, in one order: those
        that both have.
        """
        ids = pair.vocabulary
        with shared_head(pair.source, ids.source_ids), shared_head(pair.target, ids.target_ids):
            yield

    def align(self, pair: Pair, samples: Sequence[TextSample]) -> list[AlignedPair]:
        """Texts as this teacher, on the source side, and the target read them."""
        return align_samples(pair.tokenizers, samples, self.training.max_length)

    def _predict(self, model, base, inputs: dict, rows: torch.Tensor, positions: torch.Tensor) -> Logits:
        """What the model predicts at m positions, (m, vocabulary), in blocks if its architecture allows it."""
        if base not in self.ends_in_head:
            with in_eval_mode(base):
                self.ends_in_head[base] = ends_in_head(base)
        if self.ends_in_head[base]:
            with states_at(base, rows, positions) as head:
                return Predictions(model(**inputs).logits, head)
        with logits_at(base, rows, positions):
            return model(**inputs).logits

    def _run(self, model, base, batch: dict, side: str, anchors: bool = False) -> tuple[Logits, dict]:
        """Logits (m, vocabulary) and hidden states by layer path (m, hidden) at the m aligned positions.

        With `anchors` the logits of the a anchor positions follow, (m + a, vocabulary).
        """
        inputs, rows, positions = side_of(batch, side, base.device)
        extra = anchors_of(batch, base.device) if anchors else (rows[:0], positions[:0])
        at = torch.cat([rows, extra[0]]), torch.cat([positions, extra[1]])
        with layer_outputs(base, self.layers[side]) as states:
            logits = self._predict(model, base, inputs, *at)
        return logits, {path: state[rows, positions] for path, state in states.items()}

    def student(self, model, base: PeftModel, batch: dict) -> tuple[Logits, dict]:
        """Logits (m + a, vocabulary) and, per target layer, hidden states (m, hidden_T) of the translated model.

        `model` is what is called (it may be wrapped for distributed training), `base` the PeftModel in it. Where texts
        and anchors differ so much in length that a pass for each reads clearly fewer tokens (`APART`), they get one
        each.
        """
        base = base.get_base_model()
        texts, rows, (text, anchor) = len(batch["source_input_ids"]), len(batch["target_input_ids"]), batch["longest"]
        worth_it = texts * text + (rows - texts) * anchor < APART * rows * max(text, anchor)
        if self.sharded or not worth_it:
            return self._run(model, base, batch, "target", anchors=True)
        cut = {name: batch[name][:texts, :text] for name in ("target_input_ids", "target_attention_mask")}
        logits, states = self._run(model, base, {**batch, **cut}, "target")
        return joined(logits, self._predict(model, base, *_anchors(batch, base.device))), states

    @torch.no_grad()
    def goals(self, target: PeftModel, batch: dict) -> tuple[Logits, dict[str, torch.Tensor]]:
        """Teacher logits (m + a, vocabulary) and, per target layer, the hidden states (m, hidden_T) to reach.

        At the anchors the untouched target is its own teacher.
        """
        logits, states = self._imitated(target, batch)
        if logits.device != target.device:
            logits = whole(logits).to(target.device)
        if self.sharded and "texts" in batch and not batch["texts"][1]:
            self._own_anchors(target, collate_pairs([], batch["texts"][0][:1]))
        if len(batch["anchor_rows"]):
            logits = torch.cat([whole(logits).float(), whole(self._own_anchors(target, batch)).float()])
        return logits, states

    def cached_goals(
        self, target: PeftModel, pairs: Sequence[AlignedPair], anchors: Sequence[AlignedPair]
    ) -> TopKLogProbs:
        """The likeliest tokens of `goals` at the m + a positions, made once per text."""
        cache = self.cache
        assert cache is not None, "only a teacher with a cache has cached goals"
        counts = [len(pair.target_positions) for pair in pairs]
        idle = pairs[0] if self.sharded else None
        parts = [
            cache.get_or_make(
                "teacher", pairs, counts, lambda absent: self._imitated(target, collate_pairs(absent))[0], idle
            )
        ]
        read = anchors or (pairs[:1] if self.sharded else [])
        if read:
            counts = [len(anchor_positions(anchor)) for anchor in read]
            own = cache.get_or_make(
                "target", read, counts, lambda absent: self._own_anchors(target, collate_pairs([], absent)), idle
            )
            parts += [own] if anchors else []
        return TopKLogProbs.cat(parts).to(target.device)

    @torch.no_grad()
    def _imitated(self, target: PeftModel, batch: dict) -> tuple[Logits, dict[str, torch.Tensor]]:
        """Teacher logits (m, vocabulary), where the source works if it alone teaches, and hidden states at the aligned
        positions.
        """
        share, device = self.training.target_share, target.device
        source = (self.source, self.source.get_base_model(), batch, "source")
        logits, adapted_states = self._run(*source)
        if share:
            with self.source.disable_adapter():
                plain, plain_states = self._run(*source)
            with target.disable_adapter(), in_eval_mode(target):
                own, own_states = self._run(target, target.get_base_model(), batch, "target")
            logits = MixedLogits((logits, plain, own), share, device)
        states = {}
        for path, (source_path, weight) in self.hidden_maps.items():
            weight = weight.to(device)
            state = with_bias(adapted_states[source_path].to(device).float()) @ weight.T
            if share:
                mapped = with_bias(plain_states[source_path].to(device).float()) @ weight.T
                state = state + share * (own_states[path].float() - mapped)
            states[path] = state
        return logits, states

    @torch.no_grad()
    def _own_anchors(self, target: PeftModel, batch: dict) -> Logits:
        """Logits (a, vocabulary) of the untouched target at the anchors."""
        with target.disable_adapter(), in_eval_mode(target):
            return self._predict(target, target.get_base_model(), *_anchors(batch, target.device))

    @torch.no_grad()
    def excitement(self, target: PeftModel, batch: dict) -> torch.Tensor:
        """KL(source + LoRA ‖ source) in nats at the m aligned positions: how much the text shows of the adapter."""
        source = (self.source, self.source.get_base_model(), batch, "source")
        adapted, _ = self._run(*source)
        with self.source.disable_adapter():
            plain, _ = self._run(*source)
        return kl_divergence(adapted, plain)


def compares_outputs_alone(training: Training) -> bool:
    """Whether no hidden states are compared, which needs the closed form's maps, and no model is spread."""
    return not training.beta and not sharding.is_requested(training.training_args)


def _anchors(batch: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The anchors alone, the last rows of a batch, as a model's inputs, and the index (rows, positions) of their
    positions.
    """
    first, (_, longest) = len(batch["source_input_ids"]), batch["longest"]
    rows, positions = anchors_of(batch, device)
    inputs: dict[str, Any] = {
        name: batch[f"target_{name}"][first:, :longest].to(device) for name in ("input_ids", "attention_mask")
    }
    return {**inputs, "use_cache": False}, rows - first, positions


def teacher_cache(pair: Pair, training: Training, folder: str | Path | None) -> TeacherCache | None:
    """Where the teacher's predictions are kept, between runs too if there is a folder; `None` if they are not kept.

    To be made before the target gets its adapter: the files' names tell models, adapters and settings apart.
    """
    if not training.teacher_top_k:
        return None
    identity = f"{pair.identity} {training.target_share}" if folder is not None else ""
    return TeacherCache(
        training.teacher_top_k, training.temperature, folder, identity, vocabulary=len(pair.vocabulary)
    )
