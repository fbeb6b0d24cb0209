"""The plan of a translation: parameters, files, memory and time by phase."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from ..align import collate_pairs, layer_paths
from ..fit import (
    cast_config,
    check_maps,
    held_out_batches,
    held_out_positions,
    layer_groups,
    moments_size,
    texts_per_pass,
)
from ..models import check_positions, default_dtype, read_model_config, sharding, skeleton
from ..options import OF_COMMANDS, Fit, Options, Pairing, Projections, Training, takes
from ..source import list_not_carried, map_kernels, named_source, planned_source
from ..text import ANCHOR_EVERY, Survey, anchor_length, effort_of
from ..utils import FaultError, as_path, one_line, why_no_model, without_secrets
from ..utils.fields import check_count, check_number
from .bodies import counted_or_simplified
from .data_sheets import DEVICES, Device
from .devices import SHAPES_KEPT, device_of
from .fake import Cost, materialize
from .passes import closed_form_costs, refinement_costs, texts_of
from .writing import writing_cost


# Factorizations of each regression's second moments, to choose its ridge strength: n³/3 operations each, twice as dear
# where they are float64. A factorization goes through `PANEL` columns at a time, one after another.
TRIES, PANEL = 3, 32


@dataclass(frozen=True)
class PhasePlan:
    """What one phase will take.

    Args:
        seconds (`float`): Time.
        memory (`int`): Most bytes at once, models and runtime included.
        above_weights (`int`): Those of them that are not the two models' weights.
        flops (`float`): Floating-point operations of matrix products.
    """

    seconds: float
    memory: int
    above_weights: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """What a translation will take.

    Args:
        device (`Device`): Where.
        weights (`dict[str, int]`): Bytes of the `source` and `target` weights.
        parameters (`dict[str, int]`): `trained` and `source_lora`.
        files (`dict[str, int]`): Bytes of the `adapter`, in the precision of the source LoRA, of the same `folded` to
            a LoRA in float32, and of the optimizer's `checkpoint`.
        phases (`dict[str, PhasePlan]`): `load`, `text`, `closed_form`, `evaluate`, `refine`: those of
            `TranslationResult.metrics`.
        assumed (`dict`): Tokens per text and what else the plan rests on.
        not_carried (`list[dict]`): What of the adapter no kernel expresses, as in the metrics of `translate`.
    """

    device: Device
    weights: dict[str, int]
    parameters: dict[str, int]
    files: dict[str, int]
    phases: dict[str, PhasePlan]
    assumed: dict[str, Any]
    not_carried: Sequence[dict[str, str]] = ()

    @property
    def memory(self) -> int:
        """Most bytes at once."""
        return max(phase.memory for phase in self.phases.values())

    @property
    def seconds(self) -> float:
        """Time of all phases."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether the device's memory suffices."""
        return self.memory <= self.device.memory

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "memory": self.memory, "seconds": self.seconds, "fits": self.fits}

    def __str__(self) -> str:
        n = self.assumed["processes"]
        lines = [
            f"Plan for {self.device.name} ({_size(self.device.memory)})" + (f", each of {n}" if n > 1 else ""),
            f"  weights      source {_size(self.weights['source'])}, target {_size(self.weights['target'])}",
            f"  parameters   {self.parameters['trained']:,} trained (source LoRA {self.parameters['source_lora']:,})",
            f"  files        adapter {_size(self.files['adapter'])}, folded LoRA {_size(self.files['folded'])}, "
            f"checkpoint {_size(self.files['checkpoint'])}",
            f"  {'phase':<12} {'time':>9}  {'memory':>9}  above weights",
        ]
        if self.not_carried:
            lines.insert(3, f"  not carried  {list_not_carried(self.not_carried)}")
        for name, phase in self.phases.items():
            time, memory, above = _time(phase.seconds), _size(phase.memory), _size(phase.above_weights)
            lines.append(f"  {name:<12} {time:>9}  {memory:>9}  {above:>13}")
        lines.append(f"  {'in all':<12} {_time(self.seconds):>9}  {_size(self.memory):>9}")
        lines += [f"Estimated: {what}." for what in self.assumed["estimated"]]
        if not self.fits:
            lines.append(
                f"It does not fit: {_size(self.memory)} are needed and {self.device.name} has "
                f"{_size(self.device.memory)}. Lower `batch_size` or `max_length`, pass "
                "`training_args={'gradient_checkpointing': True}`, or take a larger device."
            )
        return "\n".join(lines)


@takes(OF_COMMANDS["plan"])
def plan(
    source: str | Path | PretrainedConfig | None,
    adapter: str | Path,
    target: str | Path | PretrainedConfig,
    *,
    text: Any = None,
    on: str | Device | None = None,
    tokens: int | None = None,
    aligned: float = 0.9,
    processes: int = 1,
    weight_bits: int | None = None,
    bridge: Any = None,
    start: Any = None,
    pairing: Pairing | None = None,
    projections: Projections | None = None,
    fit: Fit | None = None,
    training: Training | None = None,
    **options: Any,
) -> Plan:
    """Tell what `translate` with these arguments will take, without loading the models.

    One batch of every phase runs through the package's own code on tensors that have shapes and no memory (PyTorch's
    `FakeTensorMode`); operations and bytes are counted and multiplied.

    Args:
        source, target: Hub ids or folders with a `config.json`, or configurations. `None` takes the source from the
            adapter.
        adapter: The LoRA: hub id or folder; only this small file is read.
        text: As in `translate`; what the models write of it takes time.
        on: A name in `peft_cast.planning.DEVICES`, a `Device`, or `None` for this machine, whose rates are measured.
        tokens (`int`, *optional*): Tokens of a text of the refinement in either model, on average; `max_length`, the
            most, when not given. Texts of the closed form, and the longest, which memory must hold, are taken to have
            as many as that.
        aligned (`float`): Share of the positions at which both tokenizers have a boundary.
        processes (`int`): How many devices share the work (docs/scale.md); the plan is that of each of them. The time
            in which sharded layers travel between them is not counted.
        weight_bits (`int`, *optional*): Of models that are loaded quantized: 4 for bitsandbytes' nf4.
        bridge, start: As in `translate`, which fits no closed form when one is given.
        pairing, projections, fit, training, options: As in `translate`. `training_args` with `fsdp` shards the models,
            with `gradient_checkpointing` activations are made a second time instead of kept.

    Returns:
        `Plan`

    Raises:
        ValueError: If the device is unknown, `batch_size` is no multiple of `processes`, sharding meets `weight_bits`,
            or what is given, or a configuration, cannot be used; the message says why.
        OSError: If a configuration cannot be read.
    """
    source, adapter, target, bridge, start = map(as_path, (source, adapter, target, bridge, start))
    given = Options.of(options, plan, pairing=pairing, projections=projections, fit=fit, training=training)
    pairing, training, fit_samples = given.pairing, given.training, given.fit.fit_samples
    steps, batch_size, max_length = training.steps, training.batch_size, training.max_length
    for name, count in (("tokens", tokens), ("processes", processes), ("weight_bits", weight_bits)):
        check_count(name, count, 1)
    check_number("aligned", aligned, above=0)
    device, trainer = device_of(on), training.training_args or {}
    sharded = sharding.is_wanted(trainer)
    if batch_size % processes:
        raise ValueError(f"`batch_size` ({batch_size}) must be a multiple of the {processes} processes that share it.")
    if sharded and weight_bits:
        raise ValueError("FSDP shards no quantized models: plan with `fsdp` or with `weight_bits`, not with both.")
    own_rows = batch_size // processes
    dtype = pairing.dtype or (torch.bfloat16 if device.name in DEVICES else default_dtype(torch.device("cpu")))
    source, pairing = named_source(source, adapter, pairing)
    source_model = _model(_config(source, "source", pairing.source_revision), "source", dtype)
    target_model = _model(_config(target, "target", pairing.target_revision), "target", dtype)
    for which, model in (("source", source_model), ("target", target_model)):
        check_positions(model, which, max_length)
    check_maps(bridge, start, source_model, adapter, target_model, replace(given, pairing=pairing))
    length = min(tokens or max_length, max_length)
    weights = {"source": _weights(source_model, weight_bits), "target": _weights(target_model, weight_bits)}
    effort = effort_of(Survey() if text is None else text, steps * batch_size + training.eval_samples)
    writing = writing_cost(effort, source_model, target_model)
    here = sum(weights.values())
    base = (_kept_here((source_model, target_model), here, processes) if sharded else here) + device.runtime
    with planned_source(source_model, adapter, pairing.adapter_revision, pairing.source_rank) as planned:
        read, not_carried, estimate = planned
        estimated = [estimate] if estimate else []
        kernels = dict(read.kernels)
        modules = map_kernels(kernels, source_model, target_model, pairing)
        config = cast_config(kernels, modules, **vars(given.projections))
        together = texts_per_pass(batch_size, fit_samples, max_length, processes)
        batches, at_once = -(-fit_samples // together), -(-together // processes)
        fit_batch = collate_pairs(texts_of(at_once, max_length, 0.95))
        held_out = held_out_positions([processes * len(fit_batch["rows"])] * batches, processes)
        groups = layer_groups(modules, target_model, max(device.memory - base, 0) // 2, held_out)
        sizes = [sum(moments_size(target_model, name, held_out) for name in group.kernels) for group in groups]
        group = groups[sizes.index(max(sizes))]
        model = get_peft_model(target_model, config, low_cpu_mem_usage=True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        own = [t for n, t in model.state_dict().items() if "peft_cast_kernels" in n]
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialize(read.model)
            materialize(model)
            vocabulary = min(model.get_output_embeddings().weight.shape[0] for model in (source_model, target_model))

            def costs() -> tuple[list[Cost], list[Cost]]:
                with read.model.disable_adapter(), model.disable_adapter():
                    fit_costs = closed_form_costs(source_model, target_model, fit_batch, vocabulary, kernels, group)
                if trainer.get("gradient_checkpointing"):
                    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
                held = anchor_length(max_length)
                # The same batch is often asked for twice, and takes seconds.
                batch_of = cache(
                    partial(refinement_costs, read.model, model, own_rows, aligned, vocabulary, training, held)
                )
                usual = own_rows / ANCHOR_EVERY
                average = batch_of(length, math.ceil(usual) if training.anchor_weight else 0)
                # What memory must hold is the batch of the longest texts that brings the most anchors, of which each
                # text has a quarter of one: hardly a batch exceeds two standard deviations.
                most = min(usual + 2 * (own_rows * (ANCHOR_EVERY - 1)) ** 0.5 / ANCHOR_EVERY, own_rows)
                largest = batch_of(max_length, math.ceil(most) if training.anchor_weight else 0)
                return [*fit_costs, *average], [*largest]

            (counts, largest), simplified = counted_or_simplified(
                costs, {"source": source_model, "target": target_model}
            )
    passes, moments, unseen, goal, step, check = counts
    kept = moments.kept + unseen.kept * held_out / len(fit_batch["rows"])
    peaks = [cost.peak for cost in largest]
    estimated += [f"passes of the {which} model, by its linear modules alone" for which in simplified]
    told = {
        "shown": "by those of the adapted source",
        "auto": "if it is found to suit, by those of the adapted source",
    }
    estimated += [f"passes of the teacher `shown`, {how}" for name, how in told.items() if training.teacher == name]
    if any(cost.guessed for cost in counts):
        estimated.append("passes, as if every value that the models' code asks for were 1")
    texts = (steps + training.on_policy_steps) * own_rows
    # Folded, every module gets the largest rank, as servers want it.
    ranks = [sum(kernel.spec.r for kernel in m.peft_cast_kernels["default"]) for m in _layers(model)]
    folded = max(ranks) * sum(m.in_features + m.out_features for m in _layers(model))
    heads = 2 * vocabulary * sum(m.config.get_text_config().hidden_size for m in (source_model, target_model))
    optimizer = 16 * trained  # float32 parameters, gradients and Adam's two moments
    remembered = (
        texts * length * aligned * (training.teacher_top_k or 0) * 6 * (1 + 0.25 * (training.anchor_weight > 0))
    )
    # The largest in float64, and its factor.
    solve = 2 * 8 * max(max(m.in_features, m.out_features) for m in _layers(model)) ** 2

    def seconds(flops: float, products: float, rate: float) -> float:
        return max(flops / rate, products * device.start)  # a device waits for Python where the products are small

    def phase(
        times: float, costs: Sequence[Cost], above: float, flops32: float = 0, products32: float = 0
    ) -> PhasePlan:
        flops, products = times * sum(cost.flops for cost in costs), times * sum(cost.products for cost in costs)
        taken = seconds(flops, products, device.flops) + seconds(flops32, products32, device.flops32)
        above += device.growth
        return PhasePlan(taken, int(base + above), int(above + device.runtime), flops + flops32)

    grown = min(1, steps / SHAPES_KEPT) * device.kept_products
    fitted = (batches - len(held_out_batches(batches))) * sum(sizes) / max(sizes)
    widths = [width for m in _layers(model) for width in (m.in_features, m.out_features)]
    evaluations = (8 if training.on_policy_steps else 3) * -(-training.eval_samples // batch_size)
    phases = {
        # Spread models are loaded by one process after another.
        "load": PhasePlan(sum(weights.values()) / 1e9 * (processes if sharded else 1), int(base), device.runtime, 0.0),
        "text": phase(1 / processes, [writing], writing.peak),
        "closed_form": phase(
            len(groups) * batches,
            [passes],
            heads + max(kept + passes.peak, kept + solve),
            fitted * moments.flops + 2 * TRIES * sum(width**3 for width in widths) / 3,
            fitted * moments.products + TRIES * sum(widths) / PANEL,
        ),
        "evaluate": phase(evaluations, [check], heads + peaks[2] + optimizer // 4 + grown),
        "refine": phase(
            steps + training.on_policy_steps,
            [step, goal],
            heads + max(peaks[:2]) + optimizer + min(remembered, 2**31) + grown,
        ),
    }
    if bridge is not None or start is not None:
        del phases["closed_form"]
    if not writing.flops:
        del phases["text"]
    size = sum(t.numel() for t in own) * read.dtype.itemsize
    files = {"adapter": size, "folded": folded * 4, "checkpoint": 12 * trained}
    assumed = {
        "tokens": length,
        "aligned": aligned,
        "vocabulary": vocabulary,
        "steps": steps,
        "on_policy_steps": training.on_policy_steps,
        "batch_size": batch_size,
        "processes": processes,
        "sharded": sharded,
        "fit_samples": fit_samples,
        "fit_tokens": max_length,
        "fit_groups": len(groups),
        "dtype": str(dtype),
        "estimated": estimated,
    }
    lora = sum(len(kernel.A) * (kernel.A.shape[1] + kernel.B.shape[0]) for kernel in kernels.values())
    return Plan(device, weights, {"trained": trained, "source_lora": lora}, files, phases, assumed, not_carried)


def _kept_here(models: Sequence[PreTrainedModel], weights: int, processes: int) -> int:
    """Bytes of the models' weights in one process when they are spread: its part, all that is not spread, and two
    whole layers of the model at work, that which works and the next."""
    sizes = [[sum(p.nbytes for p in layer) for layer in _matrices(model)] for model in models]
    elsewhere = sum(map(sum, sizes)) * (1 - 1 / processes)
    return int(weights - elsewhere) + 2 * max(map(max, sizes))


def _matrices(model: PreTrainedModel) -> list[list[torch.Tensor]]:
    """The matrices of each of a skeleton's layers, without an adapter's."""
    layers = [model.get_submodule(path) for path in layer_paths(model)]
    return [[p for p in layer.parameters() if p.is_meta and p.ndim >= 2] for layer in layers]


def _layers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "peft_cast_kernels")]


def _weights(model: PreTrainedModel, bits: int | None) -> int:
    """Bytes of a skeleton's weights, those of the layers' matrices at so many bits and half a bit for their scales."""
    whole = sum(p.nbytes for p in model.parameters() if p.is_meta)
    if bits is None:
        return whole
    layers = [p for layer in _matrices(model) for p in layer]
    return whole - sum(p.nbytes for p in layers) + int(sum(p.numel() for p in layers) * (bits + 0.5) / 8)


def _model(config: PretrainedConfig, which: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model = skeleton(copy.deepcopy(config), f"The {which} model").to(dtype).eval().requires_grad_(False)
    except Exception as error:  # a configuration may say anything
        if isinstance(error, ValueError) and not isinstance(error, FaultError):
            raise
        raise ValueError(f"The {which} model cannot be built from its configuration: {one_line(error)}") from error
    with suppress(ValueError, ImportError):  # a model that has no other attention is planned with its own
        model.set_attn_implementation("sdpa")
    return model


def _config(model: str | Path | PretrainedConfig, which: str, revision: str | None) -> PretrainedConfig:
    if isinstance(model, PretrainedConfig):
        return model
    if not isinstance(model, (str, Path)) or not str(model):
        remedy = f": pass `{which}.config`" if isinstance(model, torch.nn.Module) else ""
        got = repr(model) if isinstance(model, str) else type(model).__name__
        raise ValueError(f"`{which}` must be a hub id, a folder or a configuration, got {got}{remedy}.")
    if (why := why_no_model(model)) is not None:
        raise ValueError(
            without_secrets(
                f"The configuration of the {which} model could not be read: {why}. Pass a hub id or a folder with "
                "config.json."
            )
        )
    return read_model_config(model, which, revision)


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**29 else f"{number / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
