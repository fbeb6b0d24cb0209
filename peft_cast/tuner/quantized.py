"""Quantised target modules, by PEFT's backends."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import nn
from transformers.pytorch_utils import Conv1D


def quantization_backend(layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """PEFT's backend for a module's way of quantisation, `None` when it is not quantised.

    Args:
        layer: The module itself, no tuner layer.
        kwargs: As `peft.utils.quantization_utils.get_quantization_kwargs` gives them.
    """
    try:
        return resolve_quantization_backend(layer, **kwargs)
    except ValueError:
        # torchao weights that were quantised without a `TorchAoConfig`: nobody knows how to quantise them again.
        return ForwardOnlyQuantizationBackend("torchao")


def is_supported(layer: nn.Module, **kwargs: Any) -> bool:
    """Whether CAST can adapt a module: `nn.Linear`, `Conv1D`, or a linear layer that PEFT knows as quantised."""
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    backend = quantization_backend(layer, **kwargs)
    return backend is not None and backend.layer_type == "linear"


def linear_size(layer: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a module that CAST can adapt, `None` for another."""
    if not is_supported(layer):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, about classes that it does not know
        return _get_in_out_features(layer)


def check_supported(layer: nn.Module, name: str, **kwargs: Any) -> None:
    """
    Raises:
        ValueError: If CAST cannot adapt the module called `name`.
    """
    if not is_supported(layer, **kwargs):
        raise ValueError(
            f"CAST cannot adapt '{name}', a {type(layer).__module__}.{type(layer).__name__}: only nn.Linear, transformers' "
            "Conv1D and linear layers quantised by a package that PEFT finds installed (bitsandbytes, torchao, hqq, "
            "gptqmodel, ...). Leave it out with `exclude_modules`, or install the package that quantised the model."
        )


def is_packed(layer: nn.Module) -> bool:
    """Whether the weights are in an order that only the forward pass can read.

    bitsandbytes brings 4-bit weights into such an order when a CPU with AVX-512 BF16 first infers with them, and cannot
    undo it (0.50): dequantising gives nonsense.
    """
    return getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False)
