"""What an adapter's files say that it holds: its configuration and the header of its weights. No model is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..align import sees_or_hears, split_name
from ..tuner import CastConfig
from ..tuner.checks import TensorInfo, is_name, read_json, shown
from ..utils import (
    differ,
    files_of,
    find_file,
    other_kind,
    read_adapter_config,
    read_weights_header,
    unnamed,
    why_no_weights,
    without_secrets,
)
from .holdings import Fate, Holdings, kernel_parts, left_parts, options_of
from .idle import idle_file
from .kinds import (
    ALORA,
    BASE,
    BIAS,
    ELSEWHERE,
    EVERYWHERE,
    EXACT_UP_TO,
    HEAD,
    PREFIX,
    SAVED,
    TOKENS,
    called,
    default_rank,
    is_read,
    kind_of,
    on_a,
    on_parameter,
    outside,
    rank_of_change,
    refusal,
    type_of,
)


# Options of a LoRA, and what the names of tensors have that it has for them alone.
_MARKS = {
    "use_dora": "lora_magnitude_vector",
    "lora_bias": r"lora_B\.(.+\.)?bias$",
    "trainable_token_indices": "trainable_tokens_",
    "kasa_config": "lora_diag",
}
# Likewise the projections that all modules of a method share, which its file has with `save_projection`.
_SHARED = {"VERA": ("vera_A", "vera_B"), "RANDLORA": ("randlora_A", "randlora_B")}
_HEADS = ("lm_head", "embed_out", "output_layer")
_EXPERT = re.compile(r"\.experts\.\d+(\.|$)")


def read_holdings(adapter: str | Path, revision: str | None = None) -> Holdings:
    """What an adapter in a folder or on the hub holds, of any kind.

    Raises:
        ValueError: If there is no adapter, or a file of it is broken.
    """
    return read_files(adapter, revision)[1]


def read_files(adapter: str | Path, revision: str | None = None) -> tuple[PeftConfig | None, Holdings]:
    """The configuration of an adapter, `None` if the installed PEFT does not know its type, and what it holds."""
    try:
        config = read_adapter_config(adapter, revision)
    except ValueError:
        if (values := _unknown_kind(adapter, revision)) is None:
            raise
        return None, _of_unknown(values)
    if weights_file(adapter, revision) != SAFETENSORS_WEIGHTS_NAME:
        return config, holdings_of(config, None, why_no_weights(adapter, revision))
    header = read_weights_header(adapter, revision)
    return config, holdings_of(config, header, unusable(adapter, revision, config, header))


def weights_file(adapter: str | Path, revision: str | None = None) -> str | None:
    """Which file of weights an adapter has: safetensors, else a pickle, which is not fetched."""
    with suppress(Exception):  # the hub may not be reached; what is in the cache will do
        find_file(adapter, SAFETENSORS_WEIGHTS_NAME, revision)
        return SAFETENSORS_WEIGHTS_NAME
    return WEIGHTS_NAME if WEIGHTS_NAME in files_of(adapter, revision) else None


def of_another_file(config: PeftConfig, header: Mapping[str, TensorInfo]) -> str | None:
    """Which option of a configuration, the kind or one of a LoRA's, is not that of its file: what follows "it" in a
    sentence, without the stop; `None` if all are.
    """
    if (found := other_kind(type_of(config), header)) is not None:
        kind, key = found
        return (
            f"has a configuration that is not its file's: `peft_type` is {type_of(config)}, and the file is a "
            f"{kind}'s ('{key[:200]}' is in it). Correct `peft_type` in {CONFIG_NAME}"
        )
    shared = _SHARED.get(type_of(config), ()) if header else ()
    lacking = [name for name in shared if not any(name in key.split(".") for key in header)]
    saved = getattr(config, "save_projection", None)
    if shared and len(lacking) != (0 if saved else len(shared)):
        if 0 < len(lacking) < len(shared):
            return f"has a file that is cut: it holds no `{lacking[0]}`, which its modules share. Get the file again"
        said = f"is true, and `{shared[0]}` is not" if saved else f"is false, and `{shared[0]}` is"
        return (
            f"has a configuration that is not its file's: `save_projection` {said} in its file. Correct it in "
            f"{CONFIG_NAME}"
        )
    for option, mark in _MARKS.items() if header and type(config) is LoraConfig else ():
        one = next((key for key in header if re.search(mark, key)), None)
        if bool(getattr(config, option, None)) != (one is not None):
            said = (
                f"is not set, and '{one[:200]}' is in its file"
                if one
                else "is set, and no tensor of its file is for it"
            )
            return f"has a configuration that is not its file's: `{option}` {said}. Correct it in {CONFIG_NAME}"
    if type(config) is LoraConfig and "r" in unnamed(config) and not (config.rank_pattern or config.target_parameters):
        ranks = {key: _rank_of(own, info) for key, info in header.items() for _, own in (_split(config, key),)}
        other = next((key for key, rank in ranks.items() if rank not in (0, config.r)), None)
        if other is not None:
            return (
                f"has a configuration that names no rank, for which PEFT takes {config.r}, and '{other[:200]}' in its "
                f"file has {ranks[other]}: add `r` to {CONFIG_NAME}"
            )
    return None


def unusable(
    adapter: str | Path, revision: str | None, config: PeftConfig, header: Mapping[str, TensorInfo]
) -> str | None:
    """Why a LoRA cannot be a source, as its file and its configuration tell side by side: what follows "it" in a
    sentence, without the stop; `None` if nothing speaks against it.
    """
    return of_another_file(config, header) or idle_file(adapter, revision, config, header)


def holdings_of(config: PeftConfig, header: Mapping[str, TensorInfo] | None, unread: str | None = None) -> Holdings:
    """What a configuration and the header of a file say.

    Args:
        config: The configuration.
        header: Names and shapes of the tensors; `None` where there is no file that is read.
        unread: Why it is not.
    """
    kernels, rest = _from_names(config) if header is None else _from_header(config, header)
    parts = [*kernel_parts(called(config), kernels), *left_parts(rest)]
    why = refusal(config) or unread
    if why is None and not kernels:
        why = "changes no linear layer of a decoder, so there is nothing to carry over: only others can be translated"
    measured = any(where.rpartition(".")[2] == "weight" for where in getattr(config, "target_parameters", None) or ())
    return Holdings(
        kind_of(config),
        options_of(config),
        tuple(sorted(set(_ranks(config, header)))),
        tuple(parts),
        config.task_type,
        config.base_model_name_or_path,
        getattr(config, "revision", None),
        is_read(config) and not measured,
        why,
    )


def check_is_read(
    adapter: str | Path,
    revision: str | None = None,
    remedy: str = "use `Bridge.cast` with `source`, or `translate` with `bridge` and `steps=0`",
    source: str | None = None,
) -> None:
    """
    Args:
        adapter, revision: Folder or hub id, and hub revision.
        remedy: What to do with an adapter whose kernels cannot be read.
        source (`str`, *optional*): What the bridge's source is called, if it is for one.

    Raises:
        ValueError: If the kernels of an adapter must be measured on the source model, which is not loaded.
    """
    config, named = read_adapter_config(adapter, revision), f"The adapter '{without_secrets(adapter)}'"
    held = holdings_of(config, None)
    if not held.read and held.refused is None:
        if (why := of_another_file(config, read_weights_header(adapter, revision))) is not None:
            raise ValueError(f"{named} {why}.")
        if differ(base := config.base_model_name_or_path, source):
            raise ValueError(
                f"{named} was made for '{without_secrets(base)}', and the bridge leads from '{source}': if that is no "
                f"copy of it under another name, fit a bridge from the adapter's own model, else {remedy}."
            )
        raise ValueError(
            f"{named} ({held.kind}) is no plain LoRA, so its effect must be measured on the "
            f"source model's weights, which are not loaded from file to file: {remedy}."
        )


def _from_names(config: PeftConfig) -> tuple[dict[str, tuple[Fate, int | None, float | None]], list[tuple[str, str]]]:
    """What the configuration alone says: modules by the names in it."""
    targets = getattr(config, "target_modules", None)
    names = [targets] if isinstance(targets, str) else sorted(targets or ())
    rest = [(name, SAVED) for name in getattr(config, "modules_to_save", None) or ()]
    rest += [(name, on_a("Embedding")) for name in names if name.rpartition(".")[2].startswith(("embed_", "wte"))]
    rest += [(name, HEAD) for name in names if name.rpartition(".")[2] in _HEADS]
    if type_of(config) in ELSEWHERE:
        return {}, [*rest, *((name, ELSEWHERE[type_of(config)]) for name in names)]
    if getattr(config, "trainable_token_indices", None):
        rest.append(("the embeddings", TOKENS))
    rest += _by_options(config)
    if getattr(config, "bias", "none") not in ("none", False, True) or getattr(config, "lora_bias", False):
        rest.append((EVERYWHERE, BIAS))
    for parameter in getattr(config, "target_parameters", None) or ():
        module, _, name = parameter.rpartition(".")
        if name == "weight":
            names.append(module)
        else:
            rest.append((module, on_parameter(name)))
    elsewhere = {name for name, _ in rest}
    rank = getattr(config, "r", None)
    return {name: _fate(config, rank) for name in names if name not in elsewhere}, rest


def _from_header(
    config: PeftConfig, header: Mapping[str, TensorInfo]
) -> tuple[dict[str, tuple[Fate, int | None, float | None]], list[tuple[str, str]]]:
    """What the tensors of the file are."""
    ranks: dict[str, int | None] = {}
    rest: dict[tuple[str, str], None] = {}
    # PEFT writes them in any order.
    parameters = [where.rpartition(".") for where in sorted(getattr(config, "target_parameters", None) or ())]
    for key, info in header.items():
        module, own = _split(config, key)
        if module is None:
            continue
        base = module.replace(".base_layer", "").removesuffix(".token_adapter")
        what = _what(config, base, own, info, parameters)
        if what is not None:
            rest.update(dict.fromkeys((name, one) for name, one in what))
        else:
            ranks[base] = max(ranks.get(base) or 0, _rank_of(own, info)) or None
    kernels = {name: _fate(config, rank or getattr(config, "r", None)) for name, rank in ranks.items()}
    return kernels, [*rest, *_by_options(config)]


def _split(config: PeftConfig, key: str) -> tuple[str | None, list[str]]:
    """The module of a tensor and the tuner's own part of its name, `[""]` for one of the base model's own.

    No module for what the modules share (VeRA's projections).
    """
    parts = key.removeprefix(PREFIX).split(".")
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) or "\0"
    for number, part in enumerate(parts):
        if part.startswith((prefix, "lora_", "trainable_tokens_")):
            module, own = ".".join(parts[:number]), parts[number:]
            break
    else:
        module, own = ".".join(parts[:-1]), ["", parts[-1]]
    return None if module in ("", "base_model") else module, own


def _what(
    config: PeftConfig, module: str, own: list[str], info: TensorInfo, parameters: list[tuple[str, str, str]]
) -> list[tuple[str, str]] | None:
    """What no kernel expresses of a tensor; `None` if it belongs to a kernel, or says nothing."""
    kind, last = type_of(config), module.rpartition(".")[2]
    if own[0] == "":
        return _of_the_base(config, module, own[1])
    if own[0].startswith("trainable_tokens_"):
        return [(module, TOKENS)]
    if kind in ELSEWHERE:
        return [(module, ELSEWHERE[kind])]
    if "_embedding_" in own[0]:
        return [(module, on_a("Embedding"))]
    wrapped = [name for where, _, name in parameters if f".{module}".endswith(f".{where}") and name != "weight"]
    if wrapped:
        return [(module, on_parameter(name)) for name in wrapped]
    if _EXPERT.search(module):
        return [(module, "adapter on an expert")]
    if split_name(module) is None or sees_or_hears(module):
        return [(module, HEAD if last in _HEADS else outside(module))]
    if own[0] == "lora_A" and len(info.shape) > 2:
        return [(module, on_a(f"Conv{len(info.shape) - 2}d"))]
    return [(module, BIAS)] if own[-1] == "bias" else None


def _of_the_base(config: PeftConfig, module: str, parameter: str) -> list[tuple[str, str]] | None:
    saved = getattr(config, "modules_to_save", None) or ()
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        if name.endswith(tuple(saved)):
            return [(name, SAVED)]
    if parameter == "bias":
        return [(module, BIAS)]
    return [(module, BASE)]


def _by_options(config: PeftConfig) -> list[tuple[str, str]]:
    rest = [(EVERYWHERE, ALORA)] if getattr(config, "alora_invocation_tokens", None) else []
    return rest + ([(EVERYWHERE, BIAS)] if getattr(config, "projection_bias", False) else [])


def _rank_of(own: list[str], info: TensorInfo) -> int:
    """The rank of a LoRA's A (r, in); of CAST's kernels the largest, of which a module has one or more."""
    is_a = own[0] == "lora_A" or (own[0] == "peft_cast_kernels" and own[-1] == "A")
    return info.shape[0] if is_a and info.shape else 0


def _fate(config: PeftConfig, r: Any) -> tuple[Fate, int | None, float | None]:
    rank = rank_of_change(config, r) if isinstance(r, int) else (0 if rank_of_change(config, 1) == 0 else None)
    cut = default_rank(config)
    if rank is None:
        return "measured", cut, None
    if is_read(config) or 0 < rank <= max(EXACT_UP_TO, cut):
        return "exact", rank, None
    return "approximated", cut, None


def _ranks(config: PeftConfig, header: Mapping[str, TensorInfo] | None) -> Iterator[int]:
    """The ranks of the modules, by the file, else by the configuration."""
    if header is not None:
        found = [_rank_of(own, info) for key, info in header.items() for _, own in (_split(config, key),)]
        if any(found):
            yield from filter(None, found)
            return
    if isinstance(r := getattr(config, "r", None), int):
        yield r
    patterns = getattr(config, "rank_pattern", None) or {}
    yield from (rank for rank in patterns.values() if isinstance(rank, int))
    if isinstance(config, CastConfig):
        yield from (spec.r for specs in (config.kernels or {}).values() for spec in specs)


def _unknown_kind(adapter: str | Path, revision: str | None) -> dict[str, Any] | None:
    """The configuration of an adapter whose type the installed PEFT does not know."""
    with suppress(Exception):  # `read_adapter_config` says what is wrong with any other
        values = read_json(find_file(adapter, CONFIG_NAME, revision))
        if is_name(values.get("peft_type"), 80) and values["peft_type"] not in PEFT_TYPE_TO_CONFIG_MAPPING:
            return values
    return None


def _of_unknown(values: Mapping[str, Any]) -> Holdings:
    def text(name: str) -> str | None:
        return without_secrets(values[name]) if is_name(values.get(name)) else None

    kind = without_secrets(values["peft_type"])
    known = {name: shown(value) for name, value in values.items() if value not in (None, False, [], {}, "")}
    options = {name: without_secrets(value) for name, value in list(known.items())[:40] if is_name(name, 80)}
    for name in ("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"):
        options.pop(name, None)
    why = f"is of type {kind}, which the installed PEFT does not know: update PEFT"
    ranks = (values["r"],) if isinstance(values.get("r"), int) else ()
    return Holdings(
        kind,
        options,
        ranks,
        (),
        text("task_type"),
        text("base_model_name_or_path"),
        text("revision"),
        read=False,
        refused=why,
        is_known=False,
    )
