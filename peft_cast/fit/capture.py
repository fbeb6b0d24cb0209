"""Module inputs and output gradients of one pass, at chosen positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


@dataclass
class Captured:
    """What the modules saw in the last pass, each (rows, length, width).

    `inputs` are module inputs, `gradients` the derivative of the loss with respect to module outputs.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def capture(model: PreTrainedModel, names: Iterable[str]) -> Iterator[Captured]:
    """Record the inputs and output gradients of the named modules; all hooks are removed afterwards."""
    captured = Captured()
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def forward_hook(_, args, output):
            captured.inputs[name] = args[0].detach()
            if output.requires_grad:
                output.register_hook(lambda gradient: captured.gradients.__setitem__(name, gradient.detach()))

        handles.append(module.register_forward_hook(forward_hook))

    for name in names:
        watch(name, model.get_submodule(name))
    # Nothing in a frozen model requires gradients, so the embeddings start the graph.
    handles.append(
        model.get_input_embeddings().register_forward_hook(lambda _, args, output: output.requires_grad_(True))
    )
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of −log p(next token) in nats over the text.

    A sum, not a mean: two tokenizers cut one text into different numbers of tokens, its total information is the same.

    Args:
        logits (`torch.Tensor`): Shape (rows, length, vocabulary).
        labels (`torch.Tensor`): Tokens, shape (rows, length); −100 is left out.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
