"""Further refinement on what the translated model writes itself (on-policy distillation, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm

from ..options import Training
from ..source import Pair
from ..text import Keep, PairTexts, SelfWritten, how_many_held_out, write_answers
from ..tuner.checks import number_of
from ..utils import Phases, within_memory
from .imitate import distance_to_teacher, imitate
from .run import RunFolder
from .teacher import Teacher


def imitate_on_own_words(
    pair: Pair,
    model: PeftModel,
    teacher: Teacher,
    texts: PairTexts,
    run: RunFolder,
    phases: Phases,
    *,
    progress: bool = True,
) -> tuple[float, dict[str, Any]]:
    """Let the translated model answer the prompts of its text, and refine it on that at half the learning rate.

    It learns from the teacher how to go on from its own words, loops and slips included, which the teacher's own
    answers never show.

    Args:
        pair (`Pair`): The models.
        model: The target with the adapter, already refined on what the source wrote.
        teacher: The adapted source, which judges every word, with the `Training` of the translation.
        texts: What was read before: its prompts are answered again, its anchors serve again.
        run: Where the answers and the checkpoints are kept.
        phases: Where costs are noted.
        progress (`bool`): Show progress bars.

    Returns:
        The distance to the teacher on the held-out text that was there before, nats per aligned position. And
        JSON-ready: `texts`, the number of answers it trained on; `kl`, nats per aligned position from the teacher on
        answers held out, `before` and `after`; what the refinement did; `history`, its log.

    Raises:
        ValueError: If too few of the answers can be read by both models.
    """
    training = teacher.training
    further = replace(training, steps=training.on_policy_steps, learning_rate=training.learning_rate / 2)
    with phases.measure("text"):
        bar = partial(tqdm, disable=not progress, desc="writing answers")
        own = run.texts(lambda: _answers(pair, model, teacher, texts, further, bar, run.written), "own_answers")
    reached = imitate(
        pair,
        model,
        teacher.with_training(further),
        replace(own, anchors=texts.anchors),
        phases,
        output_dir=run.on_policy,
        checkpoint=run.on_policy_checkpoint,
        progress=progress,
    )
    with phases.measure("evaluate"), teacher.heads(pair):
        distance = within_memory(partial(distance_to_teacher, model, teacher, texts.held_out), training.batch_size)
    return distance, {
        "texts": len(own.train),
        "kl": {"target": reached.kl["target"], "before": reached.kl["start"], "after": reached.kl["end"]},
        **reached.refinement.metrics,
        "history": reached.refinement.history,
    }


def check_prompts(training: Training, there: bool) -> None:
    """Refuse text that has no prompts to answer where answers are needed.

    Raises:
        ValueError: If they are not there.
    """
    needed = {"on_policy_steps": training.on_policy_steps, "teacher='shown'": training.teacher == "shown"}
    by = next((name for name, wanted in needed.items() if wanted), None)
    if by and not there:
        who = "translated model" if training.on_policy_steps else "target"
        raise ValueError(
            f"`{by}` needs prompts for the {who} to answer, and the text has none: pass `text=SelfWritten(...)`, or "
            "leave it out."
        )


@torch.no_grad()
def _answers(
    pair: Pair, model: PeftModel, teacher: Teacher, texts: PairTexts, training: Training, bar: Callable, keep: Keep
) -> PairTexts:
    before, tokenizer, length = texts.answers, pair.tokenizers[1], training.max_length
    longest = max(len(tokenizer(sample.text, add_special_tokens=False).input_ids) for sample in before)
    spec = SelfWritten(on_policy=True, max_new_tokens=min(longest, length))
    count = training.steps * training.batch_size + training.eval_samples
    asked = [before[i % len(before)] for i in range(count)]
    samples = write_answers(model, tokenizer, asked, spec, training.seed, bar, keep)
    pairs = list(dict.fromkeys(teacher.align(pair, samples)))
    if len(pairs) < 2:
        raise ValueError(
            f"The translated model's own answers give {number_of(len(pairs), 'usable sample')}, at least 2 are "
            "needed: leave `on_policy_steps` out, or pass more `steps` to come nearer to the teacher first."
        )
    kept_out = how_many_held_out(pairs, training.eval_samples)
    return PairTexts(pairs[kept_out:], pairs[:kept_out], [], [], {"answers": len(samples)})
