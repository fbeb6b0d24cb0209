"""The one verb: translate a LoRA from the model it was trained on to another."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments

from .align import AlignedPair, ModuleMap, align_texts, layer_pairs, map_layers, map_modules, shared_vocabulary
from .fit import CastTrainer, ClosedForm, TeacherSettings, distance_to_teacher, fit_closed_form
from .fit.refine import Teacher
from .models import (
    LoraKernel,
    adapted_source,
    default_device,
    load_model,
    load_tokenizer,
    moved,
    read_adapter_config,
    read_kernels,
    shared_head,
    unload_adapters,
    untouched,
)
from .phases import Phases
from .result import TranslationResult
from .text import SelfWritten, read_text, write_texts
from .tuner import CastConfig, KernelSpec


def translate(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel,
    target: str | Path | PreTrainedModel,
    *,
    text: Any = None,
    fit_text: Any = None,
    fit_samples: int = 64,
    eval_samples: int = 16,
    steps: int = 100,
    batch_size: int = 8,
    learning_rate: float = 0.1,
    max_length: int = 256,
    alpha: float = 1.0,
    beta: float = 0.0,
    temperature: float = 1.0,
    teacher: Literal["source", "delta"] | float = "source",
    depth_map: str | Mapping[int, int] = "proportional",
    module_map: Mapping[str, str] | None = None,
    projection_type: Literal["factored", "full"] = "factored",
    projection_size: int | None = None,
    ridge: float | None = None,
    gain: float | None = None,
    seed: int = 0,
    source_tokenizer: PreTrainedTokenizerBase | str | None = None,
    target_tokenizer: PreTrainedTokenizerBase | str | None = None,
    source_revision: str | None = None,
    adapter_revision: str | None = None,
    target_revision: str | None = None,
    adapter_name: str = "default",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    output_dir: str | Path | None = None,
    training_args: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TranslationResult:
    """Translate a LoRA trained on `source` so that it works on `target`.

    The two models are aligned (tokens, vocabulary, depth, modules), the projections around the frozen LoRA are fitted
    in closed form and then refined with `alpha T² KL + beta MSE` against the adapted source model. The method is CAST
    (https://arxiv.org/abs/2510.17902), with output projections fitted from gradients.

    Args:
        source: The model the LoRA was trained on: hub id, path or loaded model. `None` takes it from the adapter.
        adapter: The LoRA: hub id, path, or a PeftModel, whose base then is the source.
        target: The model it shall work on: hub id, path or loaded model. A loaded one is wrapped in place, as
            `get_peft_model` does; `result.model.unload()` gives it back.
        text: What the refinement reads: `None` for C4 (`allenai/c4`, en, streamed), a hub dataset id, a local
            jsonl/txt/parquet file, an iterable of strings, a `datasets.Dataset`, a `Corpus`, `SelfWritten` (text that
            the adapted source writes, which shows the adapter's effect best), or a `Mixture`.
        fit_text: What the closed form reads, general text, likewise; the same as `text` when not given.
        fit_samples (`int`): Texts for the closed form.
        eval_samples (`int`): Texts kept out of the refinement to measure the distance to the teacher.
        steps (`int`): Refinement steps; 0 keeps the closed form.
        batch_size (`int`): Texts per step (and device).
        learning_rate (`float`): Peak step of AdamW relative to the size (root mean square) of each factor, decayed
            linearly to 0.
        max_length (`int`): Most tokens per text; longer texts are cut.
        alpha (`float`): Weight of the KL divergence.
        beta (`float`): Weight of the hidden-state MSE, normalised per layer. 0, the default, skips it: its worth is not
            measured yet (docs/results.md).
        temperature (`float`): Temperature of the KL divergence.
        teacher: `"source"` imitates the adapted source model; `"delta"` adds only what the LoRA changes to the
            target's own prediction; a number from 0 (`source`) to 1 (`delta`) mixes them.
        depth_map: `"proportional"`, or a mapping of source layers to target layers.
        module_map: Source module name → target module name (last parts, e.g. `{"fc1": "up_proj"}`) where names differ
            and are not known.
        projection_type: `"factored"` or `"full"` matrices, see `CastConfig`.
        projection_size (`int`, *optional*): Inner size of factored projections; the LoRA's rank when not given.
        ridge (`float`, *optional*): Ridge strength of the closed form; chosen on held-out text when not given.
        gain (`float`, *optional*): Factor on the closed form's deltas. A regression that explains little shrinks; when
            not given, each kernel is scaled by 1/√R² of its output projection, at most 2.
        seed (`int`): Seed of the sampled text and the training order.
        source_tokenizer, target_tokenizer: Needed only if they cannot be loaded from where the models come from.
        source_revision, adapter_revision, target_revision (`str`, *optional*): Hub revisions.
        adapter_name (`str`): Name of the adapter on the target.
        device: Where to work: the accelerator when there is one, else the CPU. Loaded models return to where they were.
        dtype (`torch.dtype`, *optional*): Precision of models loaded here; bfloat16 where the hardware is fast at it
            (GPU, CPU with AMX), else float32.
        output_dir: Where Trainer writes checkpoints and the finished adapter is saved; nothing is written when `None`.
        training_args: Further `transformers.TrainingArguments`, which take precedence (gradient accumulation, bf16,
            logging, save_steps, ...).
        progress (`bool`): Show progress bars.

    Returns:
        `TranslationResult`: The PeftModel on the target, metrics, and `save_pretrained`.

    Raises:
        ValueError: For arguments, adapters, models, tokenizers or text that cannot be used; the message says why.
        OSError: If a model, adapter or corpus cannot be reached.
        FloatingPointError: If the loss becomes NaN or infinite.
    """
    settings = TeacherSettings(alpha, beta, temperature, _target_share(teacher))
    _check_positive(fit_samples=fit_samples, eval_samples=eval_samples, batch_size=batch_size, max_length=max_length)
    bar = partial(tqdm, disable=not progress)
    phases = Phases()
    device = torch.device(device) if device is not None else default_device()
    with ExitStack() as stack:
        with phases.measure("load"):
            source = _load_source(source, adapter, device, source_revision, adapter_revision, dtype)
            target = load_model(target, "target", device, target_revision, dtype)
            if source is target:
                raise ValueError("`source` and `target` are the same object: load the model twice.")
            tokenizers = (
                load_tokenizer(source_tokenizer, source, "source", source_revision),
                load_tokenizer(target_tokenizer, target, "target", target_revision),
            )
            # A PeftModel as `adapter` is its source's wrapper: its own modes are restored too.
            stack.enter_context(untouched(adapter if isinstance(adapter, PeftModel) else source, target))
            stack.enter_context(moved(source, device))
            stack.enter_context(moved(target, device))
            teacher_model = stack.enter_context(adapted_source(source, adapter, adapter_revision))
            teacher_model.eval()
            kernels = read_kernels(teacher_model)
            modules = _map(source, target, kernels, depth_map, module_map)
        with phases.measure("text"):
            train, held_out, fit, text_metrics = _read(
                teacher_model, tokenizers, text, fit_text, (steps * batch_size, eval_samples, fit_samples), max_length,
                seed, bar,
            )  # fmt: skip
        vocabulary = shared_vocabulary(*tokenizers, *(_rows(model) for model in (source, target)))
        with phases.measure("closed_form"), teacher_model.disable_adapter():
            closed_form = fit_closed_form(
                source, target, fit, vocabulary, kernels, modules,
                batch_size=batch_size, ridge=ridge, hidden=beta > 0, progress=partial(bar, desc="closed form"),
            )  # fmt: skip
        config = _config(
            kernels,
            modules,
            projection_type,
            projection_size,
            source.name_or_path,
            source_revision,
            adapter,
            adapter_revision,
        )
        try:
            model = _install(target, config, adapter_name, kernels, closed_form, gain, target_revision)
            hidden = {path: (layer_pairs(modules)[path], m) for path, m in closed_form.hidden_maps.items()}
            teacher_at_work = Teacher(teacher_model, settings, hidden)
            with shared_head(source, vocabulary.source_ids), shared_head(target, vocabulary.target_ids):
                measure = partial(distance_to_teacher, model, teacher_at_work, held_out, batch_size)
                with phases.measure("evaluate"):
                    with model.disable_adapter():
                        kl = {"target": measure()}
                    kl["closed_form"] = measure()
                with phases.measure("refine"):
                    history = _refine(
                        model, teacher_at_work, train, steps, batch_size, learning_rate, seed, device, output_dir,
                        training_args, progress,
                    )  # fmt: skip
                with phases.measure("evaluate"):
                    kl["translated"] = measure() if steps else kl["closed_form"]
        except BaseException:
            unload_adapters(target)
            raise
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.requires_grad_(False)
        config.inference_mode = True
    metrics = {
        "kl": kl,
        "parameters": {"trained": trained, "source_lora": sum(k.A.numel() + k.B.numel() for k in kernels.values())},
        "closed_form": {
            "positions": closed_form.positions,
            "modules": {
                name: [{"source_module": f.source_module, "r2_in": f.r2_in, "r2_out": f.r2_out} for f in fits]
                for name, fits in closed_form.kernels.items()
            },
            "hidden_r2": closed_form.hidden_r2,
        },
        "alignment": {"shared_tokens": len(vocabulary), "depth_map": modules.layers, "unmapped": modules.unmapped},
        "text": text_metrics,
        "phases": phases.costs,
        "settings": {
            "loss": dataclasses.asdict(settings), "steps": steps, "batch_size": batch_size,
            "learning_rate": learning_rate, "max_length": max_length, "gain": gain, "ridge": ridge, "seed": seed,
        },
    }  # fmt: skip
    result = TranslationResult(model, metrics, history, modules)
    if output_dir is not None:
        result.save_pretrained(output_dir)
    return result


def _target_share(teacher: str | float) -> float:
    share = {"source": 0.0, "delta": 1.0}.get(teacher, teacher) if isinstance(teacher, str) else teacher
    if not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"`teacher` must be 'source', 'delta' or a number from 0 to 1, got {teacher!r}.")
    return float(share)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _load_source(source, adapter, device, revision, adapter_revision, dtype) -> PreTrainedModel:
    if isinstance(adapter, PeftModel):
        model = adapter.get_base_model()
        if isinstance(source, torch.nn.Module) and source is not model:
            raise ValueError("`adapter` is a PeftModel on another model object than `source`: pass `source=None`.")
        return model
    if source is None:
        source = read_adapter_config(adapter, adapter_revision).base_model_name_or_path
    return load_model(source, "source", device, revision, dtype)


def _rows(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no language-modelling head: pass a causal language model.")
    return head.weight.shape[0]


def _map(source, target, kernels: Mapping[str, LoraKernel], depth_map, module_map) -> ModuleMap:
    layers = map_layers(
        source.config.get_text_config().num_hidden_layers, target.config.get_text_config().num_hidden_layers, depth_map
    )
    return map_modules(kernels, target, layers, module_map)


def _read(
    teacher_model: PeftModel, tokenizers, text, fit_text, counts: tuple[int, int, int], max_length: int, seed: int, bar
) -> tuple[list[AlignedPair], list[AlignedPair], list[AlignedPair], dict[str, Any]]:
    """Aligned texts for the refinement, its evaluation and the closed form."""
    train_count, eval_count, fit_count = counts

    def write(spec: SelfWritten, limit: int):
        return write_texts(teacher_model, *tokenizers, spec, limit, seed, partial(bar, desc="writing text"))

    def align(samples) -> list[AlignedPair]:
        return align_texts(
            [s.text for s in samples], *tokenizers,
            source_prompts=[s.source_prompt for s in samples], target_prompts=[s.target_prompt for s in samples],
            max_length=max_length,
        )  # fmt: skip

    wanted = train_count if fit_text is not None else max(train_count, fit_count)
    pairs = align(read_text(text, wanted + eval_count, write))
    if len(pairs) < 3:
        raise ValueError(
            f"The text gives {len(pairs)} usable samples, at least 3 are needed (to train on and to measure with): "
            "pass more or longer text."
        )
    held_out = min(eval_count, len(pairs) // 3 or 1)
    evaluation, train = pairs[:held_out], pairs[held_out:]
    fit = train[:fit_count] if fit_text is None else align(read_text(fit_text, fit_count, write))
    if len(fit) < 2:
        raise ValueError(
            f"`fit_text` gives {len(fit)} usable samples, at least 2 are needed: pass more or longer text."
        )
    positions = sum(len(p.target_positions) for p in pairs)
    tokens = sum(len(p.target_ids) for p in pairs)
    metrics = {
        "train": len(train), "held_out": len(evaluation), "closed_form": len(fit),
        "target_tokens": tokens, "aligned_share": positions / tokens,
    }  # fmt: skip
    return train, evaluation, fit, metrics


def _config(
    kernels, modules: ModuleMap, projection_type, projection_size, source_name, source_revision, adapter,
    adapter_revision,
) -> CastConfig:  # fmt: skip
    specs = {
        name: [
            KernelSpec(*kernels[s].A.shape, kernels[s].B.shape[0], kernels[s].scaling, source_module=s)
            for s in sources
        ]
        for name, sources in modules.kernels.items()
    }
    name = adapter.active_peft_config.base_model_name_or_path if isinstance(adapter, PeftModel) else str(adapter)
    return CastConfig(
        kernels=specs,
        r=max(spec.r for group in specs.values() for spec in group),
        projection_type=projection_type,
        projection_size=projection_size,
        source_model_name_or_path=source_name,
        source_model_revision=source_revision,
        source_adapter_name_or_path=name,
        source_adapter_revision=adapter_revision,
        task_type="CAUSAL_LM",
    )


def _install(
    target, config: CastConfig, adapter_name: str, kernels, closed_form: ClosedForm, gain: float | None, revision
) -> PeftModel:
    """Wrap the target and put kernels and fitted projections in place."""
    model = get_peft_model(target, config, adapter_name=adapter_name, revision=revision)
    for name, fits in closed_form.kernels.items():
        layer = target.get_submodule(name)
        for kernel, fit in zip(layer.peft_cast_kernels[adapter_name], fits):
            kernel.A.copy_(kernels[fit.source_module].A)
            kernel.B.copy_(kernels[fit.source_module].B)
            factor = gain if gain is not None else min(2.0, max(fit.r2_out, 1e-6) ** -0.5)
            device = kernel.A.device
            kernel.set_effective(fit.A_P_in.to(device), factor * fit.P_out_B.to(device))
    return model


def _refine(
    model, teacher: Teacher, train, steps, batch_size, learning_rate, seed, device, output_dir, training_args, progress
) -> list[dict[str, float]]:
    if steps == 0:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        arguments = {
            "output_dir": str(Path(output_dir) / "checkpoints") if output_dir else scratch,
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "warmup_steps": min(10, steps // 5),
            "weight_decay": 0.0,
            "logging_steps": max(1, steps // 20),
            "save_strategy": "steps" if output_dir else "no",
            "save_steps": max(1, steps // 4),
            "save_total_limit": 2,
            "report_to": [],
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.accelerator.is_available(),
            "disable_tqdm": not progress,
            "use_cpu": device.type == "cpu",
            "seed": seed,
        }
        settings = TrainingArguments(**{**arguments, **(training_args or {})})
        settings._n_gpu = min(settings.n_gpu, 1)  # several GPUs in one process would mean nn.DataParallel
        trainer = CastTrainer(model=model, args=settings, train_dataset=train, teacher=teacher)
        if not progress:
            trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.eval()
        return trainer.state.log_history
