"""One text as the two models read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..align import AlignedPair, align_texts


@dataclass(frozen=True)
class TextSample:
    """One text, with what each model reads before it.

    Only `text` is aligned, from the position on that predicts its first token. The prompts differ when both models
    have a chat template of their own.

    Args:
        text (`str`): What both models are compared on.
        source_prompt (`str`): What the source model reads before it.
        target_prompt (`str`): What the target model reads before it.
        rendered (`bool`): Whether the prompts come from chat templates, which hold the special tokens already.
    """

    text: str
    source_prompt: str = ""
    target_prompt: str = ""
    rendered: bool = False


def align_samples(
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase], samples: Sequence[TextSample], max_length: int
) -> list[AlignedPair]:
    """Texts with their prompts as both models read them, see `align_texts`.

    Args:
        tokenizers: Those of source and target.
        samples: The texts.
        max_length (`int`): Most tokens per text and model.
    """
    return align_texts(
        [s.text for s in samples],
        *tokenizers,
        source_prompts=[s.source_prompt for s in samples],
        target_prompts=[s.target_prompt for s in samples],
        rendered=[s.rendered for s in samples],
        max_length=max_length,
    )
