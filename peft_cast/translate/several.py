"""Several adapters of one model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from peft import get_peft_model_state_dict

from ..align import map_modules
from ..fit import StackedPart, adapter_names, initial_maps, on_one_model, stacked
from ..models import load_model, unload_adapters
from ..refine import clear_run, described, open_run
from ..results import TranslationResult
from ..source import load_source, open_pair
from ..text import read_fit_texts
from ..utils import distributed
from .job import Job, in_subfolder, text_for
from .one import translate_one


def translate_several(job: Job) -> list[TranslationResult]:
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
        folders = [in_subfolder(options, name).run.output_dir for name in names]
        if run.begun:
            for folder in folders:  # of a run before, which is not this one's to go on with
                if folder is not None:
                    distributed.on_main_process(partial(clear_run, Path(folder)))
        with run.advising():
            texts = run.texts(
                partial(read_fit_texts, pair, text_for(job.text, names[0]), options.fit, options.training)
            ).fit
            also = str([t.flatten()[:64].tolist() for kernel in kernels.values() for t in (kernel.A, kernel.B)])
            maps, _ = initial_maps(pair, texts, options, cache=run.cache, also=also)
    results, states = [], []
    for adapter, name, own_rows in zip(adapters, names, rows):
        # Each is "default" in its own folder, which so is an adapter's, and gets its name on the model that carries
        # all.
        text, part = text_for(job.text, name), StackedPart(maps, modules, own_rows)
        one = Job(source, adapter, target, text, part, options=in_subfolder(options, name))
        result = translate_one(one)
        states.append({k: v.cpu().clone() for k, v in get_peft_model_state_dict(result.model).items()})
        results.append(result)
        unload_adapters(target)
    run.finish()
    return on_one_model(target, results, names, states)
