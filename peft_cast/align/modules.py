"""The module map: which source modules' kernels land on which target module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


# Names that the same projection has in different architectures; with its parent's where one name serves two (GPT-2).
ROLES = {
    "q": ("q_proj", "query", "q"),
    "k": ("k_proj", "key", "k"),
    "v": ("v_proj", "value", "v"),
    "o": ("o_proj", "out_proj", "attn.c_proj"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "dense_h_to_4h", "c_fc"),
    "down": ("down_proj", "w2", "fc2", "dense_4h_to_h", "mlp.c_proj"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_LAYER = re.compile(r"^(?P<stem>.*?)\.(?P<index>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class ModuleMap:
    """Where kernels land.

    Args:
        kernels (`dict[str, list[str]]`): Target module name → the source module names whose kernels it carries.
        layers (`dict[int, int]`): Source layer → target layer.
        unmapped (`tuple[str, ...]`): Adapted source modules for which the target has no place.
    """

    kernels: dict[str, list[str]]
    layers: dict[int, int]
    unmapped: tuple[str, ...]


def map_modules(
    source_modules: Iterable[str],
    target: nn.Module,
    layers: Mapping[int, int],
    module_map: Mapping[str, str] | None = None,
) -> ModuleMap:
    """Find the target module for every adapted source module: same layer by the depth map, same role by name.

    Args:
        source_modules: Full names of the adapted modules, e.g. `"model.layers.3.self_attn.q_proj"`.
        target: The target model.
        layers: Source layer → target layer, see `map_layers`.
        module_map (`Mapping[str, str]`, *optional*): Last name part in the source → last name part in the target,
            e.g. `{"fc1": "up_proj"}`, for names that are not known.

    Raises:
        ValueError: If nothing of the adapter can be placed.
    """
    module_map = module_map or {}
    places: dict[tuple[int, str], str] = {}
    for name, module in target.named_modules():
        parts = split_name(name)
        if parts and isinstance(module, (nn.Linear, Conv1D)):
            layer, last = parts
            places.setdefault((layer, last), name)
            places.setdefault((layer, _with_parent(name)), name)
            places.setdefault((layer, f"role:{_role(name)}"), name)
    kernels: dict[str, list[str]] = {}
    unmapped = []
    for name in source_modules:
        parts = split_name(name)
        place = None
        if parts and parts[0] in layers:
            layer, last = layers[parts[0]], parts[1]
            wanted = module_map.get(last, _with_parent(name))
            keys = [wanted, wanted.rsplit(".", 1)[-1], f"role:{_role(wanted)}"]
            place = next((places[layer, key] for key in keys if (layer, key) in places), None)
        if place is None:
            unmapped.append(name)
        else:
            kernels.setdefault(place, []).append(name)
    if not kernels:
        raise ValueError(
            f"None of the adapter's modules ({', '.join(sorted({n.rsplit('.', 1)[-1] for n in unmapped}))}) has a "
            "counterpart in the target model: pass `module_map={'source_name': 'target_name'}`."
        )
    order = {name: i for i, (name, _) in enumerate(target.named_modules())}
    return ModuleMap({name: kernels[name] for name in sorted(kernels, key=order.get)}, dict(layers), tuple(unmapped))


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers within the decoder layers."""
    return [
        name for name, module in model.named_modules() if split_name(name) and isinstance(module, (nn.Linear, Conv1D))
    ]


def _with_parent(name: str) -> str:
    """`"model.layers.3.self_attn.q_proj"` → `"self_attn.q_proj"`"""
    return ".".join(name.split(".")[-2:])


def _role(name: str) -> str:
    """The role of a projection, or its own name, which no other role has."""
    return _ROLE_OF.get(_with_parent(name)) or _ROLE_OF.get(name.rsplit(".", 1)[-1]) or name


def layer_pairs(module_map: ModuleMap) -> dict[str, str]:
    """Path of every target layer that carries kernels → path of the deepest source layer that lands on it."""
    pairs: dict[str, str] = {}
    for place, sources in module_map.kernels.items():
        path = _layer_path(place)
        known = [pairs[path]] if path in pairs else []
        pairs[path] = max(known + [_layer_path(s) for s in sources], key=lambda p: int(p.rsplit(".", 1)[1]))
    return pairs


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of a model's layers in order: the longest list of modules in it.

    Raises:
        ValueError: If it has none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers.")
    stem = max(lists, key=lambda name: len(lists[name]))
    return [f"{stem}.{i}" for i in range(len(lists[stem]))]


def _layer_path(name: str) -> str:
    """`"model.layers.3.self_attn.q_proj"` → `"model.layers.3"`"""
    match = _LAYER.match(name)
    return f"{match['stem']}.{match['index']}"


def split_name(name: str) -> tuple[int, str] | None:
    """Layer number and last part of a module's name, `None` for modules outside the layers (embeddings, head)."""
    match = _LAYER.match(name)
    return (int(match["index"]), match["rest"].rsplit(".", 1)[-1]) if match else None
