"""The result of a translation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from . import ranks
from .align import ModuleMap
from .diagnosis import diagnose, list_not_carried
from .files import change_dtype, write_json
from .report import write_report
from .sharing import REPORT_NAME, Publishable, add_card, replacing_folder, write_metrics
from .tuner import CastConfig


if TYPE_CHECKING:
    from .evaluation import Evaluation


@dataclass(frozen=True)
class TranslationResult(Publishable):
    """What `translate` and `baselines.distill_lora` return.

    Args:
        model ([`~peft.PeftModel`]): The target model with the translated adapter, ready to generate or save.
        metrics (`dict`): The measurements of the run, JSON-ready. `kl`: nats per aligned position between the teacher
            and the untouched target, the closed form and the final adapter on held-out texts; `excitement`: nats by
            which the LoRA changes the source's predictions there; `source`: the adapter's `type`, the largest `rank` of its
            kernels, `converted` (relative error of each module's kernel that approximates another kind of adapter) and
            `not_carried` (what of the adapter no kernel expresses, by module); `closed_form`: held-out R² per target module; `phases`:
            seconds and peak memory; `parameters`; `refinement`: the steps taken, why it `stopped` early if it did, the batch
            size and gradient accumulation used; `alignment`: among others `routes`, the map used, a line for each role, and
            `unmapped`, the modules without a place and why; `text`; `settings`; `report`: what only the report shows, see
            `report.gather_report`.
        history (`list[dict]`): Trainer's log of the refinement.
        module_map (`ModuleMap`): Which source modules landed where, and which found no place.
        adapter_name (`str`): Its name on the model.
    """

    model: PeftModel
    metrics: dict[str, Any]
    history: Sequence[dict[str, float]]
    module_map: ModuleMap
    adapter_name: str = "default"

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        evaluation: Evaluation | None = None,
        evaluated_as: str | None = None,
    ) -> None:
        """Save an ordinary PEFT adapter folder, and beside it `cast_metrics.json`, a model card and the report
        (`report.html`, `report.md`, see `write_report`).

        As in PEFT, an adapter of another name than "default" goes to a subfolder of its name. The files appear together, once
        all are written. The card names the licences of both models and of the source adapter where it finds them; one that you
        changed is kept (docs/sharing.md). Of several processes the main one writes, whichever call this.

        Args:
            folder: Where.
            dtype (`torch.dtype`, *optional*): Precision of the file; as trained, float32, when not given.
            evaluation, evaluated_as: What `evaluate` measured, for the card, as in `push_to_hub`.

        Raises:
            ValueError: If several of the evaluated adapters could be meant: pass `evaluated_as`.
            OSError: If the files cannot be written, with what was there before intact.
        """
        if not ranks.is_main():
            return
        with replacing_folder(folder) as partial:
            saved = self._save(partial)
            if dtype is not None:
                change_dtype(saved / SAFETENSORS_WEIGHTS_NAME, dtype)
            if isinstance(self.model.peft_config[self.adapter_name], CastConfig):  # distilled LoRAs keep PEFT's card
                add_card(saved, evaluation, evaluated_as)
            # What quotes texts stays in a file of its own, which is never pushed.
            write_json(self.metrics.get("report", {}), saved / REPORT_NAME)
            write_report(self, saved, evaluation=evaluation)

    def _save(self, folder: Path) -> Path:
        """Save adapter and metrics, and return the folder that has them."""
        self.model.save_pretrained(folder, selected_adapters=[self.adapter_name])
        folder = folder if self.adapter_name == "default" else folder / self.adapter_name
        metrics = {name: part for name, part in self.metrics.items() if name != "report"}
        write_metrics(folder, {"metrics": metrics, "history": self.history})
        return folder

    def diagnosis(self) -> list[str]:
        """What limits this translation and what to do about it, a sentence each; empty when nothing stands out."""
        return diagnose(self.metrics, self.history)

    def summary(self) -> str:
        """A short table: how far the translation went and what it cost."""
        kl = self.metrics["kl"]
        lines = ["KL from the teacher on held-out text (nats per position; less is closer)"]
        lines += [f"  {name:<22}{value:8.4f}" for name, value in kl.items()]
        if kl["target"] > 0:
            lines.append(f"  {'way covered':<22}{1 - kl['translated'] / kl['target']:8.1%}")
        if own := self.metrics.get("on_policy"):
            lines.append(
                f"On its own answers to {own['texts']} prompts {own['kl']['before']:.4f}, then {own['kl']['after']:.4f}"
            )
        lines.append(
            f"The LoRA changes the source's predictions there by {self.metrics['excitement']:.4f} nats per position"
        )
        if "source" in self.metrics:
            lines.append(_describe_source(self.metrics["source"]))
        by_role: dict[str, list[dict]] = defaultdict(list)
        for name, fits in self.metrics.get("closed_form", {}).get("modules", {}).items():
            by_role[name.rsplit(".", 1)[-1]] += fits
        if by_role:
            lines.append("Closed-form fit, held-out R² (mean over layers)   P_in   P_out")
        for role, fits in by_role.items():
            r2_in, r2_out = (sum(fit[key] for fit in fits) / len(fits) for key in ("r2_in", "r2_out"))
            lines.append(f"  {role:<46}{r2_in:6.2f}  {r2_out:6.2f}")
        lines += _describe_map(self.module_map.metrics)
        parameters = self.metrics["parameters"]
        lines.append(
            f"Trained parameters {parameters['trained']:,} (source LoRA {parameters['source_lora']:,}); "
            f"unmapped source modules {len(self.module_map.unmapped)}"
        )
        costs = self.metrics["phases"].items()
        lines.append("Time  " + ", ".join(f"{name} {cost['seconds']:.0f} s" for name, cost in costs))
        lines += [f"Note  {sentence}" for sentence in self.diagnosis()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def _describe_map(alignment: dict[str, Any]) -> list[str]:
    """A line for each role: which source module lands where, and what found no place."""
    lines = (
        ["Where kernels landed (role, source → target, found by name, shape or module_map)"]
        if alignment["routes"]
        else []
    )
    for route in alignment["routes"]:
        how = "" if route["found"] == "name" else f"  (by {route['found']})"
        lines.append(f"  {route['role'] or '?':<5}{route['source']} → {route['target']}  × {route['kernels']}{how}")
    if alignment["unmapped"]:
        lines.append(f"  none {list_not_carried(alignment['unmapped'])}")
    return lines


def _describe_source(source: dict[str, Any]) -> str:
    """One line on the source's adapter: type, rank, how well kernels express it and what they do not."""
    line = f"Source adapter {source['type']}, kernels of rank {source['rank']}"
    if source["converted"]:
        errors = source["converted"].values()
        line += f"; {len(errors)} weight changes approximated, mean relative error {sum(errors) / len(errors):.2g}"
    if source["not_carried"]:
        line += f"; not carried over: {list_not_carried(source['not_carried'])}"
    return line
