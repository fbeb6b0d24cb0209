"""The target as its own teacher: shown a few answers of the adapted source, it answers as the adapter wants and knows
what it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..align import AlignedPair, side_of
from ..models import Prefix, after_prefixes, in_eval_mode, keeps_prefixes, read_prefix
from ..options import Training
from ..source import Pair
from ..text import (
    Keep,
    PairTexts,
    SelfWritten,
    Survey,
    TextSample,
    align_shown,
    come_to_an_end,
    group_size,
    how_many_held_out,
    shown_prompts,
    write_answers,
)
from .cache import TeacherCache
from .losses import Logits, kl_divergence
from .stronger import exchange
from .teacher import Teacher, compares_outputs_alone, teacher_cache


GAMMA = 3.0  # weight of the anchors of a survey's texts, whose many forms pull at the target in many places
PREFIXES = 16  # examples whose keys and values are kept: a few MB each for a small model, some 100 for a large one


class ShownTeacher(Teacher):
    """The untouched target with examples before the prompt, for the target without them (context distillation, arXiv
    2112.00861).

    Of a text its source side is what this teacher reads. Both are one model, so its whole vocabulary is compared.

    Args:
        target: The target, which the teacher takes without its adapter.
        training (`Training`): Weights of the losses, and how much of the predictions is kept.
        folder: Where the predictions are kept between runs too.
        identity (`str`): What tells them from others there.
    """

    reads_with = 1

    def __init__(
        self, target: PreTrainedModel, training: Training, folder: str | Path | None = None, identity: str = ""
    ) -> None:
        k, vocabulary = training.teacher_top_k, target.get_output_embeddings().weight.shape[0]
        kept = TeacherCache(k, training.temperature, folder, f"{identity} shown", vocabulary=vocabulary) if k else None
        super().__init__(target, training, cache=kept)
        self.prefixes: dict[tuple[int, ...], Prefix] = {}

    @contextmanager
    def heads(self, pair: Pair) -> Iterator[None]:
        yield

    def align(self, pair: Pair, samples: Sequence[TextSample]) -> list[AlignedPair]:
        return align_shown(pair.tokenizers[1], samples, self.training.max_length)

    @torch.no_grad()
    def _imitated(self, target: PeftModel, batch: dict) -> tuple[Logits, dict[str, torch.Tensor]]:
        base = target.get_base_model()
        with target.disable_adapter(), in_eval_mode(target):
            inputs, rows, positions = side_of(batch, "source", base.device)
            if keeps_prefixes(base):
                read = self._examples(base, batch)
                inputs, positions = _after(base, read, inputs, rows, positions)
            return self._predict(target, base, inputs, rows, positions), {}

    def _examples(self, base: PreTrainedModel, batch: dict) -> list[Prefix]:
        """The examples before each of the n texts of a batch, which are read once for many texts."""
        read = []
        for row, ids in enumerate(batch["source_input_ids"].tolist()):
            first = int((batch["rows"] == row).nonzero()[0])
            # Without their last token: it and the prompt's first may be one.
            count = int(batch["source_positions"][first] - batch["target_positions"][first]) - 1
            examples = tuple(ids[:count])
            if examples not in self.prefixes:
                while len(self.prefixes) >= PREFIXES:
                    self.prefixes.pop(next(iter(self.prefixes)))
                self.prefixes[examples] = read_prefix(base, examples)
            read.append(self.prefixes[examples])
        return read

    @torch.no_grad()
    def excitement(self, target: PeftModel, batch: dict) -> torch.Tensor:
        """KL(target shown examples ‖ target) in nats at the m aligned positions: how much the examples change."""
        shown, _ = self._imitated(target, batch)
        with target.disable_adapter(), in_eval_mode(target):
            plain, _ = self._run(target, target.get_base_model(), batch, "target")
        return kl_divergence(shown, plain)


def _after(
    base: PreTrainedModel, read: Sequence[Prefix], inputs: dict, rows: torch.Tensor, positions: torch.Tensor
) -> tuple[dict, torch.Tensor]:
    """Inputs of n texts without the prefixes that were read, and their m positions in what is left."""
    cache, before = after_prefixes(base, read)
    counts = torch.tensor([len(prefix) for prefix in read], device=base.device)
    left = [ids[count:] for ids, count in zip(inputs["input_ids"], counts)]
    masks = [mask[count:] for mask, count in zip(inputs["attention_mask"], counts)]
    ids, mask = (pad_sequence(part, batch_first=True) for part in (left, masks))
    places = counts[:, None] + torch.arange(ids.shape[1], device=base.device)
    after = {"input_ids": ids, "attention_mask": torch.cat([before, mask], dim=1), "past_key_values": cache}
    return {**after, "position_ids": places, "use_cache": True}, positions - counts[rows]


def taught(
    pair: Pair,
    texts: PairTexts,
    training: Training,
    text: Any,
    *,
    bar: Callable = lambda items, **_: items,
    keep: Keep = lambda key, write: write(),
) -> PairTexts:
    """The texts for the teacher that the settings name, or for the one that suits the pair if that is `auto`: `shown`
    where the target is clearly the stronger model on the prompts, `delta` where a survey found nothing that the
    adapter does, else `source`.

    For `shown` the prompts are answered again, by the target with the adapted source's likeliest answers to some of
    them as examples. For others the texts are as they were.

    Args:
        pair (`Pair`): The models, the target without an adapter.
        texts: What was read.
        training (`Training`): Which teacher, seed, lengths, and how many texts are held out.
        text: What the user gave as text: a `SelfWritten` says how answers are written.
        bar, keep: As in `write_texts`.

    Returns:
        `PairTexts`: With the `teacher` and `gamma` in its metrics, and the `minds` that decided if two models were
            compared.

    Raises:
        ValueError: If too few answers can be shown or read.
    """
    spec = text.writing if isinstance(text, Survey) else text if isinstance(text, SelfWritten) else SelfWritten()
    teacher: str | float = training.teacher
    found = exchange(pair, texts.answers, spec, training.seed, keep) if teacher == "shown" else None
    if teacher == "auto":
        # On-policy answers are not the adapted source's. Of what a survey asks the target may well know more, and the
        # adapter still be right about its own task.
        surveyed = text is None or isinstance(text, Survey)
        if texts.answers and not surveyed and not spec.on_policy and compares_outputs_alone(training):
            with suppress(ValueError):  # too few to show: there is but one teacher
                found = exchange(pair, texts.answers, spec, training.seed, keep)
        # Where a survey found nothing that the adapter does, the source is no model to follow.
        trusted = texts.metrics.get("survey", {}).get("trusted", True)
        teacher = found.minds.teacher if found else "source" if trusted else "delta"
    minds = {"minds": vars(found.minds)} if found else {}
    gamma = GAMMA if training.gamma is None and "survey" in texts.metrics else training.anchor_weight
    texts = replace(texts, metrics={**texts.metrics, **minds, "teacher": teacher, "gamma": gamma})
    if found is None or teacher != "shown":
        return texts
    return _shown(pair, texts, found.answers, training, spec, bar, keep)


def _shown(
    pair: Pair,
    texts: PairTexts,
    examples: Sequence[TextSample],
    training: Training,
    spec: SelfWritten,
    bar: Callable,
    keep: Keep,
) -> PairTexts:
    tokenizer = pair.tokenizers[1]
    # The likeliest answer: drawn at random a small model slips more often, in content and in form.
    together = group_size(len(texts.answers), spec.batch_size)
    spec = replace(spec, temperature=0.0, on_policy=False, batch_size=together)
    prompts = shown_prompts(examples, tokenizer, training.seed, spec.max_new_tokens, texts.answers, together)
    samples = write_answers(pair.target, tokenizer, prompts, spec, training.seed, partial(bar, desc="showing"), keep)
    samples = list(come_to_an_end(samples, tokenizer, spec.max_new_tokens))
    pairs = list(dict.fromkeys(align_shown(tokenizer, samples, training.max_length)))
    if len(pairs) < 3:
        raise ValueError(
            f"The target, shown examples, gives {len(pairs)} usable answers, at least 3 are needed: pass more "
            "`steps`, which read more text, or a larger `max_length`."
        )
    held_out = how_many_held_out(pairs, training.eval_samples)
    metrics = {**texts.metrics, "shown": len(pairs)}
    return PairTexts(pairs[held_out:], pairs[:held_out], texts.fit, texts.anchors, metrics, samples)


def open_teacher(
    pair: Pair,
    training: Training,
    hidden_maps: Mapping[str, tuple[str, torch.Tensor]] | None = None,
    folder: str | Path | None = None,
) -> Teacher:
    """The teacher that the settings name. To be made before the target gets its adapter.

    Args:
        pair (`Pair`): The models.
        training (`Training`): The settings.
        hidden_maps: As in `Teacher`.
        folder: Where predictions are kept between runs too.
    """
    if training.teacher == "shown":
        return ShownTeacher(pair.target, training, folder, pair.identity if folder is not None else "")
    return Teacher(pair.adapted, training, hidden_maps, teacher_cache(pair, training, folder))
