"""What a translation breaks: how far the adapted model moves from the untouched one on general text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..models import by_length, padded
from ..refine import rows_at_once


DRIFT_LENGTH = 256  # most tokens per text


@torch.no_grad()
def drift(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int = DRIFT_LENGTH,
    batch_size: int = 4,
) -> dict[str, float]:
    """Distance of the adapted model from its own base on text that the adapter is not about.

    Args:
        model: The adapted model; its base is the same model with the adapter disabled.
        tokenizer: Its tokenizer.
        texts: General text that no part of the translation has read.
        max_length (`int`): Most tokens per text.
        batch_size (`int`): Texts per pass.

    Returns:
        `drift`: KL(base ‖ adapted) in nats per token; `perplexity_base` and `perplexity`: of the texts without and
        with the adapter; `tokens`: how many were measured.

    Raises:
        ValueError: If no text has two tokens.
    """
    ids = [tokenizer(text, truncation=True, max_length=max_length).input_ids for text in texts]
    ids = [i for i in ids if len(i) > 1]
    if not ids:
        raise ValueError("The text to measure drift on is empty: pass `drift_text` with some documents.")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    divergence = loss_base = loss = 0.0
    predicted = 0
    for chunk in by_length(ids, batch_size):
        rows, mask = padded([ids[i] for i in chunk], model.device, "right")
        inputs = {"input_ids": rows, "attention_mask": mask, "use_cache": False}
        adapted = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
        for parameter, flag in flags:  # PEFT has made the adapter trainable, and then its factors are not kept
            parameter.requires_grad = flag
        at = (mask[:, 1:] * mask[:, :-1]).nonzero(as_tuple=True)  # what has a next token
        next_tokens = rows[:, 1:][at].unsqueeze(-1)
        size = rows_at_once(base)
        for row, position, token in zip(at[0].split(size), at[1].split(size), next_tokens.split(size)):
            p, q = (z[row, position].float().log_softmax(-1) for z in (base, adapted))
            divergence += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            loss_base -= float(p.gather(1, token).sum())
            loss -= float(q.gather(1, token).sum())
        predicted += len(next_tokens)
    before, after = (torch.tensor([loss_base, loss], dtype=torch.float64) / predicted).exp().tolist()
    return {"drift": divergence / predicted, "perplexity_base": before, "perplexity": after, "tokens": predicted}
