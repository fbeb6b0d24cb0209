"""One text as the two models read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextSample:
    """One text, with what each model reads before it.

    The prompts differ when both models have a chat template of their own; only `text` is aligned.

    Args:
        text (`str`): What both models read.
        source_prompt (`str`): Rendered prompt in front of it for the source model.
        target_prompt (`str`): Rendered prompt in front of it for the target model.
    """

    text: str
    source_prompt: str = ""
    target_prompt: str = ""
