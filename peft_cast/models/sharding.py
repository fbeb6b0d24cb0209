"""Models that are spread over the processes (PyTorch's FSDP2), for those that do not fit on one device.

Only the large frozen matrices of the decoder layers are: each process keeps a part, and a layer is put together while
it works. Embeddings, head, norms and the adapters are whole everywhere. All phases of a translation run on such
models, so that every process must make as many passes as the others.

accelerate's and Trainer's own FSDP would wrap the target for the refinement alone, after everything else had to fit.
So would DeepSpeed's engine: its ZeRO-3, which parts the same matrices, is taken as another way to ask for FSDP2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..align import layer_paths
from ..utils import distributed
from ..utils.arguments import SHARDING


Adapter = TypeVar("Adapter", bound=Any)  # `source.SourceAdapter`, which stands above this folder


def is_wanted(training_args: Mapping[str, Any] | None) -> bool:
    """Whether models shall be sharded: FSDP or DeepSpeed's ZeRO-3, in the training arguments or `accelerate launch`.

    ZeRO-1 and ZeRO-2 part gradients and the optimizer's state, which are the projections' alone here and small: they
    stay whole.

    Raises:
        ValueError: If parameters shall lie elsewhere than on their process's device (ZeRO-Offload), or DeepSpeed's
            configuration cannot be read.
    """
    given = training_args or {}
    on = {what: os.environ.get(name, "").lower() == "true" for what, name in distributed.LAUNCHER_SETTINGS.items()}
    wanted = bool(given.get("fsdp")) or on["FSDP"]
    if given.get("deepspeed") or on["DeepSpeed"]:
        zero = _zero_optimization(given.get("deepspeed"))
        if str((zero.get("offload_param") or {}).get("device", "none")).lower() != "none":
            raise ValueError("Parameters are not offloaded: leave `offload_param` out of DeepSpeed's configuration.")
        wanted = wanted or zero.get("stage") in (3, "3")
    return wanted


def is_requested(training_args: Mapping[str, Any] | None) -> bool:
    """`is_wanted`, where it is possible.

    Raises:
        ValueError: Also if there is only one process, or PyTorch is too old.
    """
    wanted = is_wanted(training_args)
    if wanted and distributed.launched_processes() == 1:
        raise ValueError(
            "FSDP and ZeRO-3 shard the models over several processes and there is one: start with `accelerate launch "
            "--num_processes`, or without them."
        )
    if wanted and "ignored_params" not in signature(fully_shard).parameters:
        raise ValueError(f"FSDP and ZeRO-3 need PyTorch 2.7 or newer, this is {torch.__version__}: update it.")
    return wanted


def _zero_optimization(given: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    """That part of DeepSpeed's configuration: given, or what accelerate's launcher leaves in the environment."""
    file = given or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        device = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        return {"stage": os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), "offload_param": {"device": device}}
    if isinstance(file, Mapping):
        return file.get("zero_optimization", {})
    try:
        return json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"DeepSpeed's configuration '{file}' cannot be read ({error}): pass a JSON file.") from error


def without_sharding_arguments(training_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The training arguments for Trainer, which finds the models spread already and trains small projections."""
    return {name: value for name, value in (training_args or {}).items() if name not in SHARDING}


def spread(model: PreTrainedModel, own: set[nn.Parameter], device: torch.device, over: DeviceMesh) -> None:
    """Keep a part of the model's large matrices, on the device, and freeze it. For good: there is no way back.

    The model is on the CPU, the same in all processes, with its adapter if it has one; `own` are its parameters
    without the adapter's.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"'{model.name_or_path}' is quantized, which FSDP cannot spread: pass it unquantized or go without FSDP."
        )
    model.requires_grad_(False)
    paths = layer_paths(model)
    layers = [model.get_submodule(path) for path in paths]
    inside = {p for layer in layers for p in layer.parameters() if p.ndim >= 2}
    whole = set(model.parameters()) - (inside & own)
    for layer in layers:
        fully_shard(layer, mesh=over, ignored_params=whole)
    # What calls the layers says when a pass begins and ends. (PEFT calls the model's `forward`, past its hooks.)
    decoder = model.get_submodule(paths[0].rpartition(".")[0].rpartition(".")[0])
    fully_shard(decoder, mesh=over, ignored_params=whole)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and not isinstance(tensor, DTensor):
                    tensor.data = tensor.data.to(device)


@contextmanager
def open_sharded(
    load_source: Callable[..., PreTrainedModel],
    load_target: Callable[..., PreTrainedModel],
    adapt: Callable[[PreTrainedModel], AbstractContextManager[Adapter]],
    device: torch.device,
) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, Adapter]]:
    """Within the context source and target are spread, the source with its adapter.

    They are loaded whole, by one process after another, because a machine may have room for one.

    Args:
        load_source, load_target: Given `device`, load the models there.
        adapt: `source.adapted_source`, given the source.
        device: Where to work.

    Raises:
        ValueError: If the adapter changes the source's own weights, or a model is quantized.
    """
    over = init_device_mesh(device.type, (distributed.world_size(),))
    with ExitStack() as stack:
        with distributed.one_at_a_time():
            source = load_source(device=torch.device("cpu"))
            own = set(source.parameters())
            adapter = stack.enter_context(adapt(source))
            if "disable_adapter" in vars(adapter.model):  # they are kept as they were, in full
                raise ValueError(
                    "The adapter changes the source's own weights (trained biases, PiSSA, OLoRA, KaSA), which is not "
                    "possible when FSDP spreads them: translate it without, or convert it to a plain LoRA first."
                )
            spread(source, own, device, over)
            own.clear()  # nothing else may hold the whole ones, or they stay
            target = load_target(device=torch.device("cpu"))
            spread(target, set(target.parameters()), device, over)
        yield source, target, adapter


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the model lies in other processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def exclude_from_ddp(model: nn.Module) -> None:
    """Let `DistributedDataParallel`, which averages the adapter's gradients, leave the spread parameters alone."""
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
