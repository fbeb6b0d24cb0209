"""−log p(answer | prompt): the score behind the likelihood and the classification tasks."""

from __future__ import annotations

from collections.abc import Sequence, Sized

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .generating import padded
from .heads import contiguous_head
from .positions import learned_positions


def answer_nats(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[tuple[str, str]],
    batch_size: int = 16,
    add_special_tokens: bool = True,
) -> torch.Tensor:
    """−log p(answer | prompt) in nats, shape (items,), float64; Args as in `token_nats`."""
    nats = token_nats(model, tokenizer, items, batch_size, add_special_tokens)
    return torch.stack([one.sum() for one in nats]) if nats else torch.zeros(0, dtype=torch.float64)


@torch.no_grad()
def token_nats(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[tuple[str, str]],
    batch_size: int = 16,
    add_special_tokens: bool = True,
    cut: bool = False,
) -> list[torch.Tensor]:
    """−log p of every token of each answer after its prompt, in nats.

    Args:
        model: A causal language model or a PeftModel of one.
        tokenizer: Its tokenizer.
        items: (prompt, answer) pairs; answers usually begin with a space.
        batch_size (`int`): Items per pass. Items of like length share a pass.
        add_special_tokens (`bool`): Whether special tokens (BOS) are put in front of the prompt, as the tokenizer does
            by itself; a rendered chat template holds them already.
        cut (`bool`): Whether answers end at a model's last learned position, instead of failing behind it.

    Returns:
        `list[torch.Tensor]`: Shape (tokens of the answer,), float64, on the CPU, in the order of `items`.
    """
    tokens = [
        (
            tokenizer(prompt, add_special_tokens=add_special_tokens).input_ids,
            tokenizer(answer, add_special_tokens=False).input_ids,
        )
        for prompt, answer in items
    ]
    if cut and (positions := learned_positions(model)):
        tokens = [(prompt, answer[: max(positions - len(prompt), 0)]) for prompt, answer in tokens]
    whole = [prompt + answer for prompt, answer in tokens]
    nats: list[torch.Tensor] = [torch.empty(0)] * len(tokens)
    for chunk in by_length(whole, batch_size):
        # Left padding puts the answers side by side at the end, so the head runs on them alone.
        keep = max(len(tokens[i][1]) for i in chunk)
        inputs = left_padded([whole[i] for i in chunk], model.device)
        with contiguous_head(model):
            logits = model(**inputs, logits_to_keep=keep + 1, use_cache=False).logits[:, :-1]
        for row, i in enumerate(chunk):
            answer = torch.tensor(tokens[i][1], device=logits.device)
            own = logits[row, keep - len(answer) :].float()
            nats[i] = F.cross_entropy(own, answer, reduction="none").cpu().double()
    return nats


@torch.no_grad()
def choice_nats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[str],
    batch_size: int = 16,
) -> torch.Tensor:
    """−log p(choice | prompt) in nats for every prompt and every choice; each prompt is read once.

    Args:
        model: A causal language model or a PeftModel of one.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        choices: The same continuations for all of them.
        batch_size (`int`): Prompts per pass.

    Returns:
        `torch.Tensor`: Shape (prompts, choices), float64.
    """
    labels, wanted = padded([tokenizer(c, add_special_tokens=False).input_ids for c in choices], model.device, "right")
    n, width = labels.shape
    tokens = [tokenizer(p).input_ids for p in prompts]
    nats = torch.zeros(len(prompts), n, dtype=torch.float64)
    for chunk in by_length(tokens, batch_size):
        inputs = left_padded([tokens[i] for i in chunk], model.device)
        with contiguous_head(model):
            read = model(**inputs, logits_to_keep=1, use_cache=True)
        first = read.logits[:, -1].float().log_softmax(-1)[:, labels[:, 0]]  # (prompts, choices)
        nats[chunk] = -first.cpu().double()
        if width > 1:
            read.past_key_values.batch_repeat_interleave(n)
            ids, own = labels.repeat(len(chunk), 1), wanted.repeat(len(chunk), 1)
            start = inputs["position_ids"][:, -1:].repeat_interleave(n, 0) + 1
            logits = model(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([inputs["attention_mask"].repeat_interleave(n, 0), own[:, :-1]], dim=1),
                position_ids=start + torch.arange(width - 1, device=start.device),
                past_key_values=read.past_key_values,
                use_cache=True,
            ).logits.float()
            rest = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(-1, width - 1)
            # Padded choices end early: their surplus logits do not count.
            nats[chunk] += (rest * own[:, 1:]).sum(1).cpu().double().view(len(chunk), n)
    return nats


def by_length(items: Sequence[Sized], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `position_ids`, each (n, longest), padding on the left."""
    ids, mask = padded(sequences, device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
