"""How much the models read and write for a text, for a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .closings import AGAIN, KINDS, MARKS, OPENED, WORDS
from .forms import package_forms
from .mixture import Mixture
from .ranking import CROSSED
from .survey import CONTENTS, FORMS, ROUNDS, SCREENING, SHORT, Survey
from .written import ALIKE, SelfWritten


# Tokens, as they were with three adapters: of a prompt, of a content that is written, and of the list it continues.
PROMPT, CONTENT, LIST = 32, 30, 100
LINE = 2  # tokens of a last line, behind the break that all of them begin with


@dataclass(frozen=True)
class Effort:
    """What reading and writing take.

    Args:
        source, target (`float`): Tokens that each of the models reads or writes.
        source_passes, target_passes (`float`): Passes in which it does: one for each token that a batch writes.
        rows (`int`): Texts that are written at a time, at most.
        length (`int`): Tokens of the longest of them, with its prompt.
    """

    source: float = 0.0
    target: float = 0.0
    source_passes: float = 0.0
    target_passes: float = 0.0
    rows: int = 0
    length: int = 0

    def __add__(self, other: Effort) -> Effort:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        return Effort(**sums, rows=max(self.rows, other.rows), length=max(self.length, other.length))


_SUMMED = ("source", "target", "source_passes", "target_passes")


def effort_of(text: Any, limit: int) -> Effort:
    """What a text takes, of anything that `translate(text=...)` takes; nothing if no model writes it.

    Args:
        text: The text.
        limit (`int`): How many texts are read, unless it says less.
    """
    if isinstance(text, Mixture):
        return sum((effort_of(part, share) for part, share in text.shares(limit)), Effort())
    if not isinstance(text, (SelfWritten, Survey)):
        return Effort()
    count = min(limit, text.samples or limit)
    if isinstance(text, SelfWritten):
        by = "target" if text.on_policy else "source"
        return _written(text, count, by) + _contents(text, text.further(count))
    asked, lines = len(text.prompts or ()), Effort()
    if not asked:
        lines = _lines(text)
        forms = min(FORMS, max(8, count // 4))
        asked = SCREENING * len(package_forms()["everyday"]) + forms * CONTENTS
        later = [n * each for n, each in ROUNDS if n < forms]
        # Of each two of the best forms two others are made, which are asked about all contents there are by then.
        asked += sum(later) + (CROSSED * (CROSSED - 1) * 2 * CONTENTS if later else 0)
    # An answer's beginning is written, and read with the adapter and without.
    steps = SHORT * -(-asked // text.batch_size)
    asking = Effort(asked * 3 * (PROMPT + SHORT), 0, steps, 0, min(asked, text.batch_size), PROMPT + SHORT)
    focus = count if text.prompts else count - round(text.breadth * count)
    return lines + asking + _contents(text, focus) + _written(text, count, "source")


def _lines(spec: Survey) -> Effort:
    """Last lines of prompts, each read with the adapter and without."""
    lines = WORDS + MARKS + AGAIN * (len(KINDS) - 1)
    passes = 2 * LINE * -(-lines // spec.batch_size)
    openings = OPENED * len(package_forms()["before"])
    return Effort(2 * (lines * LINE + openings * PROMPT), 0, passes, 0, spec.batch_size, PROMPT)


def _written(spec: SelfWritten | Survey, count: int, by: str) -> Effort:
    """Answers at length."""
    passes = spec.max_new_tokens * -(-count // spec.batch_size)
    length = PROMPT + spec.max_new_tokens
    taken = {by: count * length, f"{by}_passes": passes}
    return Effort(**taken, rows=min(count, spec.batch_size), length=length)


def _contents(spec: SelfWritten | Survey, count: int) -> Effort:
    """Prompts that the target writes: of two one is of use, and a list is read once for several."""
    rows = 2 * count
    passes = CONTENT * -(-rows // spec.batch_size)
    return Effort(0, rows * (CONTENT + LIST / ALIKE), 0, passes, min(rows, spec.batch_size), CONTENT + LIST)
