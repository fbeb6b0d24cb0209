"""Regular expressions from files of strangers: none may keep a match going for hours.

PEFT matches those of a configuration with `re` on the name of every module, and `re` has no time limit: it holds the
interpreter, so no thread can stop it, and a signal or another process works only in some programs. So the work of a
pattern is bounded before it is used, from its structure alone: in how many ways can its parts share out a name? That
number bounds the steps of a search that backtracks. It does not look at which characters the parts accept, except for
words to choose from (`q_proj|k_proj`), so it errs on the safe side: `(\\w+\\.)*` is refused too, although it is
harmless.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence


if sys.version_info >= (3, 11):
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as ops
    import sre_parse as parser


NAME_LENGTH = 64  # of a module, in the reckoning
MOST_STEPS = 5_000_000
MOST_PATTERNS, MOST_CHARACTERS = 2048, 100_000
_MOST_REPEATS = 1000
_REPEATS = {getattr(ops, name, None) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")}  # the last: 3.11
_BRANCHES = frozenset("*+?{|(")


def check_patterns(patterns: Iterable[str], where: str, behind: bool = False) -> None:
    """Refuse regular expressions that are none, or with which a match could take very long.

    Args:
        patterns: All those of one configuration.
        where (`str`): What the message calls them, "`rank_pattern` of the adapter 'x'".
        behind (`bool`): Whether PEFT matches them anywhere in a name, behind a `.*` of its own.

    Raises:
        ValueError: Naming the pattern.
    """
    patterns = list(patterns)
    if len(patterns) > MOST_PATTERNS or sum(map(len, patterns)) > MOST_CHARACTERS:
        raise ValueError(
            f"The patterns of {where}, {len(patterns)} of them, have {sum(map(len, patterns))} characters in all, at "
            f"most {MOST_PATTERNS} of {MOST_CHARACTERS} are read: use fewer that match more, such as 'q_proj'."
        )
    work = _Work()
    for pattern in patterns:
        shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
        try:
            if not _BRANCHES & set(pattern):  # a name, the usual case
                parser.parse(pattern)
                continue
            work.follow(parser.parse(pattern).data, [1] * (NAME_LENGTH + 1) if behind else [1] + [0] * NAME_LENGTH)
        except (re.error, RecursionError, OverflowError) as error:
            reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is none ({error})"
            raise ValueError(f"The regular expression {shown!r} in {where} {reason}: correct it.") from None
        except _TooMuch:
            raise ValueError(
                f"The regular expression {shown!r} in {where} could take very long to match (repeats within repeats, "
                "or too many in a row): list the names of the modules instead."
            ) from None


class _TooMuch(Exception):
    pass


class _Work:
    """Follows patterns, counting the steps that a match could take at most."""

    def __init__(self) -> None:
        self.steps = 0

    def _count(self, ways: list[int], times: int = 1) -> None:
        self.steps += times * sum(ways)
        if self.steps > MOST_STEPS:
            raise _TooMuch

    def follow(self, items: Sequence, ways: list[int]) -> list[int]:
        """The ways to have read 0, 1, ... characters of the name after a sequence of parts, given those before it."""
        for op, what in items:
            if op in (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN):
                ways = [0, *ways[:-1]]
            elif op is ops.SUBPATTERN:
                ways = self.follow(what[-1], ways)
            elif op in _REPEATS:
                ways = self._repeat(ways, *what)
            elif op is ops.BRANCH:
                ways = self._branch(what[1], ways)
            elif op is ops.GROUPREF_EXISTS:
                ways = _sum([self.follow(part or [], ways) for part in what[1:]])
            elif op in (ops.ASSERT, ops.ASSERT_NOT):
                self.follow(what[1], ways)
            elif op is not ops.AT and op is not ops.GROUPREF:
                ways = self.follow(what, ways)  # an atomic group
            self._count(ways)
        return ways

    def _repeat(self, ways: list[int], least: int, most: int, items: Sequence) -> list[int]:
        if least > _MOST_REPEATS:
            raise _TooMuch
        total = ways if least == 0 else [0] * len(ways)
        for i in range(1, min(most, max(least, NAME_LENGTH)) + 1):
            ways = self.follow(items, ways)
            if not any(ways):
                break
            if i >= least:
                total = _sum([total, ways])
        return total

    def _branch(self, branches: Sequence[Sequence], ways: list[int]) -> list[int]:
        if all(op is ops.LITERAL for branch in branches for op, _ in branch):
            words = sorted([value for _, value in branch] for branch in branches)
            if all(after[: len(before)] != before for before, after in zip(words, words[1:])):
                self._count(ways, times=len(words))  # none begins with another, so at most one can match
                return self.follow(min(branches, key=len), ways)
        return _sum([self.follow(branch, ways) for branch in branches])


def _sum(parts: Sequence[list[int]]) -> list[int]:
    return [sum(numbers) for numbers in zip(*parts)]
