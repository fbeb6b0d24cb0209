"""Changes for a while: what the contexts here change on models and on torch is put back exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..utils import distributed


@contextmanager
def untouched(*models: PreTrainedModel) -> Iterator[None]:
    """Freeze the models and put them in eval mode; afterwards restore every mode, requires_grad flag and setting."""
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    # Trainer writes into the configurations (use_cache, special tokens).
    settings = [(own, dict(vars(own))) for m in models for own in (m.config, m.generation_config) if own is not None]
    with in_eval_mode(*models):
        for model in models:
            model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, requires_grad in flags:
                parameter.requires_grad = requires_grad
            for current, before in settings:
                vars(current).clear()
                vars(current).update(before)


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Within the context the models have no dropout, and draw no random numbers for it."""
    # Of each module: the wrapper of a model in evaluation mode may be in training mode, as PEFT leaves it.
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context torch draws from the seed; the random state of before is put back after."""
    devices = list(range(torch.cuda.device_count()))
    if devices and distributed.world_size() > 1:  # the others' are none of this process's business
        devices = [torch.cuda.current_device()]
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def moved(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Within the context the model is on `device`; models spread over devices or quantized stay where they are."""
    home = model.device
    stays = home == device or getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    if not stays:
        model.to(device)
    try:
        yield
    finally:
        if not stays:
            model.to(home)
