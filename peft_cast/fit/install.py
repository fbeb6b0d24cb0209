"""Put kernels and their fitted projections on a target model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..align import ModuleMap, place_size, split_place
from ..source import LoraKernel
from ..tuner import CastConfig, KernelSpec, Projection
from ..utils import without_secrets
from .maps import ClosedForm, KernelFit


def cast_config(kernels: Mapping[str, LoraKernel], modules: ModuleMap, **options: Any) -> CastConfig:
    """The configuration of an adapter that carries `kernels` where `modules` says; `options` as in `CastConfig`.

    Projections are compact when no type is given, factored if they are shared.
    """
    specs: dict[str, list[KernelSpec]] = defaultdict(list)
    for place, sources in modules.kernels.items():
        module, rows = split_place(place)
        for s in sources:
            A, B, scaling = kernels[s].A, kernels[s].B, kernels[s].scaling
            specs[module].append(KernelSpec(A.shape[0], A.shape[1], B.shape[0], scaling, s, rows))
    r = max(spec.r for group in specs.values() for spec in group)
    if options.get("projection_type") is None:
        options["projection_type"] = "factored" if options.get("projection_sharing") else "compact"
    return CastConfig(kernels=dict(specs), r=r, task_type="CAUSAL_LM", **options)


def check_adapter_name(name: Any, remedy: str = "another `adapter_name`, one") -> None:
    """
    Raises:
        ValueError: If an adapter cannot have the name: PyTorch makes a module of it.
    """
    if not isinstance(name, str):
        raise ValueError(f"`adapter_name` must be a string, got {name!r}: several names are for a list of adapters.")
    if not name or {".", "/", "\\"} & set(name) or hasattr(torch.nn.ModuleDict, name):
        raise ValueError(f"An adapter cannot be called '{name}': pass {remedy} without dots and slashes.")


def adapter_name_of(adapter: Any) -> str:
    """What a configuration says of the source adapter: its hub id or path, for a PeftModel that of its base."""
    name = adapter.active_peft_config.base_model_name_or_path if isinstance(adapter, PeftModel) else adapter
    return without_secrets(name)


@torch.no_grad()
def install(
    target: PreTrainedModel,
    config: CastConfig,
    kernels: Mapping[str, LoraKernel],
    closed_form: ClosedForm[KernelFit],
    *,
    gain: float | None = None,
    adapter_name: str = "default",
    revision: str | None = None,
) -> PeftModel:
    """Wrap the target, with the kernels and the fitted projections in place.

    Args:
        target: The model. On the meta device (no weights) the adapter itself is made on the CPU.
        config: What lands where, see `cast_config`.
        kernels: By source place.
        closed_form: The fitted projections.
        gain: Factor on all deltas; 1/√R² of the output projection, at most 2, when `None`.
        adapter_name, revision: As in `get_peft_model`.

    Raises:
        ValueError: If the projections are made for a target of other shapes.
    """
    check_shapes(target, kernels, closed_form)
    model = get_peft_model(target, config, adapter_name=adapter_name, revision=revision)
    # By projection, because kernels may share them.
    into: dict[Projection, list[tuple]] = defaultdict(list)
    out_of: dict[Projection, list[tuple]] = defaultdict(list)
    for name, fits in closed_form.kernels.items():
        placed = target.get_submodule(split_place(name)[0]).peft_cast_kernels[adapter_name]
        if placed[0].A.is_meta:
            placed.to_empty(device="cpu")
        of_source = {kernel.spec.source_place: kernel for kernel in placed}
        for fit in fits:
            kernel = of_source[fit.source_place]
            kernel.A.copy_(kernels[fit.source_place].A)
            kernel.B.copy_(kernels[fit.source_place].B)
            factor = gain if gain is not None else fit.usual_gain
            device = kernel.A.device
            into[kernel.P_in].append((kernel.A, fit.A_P_in.to(device)))
            out_of[kernel.P_out].append((kernel.B, factor * fit.P_out_B.to(device)))
    for projection, parts in into.items():
        projection.set_after(*map(torch.cat, zip(*parts)))
    for projection, parts in out_of.items():
        projection.set_before(*(torch.cat(part, dim=1) for part in zip(*parts)))
    return model


def check_shapes(
    target: PreTrainedModel, kernels: Mapping[str, LoraKernel], closed_form: ClosedForm[KernelFit]
) -> None:
    """Fitted maps may come from a file, and be those of another target.

    Raises:
        ValueError: If they do not fit the target and the kernels.
    """
    for place, fits in closed_form.kernels.items():
        if (size := place_size(target, place)) is None:
            raise ValueError(f"The fitted maps lead to '{place}', which the target does not have: {_REMEDY}.")
        ins, outs = size
        for fit in fits:
            r = len(kernels[fit.source_place].A)
            if fit.A_P_in.shape != (r, ins) or fit.P_out_B.shape != (outs, r):
                raise ValueError(
                    f"The fitted maps for '{place}' have the shapes {tuple(fit.A_P_in.shape)} and "
                    f"{tuple(fit.P_out_B.shape)}, the target and the kernel from '{fit.source_place}' need {(r, ins)} "
                    f"and {(outs, r)}: {_REMEDY}."
                )


_REMEDY = "they were made for another target, or are broken; pass that target, or fit them anew"
