"""What the rows of a dataset ask that an adapter's card names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeGuard

from ..utils import distributed, without_secrets
from .corpus import first_rows


ROWS, LONGEST = 64, 2000  # that are read, and the characters of what is asked
USER = ("user", "human")


def read_asked(dataset: str) -> list[tuple[str, bool | None]]:
    """What the first rows of a dataset ask; of several processes one reads, and all have it.

    Args:
        dataset (`str`): Hub id, or path of a local file or folder as `read_corpus` takes one.

    Returns:
        In order, each with whether it is a user's turn of a chat, or else a whole prompt; `None` of a question without
        a form. Empty where the dataset is out of reach or asks nothing, which is said in a warning.
    """
    return distributed.on_main_process(partial(_read, dataset))


def _read(dataset: str) -> list[tuple[str, bool | None]]:
    asked, why = [], "asks nothing in a way that is known"
    try:
        asked = [(text, chat) for text, chat in map(_asked, first_rows(dataset, ROWS)) if _is_text(text)]
    except Exception as error:  # it is a hint, and a stranger's dataset may hold anything
        why = f"could not be read ({type(error).__name__})"
    asked = [(text, chat) for text, chat in asked if len(text) <= LONGEST]
    if not asked:
        name = without_secrets(dataset)
        warnings.warn(f"The dataset '{name}', which the adapter's card names, {why}: the survey goes on without it.")
    return asked


def _asked(row: Mapping[str, Any]) -> tuple[Any, bool | None]:
    """The one thing that a row asks, `None` if it asks nothing."""
    for turns in (row.get(name) for name in ("messages", "conversations", "prompt")):
        if isinstance(turns, list):
            own = (one for one in turns if isinstance(one, Mapping) and (one.get("role") or one.get("from")) in USER)
            first = next(own, {})
            return first.get("content") or first.get("value"), True
    if _is_text(row.get("prompt")):
        return row["prompt"], False
    if _is_text(row.get("instruction")):
        return "\n\n".join(filter(_is_text, (row["instruction"], row.get("input")))), None
    return row.get("question") or row.get("query"), None


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())
