"""How two models are aligned: token positions, vocabulary, depth, modules."""

from .depth import map_layers
from .modules import ModuleMap, layer_pairs, map_modules
from .places import Place, find_places, layer_paths, linear_layers, split_place
from .similarity import linear_cka, monotone_map
from .tokens import AlignedPair, align_texts
from .vocab import SharedVocabulary, shared_vocabulary


__all__ = [
    "AlignedPair",
    "ModuleMap",
    "Place",
    "SharedVocabulary",
    "align_texts",
    "find_places",
    "layer_pairs",
    "layer_paths",
    "linear_cka",
    "linear_layers",
    "map_layers",
    "map_modules",
    "monotone_map",
    "shared_vocabulary",
    "split_place",
]
