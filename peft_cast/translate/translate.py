"""The one verb: translate a LoRA from the model it was trained on to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ..fit import Bridge
from ..options import Fit, Options, Pairing, Projections, Run, Training
from ..results import TranslationResult
from ..utils import as_path, distributed
from .job import Job
from .one import translate_one
from .several import translate_several


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
        text: What the refinement reads: `SelfWritten` (text that the adapted source writes after your prompts, which
            shows the adapter's effect best), a `Survey`, a hub dataset id, a local jsonl/txt/parquet file, an iterable
            of strings, a `datasets.Dataset`, a `Corpus`, a list of `TextSample` written earlier, or a `Mixture`.
            `None` for a `Survey`, which finds out what the adapter answers. For several adapters also a dictionary
            from their names to texts.
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
    return translate_several(job) if isinstance(adapter, (list, tuple)) else translate_one(job)
