"""The adapter as it is, as first maps: between models of one origin and shape the projections are the identity."""

from __future__ import annotations

import math

from ..source import Pair
from .install import check_shapes
from .maps import ClosedForm, KernelFit


def copied(pair: Pair) -> ClosedForm[KernelFit] | None:
    """Every kernel unchanged on the place that it is mapped to; `None` where one does not fit its place.

    Args:
        pair (`Pair`): The models and their module map.
    """
    fits = {
        place: [
            KernelFit(s, pair.kernels[s].A.float().cpu(), pair.kernels[s].B.float().cpu(), math.nan, math.nan, False)
            for s in sources
        ]
        for place, sources in pair.modules.kernels.items()
    }
    copy: ClosedForm[KernelFit] = ClosedForm(fits, {}, {}, 0)
    try:
        check_shapes(pair.target, pair.kernels, copy)
    except ValueError:
        return None
    return copy
