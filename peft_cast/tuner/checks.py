"""Checks of an adapter folder before any of it is used: it may come from a stranger, or be broken."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .patterns import check_patterns


MAX_CONFIG_BYTES = 10 * 2**20
MAX_HEADER_BYTES = 32 * 2**20
MAX_NAME = 1024  # characters of a module, tensor, model or revision
MAX_ENTRIES = 50_000  # of a list or object in a configuration
MAX_WIDTH = 2**24  # of a module
MAX_RANK = 2**16
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Fields that PEFT takes for regular expressions: strings alone, or behind a `.*` of its own.
_REGEXES = ("target_modules", "exclude_modules", "feedforward_modules")
_REGEXES_BEHIND = ("layers_pattern", "modules_to_save")
# Of these PEFT takes more words than it annotates: see source/kinds.py, and masks of people's own.
_OPEN = ("init_lora_weights", "mask_type")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class TensorInfo(NamedTuple):
    """What the header of a safetensors file says of a tensor: the dtype as it is called there, and the shape."""

    dtype: str
    shape: tuple[int, ...]


def read_json(file: str | Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size, with finite numbers.

    Raises:
        ValueError: If it is something else.
        OSError: If the file cannot be read.
    """
    file = Path(file)
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"'{file}' has {file.stat().st_size} bytes, over {MAX_CONFIG_BYTES}: it is no configuration.")
    data = file.read_bytes()
    if (why := why_no_text(data)) is not None:
        raise ValueError(f"'{file}' {why}.")
    try:
        found = json.loads(data, parse_constant=_no_constant)
    except (RecursionError, ValueError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is no JSON ({error})"
        raise ValueError(f"'{file}' {reason}: get it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"'{file}' holds no object, but {shown(found)}: get it again.")
    return found


def why_no_text(data: bytes) -> str | None:
    """Why the bytes of a file are no text as PEFT and transformers read it, and what to do: what follows the file's
    name in a sentence, without the stop; `None` if they are.
    """
    if not data.strip():
        return "is empty: get it again"
    try:
        text = data.decode("utf-8")
        plain = not text.startswith("\ufeff") and "\0" not in text[:4]  # UTF-16 has one in every letter
    except UnicodeDecodeError:
        plain = False
    return _instead(data) or (None if plain else "is no plain UTF-8: save it as UTF-8 without a byte order mark")


def why_pointer(start: bytes) -> str | None:
    """That a file is a pointer to it, by its first bytes, in the same way."""
    is_one = start.startswith(b"version https://git-lfs")
    return "is a pointer of Git LFS, not the file itself: run `git lfs pull`, or download it" if is_one else None


def _instead(start: bytes) -> str | None:
    """What a file is instead of itself, by its first bytes, in the same way."""
    if (why := why_pointer(start)) is not None:
        return why
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file itself: download the file, as with `hf download`"
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def check_fields(config_class: type, values: Mapping[str, Any]) -> None:
    """Check the values of a PEFT configuration against the types of its fields, and that they are of sensible size.

    Args:
        config_class: A dataclass; unknown names in `values` are left to PEFT, which ignores them.
        values: By field name; sets and tuples may stand for lists.

    Raises:
        ValueError: Naming the first field that is wrong.
    """
    for field in dataclasses.fields(config_class):
        name = field.name
        if name not in values:
            continue
        value, hint = values[name], _hints(config_class)[name]
        if value is None and (hint not in (int, float) or field.default is None):
            continue
        if "alpha" in name and hint is int:
            hint = float  # PEFT computes with any number
        if not _fits(value, str if name in _OPEN and isinstance(value, str) else hint):
            raise ValueError(f"`{name}` must be {_in_words(hint)}, got {shown(value)}.")
        texts = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple, set, dict)) else ()
        limit = 100_000 if isinstance(value, str) else MAX_NAME  # a single text may be a long regular expression
        if odd := [text for text in texts if isinstance(text, str) and not is_name(text, limit)]:
            raise ValueError(
                f"`{name}` has a name that is too long or has control characters, {shown(odd[0])}: rename it."
            )
        if name in ("r", "init_r", "target_r", "projection_size"):  # OFT says 0 for "unset"
            check_number(f"`{name}`", value, 0 if field.default == 0 else 1, MAX_RANK, whole=True)
        elif name in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
            for module, number in value.items():
                if name == "alpha_pattern":
                    check_number(f"`{name}` of '{module[:80]}'", number)
                elif not (isinstance(number, list) and config_class.__name__ == "AdaLoraConfig"):  # it keeps masks
                    check_number(f"`{name}` of '{module[:80]}'", number, 1, MAX_RANK, whole=True)
    for name, value in values.items():
        if name in _REGEXES and isinstance(value, str):
            check_patterns([value], f"`{name}`")
        elif (name in _REGEXES_BEHIND and value) or (name.endswith("_pattern") and isinstance(value, dict)):
            check_patterns([value] if isinstance(value, str) else value, f"`{name}`", behind=True)


_hints = cache(typing.get_type_hints)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of an annotated type."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and abs(value) < 2**64
    if origin is list:
        fits = isinstance(value, (list, tuple, set, frozenset)) and len(value) <= MAX_ENTRIES
        return fits and all(_fits(item, argument) for argument in arguments for item in value)
    if origin is tuple and arguments:
        return isinstance(value, (list, tuple)) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is dict:
        fits = isinstance(value, dict) and len(value) <= MAX_ENTRIES and all(isinstance(key, str) for key in value)
        return fits and (not arguments or all(_fits(item, arguments[1]) for item in value.values()))
    return not (isinstance(hint, type) and dataclasses.is_dataclass(hint)) or isinstance(value, (dict, hint))


def _in_words(hint: Any) -> str:
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", type(None): "null"}
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, arguments)))
    if origin is Literal:
        *others, last = map(repr, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if origin is list:
        return f"a list of {_many(_in_words(arguments[0]))}" if arguments else "a list"
    if origin is tuple and len(set(arguments)) == 1:
        return f"a list of {len(arguments)} {_many(_in_words(arguments[0]))}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "an object"
    return words.get(hint, "one of PEFT's values")


def _many(words: str) -> str:
    """The plural: "integers" of "an integer", "lists of texts" of "a list of texts"."""
    first, of, rest = words.partition(" ")[2].partition("of ")
    return f"{first.rstrip()}s {of}{rest}".strip() if first else rest


def is_name(text: Any, limit: int = MAX_NAME) -> bool:
    """Whether something can be the name of a module, model or tensor: a short text without control characters."""
    return isinstance(text, str) and len(text) <= limit and not _CONTROL.search(text)


def shown(value: Any) -> str:
    """A value in a message, short."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integers of thousands of digits
        text = "a huge number"
    return text if len(text) <= 80 else f"{text[:80]}..."


def with_article(noun: str) -> str:
    """`"an int"`, `"a Linear"`"""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def number_of(count: int, noun: str) -> str:
    """`"1 tensor"`, `"2 tensors"`"""
    return f"{count} {noun}{'s' * (count != 1)}"


def read_header(file: str | Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors in a safetensors file; none of them is read.

    The library checks that they are of known types, lie one behind the other and fill the file.

    Raises:
        ValueError: If the file is broken, or no safetensors file.
        OSError: If it cannot be opened.
    """
    file = Path(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(100)
    if (why := _instead(start)) is not None:
        raise ValueError(f"'{file}' {why}.")
    declared = int.from_bytes(start[:8], "little")
    if size < 8 or declared > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"'{file}' is no safetensors file, or cut off: its header has {declared} of {size} bytes: get it again."
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}
            header = {name: TensorInfo(str(s.get_dtype()), tuple(s.get_shape())) for name, s in parts.items()}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ValueError(f"'{file}' is broken ({error}): get it again.") from None
    for name in header:
        if not is_name(name):
            raise ValueError(f"'{file}' has a tensor whose name is too long or has control characters: {shown(name)}.")
    return header


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """
    Raises:
        ValueError: If a tensor holds NaN or infinite numbers.
    """
    if not tensor.is_floating_point() or tensor.is_meta:
        return
    tensor = tensor.float() if tensor.itemsize == 1 else tensor
    # A sum is quick, and NaN or infinite if one of them is; that of finite numbers can overflow.
    if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ValueError(f"The tensor {shown(name)} holds NaN or infinite numbers, it is broken: get it again.")


def check_number(what: str, value: Any, least: float = -(2.0**64), most: float = 2.0**64, whole: bool = False) -> None:
    """
    Raises:
        ValueError: If `value` is no number from `least` to `most`, or not `whole`. NaN never is.
    """
    if not _fits(value, int if whole else float) or not least <= value <= most:
        kind = "a positive integer" if whole and least == 1 else "an integer" if whole else "a finite number"
        limit = f" up to {most}" if whole and most < 2**63 else ""
        raise ValueError(f"{what} must be {kind}{limit}, got {shown(value)}.")
