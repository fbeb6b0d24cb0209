"""The honest alternatives to a translation, each usable on its own: direct copy, Cross-LoRA, a LoRA distilled from
scratch.

Each returns an ordinary PEFT LoRA on the target, to be saved, merged and evaluated like any other.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..align import ModuleMap, layer_count, map_modules, place_size, split_place
from ..models import load_model, unload_adapters, untouched
from ..options import Options, Pairing, takes
from ..refine import distill_lora
from ..source import Holdings, LoraKernel, adapted_source, check_pair, load_source, map_kernels
from ..utils import as_path, distributed, read_adapter_config
from ..utils.fields import check_count


__all__ = ["cross_lora", "direct_copy", "distill_lora", "lora_from_factors"]
_LOADING = "source_revision adapter_revision target_revision source_rank device dtype"


@takes(_LOADING)
def direct_copy(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel,
    target: str | Path | PreTrainedModel,
    *,
    pairing: Pairing | None = None,
    **options: Any,
) -> PeftModel:
    """Put the LoRA of each source module on the target module of the same layer number and role, where the shapes fit.

    The baseline for related models of equal shape, where it can beat learned transfer.

    Args:
        source, adapter, target: As in `translate`.
        pairing, options: `source_rank`, revisions, `device` and `dtype`, as in `translate`.

    Returns:
        `PeftModel`: The target with a plain LoRA. A loaded target is wrapped in place. A warning names what of the
        adapter is lost.

    Raises:
        ValueError: If no module's shapes fit.
    """
    pairing = Options.of(options, direct_copy, pairing=pairing).pairing
    source, target, kernels, held = _load(source, adapter, target, pairing, _by_number)
    modules = _by_number(kernels, source, target)
    factors, without_place = {}, modules.metrics["unmapped"]
    for name, sources in modules.kernels.items():
        kernel = kernels[sources[0]]  # layers are mapped one to one
        if place_size(source, sources[0]) == place_size(target, name):
            factors[name] = [(kernel.A, kernel.scaling * kernel.B)]
        else:
            without_place.append({"module": sources[0], "what": "its shape is not its target's"})
    model = lora_from_factors(target, _by_module(target, factors))
    _warn_of_lost(adapter, held, without_place, "a direct copy", "use `translate`, which fits maps for them")
    return model


@takes(f"depth_map module_map {_LOADING}")
def cross_lora(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel,
    target: str | Path | PreTrainedModel,
    *,
    rank: int = 320,
    pairing: Pairing | None = None,
    **options: Any,
) -> PeftModel:
    """Cross-LoRA (https://arxiv.org/abs/2508.05232): align the singular subspaces of the base weights, project ΔW.

    With `W_S ≈ U_S Σ_S V_Sᵀ` and `W_T ≈ U_T Σ_T V_Tᵀ` truncated to `rank` (LoRA-Align), the Frobenius-optimal maps
    between the subspaces, `argmin_P ‖P U_S − U_T‖ = U_T U_Sᵀ` and likewise for V, give (LoRA-Shift)

        ΔW_T = U_T U_Sᵀ ΔW_S V_S V_Tᵀ

    which is kept factored. Data-free. Signs of singular vectors are arbitrary, in the paper's method as here.

    Args:
        source, adapter, target: As in `translate`.
        rank (`int`): Size of the subspaces, at most the smallest side of a weight.
        pairing, options: `depth_map` (not by similarity, which would need text), `module_map`, `source_rank`,
            revisions, `device` and `dtype`, as in `translate`. Kernels that share a target module add up.

    Returns:
        `PeftModel`: The target with a plain LoRA. A loaded target is wrapped in place. A warning names what of the
        adapter is lost.
    """
    check_count("rank", rank, 1)
    pairing = Options.of(options, cross_lora, pairing=pairing).pairing
    if pairing.depth_map == "similarity":
        raise ValueError("Cross-LoRA reads no text, so `depth_map='similarity'` is not possible: pass a mapping.")
    source, target, kernels, held = _load(source, adapter, target, pairing)
    modules = map_kernels(kernels, source, target, pairing)
    factors: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, sources in modules.kernels.items():
        U_T, V_T = _subspaces(_weight(target, name), rank)
        factors[name] = []
        for kernel, weight in ((kernels[one], _weight(source, one)) for one in sources):
            U_S, V_S = _subspaces(weight, rank)
            k = min(U_S.shape[1], U_T.shape[1])
            A_T = (kernel.A.to(V_S.device) @ V_S[:, :k]).to(V_T.device) @ V_T[:, :k].T
            B_T = U_T[:, :k] @ (U_S[:, :k].T @ kernel.B.to(U_S.device)).to(U_T.device)
            factors[name].append((A_T, kernel.scaling * B_T))
    model = lora_from_factors(target, _by_module(target, factors))
    _warn_of_lost(adapter, held, modules.metrics["unmapped"], "Cross-LoRA", "name one in `module_map`")
    return model


def lora_from_factors(
    target: PreTrainedModel, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], adapter_name: str = "default"
) -> PeftModel:
    """A plain LoRA on `target` with the given weights, `ΔW = B A`.

    Args:
        target: The model; it is wrapped in place.
        factors: Module name → A (r, in_T) and B (out_T, r). Ranks may differ between modules.
        adapter_name (`str`): Name of the adapter.
    """
    ranks = {name: len(A) for name, (A, _) in factors.items()}
    r = max(ranks.values())
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=list(factors),
        rank_pattern=others,
        alpha_pattern=others,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(target.get_submodule(n), Conv1D) for n in factors),
    )
    model = get_peft_model(target, config, adapter_name=adapter_name)
    with torch.no_grad():
        for name, (A, B) in factors.items():
            layer = target.get_submodule(name)
            if not hasattr(layer, "lora_A"):
                unload_adapters(target)
                raise ValueError(
                    f"PEFT puts a LoRA for '{name}' on the experts of {type(target).__name__} instead, so this "
                    "baseline is not possible there: pass an adapter, or a `module_map`, that leaves its MLPs out."
                )
            layer.lora_A[adapter_name].weight.copy_(A)
            layer.lora_B[adapter_name].weight.copy_(B)
    return model.eval()


def _by_number(
    places: Iterable[str], source: PreTrainedModel, target: PreTrainedModel, _: Pairing | None = None
) -> ModuleMap:
    """Where a direct copy puts kernels: in the layer of the same number, on the module of the same role.

    Raises:
        ValueError: If no module's shapes fit.
    """
    depth = min(layer_count(source), layer_count(target))
    with suppress(ValueError):  # which names options that there are none of here
        modules = map_modules(places, target, {layer: layer for layer in range(depth)}, source=source)
        if any(place_size(source, one[0]) == place_size(target, place) for place, one in modules.kernels.items()):
            return modules
    raise ValueError(
        "A direct copy is impossible: no adapted module of the source has the shape of its target: use `translate`, "
        "which fits maps."
    )


def _load(
    source, adapter, target, pairing: Pairing, then: Callable[..., ModuleMap] = map_kernels
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, LoraKernel], Holdings]:
    """Both models, the adapter's kernels, and what it holds besides."""
    source, adapter, target = map(as_path, (source, adapter, target))
    named = isinstance(adapter, (str, Path))  # of others `check_pair` tells what they are
    config = read_adapter_config(adapter, pairing.adapter_revision) if named else None
    if getattr(config, "layer_replication", None):
        raise ValueError(
            "The adapter replicates layers of the source, which this baseline does not follow: load it yourself and "
            "pass the PeftModel."
        )
    check_pair(source, [adapter], target, pairing, then)
    device = distributed.init(pairing.device)
    source = load_source(source, adapter, device, pairing.source_revision, pairing.adapter_revision, pairing.dtype)
    with (
        untouched(adapter if isinstance(adapter, PeftModel) else source),
        adapted_source(source, adapter, pairing.adapter_revision, pairing.source_rank) as on_source,
    ):
        kernels, held = on_source.kernels, on_source.holdings
    target = load_model(target, "target", device, pairing.target_revision, pairing.dtype)
    return source, target, kernels, held


def _warn_of_lost(adapter, held: Holdings, without_place: list[dict[str, str]], on: str, remedy: str) -> None:
    lost = held.lost(None if isinstance(adapter, PeftModel) else adapter, without_place, on, remedy)
    if lost is not None:
        warnings.warn(lost, stacklevel=3)


def _by_module(
    target: PreTrainedModel, factors: Mapping[str, list[tuple[torch.Tensor, torch.Tensor]]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Stack the factors A (r, in_T) and B (rows, r) that belong on each place, by module: B (out_T, R)."""
    stacks: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = defaultdict(dict)
    for place, parts in factors.items():
        module, rows = split_place(place)
        width = len(_weight(target, module))
        for A, B in parts:
            B = B if rows is None else rows.into(B.T, width).T
            # Parts of a fused module come from one LoRA.
            stacks[module][id(A)] = (A, stacks[module][id(A)][1] + B if id(A) in stacks[module] else B)
    columns = {name: zip(*stack.values()) for name, stack in stacks.items()}
    return {name: (torch.cat(A), torch.cat(B, dim=1)) for name, (A, B) in columns.items()}


def _weight(model: PreTrainedModel, place: str) -> torch.Tensor:
    """The weight of a place as (out, in), whether or not an adapter is on its module."""
    name, rows = split_place(place)
    module = model.get_submodule(name)
    module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise ValueError(f"'{name}' is no linear layer but {type(module).__name__}.")
    weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
    return weight if rows is None else rows.of(weight.T).T


def _subspaces(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading left (out, k) and right (in, k) singular vectors, float32, k = min(rank, out, in)."""
    U, _, V = torch.linalg.svd(weight.float(), full_matrices=False)
    return U[:, :rank], V[:rank].T
