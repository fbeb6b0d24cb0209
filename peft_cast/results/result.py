"""The result of a translation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..align import ModuleMap
from ..tuner import CastConfig
from ..utils import as_place, change_dtype, check_place, distributed, write_json
from .artifacts import METRICS_NAME, REPORT_NAME, replacing_folder
from .beside import check_formats
from .diagnosis import diagnose
from .fold import FoldedLora, check_beside, fold_beside, to_lora
from .publish import Publishable, add_card, push_saved
from .report.contents import contents
from .report.markdown import to_text
from .report.page import write_report
from .rows import Evaluation


@dataclass(frozen=True)
class TranslationResult(Publishable):
    """What `translate` and `baselines.distill_lora` return.

    Args:
        model ([`~peft.PeftModel`]): The target model with the translated adapter, ready to generate or save.
        metrics (`dict`): The measurements of the run, JSON-ready. `kl`: nats per aligned position between the teacher
            and the untouched target, the first maps and the final adapter on held-out texts; `route`: which
            `first_maps` it began with, the share of the way that a `copy` covers where that was tried, whether it was
            `refined`, the `strength` at which it acts, a multiple of what it was given, and the share of the way at
            each of the `strengths` that were tried; `excitement`: nats by which the LoRA changes the source's
            predictions there; `source`: the adapter's `type`, the largest `rank` of its kernels, `converted` (relative
            error of each module's kernel that approximates another kind of adapter) and `not_carried` (what of the
            adapter no kernel expresses, by module); `closed_form`: held-out R² per target module; `phases`: seconds
            and peak memory; `parameters`; `refinement`: the steps taken, why it `stopped` early if it did, the batch
            size and gradient accumulation used; `alignment`: among others `routes`, the map used, a line for each
            role, and `unmapped`, the modules without a place and why; `text`; `settings`; `report`: what only the
            report shows, see `report.gather_report`.
        history (`list[dict]`): Trainer's log of the refinement.
        module_map (`ModuleMap`): Which source modules landed where, and which found no place.
        adapter_name (`str`): Its name on the model.
        dtype (`torch.dtype`, *optional*): The precision it is saved in: the option `save_dtype`, else that of the
            source LoRA's file. As trained, float32, where it is `None`.
    """

    model: PeftModel
    metrics: dict[str, Any]
    history: Sequence[dict[str, float]]
    module_map: ModuleMap
    adapter_name: str = "default"
    dtype: torch.dtype | None = None

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        evaluation: Evaluation | None = None,
        evaluated_as: str | None = None,
        formats: str | Iterable[str] = (),
    ) -> None:
        """Save an ordinary PEFT adapter folder, and beside it `cast_metrics.json`, a model card and the report
        (`report.html`, `report.md`, see `write_report`).

        As in PEFT, an adapter of another name than "default" goes to a subfolder of its name. The files appear
        together, once all are written. The card names the licenses of both models and of the source adapter where it
        finds them; one that you changed is kept (docs/sharing.md). Of several processes the main one writes, whichever
        call this.

        Args:
            folder: Where.
            dtype (`torch.dtype`, *optional*): Precision of the file; `self.dtype` when not given. Training goes on in
                float32 in any case. docs/how-it-works.md says what bfloat16 loses.
            evaluation, evaluated_as: What `evaluate` measured, for the card, as in `push_to_hub`.
            formats: In which the LoRA that it folds into is put beside it, for programs without this package: `"peft"`
                (the folder `lora`), `"gguf"` (the file `lora.gguf`), `"mlx"` (the folder `mlx`).

        Raises:
            ValueError: If several of the evaluated adapters could be meant: pass `evaluated_as`; if the folder holds
                something else than such an adapter; if it folds into no LoRA of these `formats`.
            OSError: If the files cannot be written, with what was there before intact.
        """
        if not distributed.is_main_process():
            return
        config = self.model.peft_config[self.adapter_name]
        check_place(self._in(as_place(folder)), kind=getattr(config.peft_type, "value", config.peft_type))
        formats = check_beside(self._in(as_place(folder)), formats)
        with replacing_folder(folder) as partial:
            saved = self._save(partial, dtype)
            self._fold_beside(saved, formats, dtype)
            if isinstance(config, CastConfig):  # distilled LoRAs keep PEFT's card
                add_card(saved, evaluation, evaluated_as)
            # What quotes texts stays in a file of its own, which is never pushed.
            write_json(self.metrics.get("report", {}), saved / REPORT_NAME)
            write_report(self, saved, evaluation=evaluation)

    def _in(self, folder: Path) -> Path:
        """Where in a folder PEFT saves the adapter."""
        return folder if self.adapter_name == "default" else folder / self.adapter_name

    def _save(self, folder: Path, dtype: torch.dtype | None = None) -> Path:
        """Save adapter and metrics, and return the folder that has them."""
        self.model.save_pretrained(folder, selected_adapters=[self.adapter_name])
        folder = self._in(folder)
        if (dtype := dtype or self.dtype) is not None:
            change_dtype(folder / SAFETENSORS_WEIGHTS_NAME, dtype)
        write_json(self._account(), folder / METRICS_NAME)
        return folder

    def _fold_beside(self, folder: Path, formats: Sequence[str], dtype: torch.dtype | None = None) -> None:
        if formats:
            fold_beside(folder, formats, self.to_lora(dtype=dtype or torch.float32))

    def push_to_hub(self, repo_id: str, *, formats: str | Iterable[str] = (), **options: Any) -> CommitInfo:
        """Publish this with a model card; options, result and errors are those of `peft_cast.push`, `formats` those of
        `save_pretrained`.
        """

        names = check_formats(formats)

        def save(folder: Path) -> Path:
            saved = self._save(folder)
            self._fold_beside(saved, names)
            return saved

        return push_saved(save, repo_id, **options)

    def _account(self) -> dict[str, Any]:
        """What `cast_metrics.json` holds."""
        metrics = {name: part for name, part in self.metrics.items() if name != "report"}
        return {"metrics": metrics, "history": self.history}

    def to_lora(self, rank: int | None = None, *, dtype: torch.dtype = torch.float32) -> FoldedLora:
        """The adapter as a plain LoRA, for PEFT, vLLM, llama.cpp or MLX; arguments and errors as in
        `peft_cast.to_lora`.
        """
        folded = to_lora(self.model, rank, adapter_name=self.adapter_name, dtype=dtype)
        return replace(folded, report={**folded.report, **self._account()})

    def diagnosis(self) -> list[str]:
        """What limits this translation and what to do about it, a sentence each; empty when nothing stands out."""
        return diagnose(self.metrics, self.history)

    def summary(self) -> str:
        """The report as a short text: how far the translation went, what limits it and what it cost."""
        report = contents({"alignment": self.module_map.metrics, **self.metrics}, self.history)
        return to_text(report)

    def __str__(self) -> str:
        return self.summary()
