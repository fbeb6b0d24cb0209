"""The module map: which source places' kernels land on which target place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .places import MLP, Place, find_places, has_experts, layer_path, layer_paths, place_of_name, role_of, split_place


_LEFT_OUT = "is left out of the depth map"


@dataclass(frozen=True)
class ModuleMap:
    """Where kernels land. Places are named as in `find_places`: a module, or rows of a fused one.

    Args:
        kernels (`dict[str, list[str]]`): Target place → the source places whose kernels it carries.
        layers (`dict[int, int]`): Source layer → target layer.
        reasons (`dict[str, str]`): For each adapted source place without a place on the target why.
        found (`dict[str, tuple]`): For each other source place the role, the names of both places within their layers,
            and what the target's was found by: `"name"`, `"shape"` or `"module_map"`.
    """

    kernels: dict[str, list[str]]
    layers: dict[int, int]
    reasons: dict[str, str]
    found: dict[str, tuple[str | None, str, str, str]]

    @property
    def unmapped(self) -> tuple[str, ...]:
        """Adapted source places for which the target has none."""
        return tuple(self.reasons)

    @property
    def metrics(self) -> dict[str, Any]:
        """The account of it in `TranslationResult.metrics`, JSON-ready; `routes` is the map with all layers
        together.
        """
        routes = [
            {"role": role, "source": source, "target": target, "found": found, "kernels": count}
            for (role, source, target, found), count in Counter(self.found.values()).items()
        ]
        unmapped = [{"module": name, "what": reason} for name, reason in self.reasons.items()]
        return {"depth_map": self.layers, "routes": routes, "unmapped": unmapped}

    def part(self, source_places: Iterable[str]) -> ModuleMap:
        """The map of some source places alone."""
        wanted = dict.fromkeys(source_places)
        reasons = {
            s: self.reasons.get(s, "it was not there when the map was made") for s in wanted if s not in self.found
        }
        kernels = {name: [s for s in sources if s in wanted] for name, sources in self.kernels.items()}
        found = {s: self.found[s] for s in wanted if s in self.found}
        return ModuleMap({name: sources for name, sources in kernels.items() if sources}, self.layers, reasons, found)


def map_modules(
    source_places: Iterable[str],
    target: nn.Module,
    layers: Mapping[int, int],
    module_map: Mapping[str, str] | None = None,
    source: nn.Module | None = None,
) -> ModuleMap:
    """Find the target place for every adapted source place: same layer by the depth map, same role.

    Args:
        source_places: Names of the adapted places, e.g. `"model.layers.3.self_attn.q_proj"`.
        target: The target model.
        layers: Source layer → target layer, see `map_layers`.
        module_map (`Mapping[str, str]`, *optional*): Source → target, for names that are not known or where another
            place is wanted. Both sides may be a last name part, a name within the layer, a full name, or a role
            (`"q"`, `"k"`, `"v"`, `"o"`, `"gate"`, `"up"`, `"down"`); the target also rows of a module,
            `"mixer.W_in[0:64]"`.
        source: The source model. Without it roles are told by names alone.

    Raises:
        ValueError: If nothing of the adapter can be placed, or `module_map` names what a model does not have.
    """
    places = find_places(target)
    in_layer: dict[int, list[Place]] = {}
    for there in places.values():
        in_layer.setdefault(there.layer, []).append(there)
    for wanted in (module_map or {}).values():
        if not any(_called(wanted, group) for group in in_layer.values()):
            names = dict.fromkeys(place.label for place in places.values())
            raise ValueError(
                f"`module_map` sends kernels to '{wanted}', which no layer of the target has: choose from "
                f"{', '.join(names)}."
            )
    known = find_places(source) if source is not None else None
    for given in module_map or {}:
        if known is not None and not any(given in _names(place) for place in known.values()):
            names = dict.fromkeys(place.label for place in known.values())
            raise ValueError(
                f"`module_map` speaks of '{given}', which no layer of the source has: choose from {', '.join(names)}."
            )
    blocks = [target.get_submodule(path) for path in layer_paths(target)]
    kernels: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    routes: dict[str, tuple[str | None, str, str, str]] = {}
    for name in source_places:
        place = known.get(name) if known is not None else place_of_name(name)
        if place is None:
            reasons[name] = "is no linear module of a decoder layer"
        elif place.layer not in layers:
            reasons[name] = f"source layer {place.layer} {_LEFT_OUT}"
        else:
            layer = layers[place.layer]
            landed, found = _counterpart(place, in_layer.get(layer, []), places, module_map or {})
            if landed is None:
                reasons[name] = _reason(place, has_experts(blocks[layer]))
            else:
                kernels.setdefault(landed.name, []).append(name)
                routes[name] = landed.role or place.role, place.label, landed.label, found
    if not kernels:
        why = "; ".join(f"{n}: {reason}" for n, reason in list(reasons.items())[:4])
        remedy = "pass `module_map={'source_name': 'target_name'}`"
        if all(reason.endswith(_LEFT_OUT) for reason in reasons.values()):
            remedy = "name these layers in `depth_map`"
        raise ValueError(f"None of the adapter's modules has a counterpart in the target model ({why}): {remedy}.")
    order = {name: i for i, (name, _) in enumerate(target.named_modules())}
    first = {name: (order[split_place(name)[0]], split_place(name)[1] or ()) for name in kernels}
    in_order = sorted(kernels, key=lambda name: (first[name][0], first[name][1][:2]))
    return ModuleMap({name: kernels[name] for name in in_order}, dict(layers), reasons, routes)


def _counterpart(
    place: Place, there: list[Place], everywhere: Mapping[str, Place], module_map: Mapping[str, str]
) -> tuple[Place | None, str]:
    """The place in a target layer for a source place, and what it was found by."""
    last = place.label.rsplit(".", 1)[-1]
    for key in _names(place):
        if key is not None and key in module_map:
            wanted = module_map[key]
            return everywhere.get(wanted) or _called(wanted, there), "module_map"
    if place.role is None:
        same = [other for other in there if other.label == place.label] or [
            other for other in there if other.label.rsplit(".", 1)[-1] == last
        ]
        return (same[0] if same else None), "name"
    same = [other for other in there if other.role == place.role]
    same.sort(key=lambda other: other.label != place.label)
    found = "shape" if same and "shape" in (place.found, same[0].found) else "name"
    return (same[0] if same else None), found


def _names(place: Place) -> tuple[str | None, ...]:
    """What a source place may be called in a module map."""
    last = place.label.rsplit(".", 1)[-1]
    return place.name, place.label, last, split_place(last)[0], place.role


def _called(wanted: str, there: Iterable[Place]) -> Place | None:
    """The place of a layer that is meant by a name, a role or rows of a module."""
    for place in there:
        if wanted in (place.name, place.label, place.label.rsplit(".", 1)[-1], place.role):
            return place
    module, rows = split_place(wanted)
    for place in there:
        own = split_place(place.label)[0]
        if rows and module in (split_place(place.name)[0], own, own.rsplit(".", 1)[-1]) and rows.fit(place.width):
            return replace(place, name=f"{split_place(place.name)[0]}[{rows}]", label=f"{own}[{rows}]", role=None)
    role = role_of(wanted)
    return next((place for place in there if role and place.role == role), None)


def _reason(place: Place, experts: bool) -> str:
    if place.role in MLP and experts:
        return (
            "the target's MLP is a mixture of experts, whose weights are no linear modules "
            f"('{place.role}' has no place)"
        )
    if place.role:
        return f"the target's layer has no place for '{place.role}'"
    return "its role is unknown, and the target has no module of that name"


def layer_pairs(module_map: ModuleMap) -> dict[str, str]:
    """Path of every target layer that carries kernels → path of the deepest source layer that lands on it."""
    pairs: dict[str, str] = {}
    for place, sources in module_map.kernels.items():
        path = layer_path(place)
        known = [pairs[path]] if path in pairs else []
        pairs[path] = max(known + [layer_path(s) for s in sources], key=lambda p: int(p.rsplit(".", 1)[1]))
    return pairs
