"""Any of the kinds of text, and mixtures of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..utils.fields import is_a
from .corpus import check_corpus, check_reached, read_corpus
from .samples import TextSample
from .survey import Survey
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
        pairs = all(isinstance(part, (list, tuple)) and len(part) == 2 for part in parts)
        if not parts or not pairs or not all(is_a(weight, Real) and weight > 0 for _, weight in parts):
            raise ValueError("A Mixture needs at least one (text, weight) pair, each with a positive weight.")
        object.__setattr__(self, "parts", tuple(parts))

    def shares(self, limit: int) -> list[tuple[Any, int]]:
        """Each part's text, and how many of `limit` samples are its own, at least one."""
        total = sum(weight for _, weight in self.parts)
        return [(part, max(1, round(limit * weight / total))) for part, weight in self.parts]


def is_written(text: Any) -> bool:
    """Whether the models write the text, or a part of it, themselves."""
    if isinstance(text, Mixture):
        return any(is_written(part) for part, _ in text.parts)
    first = text[0] if isinstance(text, (list, tuple)) and text else None
    return isinstance(text, (SelfWritten, Survey)) or isinstance(first, TextSample)


def check_text(text: Any, least: int = 1, argument: str = "text") -> None:
    """Refuse at once, of what `translate(text=...)` takes, what lies on disk or in memory and cannot be used.

    Args:
        text: The text.
        least (`int`): How many documents are needed, if they are read as they are.
        argument (`str`): As what it is passed, for messages.

    Raises:
        ValueError, OSError: As `read_corpus`.
    """
    argument = "corpus" if isinstance(text, (SelfWritten, Survey)) else argument
    for corpus in _corpora(text):
        check_corpus(corpus, 1 if isinstance(text, (Mixture, SelfWritten, Survey)) else least, argument)


def check_texts(texts: Sequence[Any], fit_text: Any = None) -> None:
    """`check_text` of all that a translation reads: three documents to train on and measure with, two for the closed
    form.

    Args:
        texts: One for each adapter, or one for all, as `translate(text=...)` takes it.
        fit_text: As `translate` takes it.

    Raises:
        ValueError, OSError: As `read_corpus`.
    """
    for text in texts:
        check_text(text, 3)
    parts = [part for part, _ in fit_text.parts] if isinstance(fit_text, Mixture) else [fit_text]
    if any(isinstance(part, Survey) for part in parts):
        raise ValueError("`fit_text` is general text, and a `Survey` asks what the adapter does: pass other text.")
    if fit_text is not None:
        check_text(fit_text, 2, "fit_text")


def check_all_reached(texts: Sequence[Any], fit_text: Any = None) -> None:
    """Refuse, where the Hub is switched off, what is to be read from there.

    Args:
        texts, fit_text: As in `check_texts`.

    Raises:
        OSError: As `read_corpus`; the message says which of the two to pass.
    """
    for one in texts:
        for corpus in _corpora(one):
            check_reached(corpus, "text")
    for corpus in _corpora(fit_text):
        check_reached(corpus, "fit_text")


def _corpora(text: Any) -> list[Any]:
    """What a text is read from."""
    if isinstance(text, Mixture):
        return [corpus for part, _ in text.parts for corpus in _corpora(part)]
    if isinstance(text, SelfWritten):
        return [text.corpus] if text.reads_snippets else []
    if isinstance(text, Survey):
        return [] if text.corpus is None else [text.corpus]
    return [] if is_written(text) else [text]


def read_text(
    text: Any, limit: int, write: Callable[[SelfWritten | Survey, int], list[TextSample]], argument: str = "text"
) -> list[TextSample]:
    """At most `limit` samples; the parts of a mixture are interleaved in proportion.

    Args:
        text: A `SelfWritten`, a `Survey`, a `Mixture`, a list of `TextSample` (what `write_texts` wrote), or
            anything that `read_corpus` takes.
        limit (`int`): The most samples.
        write: Lets the adapted source model write samples for a `SelfWritten` or `Survey`, given it and the
            number wanted.
        argument (`str`): As what it is passed, for messages.
    """
    if isinstance(text, Mixture):
        columns = [read_text(part, share, write, argument) for part, share in text.shares(limit)]
        # Position within its own part orders the samples, so every stretch of the result has the same shares.
        ordered = sorted((i / len(column), n, i) for n, column in enumerate(columns) for i in range(len(column)))
        return [columns[n][i] for _, n, i in ordered]
    if isinstance(text, (SelfWritten, Survey)):
        return write(text, limit)
    if is_written(text):
        return list(text[:limit])
    return [TextSample(t) for t in read_corpus(text, limit, argument)]
