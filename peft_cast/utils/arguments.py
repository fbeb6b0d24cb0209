"""Which further `transformers.TrainingArguments` a refinement takes, told before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments

from ..tuner.checks import check_fields
from .fields import check_count, check_number, unknown


# Those that ask for models spread over the processes, which Trainer does not see.
SHARDING = ("fsdp", "fsdp_config", "deepspeed")
# Those that Trainer follows by the loss on a dataset for evaluation, of which there is none here.
_EVALUATING: dict[str, tuple[Any, ...]] = {
    "eval_strategy": ("steps", "epoch"),
    "save_strategy": ("best",),
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
    "load_best_model_at_end": (True,),
}


def check_training_args(given: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: If there is no such argument, or it has a value with which nothing is trained.
    """
    known = [one.name for one in fields(TrainingArguments) if one.init]
    for name in given:
        if name not in known:
            raise ValueError(f"transformers.TrainingArguments has no '{name}': {unknown(str(name), known)}")
    try:
        _check_values(given)
    except ValueError as error:
        raise ValueError(f"`training_args`: {error}") from None


def _check_values(given: Mapping[str, Any]) -> None:
    hints = get_type_hints(TrainingArguments)
    kinds = {name: get_args(hints[name]) or (hints[name],) for name in given if name not in SHARDING}
    for name, alternatives in kinds.items():
        for kind in alternatives:
            words = [str(one.value) for one in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []
            if words and given[name] not in words:
                raise ValueError(f"`{name}` cannot be {given[name]!r}: {unknown(str(given[name]), words)}")
    plain = {name for name, alternatives in kinds.items() if {*alternatives} <= {bool, int, float, type(None)}}
    check_fields(TrainingArguments, {name: given[name] for name in plain})
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
        check_count(name, given.get(name), 1)
    for what in ("logging", "save"):
        if given.get(f"{what}_strategy", "steps") == "steps":
            check_number(f"{what}_steps", given.get(f"{what}_steps"), above=0)
    for name, values in _EVALUATING.items():
        if given.get(name) in values:
            raise ValueError(f"`{name}` cannot be {given[name]!r}, for which Trainer evaluates: leave it out.")
