"""Weighted sums of CAST adapters: one adapter that carries the kernels of several, each with a scaled scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import nn

from .config import CastConfig, KernelSpec


if TYPE_CHECKING:
    from .model import CastModel


def combined_config(
    tuner: CastModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> CastConfig:
    """The configuration of the sum.

    Raises:
        ValueError: See `CastModel.add_weighted_adapter`.
    """
    if combination_type != "cat":
        raise ValueError(
            f"CAST adapters are added exactly, by `combination_type='cat'`, not by {combination_type!r}: for LoRA's other "
            "ways convert the adapters with `peft_cast.to_lora` and combine the LoRAs."
        )
    if missing := [name for name in adapters if name not in tuner.peft_config]:
        raise ValueError(f"Adapter {missing[0]} does not exist: this model has {', '.join(tuner.peft_config)}.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"Every adapter needs a weight, got {len(adapters)} adapters and {len(weights)} weights.")
    if adapter_name in tuner.peft_config:
        raise ValueError(f"Adapter with name '{adapter_name}' already exists: choose another or delete it.")
    configs = [tuner.peft_config[name] for name in adapters]
    if any(getattr(config, "modules_to_save", None) for config in configs):
        raise ValueError(
            "Adapters that train whole modules (`modules_to_save`) cannot be added: the sum would not have those modules."
        )
    types = {config.projection_type for config in configs}
    if len(types) > 1 and types & {"full", "compact"}:
        raise ValueError(
            f"The adapters have projections of the types {', '.join(sorted(types))}, which no single adapter can have: "
            "translate them with the same `projection_type`."
        )
    kernels: dict[str, list[KernelSpec]] = {}
    sizes = set()
    for name, layer in tuner.model.named_modules():
        for adapter, weight in zip(adapters, weights):
            if isinstance(layer, tuner.tuner_layer_cls) and adapter in layer.peft_cast_kernels:
                for kernel in layer.peft_cast_kernels[adapter]:
                    spec = replace(kernel.spec, scaling=weight * kernel.spec.scaling)
                    kernels.setdefault(name, []).append(spec)
                    sizes.add(0 if kernel.P_in.full else len(kernel.P_in.V))
    sources = {
        field: values.pop() if len(values) == 1 else None  # the sum of two sources has no one name
        for field in vars(configs[0])
        if field.startswith("source_") and (values := {getattr(config, field) for config in configs})
    }
    by_rank = all(config.projection_size is None for config in configs)
    return replace(
        configs[0],
        kernels=kernels,
        target_modules=set(kernels),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        r=max(spec.r for specs in kernels.values() for spec in specs),
        projection_type="mlp" if "mlp" in types else configs[0].projection_type,
        projection_size=None if by_rank else max(sizes),
        projection_bias=any(config.projection_bias for config in configs),
        projection_sharing=None,
        **sources,
    )


@torch.no_grad()
def fill_combined(tuner: CastModel, adapters: Sequence[str], adapter_name: str) -> None:
    """Copy the kernels and projections of the adapters into their sum, just added with `combined_config`."""
    for layer in tuner.model.modules():
        if not isinstance(layer, tuner.tuner_layer_cls) or adapter_name not in layer.peft_cast_kernels:
            continue
        with onload_layer(layer):
            placed = layer.peft_cast_kernels
            originals = [kernel for name in adapters if name in placed for kernel in placed[name]]
            placed[adapter_name].to(originals[0].A.device, max((k.A.dtype for k in originals), key=_bits))
            for copy, original in zip(placed[adapter_name], originals):
                copy.A.copy_(original.A)
                copy.B.copy_(original.B)
                _copy_padded(original.P_in, copy.P_in)
                _copy_padded(original.P_out, copy.P_out)


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _copy_padded(original: nn.Module, copy: nn.Module) -> None:
    """What the copy has beyond the original (a larger inner size, an MLP, a bias) becomes zero, which changes nothing."""
    values = dict(original.named_parameters())
    for name, parameter in copy.named_parameters():
        parameter.zero_()
        if name in values:
            parameter[tuple(slice(n) for n in values[name].shape)].copy_(values[name])
