"""In words, what a translation's metrics say is wrong, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..source import UNHEARD, list_not_carried
from .settings import is_comparable, settings_of


KL_NAMES = {
    "target": "untouched target",
    "closed_form": "closed form",
    "copy": "the LoRA as it is",
    "start": "where it began",
    "refined": "before its own words",
    "translated": "translated",
}


def way_covered(kl: Mapping[str, float]) -> float | None:
    """The share of the KL between untouched target and teacher that is gone; `None` if that is not measured, not
    finite, or there was none.
    """
    before, after = (kl.get(name, math.nan) for name in ("target", "translated"))
    return 1 - after / before if math.isfinite(before + after) and before > 0 else None


def fit_by_role(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The closed form's held-out R² of P_in and P_out by role, the last part of a module's name, over the layers."""
    by_role: dict[str, list[tuple[float, float]]] = {}
    for name, fits in metrics.get("closed_form", {}).get("modules", {}).items():
        by_role.setdefault(name.rsplit(".", 1)[-1], []).extend((fit["r2_in"], fit["r2_out"]) for fit in fits)
    return {
        role: (fmean(r2[0] for r2 in found), fmean(r2[1] for r2 in found)) for role, found in by_role.items() if found
    }


def diagnose(metrics: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> list[str]:
    """One sentence for each thing that limits a translation, most telling first; empty when nothing stands out.

    The limits are rules of thumb from the runs in docs/results.md; `history` is Trainer's log.
    """
    found: list[str] = []
    kl, settings, source = metrics["kl"], settings_of(metrics), metrics.get("source", {})
    trained, errors = ([entry[key] for entry in history if key in entry] for key in ("kl", "mse"))
    covered = way_covered(kl) or 0.0
    found += filter(None, (metrics.get(part, {}).get("stopped") for part in ("refinement", "on_policy")))
    if metrics["excitement"] < 0.05:
        found.append(
            f"The text hardly excites the adapter (it changes the source's predictions by {metrics['excitement']:.3f} "
            "nats per position), so there is little to learn from: pass `text=SelfWritten(prompts=[...])` with a "
            "dozen prompts of the kind it answers."
        )
    if source.get("not_carried"):
        imitated = "They are lost."
        if not all(part["what"].endswith(UNHEARD) for part in source["not_carried"]):
            imitated = (
                "The teacher has them, so that the refinement imitates them as far as the other parts' kernels can: "
                "judge the result on your task."
                if settings.get("steps", 1) or settings.get("on_policy_steps")
                else "Nothing was refined, so they are lost: pass `steps`, and the refinement imitates them."
            )
        found.append(
            f"No kernel expresses these parts of the adapter: {list_not_carried(source['not_carried'])}. {imitated}"
        )
    if covered >= 0.9 or kl["target"] <= 0:
        return found
    if covered <= 0:
        found.append(
            "With this adapter the target is no nearer to its teacher than without: use the target as it is, or "
            "retrain the adapter on it, unless one of the following helps."
        )
    if source.get("converted") and (error := fmean(source["converted"].values())) > 0.3:
        found.append(
            f"Kernels of rank {source['rank']} approximate the adapter's weight changes badly (mean relative error "
            f"{error:.2f}): pass a larger `source_rank`."
        )
    if settings["steps"] == 0 and "closed_form" in kl:
        found.append("Only the closed form was fitted, which moves little across model families: pass `steps`.")
    reached = kl.get("refined", kl["translated"])  # on text like the one it trained on
    if trained and is_comparable(metrics) and reached > 1.5 * trained[-1] and reached - trained[-1] > 0.05:
        found.append(
            f"The projections fit the text they trained on ({trained[-1]:.2f} nats) much better than held-out text "
            f"({reached:.2f}): pass more, or more varied, text."
        )
    if len(trained) >= 4 and trained[-1] < 0.9 * trained[len(trained) * 3 // 4 - 1]:
        found.append("The KL was still falling when the training ended: pass more `steps`.")
    if trained and trained[-1] > trained[0]:
        found.append("The KL rose during the training: lower `learning_rate`.")
    size, rank = settings.get("projection_size"), settings.get("rank")
    if size is not None and size < rank:
        found.append(
            f"The projections' inner size ({size}) is below the LoRA's rank ({rank}), so a part of the adapter is cut "
            "off: pass a larger `projection_size`, or leave it out."
        )
    if errors and errors[-1] > 0.8 and errors[-1] > 0.9 * errors[0] and covered > 0.5:
        found.append(
            "The predictions come across and the hidden states do not (KL falls, MSE stays): the layers may be paired "
            "badly; lower `beta` or pass a `depth_map`."
        )
    if errors and errors[-1] < 0.5 * errors[0] and covered < 0.3:
        found.append(
            "The hidden states come across and the predictions do not (MSE falls, KL stays): the MSE has the upper "
            "hand; lower `beta`."
        )
    if weak := [role for role, (r2_in, _) in fit_by_role(metrics).items() if r2_in < 0.3]:
        found.append(
            f"The inputs of {', '.join(weak)} are badly explained by the target's activations (held-out R² below "
            "0.3): more `fit_samples` give better maps."
        )
    if unmapped := metrics.get("alignment", {}).get("unmapped"):
        found.append(
            f"{len(unmapped)} adapted modules of the source found no place on the target: "
            f"{list_not_carried(unmapped)}. Where one would fit, name it in `module_map`."
        )
    return found
