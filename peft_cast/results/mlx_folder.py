"""A folded LoRA as mlx-lm's loader takes adapters (`mlx_lm.tuner.utils.load_adapters`,
https://github.com/ml-explore/mlx-lm): `adapters.safetensors` and an `adapter_config.json` of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME
from transformers import PretrainedConfig

from ..utils import check_place, complete_folder, write_json, write_tensors
from .formats import INSTEAD, check_type


MLX_WEIGHTS_NAME = "adapters.safetensors"
# transformers' `model_type` of models whose modules have the same names in mlx-lm. Each was run with mlx-lm
# (docs/serving.md). A LoRA for others would not load there, or on the wrong modules.
MODEL_TYPES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "starcoder2",
)
_IN_LAYER = re.compile(r".*\.layers\.\d+\.(.+)")


def check_mlx(folder: str | Path, config: PretrainedConfig | None = None) -> Path:
    """Refuse, before the work, what will not become a folder for mlx-lm.

    Args:
        folder: Where it shall be written.
        config: Of the target model, where it is known already.

    Returns:
        `Path`: The folder, see `as_place`.

    Raises:
        ValueError: If the folder holds something else, or the target's architecture is none of `MODEL_TYPES`.
        OSError: If nothing can be written there.
    """
    check_type(config, MODEL_TYPES, "for MLX")
    return check_place(folder, kind="MLX")


def write_mlx(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    config: PretrainedConfig,
    folder: str | Path,
    about: Mapping[str, str],
) -> None:
    """Write a LoRA, one rank for all modules and scaling 1, in the precision that it has.

    mlx-lm has one rank and one scale for all modules too. It puts a LoRA on a module of every layer or of none: where
    there is none to load it stays at zero.

    Args:
        factors: By the full name of the module `A` (r, in) and `B` (out, r); mlx-lm keeps both transposed.
        config: Of the target model.
        folder: Its files appear together, once all are written.
        about (`dict[str, str]`): Further entries of the configuration, which mlx-lm does not read.

    Raises:
        ValueError: See `check_mlx`; if mlx-lm has no module for a part.
        OSError: If the folder cannot be written.
    """
    folder = check_mlx(folder, config)
    if "lm_head" in factors and getattr(config, "tie_word_embeddings", False):
        raise ValueError(
            f"mlx-lm has no module 'lm_head' of a model with tied embeddings, so no LoRA there: {INSTEAD}."
        )
    within = (_IN_LAYER.fullmatch(name) for name in factors)
    keys = sorted({match[1] if match else name for name, match in zip(factors, within)})
    rank = len(next(iter(factors.values()))[0])
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    with complete_folder(folder) as partial:
        tensors: dict[str, torch.Tensor] = {}
        for name, (A, B) in factors.items():
            tensors |= {f"{name}.lora_a": A.T.contiguous(), f"{name}.lora_b": B.T.contiguous()}
        write_tensors(tensors, partial / MLX_WEIGHTS_NAME, format="mlx")
        mlx = {"fine_tune_type": "lora", "num_layers": config.num_hidden_layers, "lora_parameters": parameters}
        write_json({**about, **mlx}, partial / CONFIG_NAME)
