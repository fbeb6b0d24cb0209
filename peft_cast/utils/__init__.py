"""What all the rest stands on: files, safety, processes, costs."""

from .environment import environment
from .files import (
    PARTIAL,
    as_path,
    change_dtype,
    check_place,
    complete_folder,
    optional,
    read_json_if_there,
    remove_partial,
    replacing,
    write_json,
    write_tensors,
)
from .out_of_memory import within_memory
from .phases import Phases, give_back_memory
from .safety import (
    HIDDEN,
    adapter_folder,
    check_model_config,
    check_weights,
    find_file,
    hub_parts,
    looks_like_path,
    one_line,
    read_adapter_config,
    read_weights_header,
    replicated_layers,
    secrets_removed,
    why_no_folder,
    why_no_model,
    without_secrets,
)
