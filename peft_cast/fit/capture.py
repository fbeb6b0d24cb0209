"""What modules and layers saw and wrote in one pass, by hooks that leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..align import split_place


@dataclass
class Captured:
    """What the modules saw in the last pass, each (rows, length, width).

    `inputs` are module inputs, `gradients` the derivative of the loss with respect to module outputs.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the last pass, or it lies beside the next one until that is over."""
        self.inputs.clear()
        self.gradients.clear()

    def input(self, place: str) -> torch.Tensor:
        """What the module of a place read."""
        return self.inputs[split_place(place)[0]]

    def gradient(self, place: str) -> torch.Tensor:
        """The gradient of a place's own rows."""
        module, rows = split_place(place)
        return self.gradients[module] if rows is None else rows.of(self.gradients[module])


@contextmanager
def capture(model: PreTrainedModel, places: Iterable[str]) -> Iterator[Captured]:
    """Record the inputs and output gradients of the places' modules; all hooks are removed afterwards."""
    captured = Captured()
    handles = []
    rows = 0

    def by_rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(rows, -1, tensor.shape[-1])  # OPT's MLP flattens rows and length

    def start_graph(_, args, output):
        nonlocal rows
        rows = output.shape[0]
        return output.requires_grad_(True)

    def watch(name: str, module: nn.Module) -> None:
        def forward_hook(_, args, output):
            captured.inputs[name] = by_rows(args[0])
            if output.requires_grad:
                output.register_hook(lambda gradient: captured.gradients.__setitem__(name, by_rows(gradient)))

        handles.append(module.register_forward_hook(forward_hook))

    for name in dict.fromkeys(split_place(place)[0] for place in places):
        watch(name, model.get_submodule(name))
    # Nothing in a frozen model requires gradients, so the embeddings start the graph.
    handles.append(model.get_input_embeddings().register_forward_hook(start_graph))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def layer_outputs(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Record the hidden states that the named decoder layers write, each (rows, length, hidden), with their graph.

    transformers' `output_hidden_states=True` would leave hooks in the model.
    """
    states: dict[str, torch.Tensor] = {}

    def hook_for(path: str):
        def hook(_, args, output):
            states[path] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(path).register_forward_hook(hook_for(path)) for path in paths]
    try:
        yield states
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
