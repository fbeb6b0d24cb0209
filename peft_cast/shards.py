"""Models that are spread over the processes (PyTorch's FSDP2), for those that do not fit on one device.

Only the large frozen matrices of the decoder layers are: each process keeps a part, and a layer is put together while it works.
Embeddings, head, norms and the adapters are whole everywhere. All phases of a translation run on such models, so that every
process must make as many passes as the others.

accelerate's and Trainer's own FSDP would wrap the target for the refinement alone, after everything else had to fit. So would
DeepSpeed's engine: its ZeRO-3, which parts the same matrices, is taken as another way to ask for FSDP2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from . import ranks
from .align import layer_paths


if TYPE_CHECKING:
    from .source import SourceAdapter


_ARGUMENTS = ("fsdp", "fsdp_config", "deepspeed")


def asked(training_args: Mapping[str, Any] | None) -> bool:
    """Whether the models shall be spread: FSDP or DeepSpeed's ZeRO-3, in the training arguments or in `accelerate launch`.

    ZeRO-1 and ZeRO-2 part gradients and the optimizer's state, which are the projections' alone here and small: they stay whole.

    Raises:
        ValueError: If there is only one process, parameters shall lie elsewhere than on its device (ZeRO-Offload), or DeepSpeed's
            configuration cannot be read.
    """
    given = training_args or {}
    wanted = bool(given.get("fsdp")) or _is_on("FSDP")
    if given.get("deepspeed") or _is_on("DeepSpeed"):
        zero = _zero_optimization(given.get("deepspeed"))
        if str((zero.get("offload_param") or {}).get("device", "none")).lower() != "none":
            raise ValueError("Parameters are not offloaded: leave `offload_param` out of DeepSpeed's configuration.")
        wanted = wanted or zero.get("stage") in (3, "3")
    if wanted and ranks.launched() == 1:
        raise ValueError(
            "FSDP and ZeRO-3 spread the models over several processes and there is one: start with `accelerate launch "
            "--num_processes`, or without them."
        )
    if wanted and "ignored_params" not in signature(fully_shard).parameters:
        raise ValueError(f"FSDP and ZeRO-3 need PyTorch 2.7 or newer, this is {torch.__version__}: update it.")
    return wanted


def _is_on(what: str) -> bool:
    return os.environ.get(ranks.SPREADERS[what], "false").lower() == "true"


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


def without(training_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The training arguments for Trainer, which finds the models spread already and trains projections that need not be."""
    return {name: value for name, value in (training_args or {}).items() if name not in _ARGUMENTS}


def _spread(model: PreTrainedModel, own: set[nn.Parameter], device: torch.device, over: DeviceMesh) -> None:
    """Keep a part of the model's large matrices, on the device, and freeze it. For good: there is no way back.

    Args:
        model: On the CPU, the same in all processes, with its adapter if it has one.
        own: The model's parameters without the adapter's.
        device: Where it shall work.
        over: All processes.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"'{model.name_or_path}' is quantised, which FSDP cannot spread: pass it unquantised or go without FSDP."
        )
    model.requires_grad_(False)
    paths = layer_paths(model)
    layers = [model.get_submodule(path) for path in paths]
    inside = {p for layer in layers for p in layer.parameters() if p.ndim >= 2}
    whole = set(model.parameters()) - (inside & own)
    for layer in layers:
        fully_shard(layer, mesh=over, ignored_params=whole)
    # What calls the layers says when a pass begins and ends. (PEFT calls the `forward` of the model itself, past its hooks.)
    decoder = model.get_submodule(paths[0].rpartition(".")[0].rpartition(".")[0])
    fully_shard(decoder, mesh=over, ignored_params=whole)
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and not isinstance(tensor, DTensor):
                    tensor.data = tensor.data.to(device)


@contextmanager
def opened(
    load_source: Callable[..., PreTrainedModel],
    load_target: Callable[..., PreTrainedModel],
    adapt: Callable[[PreTrainedModel], AbstractContextManager[SourceAdapter]],
    device: torch.device,
) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, SourceAdapter]]:
    """Within the context source and target are spread, the source with its adapter.

    They are loaded whole, by one process after another, because a machine may have room for one.

    Args:
        load_source, load_target: Given `device`, load the models there.
        adapt: `source.adapted_source`, given the source.
        device: Where to work.

    Raises:
        ValueError: If the adapter changes the source's own weights, or a model is quantised.
    """
    over = init_device_mesh(device.type, (ranks.count(),))
    with ExitStack() as stack:
        with ranks.in_turn():
            source = load_source(device=torch.device("cpu"))
            own = set(source.parameters())
            adapter = stack.enter_context(adapt(source))
            if "disable_adapter" in vars(adapter.model):  # they are kept as they were, in full
                raise ValueError(
                    "The adapter changes the source's own weights (trained biases, PiSSA, OLoRA, KaSA), which is not possible when "
                    "FSDP spreads them: translate it without, or convert it to a plain LoRA first."
                )
            _spread(source, own, device, over)
            own.clear()  # nothing else may hold the whole ones, or they stay
            target = load_target(device=torch.device("cpu"))
            _spread(target, set(target.parameters()), device, over)
        yield source, target, adapter


def is_spread(model: nn.Module) -> bool:
    """Whether it is."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def leave_out(model: nn.Module) -> None:
    """Let `DistributedDataParallel`, which averages the adapter's gradients, leave the spread parameters alone."""
    names = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
