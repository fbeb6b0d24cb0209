"""Several adapters of one model at once: models are loaded once, and one pass of text fits all closed forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from . import ranks, shards
from .align import ModuleMap, align_texts, map_modules
from .fit import ClosedForm, KernelFit, within_memory
from .models import LoraKernel, load_model, unload_adapters
from .pair import Pair, PairTexts, fitted, open_pair
from .result import TranslationResult
from .run import Run, check_folder, clear_run, described, open_run
from .source import load_source
from .text import C4, is_written, read_text


PAIR_OPTIONS = (
    "depth_map", "module_map", "source_tokenizer", "target_tokenizer", "source_revision", "target_revision",
    "source_rank", "device", "source_device", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Share:
    """One adapter's part of a closed form that was fitted for several.

    Args:
        maps: The closed form of the stacked kernels.
        modules: Where they land.
        rows (`dict[str, slice]`): For each source module of this adapter its rows of the stacked A.
    """

    maps: ClosedForm
    modules: ModuleMap
    rows: dict[str, slice]

    def closed_form(self, kernels: Mapping[str, LoraKernel]) -> tuple[ClosedForm, ModuleMap]:
        """As `Bridge.closed_form`."""

        def own(fit: KernelFit) -> KernelFit:
            rows = self.rows[fit.source_module]
            return replace(fit, A_P_in=fit.A_P_in[rows], P_out_B=fit.P_out_B[:, rows])

        return self.maps.part(kernels, own), self.modules.part(kernels)


def stacked(parts: Sequence[Mapping[str, LoraKernel]]) -> tuple[dict[str, LoraKernel], list[dict[str, slice]]]:
    """The kernels of several adapters on top of each other, and each one's rows."""
    kernels: dict[str, LoraKernel] = {}
    rows: list[dict[str, slice]] = []
    for part in parts:
        rows.append({})
        for name, kernel in part.items():
            A, B = kernel.A.cpu(), kernel.B.cpu()
            if name in kernels:
                A, B = torch.cat([kernels[name].A, A]), torch.cat([kernels[name].B, B], dim=1)
            kernels[name] = LoraKernel(A, B, 1.0)
            rows[-1][name] = slice(len(A) - len(kernel.A), len(A))
    return kernels, rows


def translate_several(
    translate,
    source: str | Path | PreTrainedModel | None,
    adapters: Sequence[str | Path],
    target: str | Path | PreTrainedModel,
    **options: Any,
) -> list[TranslationResult]:
    """What `translate` does when it is given a list of adapters; arguments, results and errors as there."""
    if any(isinstance(adapter, PeftModel) for adapter in adapters):
        raise ValueError("Several adapters must be folders or hub ids, not PeftModels: save them first.")
    for name in ("bridge", "start"):
        if options.get(name) is not None:
            raise ValueError(f"`{name}` is for one adapter at a time: pass no `{name}`.")
    if options["beta"] > 0 or options["depth_map"] == "similarity":
        raise ValueError("`beta` and `depth_map='similarity'` are for one adapter at a time: translate them in turn.")
    if shards.asked(options["training_args"]):
        raise ValueError("FSDP and ZeRO-3 are for one adapter at a time: translate them in turn.")
    names = adapter_names(adapters, options.pop("adapter_name"))
    resume, folders = options["resume_from_checkpoint"], [_folder(options["output_dir"], name) for name in names]
    for folder in folders:
        ranks.shared(partial(check_folder, folder, resume, source, *adapters, target))
    text = options.pop("text")
    texts = [_text_of(text, name) for name in names]
    device = ranks.begin(options["device"])
    of_source = ranks.device_of_source(options["source_device"], device)
    source = load_source(
        source, adapters[0], of_source, options["source_revision"], options["adapter_revision"], options["dtype"]
    )
    target = load_model(target, "target", device, options["target_revision"], options["dtype"])
    pair_options = {name: options[name] for name in PAIR_OPTIONS} | {"adapter_revision": options["adapter_revision"]}
    parts = []
    for adapter in adapters:
        with open_pair(source, adapter, target, **pair_options) as pair:
            parts.append(pair.kernels)
    kernels, rows = stacked(parts)
    with open_pair(source, adapters[0], target, **pair_options) as pair:
        modules = map_modules(kernels, pair.target, pair.modules.layers, options["module_map"], pair.source)
        # All the kernels stand for the first adapter's own.
        pair = replace(pair, adapter=replace(pair.given, kernels=kernels), modules=modules)
        describe = partial(described, {**options, "text": text, "adapter_name": names}, pair)
        run = open_run(options["output_dir"], options["cache_dir"], resume, describe)
        if run.begun:
            for folder in filter(None, folders):  # of a run before, which is not this one's to go on with
                ranks.shared(partial(clear_run, folder))
        with run.advising():
            maps = _fit(pair, run, texts[0], options)
    results, states = [], []
    for adapter, own_rows, own_text, folder in zip(adapters, rows, texts, folders):
        own_options = {**options, "text": own_text, "bridge": Share(maps, modules, own_rows), "output_dir": folder}
        # Each is "default" in its own folder, which so is an adapter's, and gets its name on the model that carries all.
        result = translate(source, adapter, target, **own_options)
        states.append({k: v.cpu().clone() for k, v in get_peft_model_state_dict(result.model).items()})
        results.append(result)
        unload_adapters(target)
    run.finish()
    return together(target, results, names, states)


def _folder(output_dir: str | Path | None, name: str) -> Path | None:
    return None if output_dir is None else Path(output_dir) / name


def _text_of(text: Any, name: str) -> Any:
    if not isinstance(text, Mapping):
        return text
    if name not in text:
        raise ValueError(f"`text` has no text for the adapter '{name}': it has {', '.join(map(str, text))}.")
    return text[name]


def together(
    target: PreTrainedModel, results: Sequence[TranslationResult], names: Sequence[str], states: Sequence[dict]
) -> list[TranslationResult]:
    """The results with all their adapters on one model."""
    configs = [result.model.peft_config[result.adapter_name] for result in results]
    model = get_peft_model(target, configs[0], adapter_name=names[0])
    for config, name in zip(configs[1:], names[1:]):
        model.add_adapter(name, config)
    for name, state in zip(names, states):
        set_peft_model_state_dict(model, state, adapter_name=name)
    model.requires_grad_(False)
    return [replace(result, model=model.eval(), adapter_name=name) for result, name in zip(results, names)]


def adapter_names(adapters: Sequence[str | Path], given: str | Sequence[str]) -> list[str]:
    """The given names, or the last parts of the adapters' paths, with `_` for dots, which torch's names cannot have.

    Raises:
        ValueError: If they are not one for each, not distinct, or no names for a module.
    """
    names = [Path(adapter).name.replace(".", "_") for adapter in adapters] if isinstance(given, str) else list(given)
    for name in names:
        if not name or {".", "/", "\\"} & set(name) or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"An adapter cannot be called '{name}': pass `adapter_name=[...]`, names without dots and slashes."
            )
    if len(names) != len(adapters) or len(set(names)) != len(names):
        raise ValueError(
            f"Several adapters need a name each, all different, got {names}: pass `adapter_name=[...]`, {len(adapters)} names."
        )
    return names


def _fit(pair: Pair, run: Run, text: Any, options: Mapping[str, Any]) -> ClosedForm:
    """The closed form of all the pair's kernels: the one kept by the run, or fitted on its text, or on text read now."""
    texts = run.texts(lambda: _fit_texts(pair, text, options)).fit
    bar = partial(tqdm, disable=not options["progress"], desc="closed form")
    identity = str(
        [tensor.flatten()[:64].tolist() for kernel in pair.kernels.values() for tensor in (kernel.A, kernel.B)]
    )
    with pair.adapted.disable_adapter():
        fit = partial(
            fitted, pair, texts, run.cache, ridge=options["ridge"], hidden=False, progress=bar, also=identity
        )
        return within_memory(lambda size: fit(batch_size=size), options["batch_size"])


def _fit_texts(pair: Pair, text: Any, options: Mapping[str, Any]) -> PairTexts:
    general = options["fit_text"] if options["fit_text"] is not None else C4 if is_written(text) else text
    corpus = read_text(general, options["fit_samples"], lambda *_: [])
    texts = align_texts([sample.text for sample in corpus], *pair.tokenizers, max_length=options["max_length"])
    return PairTexts([], [], texts, [], {"closed_form": len(texts)})
