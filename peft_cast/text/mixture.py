"""Any of the kinds of text, and mixtures of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .corpus import C4, Corpus, check_corpus, check_offline, read_corpus
from .samples import TextSample
from .written import SelfWritten


@dataclass(frozen=True)
class Mixture:
    """Several kinds of text, in given shares.

    Args:
        parts: Pairs of a text (anything `translate(text=...)` takes) and its weight, e.g.
            `Mixture((SelfWritten(prefix="Question:"), 3), (None, 1))` for one text of C4 in four.
    """

    parts: tuple[tuple[Any, float], ...]

    def __init__(self, *parts: tuple[Any, float]) -> None:
        if not parts or any(weight <= 0 for _, weight in parts):
            raise ValueError("A Mixture needs at least one (text, weight) pair, each with a positive weight.")
        object.__setattr__(self, "parts", tuple(parts))


def default_text(source_tokenizer: PreTrainedTokenizerBase) -> SelfWritten | Corpus:
    """What is read when nothing is given: the source's answers to snippets of C4, or C4 if it has no chat template.

    C4 as it stands shows little of an adapter, and draws the target to a weaker source (docs/results.md, Text).
    """
    return SelfWritten() if source_tokenizer.chat_template else C4


def is_written(text: Any) -> bool:
    """Whether the models write the text, or a part of it, themselves."""
    if isinstance(text, Mixture):
        return any(is_written(part) for part, _ in text.parts)
    first = text[0] if isinstance(text, (list, tuple)) and text else None
    return isinstance(text, SelfWritten) or isinstance(first, TextSample)


def check_texts(text: Any, fit_text: Any) -> None:
    """Refuse at once, of the two texts of a translation, what lies on disk or in memory and cannot be used.

    Args:
        text: What is imitated on.
        fit_text: The general text; when `None` it is C4 if the models write `text`, else `text` itself.

    Raises:
        ValueError, OSError: As `read_corpus`.
    """
    for corpus, least in _corpora(text, fit_text):
        check_corpus(corpus, least)


def check_reach(text: Any, fit_text: Any) -> None:
    """Refuse at once, of the two texts of a translation, what lies on the hub when the offline mode is on.

    Raises:
        OSError: As `read_corpus`.
    """
    for corpus, _ in _corpora(text, fit_text):
        check_offline(corpus)


def _corpora(text: Any, fit_text: Any) -> Iterator[tuple[Any, int]]:
    """What will be read, each with how many texts are needed of it."""
    yield from _corpora_of(text, 3)
    if fit_text is not None or text is None or is_written(text):
        yield from _corpora_of(fit_text, 2)


def _corpora_of(text: Any, least: int) -> Iterator[tuple[Any, int]]:
    if isinstance(text, Mixture):
        for part, _ in text.parts:
            yield from _corpora_of(part, 1)
    elif isinstance(text, SelfWritten):
        if text.prompts is None and text.prefix is None:
            yield text.corpus, 1
    elif not is_written(text):
        yield text, least


def read_text(text: Any, limit: int, write: Callable[[SelfWritten, int], list[TextSample]]) -> list[TextSample]:
    """At most `limit` samples; the parts of a mixture are interleaved in proportion.

    Args:
        text: A `SelfWritten`, a `Mixture`, a list of `TextSample` (what `write_texts` wrote), or anything that
            `read_corpus` takes.
        limit (`int`): The most samples.
        write: Lets the adapted source model write samples for a `SelfWritten`, given it and the number wanted.
    """
    if isinstance(text, Mixture):
        total = sum(weight for _, weight in text.parts)
        columns = [read_text(part, max(1, round(limit * weight / total)), write) for part, weight in text.parts]
        # Position within its own part orders the samples, so every stretch of the result has the same shares.
        ordered = sorted((i / len(column), n, i) for n, column in enumerate(columns) for i in range(len(column)))
        return [columns[n][i] for _, n, i in ordered]
    if isinstance(text, SelfWritten):
        return write(text, limit)
    if is_written(text):
        return list(text[:limit])
    return [TextSample(t) for t in read_corpus(text, limit)]
