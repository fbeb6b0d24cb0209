"""The adapter as it is, as first maps: between models of one origin and shape the projections are the identity."""

from __future__ import annotations

import math

from torch import nn

from ..align import ModuleMap, place_size
from ..source import Pair
from .maps import ClosedForm, KernelFit


def can_be_copied(modules: ModuleMap, source: nn.Module, target: nn.Module) -> bool:
    """Whether every place on which kernels land has the shape of those that they come from."""
    pairs = [(place, s) for place, sources in modules.kernels.items() for s in sources]
    return all(place_size(target, place) == place_size(source, s) for place, s in pairs)


def copied(pair: Pair) -> ClosedForm[KernelFit] | None:
    """Every kernel unchanged on the place that it is mapped to; `None` where one does not fit its place.

    Args:
        pair (`Pair`): The models and their module map.
    """
    if not can_be_copied(pair.modules, pair.source, pair.target):
        return None
    fits = {
        place: [
            KernelFit(s, pair.kernels[s].A.float().cpu(), pair.kernels[s].B.float().cpu(), math.nan, math.nan, False)
            for s in sources
        ]
        for place, sources in pair.modules.kernels.items()
    }
    return ClosedForm(fits, {}, {}, 0)
