"""Which setting of a configuration is not that of its file, in words that name it, or that it is another model's."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

from peft import AdaLoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from ..tuner.checks import number_of, shown
from ..utils import differ, unnamed, without_secrets
from .kinds import PREFIX, variants_of
from .names import BRIDGED, Match, Part


_SIZE_MISMATCH = re.compile(r"size mismatch for (\S+): .*, the shape in current model is torch.Size\(\[(.*?)\]\)")
# Settings that decide on the shapes of an adapter's tensors.
_SIZES = tuple(
    "r oft_block_size boft_block_size block_size n_frequency num_vectors vector_length decompose_factor".split()
)
_EXPERTS = ("experts",)  # modules whose parameters `target_parameters` means


def unsaved(match: Match) -> str | None:
    """Whether a module of the model that the configuration says was saved whole is not in the file."""
    names = tuple(getattr(match.config, "modules_to_save", None) or "\0")
    held = {match.module(head, part) for part in match.parts for head in match.heads.get(match.reduced(part.head), [])}
    for name in match.modules:
        if name.endswith(names) and not any(other and f"{other}.".startswith(f"{name}.") for other in held):
            return (
                f"its configuration and its file disagree: `modules_to_save` in adapter_config.json means '{name}', "
                "and no tensor of the file is of it: correct `modules_to_save`, or get both files again"
            )
    return None


def passed_over(match: Match) -> str | None:
    """Which modules and parameters the configuration names beside `target_modules` that the model does not have."""
    own = {"modules_to_save": match.modules, "target_parameters": dict(match.source.named_parameters())}
    for option, names in own.items():
        for name in getattr(match.config, option, None) or ():
            if not any(one.endswith(name) for one in names):
                return (
                    f"`{option}` in adapter_config.json names '{name[:80]}', which {match.model} does not have: it is "
                    "passed over. Correct it if that is a part of the adapter."
                )
    return None


def made_anew(match: Match) -> str | None:
    """Whether the projections that an adapter's modules share are not in its file."""
    if getattr(match.config, "save_projection", True):
        return None
    return (
        "`save_projection` in adapter_config.json is false, so its projections are made anew from "
        "`projection_prng_key`: where another version of PEFT or PyTorch made others, it computes something else."
    )


def left_open(match: Match) -> str | None:
    """Whether the configuration does not say how the adapter is scaled."""
    name = next((name for name in unnamed(match.config) if name != "r"), None)
    return name and (
        f"adapter_config.json names no `{name}`: PEFT's default, {getattr(match.config, name)}, is taken. Add it, if "
        "the adapter was trained with another."
    )


def _from_front(module: str) -> list[str]:
    """The names of the modules around a tensor, the outermost first."""
    steps = module.split(".")
    return [".".join(steps[:count]) for count in range(1, len(steps) + 1)]


def other_tokens(match: Match) -> str | None:
    """Whether the trained tokens are others than the configuration says, or none of the model's."""
    if not match.is_lora:
        return None
    chosen = match.config.trainable_token_indices
    lists = list(chosen.values()) if isinstance(chosen, dict) else [chosen] if chosen else []
    for name in chosen if isinstance(chosen, dict) else ():
        if not any(module.endswith(name) for module in match.modules):
            return (
                f"`trainable_token_indices` in adapter_config.json names the module '{name[:80]}', which "
                f"{match.model} does not have: correct it"
            )
    rows = max(match.vocabulary.values(), default=0)
    if lists and not all(isinstance(token, int) and 0 <= token < rows for tokens in lists for token in tokens):
        return (
            f"`trainable_token_indices` in adapter_config.json names tokens that are not among the {rows} of "
            f"{match.model}: correct it, or "
            + ("fit a bridge from" if match.which == BRIDGED else f"pass as `{match.which}`")
            + " the model with the embeddings that it was trained with"
        )
    for part in match.parts:
        trained = any("trainable_tokens_" in step for step in part.inner)
        if trained and part.shape[:1] not in {(len(tokens),) for tokens in lists}:
            return (
                f"its configuration and its file disagree: {part.named} is in the file, and "
                f"`trainable_token_indices` in adapter_config.json names {number_of(sum(map(len, lists)), 'token')}: "
                "correct it, or get both files again"
            )
    return None


def other_shape(match: Match) -> str | None:
    """Whether a weight of the model's own is in the file in another shape than the model's."""
    own = {name: tuple(p.shape) for name, p in match.source.named_parameters() if p.is_floating_point()}
    for part in match.parts:
        modules = (match.module(head, part) for head in match.heads.get(match.reduced(part.head), []))
        shapes = {own.get(f"{module}.{part.inner[-1]}", part.shape) for module in modules if module}
        if shapes and part.shape not in shapes and not any(step.startswith(match.prefix) for step in part.inner):
            return needless(match, part, f"{match.model} has {min(shapes)} there")
    return None


def needless(match: Match, part: Part, why: str) -> str:
    """What to do about one tensor that does not fit where all others do."""
    same = str(match.config.base_model_name_or_path) == str(match.source.name_or_path)
    remedy = "get the file again" if same else other_model(match)
    return (
        f"{part.named} is in its file, and {why}: delete it from the file, if the adapter does not need it, else "
        f"{remedy}"
    )


def other_rank(match: Match) -> str | None:
    """Whether the matrices have another rank than the configuration says."""
    config = match.config
    if not match.is_lora or isinstance(config, AdaLoraConfig) or getattr(config, "target_parameters", None):
        return None
    for part in match.parts:
        if not {"lora_A", "lora_embedding_A"} & {*part.inner} or len(part.shape) != 2:
            continue
        if part.is_expert or part.tail[-1:] == _EXPERTS:
            continue
        name = ".".join(part.head[2:] + part.tail)
        key = get_pattern_key(config.rank_pattern, name)
        rank = config.rank_pattern.get(key, config.r)
        if part.shape[0] != rank and key not in config.rank_pattern and "r" in unnamed(config):
            return (
                f"its configuration names no rank, for which PEFT takes {rank}, and {part.named} has "
                f"{part.shape[0]}: add `r` to adapter_config.json"
            )
        if part.shape[0] != rank:
            return (
                f"its configuration says rank {rank} for '{name}' and {part.named} has {part.shape[0]}: correct "
                "`r` or `rank_pattern` in adapter_config.json, or get both files again"
            )
    return None


def other_masks(match: Match) -> str | None:
    """Whether what AdaLoRA keeps of the ranks is not what is in the file."""
    masks = getattr(match.config, "rank_pattern", None) if isinstance(match.config, AdaLoraConfig) else None
    rows = {".".join(part.head[2:] + part.tail): part.shape[0] for part in match.parts if part.inner == ("lora_E",)}
    for name, mask in (masks or {}).items():
        module = name.removesuffix(".lora_E")
        if not isinstance(mask, list) or rows.get(module) != sum(mask):
            return (
                f"`rank_pattern` in adapter_config.json keeps {shown(mask)} of '{name[:200]}', and its file has "
                f"{rows.get(module, 'none')} for it: correct `rank_pattern`, or get both files again"
            )
    return None


def of_experts(match: Match, extra: Sequence[str], absent: Sequence[str]) -> str | None:
    """Whether tensors on a model's experts, which `target_parameters` means, are not those in the file."""
    key = next((key for key in (*extra, *absent) if _module_of(match, key).split(".")[-1:] == [*_EXPERTS]), None)
    if key is None:
        return None
    there, by = ("is", "not ") if key in extra else ("is not", "")
    return (
        f"its configuration and its file disagree: by `target_parameters` in adapter_config.json, "
        f"{shown(match.config.target_parameters)}, '{key[:200]}' would {by}be in the file, and it {there}: correct "
        "`target_parameters`, or get both files again"
    )


def incomplete(match: Match, extra: Sequence[str], absent: Sequence[str], found: Collection[str]) -> str | None:
    """Whether the file lacks some of the tensors on a module that it has others of."""
    held = {_module_of(match, key) for key in found}
    key = next((key for key in absent if not extra and _module_of(match, key) in held), None)
    if key is None:
        return None
    return (
        f"its file is cut: '{key[:200]}' is in the model, not in the file, while others of its module are there: get "
        "the file again"
    )


def foreign(match: Match, extra: Sequence[str], absent: Sequence[str]) -> str:
    """Why a file has tensors on modules that `target_modules` means, for which the configuration has none such."""
    variants = variants_of(match.config)
    names = variants or [name for name in ("rank_pattern", *_SIZES) if _is_set(match, name)]
    instead = next((key for key in absent if _module_of(match, key) == _module_of(match, extra[0])), None)
    why = f"where '{instead[:200]}' would be" if instead else "and PEFT has no such tensor for it"
    remedy = "delete them from the file"
    if instead or variants:
        remedy = f"correct {' or '.join(f'`{name}`' for name in names)} in adapter_config.json"
    many = number_of(len(extra), "such tensor")
    return f"'{extra[0][:200]}' is in its file, {why}; {many}: {remedy}, or get both files again"


def _module_of(match: Match, key: str) -> str:
    """The module that one of the adapter's tensors is on."""
    return key.partition(f".{match.prefix}")[0].removesuffix(".base_layer")


def _is_set(match: Match, name: str) -> bool:
    return bool(getattr(match.config, name, None))


def limits_of(config: PeftConfig, key: str) -> str | None:
    """The options that keep `target_modules` from a module that they mean, which a tensor of the file is on."""
    limits = [name for name in ("exclude_modules", "layers_to_transform") if getattr(config, name, None)]
    alone = copy.copy(config)
    for name in limits:
        setattr(alone, name, None)
    return " or ".join(f"`{name}`" for name in limits) if limits and is_meant(alone, key) else None


def is_meant(config: PeftConfig, key: str) -> bool:
    """Whether `target_modules` means a module that a tensor is on."""
    targets, names = getattr(config, "target_modules", None), _from_front(key.removeprefix(PREFIX))
    return targets == "all-linear" or bool(targets and any(check_target_module_exists(config, n) for n in names))


def other_sizes(match: Match, said: str) -> str | None:
    """Whether what PEFT says of sizes comes of matrices that are transposed, or of a setting, not of another model."""
    parts = {part.key: part for part in match.tuned}
    pairs: list[tuple[Part, tuple[int, ...]]] = []
    for key, shape in _SIZE_MISMATCH.findall(said):
        steps = key.split(".")  # one of them is the adapter's name
        names = [".".join(steps[:at] + steps[at + 1 :]) for at in range(len(steps))]
        names += [name.removesuffix(".weight") for name in names]  # DoRA's magnitudes are saved without
        if part := next((parts[name] for name in names if name in parts), None):
            pairs.append((part, tuple(map(int, filter(None, shape.split(","))))))
    if not pairs:
        return None
    part, wanted = pairs[0]
    is_ia3 = hasattr(match.config, "feedforward_modules")  # whose vectors are of a module's inputs or of its outputs
    if all(one.shape == shape[::-1] for one, shape in pairs) and (not is_ia3 or len(pairs) == len(parts)):
        return transposed(part)
    if all([n for n in one.shape if n != 1] == [n for n in shape if n != 1] for one, shape in pairs):
        return f"{part.named} is in its file, and PEFT wants it of shape {wanted}: reshape it, or get the file again"
    widths = {width for head in match.heads[match.reduced(part.head)] for width in widths_of(match, head, part)}
    patterns = (getattr(match.config, "rank_pattern", None) or {}).values()
    ranks = {getattr(match.config, "r", None), *(rank for rank in patterns if isinstance(rank, int))}
    wider = {new for old, new in zip(part.shape, wanted) if old != new} & widths - ranks
    names = ["feedforward_modules"] if is_ia3 else [name for name in _SIZES if _is_set(match, name)]
    names = ["init_r"] if isinstance(match.config, AdaLoraConfig) else names  # which `r` says nothing of
    if not names or (not widths & {*part.shape} if is_ia3 else wider):
        return None
    named = " or ".join(f"`{name}`" for name in names)
    by, remedy = f"{named} in adapter_config.json", f"correct {named}"
    if names[0] in unnamed(match.config):
        by, remedy = f"PEFT's default of {named}, which adapter_config.json does not name,", f"add `{names[0]}`"
    return (
        f"its configuration and its file disagree: {part.named} is in the file, and by {by} its shape would be "
        f"{wanted}: {remedy}, or get both files again"
    ) + ("" if {*wanted} & widths else f" (if they are right, {other_model(match)})")


def widths_of(match: Match, head: tuple[str, ...], part: Part) -> tuple[int, ...]:
    return match.modules.get(match.module(head, part) or "") or ()


def transposed(part: Part) -> str:
    return (
        f"its matrices are transposed ({part.named}), as other tools than PEFT save them: transpose them, or convert "
        "the file to PEFT's format with the tool that made it"
    )


def warn_of_base(adapter: str | Path, match: Match) -> None:
    """Warn of an adapter that may name another model than the one it is put on: base, instruction-tuned and newer
    models of one family have equal shapes, so nothing else would tell.
    """
    named, own = match.config.base_model_name_or_path, match.source.name_or_path
    if differ(named, own):
        warnings.warn(
            without_secrets(
                f"The adapter '{adapter}' names '{named}' as its model, and the {match.which} model is called "
                f"'{own}': if that is no copy of it under another name, {other_model(match)}."
            )
        )


def other_model(match: Match) -> str:
    """What to do when the adapter belongs to another model."""
    named, which = match.config.base_model_name_or_path, match.which
    other = named and str(named) != str(match.source.name_or_path)
    if which == BRIDGED:
        revision = "" if other or not named else ", at the revision that it belongs to"
        return f"fit a bridge from the model that it was trained on{f', {named!r}' if other else revision}"
    if other:
        return f"it was trained on '{named}', pass that as `{which}`"
    if named:
        return (
            "the adapter names this very model, so pass the revision of it that the adapter belongs to, as "
            f"`{which}` or by `{which}_revision`"
        )
    return f"pass the model that it was trained on as `{which}`"
