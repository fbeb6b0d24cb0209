"""Secrets stay secret: access tokens in whatever is shown, raised or written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


HIDDEN = "***"
_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}")
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


def without_secrets(text: Any, same_length: bool = False) -> str:
    """A text in which access tokens and the user part of URLs are replaced by `***`.

    Tokens are known by their form (`hf_` or `api_org_` and at least 20 letters or digits; a token has 34, a name like
    `hf_transformers` fewer) and, whatever they look like, from the variables that hold them.

    Args:
        text: Anything; its `str` is taken.
        same_length (`bool`): One star for each character instead.
    """

    def hidden(secret: str) -> str:
        return "*" * len(secret) if same_length else HIDDEN

    text = str(text)
    for pattern in (_TOKEN, _IN_URL):
        text = pattern.sub(lambda found: hidden(found[0]), text)
    for secret in filter(None, (os.environ.get(name) for name in _TOKEN_VARIABLES)):
        text = text.replace(secret, hidden(secret)) if len(secret) >= 8 else text
    return text


@contextmanager
def secrets_removed() -> Iterator[None]:
    """Within the context errors leave without secrets, in their causes too."""
    try:
        yield
    except (OSError, ValueError) as error:
        clean = without_secrets(error)
        if clean == str(error) and without_secrets(error.__cause__) == str(error.__cause__):
            raise
        raise (OSError if isinstance(error, OSError) else ValueError)(clean) from None
