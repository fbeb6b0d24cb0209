"""How two models are aligned: token positions, vocabulary, depth, modules."""

from .batches import anchor_positions, anchors_of, collate_pairs, side_of
from .depth import map_layers
from .modules import ModuleMap, layer_pairs, map_modules
from .places import (
    SENSES,
    Place,
    find_places,
    layer_count,
    layer_path,
    layer_paths,
    linear_layers,
    place_size,
    sees_or_hears,
    split_name,
    split_place,
)
from .similarity import linear_cka, monotone_map
from .tokens import AlignedPair, align_texts, check_offsets
from .vocab import SharedVocabulary, shared_vocabulary
