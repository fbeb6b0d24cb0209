"""The depth map found from what the layers compute: which target layer resembles each source layer most."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def linear_cka(source: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> torch.Tensor:
    """Linear centered kernel alignment of every source layer with every target layer (arXiv 1905.00414).

    Args:
        source: For each source layer, its hidden states at n aligned positions, shape (n, hidden_S).
        target: For each target layer, its hidden states at the same positions, shape (n, hidden_T).

    Returns:
        `torch.Tensor`: Shape (source layers, target layers), from 0 (unrelated) to 1 (the same up to a rotation).
    """
    # Gram matrices of positions: their size does not depend on the widths, and each layer's is made once.
    left, right = (torch.stack([_gram(states) for states in side]) for side in (source, target))
    return left @ right.to(left.device).T


def _gram(states: torch.Tensor) -> torch.Tensor:
    """Flattened, normalized Gram matrix of centered states (n, d) → (n * n,)."""
    states = states.float()
    # Directions of huge variance (attention sinks, outlier features) would decide alone.
    states = (states - states.mean(0)) / states.std(0).clamp_min(1e-6)
    gram = (states @ states.T).flatten()
    return gram / gram.norm().clamp_min(1e-12)


def monotone_map(similarity: torch.Tensor) -> dict[int, int]:
    """The map from source to target layers of the largest total similarity whose order is kept.

    Args:
        similarity (`torch.Tensor`): Shape (S, T).

    Returns:
        `dict[int, int]`: Target layer of every source layer, never decreasing; several may share one.
    """
    scores = similarity.double().cpu()
    best, choices = scores[0].clone(), []
    for row in scores[1:]:
        reached, previous = best.cummax(0)
        choices.append(previous)
        best = reached + row
    t = int(best.argmax())
    path = [t]
    for previous in reversed(choices):
        t = int(previous[t])
        path.append(t)
    return dict(enumerate(reversed(path)))
