"""A folded LoRA as a GGUF file, which llama.cpp and what builds on it (Ollama, LM Studio) load beside a GGUF model.

The layout is that of llama.cpp's own `convert_lora_to_gguf.py` and of the loader, `src/llama-adapter.cpp`
(https://github.com/ggml-org/llama.cpp). Tensor names come from the map of the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PretrainedConfig

from ..utils import as_place, check_output, replacing
from .formats import INSTEAD, check_type


# By transformers' `model_type`: llama.cpp's architecture, and whether its converter reorders the rows of q and k: what
# rotates together lies half a head apart in transformers and side by side there. Each was run with llama.cpp
# (docs/serving.md). Others are refused: their converter may lay weights out in a way that is not known here.
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3": ("gemma3", False),
    "gemma3_text": ("gemma3", False),
    "gpt2": ("gpt2", False),
    "granite": ("granite", True),
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "mixtral": ("llama", True),
    "olmo2": ("olmo2", False),
    "phi3": ("phi3", False),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "qwen3_moe": ("qwen3moe", False),
    "smollm3": ("smollm3", True),
    "starcoder2": ("starcoder2", False),
}


def check_gguf(file: str | Path, config: PretrainedConfig | None = None) -> Path:
    """Refuse, before the work, what will not become a GGUF LoRA.

    Args:
        file: Where it shall be written.
        config: Of the target model, where it is known already.

    Returns:
        `Path`: The file, see `as_place`.

    Raises:
        ValueError: If the file is a folder or holds something else than a GGUF LoRA, or the target's architecture is
            none of `ARCHITECTURES`.
        OSError: If nothing can be written there.
        ImportError: If the `gguf` package is missing.
    """
    _gguf()
    check_output(file, "file")
    place = as_place(file, "file")
    if place.exists():
        with place.open("rb") as opened:
            head = opened.read(2**16)
        if not head.startswith(b"GGUF") or b"adapter.type" not in head:
            raise ValueError(f"'{place}' holds something else than a GGUF LoRA: write to another file.")
    check_type(config, ARCHITECTURES, "as GGUF")
    return place


def write_gguf(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    config: PretrainedConfig,
    file: str | Path,
    *,
    name: str,
    about: Mapping[str, str],
) -> None:
    """Write a LoRA, one rank for all modules and scaling 1, in the precision that it has.

    Args:
        factors: By the full name of the module `A` (r, in) and `B` (out, r), float32, float16 or bfloat16.
        config: Of the target model.
        file: It appears complete or not at all.
        name (`str`): What llama.cpp calls it when it loads it.
        about (`dict[str, str]`): Further metadata.

    Raises:
        ValueError: See `check_gguf`; if llama.cpp has no tensor for a module, or a value does not fit the precision.
        OSError: If the file cannot be written.
    """
    gguf, file = _gguf(), check_gguf(file, config)
    architecture, _ = ARCHITECTURES[config.model_type]
    tensors = list(_tensors(factors, config, gguf))
    rank = len(next(iter(factors.values()))[0])
    with replacing(file) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))  # llama.cpp scales by alpha / rank
            writer.add_name(name)
            for key, value in about.items():
                writer.add_string(key, value)
            for tensor_name, tensor, kind in tensors:
                writer.add_tensor(tensor_name, tensor, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def _tensors(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], config: PretrainedConfig, gguf: ModuleType
) -> Iterator[tuple[str, Any, Any]]:
    """Name, values as NumPy holds them and type of each tensor of the file."""
    text, (architecture, permutes) = config.get_text_config(), ARCHITECTURES[config.model_type]
    names = {known: number for number, known in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in names:
        raise ValueError(f"This version of the gguf package does not know '{architecture}': pip install -U gguf.")
    mapped = gguf.get_tensor_name_map(names[architecture], text.num_hidden_layers)
    heads = {"q_proj": text.num_attention_heads}
    heads["k_proj"] = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    types = {torch.float32: gguf.GGMLQuantizationType.F32, torch.float16: gguf.GGMLQuantizationType.F16}
    types[torch.bfloat16] = gguf.GGMLQuantizationType.BF16
    # With tied embeddings llama.cpp has no output tensor of its own that a LoRA could change.
    tied = bool(getattr(text, "tie_word_embeddings", False))
    found = {module: mapped.get_name(module.replace("language_model.", "")) for module in factors}
    lacking = [module for module, name in found.items() if name is None or (tied and name == "output")]
    if lacking:
        raise ValueError(
            f"llama.cpp has no tensor for {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''} of a "
            f"'{config.model_type}' model, so no LoRA there: {INSTEAD}."
        )
    for module, (A, B) in factors.items():
        role = module.rpartition(".")[-1]
        if permutes and role in heads:
            B = permuted(B, heads[role])
        for side, factor in (("a", A), ("b", B)):
            kind = types.get(factor.dtype)
            if kind is None or not torch.isfinite(factor).all():
                raise ValueError(
                    f"The LoRA's weights on {module} cannot be written as {str(factor.dtype).removeprefix('torch.')}: "
                    "fold with `dtype` float32 or bfloat16."
                )
            values = factor.float().numpy()
            stored = values.astype("float16") if factor.dtype == torch.float16 else values
            if factor.dtype == torch.bfloat16:
                stored = gguf.quants.quantize(values, kind)
            yield f"{found[module]}.weight.lora_{side}", stored, kind


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a q or k projection (heads · width, ...) in llama.cpp's order.

    Within a head transformers rotates row `i` with row `i + width/2`, llama.cpp rows `2i` and `2i + 1`.
    """
    rows, *rest = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, *rest).transpose(1, 2).reshape(weight.shape)


def _gguf() -> ModuleType:
    """The package, of which only those who write such files have need."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files are written with the gguf package: pip install 'peft-cast[gguf]'.") from error
    return gguf
