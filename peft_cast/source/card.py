"""What an adapter's own card says it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.repocard import metadata_load

from ..utils import find_file


MOST, LONGEST, LARGEST = 8, 2000, 2**20  # examples that are taken, their characters, and the bytes of a card


def asked_on_card(adapter: str | Path, revision: str | None = None) -> tuple[tuple[str, bool], ...]:
    """The examples in the `widget` of an adapter's card, in order, each with whether it is a user's turn of a chat.

    Args:
        adapter: Folder or hub id.
        revision (`str`, *optional*): Its hub revision.

    Returns:
        Empty where there is no card, or none that can be read: it is a hint, and no part of the adapter.
    """
    try:
        file = find_file(adapter, "README.md", revision)
        card = (metadata_load(file) if file.stat().st_size <= LARGEST else None) or {}
    except (OSError, EntryNotFoundError, HfHubHTTPError, ValueError, yaml.YAMLError):
        return ()
    widget = card.get("widget")
    examples = [one for one in widget if isinstance(one, Mapping)] if isinstance(widget, list) else []
    return tuple(pair for one in examples[:MOST] for pair in _asked(one))


def _asked(example: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    messages = example.get("messages")
    turns = [m for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    said = [turn.get("content") for turn in turns if turn.get("role") == "user"]
    for text, chat in ((example.get("text"), False), (said[-1] if said else None, True)):
        if isinstance(text, str) and text.strip() and len(text) <= LONGEST:
            yield text, chat
