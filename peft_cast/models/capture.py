"""What modules and layers saw and wrote in one pass, by hooks that leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

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
    captured, rows = Captured(), 0

    def by_rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().reshape(rows, -1, tensor.shape[-1])  # OPT's MLP flattens rows and length

    def start_graph(_, args, output):
        nonlocal rows
        rows = output.shape[0]
        return output.requires_grad_(True)

    def watch(name: str, _, args, output):
        captured.inputs[name] = by_rows(args[0])
        if output.requires_grad:
            output.register_hook(lambda gradient: captured.gradients.__setitem__(name, by_rows(gradient)))

    with ExitStack() as hooks:
        for name in dict.fromkeys(split_place(place)[0] for place in places):
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(watch, name)))
        # Nothing in a frozen model requires gradients, so the embeddings start the graph.
        hooks.enter_context(model.get_input_embeddings().register_forward_hook(start_graph))
        yield captured


@contextmanager
def layer_outputs(model: nn.Module, paths: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Record the hidden states that the named decoder layers write, each (rows, length, hidden), with their graph.

    transformers' `output_hidden_states=True` would leave hooks in the model.
    """
    states: dict[str, torch.Tensor] = {}

    def keep(path: str, _, args, output):
        states[path] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(model.get_submodule(path).register_forward_hook(partial(keep, path)))
        yield states


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of −log p(next token) in nats over the text.

    A sum, not a mean: two tokenizers cut one text into different numbers of tokens, its total information is the same.

    Args:
        logits (`torch.Tensor`): Shape (rows, length, vocabulary).
        labels (`torch.Tensor`): Tokens, shape (rows, length); −100 is left out.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
