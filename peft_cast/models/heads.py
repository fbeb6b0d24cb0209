"""The output layer of a model: cut to some tokens or positions, or looked behind, and put back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel


def shared_head(model: PreTrainedModel, token_ids: torch.Tensor) -> AbstractContextManager[nn.Module]:
    """Within the context the model's logits cover only `token_ids`, in this order; the old head is put back after.

    Swapping the head, not multiplying outside, keeps what architectures do around it (soft-capping, scaling), and
    never builds the logits of the whole vocabulary. A head with an adapter on it is the exception: its logits are
    built and the wanted ones are taken, so that the adapter can still be switched off.

    Args:
        model: The model.
        token_ids (`torch.Tensor`): Shape (tokens,), int64.
    """
    head = model.get_output_embeddings()
    if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return _with_head(
            model, _InItsPlace(lambda states: head(states)[..., token_ids.to(states.device)], head, head)
        )
    weight = head.weight.detach()[token_ids.to(head.weight.device)]
    small = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    small.weight = nn.Parameter(weight, requires_grad=False)
    if getattr(head, "bias", None) is not None:
        small.bias = nn.Parameter(head.bias.detach()[token_ids.to(head.bias.device)], requires_grad=False)
    return _with_head(model, small)


def states_at(
    model: PreTrainedModel | PeftModel, rows: torch.Tensor, positions: torch.Tensor
) -> AbstractContextManager[nn.Module]:
    """Within the context the model gives as logits what its head would read at some positions, shape (m, hidden).

    Yields the head. Only for models of which `ends_in_head` is true.

    Args:
        model: The model.
        rows, positions (`torch.Tensor`): As in `logits_at`.
    """
    return _with_head(model, _InItsPlace(lambda states: states[rows, positions], model.get_output_embeddings()))


@contextmanager
def _with_head(model: PreTrainedModel | PeftModel, head: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model has this head; yields its own, which is put back after."""
    own = model.get_output_embeddings()
    model.set_output_embeddings(head)
    try:
        yield own
    finally:
        model.set_output_embeddings(own)


class _InItsPlace(nn.Module):
    """A function of the hidden states in a head's place; PEFT finds the adapter of the head in its child."""

    def __init__(
        self, logits: Callable[[torch.Tensor], torch.Tensor], own: nn.Module, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.logits, self.head, self.in_place_of = logits, head, (own,)  # in a tuple: no module of this one

    @property
    def weight(self) -> torch.Tensor:
        """Where a model looks up its head's precision (Mamba)."""
        return self.in_place_of[0].weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.logits(states)


def logits_at(
    model: PreTrainedModel | PeftModel, rows: torch.Tensor, positions: torch.Tensor
) -> AbstractContextManager:
    """Within the context the model's logits are those of some positions alone, shape (m, vocabulary).

    The head costs as much as many layers and is not needed where nothing is compared (prompts, padding).

    Args:
        model: The model.
        rows, positions (`torch.Tensor`): Index of the m positions in the batch, int64.
    """
    return _before_head(model, lambda states: states[rows, positions])


def contiguous_head(model: PreTrainedModel | PeftModel) -> AbstractContextManager:
    """Within the context the head reads contiguous hidden states.

    transformers gives it a slice (the last positions). `F.linear` on such a slice may fall back to a batched product
    that copies the whole head once per row: minutes instead of seconds for a large vocabulary on a CPU.
    """
    return _before_head(model, torch.Tensor.contiguous)


def _before_head(
    model: PreTrainedModel | PeftModel, change: Callable[[torch.Tensor], torch.Tensor]
) -> AbstractContextManager:
    """A hook, from now to the end of the context: the head reads `change(hidden states)`."""
    return model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (change(args[0]),))


@torch.no_grad()
def ends_in_head(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the logits are what the head, a linear layer, makes: nothing is capped, scaled or cast after it.

    Tried on one token; of a model that is spread over processes all must try.
    """
    head, made = model.get_output_embeddings(), []
    if type(head) is not nn.Linear:
        return False
    with head.register_forward_hook(lambda _, __, logits: made.append((logits, logits._version))):
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits = model(input_ids=token, use_cache=False).logits
    return len(made) == 1 and made[0][0] is logits and made[0][1] == logits._version
