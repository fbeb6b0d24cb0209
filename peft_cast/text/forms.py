"""How an unknown adapter can be asked, and what about."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import cycle
from typing import Any


FROM_CORPUS = ("word", "sentence", "paragraph")  # kinds of content that a corpus has
WORD, SENTENCE, PARAGRAPH = 4, (30, 160), 200  # characters: of a word at least, of a sentence, of a paragraph at most


@dataclass(frozen=True)
class Form:
    """How something is asked.

    Args:
        frame (`str`): A text with `{text}` in it, where the content goes.
        content (`str`): The kind of content: `word`, `sentence`, `paragraph`, `question`, `code`, or `given` by the
            user.
        chat (`bool`): Whether it is put into the chat template, as a user's turn.
    """

    frame: str
    content: str
    chat: bool = False

    def __str__(self) -> str:
        return f"{self.frame} (chat)" if self.chat else self.frame

    def fill(self, content: str) -> str:
        return self.frame.replace("{text}", content)


@lru_cache(maxsize=1)
def package_forms() -> dict[str, Any]:
    """Words, templates and contents that a survey asks with; not to be changed."""
    return json.loads(files(__package__).joinpath("forms.json").read_text(encoding="utf-8"))


def drawn_forms(known: Mapping[str, Any], draw: random.Random, count: int, chat: bool) -> list[Form]:
    """Forms of all kinds: two words around a content, questions, chat, and contents alone.

    Args:
        known: What `package_forms` gives.
        draw: Draws among them.
        count (`int`): How many.
        chat (`bool`): Whether there is a chat template.
    """
    asked = [Form(frame, "question") for frame in [*known["questions"], *known["other languages"]]]
    alone = [Form("{text}", kind) for kind in ("paragraph", "sentence", "code")]
    chats = [Form("{text}", kind, chat=True) for kind in ("question", "paragraph", "sentence", "code")] if chat else []
    others = [*asked, *alone]
    draw.shuffle(others)
    others = [*chats, *others][: -(-2 * count // 5)]  # most adapters are a chat's
    pairs = [(a, b) for a in known["before"] for b in known["after"] if a != b]
    few = draw.sample(pairs, min(len(pairs), count - len(others)))
    return [*others, *(Form(f"{a}: {{text}}\n{b}:", known["before"][a]) for a, b in few)]


class Contents:
    """What there is to ask about, by kind; another each time, until all were had.

    Args:
        known: What `package_forms` gives.
        draw: Shuffles it.
        texts: Of a corpus.
        given: What examples of the user's, or of the adapter's card, are about.
    """

    def __init__(
        self, known: Mapping[str, Any], draw: random.Random, texts: Sequence[str], given: Sequence[str] = ()
    ) -> None:
        texts = [" ".join(text.split()) for text in texts]
        sentences = [one for text in texts for one in re.split(r"(?<=[.!?])\s", text)]
        words = [word for text in texts for word in re.findall(rf"[^\W\d_]{{{WORD},}}", text)]
        everything = {
            "word": list(dict.fromkeys(words)),
            "sentence": [one for one in sentences if SENTENCE[0] <= len(one) <= SENTENCE[1]],
            "paragraph": [text[:PARAGRAPH] for text in texts],
            "question": list(known["everyday"]),
            "code": list(known["code"]),
            "given": list(given),
        }
        for some in everything.values():
            draw.shuffle(some)
        self._of = {kind: cycle(some or everything["paragraph"]) for kind, some in everything.items()}

    def next(self, kind: str) -> str:
        return next(self._of[kind])


def taken_apart(prompt: str) -> tuple[Form, str]:
    """The form of one prompt, by what stands before a first colon and after a last line break, and its content."""
    before = re.match(r"[^\n:]{1,30}:\s(?=.)", prompt)
    after = re.search(r"(?<=.)\n[^\n:]{1,30}:$", prompt)
    head, tail = (found.group() if found else "" for found in (before, after))
    return Form(f"{head}{{text}}{tail}", "given"), prompt[len(head) : len(prompt) - len(tail)]
