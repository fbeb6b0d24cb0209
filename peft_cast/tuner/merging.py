"""Merging CAST adapters into the weights of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from .quantized import is_packed


def check_foldable(layer: BaseTunerLayer, adapter_name: str) -> None:
    """
    Raises:
        ValueError: If the adapter has nonlinear projections or biases on this CAST layer.
    """
    if not layer.supports_lora_conversion(adapter_name):
        raise ValueError(
            f"The CAST adapter '{adapter_name}' has nonlinear projections or biases, so it is no change of the "
            "weights and cannot be merged or converted to a LoRA: use it unmerged, or translate again with "
            "`projection_type='factored'` and no `projection_bias`."
        )


def check_mergeable(layer: BaseTunerLayer, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
    """Raise what `merged_weight` would, without its cost unless `safe_merge` asks for it."""
    names = [name for name in adapter_names if name in layer.peft_cast_kernels]
    backend = layer.quantization_backend
    for name in names:
        check_foldable(layer, name)
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"The CAST adapter '{name}' cannot be merged into {backend.backend_name} layers, whose weights PEFT "
                "cannot quantize again: use it unmerged, or merge it into the unquantized model."
            )
        if is_packed(layer.get_base_layer()):
            raise ValueError(
                f"The CAST adapter '{name}' cannot be merged now, nor unmerged: bitsandbytes has reordered the 4-bit "
                "weights for inference on this CPU. Load the model anew and merge before it is first used."
            )
    if safe_merge and names:
        merged_weight(layer, names, safe_merge=True)


@torch.no_grad()
def merged_weight(
    layer: BaseTunerLayer, adapter_names: Sequence[str], *, safe_merge: bool = False, sign: int = 1
) -> torch.Tensor:
    """The (dequantized) base weight plus (or with `sign` -1 minus) the deltas of adapters that the layer has, in its
    dtype and shape; the layer is left alone.

    Raises:
        ValueError: If an adapter is no change of the weights, if the layer cannot be quantized again, or if
            `safe_merge` finds NaN or infinite values.
    """
    check_mergeable(layer, adapter_names)
    weight = layer.get_base_weight()
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for name in adapter_names:
        merged += sign * layer.get_delta_weight(name).to(merged.device)
        if safe_merge and not torch.isfinite(merged.to(weight.dtype)).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
    return merged.to(weight.dtype)
