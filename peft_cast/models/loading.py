"""Models and tokenizers: from the hub, folders and configurations, in which precision, and told apart."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..utils import as_path, distributed, one_line, secrets_removed, why_no_model, without_secrets
from ..utils.safety import find_file


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
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                f"`{which}` carries an adapter already, and what is made here belongs to the model alone: pass its "
                "hub id or folder, or take the adapter off first (`result.model.unload()`)."
            )
        return model
    # What stands in the way of the configuration stands in that of the model, and is said then.
    kind = check_model(model, which, revision) or AutoModelForCausalLM
    named = f"The {which} model '{without_secrets(model)}'"
    options = {"revision": revision, "dtype": dtype or default_dtype(device), "trust_remote_code": False}
    try:
        with secrets_removed(), _adapter_left_out(model, which) as folder:
            loaded, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except ImportError as error:  # of the package that quantized it
        raise OSError(
            f"{named} is quantized and the package that loads it is missing ({one_line(error)}): install it, or pass "
            f"the unquantized model as `{which}`."
        ) from error
    except Exception as error:  # of whatever lies in the folder of a stranger
        check_remote_code(error, named, which)
        raise OSError(
            f"{named} could not be loaded: {one_line(error)} Pass a hub id, a folder or a loaded model."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise OSError(
            f"{named} lacks the weights of {len(missing)} tensors ('{missing[0]}'), which would be random: get the "
            "whole model, or pass the one that it was made from."
        )
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise OSError(
            f"{named} is a repository that holds an adapter too, which transformers loads with the model: download "
            f"it, remove adapter_config.json, and pass the folder as `{which}`."
        )
    loaded.name_or_path = loaded.config.name_or_path = str(model)
    return loaded.to(device)


def read_model_config(model: str | Path, which: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model on the hub or in a folder.

    Raises:
        ValueError: If it needs code of its own.
        OSError: If it cannot be read; the message says what to pass.
    """
    named = f"The {which} model '{without_secrets(model)}'"
    try:
        with secrets_removed():
            return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # a configuration may say anything
        check_remote_code(error, named, which)
        raise OSError(
            f"{named} could not be loaded: {one_line(error)} Pass a hub id or a folder with config.json."
        ) from error


def check_model(model: Any, which: str, revision: str | None = None) -> Any:
    """Refuse, before gigabytes are loaded, what the configuration of a model tells; one out of reach is told of later.

    Returns:
        transformers' class that loads the model; `None` for a loaded one, or if its configuration is out of reach.

    Raises:
        ValueError, OSError: As `load_model`.
    """
    if not isinstance(model, (str, Path, nn.Module)) or model == "":
        given = "''" if model == "" else type(model).__name__
        raise ValueError(f"`{which}` must be a folder, a hub id or a loaded model, got {given}.")
    if isinstance(model, (str, Path)):
        if (why := why_no_model(model)) is not None:
            message = f"The {which} model could not be loaded: {why}. Pass a hub id or a folder with config.json."
            raise OSError(without_secrets(message))
        with suppress(OSError):
            return auto_class(
                read_model_config(model, which, revision), f"The {which} model '{without_secrets(model)}'"
            )
    return None


def auto_class(config: PretrainedConfig, named: str) -> Any:
    """transformers' class that builds the language model of a configuration, that of a vision-language model in it.

    Raises:
        ValueError: If it is no decoder.
    """
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping and not getattr(config, "is_encoder_decoder", False):
        return AutoModelForImageTextToText
    raise ValueError(
        f"{named} is of the type '{config.model_type}', which is no decoder-only language model: only adapters "
        "between decoders can be translated."
    )


@contextmanager
def _adapter_left_out(model: str | Path, which: str) -> Iterator[str | Path]:
    """The folder of a model, or one of links to its files where it holds an adapter too, which transformers would
    load.
    """
    files = list(Path(model).glob("*")) if Path(model).is_dir() else []
    if not any(file.name == CONFIG_NAME for file in files):
        yield model
        return
    warnings.warn(f"The folder of the {which} model, '{model}', holds an adapter too: the model is used without it.")
    with TemporaryDirectory() as links:
        for file in files:
            if not file.name.startswith("adapter_"):
                (Path(links) / file.name).symlink_to(file.resolve())
        yield links


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
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    model: PreTrainedModel,
    which: str,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """The given tokenizer, or the one that lies beside the model.

    Raises:
        ValueError: If no tokenizer is given and none can be found.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    path = as_path(tokenizer) or model.name_or_path
    shown, argument = without_secrets(path), f"{which}_tokenizer"
    try:
        if not path:
            raise ValueError("The model does not say where it comes from.")
        with secrets_removed():
            return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # of files of strangers
        check_remote_code(error, f"The tokenizer of '{shown}'", argument)
        raise ValueError(
            f"No tokenizer was found for the {which} model ('{shown}'): pass `{argument}=`. ({one_line(error)})"
        ) from error


def adapter_tokenizer(
    adapter: str | Path, model: PreTrainedModel, revision: str | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer in an adapter's folder, which it was trained with; `None` if there is none that the model can
    read.

    Args:
        adapter: Folder or hub id.
        model: The source model, whose embeddings must have a row for each token.
        revision (`str`, *optional*): Hub revision of the adapter.
    """
    try:
        folder = find_file(adapter, "tokenizer_config.json", revision).parent
        for name in ("tokenizer.json", "chat_template.jinja", "special_tokens_map.json"):
            with suppress(EntryNotFoundError):
                find_file(adapter, name, revision)
    except (EntryNotFoundError, OSError, ValueError):
        return None
    named = f"The tokenizer in the folder of the adapter '{without_secrets(adapter)}'"
    try:
        with secrets_removed():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # of a folder of strangers: the source's own is there
        warnings.warn(f"{named} could not be loaded, the source model's own is used: {one_line(error)}")
        return None
    rows = model.get_input_embeddings().weight.shape[0]
    if (most := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        warnings.warn(
            f"{named} has tokens up to number {most}, the source model has {rows} rows for them: the source model's "
            "own is used. Pass the model with resized embeddings, or `source_tokenizer`."
        )
        return None
    return tokenizer


def skeleton(config: PretrainedConfig, named: str = "The model") -> PreTrainedModel:
    """The model of a configuration without weights, on the meta device; what an error calls it is `named`."""
    with torch.device("meta"):
        # Named here, because a configuration may name an attention that is downloaded code; a skeleton never attends.
        kind = auto_class(config, named)
        model = kind.from_config(config, trust_remote_code=False, attn_implementation="eager")
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    return model


def skeleton_of(model: str | Path, which: str, revision: str | None = None) -> PreTrainedModel | None:
    """The skeleton of a model that is not loaded yet; `None` where only loading it tells more.

    Raises:
        ValueError, OSError: As `check_model`.
    """
    check_model(model, which, revision)
    with suppress(Exception):  # a configuration may lead to anything; what is wrong with it, loading says
        return skeleton(read_model_config(model, which, revision))
    return None


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
