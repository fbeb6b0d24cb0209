"""Letting a model write: greedily, or by sampling among the likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .heads import contiguous_head
from .positions import positions_left
from .prefixes import after_prefixes, common_prefixes, keeps_prefixes, read_prefix
from .sharding import is_sharded


MOST = 7 / 8  # rows of a batch after whose ends the others are not waited for


class SampleTopK(LogitsProcessor):
    """Draws the next token among the k likeliest and leaves it as the only possible one, for greedy decoding to take.

    The same distribution as `do_sample=True, top_k=k`, which draws one random number for every token of the vocabulary
    and row: two thirds of the time of a step with 262k tokens on a CPU.

    Args:
        temperature (`float`): Sampling temperature, above 0.
        top_p (`float`): Nucleus sampling: the likeliest tokens of this mass; 1 for all.
        k (`int`): Tokens to draw from.
    """

    def __init__(self, temperature: float, top_p: float, k: int = 256) -> None:
        self.temperature, self.top_p, self.k = temperature, top_p, k

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        values, tokens = scores.float().topk(min(self.k, scores.shape[-1]), dim=-1)
        p = (values / self.temperature).softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)  # nucleus: what lies before a token is less than top_p
        chosen = tokens.gather(-1, torch.multinomial(p, 1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


class EndsAt(StoppingCriteria):
    """Ends a row behind a given text, and all rows when most have ended: the last few would take as long again.

    Args:
        tokenizer: What reads the tokens.
        start (`int`): Tokens of a row that stand before what is written.
        stop (`str`): The text, which does not count where nothing else was written before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, stop: str) -> None:
        self.tokenizer, self.start, self.stop = tokenizer, start, stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        written = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        ended = torch.tensor([self.stop in text.lstrip() for text in written], device=input_ids.device)
        return ended | (ended.float().mean() >= MOST)


def continuations(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SampleTopK | None = None,
    add_special_tokens: bool = True,
    stop: str | None = None,
    cut: bool = False,
) -> list[str]:
    """What a model writes after each prompt, as one batch; without the prompt and without special tokens.

    What prompts have in common is read once, if that is long and the model has no adapter.

    Args:
        model: A causal language model or a PeftModel of one. If it is sharded, all processes must call this.
        tokenizer: Its tokenizer, which is left as it is.
        prompts: n texts, or the token ids of n texts.
        max_new_tokens (`int`): The most tokens per prompt.
        sampling (`SampleTopK`, *optional*): How tokens are drawn, by torch's global random state. When not given, the
            likeliest one is taken.
        add_special_tokens (`bool`): Whether texts get the tokenizer's special tokens (BOS); a rendered chat template
            holds them already.
        stop (`str`, *optional*): Text behind which a row may end. Rows that come to it late are cut before.
        cut (`bool`): Whether a model with learned positions writes up to its last one, instead of failing behind it.

    Returns:
        `list[str]`: n texts, in the order of `prompts`.

    Raises:
        ValueError: If no prompt has a token, or, with `cut`, one as many as the model has learned positions.
    """
    tokens: Any = prompts
    if isinstance(prompts[0], str):
        tokens = tokenizer(list(prompts), add_special_tokens=add_special_tokens).input_ids
    if cut and (left := positions_left(model, max(map(len, tokens)))):
        max_new_tokens = min(max_new_tokens, left)
    rows = model.get_input_embeddings().weight.shape[0]  # a token for padding is often added without one
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i < rows), 0)
    prefixes = common_prefixes(tokens) if keeps_prefixes(model) else [()] * len(tokens)
    ids, mask = padded([row[len(head) :] for row, head in zip(tokens, prefixes)], model.device, value=pad)
    if not ids.shape[1]:
        raise ValueError(
            "A model that has no token to begin a text with writes nothing after an empty prompt: pass `prompts` or a "
            "`prefix`."
        )
    before: dict[str, Any] = {}
    if any(prefixes):
        read = {head: read_prefix(model, head) for head in set(prefixes)}
        before["past_key_values"], seen = after_prefixes(model, [read[head] for head in prefixes])
        ids = torch.cat([padded(prefixes, model.device, value=pad)[0], ids], dim=1)
        mask = torch.cat([seen, mask], dim=1)
    ends = [EndsAt(tokenizer, ids.shape[1], stop)] if stop else []
    with contiguous_head(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            logits_processor=LogitsProcessorList([sampling] if sampling else []),
            stopping_criteria=StoppingCriteriaList(ends),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            synced_gpus=is_sharded(model),
            **before,
        )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def padded(
    sequences: Sequence[Sequence[int]], device: torch.device, side: str = "left", value: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of n sequences, each (n, longest), int64, with `value` as padding on one side."""
    ids = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    rows = pad_sequence(ids, batch_first=True, padding_value=value, padding_side=side)
    mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True, padding_side=side)
    return rows.to(device), mask.to(device)
