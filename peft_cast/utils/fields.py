"""Dataclass fields with bounds and help in their metadata, whose classes check their own values."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .secrets import HIDDEN


def option(
    default: Any,
    help: str,
    *,
    everyday: bool = False,
    decides: bool = True,
    least: float | None = None,
    above: float | None = None,
    check: Callable[[Any], str | None] | None = None,
) -> Any:
    """A field of one of the groups below.

    Args:
        default: Its default; `None` always passes, as "not given".
        help (`str`): What it means, in markdown; the first sentence alone is the help of the command line's flag.
        everyday (`bool`): Whether it has a flag of its own on the command line; all others go through `--set`.
        decides (`bool`): Whether the result depends on it, so that a resumed run must have the same and a card lists
            it.
        least, above (`float`, *optional*): The least value, or the value it must be above.
        check: Says what a value must be if it is something else, else `None`.
    """
    rules = {"help": help, "everyday": everyday, "decides": decides, "least": least, "above": above, "check": check}
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class Group:
    """What the groups share: they look at their own values when they are made."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_option(name, value, type(self))


@cache
def _alternatives(group: type) -> dict[str, tuple[Any, ...]]:
    """For each option of a group what its annotation lists, one by one."""
    import torch
    from transformers import PreTrainedTokenizerBase

    hints = get_type_hints(group, localns={"torch": torch, "PreTrainedTokenizerBase": PreTrainedTokenizerBase}).items()
    return {name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,) for name, hint in hints}


@cache
def kinds_of(group: type) -> dict[str, tuple[type, ...]]:
    """For each option of a group the classes that its annotation allows, without `None`."""
    found = {}
    for name, parts in _alternatives(group).items():
        flat = (type(get_args(part)[0]) if get_origin(part) is Literal else get_origin(part) or part for part in parts)
        found[name] = tuple(kind for kind in flat if kind not in (type(None), Any))
    return found


@cache
def words_of(group: type) -> dict[str, tuple[str, ...]]:
    """For each option of a group that takes one of a few words the words."""
    return {
        name: tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
        for name, parts in _alternatives(group).items()
    }


def check_option(name: str, value: Any, group: type[Group]) -> None:
    """Check a value against the rules of its field.

    Raises:
        ValueError: Naming the option, what it may be and what it was.
    """
    if value is None:
        return
    import torch

    rules, shown = group.__dataclass_fields__[name].metadata, repr(value)[:200]
    kinds = kinds_of(group)[name]  # type: ignore[arg-type]
    if rules["check"] is not None:
        if (must := rules["check"](value)) is not None:
            raise ValueError(f"`{name}` must {must}, got {shown}.")
    elif allowed := words_of(group).get(name, ()):  # type: ignore[arg-type]
        if value not in allowed:
            *others, last = map(repr, allowed)
            raise ValueError(f"`{name}` must be {', '.join(others)} or {last}, got {shown}.")
    elif kinds == (int,):
        check_count(name, value, rules["least"] or 0)
    elif kinds == (float,):
        check_number(name, value, rules["least"], rules["above"])
    elif kinds == (bool,) and not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shown}.")
    elif kinds == (Mapping,) and not isinstance(value, Mapping):
        raise ValueError(f"`{name}` must be a mapping, got {shown}.")
    elif str in kinds and torch.device not in kinds and not isinstance(value, (*kinds, os.PathLike)):
        from ..tuner.checks import with_article

        words = " or ".join("a string" if kind is str else with_article(kind.__name__) for kind in kinds)
        raise ValueError(f"`{name}` must be {words}, got {shown}.")


def check_count(name: str, value: Any, least: float = 0) -> None:
    """
    Raises:
        ValueError: If a value is no whole number, or below `least`. `None` passes.
    """
    if value is not None and not (is_a(value, Integral) and value >= least):
        kind = "" if is_a(value, Integral) else "a whole number, "
        raise ValueError(f"`{name}` must be {kind}at least {least:.0f}, got {repr(value)[:200]}.")


def check_number(name: str, value: Any, least: float | None = None, above: float | None = None) -> None:
    """
    Raises:
        ValueError: If a value is no finite number, below `least` or not above `above`. `None` passes.
    """
    if value is None:
        return
    bound = f"of at least {least:g}" if least is not None else f"above {above:g}"
    fits = is_a(value, Real) and (value >= least if least is not None else value > above)  # type: ignore[operator]
    if not fits or not isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"`{name}` must be a number {bound}, got {repr(value)[:200]}.")


def unknown(name: str, known: list[str]) -> str:
    """How a message about a name that is none of the known ones goes on: with the likely one, else with all."""
    likely = get_close_matches(name, known, n=1)
    return f"did you mean '{likely[0]}'?" if likely else f"choose from {', '.join(known)}."


def is_a(value: Any, kind: type) -> bool:
    """`isinstance`, but no `bool` is a number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def describe(value: Any) -> Any:
    """An argument in JSON: plain values as they are, others by what they are; lists of texts are counted, not
    quoted.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value if len(value) <= 300 else value[:300] + "…"
    import torch

    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    if dataclasses.is_dataclass(value):
        given = {one.name: describe(getattr(value, one.name)) for one in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **{name: item for name, item in given.items() if item is not None}}
    if isinstance(value, Mapping):
        return {str(k): HIDDEN if str(k).endswith("token") else describe(item) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, (str, int, float)) for item in value):
            return f"{len(value)} × {type(value[0]).__name__}"
        return [describe(item) for item in value] if len(value) <= 8 else f"{len(value)} × {type(value[0]).__name__}"
    return type(value).__name__
