"""The shared vocabulary: tokens of two tokenizers that stand for the same text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SharedVocabulary:
    """Tokens that both tokenizers have, in the same order.

    Args:
        source_ids (`torch.Tensor`): Token ids of the source, shape (n,), int64.
        target_ids (`torch.Tensor`): Ids of the same tokens in the target, shape (n,), int64.
    """

    source_ids: torch.Tensor
    target_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.source_ids)


def shared_vocabulary(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    source_size: int | None = None,
    target_size: int | None = None,
) -> SharedVocabulary:
    """Match tokens by the bytes they stand for, after undoing the tokenizers' space and byte marks.

    The end-of-text tokens of the two models match each other too; other special tokens match only by name.

    Args:
        source_tokenizer: Tokenizer of the source model.
        target_tokenizer: Tokenizer of the target model.
        source_size (`int`, *optional*): Rows of the source's output embedding; tokens beyond it are left out.
        target_size (`int`, *optional*): Rows of the target's output embedding.

    Raises:
        ValueError: If the two have no token in common.
    """
    source = _token_bytes(source_tokenizer, source_size)
    target = _token_bytes(target_tokenizer, target_size)
    common = sorted(source[key] for key in source.keys() & target.keys())
    by_id = {source[key]: target[key] for key in source.keys() & target.keys()}
    if not common:
        raise ValueError(
            "The two tokenizers have no token in common, so the models' predictions cannot be compared. Check that "
            "the source and target tokenizers belong to their models."
        )
    return SharedVocabulary(torch.tensor(common), torch.tensor([by_id[i] for i in common]))


def _token_bytes(tokenizer, size: int | None) -> dict[bytes | str, int]:
    """Map from the bytes a token stands for (special tokens: their name) to its id, the lowest if several share it."""
    vocab, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}
    byte_level = _is_byte_level(vocab)
    tokens: dict[bytes | str, int] = {}
    key: bytes | str
    # Later entries win: the lowest id, and "!" before its byte fallback "<0x21>", which never stands for it.
    for token, token_id in sorted(vocab.items(), key=lambda item: (not _is_fallback(item[0]), -item[1])):
        if size is not None and token_id >= size:
            continue
        if token_id in special:
            key = "<end of text>" if token_id == tokenizer.eos_token_id else f"special:{token}"
        elif token_id in added:
            key = token.encode()  # added tokens are stored as plain text
        elif byte_level:
            key = bytes(_BYTE_OF[c] for c in token) if all(c in _BYTE_OF for c in token) else token.encode()
        elif _is_fallback(token):
            key = bytes([int(token[3:5], 16)])
        else:
            key = token.replace("\u2581", " ").encode()
        tokens[key] = token_id
    return tokens


def _is_byte_level(vocab: dict[str, int]) -> bool:
    """GPT-2 style BPE writes bytes as printable characters, a space as "\u0120"; SentencePiece marks it "\u2581"."""
    return sum(t.startswith("\u0120") for t in vocab) > sum(t.startswith("\u2581") for t in vocab)


def _is_fallback(token: str) -> bool:
    """SentencePiece's tokens for single bytes: "<0x0A>"."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 bytes are themselves, the rest follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _byte_of()
