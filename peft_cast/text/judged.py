"""How likely a model finds answers to prompts."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..models import check_prompts_fit, contiguous_head, token_nats
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


@torch.no_grad()
def moved_nats(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch_size: int
) -> torch.Tensor:
    """How far an adapter moves the token after each prompt: the KL of its distribution with the adapter from the one
    without, in nats.

    Special tokens do not count: where a text ends no answer begins. What all prompts begin with is read once.

    Args:
        model: A model with its adapter active, which can be disabled.
        tokenizer: Its tokenizer.
        prompts: n texts.
        batch_size (`int`): The most prompts per pass; those of one pass have as many tokens.

    Returns:
        `torch.Tensor`: Shape (n,), float64, on the CPU.

    Raises:
        ValueError: If the model has too few learned positions for the longest prompt.
    """
    check_prompts_fit(model, tokenizer, [max(prompts, key=len)])
    rows = tokenizer(list(prompts)).input_ids
    # A state is kept in no copies: such a model reads all prompts whole.
    shared = 0 if model.get_base_model()._is_stateful else len(os.path.commonprefix([row[:-1] for row in rows]))
    nats = torch.zeros(len(rows), dtype=torch.float64)
    batches = []
    for length in sorted({len(row) for row in rows}):
        alike = [i for i, row in enumerate(rows) if len(row) == length]
        batches += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    head = torch.tensor([rows[0][:shared]], device=model.device)
    with contiguous_head(model):
        read = _caches(model, head)
        for batch in batches:
            ids = torch.tensor([rows[i][shared:] for i in batch], device=model.device)
            adapted, plain = (_next_logs(model, ids, cache, shared, on) for on, cache in zip((True, False), read))
            terms = F.kl_div(plain, adapted, reduction="none", log_target=True)
            terms[:, [i for i in tokenizer.all_special_ids if i < terms.shape[1]]] = 0
            nats[batch] = terms.sum(-1).double().cpu()
    return nats


def _caches(model: PeftModel, ids: torch.Tensor) -> list[Cache | None]:
    """What is kept of token ids of shape (1, n) that were read with the adapter, and without; nothing of no ids."""
    if not ids.shape[1]:
        return [None, None]
    adapted = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    with model.disable_adapter():
        return [adapted, model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values]


def _next_logs(model: PeftModel, ids: torch.Tensor, cache: Cache | None, before: int, adapter: bool) -> torch.Tensor:
    """log p of the token after each row of ids (rows, tokens) that follow what a cache keeps, (rows, vocabulary)."""
    mask = torch.ones(len(ids), before + ids.shape[1], dtype=torch.long, device=ids.device)
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(ids))
    with nullcontext() if adapter else model.disable_adapter():
        read = model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
        )
    return read.logits[:, -1].float().log_softmax(-1)
