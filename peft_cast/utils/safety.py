"""What comes from strangers is checked before it is used: adapters, bridges, model configurations.

The primitives are in `tuner/checks.py`; SECURITY.md says what is trusted and what is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import AdaLoraConfig, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

from ..tuner import CastConfig
from ..tuner.checks import FLOATS, TensorInfo, check_finite, is_name, read_header, shown
from ..tuner.quantized import linear_size
from .names import files_of, find_file
from .secrets import secrets_removed, without_secrets


MAX_LAYERS = 2048  # of a model that is built from a configuration in a file
_COUNTS = re.compile(r"(num|n)_(\w+_)?(layers?|experts?|blocks?|stages?)|depths?", re.IGNORECASE)
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def read_weights_header(adapter: str | Path, revision: str | None = None) -> dict[str, TensorInfo]:
    """Names, types and shapes of the tensors in an adapter's file.

    Raises:
        ValueError: If it has no safetensors file, or a broken one.
    """
    named = f"'{without_secrets(adapter)}'"
    try:
        with secrets_removed():
            return read_header(find_file(adapter, SAFETENSORS_WEIGHTS_NAME, revision))
    except LocalEntryNotFoundError as error:
        raise ValueError(f"The weights of the adapter {named} could not be reached: {error}") from error
    except EntryNotFoundError as error:
        raise ValueError(f"The adapter {named} {why_no_weights(adapter, revision)}.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"The weights of the adapter {named} could not be read: {one_line(error)}") from error


def why_no_weights(adapter: str | Path, revision: str | None = None) -> str:
    """Why an adapter has no weights that are read: what follows "it" in a sentence, without the stop."""
    link, files = Path(adapter, SAFETENSORS_WEIGHTS_NAME), files_of(adapter, revision)
    if link.is_symlink():
        return f"has a link as {SAFETENSORS_WEIGHTS_NAME}, to '{link.readlink()}', which is not there: get that file"
    if WEIGHTS_NAME in files:
        return (
            f"has only pickled weights ({WEIGHTS_NAME}), which are not read, because they can run code: convert them "
            "to safetensors (load the adapter with PEFT where you trust it, `save_pretrained` writes "
            f"{SAFETENSORS_WEIGHTS_NAME})"
        )
    weights = [name for name in files if name.endswith((".safetensors", ".bin", ".npz", ".gguf")) and "/" not in name]
    weights = [name for name in weights if name != SAFETENSORS_WEIGHTS_NAME]
    if any(re.search(r"-\d+-of-\d+\.", name) for name in weights):
        return (
            f"has its weights in parts ('{weights[0]}', ...), which PEFT does not load: put their "
            f"tensors into one {SAFETENSORS_WEIGHTS_NAME}"
        )
    if weights:
        return (
            f"has no {SAFETENSORS_WEIGHTS_NAME}, but '{weights[0]}', which PEFT does not load: convert it to PEFT's "
            "format with the tool that made it"
        )
    return f"has no {SAFETENSORS_WEIGHTS_NAME}: get the whole folder, or save the adapter again"


def check_weights(
    adapter: str | Path, config: PeftConfig, revision: str | None = None, model: nn.Module | None = None
) -> dict[str, TensorInfo]:
    """Check an adapter's file before PEFT loads it: its header against the configuration, and every number in it.

    Args:
        adapter: Folder or hub id.
        config: Its configuration, see `read_adapter_config`.
        revision: Its hub revision.
        model: The model it shall be loaded on, for which PEFT makes the adapter's tensors before it reads the file.

    Returns:
        The header.

    Raises:
        ValueError: Naming what is wrong.
    """
    header = read_weights_header(adapter, revision)
    try:
        if isinstance(config, CastConfig):
            config.check_weights(header)
        elif isinstance(config, LoraConfig):
            _check_lora(config, header, model)
        with safe_open(find_file(adapter, SAFETENSORS_WEIGHTS_NAME, revision), framework="pt") as tensors:
            for name in header:
                check_finite(name, tensors.get_tensor(name))
    except ValueError as error:
        raise ValueError(f"The adapter '{without_secrets(adapter)}' cannot be used. {error}") from None
    return header


def _check_lora(config: LoraConfig, header: Mapping[str, TensorInfo], model: nn.Module | None) -> None:
    for name, info in header.items():
        if ".lora_" in name and info.dtype not in FLOATS:
            raise ValueError(
                f"The tensor {shown(name)} is of type {info.dtype}, which holds no weights: get it again."
            )
    if model is None or isinstance(config, AdaLoraConfig):
        return
    replicated_layers(config)
    promised, held = _promised(config, model), sum(torch.Size(info.shape).numel() for info in header.values())
    if promised > 2 * held + 2**20:
        raise ValueError(
            f"Its configuration speaks of {promised:,} numbers, its file has {held:,}: the two do not belong "
            "together, download both again."
        )


def replicated_layers(config: PeftConfig) -> list[int]:
    """Which layer of the model each layer is made from, if the adapter replicates layers; else none.

    Raises:
        ValueError: If they are more than any model has.
    """
    ranges = getattr(config, "layer_replication", None) or ()
    depth = sum(stop - start for start, stop in ranges)
    if any(not 0 <= a < b <= MAX_LAYERS for a, b in ranges) or depth > MAX_LAYERS:
        raise ValueError(f"`layer_replication` must be made of ranges of layers, {MAX_LAYERS} in all.")
    return [layer for start, stop in ranges for layer in range(start, stop)]


def _promised(config: LoraConfig, model: nn.Module) -> int:
    """How many numbers PEFT would allocate for a LoRA on a model, about."""
    everything = config.target_modules == "all-linear" or (not config.target_modules and not config.target_parameters)
    parameters = tuple(config.target_parameters or ())
    total = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        size = linear_size(module) or (
            tuple(weight.shape) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None
        )
        if size is None:
            continue
        hit = everything or f"{name}.weight".endswith(parameters or "\0") or check_target_module_exists(config, name)
        if hit:
            total += config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r) * sum(size)
    return total


def check_model_config(values: Mapping[str, Any], where: str) -> None:
    """Check a model's configuration from a file, of which a model without weights shall be built.

    Raises:
        ValueError: If it needs code of its own, or has more layers than any model, which would take forever to build.
    """
    if not is_name(values.get("model_type")):
        raise ValueError(f"{where} has no `model_type`, so it is no model's: get it again.")
    for name in _SIZES:
        if isinstance(values.get(name), str):
            raise ValueError(f"`{name}` in {where} is {shown(values[name])}, a text: correct it.")
    for name, value in _numbers(values):
        if _COUNTS.fullmatch(name) and value > MAX_LAYERS:
            raise ValueError(f"`{name}` in {where} is {shown(value)}, at most {MAX_LAYERS} are built: correct it.")
        # Infinity is no size but the lack of a limit (Falcon-H1).
        if 2**40 <= abs(value) < math.inf or value < _least(name, values):
            raise ValueError(f"`{name}` in {where} is {shown(value)}, which is no size of any model: correct it.")


def _least(name: str, values: Mapping[str, Any]) -> float:
    """The least that a number in a configuration can be; those in other objects may be of parts that are not there."""
    if name in _SIZES and name in values:
        return 1
    return 0 if _COUNTS.fullmatch(name) else -math.inf


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Mapping):
                yield from _numbers(item)
            elif isinstance(item, (int, float)):
                yield name, item


def one_line(error: BaseException) -> str:
    """The first line of a message that says something. Errors from the depths (`AttributeError`) say nothing to a
    user; they stay the cause.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # PEFT lists every mismatched tensor below a heading; one is enough.
    line = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else lines[0]
    if line.endswith(":"):  # a heading of what the cause says, in words of Python if it is of a type
        if isinstance(error.__cause__, (OSError, ValueError)):
            return one_line(error.__cause__)
        line = line.rstrip(":")
    if isinstance(error, (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)) or not line:
        line = f"its settings do not make sense together, {type(error).__name__}"
    return line if line.endswith((".", "!", "?")) else f"{line}."
