"""What must not leave the machine with a report: access tokens, wherever they got into a name, setting or text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


SECRET = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{10,}|(?<=://)[^/\s@]+(?=@)")
HIDDEN = "[hidden]"
# Control characters and lone surrogates, which no text file or page can hold.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def redact(value: Any) -> Any:
    """A copy of a JSON-ready value without Hugging Face tokens, passwords in addresses, and characters that cannot be shown."""
    if isinstance(value, str):
        return UNPRINTABLE.sub("\ufffd", SECRET.sub(HIDDEN, value))
    if isinstance(value, Mapping):
        return {redact(key): redact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return value


def redact_pieces(pieces: Sequence[str]) -> list[str]:
    """The same for a text in pieces, where a token may run through several; their number stays."""
    whole = "".join(pieces)
    for secret in SECRET.findall(whole):
        whole = whole.replace(secret, "*" * len(secret))
    cut, start = [], 0
    for piece in pieces:
        cut.append(whole[start : start + len(piece)])
        start += len(piece)
    return cut
