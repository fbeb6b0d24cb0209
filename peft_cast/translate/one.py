"""One adapter, in the six steps of the method."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..align import layer_pairs
from ..evaluation import gather_report
from ..fit import Bridge, ClosedForm, KernelFit, adapter_name_of, cast_config, install, projections_of
from ..models import freeze_adapter, seeded, sharding, unloaded_on_error
from ..refine import (
    Imitation,
    RunFolder,
    Teacher,
    check_first_maps,
    check_prompts,
    described,
    first_maps,
    imitate,
    imitate_on_own_words,
    open_run,
    open_teacher,
    settle_strength,
    taught,
)
from ..results import TranslationResult
from ..source import Pair, open_pair, with_adapter
from ..text import PairTexts, read_texts
from ..utils import Phases, distributed, without_secrets
from .job import Job


def translate_one(job: Job) -> TranslationResult:
    """The six steps of the method."""
    options, training, phases = job.options, job.options.training, Phases()
    bridge = Bridge.from_pretrained(job.bridge) if isinstance(job.bridge, (str, Path)) else job.bridge
    with ExitStack() as stack:
        # 1. Load both models, the source with its adapter, and align them: tokens, vocabulary, depth, modules.
        with phases.measure("load"):
            shard = sharding.is_requested(training.training_args)
            pair = stack.enter_context(open_pair(job.source, job.adapter, job.target, options.pairing, shard=shard))
            check_first_maps(pair.modules, pair.source, pair.target, options)
        decides = {"text": job.text, "bridge": bridge, "start": job.start, "adapter_name": job.adapter_name}
        run = open_run(options.run, partial(described, options, pair, **decides))
        stack.enter_context(run.advising())
        # 2. Read the text, or let the models write it.
        with phases.measure("text"):
            texts, earlier = _read(job, pair, run)
        gamma = texts.metrics.get("gamma", options.training.anchor_weight)  # texts of earlier versions lack it
        job = replace(job, options=options.but(teacher=texts.metrics["teacher"], gamma=gamma))
        options, training = job.options, job.options.training
        # 3. Initial maps: the adapter as it is, the closed form, a bridge's, or those of an earlier translation.
        with phases.measure("closed_form"):
            maps, pair, route = first_maps(pair, texts, options, bridge=bridge, start=earlier, cache=run.cache)
        hidden = {path: (layer_pairs(pair.modules)[path], weight) for path, weight in maps.hidden_maps.items()}
        teacher = open_teacher(pair, training, hidden, run.cache)
        known = {**_origin(job, pair), "not_carried": pair.given.holdings.reasons}
        config = cast_config(pair.kernels, pair.modules, **vars(options.projections), **known)
        with unloaded_on_error(pair.target):
            # 4. Install: the frozen kernels between these maps, on the target.
            gain = options.fit.gain if earlier is None else 1.0
            with seeded(training.seed):  # MLPs and spare inner directions start at random
                model = install(
                    pair.target,
                    config,
                    pair.kernels,
                    maps,
                    gain=gain,
                    adapter_name=job.adapter_name,
                    revision=options.pairing.target_revision,
                )
            # 5. Refine against the adapted source, then on what the translated model answers itself.
            reached, distances, how = _refine(job, pair, model, teacher, texts, run, phases, route["first_maps"])
            # 6. The result, with what the report shows.
            with phases.measure("report"):
                tokenizer = pair.tokenizers[teacher.reads_with]
                report = gather_report(pair, model, texts, reached.excitement, job.arguments(), tokenizer)
        trained = freeze_adapter(model)
    metrics = {
        **distances,
        "source": pair.given.metrics,
        "alignment": {"shared_tokens": len(pair.vocabulary), **pair.modules.metrics},
        **reached.metrics(pair, texts, trained),
        "route": {**route, "refined": bool(reached.refinement.steps), **how},
        **({"closed_form": maps.metrics} if route["first_maps"] in ("closed_form", "bridge") else {}),
        "settings": {**_settings(job), "projection_type": config.projection_type, "rank": config.r},
        "phases": phases.costs,
        "report": report,
    }
    metrics, history = distributed.broadcast((metrics, reached.refinement.history))  # seconds differ
    dtype = options.run.save_dtype or pair.given.dtype
    result = TranslationResult(model, metrics, history, pair.modules, str(job.adapter_name), dtype)
    run.save(result)
    return result


def _read(job: Job, pair: Pair, run: RunFolder) -> tuple[PairTexts, ClosedForm[KernelFit] | None]:
    """The texts, with the teacher that they are for, and the projections of the translation to go on from, which may
    write some of them.
    """
    options, start = job.options, job.start
    with with_adapter(pair.target, start) if start is not None else nullcontext() as translated:

        def read() -> PairTexts:
            how: dict[str, Any] = {"bar": job.bar, "keep": run.written}
            texts = read_texts(pair, job.text, options.fit, options.training, translated=translated, **how)
            check_prompts(options.training, bool(texts.answers))
            with translated.disable_adapter() if translated is not None else nullcontext():
                return taught(pair, texts, options.training, job.text, **how)

        texts, earlier = run.texts(read), None
        if translated is not None:
            earlier = projections_of(translated, pair.kernels, pair.modules, without_secrets(start))
    return texts, earlier


def _origin(job: Job, pair: Pair) -> dict[str, str | None]:
    """What a configuration says of where its kernels come from."""
    return {
        "source_model_name_or_path": without_secrets(pair.source.name_or_path),
        "source_model_revision": pair.source_revision,
        "source_adapter_name_or_path": adapter_name_of(job.adapter),
        "source_adapter_revision": job.options.pairing.adapter_revision,
    }


def _settings(job: Job) -> dict[str, Any]:
    """What decides the result, but for models, adapter and text."""
    given = {"bridge": job.bridge, "start": job.start}
    named = {name: without_secrets(value) for name, value in given.items() if isinstance(value, (str, Path))}
    return {**job.options.settings(), **named}


def _refine(
    job: Job,
    pair: Pair,
    model: PeftModel,
    teacher: Teacher,
    texts: PairTexts,
    run: RunFolder,
    phases: Phases,
    begun_from: str,
) -> tuple[Imitation, dict[str, Any], dict[str, Any]]:
    """What the refinement reached on the text; as metrics the KL from the teacher on held-out text, from the
    untouched target to the finished translation in order, with what own words added; and the strength.
    """
    training, progress = job.options.training, job.options.run.progress
    reached = imitate(
        pair,
        model,
        teacher,
        texts,
        phases,
        output_dir=job.options.run.output_dir,
        progress=progress,
        checkpoint=run.checkpoint,
        enough=training.enough if job.start is None else 1.0,  # who goes on from a start wants the steps
    )
    first = begun_from if begun_from in ("copy", "start") else "closed_form"
    kl = {"target": reached.kl["target"], first: reached.kl["start"]}
    end, more = reached.kl["end"], {}
    if training.on_policy_steps:
        kl["refined"] = end
        end, more["on_policy"] = imitate_on_own_words(pair, model, teacher, texts, run, phases, progress=progress)
    how: dict[str, Any] = {}
    as_given = begun_from == "start" and not reached.refinement.steps
    if not as_given and job.options.fit.gain is None:  # who gives a strength wants that
        end, how = settle_strength(pair, model, teacher, texts, {**reached.kl, "end": end}, phases)
    return reached, {"kl": {**kl, "translated": end}, **more}, how
