"""One text as the two models read it."""

from __future__ import annotations

from dataclasses import dataclass


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
