"""Models with learned positions, which read no text longer than those."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..align import sees_or_hears
from ..utils import without_secrets


_LEARNED = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)$")


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model, or its skeleton, has a learned position for; `None` for one that learns none. One with
    rotary positions may be read longer than its configuration says.
    """
    learned = any(
        isinstance(module, nn.Embedding) and _LEARNED.search(name) and not sees_or_hears(name)
        for name, module in model.named_modules()
    )
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) if learned else None


def positions_left(model: PreTrainedModel, longest: int) -> int | None:
    """How many tokens a model with learned positions can write after a prompt of so many; `None` for any other.

    Raises:
        ValueError: If it has no position left.
    """
    positions = learned_positions(model)
    if positions and longest >= positions:
        raise ValueError(
            f"A prompt has {longest} tokens, and the model '{without_secrets(model.name_or_path)}', which shall write "
            f"after it, has {positions} positions: pass shorter prompts."
        )
    return positions and positions - longest


def fitting(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[bool]:
    """Of each prompt whether a model has a learned position left after it; one that learns none always has."""
    positions = learned_positions(model)
    return [not positions or len(tokenizer(prompt).input_ids) < positions for prompt in prompts]


def check_prompts_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> None:
    """
    Raises:
        ValueError: If a model with learned positions has none left after one of the prompts.
    """
    if learned_positions(model):
        positions_left(model, max((len(tokenizer(prompt).input_ids) for prompt in prompts), default=0))


def check_positions(model: PreTrainedModel, which: str, max_length: int | None) -> None:
    """
    Args:
        model: The model, or its skeleton.
        which (`str`): "source" or "target".
        max_length (`int`, *optional*): Most tokens of a text, if any is read.

    Raises:
        ValueError: If the model has a learned position for fewer tokens.
    """
    positions = learned_positions(model)
    if positions and (max_length or 0) > positions:
        raise ValueError(
            f"The {which} model '{without_secrets(model.name_or_path)}' has {positions} positions, and `max_length` "
            f"is {max_length}: pass `max_length={positions}`."
        )
