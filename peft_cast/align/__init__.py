"""How two models are aligned: token positions, vocabulary, depth, modules."""

from .depth import map_layers
from .modules import ModuleMap, layer_pairs, map_modules
from .tokens import AlignedPair, align_texts
from .vocab import SharedVocabulary, shared_vocabulary


__all__ = [
    "AlignedPair",
    "ModuleMap",
    "SharedVocabulary",
    "align_texts",
    "layer_pairs",
    "map_layers",
    "map_modules",
    "shared_vocabulary",
]
