"""Models that cannot be run without values: a text goes through each of their linear modules instead."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from ..align import layer_paths
from ..models import capture
from ..tuner.checks import with_article
from ..utils import one_line
from .fake import counted


T = TypeVar("T")
_PROBE = 8  # tokens
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")


def counted_or_simplified(work: Callable[[], T], models: Mapping[str, PreTrainedModel]) -> tuple[T, list[str]]:
    """Do work with passes of models; where they cannot run, or go through a text token by token, which takes minutes,
    simplify them in place.

    To be called within a `FakeTensorMode` on materialized models.

    What goes on beside the linear modules (attention, recurrences, the choice of experts) is not in a simplified
    model.

    Returns:
        What the work returns, and the names of the models that were simplified.

    Raises:
        ValueError: If simplified models do not run either.
    """
    with _quiet():
        simplified = [name for name, model in models.items() if _goes_token_by_token(model)]
        for name in simplified:
            _simplify(models[name])
        try:
            return work(), simplified
        except Exception:  # whatever the models' code does with values that are not there
            others = [name for name, model in models.items() if name not in simplified and not _runs(model)]
        for name in others:
            _simplify(models[name])
        try:
            return work(), [*simplified, *others]
        except Exception as error:
            kinds = " and ".join(with_article(type(model).__name__) for model in models.values())
            raise ValueError(
                f"What a pass of {kinds} costs cannot be told without their weights. ({one_line(error)[:200]})"
            ) from error


def _runs(model: PreTrainedModel) -> bool:
    ids = torch.zeros(1, _PROBE, dtype=torch.long)
    try:
        with counted(), capture(model, ()):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum().backward()
    except Exception:
        return False
    return True


def _goes_token_by_token(model: PreTrainedModel) -> bool:
    """Whether a pass is a loop over the tokens, as of a recurrent model whose kernels are not installed."""
    if not getattr(model, "_is_stateful", False):
        return False
    counts = []
    for length in (_PROBE, 2 * _PROBE):
        ids = torch.zeros(1, length, dtype=torch.long)
        try:
            with torch.no_grad(), counted() as cost:
                model(input_ids=ids, use_cache=False)
        except Exception:  # is seen to where it counts
            return False
        counts.append(cost.operations)
    return counts[1] > 1.5 * counts[0]


def _simplify(model: PreTrainedModel) -> None:
    paths = layer_paths(model)
    layers = [model.get_submodule(path) for path in paths]
    body = model.get_submodule(".".join(paths[0].split(".")[:-2]))
    config = model.config.get_text_config()
    chosen = next((n for n in ("num_experts_per_tok", "moe_top_k", "top_k") if getattr(config, n, None)), None)
    experts = getattr(config, chosen) if chosen else 1
    for layer in layers:
        layer.forward = MethodType(_layer(experts), layer)
    embeddings, width = model.get_input_embeddings(), config.hidden_size

    def forward(self, input_ids=None, inputs_embeds=None, **_):
        hidden = _fitted(embeddings(input_ids) if inputs_embeds is None else inputs_embeds, width)
        for layer in layers:
            hidden = layer(hidden)
        return _Output(last_hidden_state=hidden)

    body.forward = MethodType(forward, body)


def _layer(experts: int):
    """The forward pass of a layer in which each token visits so many experts."""

    def forward(self: nn.Module, hidden: torch.Tensor, *_, **__) -> torch.Tensor:
        out, width = hidden, hidden.shape[-1]
        read: dict[tuple[str, int], torch.Tensor] = {}  # q, k and v read the same, as gate and up do
        for name, module in _linear(self):
            if (number := _EXPERT.search(name)) and int(number[1]) >= experts:
                continue
            weight = (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module).weight
            reads = weight.shape[0 if isinstance(module, Conv1D) else 1]
            at = name.rpartition(".")[0], reads
            if at not in read:
                read[at] = _fitted(hidden, reads)
            # With an activation after each, which keeps what it reads as norms and products do.
            out = out + _fitted(F.silu(module(read[at])), width)
        for matrices in _stacked(self):
            one = matrices[0]
            each = _fitted(hidden, one.shape[-1]).repeat(1, experts, 1) @ one.T
            out = out + _fitted(F.silu(each), width)[:, : out.shape[1]]
        return out

    return forward


def _linear(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A layer's linear modules, with the adapters that are on them."""
    adapted: tuple[str, ...] = ()
    for name, module in layer.named_modules():
        if name.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted += (f"{name}.",)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, (nn.Linear, Conv1D)):
            yield name, module


def _stacked(layer: nn.Module) -> Iterator[torch.Tensor]:
    """Matrices of all experts in one tensor, (experts, out, in) or the other way round."""
    for module in layer.modules():
        if not isinstance(module, (nn.Conv1d, BaseTunerLayer)):
            yield from (p for p in module.parameters(recurse=False) if p.ndim == 3)


def _fitted(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class _Output(MoeModelOutputWithPast):
    """Of a body; what else a head asks for (recurrent states, attentions) there is none of."""

    def __getattr__(self, name: str) -> Any:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's log of every operation that failed."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
