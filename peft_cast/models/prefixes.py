"""What many texts begin with, read once: its keys and values stand before each of them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .heads import logits_at
from .sharding import is_sharded


# Tokens from which it pays to read what texts have in common by itself.
WORTH_IT = 64


@dataclass(frozen=True)
class Prefix:
    """Some tokens as a model has read them.

    Args:
        layers: Keys and values of each layer, two tensors of shape (1, heads, tokens, head width).
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __len__(self) -> int:
        return self.layers[0][0].shape[2]


def common_prefixes(sequences: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """What each sequence of token ids begins with as others do; at least one id of each is left.

    Neighbors in alphabetical order are taken together while they have most of it in common. One that is like no other
    has a beginning of its own. All are empty where it does not pay: of sequences with little in common.
    """
    rows = [tuple(one) for one in sequences]
    groups: list[tuple[tuple[int, ...], list[int]]] = []
    for i in sorted(range(len(rows)), key=rows.__getitem__):
        shared, members = groups[-1] if groups else ((), [])
        common = tuple(os.path.commonprefix([shared, rows[i][:-1]]))  # it compares any items
        if members and len(common) >= max(WORTH_IT, len(shared) // 2):
            groups[-1] = common, [*members, i]
        else:
            groups.append((rows[i][:-1], [i]))
    if len(groups) > len(rows) // 2 or any(len(shared) < WORTH_IT for shared, _ in groups):
        return [()] * len(rows)
    prefix_of = {i: shared for shared, members in groups for i in members}
    return [prefix_of[i] for i in range(len(rows))]


def keeps_prefixes(model: PreTrainedModel) -> bool:
    """Whether keys and values are all that a layer keeps of what it read, at every position.

    A state, or a window over the last tokens, could not be told from padding between a prefix and a text.
    """
    if not isinstance(model, PreTrainedModel) or is_sharded(model) or model._is_stateful:
        return False
    counts_from_zero = "position_ids" not in inspect.signature(model.forward).parameters
    if counts_from_zero or model.config.get_text_config() is not model.config:  # images count positions their own way
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError):  # no layers of a kind that transformers knows
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@torch.no_grad()
def read_prefix(model: PreTrainedModel, ids: Sequence[int]) -> Prefix:
    """Let a model, for which `keeps_prefixes` is true, read n token ids."""
    cache = DynamicCache(config=model.config)
    last = torch.tensor([0], device=model.device), torch.tensor([len(ids) - 1], device=model.device)
    with logits_at(model, *last):
        model(input_ids=torch.tensor([list(ids)], device=model.device), past_key_values=cache, use_cache=True)
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers))


def after_prefixes(model: PreTrainedModel, prefixes: Sequence[Prefix]) -> tuple[DynamicCache, torch.Tensor]:
    """A cache for a batch of n rows, each after its own prefix, and the prefixes' attention mask (n, longest), int64.

    Shorter ones are padded on the left.
    """
    longest, layers = max(map(len, prefixes)), []
    for states in zip(*(prefix.layers for prefix in prefixes)):  # of one layer, (keys, values) of each row
        layers.append([_left_padded([row[i][0].transpose(0, 1) for row in states]) for i in (0, 1)])
    device = model.device
    counts = torch.tensor([longest - len(prefix) for prefix in prefixes], device=device)
    mask = (torch.arange(longest, device=device) >= counts[:, None]).long()
    return DynamicCache([(keys, values) for keys, values in layers], config=model.config), mask


def _left_padded(states: list[torch.Tensor]) -> torch.Tensor:
    """Tensors (tokens, heads, width) of n rows as one, (n, heads, longest, width)."""
    return pad_sequence(states, batch_first=True, padding_side="left").transpose(1, 2).contiguous()
