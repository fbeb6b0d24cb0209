"""A LoRA distilled from scratch: what a translation must beat for the frozen kernel to earn its place."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..align import split_place
from ..fit import map_by_similarity
from ..models import freeze_adapter, seeded, unloaded_on_error
from ..options import Fit, Options, Pairing, Run, Training, takes
from ..results import TranslationResult
from ..source import check_pair, open_pair
from ..text import check_all_reached, check_texts, read_texts
from ..utils import Phases, as_path, check_place, distributed
from ..utils.fields import check_count
from .imitate import imitate
from .run import check_cache
from .shown import open_teacher, taught


@takes(
    "source_tokenizer target_tokenizer source_revision adapter_revision target_revision depth_map module_map "
    "source_rank device source_device dtype fit_text fit_samples steps batch_size learning_rate max_length "
    "seed eval_samples alpha gamma temperature teacher teacher_top_k training_args output_dir cache_dir "
    "progress"
)
def distill_lora(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel,
    target: str | Path | PreTrainedModel,
    *,
    text: Any = None,
    r: int | None = None,
    pairing: Pairing | None = None,
    fit: Fit | None = None,
    training: Training | None = None,
    run: Run | None = None,
    **options: Any,
) -> TranslationResult:
    """A LoRA distilled from scratch: same text, teacher, loss and steps as a translation, but no kernel.

    Steps are relative to each factor's size here too; B, which begins at zero, is taken to have a tenth of A's.

    Args:
        source, adapter, target, text: As in `translate`.
        r (`int`, *optional*): Rank; by default that of the kernels which a translation would stack on one module.
        pairing, fit, training, run: Groups of options, as in `translate`. `fit_text` gives the anchors, after its
            first `fit_samples` documents, so that a translation reads the same.
        options: Options by their own names (docs/options.md).

    Returns:
        `TranslationResult`: With a plain LoRA as its adapter.
    """
    given = Options.of(options, distill_lora, pairing=pairing, fit=fit, training=training, run=run)
    distributed.training_device(given.pairing.device)
    source, adapter, target = map(as_path, (source, adapter, target))
    check_count("r", r, 1)
    distributed.on_main_process(partial(check_cache, given.run))
    if given.run.output_dir is not None:
        distributed.on_main_process(partial(check_place, given.run.output_dir, source, adapter, target, kind="LORA"))
    check_texts([text], given.fit.fit_text)
    check_pair(source, [adapter], target, given.pairing, max_length=given.training.max_length)
    check_all_reached([text], given.fit.fit_text)
    training, progress, phases = given.training, given.run.progress, Phases()
    with ExitStack() as stack:
        with phases.measure("load"):
            pair = stack.enter_context(open_pair(source, adapter, target, given.pairing))
        with phases.measure("text"):
            bar = partial(tqdm, disable=not progress)
            texts = read_texts(pair, text, given.fit, training, bar=bar)
            texts = taught(pair, texts, training, text, bar=bar)
            training = replace(training, teacher=texts.metrics["teacher"], gamma=texts.metrics["gamma"])
        if given.pairing.depth_map == "similarity":
            pair = map_by_similarity(pair, texts.fit, given.pairing.module_map)
        stacked: dict[str, int] = defaultdict(int)
        for place, sources in pair.modules.kernels.items():
            stacked[split_place(place)[0]] += sum(len(pair.kernels[s].A) for s in sources)
        r = r or max(stacked.values())
        teacher = open_teacher(pair, training, folder=given.run.cache_dir)
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(stacked), task_type="CAUSAL_LM")
        with unloaded_on_error(pair.target):
            with seeded(training.seed):
                model = get_peft_model(pair.target, config).eval()
            reached = imitate(pair, model, teacher, texts, phases, output_dir=given.run.output_dir, progress=progress)
        trained = freeze_adapter(model)
    metrics = {
        "kl": {"target": reached.kl["target"], "translated": reached.kl["end"]},
        **reached.metrics(pair, texts, trained),
        "phases": phases.costs,
        "settings": {**given.but(teacher=training.teacher).settings(), "rank": r},
    }
    result = TranslationResult(model, metrics, reached.refinement.history, pair.modules)
    if given.run.output_dir is not None:
        distributed.on_main_process(partial(result.save_pretrained, given.run.output_dir))
    return result
