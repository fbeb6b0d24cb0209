"""What values of options must be, where a type and a bound do not say it: `None` if they are that, else what."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from .fields import is_a


def depth_map(value: Any) -> str | None:
    if isinstance(value, Mapping):
        numbers = bool(value) and all(is_a(layer, Integral) for pair in value.items() for layer in pair)
    else:
        numbers = isinstance(value, str) and value in ("proportional", "similarity")
    return None if numbers else "be 'proportional', 'similarity' or a mapping of layer numbers, as `{0: 0, 1: 2}`"


def module_map(value: Any) -> str | None:
    names = isinstance(value, Mapping) and all(isinstance(name, str) for pair in value.items() for name in pair)
    return None if names else "be a mapping of module names, as `{fc1: up_proj}`"


def seed(value: Any) -> str | None:
    return None if is_a(value, Integral) and 0 <= value < 2**32 else "be a whole number from 0 to 2³² − 1"


def dtype(value: Any) -> str | None:
    import torch

    fits = isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize > 1  # float8 stores
    return None if fits else "be torch.float32, torch.bfloat16 or torch.float16"


def source_rank(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    share = isinstance(value, float) and 0 < value <= 1
    return None if whole or share else "be a whole number from 1 or a share of the energy from 0 to 1 (such as 0.9)"


def teacher(value: Any) -> str | None:
    named = (
        value in ("auto", "source", "shown", "delta")
        if isinstance(value, str)
        else is_a(value, Real) and 0 <= value <= 1
    )
    return None if named else "be 'auto', 'source', 'shown', 'delta' or a number from 0 to 1"
