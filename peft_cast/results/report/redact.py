"""What must not be in a report: secrets, wherever they got into a name, setting or text, and what no page can hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...utils import without_secrets


# Control characters and lone surrogates, which no text file or page can hold.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def redact(value: Any) -> Any:
    """A copy of a JSON-ready value without secrets (`without_secrets`) and characters that cannot be shown."""
    if isinstance(value, str):
        return UNPRINTABLE.sub("\ufffd", without_secrets(value))
    if isinstance(value, Mapping):
        return {redact(key): redact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item) for item in value]
    return value


def redact_pieces(pieces: Sequence[str]) -> list[str]:
    """The same for a text in pieces, where a token may run through several; their number and lengths stay."""
    whole = without_secrets("".join(pieces), same_length=True)
    cut, start = [], 0
    for piece in pieces:
        cut.append(whole[start : start + len(piece)])
        start += len(piece)
    return cut
