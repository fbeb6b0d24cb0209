"""What loading a model found in its file: tensors that lack, have other shapes, or have no place in the model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..align import sees_or_hears, split_name
from ..tuner.checks import number_of


# What a model computes as well without: layers that predict further tokens, and what older versions of transformers
# saved of masks and rotary embeddings.
_SPARE = re.compile(r"(^|[._])(mtp|nextn)|\.(attn|attention)\.(masked_)?bias$|(inv_freq|rope\.freqs|position_ids)$")


def check_found(found: Mapping[str, Any], model: PreTrainedModel, named: str) -> None:
    """Refuse a model that is not wholly its file's, and warn of tensors in the file that it is loaded without.

    Args:
        found: What transformers tells as `output_loading_info`.
        model: The model.
        named (`str`): What a message calls it.

    Raises:
        OSError: If tensors lack, or have other shapes than the model's.
    """
    others = sorted(found["unexpected_keys"])
    if missing := sorted(found["missing_keys"]):  # as where all names have a prefix
        instead = f" (its file has '{others[0]}' and the like, which it does not have)" if others else ""
        raise OSError(
            f"{named} lacks the weights of {number_of(len(missing), 'tensor')} ('{missing[0]}'), which would be "
            f"random{instead}: get the whole model, or pass the one that it was made from."
        )
    if odd := sorted(found["mismatched_keys"]):
        name, held, wanted = odd[0]
        raise OSError(
            f"{named} has the tensor '{name}' of shape {tuple(held)} in its file, and by its config.json it has "
            f"{tuple(wanted)}: the two do not belong together, get both again."
        )
    if without := _missed(others, model):
        warnings.warn(
            f"{named} is loaded without {number_of(len(without), 'tensor')} of its file ('{without[0]}'), for which "
            f"{type(model).__name__} has no place: if the model needs what they hold, correct `model_type` in its "
            "config.json, or get the model again."
        )


def _missed(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Those of the tensors without a place that may matter to what the model makes of a text."""
    config = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", 0)
    further = range(depth, depth + (getattr(config, "num_nextn_predict_layers", None) or 0))  # predict further tokens
    quantized = hasattr(model.config, "quantization_config")  # which brings scales for caches and the like

    def matters(name: str) -> bool:
        layer = (split_name(name) or (None,))[0]
        beside = sees_or_hears(name) or layer in further or (quantized and not name.endswith((".weight", ".bias")))
        return not (beside or _SPARE.search(name))

    return [name for name in names if matters(name)]
