"""Checks of what an adapter folder says before any of it is used: the folder may come from a stranger, or be broken."""

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

import psutil
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
        raise ValueError(
            f"'{file}' has {file.stat().st_size} bytes, at most {MAX_CONFIG_BYTES} are read: it is no configuration."
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"'{file}' is nested too deeply: get it again.") from None
    except ValueError as error:
        raise ValueError(f"'{file}' is no JSON ({error}): get it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"'{file}' holds no object, but {shown(found)}: get it again.")
    return found


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
        if field.name not in values:
            continue
        value, hint = values[field.name], _hints(config_class)[field.name]
        number = hint in (int, float)
        if value is None and (not number or field.default is None):
            continue
        if "alpha" in field.name and hint is int:
            hint = float  # PEFT computes with any number
        if not _fits(value, hint):
            raise ValueError(f"`{field.name}` must be {_in_words(hint)}, got {shown(value)}.")
        if name := _odd_text(value):
            raise ValueError(
                f"`{field.name}` has a name that is too long or has control characters, {shown(name)}: rename it."
            )
        check_ranks(
            field.name, value, least=0 if field.default == 0 else 1, masks=config_class.__name__ == "AdaLoraConfig"
        )
    for name in values:
        if name in _REGEXES and isinstance(values[name], str):
            check_patterns([values[name]], f"`{name}`")
        elif name in _REGEXES_BEHIND and values[name]:
            check_patterns([values[name]] if isinstance(values[name], str) else values[name], f"`{name}`", behind=True)
        elif name.endswith("_pattern") and isinstance(values[name], dict):
            check_patterns(values[name], f"`{name}`", behind=True)


def check_ranks(name: str, value: Any, least: int = 1, masks: bool = False) -> None:
    """Check a field that holds a rank, or ranks or alphas by module; others are left alone.

    Args:
        name (`str`): The field.
        value: What it holds.
        least (`int`): The least rank: OFT says 0 for "unset".
        masks (`bool`): Whether ranks by module may be lists, as AdaLoRA keeps them.

    Raises:
        ValueError: If it is no sensible rank.
    """
    if name in ("r", "init_r", "target_r", "projection_size") and value is not None:
        check_number(f"`{name}`", value, least, MAX_RANK, whole=True)
    elif name == "rank_pattern" and isinstance(value, dict):
        for module, rank in value.items():
            if not (masks and isinstance(rank, list)):
                check_number(f"`{name}` of '{module[:80]}'", rank, 1, MAX_RANK, whole=True)
    elif name == "alpha_pattern" and isinstance(value, dict):
        for module, alpha in value.items():
            check_number(f"`{name}` of '{module[:80]}'", alpha)


@cache
def _hints(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of an annotated type. What PEFT checks itself (the words of a `Literal`) is not checked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return isinstance(value, tuple({type(argument) for argument in arguments}))
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**64
    if hint is type(None):
        return value is None
    if list in (hint, origin):
        fits = isinstance(value, (list, tuple, set, frozenset)) and len(value) <= MAX_ENTRIES
        return fits and all(_fits(item, argument) for argument in arguments for item in value)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if dict in (hint, origin):
        fits = isinstance(value, dict) and len(value) <= MAX_ENTRIES and all(isinstance(key, str) for key in value)
        return fits and (not arguments or all(_fits(item, arguments[1]) for item in value.values()))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return isinstance(value, (dict, hint))
    return isinstance(value, hint) if hint is str else True


def _in_words(hint: Any) -> str:
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(argument) for argument in arguments))
    if list in (hint, origin):
        inner = _in_words(arguments[0]).split(" ", 1)[-1] if arguments else ""
        return f"a list of {inner}s" if arguments else "a list"
    if dict in (hint, origin) or dataclasses.is_dataclass(hint):
        return "an object"
    return words.get(hint, "one of PEFT's values")


def _odd_text(value: Any) -> str | None:
    """A text in `value` (a text, list or object) that is no name of anything."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple, set, dict)) else ()
    limit = 100_000 if isinstance(value, str) else MAX_NAME  # a single text may be a long regular expression
    return next((t for t in texts if isinstance(t, str) and not is_name(t, limit)), None)


def is_name(text: Any, limit: int = MAX_NAME) -> bool:
    """Whether something can be the name of a module, model or tensor: a text without control characters, not endless."""
    return isinstance(text, str) and len(text) <= limit and not _CONTROL.search(text)


def shown(value: Any) -> str:
    """A value in a message, short."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integers of thousands of digits
        text = "a huge number"
    return text if len(text) <= 80 else f"{text[:80]}..."


def read_header(file: str | Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors in a safetensors file; none of them is read.

    The library checks that they are of known types, lie one behind the other and fill the file.

    Raises:
        ValueError: If the file is broken, or no safetensors file.
        OSError: If it cannot be opened.
    """
    file = Path(file)
    size = file.stat().st_size
    with file.open("rb") as start:
        declared = int.from_bytes(start.read(8), "little")
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
        raise ValueError(
            f"The tensor {shown(name)} holds NaN or infinite numbers, so the adapter is broken: get it again."
        )


def check_number(what: str, value: Any, least: float = -(2.0**64), most: float = 2.0**64, whole: bool = False) -> None:
    """
    Raises:
        ValueError: If `value` is no number from `least` to `most`, or not `whole`. NaN never is.
    """
    if not _fits(value, int if whole else float) or not least <= value <= most:
        kind = "a positive integer" if whole and least == 1 else "an integer" if whole else "a finite number"
        limit = f" up to {most}" if whole and most < 2**63 else ""
        raise ValueError(f"{what} must be {kind}{limit}, got {shown(value)}.")


def check_memory(numbers: int, what: str) -> None:
    """
    Raises:
        ValueError: If so many float32 numbers cannot fit into the memory that is free.
    """
    if 4 * numbers < 2**26:
        return  # asking the system takes longer than making it
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    if 4 * numbers > free:
        raise ValueError(
            f"{what} needs {4 * numbers / 2**30:,.0f} GiB and {free / 2**30:,.1f} are free: its configuration is broken, or made for "
            "a larger machine."
        )
