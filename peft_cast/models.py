"""Loading models and tokenizers, and giving models back exactly as they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import ranks
from .align import layer_paths
from .safety import one_line, secrets_removed, why_no_model, without_secrets


@dataclass(frozen=True)
class LoraKernel:
    """The frozen LoRA of one source place: `delta(x) = scaling * B A x`, A (r, in_S), B (out_S, r)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


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
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
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
        raise OSError(
            without_secrets(
                f"The {which} model could not be loaded: {why}. Pass a hub id or a folder with config.json."
            )
        )
    try:
        with secrets_removed():
            loaded = AutoModelForCausalLM.from_pretrained(
                model, revision=revision, dtype=dtype or default_dtype(device), trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        check_remote_code(error, f"The {which} model '{without_secrets(model)}'", which)
        raise OSError(
            f"The {which} model '{without_secrets(model)}' could not be loaded: {one_line(error)} Pass a hub id, a folder or a loaded model."
        ) from error
    return loaded.to(device)


def check_remote_code(error: Exception, what: str, argument: str) -> None:
    """
    Raises:
        ValueError: If transformers refused to run code from a repository; it names an option that is none of ours.
    """
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"{what} needs code from its own repository, which is never run here: read that code, load it yourself with "
            f"`trust_remote_code=True` and pass the loaded object as `{argument}`."
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
    error: Exception | None = None
    if path:
        try:
            with secrets_removed():
                return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as e:
            check_remote_code(e, f"The tokenizer of '{without_secrets(path)}'", f"{which}_tokenizer")
            error = e
    raise ValueError(
        f"No tokenizer was found for the {which} model ('{without_secrets(path)}'): pass `{which}_tokenizer=`."
    ) from error


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration without weights, on the meta device."""
    with torch.device("meta"):
        # Named here, because a configuration may name an attention that is downloaded code; a skeleton never attends.
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    return model


def load_on_skeleton(
    model: PreTrainedModel, adapter: str | Path, adapter_name: str, revision: str | None = None
) -> PeftModel:
    """An adapter on a model without weights; the adapter itself has its own, on the CPU."""
    with warnings.catch_warnings():
        # PEFT puts the adapter where its base is, on the meta device, and torch warns of every tensor.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        peft_model = PeftModel.from_pretrained(model, str(adapter), adapter_name=adapter_name, revision=revision)
    weights = load_peft_weights(str(adapter), device="cpu", **({"revision": revision} if revision else {}))
    # A file may mix precisions, which PEFT would bring to that of its base.
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    state = type(peft_model.base_model)._remap_adapter_state_dict_for_load(
        model=peft_model, config=peft_model.peft_config[adapter_name], adapter_name=adapter_name, state_dict=weights
    )
    peft_model.load_state_dict(state, strict=False, assign=True)
    return peft_model


def unload_adapters(model: PreTrainedModel) -> None:
    """Put the plain modules of an injected model back, also when the injection stopped halfway."""
    replaced: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if name.startswith(replaced):
            continue  # wrappers lie in wrappers (trained tokens, several parameters of one module)
        if hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
            plain = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save and trained token embeddings
            plain = module.original_module
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
        replaced += (f"{name}.",)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)


def layer_count(model: PreTrainedModel) -> int:
    """Number of decoder layers."""
    return len(layer_paths(model))


def count_parameters(kernels: Mapping[str, LoraKernel]) -> int:
    """Parameters of the LoRA that kernels were taken from: the parts of a fused module share their A."""
    parts = {id(kernel.A): kernel.A.numel() for kernel in kernels.values()}
    return sum(parts.values()) + sum(kernel.B.numel() for kernel in kernels.values())


@contextmanager
def untouched(*models: PreTrainedModel) -> Iterator[None]:
    """Freeze the models and put them in eval mode; afterwards restore every mode, requires_grad flag and setting."""
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    # Trainer writes into the configurations (use_cache, special tokens).
    settings = [
        (settings, dict(vars(settings)))
        for model in models
        for settings in (model.config, model.generation_config)
        if settings is not None
    ]
    with in_eval_mode(*models):
        for model in models:
            model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, requires_grad in flags:
                parameter.requires_grad = requires_grad
            for current, before in settings:
                vars(current).clear()
                vars(current).update(before)


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Within the context the models have no dropout, and draw no random numbers for it."""
    # Of each module: the wrapper of a model in evaluation mode may be in training mode, as PEFT leaves it.
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context torch draws from the seed; the random state of before is put back after."""
    devices = list(range(torch.cuda.device_count()))
    if devices and ranks.count() > 1:  # the others' are none of this process's business
        devices = [torch.cuda.current_device()]
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def moved(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Within the context the model is on `device`; models spread over devices or quantised stay where they are."""
    home = model.device
    stays = home == device or getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    if not stays:
        model.to(device)
    try:
        yield
    finally:
        if not stays:
            model.to(home)


@contextmanager
def shared_head(model: PreTrainedModel, token_ids: torch.Tensor) -> Iterator[None]:
    """Within the context the model's logits cover only `token_ids`, in this order; the old head is put back after.

    Swapping the head, not multiplying outside, keeps what architectures do around it (soft-capping, scaling), and
    never builds the logits of the whole vocabulary. A head with an adapter on it is the exception: its logits are built
    and the wanted ones are taken, so that the adapter can still be switched off.
    """
    head = model.get_output_embeddings()
    if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        small: nn.Module = _SomeLogits(head, token_ids)
    else:
        small = _rows_of(head, token_ids)
    with _with_head(model, small):
        yield


@contextmanager
def _with_head(model: PreTrainedModel | PeftModel, head: nn.Module) -> Iterator[nn.Module]:
    """Within the context the model has this head; yields its own, which is put back after."""
    own = model.get_output_embeddings()
    model.set_output_embeddings(head)
    try:
        yield own
    finally:
        model.set_output_embeddings(own)


class _SomeLogits(nn.Module):
    """A head whose logits are those of another for some tokens."""

    def __init__(self, head: nn.Module, token_ids: torch.Tensor) -> None:
        super().__init__()
        self.head, self.token_ids = head, token_ids

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.head(states)[..., self.token_ids.to(states.device)]


def _rows_of(head: nn.Module, token_ids: torch.Tensor) -> nn.Linear:
    weight = head.weight.detach()[token_ids.to(head.weight.device)]
    small = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    small.weight = nn.Parameter(weight, requires_grad=False)
    if getattr(head, "bias", None) is not None:
        small.bias = nn.Parameter(head.bias.detach()[token_ids.to(head.bias.device)], requires_grad=False)
    return small


def contiguous_head(model: PreTrainedModel | PeftModel) -> AbstractContextManager[None]:
    """Within the context the head reads contiguous hidden states.

    transformers gives it a slice (the last positions). `F.linear` on such a slice may fall back to a batched product that
    copies the whole head once per row: minutes instead of seconds for a large vocabulary on a CPU.
    """
    return _before_head(model, torch.Tensor.contiguous)


def states_at(
    model: PreTrainedModel | PeftModel, rows: torch.Tensor, positions: torch.Tensor
) -> AbstractContextManager[nn.Module]:
    """Within the context the model gives, as its logits, what its head would read at some positions, shape (m, hidden).

    Yields the head. Only for models of which `ends_in_head` is true.

    Args:
        rows, positions (`torch.Tensor`): As in `logits_at`.
    """
    return _with_head(model, _StatesAt(rows, positions))


class _StatesAt(nn.Module):
    """In a head's place: the states of some positions as they are."""

    def __init__(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__()
        self.at = rows, positions

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states[self.at]


@torch.no_grad()
def ends_in_head(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the logits are what the head, a linear layer, makes: nothing is capped, scaled or cast after it.

    Tried on one token; of a model that is spread over processes all must try.
    """
    head, made = model.get_output_embeddings(), []
    if type(head) is not nn.Linear:
        return False
    handle = head.register_forward_hook(lambda _, __, logits: made.append((logits, logits._version)))
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        logits = model(input_ids=token, use_cache=False).logits
    finally:
        handle.remove()
    return len(made) == 1 and made[0][0] is logits and made[0][1] == logits._version


def logits_at(
    model: PreTrainedModel | PeftModel, rows: torch.Tensor, positions: torch.Tensor
) -> AbstractContextManager[None]:
    """Within the context the model's logits are those of some positions alone, shape (m, vocabulary).

    The head costs as much as many layers and is not needed where nothing is compared (prompts, padding).

    Args:
        rows, positions (`torch.Tensor`): Index of the m positions in the batch, int64.
    """
    return _before_head(model, lambda states: states[rows, positions])


@contextmanager
def _before_head(model: PreTrainedModel | PeftModel, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the context the head reads `change(hidden states)`."""
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (change(args[0]),))
    try:
        yield
    finally:
        handle.remove()
