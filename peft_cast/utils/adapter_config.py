"""An adapter's configuration in a folder or on the hub: read, its values checked, and held against its file's kind."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..tuner import CastConfig
from ..tuner.checks import check_fields, read_header, read_json, shown
from .names import files_of, find_file, hub_parts, why_no_folder, why_not_on_hub
from .safety import one_line
from .secrets import secrets_removed, without_secrets


# Settings with which PEFT would import a module that the file names.
_IMPORTS = ("megatron_config",)
_UNSET: tuple[Any, ...] = (None, False, "", [], {})  # values of settings that ask for nothing
_NUMBERS, _UNNAMED = ("r", "lora_alpha", "alpha", "scaling", "random_loc_seed"), "_peft_cast_unnamed"
# What the configurations of other tools' adapters have in a file of the same name.
_OTHER_TOOLS = {"fine_tune_type": "MLX", "lora_parameters": "MLX", "model_class": "AdapterHub", "swift_type": "swift"}


def _why_no_adapter(adapter: Any, revision: str | None) -> str | None:
    """What is wrong with what was passed as an adapter, if that can be seen in the folder; `None` if not."""
    if (why := why_no_folder(adapter, CONFIG_NAME, revision)) is not None:
        return why
    folder = Path(str(adapter))
    other = folder.is_dir() and not (folder / CONFIG_NAME).is_file()
    return f"'{folder}' {_held_instead(adapter, None)}" if other else None


def _held_instead(adapter: str | Path, revision: str | None) -> str:
    """What a folder or repository holds that has no adapter's configuration, and what to pass."""
    files = files_of(adapter, revision)
    if not files and not Path(adapter).is_dir() and hub_parts(adapter)[1]:
        repo_id, subfolder = hub_parts(adapter)
        places = [name.rpartition("/")[0] for name in files_of(repo_id, revision) if name.endswith(CONFIG_NAME)]
        named = [f"'{repo_id}/{place}'".replace("/'", "'") for place in places[:5]] or [f"a folder with {CONFIG_NAME}"]
        return f"is no folder of the repository '{repo_id}' on the Hub: pass {' or '.join(named)}"
    inner = [name.rpartition("/")[0] for name in files if name.endswith(f"/{CONFIG_NAME}")]
    if inner:
        more = f" and {len(inner) - 5} more" * (len(inner) > 5)
        return f"has its adapters in subfolders, {', '.join(inner[:5])}{more}: pass one, as '{adapter}/{inner[0]}'"
    kinds = {"bridge_config.json": "a bridge, not an adapter", "config.json": "a model, no adapter"}
    kind = next((kind for name, kind in kinds.items() if name in files), f"no {CONFIG_NAME}")
    return f"holds {kind}: pass a hub id or a folder with {CONFIG_NAME}"


def read_adapter_config(adapter: str | Path, revision: str | None = None) -> PeftConfig:
    """The configuration of an adapter on the hub or in a folder, its values checked.

    Raises:
        ValueError: If there is none, it cannot be read, or says something that no adapter needs.
    """
    if (why := _why_no_adapter(adapter, revision)) is not None:
        raise ValueError(without_secrets(f"The adapter could not be read: {why}."))
    try:
        with secrets_removed():
            file = find_file(adapter, CONFIG_NAME, revision)
            values = read_json(file)
            check_adapter_values(values)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # advice for training, and what is said next
                config = _config_of(values, file.parent)
            known = {"runtime_config", *type(config).__dataclass_fields__}
            if unknown := [name for name, value in values.items() if name not in known and value not in _UNSET]:
                names = ", ".join(f"`{shown(name)[1:-1]}`" for name in unknown[:5])
                warnings.warn(
                    f"The {CONFIG_NAME} of '{without_secrets(adapter)}' has settings that the installed PEFT does not "
                    f"know, {names}: they are passed over. Update PEFT, if the adapter needs them."
                )
            return config
    except MemoryError:
        raise
    except Exception as error:  # PEFT's configurations raise whatever their values lead to
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            why = f"it {_held_instead(adapter, revision)}."
        elif isinstance(error, (LocalEntryNotFoundError, HTTPError, HFValidationError)):
            why = why_not_on_hub(error, adapter, revision, CONFIG_NAME) or one_line(error)
        else:
            why = _of_a_lora(adapter, revision) or one_line(error)
        raise ValueError(without_secrets(f"The adapter '{adapter}' could not be read: {why}")) from error


def _of_a_lora(adapter: str | Path, revision: str | None) -> str | None:
    """What is wrong with a configuration of another kind that lies beside the weights of a LoRA."""
    with suppress(Exception):  # what was raised for the configuration itself says it
        file = find_file(adapter, CONFIG_NAME, revision)
        kind, found = read_json(file)["peft_type"], read_header(file.with_name(SAFETENSORS_WEIGHTS_NAME))
        if (other := other_kind(kind, found)) is not None and other[0] == "LoRA":
            return f"`peft_type` is {shown(kind)}, and the file is a LoRA's: correct it in {CONFIG_NAME}."
    return None


def other_kind(kind: Any, names: Iterable[str]) -> tuple[str, str] | None:
    """Of which other kind of adapter a file is by the names of its tensors, and one of them; `None` if it can be of
    the kind that its configuration says.
    """
    own = PEFT_TYPE_TO_PREFIX_MAPPING.get(kind)
    steps = {step: key for key in names for step in key.split(".")}
    if own == "lora_":  # AdaLoRA's too, which alone has an E
        e = next((step for step in steps if step.startswith("lora_E")), None)
        if kind == "ADALORA" and e is None and "lora_A" in steps:
            return "LoRA", steps["lora_A"]
        if kind == "LORA" and e is not None:
            return "ADALORA", steps[e]
    if own is not None and any(step.startswith(own) for step in steps):
        return None
    for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        for step, key in steps.items():
            if step.startswith(prefix):
                return "LoRA" if prefix == "lora_" else str(getattr(other, "value", other)), key
    return None


def unnamed(config: PeftConfig) -> tuple[str, ...]:
    """Of the numbers that an adapter computes with those that its file does not name, for which PEFT's defaults
    stand.
    """
    return getattr(config, _UNNAMED, ())


def _config_of(values: dict[str, Any], folder: Path) -> PeftConfig:
    """PEFT's configuration from checked values, with what its file does not say noted on it."""
    config = _complete(values, folder)
    if not isinstance(config, CastConfig):  # whose kernels say it
        setattr(config, _UNNAMED, tuple(name for name in _NUMBERS if hasattr(config, name) and name not in values))
    return config


def _complete(values: dict[str, Any], folder: Path) -> PeftConfig:
    """PEFT's configuration with what others leave out of it and no adapter in use needs."""
    set_after: dict[str, Any] = {}
    if values["peft_type"] == "ADALORA" and not values.get("total_step"):
        # The length of its training, which PEFT asks for and an adapter that is trained no more does not have.
        values = {**values, "total_step": 1}
    elif values.get("init_lora_weights") == "loftq":  # with which PEFT asks for settings and a package to start with
        set_after = {name: values[name] for name in ("init_lora_weights", "loftq_config") if name in values}
    else:
        return PeftConfig.from_pretrained(str(folder))
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]]
    known = kind.__dataclass_fields__.keys() & values.keys() - set_after.keys()
    config = kind(**{name: values[name] for name in known})
    for name, value in set_after.items():
        setattr(config, name, value)
    return config


def check_adapter_values(values: Mapping[str, Any]) -> None:
    """Check what `adapter_config.json` says, by the types that PEFT gives its settings.

    Raises:
        ValueError: Naming the first field that is wrong.
    """
    kind = values.get("peft_type")
    if kind is None:
        tool = next((tool for name, tool in _OTHER_TOOLS.items() if name in values), "another tool")
        raise ValueError(
            f"its {CONFIG_NAME} has no `peft_type`, so it is of {tool}, not of PEFT: convert it to PEFT's format with "
            "the tool that made it."
        )
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"`peft_type` must be one of PEFT's, got {shown(kind)}: update PEFT, or correct the file.")
    if odd := {"self", "cls"} & values.keys():
        raise ValueError(f"'{odd.pop()}' is no setting: delete it.")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    own = "lora" if issubclass(config_class, LoraConfig) else kind.lower()
    if hasattr(config_class, "bias") and not _is_bias(values.get("bias", "none"), own):
        raise ValueError(
            f"`bias` must be 'none', 'all' or '{own}_only', got {shown(values['bias'])}: correct {CONFIG_NAME}."
        )
    check_fields(config_class, values)
    task = values.get("task_type")
    if task is not None and task not in list(TaskType):
        raise ValueError(
            f"`task_type` must be CAUSAL_LM, another of PEFT's task types or null, got {shown(task)}: correct "
            f"{CONFIG_NAME}."
        )
    for name, value in values.items():
        if name.endswith("dropout") and hasattr(config_class, name) and value is not None and not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be a number from 0 to 1, got {shown(value)}: correct {CONFIG_NAME}.")
    for name in _IMPORTS:
        if values.get(name):
            raise ValueError(
                f"`{name}` makes PEFT import a module that the file names: set it to null in {CONFIG_NAME}."
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if name in values and values[name] is None and config_class is LoraConfig:
            raise ValueError(f"`{name}` must be an object, got null: write {{}} in {CONFIG_NAME}.")


def _is_bias(value: Any, own: str) -> bool:
    """Whether a value of `bias` is one that PEFT means; it takes all that end in `_only` for the kind's own, which are
    called by the first letters of the kind ('fourier_only' of FOURIERFT) or as LoRA's.
    """
    stem = str(value).removesuffix("_only").lower()
    return value in ("none", "all") or (f"{stem}_only" == str(value).lower() and own.startswith(stem or "\0"))
