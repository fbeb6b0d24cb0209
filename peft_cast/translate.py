"""The one verb: translate a LoRA from the model it was trained on to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .align import layer_pairs, map_modules
from .evaluation import gather_report
from .fit import (
    Bridge,
    ClosedForm,
    KernelFit,
    StackedPart,
    adapter_name_of,
    adapter_names,
    cast_config,
    check_adapter_name,
    check_maps,
    initial_maps,
    install,
    on_one_model,
    projections_of,
    stacked,
)
from .models import freeze_adapter, load_model, seeded, sharding, unload_adapters, unloaded_on_error
from .options import Fit, Options, Pairing, Projections, Run, Training
from .refine import (
    Imitation,
    RunFolder,
    Teacher,
    TrainingTexts,
    check_folder,
    check_prompts,
    clear_run,
    described,
    imitate,
    imitate_on_own_words,
    open_run,
    open_teacher,
    shown_if_asked,
)
from .results import TranslationResult
from .source import Pair, check_pair, load_source, open_pair, with_adapter
from .text import PairTexts, check_text, is_written, read_fit_texts, read_texts
from .utils import Phases, as_path, distributed, without_secrets


def translate(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel | Sequence[str | Path],
    target: str | Path | PreTrainedModel,
    *,
    text: Any = None,
    bridge: Bridge | str | Path | None = None,
    start: str | Path | None = None,
    adapter_name: str | Sequence[str] = "default",
    pairing: Pairing | None = None,
    projections: Projections | None = None,
    fit: Fit | None = None,
    training: Training | None = None,
    run: Run | None = None,
    **options: Any,
) -> TranslationResult | list[TranslationResult]:
    """Translate a LoRA, or another adapter that changes linear layers, from `source` so that it works on `target`.

    The two models are aligned (tokens, vocabulary, depth, modules). The projections around the frozen LoRA are fitted
    in closed form, and then refined against the adapted source model. The method is CAST
    (https://arxiv.org/abs/2510.17902), with output projections fitted from gradients.

    Args:
        source: The model the LoRA was trained on: hub id, path or loaded model. `None` takes it from the adapter.
        adapter: The LoRA: hub id, path, or a PeftModel, whose base then is the source. DoRA, LoHa, IA³ and other
            adapters that are no plain LoRA are approximated by one; what no LoRA on a linear layer expresses is listed
            in `metrics["source"]` and imitated by the refinement alone (docs/sources.md). A list of folders or hub
            ids, all on `source`, is translated at once: models are loaded, and the closed form's text is read, only
            once.
        target: The model it shall work on: hub id, path or loaded model. A loaded one is wrapped in place, as
            `get_peft_model` does; `result.model.unload()` gives it back.
        text: What the refinement reads: `SelfWritten` (text that the adapted source writes, which shows the adapter's
            effect best), a hub dataset id, a local jsonl/txt/parquet file, an iterable of strings, a
            `datasets.Dataset`, a `Corpus`, a list of `TextSample` written earlier, or a `Mixture`. `None` for snippets
            of C4 (`allenai/c4`, en, streamed) that the adapted source answers in its chat template, or C4 itself if
            its tokenizer has none. For several adapters also a dictionary from their names to texts.
        bridge: Maps between the two models that were fitted before, instead of a closed form of this adapter's own: a
            `Bridge`, or the folder or hub id of one. It brings its depth and module map along.
        start: A translation of the same adapter onto the same target, folder or hub id, to go on from instead of the
            closed form: to train longer, on other text, or on its own (`SelfWritten(on_policy=True)`).
        adapter_name (`str`): Name of the adapter on the target. Several adapters get the last parts of their paths, or
            the names in a list.
        pairing (`Pairing`), projections (`Projections`), fit (`Fit`), training (`Training`), run (`Run`): Groups of
            options, each with its defaults.
        options: Any option of these groups by its own name, as `generate` takes those of a `GenerationConfig`:
            `steps=200`, `output_dir="out"`. They go before the groups. docs/options.md lists them all.

    Returns:
        `TranslationResult`: The PeftModel on the target, metrics, and `save_pretrained`. For several adapters a list
        of them, with all adapters on one PeftModel.

    Raises:
        TypeError: If there is no such option.
        ValueError: For arguments, adapters, models, tokenizers or text that cannot be used; the message says why.
        OSError: If a model, adapter or corpus cannot be reached.
        FloatingPointError: If the loss becomes NaN or infinite in the first steps; later the best projections until
            then are the result, with a warning.
        NotSavedError: If the finished adapter cannot be written to `output_dir`; `error.result` holds it.
    """
    chosen = Options.of(options, None, pairing=pairing, projections=projections, fit=fit, training=training, run=run)
    source, adapter, target, text, bridge, start = map(as_path, (source, adapter, target, text, bridge, start))
    job = Job(source, adapter, target, text, bridge, start, adapter_name, chosen)
    distributed.init(job.options.pairing.device)
    distributed.on_main_process(job.check)
    if not distributed.is_main_process():
        job = replace(job, options=job.options.but(progress=False))
    return _translate_several(job) if isinstance(adapter, (list, tuple)) else _translate_one(job)


@dataclass(frozen=True)
class Job:
    """What is translated and how: the arguments of `translate`."""

    source: str | Path | PreTrainedModel | None
    adapter: str | Path | PeftModel | Sequence[str | Path]
    target: str | Path | PreTrainedModel
    text: Any = None
    bridge: Bridge | StackedPart | str | Path | None = None
    start: str | Path | None = None
    adapter_name: str | Sequence[str] = "default"
    options: Options = field(default_factory=Options)

    @classmethod
    def of(cls, source: Any, adapter: Any, target: Any, **arguments: Any) -> Job:
        """From what `translate` may be called with, all of it by name."""
        own = {name: arguments.pop(name) for name in cls.__dataclass_fields__ if name in arguments}
        return cls(source, adapter, target, **own, options=Options.of(arguments))

    @property
    def adapters(self) -> list[Any]:
        """All that are translated."""
        return list(self.adapter) if isinstance(self.adapter, (list, tuple)) else [self.adapter]

    @property
    def bar(self) -> partial:
        """A progress bar, or none."""
        return partial(tqdm, disable=not self.options.run.progress)

    def arguments(self) -> dict[str, Any]:
        """All of it by name, the options one by one."""
        own = {name: value for name, value in vars(self).items() if name != "options"}
        return {**own, **self.options.values()}

    def check(self) -> None:
        """Everything about the arguments that can be told without loading a model.

        Raises:
            ValueError, OSError: As `translate`.
        """
        pairing, training = self.options.pairing, self.options.training
        if not self.adapters:
            raise ValueError("`adapter` is an empty list: pass at least one adapter.")
        distributed.resolve_source_device(pairing.source_device, distributed.training_device(pairing.device))
        check_folder(self.options.run, self.source, *self.adapters, self.target, self.start)
        check_text(self.text)
        check_text(self.options.fit.fit_text)
        written = self.text is None or isinstance(self.text, Mapping) or is_written(self.text)
        check_prompts(training, written)
        shard = sharding.is_requested(training.training_args)
        distributed.batch_per_process(training.batch_size)
        if isinstance(self.adapter, (list, tuple)):
            _check_several(self, shard)
        else:
            self._check_one(shard)
        # What lies on disk or on the hub comes last: it may have to be fetched.
        check_pair(self.source, self.adapters, self.target, pairing)
        check_maps(self.bridge, self.start, self.source, self.adapter, self.target, pairing)

    def _check_one(self, shard: bool) -> None:
        training = self.options.training
        check_adapter_name(self.adapter_name)
        if self.bridge is not None and training.beta > 0:
            raise ValueError(
                "A bridge has no maps between hidden states, which `beta` needs: pass `beta=0` or no `bridge`."
            )
        if shard and (training.on_policy_steps or training.teacher == "shown"):
            raise ValueError("`on_policy_steps` and `teacher='shown'` go with no FSDP or ZeRO-3: leave them out.")
        if self.start is not None and (self.bridge is not None or training.beta > 0 or shard):
            raise ValueError("`start` goes with no `bridge`, no `beta` and no FSDP or ZeRO-3: leave it or them out.")


def _translate_one(job: Job) -> TranslationResult:
    """The six steps of the method."""
    options, training, phases = job.options, job.options.training, Phases()
    bridge = Bridge.from_pretrained(job.bridge) if isinstance(job.bridge, (str, Path)) else job.bridge
    with ExitStack() as stack:
        # 1. Load both models, the source with its adapter, and align them: tokens, vocabulary, depth, modules.
        with phases.measure("load"):
            shard = sharding.is_requested(training.training_args)
            pair = stack.enter_context(open_pair(job.source, job.adapter, job.target, options.pairing, shard=shard))
        decides = {"text": job.text, "first_maps": bridge, "start": job.start, "adapter_name": job.adapter_name}
        run = open_run(options.run, partial(described, options, pair, **decides))
        stack.enter_context(run.advising())
        # 2. Read the text, or let the models write it.
        with phases.measure("text"):
            texts, earlier = _read(job, pair, run)
        # 3. Initial maps: the closed form, a bridge's, or those of an earlier translation.
        with phases.measure("closed_form"):
            maps, pair = initial_maps(pair, texts.fit, options, bridge=bridge, start=earlier, cache=run.cache)
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
            reached, distances = _refine(job, pair, model, teacher, texts, run, phases)
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
        **({"closed_form": maps.metrics} if earlier is None else {}),
        "settings": {**_settings(job), "projection_type": config.projection_type, "rank": config.r},
        "phases": phases.costs,
        "report": report,
    }
    metrics, history = distributed.broadcast((metrics, reached.refinement.history))  # seconds differ
    result = TranslationResult(model, metrics, history, pair.modules, str(job.adapter_name))
    run.save(result)
    return result


def _read(job: Job, pair: Pair, run: RunFolder) -> tuple[PairTexts, ClosedForm[KernelFit] | None]:
    """The texts, and the projections of the translation to go on from, which may write some of them."""
    options, start = job.options, job.start
    with with_adapter(pair.target, start) if start is not None else nullcontext() as translated:
        read = partial(
            read_texts,
            pair,
            job.text,
            options.fit,
            options.training,
            bar=job.bar,
            translated=translated,
            keep=run.written,
        )
        texts = run.texts(read)
        check_prompts(options.training, bool(texts.answers))
        earlier = None
        if translated is not None:
            earlier = projections_of(translated, pair.kernels, pair.modules, without_secrets(start))
    show = partial(shown_if_asked, pair, texts, options.training, job.text, bar=job.bar, keep=run.written)
    return (run.texts(show, "shown") if options.training.teacher == "shown" else texts), earlier


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
    job: Job, pair: Pair, model: PeftModel, teacher: Teacher, texts: PairTexts, run: RunFolder, phases: Phases
) -> tuple[Imitation, dict[str, Any]]:
    """What the refinement reached on the text, and as metrics the KL from the teacher on held-out text, from the
    untouched target to the finished translation in order, with what own words added.
    """
    training, progress = job.options.training, job.options.run.progress
    reached = imitate(
        pair,
        model,
        teacher,
        TrainingTexts(texts.train, texts.anchors),
        texts.held_out,
        phases,
        output_dir=job.options.run.output_dir,
        progress=progress,
        checkpoint=run.checkpoint,
    )
    kl = {"target": reached.kl["target"], "closed_form" if job.start is None else "start": reached.kl["start"]}
    if not training.on_policy_steps:
        return reached, {"kl": {**kl, "translated": reached.kl["end"]}}
    end, own = imitate_on_own_words(pair, model, teacher, texts, run, phases, progress=progress)
    return reached, {"kl": {**kl, "refined": reached.kl["end"], "translated": end}, "on_policy": own}


def _check_several(job: Job, shard: bool) -> None:
    """Refuse what goes with one adapter alone."""
    if not all(isinstance(adapter, (str, Path)) for adapter in job.adapters):
        raise ValueError("Several adapters must be folders or hub ids, not PeftModels: save them first.")
    for name in ("bridge", "start"):
        if getattr(job, name) is not None:
            raise ValueError(f"`{name}` is for one adapter at a time: pass no `{name}`.")
    if job.options.training.beta > 0 or job.options.pairing.depth_map == "similarity":
        raise ValueError("`beta` and `depth_map='similarity'` are for one adapter at a time: translate them in turn.")
    if shard:
        raise ValueError("FSDP and ZeRO-3 are for one adapter at a time: translate them in turn.")
    for name in adapter_names(job.adapters, job.adapter_name):
        check_folder(_in_subfolder(job.options, name).run, job.source, *job.adapters, job.target)
        _text_for(job.text, name)


def _translate_several(job: Job) -> list[TranslationResult]:
    """Several adapters of one model: models are loaded once, one pass of text fits all closed forms, and each is
    refined.
    """
    options, names, adapters = job.options, adapter_names(job.adapters, job.adapter_name), job.adapters
    pairing = options.pairing
    device = distributed.init(pairing.device)
    at_source = distributed.resolve_source_device(pairing.source_device, device)
    revisions = (pairing.source_revision, pairing.adapter_revision)
    source = load_source(job.source, adapters[0], at_source, *revisions, pairing.dtype)
    target = load_model(job.target, "target", device, pairing.target_revision, pairing.dtype)
    parts = []
    for adapter in adapters:
        with open_pair(source, adapter, target, pairing) as pair:
            parts.append(pair.kernels)
    kernels, rows = stacked(parts)
    with open_pair(source, adapters[0], target, pairing) as pair:
        modules = map_modules(kernels, pair.target, pair.modules.layers, pairing.module_map, pair.source)
        # All the kernels stand for the first adapter's own.
        pair = replace(pair, adapter=replace(pair.given, kernels=kernels), modules=modules)
        run = open_run(options.run, partial(described, options, pair, text=job.text, adapter_name=names))
        folders = [_in_subfolder(options, name).run.output_dir for name in names]
        if run.begun:
            for folder in folders:  # of a run before, which is not this one's to go on with
                if folder is not None:
                    distributed.on_main_process(partial(clear_run, Path(folder)))
        with run.advising():
            texts = run.texts(
                partial(read_fit_texts, pair, _text_for(job.text, names[0]), options.fit, options.training)
            ).fit
            also = str([t.flatten()[:64].tolist() for kernel in kernels.values() for t in (kernel.A, kernel.B)])
            maps, _ = initial_maps(pair, texts, options, cache=run.cache, also=also)
    results, states = [], []
    for adapter, name, own_rows in zip(adapters, names, rows):
        # Each is "default" in its own folder, which so is an adapter's, and gets its name on the model that carries
        # all.
        text, part = _text_for(job.text, name), StackedPart(maps, modules, own_rows)
        one = Job(source, adapter, target, text, part, options=_in_subfolder(options, name))
        result = _translate_one(one)
        states.append({k: v.cpu().clone() for k, v in get_peft_model_state_dict(result.model).items()})
        results.append(result)
        unload_adapters(target)
    run.finish()
    return on_one_model(target, results, names, states)


def _in_subfolder(options: Options, name: str) -> Options:
    """The options of one of several adapters, which has a subfolder of its name."""
    folder = options.run.output_dir
    return options.but(output_dir=None if folder is None else Path(folder) / name)


def _text_for(text: Any, name: str) -> Any:
    """The text of one of several adapters."""
    if not isinstance(text, Mapping):
        return text
    if name not in text:
        raise ValueError(f"`text` has no text for the adapter '{name}': it has {', '.join(map(str, text))}.")
    return text[name]
