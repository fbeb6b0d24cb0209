"""Read an adapter as low-rank kernels: a plain LoRA exactly, everything else by what its modules do.

A LoRA's A and B are taken as they are. Any other module is *measured*: what it adds to its untouched base layer for
every unit input is its delta weight, one definition for all of PEFT's methods. (PEFT's own `get_delta_weight` leaves
out DoRA's magnitudes and returns rotations or nothing at all for others.) The delta is then cut to a low rank.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import ALoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..align import find_places, layer_paths, split_name, split_place
from ..utils import without_secrets
from .holdings import Fate, Holdings, kernel_parts, left_parts, options_of
from .kinds import (
    ALORA,
    BASE,
    BIAS,
    EVERYWHERE,
    EXACT_UP_TO,
    HEAD,
    SAVED,
    TOKENS,
    beside_text,
    called,
    default_rank,
    is_read,
    kept_rank,
    kind_of,
    on_a,
    on_parameter,
    outside,
)


@dataclass(frozen=True)
class LoraKernel:
    """The frozen LoRA of one source place: `delta(x) = scaling * B A x`, A (r, in_S), B (out_S, r)."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


def count_parameters(kernels: Mapping[str, LoraKernel]) -> int:
    """Parameters of the LoRA that kernels were taken from: the parts of a fused module share their A."""
    parts = {id(kernel.A): kernel.A.numel() for kernel in kernels.values()}
    return sum(parts.values()) + sum(kernel.B.numel() for kernel in kernels.values())


_PRECISIONS: dict[Any, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PRECISIONS |= {dtype: dtype for dtype in _PRECISIONS.values()}


def saved_dtype(dtypes: Iterable[str | torch.dtype]) -> torch.dtype:
    """The precision in which a translation of an adapter is saved: the half precision of its tensors, else float32.

    Args:
        dtypes: Of the tensors of a file, as safetensors calls them, or in memory. Whole numbers and 8-bit ones, in
            which no projection can be kept, count for nothing.
    """
    found = {_PRECISIONS[dtype] for dtype in dtypes if dtype in _PRECISIONS}
    return found.pop() if len(found) == 1 else torch.float32


# Relative error below which a cut loses nothing but rounding.
_EXACT = 1e-5


@dataclass(frozen=True)
class SourceAdapter:
    """An adapter on its model, and what of it kernels can express.

    Args:
        model ([`~peft.PeftModel`]): The source with the original adapter active, in eval mode: the teacher.
        kind (`str`): The adapter's type with the options that make it more than a LoRA.
        kernels (`dict[str, LoraKernel]`): For each place of the base model that can be carried over; a LoRA on a fused
            module is a kernel for each of its parts.
        converted (`dict[str, float]`): For each module whose kernel was measured, not read: the error of its kernel,
            `‖ΔW − s B A‖ / ‖ΔW‖` in the Frobenius norm.
        not_carried (`tuple[tuple[str, str], ...]`): Module name and what of it no kernel expresses. The teacher has
            it.
        renamed (`str`, *optional*): As what the tensors of its file were read, if they had other names, in a sentence.
        dtype (`torch.dtype`): The precision it is kept in, see `saved_dtype`.
    """

    model: PeftModel
    kind: str
    kernels: dict[str, LoraKernel]
    converted: dict[str, float]
    not_carried: tuple[tuple[str, str], ...]
    renamed: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def has_effect(self) -> bool:
        """Whether a kernel is another than zero: untrained ones are not."""
        return any(kernel.scaling and kernel.A.any() and kernel.B.any() for kernel in self.kernels.values())

    @property
    def metrics(self) -> dict[str, Any]:
        """The account of it in `TranslationResult.metrics`, JSON-ready; `rank` is the largest of the kernels."""
        return {
            "type": self.kind,
            "rank": max(len(kernel.A) for kernel in self.kernels.values()),
            "converted": dict(self.converted),
            "not_carried": self.holdings.not_carried,
            **({"renamed": self.renamed} if self.renamed else {}),
        }

    @property
    def holdings(self) -> Holdings:
        """What the adapter holds and what becomes of it, exactly."""
        config = self.model.active_peft_config
        found: dict[str, tuple[Fate, int | None, float | None]] = {}
        for place, kernel in self.kernels.items():
            module = split_place(place)[0]
            error = self.converted.get(module)
            found[module] = ("approximated" if error and error > _EXACT else "exact", len(kernel.A), error)
        return Holdings(
            self.kind,
            options_of(config),
            tuple(sorted({len(kernel.A) for kernel in self.kernels.values()})),
            (*kernel_parts(called(config), found), *left_parts(self.not_carried)),
            config.task_type,
            config.base_model_name_or_path,
            config.revision,
            is_read(config) and not self.converted,
        )

    @property
    def identity(self) -> str:
        """What makes two readings of the same weights differ: the adapter's options (scaling, tokens) and the
        ranks.
        """
        options = self.model.active_peft_config.to_dict()
        ranks = {name: len(kernel.A) for name, kernel in self.kernels.items()}
        # Sets have no lasting order.
        return json.dumps([options, ranks], sort_keys=True, default=lambda value: sorted(map(str, value)))


@torch.no_grad()
def read_adapter(
    model: PeftModel,
    originals: Mapping[str, torch.Tensor],
    rank: int | float | None = None,
    where: str | Path | None = None,
) -> SourceAdapter:
    """Read the active adapter of `model`, of which there is one.

    Args:
        model: The source with its adapter.
        originals: Base parameters that the adapter replaces: name in the base model → value before.
        rank: How far measured deltas are cut, `source_rank` in `translate`.
        where: Its hub id or folder, for messages; `None` for one in memory.

    Raises:
        ValueError: If a module's effect is no fixed matrix, or nothing can be carried.
    """
    (adapter,) = model.active_adapters
    config, base = model.active_peft_config, model.get_base_model()
    head, layers = base.get_output_embeddings(), tuple(f"{path}." for path in layer_paths(base))
    kernels: dict[str, LoraKernel] = {}
    errors: dict[str, float] = {}
    rest: dict[tuple[str, str], None] = dict.fromkeys(_replaced(config, base, originals))
    wrappers: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers += (f"{name}.",)
            tokens = isinstance(module, TrainableTokensWrapper)
            rest[name, TOKENS if tokens else SAVED] = None
        if not isinstance(module, BaseTunerLayer) or name.startswith(wrappers):
            continue
        if adapter not in module._get_available_adapters():
            continue
        layer, plain_name = module.get_base_layer(), name.replace(".base_layer", "")
        if module is head:
            rest[name, HEAD] = None
        elif _is_plain(module, adapter, name, originals) and name.startswith(layers):
            kernels[name] = _read(module, adapter)
            bias = module.lora_B[adapter].bias
            if bias is not None and bias.any():
                rest[name, BIAS] = None
        elif isinstance(module, ParamWrapper) and not isinstance(layer, (nn.Linear, Conv1D)):
            rest[plain_name, on_parameter(module.parameter_name)] = None
        elif not isinstance(layer, (nn.Linear, Conv1D)):
            rest[plain_name, on_a(type(layer).__name__)] = None
        elif not name.startswith(layers):
            rest[name, outside(name)] = None
        else:
            delta, bias = _measure(name, module, originals)
            if bias.any():
                rest[name, BIAS] = None
            if delta.any():
                kernels[name], errors[name] = low_rank_kernel(delta, rank, default_rank(config))
    if getattr(config, "alora_invocation_tokens", None) and kernels:
        rest[EVERYWHERE, ALORA] = None
    kind = kind_of(config)
    if not kernels:
        raise nothing_carried(kind, rest, where)
    return SourceAdapter(model, kind, _by_place(kernels, base), errors, tuple(rest))


def nothing_carried(kind: str, rest: Iterable[tuple[str, str]], where: str | Path | None = None) -> ValueError:
    """The error of an adapter without kernels that do something; `rest` is what it holds besides."""
    named = f"{kind} adapter" + (f" '{without_secrets(where)}'" if where else "")
    first = {beside_text(what, module): module for module, what in reversed(list(rest))}
    found = ", ".join(f"{module}: {what}" for what, module in first.items())
    if not found:
        return ValueError(f"The {named} changes nothing, as before training: pass one that was trained.")
    return ValueError(
        f"Nothing of the {named} can be carried over ({found}): a translation needs at least one adapter that "
        "changes a linear layer of the decoder."
    )


def _by_place(kernels: Mapping[str, LoraKernel], base: nn.Module) -> dict[str, LoraKernel]:
    """The kernels with those of fused modules in parts, which share A and have the rows of B."""
    parts: dict[str, list[str]] = {}
    for place in find_places(base):
        parts.setdefault(split_place(place)[0], []).append(place)
    split = {}
    for module, kernel in kernels.items():
        for place in parts.get(module, [module]):
            rows = split_place(place)[1]
            B = kernel.B if rows is None else rows.of(kernel.B.T).T.contiguous()
            split[place] = LoraKernel(kernel.A, B, kernel.scaling)
    return split


def _replaced(config: PeftConfig, base: nn.Module, originals: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """Parameters of the base model itself that the adapter has trained or brings along.

    Weights of adapted linear layers are measured with the adapter; those in wrappers are the wrappers' own.
    """
    parts = []
    tuned = {name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
    wrappers = tuple(
        f"{name}." for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)
    )
    for name in originals:
        module, _, parameter = name.rpartition(".")
        if name.startswith(wrappers):
            continue
        if parameter == "bias":
            parts.append((module, BIAS))
        elif not split_name(name) or module not in tuned:
            parts.append((module, BASE))
    trained = getattr(config, "bias", "none")
    if trained != "none" and not originals:  # a PeftModel in memory: what was trained is known, what was before is not
        for name, module in base.named_modules():
            adapted = isinstance(module, BaseTunerLayer)
            own = module.get_base_layer() if adapted else module
            if (adapted or trained == "all") and isinstance(getattr(own, "bias", None), nn.Parameter):
                parts.append((name.removesuffix(".base_layer"), BIAS))
    return parts


def _is_plain(module: BaseTunerLayer, adapter: str, name: str, originals: Mapping[str, torch.Tensor]) -> bool:
    """Whether the module is `W x + scaling B A x` on the W of the untouched model (aLoRA: from some token on)."""
    return (
        isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)
        and f"{name}.weight" not in originals
        and type(module.lora_variant.get(adapter)) in (type(None), ALoraLinearVariant)
        and adapter in module.lora_A
        and isinstance(module.lora_A[adapter], nn.Linear)
    )


def _read(module: LoraLayer, adapter: str) -> LoraKernel:
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return LoraKernel(A.detach().float(), B.detach().float(), float(module.scaling[adapter]))


def _measure(
    name: str, module: BaseTunerLayer, originals: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The delta weight (out, in) and bias (out,) that an adapted linear layer adds to the untouched one, float64.

    In float64 because the difference of two outputs loses the digits that they share.
    """
    weight = module.get_base_layer().weight
    if weight.is_meta:
        raise ValueError(
            f"The adapter on '{name}' is no plain LoRA, so its effect must be measured on the source model's weights: "
            "pass `source`."
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"The adapter on '{name}' is no plain LoRA and its base layer is quantized, so its effect cannot be "
            "measured: load the source model unquantized."
        )
    if module.merged:
        raise ValueError("The source's adapter is merged into the model: call `unmerge_adapter()` first.")
    adapted = copy.deepcopy(module).to(torch.float64).eval()
    untouched = copy.deepcopy(adapted.get_base_layer())
    for kind, parameter in untouched.named_parameters():
        if f"{name}.{kind}" in originals:
            parameter.copy_(originals[f"{name}.{kind}"])
    width = weight.shape[0] if isinstance(untouched, Conv1D) else weight.shape[1]
    like = {"dtype": torch.float64, "device": weight.device}

    def added(x: torch.Tensor) -> torch.Tensor:
        return (adapted(x[None]) - untouched(x[None]))[0]

    try:
        bias = added(torch.zeros(1, width, **like))[0]
        delta = (added(torch.eye(width, **like)) - bias).T
        x = torch.randn(8, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(weight.device)
        off = added(x) - bias - x @ delta.T
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"The effect of the adapter on '{name}' ({type(module).__name__}) could not be measured, so it cannot be "
            f"translated: convert it to a LoRA first. ({str(error).splitlines()[0]})"
        ) from error
    noise = 1e-7 * weight.norm().double()  # some methods compute in float32
    if off.norm() > 1e-3 * (x @ delta.T).norm() + noise * x.norm():
        raise ValueError(
            f"The effect of the adapter on '{name}' ({type(module).__name__}) is not linear in the module's input, so "
            "no fixed matrix expresses it and it cannot be translated."
        )
    return delta * (delta.norm() > noise), bias * (bias.norm() > noise)


def low_rank_kernel(delta: torch.Tensor, rank: int | float | None, default: int) -> tuple[LoraKernel, float]:
    """The best kernel of a rank for `delta` (out, in), float64, and its relative Frobenius error (Eckart-Young).

    A whole `rank` is that rank, or less if less is exact; a share is the least rank that keeps this share of the
    squared singular values (as in `peft.convert_to_lora`); `None` is the exact rank up to `EXACT_UP_TO`, else
    `default`.
    """
    most = None if isinstance(rank, float) else max(rank or 0, default, EXACT_UP_TO)
    U, S, Vh = leading_triplets(delta, most)
    energy, total = S.square().cumsum(0), delta.square().sum()
    exact = int((energy < (1 - _EXACT**2) * total).sum()) + 1
    k = int((energy < rank * total).sum()) + 1 if isinstance(rank, float) else kept_rank(exact, rank, default)
    k = min(k, exact, len(S))
    root = S[:k].sqrt()
    A, B = (root[:, None] * Vh[:k]).float().contiguous(), (U[:, :k] * root).float().contiguous()
    error = (delta - B.double() @ A.double()).norm() / delta.norm()
    return LoraKernel(A, B, 1.0), float(error)


def leading_triplets(delta: torch.Tensor, count: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `count` leading singular triplets U (out, k), S (k,), Vh (k, in); all when `count` is `None`.

    Where few of many are wanted, by subspace iteration: the cost of a full decomposition grows with the cube of the
    width.
    """
    if count is None or 8 * count > min(delta.shape):
        return torch.linalg.svd(delta, full_matrices=False)
    start = torch.randn(delta.shape[1], 2 * count, dtype=delta.dtype, generator=torch.Generator().manual_seed(0))
    Q = start.to(delta.device)
    for _ in range(8):
        Q = torch.linalg.qr(delta.T @ torch.linalg.qr(delta @ Q).Q).Q
    U, S, Wh = torch.linalg.svd(delta @ Q, full_matrices=False)
    return U[:, :count], S[:count], (Wh @ Q.T)[:count]
