"""What the target writes itself once it has seen the adapted source's answers: form from the LoRA, content from the
target.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from ..align import AlignedPair, align_texts
from .samples import TextSample


EXAMPLES = 3  # answers of the adapted source before each prompt
GROUPS = 4  # of prompts, each with its own examples: enough that none is learned by heart


def shown_prompts(
    samples: Sequence[TextSample],
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    longest: int | None = None,
    asked: Sequence[TextSample] | None = None,
    together: int = 64,
) -> list[TextSample]:
    """Prompts for the target, each after some of the other prompts with their answers.

    Prompts that are answered together are shown the same examples, which the target then reads once. No prompt is
    among its own. The answers end in the tokenizer's end-of-text token, so that the target ends its own there too.

    Args:
        samples: Answers, with their prompts.
        tokenizer: The target's.
        seed (`int`): Seed of the draw.
        longest (`int`, *optional*): The most tokens of an answer that is shown, if enough are shorter: an answer that
            was cut shows no end.
        asked (*optional*): The prompts; those of the samples when not given.
        together (`int`): The most prompts that are answered at a time; `group_size` says how many are.

    Returns:
        Samples without a text, whose `source_prompt` has the examples before the `target_prompt`; those with the same
        examples follow one another.

    Raises:
        ValueError: If there are too few answers.
    """
    end, draw = f"{tokenizer.eos_token or ''}\n\n", random.Random(seed)
    whole = list({one.target_prompt: one for one in come_to_an_end(samples, tokenizer, longest)}.values())
    if len(whole) <= EXAMPLES:
        raise ValueError(
            f"There are answers to {len(whole)} prompts, and more than {EXAMPLES} are needed to show the target how "
            "to answer: pass more prompts, or more `steps`, which read more text."
        )
    asked = samples if asked is None else asked
    size = group_size(len(asked), together)
    groups: list[tuple[list[TextSample], list[TextSample]]] = [
        (draw.sample(whole, EXAMPLES), []) for _ in range(0, len(asked), size)
    ]
    for one in asked:
        own = one.target_prompt
        free = (g for few, g in groups if len(g) < size and own not in {other.target_prompt for other in few})
        group = next(free, None)
        if group is None:  # few prompts in all
            group = []
            groups.append((draw.sample([other for other in whole if other.target_prompt != own], EXAMPLES), group))
        group.append(one)
    prompts = []
    for few, group in groups:
        before = "".join(f"{other.target_prompt}{other.text}{end}" for other in few)
        prompts += [replace(one, text="", source_prompt=before + one.target_prompt) for one in group]
    return prompts


def group_size(count: int, together: int) -> int:
    """How many of `count` prompts are shown the same examples: at most `together`, and a share of all."""
    return max(1, min(together, -(-count // GROUPS)))


def come_to_an_end(
    samples: Sequence[TextSample], tokenizer: PreTrainedTokenizerBase, longest: int | None
) -> Sequence[TextSample]:
    """The samples whose text is shorter than `longest` tokens; all of them where hardly one is.

    An answer that was cut shows no end, and is often a loop.
    """
    lengths = [len(tokenizer(sample.text, add_special_tokens=False).input_ids) for sample in samples]
    whole = [sample for sample, length in zip(samples, lengths) if longest is None or length < longest]
    return whole if len(whole) > max(EXAMPLES, len(samples) // 10) else samples


def align_shown(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[TextSample], max_length: int
) -> list[AlignedPair]:
    """What the target wrote after examples, as it reads it with them (the source side) and without (the target side).

    Args:
        tokenizer: The target's.
        samples: Answers to `shown_prompts`.
        max_length (`int`): Most tokens of a prompt with its answer; the examples come on top.
    """
    pairs = align_texts(
        [s.text for s in samples],
        tokenizer,
        tokenizer,
        source_prompts=[s.source_prompt for s in samples],
        target_prompts=[s.target_prompt for s in samples],
        rendered=[s.rendered for s in samples],
        max_length=10**6,
    )
    return [_cut(pair, max_length) for pair in pairs if pair.target_positions[0] < max_length]


def _cut(pair: AlignedPair, max_length: int) -> AlignedPair:
    kept = sum(position < max_length for position in pair.target_positions)
    source, target = pair.source_positions[:kept], pair.target_positions[:kept]
    return AlignedPair(pair.source_ids[: source[-1] + 1], pair.target_ids[: target[-1] + 1], source, target)
