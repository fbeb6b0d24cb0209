"""Adapters that change nothing: never trained, scaled to nothing, or on parts that no text passes through."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import safe_open

from ..align import sees_or_hears
from ..tuner.checks import FLOATS, TensorInfo
from ..utils import find_file, read_adapter_config, read_weights_header
from .kinds import changes_weights, type_of


# Methods with which a module changes nothing as soon as one of its own tensors is zero.
_PRODUCTS = "ADALORA LOHA LOKR VERA OFT FOURIERFT RANDLORA C3A MISS WAVEFT HIRA".split()


def why_idle(adapter: str | Path | PeftModel) -> str | None:
    """`idle` of an adapter that may be none to translate: in a folder, on the hub or on its model."""
    if not isinstance(adapter, PeftModel):
        return idle_file(adapter, None, read_adapter_config(adapter), read_weights_header(adapter))
    if len(adapter.active_adapters) != 1:
        return None
    state = get_peft_model_state_dict(adapter, adapter_name=adapter.active_adapter, save_embedding_layers=False)
    return idle(adapter.active_peft_config, list(state), state.__getitem__)


def idle_file(
    adapter: str | Path, revision: str | None, config: PeftConfig, header: Mapping[str, TensorInfo]
) -> str | None:
    """`idle` of an adapter in a folder or on the hub; tensors are read one at a time."""
    if any(info.dtype not in FLOATS or 0 in info.shape for info in header.values()):
        return None  # is refused where it is loaded
    with safe_open(find_file(adapter, SAFETENSORS_WEIGHTS_NAME, revision), framework="pt") as tensors:
        return idle(config, list(header), tensors.get_tensor)


def idle(config: PeftConfig, names: Sequence[str], tensor: Callable[[str], torch.Tensor]) -> str | None:
    """Why an adapter changes nothing: what follows "it" in a sentence, without the stop; `None` if it does, or if
    that is only seen on its model.

    Args:
        config: Its configuration.
        names: Of its tensors.
        tensor: The tensor of a name.
    """
    if names and all(map(sees_or_hears, names)):
        return (
            "changes only parts that no text passes through (vision, audio): pass one that changes the language model"
        )
    plain = type(config) is LoraConfig and not config.use_dora and not changes_weights(config)
    if not (plain or type_of(config) in _PRODUCTS) or any("base_layer" in name for name in names):
        return None
    factors = _factors(config, names)
    if not factors or (plain and any(len(own) < 2 for own in factors.values())):
        return None
    counted = sum(len(tensors) for own in factors.values() for tensors in own.values())
    shared = sum(name.count(".") == 1 for name in names)
    what = "no linear layer" if counted + shared < len(names) else "nothing"
    alpha = next((name for name in ("lora_alpha", "alpha") if hasattr(config, name)), None)
    if alpha and not any((getattr(config, alpha), *(getattr(config, "alpha_pattern", None) or {}).values())):
        return f"changes {what}: its `{alpha}` is 0. Give it the one that it was trained with"
    zero: set[str] = set()
    for own in factors.values():
        empty = {part for part, tensors in own.items() if not any(tensor(name).float().any() for name in tensors)}
        if not empty:
            return None
        zero |= empty
    called = " or ".join(sorted(name.removeprefix("lora_") for name in zero))
    return f"changes {what}: all of its {called} is zero, as before training. Pass one that was trained"


def _factors(config: PeftConfig, names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """The tensors of each linear module by what they are there; what all modules share is left out."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) or "\0"
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        steps = name.split(".")
        at = next((number for number, step in enumerate(steps) if step.startswith(prefix)), 0)
        if at > 1 and (type(config) is not LoraConfig or steps[at] in ("lora_A", "lora_B")):
            found[".".join(steps[:at])][steps[at]].append(name)
    return found
