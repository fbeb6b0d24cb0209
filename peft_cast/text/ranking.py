"""What the answers of a survey say of the forms and contents it asked: where an adapter acts."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from .forms import Form


CROSSED = 3  # best forms whose words are tried in each other's places
BEST, NEAR = 6, 0.4  # forms that are asked for good: how many at most, and how near to the best
RECUR = 4  # forms in which, and contents after which, an answer is given at least, to be a word of a classifier's
WORD = 32  # characters of such a word, at most
SEEDS, EXCITING = 12, 0.5  # contents that further ones follow: how many at most, and how near to the most exciting
FEWEST = 2  # of them at least
FAVORED, HALF = 0.5, 8  # nats by which an adapter favors a token; forms and contents where it then counts half
TWO_WORDS = r"([^\n{}]+): \{text\}\n([^\n{}]+):"  # frames with a word before the content and one after


@dataclass(frozen=True)
class Tried:
    """One prompt and what came of it.

    Args:
        form (`Form`): Its form.
        content (`str`): What was asked about.
        answer (`str`): What the adapted source began to answer; empty where it ended at once.
        tokens (`tuple[str, ...]`): Of the answer, and its end unless it was cut.
        ratios (`tuple[float, ...]`): How much likelier the adapter makes each of them, in nats.
    """

    form: Form
    content: str
    answer: str
    tokens: tuple[str, ...] = ()
    ratios: tuple[float, ...] = ()

    @property
    def acts(self) -> float:
        """How much of the answer is the adapter's doing: the ratios of its n tokens, summed, by √n."""
        return sum(self.ratios) / max(1, len(self.ratios)) ** 0.5


def mean_acts(tried: Sequence[Tried]) -> float:
    """How much the adapter acts on some prompts, a mean."""
    return sum(one.acts for one in tried) / len(tried)


def weighed(tried: Sequence[Tried]) -> dict[Tried, float]:
    """How much the adapter acts on each prompt, where a token counts by how widely it recurs, and less when repeated.

    What an adapter was trained to say (`####`, a label) recurs over forms and contents. What it says where it is lost
    does not, or goes in circles.
    """
    forms: dict[str, set[Form]] = defaultdict(set)
    contents: dict[str, set[str]] = defaultdict(set)
    for one in tried:
        for token, ratio in zip(one.tokens, one.ratios):
            if ratio > FAVORED:
                forms[token].add(one.form)
                contents[token].add(one.content)
    recurs = {token: min(len(forms[token]), len(contents[token])) for token in forms}
    acts = {}
    for one in tried:
        seen: Counter = Counter()
        acts[one] = 0.0
        for token, ratio in zip(one.tokens, one.ratios):
            seen[token] += 1
            widely = recurs.get(token, 0)
            acts[one] += ratio * widely / (widely + HALF) / seen[token] / len(one.tokens) ** 0.5
    return acts


def recurring(tried: Sequence[Tried]) -> list[str]:
    """Short answers that recur over many forms and contents, most frequent first: a classifier's words, each in the
    spelling that recurs most. Empty for other adapters, whose longer answers may recur where they are asked nonsense.
    """
    forms, contents = defaultdict(set), defaultdict(set)
    for one in tried:
        forms[answer_of(one)].add(one.form)
        contents[answer_of(one)].add(one.content)
    least = max(RECUR, len({one.form for one in tried}) // 10)
    short = [word for word in forms if 0 < len(word) <= WORD]
    words = [word for word in short if len(forms[word]) >= least and len(contents[word]) >= RECUR]
    spelled: dict[str, str] = {}
    for word in sorted(words, key=lambda word: -len(forms[word])):
        spelled.setdefault(word.casefold(), word)
    return list(spelled.values()) if len(spelled) > 1 else []


def by_form(tried: Sequence[Tried]) -> dict[Form, list[Tried]]:
    """The prompts of each form."""
    forms: dict[Form, list[Tried]] = {}
    for one in tried:
        forms.setdefault(one.form, []).append(one)
    return forms


def ranked(tried: Sequence[Tried]) -> dict[Form, float]:
    """How much the adapter acts in each form on the half of the contents where it acts most, times the share of pairs
    of contents that it answers differently; most first. Of a classifier only its own words count, and that they differ
    as often as if they were drawn.

    One and the same answer to everything is no sign of the form that an adapter was trained on. The half: an adapter
    may have to do with few contents.
    """
    words, acts = set(recurring(tried)), weighed(tried)
    scores = {}
    for form, own in by_form(tried).items():
        pairs = list(combinations(map(answer_of, own), 2))
        different = (1 + sum(a != b for a, b in pairs)) / (1 + len(pairs))  # two answers alike may be chance
        named = 1.0
        if words:
            different = min(1.0, different / (1 - 1 / len(words)))
            named = (sum(answer_of(one) in words for one in own) / len(own)) ** 2  # elsewhere they leak now and then
        most = sorted((acts[one] for one in own), reverse=True)[: -(-len(own) // 2)]
        scores[form] = named * different * sum(most) / len(most)
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def crossed(forms: Sequence[Form]) -> list[Form]:
    """Forms of two words around a content, one of one of the first forms and one of another."""
    words = [(found[1], found[2], form) for form in forms[:CROSSED] if (found := re.fullmatch(TWO_WORDS, form.frame))]
    mixed = [replace(form, frame=f"{a}: {{text}}\n{b}:") for a, _, form in words for _, b, _ in words]
    return [form for form in dict.fromkeys(mixed) if form not in forms]


def the_best(tried: Sequence[Tried]) -> list[Form]:
    """The forms to ask for good: the first few, as far as they come near to the very first. Where that is a chat's,
    only such: a chat template is no form that an adapter comes upon by chance.
    """
    scores = ranked(tried)
    first, *others = scores
    near = [form for form in others if scores[form] >= NEAR * scores[first]]
    return [first, *(form for form in near if form.chat or not first.chat)][:BEST]


def in_turn(items: Sequence[Any], key: Callable[[Any], Any]) -> list[Any]:
    """The items in their order, but of each key one before any has two."""
    seen: Counter = Counter()
    turns: list[tuple[int, int, Any]] = []
    for one in items:
        turns.append((seen[key(one)], len(turns), one))
        seen[key(one)] += 1
    return [one for *_, one in sorted(turns, key=lambda turn: turn[:2])]


def exciting(tried: Sequence[Tried], forms: Sequence[Form]) -> dict[str, list[str]]:
    """By kind, the contents that excite the adapter most in some forms, first those with an answer that none before
    had.
    """
    much = weighed(tried)
    of_kind: dict[str, dict[str, list[Tried]]] = {}
    for one in tried:
        if one.form in forms and one.answer:
            of_kind.setdefault(one.form.content, {}).setdefault(one.content, []).append(one)
    found = {}
    for kind, contents in of_kind.items():
        acts = {content: sum(much[one] for one in own) / len(own) for content, own in contents.items()}
        order = in_turn(
            sorted(acts, key=lambda content: -acts[content]), lambda content: answer_of(contents[content][0])
        )
        least = EXCITING * max(acts.values())
        near = [content for content in order if acts[content] >= least]
        found[kind] = near[:SEEDS] if len(near) >= FEWEST else order[:FEWEST]
    return found


def answer_of(one: Tried) -> str:
    return one.answer.strip()


def described(form: Form, own: Sequence[Tried]) -> dict[str, Any]:
    """A form and its prompts as they are reported, JSON-ready."""
    example = max(own, key=lambda one: one.acts)
    return {
        "form": str(form),
        "acts": mean_acts(own),
        "prompts": len(own),
        "example": {"content": example.content, "answer": example.answer},
    }
