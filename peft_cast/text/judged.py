"""How likely a model finds answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import token_nats
from .samples import TextSample


def token_nats_of(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[tuple[TextSample, str]],
    longest: int,
) -> list[torch.Tensor]:
    """−log p of every token of n texts, each after the `source_prompt` of a sample; and of its end, unless it was cut.

    Args:
        model, tokenizer: Who judges.
        items: Samples whose own text does not matter, and texts.
        longest (`int`): The most tokens that a text could have.

    Returns:
        `list[torch.Tensor]`: n tensors of shape (tokens,), float64.
    """

    def ended(text: str) -> str:
        length = len(tokenizer(text, add_special_tokens=False).input_ids)
        return text + (tokenizer.eos_token or "") if length < longest else text

    nats: list[torch.Tensor] = [torch.empty(0)] * len(items)
    for rendered in {prompt.rendered for prompt, _ in items}:
        rows = [i for i, (prompt, _) in enumerate(items) if prompt.rendered is rendered]
        some = [(items[i][0].source_prompt, ended(items[i][1])) for i in rows]
        for i, one in zip(rows, token_nats(model, tokenizer, some, 8, not rendered, cut=True)):
            nats[i] = one
    return nats
