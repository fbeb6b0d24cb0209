"""What loading a model found in its file: tensors that lack, have other shapes, or have no place in the model."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..align import sees_or_hears, split_name
from ..tuner.checks import TensorInfo, number_of, shown
from .needs import quantization_of


# What a model computes as well without: layers that predict further tokens, and what older versions of transformers
# saved of masks and rotary embeddings.
_SPARE = re.compile(r"(^|[._])(mtp|nextn)|\.(attn|attention)\.(masked_)?bias$|(inv_freq|rope\.freqs|position_ids)$")

_FLOAT = re.compile(r"B?F\d|torch\.b?float")  # as safetensors and PyTorch call them


def check_found(found: Mapping[str, Any], model: PreTrainedModel, named: str) -> None:
    """Refuse a model that is not wholly its file's, and warn of tensors in the file that it is loaded without, and
    of a quantization that transformers passes over.

    Args:
        found: What transformers tells as `output_loading_info`.
        model: The model.
        named (`str`): What a message calls it.

    Raises:
        OSError: If tensors lack, or have other shapes than the model's.
    """
    _check_whole(found, model, named)
    quantization = quantization_of(model.config)
    if quantization is not None and getattr(model, "hf_quantizer", None) is None:
        warnings.warn(
            f"transformers does not know the `quant_method` in the config.json of {named[0].lower()}{named[1:]}, "
            f"{shown(dict(quantization).get('quant_method'))}, and loads the tensors of its file as they are: delete "
            "`quantization_config` there if they are not quantized, else pass the unquantized model."
        )
    if without := _missed(sorted(found["unexpected_keys"]), model):
        warnings.warn(
            f"{named} is loaded without {number_of(len(without), 'tensor')} of its file ('{without[0]}'), for which "
            f"{type(model).__name__} has no place: if the model needs what they hold, correct `model_type` in its "
            "config.json, or get the model again."
        )


def check_header(header: Mapping[str, TensorInfo], model: PreTrainedModel, named: str) -> None:
    """Refuse a model before it is loaded, as `check_found` would after; what transformers may convert is left to that.

    Args:
        header: What its files hold; nothing if that is not known.
        model: Its skeleton, not quantized.
        named (`str`): What a message calls it.

    Raises:
        OSError: If tensors lack, have other shapes than the model's, or are of integers.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    spare = {name for name in header if _SPARE.search(name)} | {name for name, _ in model.named_buffers()}
    missing: list[str] = []
    if header and header.keys() <= own.keys() | spare:
        there = {own[name] for name in header.keys() & own.keys()}  # tied ones have one name of several
        unneeded = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        missing = [name for name, parameter in model.named_parameters() if parameter not in there]
        missing = [name for name in missing if not any(re.search(pattern, name) for pattern in unneeded)]
    deepest = {whose: max(map(_layer, names), default=-1) for whose, names in (("own", own), ("held", header))}
    if not missing and -1 < deepest["held"] < deepest["own"]:  # as transformers renames all, only their numbers tell
        missing = [name for name in own if _layer(name) > deepest["held"]]
    within = {name: _within(name) for name in (*own, *header)}
    twice = Counter(within[name] for name in header)  # as in a model that speaks with a second decoder
    inner = {within[name]: name for name in own if within[name] and twice[within[name]] == 1}
    held = {name if name in own else inner.get(within[name], name): info for name, info in header.items()}
    held = {name: info for name, info in held.items() if name in own and not sees_or_hears(name)}
    shapes = [(name, info.shape, tuple(own[name].shape)) for name, info in held.items()]
    # Experts are saved transposed, and some other tensors with further dimensions.
    odd = [one for one in shapes if len(one[1]) == len(one[2]) <= 2 and sorted(one[1]) != sorted(one[2])]
    _check_whole({"missing_keys": missing, "unexpected_keys": (), "mismatched_keys": odd}, model, named)
    scaled = any("scale" in name for name in header.keys() - own.keys())  # else 8 bits are numbers as they are
    for name, info in held.items():
        if not _FLOAT.match(info.dtype) or ("8_" in info.dtype and scaled):
            raise OSError(
                f"{named} has the tensor '{name}' of the type {info.dtype} in its file, and its config.json no "
                "`quantization_config` that says what it stands for: get both again, or pass the unquantized model."
            )


def _layer(name: str) -> int:
    """The number of the decoder's layer in a tensor's name, -1 without."""
    return -1 if sees_or_hears(name) else (split_name(name) or (-1,))[0]


def _within(name: str) -> str:
    """A tensor's name from the number of its layer on, which transformers keeps where it renames the way to it."""
    return "" if _layer(name) < 0 else re.sub(r"^.*?\.(?=\d+\.)", "", name)


def _check_whole(found: Mapping[str, Any], model: PreTrainedModel, named: str) -> None:
    others = sorted(found["unexpected_keys"])
    if missing := sorted(found["missing_keys"]):  # as where all names have a prefix
        if missing == _head_of(model):
            raise OSError(
                f"{named} has no '{missing[0]}' in its file, and `tie_word_embeddings` in its config.json is false: "
                "correct that if its head is its embeddings, else get the whole model."
            )
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


def _head_of(model: PreTrainedModel) -> list[str]:
    """The name of a model's head that is not its embeddings and has their shape, as where a head was tied."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embeddings.weight or head.weight.shape != embeddings.weight.shape:
        return []
    return [name for name, parameter in model.named_parameters() if parameter is head.weight]


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
