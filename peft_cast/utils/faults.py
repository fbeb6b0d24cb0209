"""Which setting of a configuration keeps something from being built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from peft.utils import CONFIG_NAME
from transformers import CONFIG_MAPPING, PretrainedConfig

from ..tuner.checks import is_name, shown, why_no_text
from .names import files_of, find_file, why_not_on_hub
from .safety import check_model_config, one_line


# How the sentences of checks end that say what to do.
WITH_REMEDY = (
    "get it again.",
    "fit it anew.",
    "correct it.",
    "rename it.",
    "download it.",
    "download`.",
    "order mark.",
)
_SHORT = 80  # characters of an object in a configuration that a message can show whole


class FaultError(ValueError):
    """A configuration of which nothing can be built; the message ends in the settings at fault."""


def explained(
    error: Exception, file: str, values: Mapping[str, Any], build: Callable[[dict[str, Any]], Any]
) -> str | None:
    """What is wrong with a configuration, in words without a stop; `None` where no one setting is at fault.

    Args:
        error: What building it raised; of errors from the depths the type is all that is said.
        file (`str`): What the configuration is called.
        values: All of its settings.
        build: Builds it of settings, without weights, or raises whatever they lead to.
    """
    found = None if isinstance(error, ImportError) else at_fault(values, build)
    return f"{file} cannot be used ({said_by(error)}): correct {found} in it" if found else None


def why_unread(model: str | Path, error: Exception, revision: str | None = None) -> str:
    """Why the configuration of a model in a folder or on the hub could not be read, in sentences that end with the
    remedy.
    """
    file, values = "its config.json", {}
    if not isinstance(error, OSError):  # it was read, and says what cannot be
        values, _ = PretrainedConfig.get_config_dict(model, revision=revision)
        if not isinstance(values, dict):
            return f"{file} is no model's: get it again."
        if "model_type" in values and not is_name(values["model_type"]):
            return f"`model_type` in {file} is {shown(values['model_type'])}, no type's name: correct it."
        # transformers takes a repository without the file for one with an empty file.
        if not values and not Path(model).is_dir():
            held = "an adapter, not a model" if CONFIG_NAME in files_of(model, revision) else "no config.json"
            return f"it holds {held}: pass a hub id or a folder with config.json."
        if (kind := values.get("model_type")) is None:
            return f"{file} has no `model_type`, so it is no model's: get it again."
        known = f"transformers {transformers.__version__} does not know"
        if kind not in CONFIG_MAPPING:
            return f"{known} its `model_type`, {shown(kind)}: update transformers, or correct it."
        kinds = {part: inner.get("model_type", kind) for part, inner in values.items() if isinstance(inner, Mapping)}
        odd = next((part for part, one in kinds.items() if not is_name(one) or one not in CONFIG_MAPPING), None)
        if odd and "model type" in str(error):  # others are not looked at
            return f"{known} the `model_type` of its `{odd}`, {shown(kinds[odd])}: update transformers, or correct it."
        try:
            check_model_config(values, file)
        except ValueError as found:
            return str(found)
    if why := explained(error, file, values, lambda v: CONFIG_MAPPING[v["model_type"]].from_dict(v).to_dict()):
        return f"{why}."
    if not Path(model).is_dir() and (why := why_not_on_hub(error, model, revision, "config.json")):
        return why
    said = one_line(error)
    if "valid JSON" in said:
        why = why_no_text(find_file(model, "config.json", revision).read_bytes())
        return f"{file} {why}." if why else f"{said} Correct it, or get it again."
    if said.endswith(WITH_REMEDY):
        return said
    return f"{said} Pass a hub id or a folder with config.json."


def said_by(error: Exception) -> str:
    """What an error says, in words without a stop; of one from the depths its type."""
    return one_line(error).rstrip(".").removeprefix("its settings do not make sense together, ")


def at_fault(values: Mapping[str, Any], build: Callable[[dict[str, Any]], Any]) -> str | None:
    """The settings each of which alone keeps something from being built, as "`hidden_act` ('foo')"; `None` if no one
    does. A long object among them is looked through for its own.
    """
    if _builds(dict(values), build):
        return None
    found = [name for name in values if _builds({k: v for k, v in values.items() if k != name}, build)]
    if len(found) == 1 and isinstance(inner := values[found[0]], Mapping) and len(str(inner)) > _SHORT:
        own = at_fault(inner, lambda own: build({**values, found[0]: own}))
        return f"{own} of `{found[0]}`" if own else f"`{found[0]}`"
    return " or ".join(f"`{name}` ({shown(values[name])})" for name in found[:3]) or None


def _builds(values: dict[str, Any], build: Callable[[dict[str, Any]], Any]) -> bool:
    try:
        build(values)
    except Exception:  # that of the setting at fault, or of one that cannot be left out
        return False
    return True
