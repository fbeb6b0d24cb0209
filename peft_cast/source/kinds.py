"""What PEFT's kinds of adapters are to a translation, as a configuration tells: refused, read, measured or cut."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import LoraConfig, PeftConfig

from ..align import sees_or_hears
from ..tuner import CastConfig
from ..tuner.checks import with_article


# A measured delta whose rank is at most EXACT_UP_TO is kept whole, any other is cut to DEFAULT_RANK or twice the
# LoRA's.
EXACT_UP_TO, DEFAULT_RANK = 64, 16
# What is said of the parts of an adapter that no kernel expresses; `EVERYWHERE` stands for a module's name.
SAVED = "module trained in full (modules_to_save)"
TOKENS = "trained tokens"
BIAS = "trained bias"
BASE = "weights of the base model in the adapter's file"
HEAD = "adapter on the output head"
OUTSIDE = "adapter outside the layers"
UNHEARD = "a part that no text passes through (vision, audio)"
TOWER = f"adapter on {UNHEARD}"
ALORA = "activation after the invocation tokens only (aLoRA)"
EVERYWHERE = "every adapted module"
# What PEFT puts before the names of a model's own modules.
PREFIX = "base_model.model."
# Task types that name no head of their own and that people write on decoders.
MISNAMED = ("SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "QUESTION_ANS")
# Methods whose effect is no fixed change of weights.
_NO_DELTA = {
    "XLORA": "mixes other adapters token by token",
    "POLY": "needs task ids",
    "LILY": "routes by its input and is not linear in the module's input",
}
# What PEFT calls the initializations of a LoRA, or what their names begin with.
_STARTS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "lora_ga", "orthogonal", "mica")
# The rank of a method's weight change is a power of its `r`; that of others in `_FULL` is full, of the rest unknown.
_POWERS = {"ADALORA": 1, "LOHA": 2, "VERA": 1, "HRA": 1, "DELORA": 1, "MISS": 1, "VBLORA": 1, "TINYLORA": 1}
_FULL = ("IA3", "LOKR", "OFT", "BOFT", "FOURIERFT", "RANDLORA", "SHIRA", "HIRA", "C3A", "WAVEFT")
# Methods that train something else than the weights of linear layers, whatever they are put on.
ELSEWHERE = {"LN_TUNING": "adapter on a normalization layer", "BEFT": BIAS, "TRAINABLE_TOKENS": TOKENS}


def on_a(layer: Any) -> str:
    """What is said of an adapter on a layer that is none of the linear ones, by the name of its class."""
    return f"adapter on {with_article(layer)}"


def outside(module: str) -> str:
    """What is said of an adapter on a linear layer outside the decoder's layers, by the layer's name."""
    return TOWER if sees_or_hears(module) else OUTSIDE


def beside_text(what: str, module: str) -> str:
    """What is said of a part of an adapter, also where it lies in a module that no text passes through."""
    if not sees_or_hears(module) or what.endswith(UNHEARD):
        return what
    return TOWER if what.startswith("adapter") else f"{what}, in {UNHEARD}"


def on_parameter(name: str) -> str:
    return f"adapter on the parameter '{name}' (target_parameters)"


def type_of(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def kind_of(config: PeftConfig) -> str:
    """`"LORA"`, or `"LORA (use_dora)"` with the options PEFT marks as variants and the initialization, if any is
    named.
    """
    options = variants_of(config)
    start = getattr(config, "init_lora_weights", None)
    options += [str(start)] if isinstance(start, str) else []
    return type_of(config) + (f" ({', '.join(options)})" if options else "")


def called(config: PeftConfig) -> str:
    """What an adapter is called where the modules that it is on are named."""
    return "LoRA" + kind_of(config).removeprefix("LORA") if type_of(config) == "LORA" else kind_of(config)


def variants_of(config: PeftConfig) -> list[str]:
    """The options that make a LoRA more than one, as PEFT marks them."""
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]


def default_rank(config: PeftConfig) -> int:
    """Room for a LoRA's own directions and as many of what its variant (DoRA, PiSSA) changes besides."""
    return max(DEFAULT_RANK, 2 * config.r) if isinstance(config, LoraConfig) else DEFAULT_RANK


def kept_rank(exact: float, rank: int | None, default: int) -> int:
    """To which rank a delta of the rank `exact` is cut, given `source_rank` as a number and the default."""
    if rank is None:
        return int(exact) if exact <= max(EXACT_UP_TO, default) else default
    return int(min(rank, exact))


def rank_of_change(config: PeftConfig, r: int) -> int | None:
    """The rank that a module's weight change has at most, of an adapter whose module has the rank `r`.

    0 if it is full, `None` if only measuring tells.
    """
    kind, variants = type_of(config), variants_of(config)
    if "use_dora" in variants or kind in _FULL or getattr(config, "init_weights", None) == "bat":
        return 0
    if "arrow_config" in variants:
        return None
    if kind == "LORA":
        return 2 * r if changes_weights(config) else r
    if isinstance(config, CastConfig):
        return r
    return r ** _POWERS[kind] if kind in _POWERS else None


def is_read(config: PeftConfig) -> bool:
    """Whether kernels can be read from the file; else they are measured on the source model's weights."""
    plain = set(variants_of(config)) <= {"alora_invocation_tokens"} and _start(config) != "mica"
    return type_of(config) == "LORA" and plain and not changes_weights(config)


def changes_weights(config: PeftConfig) -> bool:
    """Whether PEFT changes the base weights when it puts the adapter on a model, in a way that is always the same."""
    return _start(config) in ("pissa", "olora") or bool(getattr(config, "kasa_config", None))


def _start(config: PeftConfig) -> str:
    start = getattr(config, "init_lora_weights", None)
    return start.lower() if isinstance(start, str) else ""


def refusal(config: PeftConfig, in_memory: bool = False) -> str | None:
    """Why an adapter cannot be translated, as its configuration tells, and what to do: what follows "it" in a
    sentence, without the stop. `None` if nothing speaks against it.
    """
    kind = type_of(config)
    if config.is_prompt_learning or config.is_adaption_prompt:
        return (
            f"is of type {kind}, which adds virtual tokens and changes no weight, so there is nothing to carry over: "
            "only adapters that change linear layers can be translated"
        )
    if kind in _NO_DELTA:
        return (
            f"is of type {kind}, which {_NO_DELTA[kind]}, so it is no fixed change of weights and cannot be "
            "translated: translate one plain adapter at a time"
        )
    if isinstance(config, CastConfig) and config.projection_type == "mlp":
        return (
            "has nonlinear projections (mlp), so its effect is not linear in the module's input and cannot be "
            "translated: translate the LoRA that it was made of"
        )
    if (why := _other_task(config)) is not None:
        return f"{why}: only adapters of causal language models can be translated"
    if in_memory and changes_weights(config):
        return _on_changed_weights(config, "save it with `save_pretrained(folder)` and pass the folder")
    return _on_lost_weights(config, "source")


def refusal_to_run(config: PeftConfig, in_memory: bool = False) -> str | None:
    """Likewise why an adapter cannot be run on a target as it is, to be evaluated."""
    kind = type_of(config)
    if config.is_prompt_learning or config.is_adaption_prompt:
        return (
            f"is of type {kind}, which adds virtual tokens and changes no weight: only adapters that change weights "
            "can be evaluated"
        )
    if kind in ("XLORA", "POLY"):
        return f"is of type {kind}, which {_NO_DELTA[kind]}: evaluate one plain adapter at a time"
    if (why := _other_task(config)) is not None:
        return f"{why}: only adapters of causal language models can be evaluated"
    return None if in_memory else _on_lost_weights(config, "target")


def _other_task(config: PeftConfig) -> str | None:
    if config.task_type in (None, "CAUSAL_LM", *MISNAMED):
        return None
    return f"was trained for the task type {config.task_type}, whose head a causal language model has not"


def _on_lost_weights(config: PeftConfig, which: str) -> str | None:
    """Of an initialization that changes the base weights in another way each time, or that nobody knows."""
    start = _start(config)
    if start and not start.startswith(_STARTS):
        return (
            f"names the initialization '{start[:80]}', which PEFT does not know: correct `init_lora_weights` in "
            "adapter_config.json (true, if the file holds the trained weights)"
        )
    if not start.startswith(("pissa_niter", "corda", "lora_ga", "loftq")):
        return None
    return _on_changed_weights(
        config,
        "save it with `save_pretrained(folder, path_initial_model_for_weight_conversion=...)`, which makes it a plain "
        f"LoRA, or set `init_lora_weights` to true in its configuration and pass the changed model as `{which}`",
    )


def _on_changed_weights(config: PeftConfig, remedy: str) -> str:
    return (
        f"is relative to base weights that its initialization ({_start(config) or 'kasa'}) changed, and what they "
        f"were before is not known here: {remedy}"
    )
