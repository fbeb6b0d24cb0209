"""Arguments are looked at before anything is loaded: what is wrong with one takes no minutes to be said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import torch
from transformers import TrainingArguments

from .tuner import CastConfig


# The least that each may be; `None` passes where the function has a default of its own for it.
COUNTS = {
    "steps": 0, "on_policy_steps": 0, "batch_size": 1, "max_length": 2, "fit_samples": 1, "eval_samples": 1, "report_samples": 0, "seed": 0,
    "teacher_top_k": 0, "tokens": 1, "processes": 1, "weight_bits": 1, "samples": 1, "drift_samples": 1,
}  # fmt: skip
NUMBERS = {"alpha": 0, "beta": 0, "gamma": 0}
POSITIVE = ("learning_rate", "temperature", "ridge", "gain", "aligned")
MAPPINGS = ("module_map", "training_args")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check what can be checked without the models, of those arguments of `translate` and its like that are there.

    Raises:
        ValueError: Naming the argument, what it may be and what it was.
    """
    for name, value in arguments.items():
        if value is None:
            continue
        shown = repr(value)[:200]
        if name in COUNTS and not (_is(value, Integral) and value >= COUNTS[name]):
            kind = "" if _is(value, Integral) else "a whole number, "
            raise ValueError(f"`{name}` must be {kind}at least {COUNTS[name]}, got {shown}.")
        if name in NUMBERS and not (_is(value, Real) and value >= NUMBERS[name]):
            raise ValueError(f"`{name}` must be a number of at least {NUMBERS[name]}, got {shown}.")
        if name in POSITIVE and not (_is(value, Real) and value > 0):
            raise ValueError(f"`{name}` must be a number above 0, got {shown}.")
        if name in MAPPINGS and not isinstance(value, Mapping):
            raise ValueError(f"`{name}` must be a mapping, got {shown}.")
        if name == "dtype" and not (isinstance(value, torch.dtype) and value.is_floating_point):
            raise ValueError(f"`dtype` must be torch.float32, torch.bfloat16 or torch.float16, got {shown}.")
        if name == "teacher":
            target_share(value)
    _check_training_args(arguments.get("training_args") or {})
    _check_projections(arguments)


def target_share(teacher: str | float) -> float:
    """The share of the target's own prediction in the teacher: 0 for `"source"`, 1 for `"delta"`, or the number given.

    Raises:
        ValueError: If it is something else.
    """
    share = {"source": 0.0, "delta": 1.0}.get(teacher, teacher) if isinstance(teacher, str) else teacher
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"`teacher` must be 'source', 'delta' or a number from 0 to 1, got {teacher!r}.")
    return float(share)


def unknown(name: str, known: list[str]) -> str:
    """How a message about a name that is none of the known ones goes on: with the likely one, else with all."""
    likely = get_close_matches(name, known, n=1)
    return f"did you mean '{likely[0]}'?" if likely else f"choose from {', '.join(known)}."


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_training_args(given: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(TrainingArguments) if field.init]
    for name in given:
        if name not in known:
            likely = get_close_matches(str(name), known, n=1)
            hint = f": did you mean '{likely[0]}'?" if likely else "."
            raise ValueError(
                f"`training_args` has '{name}', which is no setting of transformers.TrainingArguments{hint}"
            )


def _check_projections(arguments: Mapping[str, Any]) -> None:
    shape = {name: value for name, value in arguments.items() if name.startswith("projection_") and value is not None}
    if shape:
        CastConfig(**{"projection_type": "factored" if "projection_sharing" in shape else "compact", **shape})
