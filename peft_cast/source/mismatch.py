"""Why an adapter and a model do not go together: one sentence with the cause, the first tensors, and what to do."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import Any

from peft import AdaLoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists

from ..align import layer_count
from ..models import skeleton
from ..tuner import CastConfig
from ..tuner.checks import number_of, shown
from ..utils import at_fault, said_by
from .disagreement import (
    foreign,
    incomplete,
    is_meant,
    limits_of,
    needless,
    of_experts,
    other_model,
    other_rank,
    other_sizes,
    transposed,
    unsaved,
    widths_of,
)
from .names import BRIDGED, OTHER_TOWERS, ROOT, WITH_NAMES, Match, Part, halves


_ZERO3 = (
    "as when an adapter is saved while ZeRO-3 spreads its weights: save it again with "
    "`stage3_gather_16bit_weights_on_model_save` (accelerate: `zero3_save_16bit_model`), or take the tensors from the "
    "checkpoint with DeepSpeed's `zero_to_fp32.py`"
)


def broken(match: Match) -> str | None:
    """What is wrong with a file whatever the model is, in words that end with the remedy; `None` if nothing is."""
    header = match.header
    if isinstance(match.config, CastConfig):
        return None  # is compared with its configuration elsewhere
    if not header:
        return f"its file holds no tensors, {_ZERO3}"
    tuned = match.tuned
    pruned = isinstance(match.config, AdaLoraConfig)  # leaves modules of rank 0, but not all of them
    if (empty := [part for part in tuned if 0 in part.shape]) and not (pruned and len(empty) < len(tuned)):
        return f"{len(empty)} of its {len(header)} tensors hold nothing ({_named(empty)}), {_ZERO3}"
    matrices = [part for part in tuned if {"lora_A", "lora_B"} & {*part.inner} and part.inner[-1] != "bias"]
    if match.is_lora and (flat := [part for part in matrices if len(part.shape) < 2]):
        return (
            f"{len(flat)} of its {len(header)} tensors should be matrices ({_named(flat)}), as when a training saves "
            "its flattened shards: save it again with the weights gathered (FSDP: `FULL_STATE_DICT`)"
        )
    if len(match.adapter_names) > 1:
        names = ", ".join(f"'{name}'" for name in sorted(match.adapter_names)[:5])
        return (
            f"its file holds several adapters, {names}: save one alone, with "
            "`save_pretrained(folder, selected_adapters=[name])`"
        )
    if match.is_lora and match.twins:
        one, other = match.twins
        return (
            f"'{one.key[:200]}' and {other.named} in its file are the same tensor by their names: delete the one that "
            "does not belong to the adapter"
        )
    if match.is_lora and not any(WITH_NAMES.fullmatch(step) for part in tuned for step in part.inner):
        return (
            f"none of its tensors, {len(header)} in all, is named as PEFT names a LoRA's, ...lora_A.weight "
            f"({_named(match.parts)}): convert the file to PEFT's format with the tool that made it"
        )
    return None


def misplaced(match: Match) -> str | None:
    """Why tensors of a LoRA's file have no place in the model, whatever the configuration says."""
    if (why := broken(match)) or not match.is_lora:
        return why
    if match.layers and max(match.layers) >= (depth := layer_count(match.source)):
        return (
            f"its `layer_replication` speaks of layer {max(match.layers)}, counted from 0, and {match.model} has "
            f"{depth}: correct it in adapter_config.json, or, if it is right, {other_model(match)}"
        )
    if match.layers and _reached(part.key for part in match.parts) >= len(match.layers):
        return _replicated(match, (part.key for part in match.parts))
    if solid := [part for part in match.tuned if len(part.shape) > 2 and _on_linear(match, part)]:
        return (
            f"{len(solid)} of its {len(match.header)} tensors should be matrices ({_named(solid)}): take the further "
            "dimensions from them, or save the adapter again with PEFT"
        )
    if (match.as_it_is or match.read_by_peft or match.renaming) and (match.read_by_peft or not _too_wide(match)):
        return None
    if astray := _astray(match):
        return _lost(match, astray)
    if wide := _too_wide(match):
        part, module = wide[0]
        if all(match.fits(module, part._replace(shape=part.shape[::-1])) for part, module in wide):
            return transposed(part)
        width, height = match.modules[module] or (0, 0)
        return (
            f"{_named([part])} is for another width, '{module}' takes {width} numbers and gives {height}: "
            f"{other_model(match)}"
        )
    return (
        f"{_named(match.parts)} could belong to several modules of {match.model}, or several tensors to one: rename "
        "the tensors to those of `get_peft_model_state_dict`"
    )


def _astray(match: Match) -> list[Part]:
    """Tensors for whose names, whatever the way to the layers, there is no module."""
    astray: list[Part] = []
    for head, group in match.groups.items():
        if not match.is_lora and head == ROOT[:1]:  # what all modules share
            continue
        landing = {
            new: sum(match.module(new, part) is not None for part in group)
            for new in match.heads.get(match.reduced(head), [])
        }
        best = max(landing, key=landing.__getitem__, default=None)
        astray += [part for part in group if best is None or match.module(best, part) is None]
    return astray


def _lost(match: Match, astray: list[Part]) -> str:
    """Why some tensors have no module."""
    remedy = other_model(match)
    experts = [part for part in astray if part.is_expert]
    if experts:
        return _no_room_for(match, experts)
    others = len(match.tuned) - len(astray)
    if len({part.head + part.tail for part in astray}) == 1 and others > 2 and astray[0] in match.tuned:
        return needless(match, astray[0], f"{match.model} has no module for it, while {others} others have theirs")
    deep = [part for part in astray if part.tail and match.heads.get(match.reduced(part.head))]
    stacks = {head for way in {match.reduced(part.head) for part in deep} for head in match.heads[way]}
    depth = max((_layers(match, head) for head in stacks), default=0)
    beyond = [part for part in deep if int(part.tail[0]) >= depth]
    if beyond and len(beyond) == len(astray):
        most = max(int(part.tail[0]) for part in beyond)
        return (
            f"it was made for at least {number_of(most + 1, 'layer')} and {match.model} has {depth} "
            f"({_named(beyond)} is in the file, not in the model; {number_of(len(beyond), 'such tensor')}): {remedy}"
        )
    in_layers = [part for part in astray if part.tail]
    for head in match.stacks:
        if not in_layers or not all(match.module(head, part) for part in in_layers):
            continue
        part = in_layers[0]
        if any(OTHER_TOWERS.search(step) for step in part.head):
            return (
                f"it changes another part of a model, '{'.'.join(part.head)}...' ({_named([part])}), which "
                f"{match.model} does not have: {remedy}"
            )
        old, new = ".".join(part.head), ".".join(("base_model.model", *head))
        return (
            f"its tensors are named '{old}...' ({_named([part])}), which does not say that they are those of "
            f"'{new}...': rename them if they are, else {remedy}"
        )
    if not any(step.startswith(match.prefix) for part in astray for step in part.inner):
        return (
            f"it holds whole modules that {match.model} does not have ({_named(astray)} is in the file, not in the "
            "model), as the head of a classifier or of a reward model: only adapters of causal language models are "
            "translated, so train it without, or delete them from the file and from `modules_to_save`"
        )
    missing = sorted({(part.tail or part.head or (part.key,))[-1] for part in astray})
    has = sorted({name.rpartition(".")[2] for name, size in match.modules.items() if size})
    missing = [name for name in missing if name not in has] or missing  # others may be elsewhere in the model
    return (
        f"it is for a model of another class, with modules named {_list(missing)} ({_named(astray)} is in the file, "
        f"not in the model; {number_of(len(astray), 'such tensor')}), where {match.model} has {_list(has)}: {remedy}"
    )


def resized(match: Match) -> str | None:
    """Whether embeddings or a head in the file have another number of rows than the model's."""
    for part in match.parts:
        modules = {match.module(head, part) for head in match.heads.get(match.reduced(part.head), [])}
        name = next((name for name in match.vocabulary if name in modules), None)
        if name is None or len(part.shape) != 2:
            continue
        tokens, own = match.vocabulary[name], {*part.inner}
        if part.inner[-1] == "weight" and not own & {"lora_A", "original_module"} or "lora_B" in own:
            found = part.shape[0]
        else:
            found = part.shape[1] if "lora_embedding_A" in own else tokens
        if found != tokens:
            trained_on = match.config.base_model_name_or_path
            return (
                f"it was trained with a vocabulary of {found} tokens and {match.model} has {tokens}: load the model "
                f"that it was trained on{f' ({trained_on})' if trained_on else ''}, call "
                f"`resize_token_embeddings({found})` and "
                + (
                    "fit a bridge from it, with the adapter's tokenizer as `source_tokenizer`"
                    if match.which == BRIDGED
                    else f"pass it as `{match.which}`, where texts are read with the adapter's tokenizer as "
                    f"`{match.which}_tokenizer`"
                )
            )
    return None


def deeper(match: Match) -> str | None:
    """Whether a LoRA of all layers meets a model that has more of them."""
    config = match.config
    targets = getattr(config, "target_modules", None)
    if not match.is_lora or not targets or targets == "all-linear" or match.layers:
        return None
    wanted: dict[tuple[str, ...], dict[str, int]] = {}
    for name in match.modules:
        head, tail = halves(name.split("."))
        if tail and check_target_module_exists(config, name):
            wanted.setdefault(head, {})[name] = int(tail[0])
    for head, names in wanted.items():
        parts = [part for part in match.parts if part.tail and match.reduced(part.head) == match.reduced(head)]
        held, reached = {match.module(head, part) for part in parts}, max((int(p.tail[0]) for p in parts), default=-1)
        missing = [name for name in names if name not in held]
        if reached >= 0 and missing and all(names[name] > reached for name in missing):
            return (
                f"it was made for {reached + 1} layers and {match.model} has {_layers(match, head)} ('{missing[0]}' "
                f"is in the model, not in the file): {other_model(match)}"
            )
    return None


def disagreement(match: Match, expected: Collection[str], found: Collection[str]) -> str:
    """Why the tensors that a configuration speaks of are not those of the file, which all have their module.

    Args:
        match: File and model.
        expected: Names of tensors by the configuration, as PEFT would save them.
        found: Names of those in the file.
    """
    if why := other_rank(match) or unsaved(match) or _other_class(match):
        return why
    unpaired = _unpaired(found)
    extra, absent = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    if absent and not extra and all(key.endswith(".bias") and ".lora_" not in key for key in absent):
        return (
            f"its configuration and its file disagree: by `bias` in adapter_config.json '{absent[0][:200]}' would be "
            "in the file, and it is not: correct `bias`, or get both files again"
        )
    if unpaired:
        return (
            f"its file is cut: '{unpaired}' is in the model, not in the file, while its other half is there: get the "
            "file again"
        )
    if (experts := [part for part in match.parts if part.is_expert]) and any(".experts." in key for key in extra):
        return _no_room_for(match, experts)
    if why := of_experts(match, extra, absent) or incomplete(match, extra, absent, found):
        return why
    beyond, reached = [_layer(key) for key in absent], _reached(found)
    if match.layers and not extra and reached >= 0 and min(beyond) > reached:
        return _replicated(match, found)
    if not extra and reached >= 0 and min(beyond) > reached:
        return (
            f"it was made for {number_of(reached + 1, 'layer')} and {match.model} has {max(beyond) + 1} "
            f"('{absent[0][:200]}' is in the model, not in the file): {other_model(match)}"
        )
    targets = getattr(match.config, "target_modules", None)
    named = sorted({part.tail[-1] for part in match.parts if part.tail and match.prefix in ".".join(part.inner)})
    said = shown(sorted(targets) if isinstance(targets, set) else targets)
    if extra and (limits := limits_of(match.config, extra[0])):
        return (
            f"its configuration and its file disagree: '{extra[0][:200]}' is in the file, and {limits} in "
            f"adapter_config.json leaves it out; {number_of(len(extra), 'such tensor')}: correct {limits}"
        )
    if extra and is_meant(match.config, extra[0]):
        return foreign(match, extra, absent)
    if extra:
        return (
            f"its configuration and its file disagree: `target_modules` in adapter_config.json is {said}, and "
            f"'{extra[0][:200]}' is in the file, not in the model that this describes; "
            f"{number_of(len(extra), 'such tensor')}: correct `target_modules`, the file has {_list(named)}"
        )
    return (
        f"its configuration and its file disagree: `target_modules` in adapter_config.json is {said}, and by that "
        f"'{absent[0][:200]}' is in the model, not in the file; {number_of(len(absent), 'such tensor')}: get both "
        f"files again, or correct the configuration, the file has {_list(named)}"
    )


def refused_by_peft(match: Match, error: Exception) -> str | None:
    """Why PEFT could not load a file whose tensors have their modules, from its error; `None` if that is the lack of
    weights on a skeleton.
    """
    said = said_by(error)
    if any(part.is_expert for part in match.parts) and match.read_by_peft:
        return _no_room_for(match, [part for part in match.parts if part.is_expert])
    if why := other_rank(match) or unsaved(match) or _other_class(match):
        return why
    if match.layers and "layers attribute" in said:
        return (
            f"its `layer_replication` repeats layers, which PEFT cannot do in {match.model}: set it to null in "
            f"adapter_config.json, or, if it is right, {other_model(match)}"
        )
    if match.is_lora and "target" in said.lower():
        return disagreement(match, (), [part.key for part in match.parts])
    if isinstance(error, NotImplementedError) and match.source.device.type == "meta":
        return None
    if (why := other_sizes(match, str(error))) is not None:
        return why
    if "size mismatch" in said or "shape" in said:
        remedy = other_model(match)
    else:
        options = [name for name in vars(match.config) if re.search(rf"\b{name}\b", said)]
        named = " or ".join(f"`{name}`" for name in options[:3]) or _at_fault(match) or "its settings"
        remedy = f"correct {named} in adapter_config.json"
    return f"PEFT could not put it there ({said}): {remedy}"


def _at_fault(match: Match) -> str | None:
    """The settings of an adapter with each of which PEFT cannot put it on a model of its model's configuration."""
    fields = dataclasses.fields(match.config)
    given = {field.name: getattr(match.config, field.name) for field in fields}
    start = {"init_lora_weights": False} if match.is_lora else {}  # others may ask for the weights

    def put(settings: dict[str, Any]) -> None:
        base = skeleton(copy.deepcopy(match.source.config))
        get_peft_model(base, type(match.config)(**{**settings, **start}), low_cpu_mem_usage=True)

    return at_fault({name: value for name, value in given.items() if value not in (None, False, [], {})}, put)


def _other_class(match: Match) -> str | None:
    """For adapters that are no LoRA, whose names are looked into only when PEFT could not place them."""
    astray = [] if match.is_lora else _astray(match)
    return _lost(match, astray) if astray else None


def _unpaired(found: Collection[str]) -> str | None:
    """The first half of a LoRA whose other half is there."""
    for key in sorted(found):
        for a, b in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            other = key.replace(f".{a}.", f".{b}.")
            if f".{a}." in key and not key.endswith(".bias") and other not in found:
                return other[:200]
    return None


def _too_wide(match: Match) -> list[tuple[Part, str]]:
    found = []
    for part in match.parts:
        for head in match.heads.get(match.reduced(part.head), [])[:1]:
            module = match.module(head, part)
            if module and not match.fits(module, part):
                found.append((part, module))
    return found


def _no_room_for(match: Match, experts: list[Part]) -> str:
    """PEFT fuses the experts of some models, and only if all the parts that are fused have a LoRA."""
    names = _list(sorted({part.tail[-1] for part in experts}))
    return (
        f"it has a LoRA for each expert ({_named(experts)}), as transformers 4 laid them out, and PEFT cannot put "
        f"them ({names}) on the experts of {match.model}: merge it into its model with transformers 4, or train it "
        "without the experts"
    )


def _replicated(match: Match, found: Iterable[str]) -> str:
    return (
        f"its configuration and its file disagree: `layer_replication` in adapter_config.json makes "
        f"{number_of(len(match.layers), 'layer')}, and the file is for {_reached(found) + 1}: correct "
        "`layer_replication`, or get both files again"
    )


def _on_linear(match: Match, part: Part) -> bool:
    return any(widths_of(match, head, part) for head in match.heads.get(match.reduced(part.head), []))


def _named(parts: Iterable[Part]) -> str:
    return next(iter(parts)).named


def _list(names: list[str]) -> str:
    return ", ".join(f"'{name[:80]}'" for name in names[:8]) + (", ..." if len(names) > 8 else "")


def _layer(name: str) -> int:
    """The number of the layer in a name, -1 without."""
    tail = halves(name.split("."))[1]
    return int(tail[0]) if tail else -1


def _reached(names: Iterable[str]) -> int:
    """The last layer that is named, -1 without."""
    return max(map(_layer, names), default=-1)


def _layers(match: Match, head: tuple[str, ...]) -> int:
    start = len(head)
    found = {name.split(".")[start] for name in match.modules if name.startswith(".".join(head) + ".")}
    return sum(step.isdecimal() for step in found)
