"""Further refinement on what the translated model writes itself (on-policy distillation, arXiv 2306.13649)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from .fit import Teacher, TrainingTexts, distance_to_teacher, imitate, within_memory
from .models import shared_head
from .pair import Pair, PairTexts, how_many_held_out
from .phases import Phases
from .run import Run
from .text import SelfWritten, align_samples, write_answers


def imitate_on_own_words(
    pair: Pair,
    model: PeftModel,
    teacher: Teacher,
    texts: PairTexts,
    run: Run,
    *,
    steps: int,
    held_out: int,
    batch_size: int,
    max_length: int,
    seed: int,
    phases: Phases,
    bar: Callable,
    **options: Any,
) -> tuple[float, dict[str, Any]]:
    """Let the translated model answer the prompts of its text, and refine it on that.

    It learns from the teacher how to go on from its own words, loops and slips included, which the teacher's own answers never show.

    Args:
        pair (`Pair`): The models.
        model: The target with the adapter, already refined on what the source wrote.
        teacher: The adapted source, which judges every word.
        texts: What was read before: its prompts are answered again, its anchors serve again.
        run: Where the answers and the checkpoints are kept.
        steps, batch_size, max_length, seed: As in `translate`.
        held_out (`int`): Answers kept out of the refinement to measure the distance to the teacher.
        phases, bar: Where costs are noted; wrapper that shows progress.
        options: `learning_rate`, `training_args`, `progress` of `fit.refine`.

    Returns:
        The distance to the teacher on the held-out text that was there before, nats per aligned position. And JSON-ready: `texts`, the number of answers it trained on; `kl`, nats per aligned position from the teacher on answers held
        out, `before` and `after`; what the refinement did; `history`, its log.

    Raises:
        ValueError: If too few of the answers can be read by both models.
    """
    with phases.measure("text"):
        write = partial(_answers, pair, model, texts, steps * batch_size, held_out, max_length, seed, bar, run.written)
        own = run.texts(write, "own_answers")
    ids = pair.vocabulary
    with shared_head(pair.source, ids.source_ids), shared_head(pair.target, ids.target_ids):
        kl, refinement, _ = imitate(
            model, teacher, TrainingTexts(own.train, texts.anchors), own.held_out, batch_size, phases,
            steps=steps, seed=seed, output_dir=run.on_policy, checkpoint=run.on_policy_checkpoint, **options,
        )  # fmt: skip
        with phases.measure("evaluate"):
            reached = within_memory(partial(distance_to_teacher, model, teacher, texts.held_out), batch_size)
    return reached, {
        "texts": len(own.train),
        "kl": {"target": kl["target"], "before": kl["start"], "after": kl["end"]},
        **refinement.metrics,
        "history": refinement.history,
    }


def check_prompts(there: bool) -> None:
    """Refuse text that has no prompts to answer.

    Raises:
        ValueError: If they are not there.
    """
    if not there:
        raise ValueError(
            "`on_policy_steps` needs prompts for the translated model to answer, and the text has none: pass "
            "`text=SelfWritten(...)`, or leave it out."
        )


@torch.no_grad()
def _answers(
    pair: Pair,
    model: PeftModel,
    texts: PairTexts,
    train: int,
    held_out: int,
    max_length: int,
    seed: int,
    bar: Callable,
    keep: Callable,
) -> PairTexts:
    before, tokenizer = texts.answers, pair.tokenizers[1]
    longest = max(len(tokenizer(sample.text, add_special_tokens=False).input_ids) for sample in before)
    spec = SelfWritten(on_policy=True, max_new_tokens=min(longest, max_length))
    asked = [before[i % len(before)] for i in range(train + held_out)]
    samples = write_answers(model, tokenizer, asked, spec, seed, partial(bar, desc="writing answers"), keep)
    pairs = list(dict.fromkeys(align_samples(pair.tokenizers, samples, max_length)))
    if len(pairs) < 2:
        raise ValueError(
            f"The translated model's own answers give {len(pairs)} usable samples, at least 2 are needed: leave `on_policy_steps` "
            "out, or pass more `steps` to come nearer to the teacher first."
        )
    kept_out = how_many_held_out(pairs, held_out)
    return PairTexts(pairs[kept_out:], pairs[:kept_out], [], [], {"answers": len(samples)})
