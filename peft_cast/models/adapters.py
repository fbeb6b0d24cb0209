"""Adapters on a model: put there, frozen, and taken off so that nothing of them stays."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn
from transformers import PreTrainedModel

from ..utils import adapter_folder, read_adapter_config


def as_peft_reads(
    model: nn.Module, config: PeftConfig, shapes: Mapping[str, tuple[int, ...]], adapter_name: str = "default"
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file's tensors after what PEFT does to those of transformers 4: experts become one tensor.

    Args:
        model: The model, with or without the adapter.
        config: The adapter's configuration.
        shapes: Of the tensors in the file; no tensor is made.
        adapter_name (`str`): What the adapter is called on the model.

    Raises:
        ValueError, RuntimeError: Whatever PEFT says of tensors that do not go together.
    """
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    read = convert_peft_adapter_state_dict_for_transformers(model, config, tensors, adapter_name)
    return {name: tuple(tensor.shape) for name, tensor in read.items()}


def load_on_skeleton(
    model: PreTrainedModel,
    adapter: str | Path,
    adapter_name: str,
    revision: str | None = None,
    config: PeftConfig | None = None,
) -> PeftModel:
    """An adapter on a model without weights; the adapter itself has its own, on the CPU.

    Args:
        model: The model, on the meta device.
        adapter: Folder or hub id.
        adapter_name (`str`): Its name on the model.
        revision (`str`, *optional*): Its hub revision.
        config ([`~peft.PeftConfig`], *optional*): Its configuration, where it is another than the folder's.
    """
    folder, config = str(adapter_folder(adapter, revision)), config or read_adapter_config(adapter, revision)
    start = getattr(config, "init_lora_weights", None)
    own = {id(parameter) for parameter in model.parameters()}
    if isinstance(start, str):
        config.init_lora_weights = False  # it may decompose the weights that are not there, and is overwritten below
    with warnings.catch_warnings():
        # PEFT puts the adapter where its base is, on the meta device, and torch warns of every tensor.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        peft_model = PeftModel.from_pretrained(model, folder, adapter_name=adapter_name, config=config)
    if isinstance(start, str):
        config.init_lora_weights = start
    weights = load_peft_weights(folder, device="cpu")
    # A file may mix precisions, which PEFT would bring to that of its base.
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    weights = convert_peft_adapter_state_dict_for_transformers(
        peft_model, peft_model.peft_config[adapter_name], weights, adapter_name
    )
    state = type(peft_model.base_model)._remap_adapter_state_dict_for_load(
        model=peft_model, config=peft_model.peft_config[adapter_name], adapter_name=adapter_name, state_dict=weights
    )
    dtypes = {name: tensor.dtype for name, tensor in peft_model.named_parameters() if id(tensor) in own}
    # Weights of the model itself (biases, embeddings) that are in the file are as precise as the model.
    state = {name: value.to(dtypes.get(name, value.dtype)) for name, value in state.items()}
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


def freeze_adapter(model: PeftModel) -> int:
    """Make a finished adapter one that is not trained, and return how many parameters were."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.requires_grad_(False)
    model.active_peft_config.inference_mode = True
    return trained


@contextmanager
def without_advice() -> Iterator[None]:
    """Within the context PEFT's warnings are left out: advice for training, or said in words of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft(\.|$)")
        yield


@contextmanager
def unloaded_on_error(model: PreTrainedModel) -> Iterator[None]:
    """Within the context an error, or Ctrl-C, takes the adapter off the model again."""
    try:
        yield
    except BaseException:
        unload_adapters(model)
        raise
