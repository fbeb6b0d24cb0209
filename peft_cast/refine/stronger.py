"""Which of the two models is to be believed about the adapter's task, without labels: the one that minds the other's
answers more than the other minds its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..source import Pair
from ..text import EXAMPLES, Keep, SelfWritten, TextSample, group_size, shown_prompts, token_nats_of, write_answers


# How many times as much the target must mind, and by how many standard errors, by the few pairs that were read
# (docs/lab-book.md).
MORE, SURE = 1.5, 3.0
PROMPTS = 32  # that both answer: one more would not change who is stronger, where it is clear


@dataclass(frozen=True)
class Comparison:
    """What each model thinks of the other's answers to the same prompts, in nats per character.

    `target − source` is by how much the product of both models prefers the target's answers.

    Args:
        source (`float`): By how much the adapted source finds its own answers likelier than the target's, a mean over
            the prompts.
        target (`float`): By how much the target, shown some of the source's answers, finds its own likelier than the
            source's.
        error (`float`): Standard error of the difference of the two.
        prompts (`int`): How many they answered.
    """

    source: float
    target: float
    error: float
    prompts: int

    @property
    def teacher(self) -> str:
        """`shown` if the target is clearly the stronger, else `source`."""
        clearly = self.target > MORE * self.source and self.target - self.source > SURE * self.error
        return "shown" if clearly else "source"


@dataclass(frozen=True)
class Exchange:
    """What both models answered to some prompts, and what that says.

    Args:
        minds (`Comparison`): Who is the stronger.
        answers (`list[TextSample]`): What the adapted source finds likeliest, to be shown to the target.
    """

    minds: Comparison
    answers: list[TextSample]


def exchange(
    pair: Pair,
    answers: Sequence[TextSample],
    spec: SelfWritten,
    seed: int = 0,
    keep: Keep = lambda key, write: write(),
) -> Exchange:
    """Let both models answer some prompts, and each judge both answers.

    Both give the answer that they find likeliest. The target reads answers of the adapted source to other prompts
    first, so that it knows in what form to answer.

    Args:
        pair (`Pair`): The models, the target without an adapter.
        answers: What the adapted source has answered, with its prompts.
        spec (`SelfWritten`): How long answers may be, and how many are written at a time.
        seed (`int`): Seed of the examples.
        keep: As in `write_texts`.

    Raises:
        ValueError: If there are too few prompts that both answer.
    """
    likeliest = replace(spec, temperature=0.0, on_policy=False)
    asked = list({one.target_prompt: one for one in answers}.values())[:PROMPTS]
    theirs = write_answers(pair.adapted, pair.tokenizers[0], asked, likeliest, seed, keep=keep) if asked else []
    tokenizer = pair.tokenizers[1]
    shown = shown_prompts(theirs, tokenizer, seed, spec.max_new_tokens, asked, spec.batch_size)
    together = replace(likeliest, batch_size=group_size(len(asked), spec.batch_size))
    own = write_answers(pair.target, tokenizer, shown, together, seed, keep=keep)
    theirs_to = {one.target_prompt: one for one in theirs}
    own = [one for one in own if one.target_prompt in theirs_to]
    if len(own) <= EXAMPLES:
        raise ValueError(
            f"The target, shown examples, answers {len(own)} prompts, and more than {EXAMPLES} are needed to show it "
            "how to answer: pass more prompts."
        )
    both = [(theirs_to[one.target_prompt], one) for one in own]

    def rates(side: int, of: int) -> torch.Tensor:
        """What the model of one side thinks of the answers of a side, after its own prompts."""
        items = [(answers[side], answers[of].text) for answers in both]
        return _rates((pair.adapted, pair.target)[side], pair.tokenizers[side], items, likeliest)

    minds = rates(0, 1) - rates(0, 0), rates(1, 0) - rates(1, 1)
    error = float((minds[1] - minds[0]).std() / len(both) ** 0.5)
    return Exchange(Comparison(float(minds[0].mean()), float(minds[1].mean()), error, len(both)), theirs)


def _rates(model: Any, tokenizer: Any, items: Sequence[tuple[TextSample, str]], spec: SelfWritten) -> torch.Tensor:
    """−log p of each text after a prompt, per character, shape (items,). Its end counts too, unless it was cut."""
    nats = token_nats_of(model, tokenizer, items, spec.max_new_tokens)
    return torch.stack([one.sum() for one in nats]) / torch.tensor([len(text) for _, text in items])
