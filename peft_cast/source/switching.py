"""Adapters switched off and unmerged, so that what is left is the base model itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..models import without_advice


def disabling(model: PeftModel, originals: Mapping[nn.Parameter, torch.Tensor]):
    """`model.disable_adapter` that also has the base model's own weights back within the context."""
    disable = model.disable_adapter

    @contextmanager
    def disable_adapter() -> Iterator[None]:
        changed = {parameter: parameter.data for parameter in originals}
        with ExitStack() as stack:
            with without_advice():  # which is of trained biases, put back here
                stack.enter_context(disable())
            for parameter, value in originals.items():
                parameter.data = value
            try:
                yield
            finally:
                for parameter, value in changed.items():
                    parameter.data = value

    return disable_adapter


@contextmanager
def unmerged(model: PeftModel) -> Iterator[None]:
    """Within the context nothing is merged into the weights; what was is merged again after."""
    merged = [
        (layer, list(layer.merged_adapters))
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer) and layer.merged
    ]
    for layer, _ in merged:
        layer.unmerge()
    try:
        yield
    finally:
        for layer, names in merged:
            layer.merge(adapter_names=names)
