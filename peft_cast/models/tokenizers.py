"""Tokenizers: the given one, the adapter's or the model's own, held against the model before that is loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..tuner.checks import read_json, shown, why_no_text
from ..utils import (
    as_path,
    find_file,
    holds_file,
    hub_parts,
    one_line,
    read_json_if_there,
    said_by,
    secrets_removed,
    why_no_name,
    why_not_on_hub,
    without_secrets,
)
from ..utils.faults import at_fault
from .loading import check_loaded, check_model, check_remote_code, read_model_config


_CONFIG = "tokenizer_config.json"
# What the names of a tokenizer's files begin with.
_FILES = ("tokenizer", "special_tokens", "added_tokens", "vocab")
# English of every letter, in which a tokenizer of text knows more than the half.
_PLAIN = "The quick brown fox jumps over the lazy dog."


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    model: PreTrainedModel | str | Path,
    which: str,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """The given tokenizer, or the one that lies beside the model.

    Args:
        tokenizer: A tokenizer, or a hub id or folder of one.
        model: Its model, loaded or to be loaded: the embeddings must have a row for each token.
        which (`str`): "source" or "target".
        revision (`str`, *optional*): Hub revision of the model.

    Raises:
        ValueError: If none is given and none can be found, or it does not fit the model.
        ValueError, OSError: As `check_model`.
    """
    tokenizer, argument, rows = as_path(tokenizer), f"{which}_tokenizer", _rows(model, which, revision)
    if tokenizer is not None and not isinstance(tokenizer, (str, Path, PreTrainedTokenizerBase)):
        raise ValueError(
            f"`{argument}` must be a tokenizer, or a folder or hub id of one, got {type(tokenizer).__name__}."
        )
    own, given = model.name_or_path if isinstance(model, nn.Module) else model, tokenizer is not None
    path = getattr(tokenizer, "name_or_path", tokenizer or own)
    shown, revision = without_secrets(path), revision if str(path) == str(own) else None
    named = f"`{argument}`" + f", '{shown}'," * bool(path)
    named = named if given or not path else f"The tokenizer of the {which} model ('{shown}')"
    try:
        found = _read(tokenizer or own, revision)
    except Exception as error:  # of files of strangers
        check_remote_code(error, f"The tokenizer of '{shown}'", argument)
        instead = f"pass {'another' if given else f'`{argument}=`'}. ({said_by(error)}.)"
        if isinstance(error, ImportError):
            why = f"{named} needs a package that is missing: install it, or {instead}"
        elif not Path(str(path)).is_dir() and (on_hub := why_not_on_hub(error, path, revision, _CONFIG)):
            why = f"{named} could not be read: {on_hub}"
        elif isinstance(error, OSError):
            none = (
                f"{named} holds no tokenizer" if given else f"No tokenizer was found for the {which} model ('{shown}')"
            )
            why = f"{none}: {instead}"
        else:
            again = _broken_file(path) or _wrong_setting(path, revision) or "get its files again"
            why = f"{named} cannot be read: {again}, or {instead}"
        raise ValueError(why) from error
    if (reason := _beyond(found, rows)) is not None:
        raise ValueError(
            f"{named} {reason}: pass one that belongs to the model as `{argument}`, or the model with more embeddings."
        )
    if not _knows_text(found):
        warnings.warn(f"{named} knows hardly a token of plain English text: if it should, pass another `{argument}`.")
    return found


def adapter_tokenizer(
    adapter: str | Path, model: PreTrainedModel | str | Path, revision: str | None = None, of_model: str | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer in an adapter's folder, which it was trained with; `None` if there is none that the model can
    read.

    Args:
        adapter: Folder or hub id.
        model: The source model, whose embeddings must have a row for each token.
        revision (`str`, *optional*): Hub revision of the adapter.
        of_model (`str`, *optional*): Hub revision of the model.
    """
    named = f"The tokenizer in the folder of the adapter '{without_secrets(adapter)}'"
    if not holds_file(adapter, _CONFIG, revision):
        parts = ("tokenizer.json", "tokenizer.model", "chat_template.jinja")
        if part := next((name for name in parts if holds_file(adapter, name, revision)), None):
            warnings.warn(
                f"The folder of the adapter '{without_secrets(adapter)}' holds {part} without {_CONFIG}: "
                "the source model's own tokenizer is used. Pass `source_tokenizer` if it was trained with another."
            )
        return None
    try:
        tokenizer = _read(adapter, revision)
    except Exception as error:  # of a folder of strangers: the source's own is there
        warnings.warn(f"{named} could not be loaded, the source model's own is used: {one_line(error)}")
        return None
    why = _beyond(tokenizer, _rows(model, "source", of_model))
    if why is None and not _knows_text(tokenizer):
        why = "knows hardly a token of plain English text"
    if why is not None:
        warnings.warn(
            f"{named} {why}: the source model's own is used. Pass the model with resized embeddings, or "
            "`source_tokenizer`."
        )
        return None
    return tokenizer


def render_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Mapping[str, Any]]], which: str
) -> list[str]:
    """Each chat in the tokenizer's chat template, up to where the model answers.

    Args:
        tokenizer: One with a chat template.
        chats: For each its messages, with `role` and `content`.
        which (`str`): Whose it is, "source" or "target".

    Raises:
        ValueError: If the template does not take them.
    """
    try:
        return tokenizer.apply_chat_template(list(chats), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a stranger's program
        raise ValueError(
            f"The chat template of the {which} tokenizer fails on a user's turn ({one_line(error)}): pass `prompts`, "
            f"`prefix` or `template`, or a tokenizer with another one as `{which}_tokenizer`."
        ) from error


def beginning_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer puts before a text by itself, such as `<bos>`; empty for one that puts nothing there."""
    text = tokenizer("a", add_special_tokens=False).input_ids
    ids = tokenizer("a").input_ids
    start = next((i for i in range(len(ids)) if ids[i : i + len(text)] == text), 0)
    return tokenizer.decode(ids[:start])


def _read(tokenizer: PreTrainedTokenizerBase | str | Path, revision: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer that is given, or lies in a folder or on the hub, `user/repo` or `user/repo/subfolder`."""
    if isinstance(tokenizer, (str, Path)):
        with secrets_removed():
            tokenizer = _load(tokenizer, revision)
    added = tokenizer.added_tokens_decoder
    if sum(number not in added for number in tokenizer.get_vocab().values()) < 2:
        raise ValueError("It has no vocabulary but its special tokens, so a file of it is missing.")
    if not isinstance(tokenizer.chat_template, (str, Mapping, type(None))):  # which would fail when it is used
        raise ValueError(f"Its `chat_template` is no text, but {shown(tokenizer.chat_template)}.")
    tokenizer(_PLAIN)  # one without a token for what it does not know may fail
    return tokenizer


def _load(name: str | Path, revision: str | None) -> PreTrainedTokenizerBase:
    if not str(name):
        raise FileNotFoundError("The model does not say where it comes from.")
    if (why := why_no_name(name)) is not None:
        raise FileNotFoundError(f"{why}.")
    if Path(name).is_file():
        raise FileNotFoundError(f"'{name}' is a file, pass the folder that it is in.")
    place, subfolder = (str(name), None) if Path(name).is_dir() else hub_parts(name)
    options = {"subfolder": subfolder or "", "revision": revision, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except ValueError as error:
        if "instantiate the backend tokenizer" not in str(error):
            raise
        why = "There is no tokenizer.json, and no other vocabulary that the installed packages can read."
        raise FileNotFoundError(why) from error


def _broken_file(folder: Any) -> str | None:
    """Which of a tokenizer's files in a folder cannot be read, and what to do."""
    for file in sorted(file for name in _FILES for file in Path(str(folder)).glob(f"{name}*.json")):
        if not isinstance(read_json_if_there(file), dict):
            return f"its {file.name} {why_no_text(file.read_bytes()) or 'is broken, get it again'}"
    return None


def _wrong_setting(name: Any, revision: str | None) -> str | None:
    """Which setting keeps a tokenizer in a folder or on the hub from being loaded, and what to do."""
    with suppress(Exception), TemporaryDirectory() as links:  # what was raised for the tokenizer itself says it
        file = find_file(name, _CONFIG, revision)
        for other in file.parent.iterdir():
            if other.name != _CONFIG:
                (Path(links) / other.name).symlink_to(other.resolve())

        def build(values: Mapping[str, Any]) -> None:
            (Path(links) / _CONFIG).write_text(json.dumps(values), encoding="utf-8")
            _read(links, None)

        found = at_fault(read_json(file), build)
        return f"correct {found} in its {_CONFIG}" if found else None
    return None


def _rows(model: PreTrainedModel | str | Path, which: str, revision: str | None) -> int | None:
    """How many tokens the model has an embedding for; `None` if its configuration does not say."""
    if isinstance(model, nn.Module):
        check_loaded(model, which)  # but not for an adapter, with which a PeftModel's own may come
        return model.get_input_embeddings().weight.shape[0]
    config = check_model(model, which, revision) or read_model_config(model, which, revision)
    return getattr(config.get_text_config(), "vocab_size", None)


def _beyond(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> str | None:
    """Why a model with so many embeddings cannot read what the tokenizer writes; `None` if it can.

    Tokens of other kinds of input may lie beyond the embeddings (Gemma 3's `<image_soft_token>`), and so may one for
    padding: no text has them.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    template, always = str(tokenizer.chat_template or ""), {tokenizer.eos_token_id, *tokenizer("").input_ids}
    beyond = {
        number: token
        for token, number in vocabulary.items()
        if rows is not None
        and number >= rows
        and (number not in added or not added[number].special or number in always or token in template)
    }
    if not beyond:
        return None
    most = max(beyond)
    return f"has tokens up to number {most} ('{beyond[most]}'), and the model has {rows} rows for them"


def _knows_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer(_PLAIN, add_special_tokens=False).input_ids
    unknown = {tokenizer.unk_token_id, *tokenizer.all_special_ids}
    return 2 * sum(number not in unknown for number in ids) > len(ids)
