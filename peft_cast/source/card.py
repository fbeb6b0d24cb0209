"""What an adapter's own card says it is asked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import yaml
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.repocard import metadata_load

from ..utils import find_file


MOST, LONGEST, LARGEST = 8, 2000, 2**20  # examples that are taken, their characters, and the bytes of a card
TEMPLATES, FRAME, LEAST = 4, 500, 3  # that are taken, their characters at most, and at least beside the placeholder
DATASETS = 2
# Where the question goes, as `{question}`, `{user_input}` or `{row['instruction']}`.
_PLACE = re.compile(
    r"""\{(?:\w+\[["'])?(?:user_)?(?:instruction|input|question|prompt|text|query)(?:["']\])?\}""", re.I
)
# A string of a program, or what stands in backticks; one that is printed is no prompt. Bounded: a stranger wrote it.
_STRING = re.compile(
    r'''(?<![\w\\])(print\(\s*)?[fFuU]?(?:("""|\'\'\')((?:\\.|[^\\]){0,700}?)\2|(["'`])((?:\\.|[^\\\n]){0,700}?)\4)''',
    re.S,
)
_BLOCK = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*\1", re.M | re.S)
_ESCAPED = {"n": "\n", "t": "\t", "\n": ""}
_PROSE = ("", "text", "txt", "plaintext", "markdown", "md")  # languages of blocks that may be a template as they are
_CODE = re.compile(r"^[ \t]*(?:import \w|from [\w.]+ import|def \w|[\w.]+ = |[\w.]+\()", re.M)


@dataclass(frozen=True)
class Card:
    """What an adapter's card says of what it is asked; nothing of an adapter in memory.

    Args:
        examples: Those in its `widget`, in order, each with whether it is a user's turn of a chat.
        templates: Of prompts, quoted in its text, with `{text}` where the question goes.
        datasets: Those it was trained on by its front matter; local paths only from a folder here.
    """

    examples: tuple[tuple[str, bool], ...] = ()
    templates: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


def read_card(adapter: str | Path, revision: str | None = None) -> Card:
    """What the card of an adapter says of what it is asked.

    Args:
        adapter: Folder or hub id.
        revision (`str`, *optional*): Its hub revision.

    Returns:
        Empty where there is no card, or none that can be read: it is a hint, and no part of the adapter.
    """
    try:
        file = find_file(adapter, "README.md", revision)
        if file.stat().st_size > LARGEST:
            return Card()
        known, text = metadata_load(file) or {}, file.read_text(encoding="utf-8-sig")
    except (OSError, EntryNotFoundError, HfHubHTTPError, ValueError, yaml.YAMLError):
        return Card()
    widget, names = known.get("widget"), known.get("datasets")
    examples = [one for one in widget if isinstance(one, Mapping)] if isinstance(widget, list) else []
    names = [one for one in (names if isinstance(names, list) else [names]) if isinstance(one, str) and one.strip()]
    if not Path(adapter).is_dir():  # a stranger's card shall not have files of ours read
        names = [one for one in names if not os.path.exists(one)]
    return Card(
        tuple(pair for one in examples[:MOST] for pair in _asked(one)),
        tuple(dict.fromkeys(_templates(text)))[:TEMPLATES],
        tuple(dict.fromkeys(names))[:DATASETS],
    )


def _asked(example: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    messages = example.get("messages")
    turns = [m for m in messages if isinstance(m, Mapping)] if isinstance(messages, list) else []
    said = [turn.get("content") for turn in turns if turn.get("role") == "user"]
    for text, chat in ((example.get("text"), False), (said[-1] if said else None, True)):
        if isinstance(text, str) and text.strip() and len(text) <= LONGEST:
            yield text, chat


def _templates(card: str) -> Iterator[str]:
    """The strings and the blocks of a card that have one place for a question, with `{text}` there."""
    quoted, end = [""], 0
    for found in _STRING.finditer(card):
        string = "" if found[1] else found[3] or found[5] or ""
        if found[4] != "`" and not card[end : found.start()].strip(" \t\n\\"):  # strings in a row are one
            string = quoted.pop() + string
        quoted.append(string)
        end = found.end()
    for _, language, block in _BLOCK.findall(card):
        if language.lower() in _PROSE and not _CODE.search(block):
            quoted.append(dedent(block).strip("\n"))
    for one in quoted:
        one = re.sub(r"""\\([nt"'\n])""", lambda found: _ESCAPED.get(found[1], found[1]), one)
        frame = _PLACE.sub("{text}", one)
        besides = "".join(frame.replace("{text}", "").split())
        if one.count("{") == 1 and "{text}" in frame and len(frame) <= FRAME and len(besides) >= LEAST:
            yield frame
