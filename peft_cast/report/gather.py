"""What a report shows and the translation would otherwise throw away: how layers resemble, what excites, samples."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..align import AlignedPair
from ..environment import environment
from ..models import contiguous_head
from ..pair import Pair, PairTexts, layer_similarity
from ..safety import HIDDEN
from ..shards import is_spread
from ..text import Corpus, Mixture, SelfWritten
from .redact import redact, redact_pieces


POSITIONS = 600  # at which layers are compared
NEW_TOKENS = 48  # of each sample
PIECES = 160  # of each quoted text; further ones are cut off
BEGINNING = 24  # tokens that stand in for a prompt where a text has none
CHARACTERS = 600  # of a quoted prompt, its end


def gather_report(
    pair: Pair,
    model: PeftModel,
    texts: PairTexts,
    excitement: Sequence[torch.Tensor],
    arguments: Mapping[str, Any],
    *,
    samples: int,
    similarity: bool,
) -> dict[str, Any]:
    """The parts of `TranslationResult.metrics["report"]`, JSON-ready, without access tokens.

    What fails here costs a warning and that part of the report, never the translation.

    Args:
        pair (`Pair`): The models, with their whole heads.
        model (`PeftModel`): The translated model.
        texts (`PairTexts`): The held-out texts are quoted, the closed form's compared.
        excitement: For each held-out text KL(source + LoRA ‖ source) in nats at its aligned positions, shape (positions,).
        arguments: What `translate` was called with.
        samples (`int`): How many held-out texts the target continues, and how many of the most and of the least exciting
            ones are quoted; 0 keeps text out of the report.
        similarity (`bool`): Whether to compare the layers.

    Returns:
        `models`, `arguments`, `environment`; `excitement`: `by_text` (nats per position of each held-out text), `most` and
        `least` (see `quote`); `samples` (see `continued`); `layer_similarity`: `cka`, (source layers × target layers), and
        the number of `positions`.
    """
    held_out, together = texts.held_out, is_spread(model)
    by_text = [float(nats.float().mean()) for nats in excitement]
    order = sorted(range(len(by_text)), key=lambda i: -by_text[i])
    most, least = order[:samples], order[samples:][-samples:] if samples else []

    def quotes(indices: Sequence[int]) -> list[dict[str, Any]]:
        return [quote(pair.tokenizers[0], held_out[i], excitement[i]) for i in indices]

    def compared() -> dict[str, Any]:
        with model.disable_adapter():
            cka, positions = layer_similarity(pair, texts.fit, POSITIONS)
        return {"cka": [[round(x, 3) for x in row] for row in cka.tolist()], "positions": positions}

    parts = {
        "models": redact({
            "source": str(pair.source.name_or_path), "adapter": describe(arguments["adapter"]),
            "target": str(pair.target.name_or_path),
        }),
        "arguments": redact({name: describe(value) for name, value in arguments.items()}),
        "environment": environment(),
        "excitement": {"by_text": by_text},
    }  # fmt: skip
    if samples:
        quoted = _tried("quoted texts", lambda: {"most": quotes(most), "least": quotes(least)}, together)
        parts["excitement"] |= quoted or {}
        parts["samples"] = _tried(
            "samples", lambda: continued(pair.tokenizers[1], model, held_out[:samples]), together
        )
    if similarity:
        parts["layer_similarity"] = _tried("layer similarity", compared, together)
    return {name: part for name, part in parts.items() if part is not None}


def _tried(what: str, make: Callable[[], Any], together: bool) -> Any:
    try:
        return make()
    except Exception as error:
        if together:  # the other processes wait for this one
            raise
        # Hours of training must not be lost to a picture of them.
        warnings.warn(f"The report goes without its {what}: {error}", stacklevel=2)
        return None


def quote(tokenizer, text: AlignedPair, nats: torch.Tensor) -> dict[str, Any]:
    """A held-out text as the source reads it, in pieces that end at aligned positions.

    Args:
        tokenizer: The source's.
        text (`AlignedPair`): The text.
        nats (`torch.Tensor`): Excitement at its aligned positions, shape (positions,).

    Returns:
        `before`: what stands before the first compared position; `pieces`: the text after it; `nats`: for each piece how
        much the adapter changes the prediction of its beginning; `mean` over the text; whether it was `cut`.
    """
    starts = [position + 1 for position in text.source_positions]
    bounds = [*starts, len(text.source_ids)][: PIECES + 1]
    decoded = [
        tokenizer.decode(text.source_ids[:end], clean_up_tokenization_spaces=False) for end in bounds
    ]  # from the start each time: pieces alone would lose their spaces
    before = decoded[0][-CHARACTERS:]
    pieces = [longer[len(os.path.commonprefix([shorter, longer])) :] for shorter, longer in zip(decoded, decoded[1:])]
    before, *pieces = redact_pieces([before, *pieces])
    return {
        "mean": float(nats.float().mean()),
        "before": before,
        "pieces": pieces,
        "nats": [round(x, 3) for x in nats.float().tolist()[: len(pieces)]],
        "cut": len(starts) > PIECES,
    }


@torch.no_grad()
def continued(tokenizer, model: PeftModel, texts: Sequence[AlignedPair]) -> list[dict[str, str]]:
    """What the target writes after the prompts (or beginnings) of some texts, greedily, without and with the adapter.

    Args:
        tokenizer: The target's.
        model (`PeftModel`): The translated model.
        texts: Held-out texts.

    Returns:
        For each text `prompt`, `untouched`, `translated` and how the `text` itself goes on.
    """
    ends = [_prompt_end(text) for text in texts]
    prompts = [text.target_ids[:end] for text, end in zip(texts, ends)]
    with model.disable_adapter():
        untouched = _greedy(tokenizer, model, prompts)
    translated = _greedy(tokenizer, model, prompts)
    answers = [text.target_ids[end : end + NEW_TOKENS] for text, end in zip(texts, ends)]
    prompt, answer = ([tokenizer.decode(ids, skip_special_tokens=True) for ids in side] for side in (prompts, answers))
    columns = [text[-CHARACTERS:] for text in prompt], untouched, translated, answer
    return [redact(dict(zip(("prompt", "untouched", "translated", "text"), row))) for row in zip(*columns)]


def _prompt_end(text: AlignedPair) -> int:
    """How many of the target's tokens are the prompt: up to the first compared position, which predicts the answer."""
    first = text.target_positions[0] + 1
    if first > BEGINNING // 2:
        return first
    return next((p + 1 for p in text.target_positions if p + 1 >= min(BEGINNING, len(text.target_ids) // 2)), first)


def _greedy(tokenizer, model: PeftModel, prompts: Sequence[Sequence[int]]) -> list[str]:
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with contiguous_head(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=pad,
            synced_gpus=is_spread(model),
        )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def describe(value: Any) -> Any:
    """An argument in JSON: plain values as they are, others by what they are; lists of texts are counted, not quoted."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value if len(value) <= 300 else value[:300] + "…"
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (SelfWritten, Corpus, Mixture)):
        given = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, **{name: item for name, item in given.items() if item is not None}}
    if isinstance(value, Mapping):
        return {str(k): HIDDEN if str(k).endswith("token") else describe(item) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, (str, int, float)) for item in value):
            return f"{len(value)} × {type(value[0]).__name__}"
        return [describe(item) for item in value] if len(value) <= 8 else f"{len(value)} × {type(value[0]).__name__}"
    return type(value).__name__
