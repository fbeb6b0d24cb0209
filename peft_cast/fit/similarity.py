"""A model pair made ready for a translation: loaded, aligned, with the text that both read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..align import AlignedPair, collate_pairs, layer_paths, linear_cka, map_modules, monotone_map, side_of
from ..models import layer_outputs, logits_at
from ..source import Pair
from ..utils import distributed


def map_by_similarity(
    pair: Pair, texts: Sequence[AlignedPair], module_map: Mapping[str, str] | None = None, positions: int = 1500
) -> Pair:
    """The pair with its kernels moved to the target layers that resemble their own most.

    Args:
        pair (`Pair`): The models.
        texts: General texts.
        module_map: As in `translate`.
        positions (`int`): About how many aligned positions to compare the layers at.
    """
    similarity, _ = layer_similarity(pair, texts, positions)
    layers = monotone_map(distributed.broadcast(similarity))
    return replace(pair, modules=map_modules(pair.kernels, pair.target, layers, module_map, pair.source))


@torch.no_grad()
def layer_similarity(pair: Pair, texts: Sequence[AlignedPair], positions: int) -> tuple[torch.Tensor, int]:
    """Linear CKA of every source layer with every target layer, (source layers, target layers), of the plain models.

    Args:
        pair (`Pair`): The models. An adapter that is already on the target must be disabled.
        texts: General texts.
        positions (`int`): About how many aligned positions to compare the layers at; less than twice as many are used.

    Returns:
        The similarities and the number of positions.
    """
    chosen, count = [], 0
    for text in texts:
        if count < positions:
            chosen.append(text)
            count += len(text.target_positions)
    batch = collate_pairs(chosen)
    step = max(1, count // positions)  # a single long text may hold far more than are wanted
    states = {}
    with pair.adapted.disable_adapter():
        for side, model in (("source", pair.source), ("target", pair.target)):
            inputs, rows, at = side_of(batch, side, model.device)
            with logits_at(model, rows[:1], at[:1]), layer_outputs(model, layer_paths(model)) as outputs:
                model(**inputs)
            states[side] = [outputs[path][rows[::step], at[::step]].cpu() for path in layer_paths(model)]
    return linear_cka(states["source"], states["target"]), len(states["source"][0])
