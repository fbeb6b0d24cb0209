"""Bridges: the part of a translation that does not depend on the adapter, fitted once per pair of models and kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from huggingface_hub import CommitInfo, ModelCard, ModelHubMixin
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..align import ModuleMap, align_texts
from ..models import freeze_adapter, load_model, skeleton_of
from ..options import OF_COMMANDS, Fit, Options, Pairing, Run, Training, takes
from ..results import (
    BRIDGE_CONFIG_NAME,
    BRIDGE_WEIGHTS_NAME,
    METRICS_NAME,
    Artifact,
    add_card,
    make_card,
    push_saved,
    read_licenses,
)
from ..results.artifacts import replacing_folder
from ..source import (
    BRIDGED,
    Holdings,
    LoraKernel,
    adapted_source,
    check_adapter,
    check_is_read,
    check_pair,
    check_source,
    load_source,
    open_pair,
)
from ..text import read_corpus
from ..utils import (
    as_path,
    change_dtype,
    check_place,
    complete_folder,
    distributed,
    hub_revision,
    without_secrets,
    write_json,
)
from ..utils.fields import check_count, check_option
from .bridge_config import Side, read_bridge
from .closed_form import TOO_FEW, fit_closed_form
from .install import adapter_name_of, cast_config, check_adapter_name, install
from .maps import ClosedForm, KernelFit, PlaceMaps
from .saved import save_closed_form


class Bridge(ModelHubMixin, library_name="peft-cast", tags=["cast", "bridge", "peft"]):
    """The maps between two models, which carry any LoRA of the one over to the other: `A' = A P_in`, `B' = P_out B`.

    `save_pretrained` and `from_pretrained` are those of `huggingface_hub.ModelHubMixin`.

    Args:
        maps (`ClosedForm`): For every target place the `PlaceMaps` of the source place that lands on it.
        modules (`ModuleMap`): Where every linear layer of the source lands.
        source, target (`Side`): The models.
        metrics (`dict`): Texts, positions, settings; JSON-ready.
    """

    def __new__(cls, *args, **kwargs) -> Bridge:
        return object.__new__(cls)  # the mixin would write the arguments, tensors included, to a config.json

    def __init__(
        self, maps: ClosedForm[PlaceMaps], modules: ModuleMap, source: Side, target: Side, metrics: Mapping[str, Any]
    ) -> None:
        self.maps, self.modules, self.source, self.target = maps, modules, source, target
        self.metrics = dict(metrics)

    def closed_form(self, kernels: Mapping[str, LoraKernel]) -> tuple[ClosedForm[KernelFit], ModuleMap]:
        """The projections of some kernels, and where they land.

        Args:
            kernels: By source place: A (r, in_S), B (out_S, r).

        Raises:
            ValueError: If no kernel has a place, or one does not have the source model's shapes.
        """
        closed_form = self.maps.part(kernels, lambda maps: maps.applied(kernels[maps.source_place]))
        if not closed_form.kernels:
            raise ValueError(
                f"None of the adapter's modules ('{next(iter(kernels))}', ...) is on this bridge, which leads from "
                f"'{self.source.name}' to '{self.target.name}': fit a bridge for the adapter's own model."
            )
        return closed_form, self.modules.part(kernels)

    @takes("source_rank adapter_revision device dtype")
    def cast(
        self,
        adapter: str | Path | PeftModel,
        target: str | Path | PreTrainedModel | None = None,
        *,
        source: str | Path | PreTrainedModel | None = None,
        gain: float | None = None,
        adapter_name: str = "default",
        pairing: Pairing | None = None,
        **options: Any,
    ) -> PeftModel:
        """Carry one adapter over, with no text and no training.

        What no kernel expresses (a head trained in full, biases, see docs/sources.md) is lost: a warning names it, and
        the configuration of the result (`not_carried`).

        Args:
            adapter: The LoRA: hub id, path, or a PeftModel on the source.
            target: The model it shall work on; the one the bridge leads to is loaded when not given.
            source: Needed only for adapters that are no plain LoRA, whose weight changes are measured on the model.
            gain (`float`, *optional*), adapter_name (`str`): As in `translate`.
            pairing, options: `source_rank`, `adapter_revision`, `device` and `dtype`, as in `translate`.

        Returns:
            [`~peft.PeftModel`]: The target with the adapter.

        Raises:
            ValueError: If the adapter or the target does not fit the bridge.
        """
        chosen = Options.of(options, Bridge.cast, pairing=pairing).pairing
        adapter, target, source = map(as_path, (adapter, target, source))
        check_option("gain", gain, Fit)
        check_adapter_name(adapter_name)
        check_adapter(adapter, chosen.adapter_revision)
        if source is None and not isinstance(adapter, PeftModel):
            check_is_read(adapter, chosen.adapter_revision, "pass `source`", self.source.name)
        revision = hub_revision(target or self.target.name, self.target.revision)
        if target is not None:
            skeleton_of(target, "target", revision)
            self.target.check(target, "target", revision)
        if source is not None:
            if isinstance(source, torch.nn.Module) and source is target:
                raise ValueError("`source` and `target` are the same object: load the model twice.")
            check_source(source, adapter, chosen)
            self.source.check(source, "source")
        device = distributed.init(chosen.device)
        on, which = self.source.skeleton(), BRIDGED
        if source is not None or isinstance(adapter, PeftModel):
            on, which = load_source(source, adapter, device, None, chosen.adapter_revision, chosen.dtype), "source"
        load = partial(load_model, target or self.target.name, "target", device, revision, chosen.dtype)
        return self._cast(adapter, on, load, gain, adapter_name, chosen, which)[0].eval()

    @takes("adapter_revision dtype")
    def cast_file(
        self,
        adapter: str | Path,
        folder: str | Path,
        *,
        gain: float | None = None,
        pairing: Pairing | None = None,
        **options: Any,
    ) -> Holdings:
        """Carry a plain LoRA over from file to file: neither model is loaded (`cast` loads them).

        What no kernel expresses (a head trained in full, biases, see docs/sources.md) is lost: a warning names it, the
        model card and `cast_metrics.json` beside the adapter.

        Args:
            adapter: The LoRA: hub id or path.
            folder: Where the CAST adapter is saved.
            gain, pairing, options: As in `cast`, but `dtype` is that of the file, the LoRA's own when not given.

        Returns:
            `Holdings`: What the LoRA holds and what became of it.

        Raises:
            TypeError: If there is no such argument.
            ValueError: As `cast`; also for adapters that are no plain LoRA.
            OSError: If the folder cannot be written.
        """
        chosen, adapter = Options.of(options, Bridge.cast_file, pairing=pairing).pairing, as_path(adapter)
        check_option("gain", gain, Fit)
        check_place(folder, adapter)
        check_is_read(adapter, chosen.adapter_revision, source=self.source.name)
        check_adapter(adapter, chosen.adapter_revision)
        on, load = self.source.skeleton(), self.target.skeleton
        model, held, metrics, dtype = self._cast(adapter, on, load, gain, "default", chosen)
        # PEFT would save embeddings that differ from those the target has on disk, and a skeleton has none.
        with replacing_folder(folder) as partial_folder:
            model.save_pretrained(partial_folder, save_embedding_layers=False)
            change_dtype(partial_folder / SAFETENSORS_WEIGHTS_NAME, chosen.dtype or dtype)
            write_json({"metrics": metrics}, partial_folder / METRICS_NAME)
            add_card(partial_folder)
        return held

    def push_to_hub(  # type: ignore[override]  # the mixin's filters of files make no sense here
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        branch: str | None = None,
        model_card_kwargs: None = None,
    ) -> CommitInfo:
        """Publish the bridge with a model card; arguments, result and errors are those of `peft_cast.push`.

        `branch` is what `ModelHubMixin` calls `revision`; its `model_card_kwargs` mean nothing here.
        """
        return push_saved(
            self._save,
            repo_id,
            private=private,
            token=token,
            revision=revision or branch,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The card that `save_pretrained` writes."""
        artifact = Artifact.of_bridge(self._config())
        return make_card(artifact, read_licenses(artifact))

    def _cast(
        self,
        adapter,
        source: PreTrainedModel,
        load_target: Callable[[], PreTrainedModel],
        gain,
        adapter_name,
        pairing: Pairing,
        which: str = BRIDGED,
    ) -> tuple[PeftModel, Holdings, dict[str, Any], torch.dtype]:
        """The target, loaded once the adapter was read on the source, with it, what that held, the metrics, and the
        precision it is kept in.
        """
        with adapted_source(source, adapter, pairing.adapter_revision, pairing.source_rank, which) as read:
            closed_form, modules = self.closed_form(read.kernels)
            held = read.holdings
            config = cast_config(
                read.kernels,
                modules,
                source_model_name_or_path=without_secrets(self.source.name),
                source_model_revision=self.source.revision,
                source_adapter_name_or_path=adapter_name_of(adapter),
                source_adapter_revision=pairing.adapter_revision,
                not_carried=held.reasons,
            )
            model = install(
                load_target(),
                config,
                read.kernels,
                closed_form,
                gain=gain,
                adapter_name=adapter_name,
                revision=self.target.revision,
            )
            metrics: dict[str, Any] = {"source": read.metrics, "alignment": modules.metrics}
        named = None if isinstance(adapter, PeftModel) else adapter
        if (lost := held.lost(named, modules.metrics["unmapped"])) is not None:
            warnings.warn(lost, stacklevel=3)
        freeze_adapter(model)
        metrics["bridge"] = {"source": self.source.name, "target": self.target.name}
        return model, held, metrics, read.dtype

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """The mixin's, which raises an error in words if the folder cannot be written or holds something else."""
        folder = check_place(save_directory, kind=None)  # Python's errors have numbers in brackets
        return super().save_pretrained(folder, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        add_card(self._save(save_directory))  # the mixin would keep what there is, a card of another bridge too

    def _save(self, folder: Path) -> Path:
        """Save all but the card and return where."""
        with complete_folder(folder, key=BRIDGE_CONFIG_NAME) as partial:
            save_closed_form(self.maps, partial / BRIDGE_WEIGHTS_NAME)
            write_json(self._config(), partial / BRIDGE_CONFIG_NAME)
        return folder

    def _config(self) -> dict[str, Any]:
        return {
            "source": vars(self.source),
            "target": vars(self.target),
            "layers": self.modules.layers,
            "unmapped": self.modules.reasons,
            "found": self.modules.found,
            "metrics": self.metrics,
        }

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **_: Any,
    ) -> Bridge:
        """Read a bridge from a folder or the hub; it may be a stranger's, everything in it is checked.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            revision, cache_dir, force_download, local_files_only, token: As in `huggingface_hub.hf_hub_download`.

        Raises:
            ValueError: If it holds no bridge, or a broken one.
        """
        # The mixin's own would read a `config.json` too, which a bridge does not have.
        sides, modules, metrics, maps = read_bridge(
            as_path(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls(maps, modules, *sides, metrics)


@takes(OF_COMMANDS["fit_bridge"])
def fit_bridge(
    source: str | Path | PreTrainedModel,
    target: str | Path | PreTrainedModel,
    *,
    text: Any = None,
    samples: int | None = None,
    pairing: Pairing | None = None,
    fit: Fit | None = None,
    training: Training | None = None,
    run: Run | None = None,
    **options: Any,
) -> Bridge:
    """Fit the maps between two models, for every linear layer, from one pass of general text.

    Args:
        source, target: The models: hub ids, paths or loaded models.
        text: General text, anything that `translate(fit_text=...)` takes; C4 when `None`.
        samples (`int`, *optional*): How many texts are read: `fit_samples` when not given.
        pairing, fit, training, run: Groups of options, as in `translate`. Of `training` only `batch_size` and
            `max_length` are read; `depth_map="similarity"` is not possible here.
        options: Options by their own names (docs/options.md).

    Returns:
        `Bridge`: To carry adapters over with, to save and to share.

    Raises:
        ValueError: For models, tokenizers or text that cannot be used; the message says why.
        OSError: If a model or corpus cannot be reached.
    """
    given = Options.of(options, fit_bridge, pairing=pairing, fit=fit, training=training, run=run)
    pairing, fit, training = given.pairing, given.fit, given.training
    check_count("samples", samples, 2)
    text = text if text is not None else fit.fit_text
    source, target = as_path(source), as_path(target)
    if pairing.depth_map == "similarity":
        raise ValueError("A bridge needs its depth map beforehand: pass 'proportional' or a mapping of layer numbers.")
    check_pair(source, [], target, pairing, max_length=training.max_length)
    distributed.init(pairing.device)
    corpus = read_corpus(text, samples or fit.fit_samples)  # before models are loaded: it may be out of reach
    if len(corpus) < 2:
        raise ValueError(TOO_FEW)
    bar = partial(tqdm, disable=not given.run.progress, desc="fitting bridge")
    with open_pair(source, None, target, pairing) as pair:
        texts = align_texts(corpus, *pair.tokenizers, max_length=training.max_length)
        maps = fit_closed_form(
            pair.source,
            pair.target,
            texts,
            pair.vocabulary,
            None,
            pair.modules,
            batch_size=training.batch_size,
            ridge=fit.ridge,
            hidden=False,
            progress=bar,
        )
        sides = Side.of(pair.source, pairing.source_revision), Side.of(pair.target, pairing.target_revision)
    fits = [fit for group in maps.kernels.values() for fit in group]
    metrics = {
        "texts": len(texts),
        "positions": maps.positions,
        "ridge": fit.ridge,
        "max_length": training.max_length,
        "r2_in": mean(fit.r2_in for fit in fits),
        "r2_out": mean(fit.r2_out for fit in fits),
        "numbers": sum({id(t): t.numel() for fit in fits for side in fit.maps for t in side.factors}.values()),
    }
    return Bridge(maps, pair.modules, *sides, metrics)
