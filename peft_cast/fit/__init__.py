"""First maps between two models: the closed form, bridges, and putting them on the target."""

from .bridge import Bridge, fit_bridge
from .closed_form import (
    fit_closed_form,
    held_out_batches,
    held_out_positions,
    layer_groups,
    moments_size,
    texts_per_pass,
    with_bias,
)
from .copied import can_be_copied, copied
from .initial import check_maps, initial_maps
from .install import adapter_name_of, cast_config, check_adapter_name, check_shapes, install
from .maps import ClosedForm, KernelFit, PlaceMaps
from .saved import load_closed_form, save_closed_form
from .similarity import layer_similarity, map_by_similarity
from .stacked import StackedPart, adapter_names, on_one_model, stacked
from .start import projections_of
