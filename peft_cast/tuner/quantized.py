"""Quantized target modules, by PEFT's backends."""

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
    """PEFT's backend for a module that is no tuner layer, `None` if it is not quantized."""
    try:
        return resolve_quantization_backend(layer, **kwargs)
    except ValueError:  # torchao weights without a `TorchAoConfig`: nobody knows how to quantize them again
        return ForwardOnlyQuantizationBackend("torchao")


def is_supported(layer: nn.Module, **kwargs: Any) -> bool:
    """Whether CAST can adapt a module: `nn.Linear`, `Conv1D`, or a linear layer that PEFT knows as quantized."""
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    return getattr(quantization_backend(layer, **kwargs), "layer_type", None) == "linear"


def linear_size(layer: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a module that CAST can adapt, `None` for another."""
    if not is_supported(layer):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT's, about classes that it does not know
        return _get_in_out_features(layer)


def is_packed(layer: nn.Module) -> bool:
    """Whether the weights are in an order that only the forward pass can read.

    bitsandbytes brings 4-bit weights into such an order when a CPU with AVX-512 BF16 first infers with them, and
    cannot undo it (0.50): dequantizing gives nonsense.
    """
    return getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False)
