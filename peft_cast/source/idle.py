"""Adapters that change nothing: never trained, or scaled to nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import safe_open

from ..tuner.checks import FLOATS, TensorInfo
from ..utils import find_file, read_adapter_config, read_weights_header
from .kinds import changes_weights


def why_idle(adapter: str | Path | PeftModel) -> str | None:
    """`idle` of an adapter that may be none to translate: in a folder, on the hub or on its model."""
    if not isinstance(adapter, PeftModel):
        return idle_file(adapter, None, read_adapter_config(adapter), read_weights_header(adapter))
    config = adapter.active_peft_config
    if type(config) is not LoraConfig or len(adapter.active_adapters) != 1:
        return None
    state = get_peft_model_state_dict(adapter, adapter_name=adapter.active_adapter, save_embedding_layers=False)
    return idle(config, list(state), state.__getitem__)


def idle_file(
    adapter: str | Path, revision: str | None, config: PeftConfig, header: Mapping[str, TensorInfo]
) -> str | None:
    """`idle` of an adapter in a folder or on the hub; tensors are read one at a time."""
    if any(info.dtype not in FLOATS or 0 in info.shape for info in header.values()):
        return None  # is refused where it is loaded
    with safe_open(find_file(adapter, SAFETENSORS_WEIGHTS_NAME, revision), framework="pt") as tensors:
        return idle(config, list(header), tensors.get_tensor)


def idle(config: PeftConfig, names: Sequence[str], tensor: Callable[[str], torch.Tensor]) -> str | None:
    """Why a LoRA changes nothing: what follows "it" in a sentence, without the stop; `None` if it does, or if that
    is only seen on its model.

    Args:
        config: Its configuration.
        names: Of its tensors.
        tensor: The tensor of a name.
    """
    halves = {half: [name for name in names if f"{half}." in f"{name}."] for half in (".lora_A", ".lora_B")}
    plain = type(config) is LoraConfig and not config.use_dora and not changes_weights(config)
    if not plain or not all(halves.values()) or any("base_layer" in name for name in names):
        return None
    what = "no linear layer" if sum(map(len, halves.values())) < len(names) else "nothing"
    if not any((config.lora_alpha, *config.alpha_pattern.values())):
        return f"changes {what}: its `lora_alpha` is 0. Give it the one that it was trained with"
    for half, own in halves.items():
        if not any(tensor(name).float().any() for name in own):
            return f"changes {what}: all of its {half[-1]} is zero, as before training. Pass one that was trained"
    return None
