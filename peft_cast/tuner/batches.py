"""Batches whose examples use different adapters, as PEFT's `LoraModel` offers them at inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper


if TYPE_CHECKING:
    from .layer import CastLayer

BASE = "__base__"  # PEFT's name for an example without adapter


@contextmanager
def mixed_batch_hooks(tuner: BaseTuner, adapter_names: Sequence[str], num_beams: int | None) -> Iterator[None]:
    """While entered, every adapted layer gets `adapter_names` as an argument.

    Args:
        tuner (`CastModel`): The model.
        adapter_names (`list[str]`): The adapter of each example, `"__base__"` for none.
        num_beams (`int`, *optional*): Beam search repeats each example that often, except in an encoder.

    Raises:
        ValueError: In training mode, or if no layer has one of the adapters.
        TypeError: If a single name is given.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"`adapter_names` must be a list with one name for each example, got '{adapter_names}'.")
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call `model.eval()` first.")
    layers = [module for module in tuner.modules() if isinstance(module, tuner.tuner_layer_cls)]
    known = {name for layer in layers for name in layer.peft_cast_kernels}
    if unknown := set(adapter_names) - known - {BASE}:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}. This model has "
            f"{', '.join(sorted(known))}."
        )
    repeated = [name for name in adapter_names for _ in range(num_beams or 1)]
    encoder = tuner.model.get_encoder() if getattr(tuner.model.config, "is_encoder_decoder", False) else None
    in_encoder = set(encoder.modules()) if encoder is not None else set()
    handles = [
        module.register_forward_pre_hook(
            partial(_pass_names, names=list(adapter_names) if module in in_encoder else repeated), with_kwargs=True
        )
        for module in tuner.modules()
        if isinstance(module, (tuner.tuner_layer_cls, AuxiliaryTrainingWrapper))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_names(module: torch.nn.Module, args: tuple, kwargs: dict, names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": names}


def add_mixed_batch(layer: CastLayer, result: torch.Tensor, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
    """Add to each example's output what its adapter does.

    Args:
        layer (`CastLayer`): The layer.
        result (`torch.Tensor`): Output of the base layer, shape (batch, ..., out_T).
        x (`torch.Tensor`): Its input, shape (batch, ..., in_T).
        adapter_names (`list[str]`): As many as the batch has examples.

    Raises:
        ValueError: If adapters are merged, or the numbers differ.
    """
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if len(x) != len(adapter_names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively. OPT's MLP and routed experts flatten their inputs, which cannot "
            "be told apart then: leave such modules out of the adapters."
        )
    if layer.disable_adapters:
        return result
    result = result.clone()
    for name in dict.fromkeys(adapter_names):
        if name in layer.peft_cast_kernels:
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            result[rows] += layer.delta(x[rows], name).to(result.dtype)
    return result
