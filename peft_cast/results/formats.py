"""What the formats of a folded LoRA for other programs have in common."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PretrainedConfig


INSTEAD = "write a LoRA folder (`save_pretrained`), or merge the adapter into the model and convert that"


def check_type(config: PretrainedConfig | None, known: Collection[str], written: str) -> None:
    """
    Args:
        config: Of the target model; `None` passes, where it is not known yet.
        known: transformers' `model_type` of the models whose LoRAs are written.
        written (`str`): How they are: "as GGUF".

    Raises:
        ValueError: If the target is none of these.
    """
    if config is not None and config.model_type not in known:
        raise ValueError(
            f"A LoRA of a '{config.model_type}' model is not written {written}, only of {', '.join(known)}: {INSTEAD}."
        )
