"""What all the rest stands on: files, safety, processes, costs."""

from typing import TYPE_CHECKING

from .importing import lazily


if TYPE_CHECKING:
    from . import distributed
    from .adapter_config import other_kind, read_adapter_config, unnamed
    from .environment import environment
    from .faults import WITH_REMEDY, FaultError, at_fault, explained, said_by, why_unread
    from .files import (
        METRICS_NAME,
        PARTIAL,
        as_path,
        as_place,
        change_dtype,
        check_output,
        check_place,
        check_writable,
        complete_folder,
        optional,
        read_json_if_there,
        remove_partial,
        replacing,
        unwritten,
        why_unwritten,
        write_json,
        write_tensors,
    )
    from .names import (
        adapter_folder,
        differ,
        files_of,
        find_file,
        holds_file,
        hub_parts,
        hub_revision,
        is_out_of_reach,
        looks_like_path,
        why_no_folder,
        why_no_model,
        why_no_name,
        why_not_on_hub,
    )
    from .out_of_memory import within_memory
    from .phases import Phases, give_back_memory
    from .safety import (
        check_model_config,
        check_weights,
        one_line,
        read_weights_header,
        replicated_layers,
        why_no_weights,
    )
    from .secrets import HIDDEN, secrets_removed, without_secrets

lazily(__name__)
