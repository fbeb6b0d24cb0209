"""Several adapters of one model at once: models are loaded once, and one pass of text fits all closed forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from . import ranks, shards
from .align import ModuleMap, align_texts, map_modules
from .fit import ClosedForm, KernelFit, fit_closed_form
from .models import LoraKernel, load_model, unload_adapters
from .pair import Pair, open_pair
from .result import TranslationResult
from .source import load_source
from .text import C4, is_written, read_text


PAIR_OPTIONS = (
    "depth_map", "module_map", "source_tokenizer", "target_tokenizer", "source_revision", "target_revision",
    "source_rank", "device", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Share:
    """One adapter's part of a closed form that was fitted for several.

    Args:
        fit: The closed form of the stacked kernels.
        modules: Where they land.
        rows (`dict[str, slice]`): For each source module of this adapter its rows of the stacked A.
    """

    fit: ClosedForm
    modules: ModuleMap
    rows: dict[str, slice]

    def closed_form(self, kernels: Mapping[str, LoraKernel]) -> tuple[ClosedForm, ModuleMap]:
        """As `Bridge.closed_form`."""

        def own(fit: KernelFit) -> KernelFit:
            rows = self.rows[fit.source_module]
            return replace(fit, A_P_in=fit.A_P_in[rows], P_out_B=fit.P_out_B[:, rows])

        return self.fit.part(kernels, own), self.modules.part(kernels)


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
    remedy = "save each result with `save_pretrained`, and to resume after a kill translate them in turn"
    for given, remedy in (("bridge", "pass no `bridge`"), ("output_dir", remedy)):
        if options.get(given) is not None:
            raise ValueError(f"`{given}` is for one adapter at a time: {remedy}.")
    if options["beta"] > 0 or options["depth_map"] == "similarity":
        raise ValueError("`beta` and `depth_map='similarity'` are for one adapter at a time: translate them in turn.")
    if shards.asked(options["training_args"]):
        raise ValueError("FSDP is for one adapter at a time: translate them in turn.")
    names = adapter_names(adapters, options.pop("adapter_name"))
    device = ranks.begin(options["device"])
    source = load_source(
        source, adapters[0], device, options["source_revision"], options["adapter_revision"], options["dtype"]
    )
    target = load_model(target, "target", device, options["target_revision"], options["dtype"])
    text = options.pop("text")
    texts = [text[name] if isinstance(text, Mapping) else text for name in names]
    pair_options = {name: options[name] for name in PAIR_OPTIONS} | {"adapter_revision": options["adapter_revision"]}
    parts = []
    for adapter in adapters:
        with open_pair(source, adapter, target, **pair_options) as pair:
            parts.append(pair.kernels)
    kernels, rows = stacked(parts)
    with open_pair(source, adapters[0], target, **pair_options) as pair:
        fit, modules = _fit(pair, kernels, texts[0], options)
    results, states = [], []
    for adapter, name, own_rows, own_text in zip(adapters, names, rows, texts):
        share = Share(fit, modules, own_rows)
        own_options = {**options, "text": own_text, "adapter_name": name, "bridge": share}
        result = translate(source, adapter, target, **own_options)
        states.append(
            {k: v.cpu().clone() for k, v in get_peft_model_state_dict(result.model, adapter_name=name).items()}
        )
        results.append(result)
        unload_adapters(target)
    return together(target, results, names, states)


def together(
    target: PreTrainedModel, results: Sequence[TranslationResult], names: Sequence[str], states: Sequence[dict]
) -> list[TranslationResult]:
    """The results with all their adapters on one model."""
    configs = [result.model.peft_config[name] for result, name in zip(results, names)]
    model = get_peft_model(target, configs[0], adapter_name=names[0])
    for config, name in zip(configs[1:], names[1:]):
        model.add_adapter(name, config)
    for name, state in zip(names, states):
        set_peft_model_state_dict(model, state, adapter_name=name)
    model.requires_grad_(False)
    return [replace(result, model=model.eval(), adapter_name=name) for result, name in zip(results, names)]


def adapter_names(adapters: Sequence[str | Path], given: str | Sequence[str]) -> list[str]:
    """The given names, or the last parts of the adapters' paths.

    Raises:
        ValueError: If they are not one for each, or not distinct.
    """
    names = [Path(adapter).name for adapter in adapters] if isinstance(given, str) else list(given)
    if len(names) != len(adapters) or len(set(names)) != len(names):
        raise ValueError(
            f"Several adapters need a name each, all different, got {names}: pass `adapter_name=[...]`, {len(adapters)} names."
        )
    return names


def _fit(
    pair: Pair, kernels: Mapping[str, LoraKernel], text: Any, options: Mapping[str, Any]
) -> tuple[ClosedForm, ModuleMap]:
    modules = map_modules(kernels, pair.target, pair.modules.layers, options["module_map"], pair.source)
    general = options["fit_text"] if options["fit_text"] is not None else C4 if is_written(text) else text
    corpus = read_text(general, options["fit_samples"], lambda *_: [])
    texts = align_texts([sample.text for sample in corpus], *pair.tokenizers, max_length=options["max_length"])
    with pair.adapted.disable_adapter():
        fit = fit_closed_form(
            pair.source, pair.target, texts, pair.vocabulary, kernels, modules,
            batch_size=options["batch_size"], ridge=options["ridge"], hidden=False,
            progress=partial(tqdm, disable=not options["progress"], desc="closed form"),
        )  # fmt: skip
    return fit, modules
