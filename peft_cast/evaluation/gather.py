"""What a report shows and the translation would otherwise throw away: how layers resemble, what excites, samples."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..align import AlignedPair
from ..fit import layer_similarity
from ..models import continuations, is_sharded
from ..results.report import redact, redact_pieces
from ..source import Pair
from ..text import PairTexts
from ..utils import environment
from ..utils.fields import describe


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
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """The parts of `TranslationResult.metrics["report"]`, JSON-ready, without access tokens.

    What fails here costs a warning and that part of the report, never the translation.

    Args:
        pair (`Pair`): The models, with their whole heads.
        model (`PeftModel`): The translated model.
        texts (`PairTexts`): The held-out texts are quoted, the closed form's compared.
        excitement: For each held-out text KL(source + LoRA ‖ source) in nats at its aligned positions, shape
            (positions,).
        arguments: What `translate` was called with, by name. With `report_samples` 0 no text gets into the report.
        tokenizer: What the teacher reads with.

    Returns:
        `models`, `arguments`, `environment`; `excitement`: `by_text` (nats per position of each held-out text), `most`
        and `least` (see `quote`); `samples` (see `continued`); `layer_similarity`: `cka`, (source layers × target
        layers), and the number of `positions`.
    """
    held_out, together, samples = texts.held_out, is_sharded(model), arguments["report_samples"]
    by_text = [float(nats.float().mean()) for nats in excitement]
    order = sorted(range(len(by_text)), key=lambda i: -by_text[i])

    def quotes() -> dict[str, Any]:
        chosen = {"most": order[:samples], "least": order[samples:][-samples:]}
        return {
            name: [quote(tokenizer, held_out[i], excitement[i]) for i in indices] for name, indices in chosen.items()
        }

    def compared() -> dict[str, Any]:
        with model.disable_adapter():
            cka, positions = layer_similarity(pair, texts.fit, POSITIONS)
        return {"cka": [[round(x, 3) for x in row] for row in cka.tolist()], "positions": positions}

    source, target = (str(model.name_or_path) for model in (pair.source, pair.target))
    parts = {
        "models": redact({"source": source, "adapter": describe(arguments["adapter"]), "target": target}),
        "arguments": redact({name: describe(value) for name, value in arguments.items()}),
        "environment": environment(),
        "excitement": {"by_text": by_text},
    }
    if samples:
        parts["excitement"] |= _tried("quoted texts", quotes, together) or {}
        write = partial(continued, pair.tokenizers[1], model, held_out[:samples])
        parts["samples"] = _tried("samples", write, together)
    if arguments["report_similarity"]:
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
        `before`: what stands before the first compared position; `pieces`: the text after it; `nats`: for each piece
        how much the adapter changes the prediction of its beginning; `mean` over the text; whether it was `cut`.
    """
    starts = [position + 1 for position in text.source_positions]
    bounds = [*starts, len(text.source_ids)][: PIECES + 1]
    # From the start each time: pieces alone would lose their spaces.
    decoded = [tokenizer.decode(text.source_ids[:end], clean_up_tokenization_spaces=False) for end in bounds]
    pieces = [longer[len(os.path.commonprefix([shorter, longer])) :] for shorter, longer in zip(decoded, decoded[1:])]
    before, *pieces = redact_pieces([decoded[0][-CHARACTERS:], *pieces])
    return {
        "mean": float(nats.float().mean()),
        "before": before,
        "pieces": pieces,
        "nats": [round(x, 3) for x in nats.float().tolist()[: len(pieces)]],
        "cut": len(starts) > PIECES,
    }


def continued(tokenizer, model: PeftModel, texts: Sequence[AlignedPair]) -> list[dict[str, str]]:
    """What the target writes after the prompts (or beginnings) of some texts, greedily, without and with the adapter.

    Args:
        tokenizer: The target's.
        model (`PeftModel`): The translated model.
        texts: Held-out texts.

    Returns:
        For each text `prompt`, `untouched`, `translated` and how the `text` itself goes on.
    """
    ends = [prompt_end(text) for text in texts]
    prompts = [text.target_ids[:end] for text, end in zip(texts, ends)]
    answers = [text.target_ids[end : end + NEW_TOKENS] for text, end in zip(texts, ends)]
    with model.disable_adapter():
        untouched = continuations(model, tokenizer, prompts, NEW_TOKENS, cut=True)
    translated = continuations(model, tokenizer, prompts, NEW_TOKENS, cut=True)
    prompt, answer = (tokenizer.batch_decode(side, skip_special_tokens=True) for side in (prompts, answers))
    columns = [text[-CHARACTERS:] for text in prompt], untouched, translated, answer
    return [redact(dict(zip(("prompt", "untouched", "translated", "text"), row))) for row in zip(*columns)]


def prompt_end(text: AlignedPair) -> int:
    """How many of the target's tokens are the prompt: up to the first compared position, which predicts the answer."""
    first = text.target_positions[0] + 1
    if first > BEGINNING // 2:
        return first
    return next((p + 1 for p in text.target_positions if p + 1 >= min(BEGINNING, len(text.target_ids) // 2)), first)
