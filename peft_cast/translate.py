"""The one verb: translate a LoRA from the model it was trained on to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import ranks, shards
from .align import layer_pairs
from .arguments import check_arguments, target_share
from .bridge import Bridge
from .fit import Teacher, TeacherSettings, TrainingTexts, imitate, within_memory
from .install import adapter_name_of, cast_config, install
from .loading import projections_of, with_adapter
from .models import count_parameters, seeded, shared_head, unload_adapters
from .on_policy import check_prompts, imitate_on_own_words
from .pair import fitted, map_by_similarity, open_pair, read_texts, teacher_memory
from .phases import Phases
from .report import gather_report
from .result import TranslationResult
from .run import check_folder, described, open_run
from .safety import without_secrets
from .several import translate_several
from .text import check_text, is_written


def translate(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel | Sequence[str | Path],
    target: str | Path | PreTrainedModel,
    *,
    text: Any = None,
    fit_text: Any = None,
    fit_samples: int = 64,
    eval_samples: int = 16,
    steps: int = 100,
    on_policy_steps: int = 0,
    batch_size: int = 8,
    learning_rate: float = 0.2,
    max_length: int = 256,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    teacher: Literal["source", "delta"] | float = "source",
    teacher_top_k: int | None = 128,
    cache_dir: str | Path | None = None,
    depth_map: str | Mapping[int, int] = "proportional",
    module_map: Mapping[str, str] | None = None,
    projection_type: Literal["compact", "factored", "full", "mlp"] | None = None,
    projection_size: int | None = None,
    projection_bias: bool = False,
    projection_sharing: Literal["layer", "all"] | None = None,
    ridge: float | None = None,
    gain: float | None = None,
    source_rank: int | float | None = None,
    bridge: Bridge | str | Path | None = None,
    start: str | Path | None = None,
    seed: int = 0,
    source_tokenizer: PreTrainedTokenizerBase | str | None = None,
    target_tokenizer: PreTrainedTokenizerBase | str | None = None,
    source_revision: str | None = None,
    adapter_revision: str | None = None,
    target_revision: str | None = None,
    adapter_name: str | Sequence[str] = "default",
    device: str | torch.device | None = None,
    source_device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    output_dir: str | Path | None = None,
    resume_from_checkpoint: bool = False,
    training_args: Mapping[str, Any] | None = None,
    report_samples: int = 2,
    report_similarity: bool = True,
    progress: bool = True,
) -> TranslationResult | list[TranslationResult]:
    """Translate a LoRA, or another adapter that changes linear layers, from `source` so that it works on `target`.

    The two models are aligned (tokens, vocabulary, depth, modules), the projections around the frozen LoRA are fitted
    in closed form and then refined with `alpha T² KL + beta MSE` against the adapted source model, and `gamma KL` that
    holds the target in place on general text. The method is CAST (https://arxiv.org/abs/2510.17902), with output
    projections fitted from gradients.

    Args:
        source: The model the LoRA was trained on: hub id, path or loaded model. `None` takes it from the adapter.
        adapter: The LoRA: hub id, path, or a PeftModel, whose base then is the source. DoRA, LoHa, IA³ and other adapters
            that are no plain LoRA are approximated by one (`source_rank`); what no LoRA on a linear layer expresses is
            listed in `metrics["source"]` and imitated by the refinement alone. See docs/sources.md. A list of folders or hub
            ids, all on `source`, is translated at once: models are loaded and the closed form's text is read only once.
        target: The model it shall work on: hub id, path or loaded model. A loaded one is wrapped in place, as
            `get_peft_model` does; `result.model.unload()` gives it back.
        text: What the refinement reads: `SelfWritten` (text that the adapted source writes, which shows the adapter's effect
            best), a hub dataset id, a local jsonl/txt/parquet file, an iterable of strings, a `datasets.Dataset`, a `Corpus`,
            a list of `TextSample` written earlier, or a `Mixture`. `None` for snippets of C4 (`allenai/c4`, en, streamed)
            that the adapted source answers in its chat template, or C4 itself if its tokenizer has none. For several
            adapters also a dictionary from their names to texts.
        fit_text: What the closed form and the anchors read, general text, likewise. When not given: C4 if the models
            write `text` themselves, else `text`, and there are no anchors.
        fit_samples (`int`): Texts for the closed form.
        eval_samples (`int`): Texts kept out of the refinement to measure the distance to the teacher.
        steps (`int`): Refinement steps; 0 keeps the closed form.
        on_policy_steps (`int`): Further steps, at half the learning rate, on what the translated model then answers to the
            prompts of `text`: it learns from the adapted source how to go on from its own words (arXiv 2306.13649). Costs a
            little likelihood and makes generation better (docs/text.md).
        batch_size (`int`): Texts per step, of all processes together: with several (`accelerate launch`, docs/scale.md) each
            takes its part.
        learning_rate (`float`): Peak step of AdamW relative to the size (root mean square) of each factor, decayed
            linearly to 0.
        max_length (`int`): Most tokens per text; longer texts are cut.
        alpha (`float`): Weight of the KL divergence.
        beta (`float`): Weight of the hidden-state MSE, normalised per layer. 0, the default, skips it: its worth is not
            measured yet (docs/results.md).
        gamma (`float`): Weight of the KL divergence from the untouched target on anchors, documents of `fit_text` that
            the closed form has not read: it keeps the target as it is on general text. 0 skips it.
        temperature (`float`): Temperature of the KL divergence.
        teacher: `"source"` imitates the adapted source model; `"delta"` adds only what the LoRA changes to the
            target's own prediction; a number from 0 (`source`) to 1 (`delta`) mixes them. With 0.2 the target keeps more of
            what it knows better than the source, and of the LoRA's manner carries less (docs/results.md, What the teacher allows).
        teacher_top_k (`int`, *optional*): The teacher's predictions are made once per text and kept as so many likeliest
            tokens and the mass of all others. `None` makes them anew in every epoch and compares the whole vocabulary.
        cache_dir: Where the closed form and the teacher's predictions are kept for further runs on the same models,
            adapter and text, e.g. with other steps or losses; nowhere when `None`.
        depth_map: `"proportional"`; `"similarity"`, the order-keeping map of the largest linear CKA between hidden states;
            or a mapping of source layers to target layers.
        module_map: Source → target, e.g. `{"fc1": "up_proj"}`, where the map that is found (`metrics["alignment"]["routes"]`)
            is not the one you want. Names may be last parts, names within a layer, full names, roles (`"q"`, `"up"`, ...), or
            rows of a target module (`"W_in[0:64]"`); see docs/decoders.md.
        projection_type: `"compact"`, `"factored"` or `"full"` matrices, or `"mlp"`, factored with a nonlinear part; see
            `CastConfig`. Compact when not given, factored if they are shared.
        projection_size (`int`, *optional*): Inner size of factored projections; the LoRA's rank when not given.
        projection_bias (`bool`): Whether projections have a bias; such an adapter cannot be merged or folded.
        projection_sharing: `"layer"` or `"all"`: modules of a layer, or all, share the projections of equal shape.
        ridge (`float`, *optional*): Ridge strength of the closed form; chosen on held-out text when not given.
        gain (`float`, *optional*): Factor on the closed form's deltas. A regression that explains little shrinks; when
            not given, each kernel is scaled by 1/√R² of its output projection, at most 2.
        source_rank (`int` or `float`, *optional*): Rank to which the weight changes of an adapter that is no plain LoRA are
            cut, or the share of their squared singular values to keep (between 0 and 1, as in `peft.convert_to_lora`).
            When not given: the exact rank where it is at most 64, else 16 or twice the rank of the LoRA, whichever is more.
        bridge: Maps between the two models that were fitted before, instead of a closed form of this adapter's own: a
            `Bridge`, or the folder or hub id of one. It brings its depth and module map along.
        start: A translation of the same adapter onto the same target, folder or hub id, to go on from instead of the closed
            form: to train longer, on other text, or on its own (`SelfWritten(on_policy=True)`).
        seed (`int`): Seed of the sampled text and the training order.
        source_tokenizer, target_tokenizer: Needed only if they cannot be loaded from where the models come from.
        source_revision, adapter_revision, target_revision (`str`, *optional*): Hub revisions.
        adapter_name (`str`): Name of the adapter on the target. Several adapters get the last parts of their paths, or
            the names in a list.
        device: Where to work: the accelerator when there is one, else the CPU; with several processes each has its own. Loaded
            models return to where they were.
        source_device: Where the source model works, if not there: a second GPU, or the CPU where memory is short.
        dtype (`torch.dtype`, *optional*): Precision of models loaded here; bfloat16 where the hardware is fast at it
            (GPU, CPU with AMX or AVX512-BF16), else float32.
        output_dir: Where Trainer writes checkpoints and the finished adapter is saved, for several adapters in subfolders of
            their names; nothing is written when `None`.
        resume_from_checkpoint (`bool`): Go on with the run in `output_dir` that was stopped or killed, to the same result as
            if it had not been; if there is none, begin one. See docs/resuming.md.
        training_args: Further `transformers.TrainingArguments`, which take precedence (gradient accumulation, bf16,
            logging, save_steps, ...). `{"fsdp": True}`, as `accelerate launch --use_fsdp`, and DeepSpeed's ZeRO-3 spread both
            models over the processes.
        report_samples (`int`): How many held-out texts the report quotes: so many that the target continues without and
            with the adapter, and so many of those that excite it most and least. Quotes are saved beside the adapter and
            never pushed; 0 for none.
        report_similarity (`bool`): Whether the report compares the layers of the two models.
        progress (`bool`): Show progress bars.

    Returns:
        `TranslationResult`: The PeftModel on the target, metrics, and `save_pretrained`. For several adapters a list of
        them, with all adapters on one PeftModel.

    Raises:
        ValueError: For arguments, adapters, models, tokenizers or text that cannot be used; the message says why.
        OSError: If a model, adapter or corpus cannot be reached.
        FloatingPointError: If the loss becomes NaN or infinite in the first steps; later the best projections until then
            are the result, with a warning.
        NotSavedError: If the finished adapter cannot be written to `output_dir`; `error.result` holds it.
    """
    arguments = dict(locals())
    device = ranks.begin(device)
    progress = progress and ranks.is_main()
    ranks.shared(lambda: check_before_loading(arguments))
    if isinstance(adapter, (list, tuple)):
        options = {name: value for name, value in arguments.items() if name not in ("source", "adapter", "target")}
        return translate_several(translate, source, adapter, target, **{**options, "progress": progress})
    if not isinstance(adapter_name, str):
        raise ValueError(
            f"`adapter_name` must be a string, got {adapter_name!r}: several names are for a list of adapters."
        )
    spread = shards.asked(training_args)
    ranks.per_process(batch_size)
    settings = TeacherSettings(alpha, beta, gamma, temperature, target_share(teacher), teacher_top_k)
    if bridge is not None and beta > 0:
        raise ValueError(
            "A bridge has no maps between hidden states, which `beta` needs: pass `beta=0` or no `bridge`."
        )
    if on_policy_steps and spread:
        raise ValueError("`on_policy_steps` goes with no FSDP or ZeRO-3: leave one of them out.")
    if start is not None and (bridge is not None or beta > 0 or spread):
        raise ValueError("`start` goes with no `bridge`, no `beta` and no FSDP or ZeRO-3: leave it or them out.")
    bridge = Bridge.from_pretrained(bridge) if isinstance(bridge, (str, Path)) else bridge
    bar = partial(tqdm, disable=not progress)
    phases = Phases()
    with ExitStack() as stack:
        with phases.measure("load"):
            pair = stack.enter_context(
                open_pair(
                    source,
                    adapter,
                    target,
                    depth_map=depth_map,
                    module_map=module_map,
                    source_tokenizer=source_tokenizer,
                    target_tokenizer=target_tokenizer,
                    source_revision=source_revision,
                    adapter_revision=adapter_revision,
                    target_revision=target_revision,
                    source_rank=source_rank,
                    device=device,
                    source_device=source_device,
                    dtype=dtype,
                    spread=spread,
                )  # fmt: skip
            )
        describe = partial(described, {**arguments, "bridge": bridge}, pair)
        run = open_run(output_dir, cache_dir, resume_from_checkpoint, describe)
        stack.enter_context(run.advising())
        begun = with_adapter(pair.target, start) if start is not None else nullcontext()
        with phases.measure("text"), begun as translated:
            read = partial(
                read_texts, pair, text, fit_text, train=steps * batch_size, held_out=eval_samples, fit=fit_samples,
                anchored=gamma > 0, max_length=max_length, seed=seed, bar=bar, translated=translated, keep=run.written,
            )  # fmt: skip
            texts = run.texts(read)
            check_prompts(bool(texts.answers) or not on_policy_steps)
            before = None
            if translated is not None:
                before = projections_of(translated, pair.kernels, pair.modules, without_secrets(start))
        with phases.measure("closed_form"), pair.adapted.disable_adapter():
            if before is not None:
                closed_form, gain = before, 1.0
            elif bridge is not None:
                closed_form, modules = bridge.closed_form(pair.kernels)
                pair = dataclasses.replace(pair, modules=modules)
            else:
                if depth_map == "similarity":
                    pair = map_by_similarity(pair, texts.fit, module_map)
                fit = partial(
                    fitted, pair, texts.fit, run.cache, ridge=ridge, hidden=beta > 0,
                    progress=partial(bar, desc="closed form"),
                )  # fmt: skip
                closed_form = within_memory(lambda size: fit(batch_size=size), batch_size)
        memory = teacher_memory(pair, settings, run.cache)
        shape = {
            "projection_type": projection_type, "projection_size": projection_size, "projection_bias": projection_bias,
            "projection_sharing": projection_sharing,
        }  # fmt: skip
        config = cast_config(
            pair.kernels, pair.modules, **shape,
            source_model_name_or_path=without_secrets(pair.source.name_or_path), source_model_revision=source_revision,
            source_adapter_name_or_path=adapter_name_of(adapter), source_adapter_revision=adapter_revision,
        )  # fmt: skip
        try:
            with seeded(seed):  # MLPs and spare inner directions start at random
                model = install(
                    pair.target, config, pair.kernels, closed_form,
                    gain=gain, adapter_name=adapter_name, revision=target_revision,
                )  # fmt: skip
            hidden = {path: (layer_pairs(pair.modules)[path], m) for path, m in closed_form.hidden_maps.items()}
            teacher_at_work = Teacher(pair.adapted, settings, hidden, memory)
            ids = pair.vocabulary
            with shared_head(pair.source, ids.source_ids), shared_head(pair.target, ids.target_ids):
                kl, refinement, excitement = imitate(
                    model, teacher_at_work, TrainingTexts(texts.train, texts.anchors), texts.held_out, batch_size,
                    phases, steps=steps, learning_rate=learning_rate, seed=seed, output_dir=output_dir,
                    training_args=training_args, progress=progress, checkpoint=run.checkpoint,
                )  # fmt: skip
            own = None
            if on_policy_steps:
                kl["refined"] = kl["end"]
                kl["end"], own = imitate_on_own_words(
                    pair, model, teacher_at_work, texts, run, steps=on_policy_steps, held_out=eval_samples, batch_size=batch_size,
                    learning_rate=learning_rate / 2, max_length=max_length, seed=seed, training_args=training_args,
                    progress=progress, phases=phases, bar=bar,
                )  # fmt: skip
            with phases.measure("report"):
                report = gather_report(
                    pair, model, texts, excitement, arguments, samples=report_samples, similarity=report_similarity
                )
        except BaseException:
            unload_adapters(pair.target)
            raise
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model.requires_grad_(False)
        config.inference_mode = True
    metrics = {
        "kl": {
            "target": kl["target"], "start" if start else "closed_form": kl["start"],
            **({"refined": kl["refined"]} if own else {}), "translated": kl["end"],
        },
        "excitement": float(torch.cat(excitement).mean()),
        "source": pair.given.metrics,
        "parameters": {
            "trained": trained, "source_lora": count_parameters(pair.kernels),
        },
        "alignment": {
            "shared_tokens": len(pair.vocabulary), **pair.modules.metrics,
        },
        "refinement": refinement.metrics,
        **({"on_policy": own} if own else {}),
        "text": texts.metrics,
        "phases": phases.costs,
        "settings": {
            "loss": dataclasses.asdict(settings), "steps": steps, "on_policy_steps": on_policy_steps,
            "batch_size": batch_size, "learning_rate": learning_rate, "max_length": max_length, "gain": gain, "ridge": ridge, "seed": seed,
            "start": without_secrets(start) if start is not None else None, **shape, "projection_type": config.projection_type, "rank": config.r,
        },
        "report": report,
    }  # fmt: skip
    if start is None:
        metrics["closed_form"] = {
            "positions": closed_form.positions,
            "modules": {
                name: [{"source_module": f.source_module, "r2_in": f.r2_in, "r2_out": f.r2_out} for f in fits]
                for name, fits in closed_form.kernels.items()
            },
            "hidden_r2": closed_form.hidden_r2,
        }
    metrics, history = ranks.same((metrics, refinement.history))  # seconds differ
    result = TranslationResult(model, metrics, history, pair.modules, adapter_name)
    run.save(result)
    return result


def check_before_loading(arguments: Mapping[str, Any]) -> None:
    """Everything about the arguments of `translate` that can be told without loading a model.

    Args:
        arguments: Some of them or all.

    Raises:
        ValueError, OSError: As `translate`.
    """
    given = arguments.get
    check_arguments(arguments)
    ranks.device_of_source(given("source_device"), ranks.training_device(given("device")))
    adapters = given("adapter")
    inputs = adapters if isinstance(adapters, (list, tuple)) else [adapters]
    check_folder(
        given("output_dir"),
        given("resume_from_checkpoint", False),
        given("source"),
        *inputs,
        given("target"),
        given("start"),
    )
    for name in ("text", "fit_text"):
        check_text(given(name))
    text = given("text")
    check_prompts(text is None or isinstance(text, Mapping) or is_written(text) or not given("on_policy_steps"))
