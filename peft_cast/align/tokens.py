"""Aligned positions: where the tokens of two tokenizers end at the same character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AlignedPair:
    """One text as both models read it.

    Args:
        source_ids (`tuple[int, ...]`): Tokens of the source model, special tokens included.
        target_ids (`tuple[int, ...]`): Tokens of the target model, special tokens included.
        source_positions (`tuple[int, ...]`): Aligned positions in `source_ids`, increasing.
        target_positions (`tuple[int, ...]`): Their partners in `target_ids`, same length, increasing.
    """

    source_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    source_positions: tuple[int, ...]
    target_positions: tuple[int, ...]


def align_texts(
    texts: Sequence[str],
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    *,
    source_prompts: Sequence[str] | None = None,
    target_prompts: Sequence[str] | None = None,
    rendered: Sequence[bool] | None = None,
    max_length: int = 512,
    skip: int = 4,
) -> list[AlignedPair]:
    """Tokenize each text for both models and match the positions whose tokens end at the same character offset.

    Several tokens can end at one character (the bytes of an emoji): the last of them, which completes it, is matched.
    Special tokens (BOS) carry no text and match nothing.

    Args:
        texts: The texts. Those with no aligned position are left out.
        source_tokenizer: Fast tokenizer of the source model.
        target_tokenizer: Fast tokenizer of the target model.
        source_prompts: For each text, what the source reads before it, or "". Prompts may differ between the models
            and are not aligned, but for their end: the position that predicts the text's first token.
        target_prompts: Likewise for the target.
        rendered: For each text, whether its prompts come from chat templates and hold their special tokens already.
        max_length (`int`): Most tokens per text and model; longer texts are cut.
        skip (`int`): Positions at the start of each sequence, in either model, that are never matched: attention sinks
            carry huge activations that spoil a least-squares fit.

    Raises:
        ValueError: If a tokenizer gives no character offsets.
    """
    rendered = rendered or [False] * len(texts)
    source = _tokenize(source_tokenizer, texts, source_prompts, rendered, max_length, "source")
    target = _tokenize(target_tokenizer, texts, target_prompts, rendered, max_length, "target")
    pairs = []
    for (s_ids, s_ends), (t_ids, t_ends) in zip(source, target):
        common = sorted(s_ends.keys() & t_ends.keys())
        positions = [(s_ends[end], t_ends[end]) for end in common if s_ends[end] >= skip and t_ends[end] >= skip]
        if positions:
            s_positions, t_positions = zip(*positions)
            pairs.append(AlignedPair(tuple(s_ids), tuple(t_ids), s_positions, t_positions))
    return pairs


def check_offsets(tokenizer: PreTrainedTokenizerBase, which: str) -> None:
    """
    Raises:
        ValueError: If the tokenizer of `which` model, source or target, gives no character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"The {which} model's tokenizer ({type(tokenizer).__name__}) gives no character offsets, which are needed "
            "to align two tokenizers: load its fast version with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )


def _tokenize(
    tokenizer,
    texts: Sequence[str],
    prompts: Sequence[str] | None,
    rendered: Sequence[bool],
    max_length: int,
    which: str,
) -> Iterator[tuple[list[int], dict[int, int]]]:
    """For each text its token ids and a map from end offset in the text (characters) to the last token ending
    there.
    """
    check_offsets(tokenizer, which)
    for text, prompt, is_rendered in zip(texts, prompts or [""] * len(texts), rendered):
        encoded = tokenizer(
            prompt + text,
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            add_special_tokens=not is_rendered,
        )
        ends = {}
        for position, (start, end) in enumerate(encoded["offset_mapping"]):
            if end > start and end >= len(prompt):
                ends[end - len(prompt)] = position
        yield encoded["input_ids"], ends
