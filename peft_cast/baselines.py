"""The honest alternatives to a translation, each usable on its own: direct copy, Cross-LoRA, a LoRA distilled from scratch.

Each returns an ordinary PEFT LoRA on the target, to be saved, merged and evaluated like any other.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import ranks
from .align import map_layers, map_modules, split_place
from .arguments import check_arguments, target_share
from .fit import Teacher, TeacherSettings, TrainingTexts, imitate
from .models import (
    LoraKernel,
    count_parameters,
    layer_count,
    load_model,
    seeded,
    shared_head,
    unload_adapters,
    untouched,
)
from .pair import map_by_similarity, open_pair, read_texts, teacher_memory
from .phases import Phases
from .result import TranslationResult
from .source import adapted_source, load_source


def direct_copy(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel,
    target: str | Path | PreTrainedModel,
    *,
    source_rank: int | float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PeftModel:
    """Put the LoRA of each source module on the target module of the same layer number and role, where the shapes fit.

    The baseline for related models of equal shape, where it can beat learned transfer.

    Args:
        source, adapter, target, source_rank, device, dtype: As in `translate`.

    Returns:
        `PeftModel`: The target with a plain LoRA. A loaded target is wrapped in place.

    Raises:
        ValueError: If no module's shapes fit.
    """
    source, target, kernels = _load(source, adapter, target, source_rank, device, dtype)
    depth = min(layer_count(source), layer_count(target))
    modules = map_modules(kernels, target, {layer: layer for layer in range(depth)}, source=source)
    factors = {}
    for name, sources in modules.kernels.items():
        kernel = kernels[sources[0]]  # layers are mapped one to one
        if (kernel.B.shape[0], kernel.A.shape[1]) == _weight(target, name).shape:
            factors[name] = [(kernel.A, kernel.scaling * kernel.B)]
    if not factors:
        raise ValueError("A direct copy is impossible: no adapted module of the source has the shape of its target.")
    return lora_from_factors(target, _by_module(target, factors))


def cross_lora(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel,
    target: str | Path | PreTrainedModel,
    *,
    rank: int = 320,
    depth_map: str | Mapping[int, int] = "proportional",
    module_map: Mapping[str, str] | None = None,
    source_rank: int | float | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PeftModel:
    """Cross-LoRA (https://arxiv.org/abs/2508.05232): align the singular subspaces of the base weights, project ΔW.

    With `W_S ≈ U_S Σ_S V_Sᵀ` and `W_T ≈ U_T Σ_T V_Tᵀ` truncated to `rank` (LoRA-Align), the Frobenius-optimal maps
    between the subspaces, `argmin_P ‖P U_S − U_T‖ = U_T U_Sᵀ` and likewise for V, give (LoRA-Shift)

        ΔW_T = U_T U_Sᵀ ΔW_S V_S V_Tᵀ

    which is kept factored. Data-free. Signs of singular vectors are arbitrary, in the paper's method as here.

    Args:
        source, adapter, target, source_rank, device, dtype: As in `translate`.
        rank (`int`): Size of the subspaces, at most the smallest side of a weight.
        depth_map: `"proportional"` or a mapping; by similarity would need text.
        module_map: As in `translate`. Kernels that share a target module add up.

    Returns:
        `PeftModel`: The target with a plain LoRA. A loaded target is wrapped in place.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    if depth_map == "similarity":
        raise ValueError("Cross-LoRA reads no text, so `depth_map='similarity'` is not possible: pass a mapping.")
    source, target, kernels = _load(source, adapter, target, source_rank, device, dtype)
    layers = map_layers(layer_count(source), layer_count(target), depth_map)
    modules = map_modules(kernels, target, layers, module_map, source)
    factors = {}
    for name, sources in modules.kernels.items():
        U_T, V_T = _subspaces(_weight(target, name), rank)
        parts = []
        for source_name in sources:
            kernel = kernels[source_name]
            U_S, V_S = _subspaces(_weight(source, source_name), rank)
            k = min(U_S.shape[1], U_T.shape[1])
            A, B = kernel.A.to(V_S.device), kernel.B.to(U_S.device)
            A_T = (A @ V_S[:, :k]).to(V_T.device) @ V_T[:, :k].T
            B_T = U_T[:, :k] @ (U_S[:, :k].T @ B).to(U_T.device)
            parts.append((A_T, kernel.scaling * B_T))
        factors[name] = parts
    return lora_from_factors(target, _by_module(target, factors))


def distill_lora(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel,
    target: str | Path | PreTrainedModel,
    *,
    text: Any = None,
    fit_text: Any = None,
    r: int | None = None,
    fit_samples: int = 64,
    eval_samples: int = 16,
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float = 0.2,
    max_length: int = 256,
    gamma: float = 1.0,
    teacher: str | float = "source",
    cache_dir: str | Path | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    training_args: Mapping[str, Any] | None = None,
    progress: bool = True,
    **pair_options: Any,
) -> TranslationResult:
    """A LoRA distilled from scratch: same text, teacher, loss and steps as a translation, but no kernel.

    What a translation must beat for the frozen kernel to earn its place. Arguments that are not listed are those of
    `translate`. Steps are relative to each factor's size here too; B, which begins at zero, is taken to have a tenth of
    A's.

    Args:
        source, adapter, target: As in `translate`.
        fit_text: Gives the anchors, after its first `fit_samples` documents, so that a translation reads the same.
        r (`int`, *optional*): Rank; by default that of the kernels which a translation would stack on one module.
        pair_options: `depth_map`, `module_map`, `source_rank`, tokenizers, revisions, `device`, `source_device` and `dtype`, as in
            `translate`.

    Returns:
        `TranslationResult`: With a plain LoRA as its adapter.
    """
    check_arguments({**pair_options, **{n: v for n, v in locals().items() if n != "pair_options"}})
    ranks.training_device(pair_options.get("device"))
    settings = TeacherSettings(gamma=gamma, target_share=target_share(teacher))
    bar = partial(tqdm, disable=not progress)
    phases = Phases()
    with ExitStack() as stack:
        with phases.measure("load"):
            pair = stack.enter_context(open_pair(source, adapter, target, **pair_options))
        with phases.measure("text"):
            texts = read_texts(
                pair, text, fit_text, train=steps * batch_size, held_out=eval_samples, fit=fit_samples,
                anchored=gamma > 0, max_length=max_length, seed=seed, bar=bar,
            )  # fmt: skip
        if pair_options.get("depth_map") == "similarity":
            pair = map_by_similarity(pair, texts.fit, pair_options.get("module_map"))
        stacked: dict[str, int] = defaultdict(int)
        for place, sources in pair.modules.kernels.items():
            stacked[split_place(place)[0]] += sum(len(pair.kernels[s].A) for s in sources)
        r = r or max(stacked.values())
        memory = teacher_memory(pair, settings, cache_dir)
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(stacked), task_type="CAUSAL_LM")
        try:
            with seeded(seed):
                model = get_peft_model(pair.target, config).eval()
            ids = pair.vocabulary
            with shared_head(pair.source, ids.source_ids), shared_head(pair.target, ids.target_ids):
                kl, refinement, excitement = imitate(
                    model, Teacher(pair.adapted, settings, memory=memory), TrainingTexts(texts.train, texts.anchors),
                    texts.held_out, batch_size, phases, steps=steps, learning_rate=learning_rate, seed=seed,
                    output_dir=output_dir, training_args=training_args, progress=progress,
                )  # fmt: skip
        except BaseException:
            unload_adapters(pair.target)
            raise
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.requires_grad_(False)
        config.inference_mode = True
    metrics = {
        "kl": {"target": kl["target"], "translated": kl["end"]},
        "excitement": float(torch.cat(excitement).mean()),
        "parameters": {
            "trained": trained,
            "source_lora": count_parameters(pair.kernels),
        },
        "refinement": refinement.metrics,
        "text": texts.metrics,
        "phases": phases.costs,
        "settings": {
            "loss": dataclasses.asdict(settings), "steps": steps, "batch_size": batch_size,
            "learning_rate": learning_rate, "max_length": max_length, "seed": seed, "rank": r,
        },
    }  # fmt: skip
    result = TranslationResult(model, metrics, refinement.history, pair.modules)
    if output_dir is not None:
        ranks.shared(partial(result.save_pretrained, output_dir))
    return result


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
        r=r, lora_alpha=r, target_modules=list(factors), rank_pattern=others, alpha_pattern=others,
        task_type="CAUSAL_LM", fan_in_fan_out=any(isinstance(target.get_submodule(n), Conv1D) for n in factors),
    )  # fmt: skip
    model = get_peft_model(target, config, adapter_name=adapter_name)
    with torch.no_grad():
        for name, (A, B) in factors.items():
            layer = target.get_submodule(name)
            if not hasattr(layer, "lora_A"):
                unload_adapters(target)
                raise ValueError(
                    f"PEFT puts a LoRA for '{name}' on the experts of {type(target).__name__} instead, so this baseline is not "
                    "possible there: pass an adapter, or a `module_map`, that leaves its MLPs out."
                )
            layer.lora_A[adapter_name].weight.copy_(A)
            layer.lora_B[adapter_name].weight.copy_(B)
    return model.eval()


def _load(
    source, adapter, target, source_rank, device, dtype
) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, LoraKernel]]:
    device = ranks.begin(device)
    source = load_source(source, adapter, device, dtype=dtype)
    target = load_model(target, "target", device, dtype=dtype)
    layers = layer_count(source)
    with (
        untouched(adapter if isinstance(adapter, PeftModel) else source),
        adapted_source(source, adapter, source_rank=source_rank) as on_source,
    ):
        if layer_count(source) != layers:
            raise ValueError(
                "The adapter replicates layers of the source, which this baseline does not follow: load it yourself and pass "
                "the PeftModel."
            )
        kernels = on_source.kernels
    return source, target, kernels


def _by_module(
    target: PreTrainedModel, factors: Mapping[str, list[tuple[torch.Tensor, torch.Tensor]]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Stack the factors A (r, in_T) and B (rows, r) that belong on each place, by module: B (out_T, R)."""
    stacks: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for place, parts in factors.items():
        module, rows = split_place(place)
        width = len(_weight(target, module))
        stack = stacks[module]
        for A, B in parts:
            B = B if rows is None else rows.into(B.T, width).T
            known = next((i for i, (other, _) in enumerate(stack) if other is A), None)
            if known is None:
                stack.append((A, B))
            else:  # parts of a fused module come from one LoRA
                stack[known] = (A, stack[known][1] + B)
    return {name: (torch.cat([A for A, _ in s]), torch.cat([B for _, B in s], dim=1)) for name, s in stacks.items()}


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
