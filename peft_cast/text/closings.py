"""What a prompt ends with where an adapter acts: found among thousands of last lines by the next token alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from .forms import Form


# How far an adapter moves the token after each prompt, in nats, shape (prompts,)
Moved: TypeAlias = Callable[[Sequence[str]], torch.Tensor]

WORDS, MARKS = 3000, 800  # of a vocabulary, the most frequent
AGAIN = 64  # lines that are tried on further contents
GROWN, FOLLOW = 2, 64  # first lines that grow, if they are marks; marks that may follow one
# Lines that are kept: how many at most, how near to the best, and nats by which an adapter acts there at least.
KEPT, NEAR, LEAST = 8, 0.6, 0.5
OPENED, OPENINGS = 2, 4  # lines that openings are tried with, and openings of each that are kept
KINDS = ("sentence", "question", "paragraph", "word")  # of contents


def last_lines(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[str]:
    """Thousands of lines that a prompt may end with: capitalized words of the vocabulary as `Topic:`, and marks.

    Args:
        tokenizer: Whose vocabulary. Its tokens are numbered by how frequent they are.
        words: Words to try in any case.
    """
    tokens = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    found = dict.fromkeys(one for one in tokens if re.fullmatch(r"[^\W\d_]{2,15}", one) and one.istitle())
    named = dict.fromkeys([*words, *list(found)[:WORDS]])
    return [*(f"\n{word}:" for word in named), *(f"\n{mark}" for mark in marks(tokens)[:MARKS])]


def marks(tokens: Sequence[str]) -> list[str]:
    """Of tokens, those that are up to four printable characters and neither letters nor digits."""
    return list(dict.fromkeys(one for one in tokens if re.fullmatch(r"[^\w\s\ufffd]{1,4}", one) and one.isprintable()))


def grown(line: str, following: Sequence[str]) -> list[str]:
    """A mark as a last line, by itself, repeated, and followed by another."""
    mark = line.strip()
    return [line, f"{line}{mark}{mark}", *(f"{line}{other}" for other in dict.fromkeys([mark, *following]))]


def acting_lines(
    moved: Moved, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], contents: Sequence[str]
) -> dict[str, float]:
    """The last lines after which an adapter moves the next token most, and how far, best first; none where it hardly
    acts.

    Where an adapter was trained on prompts with an end of their own, the first token that it answers there is the one
    that is most its own: of some 3,450 lines the one it was trained with is among those that are kept for each of five
    adapters (docs/figures/closings.json). An answer that ends at once does not count.

    Args:
        moved: How far the adapter moves the token after each of some prompts, in nats.
        tokenizer: Of the source, whose vocabulary is tried.
        words: Words that are tried beside its own.
        contents: What the lines follow; the first is tried with all lines, the others with the best of them.
    """

    def tried(lines: Sequence[str], some: Sequence[str]) -> dict[str, float]:
        nats = sum(moved([content + line for line in lines]) for content in some) / len(some)
        found = dict(zip(lines, nats.tolist()))
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    first, *others = contents
    lines = last_lines(tokenizer, words)
    best = tried(list(tried(lines, [first]))[:AGAIN], others)
    frequent = marks([line.removeprefix("\n") for line in lines])[:FOLLOW]
    for line in [line for line in list(best)[:GROWN] if not line.endswith(":")]:
        del best[line]
        longer, nats = next(iter(tried(grown(line, frequent), others).items()))
        best[longer] = nats
    found = sorted(best.items(), key=lambda item: -item[1])[:KEPT]
    return {line: nats for line, nats in found if nats >= max(LEAST, NEAR * found[0][1])}


def acting_forms(
    moved: Moved, tokenizer: PreTrainedTokenizerBase, known: Mapping[str, Any], contents: Mapping[str, str]
) -> list[Form]:
    """Forms of prompts that end with the lines after which an adapter acts, for contents of all kinds.

    Args:
        moved, tokenizer: As in `acting_lines`.
        known: Words, as `package_forms` gives them.
        contents: One of each of `KINDS`.
    """
    lines = list(acting_lines(moved, tokenizer, known["after"], list(contents.values())))
    bare = [Form(f"{{text}}{line}", kind) for kind in KINDS[: 4 if len(lines) < 4 else 2] for line in lines]
    forms = []
    for line in lines[:OPENED]:
        openings = {f"{word}: ": kind for word, kind in known["before"].items()}
        if not line.strip().endswith(":"):  # what is marked at its end may be so at its beginning
            openings |= {f"{mark} ": "sentence" for mark in (line.strip()[0], line.strip())}
        nats = moved([f"{opening}{contents['sentence']}{line}" for opening in openings]).tolist()
        order = sorted(openings, key=dict(zip(openings, nats)).__getitem__, reverse=True)
        forms += [Form(f"{opening}{{text}}{line}", openings[opening]) for opening in order[:OPENINGS]]
    return [*bare, *forms]
