"""Layers whose weights accelerate keeps elsewhere (in CPU memory or on disk) until they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import onload_layer
from torch import nn


def fetched(kernels: nn.Module) -> AbstractContextManager:
    """Bring offloaded projections for the time of the context: accelerate does that only for modules that are called."""
    offloaded = any(tensor.is_meta for tensor in (*kernels.parameters(), *kernels.buffers()))
    return onload_layer(kernels) if offloaded else nullcontext()


@contextmanager
def base_weights(layer: nn.Module, name: str, device_map: dict) -> Iterator[None]:
    """Bring the weights of a layer that gets an adapter, which is made where they are: never on the meta device.

    Args:
        layer: The base layer.
        name: Its name in the model.
        device_map: The model's `hf_device_map`, empty if it has none.

    Raises:
        ValueError: If the weights are on disk and accelerate's hook that fetches them was taken off, as
            `PeftModel.from_pretrained` does.
    """
    hook = getattr(layer, "_hf_hook", None)
    if not (isinstance(hook, AlignDevicesHook) and hook.offload):
        if "disk" in device_map.values() and any(parameter.is_meta for parameter in layer.parameters()):
            raise ValueError(
                f"The weights of '{name}' are on disk, where PeftModel cannot load an adapter: load the model with a `device_map` "
                "without 'disk', or call `get_peft_model(model, PeftConfig.from_pretrained(folder))` and then "
                "`set_peft_model_state_dict(peft_model, load_peft_weights(folder))`."
            )
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, torch.tensor([]))
