"""Read an adapter for a plan: on a model without weights, where nothing can be measured.

A plain LoRA is read as it is. Of any other adapter the configuration and the file's header tell which modules it
changes and the rank of what it adds to each; a LoRA of the rank that the kernel would be cut to stands in for it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _get_in_out_features, replicate_layers
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..align import layer_paths
from ..models import unload_adapters, without_advice
from ..tuner import CastConfig
from ..tuner.checks import TensorInfo
from ..utils import read_adapter_config
from .disagreement import warn_of_base
from .files import holdings_of
from .kernels import SourceAdapter, read_adapter, saved_dtype
from .kinds import PREFIX, default_rank, is_read, kept_rank, kind_of, rank_of_change, variants_of
from .loading import adapted_source, base_name, check_adapter, check_on, matched, nothing_of
from .renamed import readable


_STAND_IN = "peft_cast_stand_in"


@contextmanager
def planned_source(
    source: PreTrainedModel, adapter: str | Path, revision: str | None = None, source_rank: int | float | None = None
) -> Iterator[tuple[SourceAdapter, list[dict[str, str]], str | None]]:
    """As `adapted_source`, on a skeleton; the kernels have the shapes that they will have, and no values.

    Args:
        source: The model without weights, whose layers are replicated for good if the adapter asks for it.
        adapter, revision, source_rank: As for `adapted_source`.

    Yields:
        The adapter, what no kernel expresses of it, and what is estimated, `None` for a LoRA that is read as it is.

    Raises:
        ValueError: If the adapter cannot be read, does not fit the model, or changes no linear module of a layer.
    """
    config = read_adapter_config(adapter, revision)
    if _is_read(source, config):
        with adapted_source(source, adapter, revision, source_rank) as read:
            yield read, read.holdings.not_carried, None
        return
    check_adapter(adapter, revision)
    check_on(source, adapter, revision, config)
    match = matched(adapter, revision, source, config)
    warn_of_base(adapter, match)
    with readable(adapter, revision, match) as file:
        config, header = file.config, file.header
    if layers := getattr(config, "layer_replication", None):
        replicate_layers(source, layers)
    ranks = _ranks(source, config, header, source_rank)
    if not ranks:
        raise nothing_of(adapter, config, header)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != usual}
    stand_in = LoraConfig(r=usual, target_modules=list(ranks), rank_pattern=others)
    try:
        with without_advice():
            model = get_peft_model(source, stand_in, adapter_name=_STAND_IN, low_cpu_mem_usage=True)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):  # beside the skeleton, as the tensors of a file are
                layer.lora_A.to_empty(device="cpu")
                layer.lora_B.to_empty(device="cpu")
        model.requires_grad_(False)
        estimated = f"the {kind_of(config)} adapter, as a LoRA of rank {max(ranks.values())}"
        read = replace(read_adapter(model.eval(), {}), dtype=saved_dtype(info.dtype for info in header.values()))
        yield read, holdings_of(config, header).not_carried, estimated
    finally:
        unload_adapters(source)


def _is_read(source: PreTrainedModel, config: PeftConfig) -> bool:
    """Whether the adapter is a LoRA that can be read and run without the weights of its model. Its variants cannot:
    most must be measured, and what aLoRA computes depends on where in a text its tokens are.
    """
    if not is_read(config) or variants_of(config):
        return False
    wanted = tuple(f".{part}" for part in getattr(config, "target_parameters", None) or ())
    weights = [f".{name}.weight" for name, module in source.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return not any(weight.endswith(wanted) for weight in weights)


def _ranks(
    source: PreTrainedModel, config: PeftConfig, header: Mapping[str, TensorInfo], source_rank: int | float | None
) -> dict[str, int]:
    """The rank of the kernel of each linear module that the adapter changes."""
    modules, own = dict(source.named_modules()), dict(source.named_parameters(remove_duplicate=False))
    tensors: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, info in header.items():
        plain = base_name(key.removeprefix(PREFIX))
        if not key.startswith(PREFIX) or plain in own:  # shared by all modules; weights of the base model itself
            continue
        module = plain
        while module and module not in modules:
            module = module.rpartition(".")[0]
        tensors[module][plain.removeprefix(f"{module}.")] = info.shape
    head, ranks, layers = source.get_output_embeddings(), {}, tuple(f"{path}." for path in layer_paths(source))
    for module, shapes in tensors.items():
        layer = modules[module]
        if layer is head or not isinstance(layer, (nn.Linear, Conv1D)) or not module.startswith(layers):
            continue
        exact = min(_exact_rank(config, module, shapes), *_get_in_out_features(layer))
        whole = None if isinstance(source_rank, float) else source_rank  # how much a share keeps must be measured
        ranks[module] = kept_rank(exact, whole, default_rank(config))
    return ranks


def _exact_rank(config: Any, module: str, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """The rank of what the adapter adds to a module's weight, infinite where only the module's widths bound it."""
    if isinstance(config, CastConfig):
        return sum(shape[0] for tensor, shape in shapes.items() if tensor.endswith(".A"))
    patterns = getattr(config, "rank_pattern", None) or {}
    r = patterns.get(get_pattern_key(patterns.keys(), module), getattr(config, "r", 1))
    first = shapes.get("lora_A.weight", shapes.get("lora_A"))
    return rank_of_change(config, first[0] if first else r) or math.inf
