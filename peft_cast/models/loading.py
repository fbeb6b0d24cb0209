"""Models and tokenizers: from the hub, folders and configurations, in which precision, and told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..utils import distributed, one_line, secrets_removed, why_no_model, without_secrets


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast (accelerators, CPUs with AMX or AVX512-BF16), else float32."""
    if device.type != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "cuda":
        # What PyTorch holds and does not use is free as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return 2**63 - 1  # nobody can tell


def load_model(
    model: str | Path | PreTrainedModel,
    which: str,
    device: torch.device,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A causal language model from a hub id, a path or an already loaded model (returned as it is).

    Raises:
        ValueError: If `model` is a PeftModel or nothing, or needs code of its own.
        OSError: If it cannot be found; the message says what to pass.
    """
    if isinstance(model, PeftModel):
        raise ValueError(f"`{which}` is a PeftModel: pass its base model, `{which}.unload()` or a model id.")
    if isinstance(model, nn.Module):
        return model
    if model is None:
        raise ValueError(f"The adapter does not say which model it was trained on: pass it as `{which}`.")
    if (why := why_no_model(model)) is not None:
        message = f"The {which} model could not be loaded: {why}. Pass a hub id or a folder with config.json."
        raise OSError(without_secrets(message))
    named, dtype = f"The {which} model '{without_secrets(model)}'", dtype or default_dtype(device)
    try:
        with secrets_removed():
            loaded = AutoModelForCausalLM.from_pretrained(
                model, revision=revision, dtype=dtype, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        check_remote_code(error, named, which)
        raise OSError(
            f"{named} could not be loaded: {one_line(error)} Pass a hub id, a folder or a loaded model."
        ) from error
    return loaded.to(device)


def check_remote_code(error: Exception, what: str, argument: str) -> None:
    """
    Raises:
        ValueError: If transformers refused to run code from a repository; it names an option that is none of ours.
    """
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"{what} needs code from its own repository, which is never run here: read that code, load it yourself "
            f"with `trust_remote_code=True` and pass the loaded object as `{argument}`."
        ) from None


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | None, model: PreTrainedModel, which: str, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The given tokenizer, or the one that lies beside the model.

    Raises:
        ValueError: If no tokenizer is given and none can be found.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    path = tokenizer or model.name_or_path
    shown, argument = without_secrets(path), f"{which}_tokenizer"
    try:
        if not path:
            raise ValueError("The model does not say where it comes from.")
        with secrets_removed():
            return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        check_remote_code(error, f"The tokenizer of '{shown}'", argument)
        raise ValueError(f"No tokenizer was found for the {which} model ('{shown}'): pass `{argument}=`.") from error


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration without weights, on the meta device."""
    with torch.device("meta"):
        # Named here, because a configuration may name an attention that is downloaded code; a skeleton never attends.
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    return model


def fingerprint(*models: nn.Module, extra: Sequence[torch.Tensor] = ()) -> str:
    """Tells models apart: a hash of the names and shapes of all parameters and the first 64 values of each.

    Args:
        models: The models, with the adapters that matter.
        extra: Tensors that count in full.
    """
    digest = hashlib.sha256()
    for model in models:
        for name, parameter in model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            values = parameter.detach()
            # Of a sharded one the main process has the first.
            values = values.to_local() if isinstance(values, DTensor) else values
            digest.update(values.flatten()[:64].float().cpu().numpy().tobytes())
    for tensor in extra:
        digest.update(tensor.cpu().numpy().tobytes())
    return distributed.broadcast(digest.hexdigest())
