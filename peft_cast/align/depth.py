"""The depth map: on which target layer each source layer's kernels land."""

from __future__ import annotations

from collections.abc import Mapping

from ..tuner.checks import number_of


def map_layers(
    source_layers: int, target_layers: int, depth_map: str | Mapping[int, int] = "proportional"
) -> dict[int, int]:
    """Target layer for every source layer. Several source layers may share one.

    Args:
        source_layers (`int`): Number of layers of the source model.
        target_layers (`int`): Number of layers of the target model.
        depth_map (`str` or `Mapping[int, int]`): `"proportional"` keeps the relative depth, ends included; or an
            explicit map from source layer to target layer (source layers left out of it carry nothing over).

    Raises:
        ValueError: If an explicit map names a layer that does not exist, or the name is unknown.
    """
    if isinstance(depth_map, Mapping):
        for s, t in depth_map.items():
            if not (0 <= s < source_layers and 0 <= t < target_layers):
                raise ValueError(
                    f"`depth_map` sends source layer {s} to target layer {t}, but the models have {source_layers} and "
                    f"{number_of(target_layers, 'layer')} (counted from 0)."
                )
        return dict(depth_map)
    if depth_map != "proportional":
        raise ValueError(
            f"`depth_map` must be 'proportional', 'similarity' or a mapping of layer numbers, got {depth_map!r}."
        )
    if source_layers == 1:
        return {0: (target_layers - 1) // 2}
    return {s: round(s * (target_layers - 1) / (source_layers - 1)) for s in range(source_layers)}
