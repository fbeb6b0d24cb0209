"""Models: from the hub, folders and configurations, in which precision, and told apart."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..align import sees_or_hears
from ..tuner.checks import TensorInfo, check_finite, shown, with_article
from ..utils import (
    FaultError,
    check_model_config,
    distributed,
    explained,
    holds_file,
    is_out_of_reach,
    one_line,
    secrets_removed,
    why_no_model,
    why_unread,
    without_secrets,
)
from .folder import read_folder
from .found import check_found, check_header
from .needs import check_needs, missing_package, quantization_of


_NO_DECODER = "which is no decoder-only language model: only adapters between decoders can be translated."


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
        ValueError: If `model` is none, see `check_loaded`, or needs code of its own.
        OSError: If it cannot be found, or its weights are not finite; the message says what to pass.
    """
    config = check_model(model, which, revision)
    if isinstance(model, nn.Module):
        check_own_weights(model, which)
        return model
    named = f"The {which} model '{without_secrets(model)}'"
    kind = auto_class(config, named) if config is not None else AutoModelForCausalLM
    options = {"revision": revision, "dtype": dtype or default_dtype(device), "trust_remote_code": False}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told of below, in words of ours
    try:
        with secrets_removed(), _adapter_left_out(model, which) as folder:
            loaded, found = kind.from_pretrained(folder, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except ImportError as error:
        raise missing_package(error, config, named, which) from error
    except Exception as error:  # of whatever lies in the folder of a stranger
        check_remote_code(error, named, which)
        if skeleton_of(model, which, revision) is None:  # which says what is wrong with its configuration
            read_model_config(model, which, revision)
        raise OSError(
            f"{named} could not be loaded: {one_line(error)} Pass a hub id, a folder or a loaded model."
        ) from error
    check_found(found, loaded, named)
    loaded.name_or_path = loaded.config.name_or_path = str(model)
    loaded = loaded.to(device)
    check_own_weights(loaded, which)
    return loaded


def check_own_weights(model: nn.Module, which: str) -> None:
    """
    Raises:
        OSError: If weights of a model are NaN or infinite, with which it computes nothing.
    """
    for name, parameter in model.named_parameters():
        if sees_or_hears(name):
            continue  # no text passes through it
        try:
            check_finite(name, parameter.detach())
        except ValueError:
            own = name.replace(".base_layer.", ".")  # where an adapter is on the model
            also = ", or pass `dtype` as float32 or bfloat16" if parameter.dtype == torch.float16 else ""
            called = f" '{without_secrets(model.name_or_path)}'" if model.name_or_path else ""
            raise OSError(
                f"The {which} model{called} has NaN or infinite numbers in its own weights ({shown(own)}), with "
                f"which it computes nothing: get its weights again{also}."
            ) from None


def read_model_config(model: str | Path, which: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model on the hub or in a folder.

    Raises:
        ValueError: If it needs code of its own, or a revision is given beside a folder.
        OSError: If it cannot be read; the message says what to pass.
    """
    named = f"The {which} model '{without_secrets(model)}'"
    if revision is not None and Path(model).is_dir():
        raise ValueError(
            f"{named} is a folder, and `{which}_revision`, '{revision}', is for hub ids: leave it out, or pass a hub "
            "id."
        )
    try:
        with secrets_removed():
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
            check_model_config(config.to_dict(), "its config.json")
            return config
    except Exception as error:  # a configuration may say anything
        check_remote_code(error, named, which)
        raise OSError(f"{named} could not be loaded: {why_unread(model, error, revision)}") from error


def check_model(model: Any, which: str, revision: str | None = None) -> PretrainedConfig | None:
    """Refuse, before gigabytes are loaded, what the configuration and the files of a model tell.

    Returns:
        Its configuration; `None` for a source that is out of reach: it is loaded first, which says it.

    Raises:
        ValueError, OSError: As `load_model`.
    """
    if isinstance(model, nn.Module):
        check_loaded(model, which)
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError(
                f"`{which}` carries an adapter already, and what is made here belongs to the model alone: pass its "
                "hub id or folder, or the model without it (`unload()` of its PeftModel takes it off)."
            )
        return model.config
    return _read_model(model, which, revision)[0]


def _read_model(model: Any, which: str, revision: str | None) -> tuple[PretrainedConfig | None, dict[str, TensorInfo]]:
    """As `check_model`, of one that is not loaded; beside it what `read_folder` tells, nothing of one on the hub."""
    if not isinstance(model, (str, Path)) or not str(model):
        got = repr(model) if isinstance(model, str) else type(model).__name__
        raise ValueError(f"`{which}` must be a folder, a hub id or a loaded model, got {got}.")
    if (why := why_no_model(model)) is not None:
        message = f"The {which} model could not be loaded: {why}. Pass a hub id or a folder with config.json."
        raise OSError(without_secrets(message))
    named = f"The {which} model '{without_secrets(model)}'"
    try:
        config = read_model_config(model, which, revision)
    except OSError as error:
        if which == "source" and is_out_of_reach(error):
            return None, {}
        raise
    auto_class(config, named)
    if not Path(model).is_dir():
        if holds_file(model, CONFIG_NAME, revision):
            raise OSError(
                f"{named} is a repository that holds an adapter too, which transformers loads with the model: "
                f"download it, remove {CONFIG_NAME}, and pass the folder as `{which}`."
            )
        return config, {}
    return config, {} if getattr(config, "transformers_weights", None) else read_folder(Path(model), named)


def check_loaded(model: nn.Module, which: str) -> None:
    """Refuse an object that is no language model to work on.

    Raises:
        ValueError: If it is a PeftModel, no decoder of transformers with a head, or has no weights.
    """
    kind = type(model).__name__
    if isinstance(model, PeftModel):
        raise ValueError(f"`{which}` is a PeftModel: pass its base model, `{which}.unload()` or a model id.")
    if not isinstance(model, PreTrainedModel):
        check_unwrapped(model, which)
        raise ValueError(
            f"`{which}` is {with_article(kind)}, no language model of transformers: pass one, a hub id or a folder."
        )
    if model.config.is_encoder_decoder or _is_encoder(model.config):
        raise ValueError(f"`{which}` is {with_article(kind)}, {_NO_DECODER}")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{kind} has no language-modeling head: pass a causal language model.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"`{which}` ({kind}) has weights on the meta device, where they are none or loaded piece by piece: pass a "
            "model that is loaded whole, a hub id or a folder."
        )


def check_unwrapped(model: Any, argument: str) -> None:
    """
    Raises:
        ValueError: If a model is wrapped by what trains or compiles models.
    """
    for inner in ("module", "_orig_mod"):  # of nn.DataParallel and torch.compile
        if isinstance(getattr(model, inner, None), (PreTrainedModel, PeftModel)):
            raise ValueError(
                f"`{argument}` is wrapped in {type(model).__name__}: pass the model in it, `{argument}.{inner}`."
            )


def auto_class(config: PretrainedConfig, named: str) -> Any:
    """transformers' class that builds the language model of a configuration, that of a vision-language model in it.

    Raises:
        ValueError: If it is no decoder.
    """
    if type(config) in AutoModelForCausalLM._model_mapping and not _is_encoder(config):
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping and not getattr(config, "is_encoder_decoder", False):
        return AutoModelForImageTextToText
    raise ValueError(f"{named} is of the type '{config.model_type}', {_NO_DECODER}")


def _is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model fills in words that are masked (BERT): transformers builds it as a causal one too."""
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(config, "is_decoder", False)


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


def skeleton(config: PretrainedConfig, named: str = "The model") -> PreTrainedModel:
    """The model of a configuration without weights, on the meta device; what an error calls it is `named`.

    Raises:
        FaultError: If the configuration has settings of which no model can be built.
        ValueError: If it is no decoder's.
    """
    kind = auto_class(config, named)

    def built(config: PretrainedConfig) -> PreTrainedModel:
        with torch.device("meta"):
            # Named here, because a configuration may name an attention that is downloaded code; it never attends.
            return kind.from_config(config, trust_remote_code=False, attn_implementation="eager")

    try:
        model = built(config)
    except Exception as error:
        values = {} if "trust_remote_code" in str(error) else config.to_dict()
        why = explained(error, "its configuration", values, lambda v: built(type(config).from_dict(v)))
        if why is None:
            raise
        raise FaultError(f"{why}.") from error
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    return model


def skeleton_of(
    model: str | Path | PreTrainedModel, which: str, revision: str | None = None
) -> PreTrainedModel | None:
    """The skeleton of a model that is not loaded yet, `None` where only loading it tells more; a loaded one itself.

    Raises:
        ValueError, OSError: As `check_model`.
    """
    if isinstance(model, nn.Module):
        check_model(model, which, revision)
        return model
    config, header = _read_model(model, which, revision)
    if config is None:
        return None
    named = f"The {which} model '{without_secrets(model)}'"
    attention = config._attn_implementation  # a skeleton has another
    try:
        built = skeleton(config)
    except FaultError as error:
        raise OSError(f"{named} could not be loaded: {error}") from error
    except Exception:  # a configuration may lead to anything; what is wrong with it, loading says
        return None
    check_needs(built, attention, named, which)
    if quantization_of(config) is None:  # which packs several numbers into one
        promised = sum(parameter.numel() for parameter in built.parameters())
        held = sum(math.prod(info.shape) for info in header.values())
        if held and promised > 2 * held + 2**20:  # which would be made at random, until the memory is full
            raise OSError(
                f"{named} could not be loaded: its config.json speaks of {promised:,} numbers, its files have "
                f"{held:,}: the two do not belong together, get both again."
            )
        check_header(header, built, named)
    return built


def as_skeleton(
    model: str | Path | PreTrainedModel, which: str, revision: str | None = None
) -> PreTrainedModel | None:
    """`skeleton_of` that takes a skeleton, such as `plan` works on, as it is."""
    if isinstance(model, PreTrainedModel) and model.device.type == "meta":
        return model
    return skeleton_of(model, which, revision)


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
