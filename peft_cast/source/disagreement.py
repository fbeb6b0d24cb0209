"""Which setting of a configuration is not that of its file: one sentence that names it."""

from __future__ import annotations

import copy

from peft import AdaLoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from .kinds import PREFIX
from .names import Match


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
            f"{match.model}: correct it, or pass the model with the embeddings that it was trained with as `source`"
        )
    for part in match.parts:
        trained = any("trainable_tokens_" in step for step in part.inner)
        if trained and part.shape[:1] not in {(len(tokens),) for tokens in lists}:
            return (
                f"its configuration and its file disagree: {part.named} is in the file, and "
                f"`trainable_token_indices` in adapter_config.json names {sum(map(len, lists))} tokens: correct it, "
                "or get both files again"
            )
    return None


def other_rank(match: Match) -> str | None:
    """Whether the matrices have another rank than the configuration says."""
    config = match.config
    if not match.is_lora or isinstance(config, AdaLoraConfig) or getattr(config, "target_parameters", None):
        return None
    for part in match.parts:
        if not {"lora_A", "lora_embedding_A"} & {*part.inner} or len(part.shape) != 2 or part.is_expert:
            continue
        name = ".".join(part.head[2:] + part.tail)
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        if part.shape[0] != rank:
            return (
                f"its configuration says rank {rank} for '{name}' and {part.named} has {part.shape[0]}: correct "
                "`r` or `rank_pattern` in adapter_config.json, or get both files again"
            )
    return None


def limits_of(config: PeftConfig, key: str) -> str | None:
    """The options that keep `target_modules` from a module that they mean, which a tensor of the file is on."""
    limits = [name for name in ("exclude_modules", "layers_to_transform") if getattr(config, name, None)]
    alone = copy.copy(config)
    for name in limits:
        setattr(alone, name, None)
    meant = any(check_target_module_exists(alone, name) for name in _from_front(key.removeprefix(PREFIX)))
    return " or ".join(f"`{name}`" for name in limits) if limits and meant else None
