"""In words, what a translation's metrics say is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def diagnose(metrics: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> list[str]:
    """One sentence for each thing that limits a translation, most telling first; empty when nothing stands out.

    The limits are rules of thumb from the runs in docs/results.md.

    Args:
        metrics: `TranslationResult.metrics`.
        history: Trainer's log, with `kl` and, where they were trained on, `mse` and `kl_anchor`.
    """
    found: list[str] = []
    kl, settings = metrics["kl"], metrics["settings"]
    trained = [entry["kl"] for entry in history if "kl" in entry]
    errors = [entry["mse"] for entry in history if "mse" in entry]
    covered = 1 - kl["translated"] / kl["target"] if kl["target"] > 0 else 1.0
    found += filter(None, (metrics.get(part, {}).get("stopped") for part in ("refinement", "on_policy")))
    if metrics["excitement"] < 0.05:
        found.append(
            f"The text hardly excites the adapter (it changes the source's predictions by {metrics['excitement']:.3f} nats "
            "per position), so there is little to learn from: pass `text=SelfWritten(prompts=[...])` with a dozen prompts "
            "of the kind it answers."
        )
    source = metrics.get("source", {})
    if source.get("not_carried"):
        found.append(
            f"No kernel expresses these parts of the adapter: {list_not_carried(source['not_carried'])}. The teacher has them, "
            "so that the refinement imitates them as far as the other parts' kernels can: judge the result on your task."
        )
    if covered >= 0.9:
        return found
    errors_of_kernels = source.get("converted", {}).values()
    if errors_of_kernels and sum(errors_of_kernels) / len(errors_of_kernels) > 0.3:
        found.append(
            f"Kernels of rank {source['rank']} approximate the adapter's weight changes badly (mean relative error "
            f"{sum(errors_of_kernels) / len(errors_of_kernels):.2f}): pass a larger `source_rank`."
        )
    if settings["steps"] == 0:
        found.append("Only the closed form was fitted, which moves little across model families: pass `steps`.")
    # At another temperature the logged KL is in other units than the one on held-out text.
    comparable = settings.get("loss", {}).get("temperature", 1.0) == 1.0
    reached = kl.get("refined", kl["translated"])  # on text like the one it trained on
    if trained and comparable and reached > 1.5 * trained[-1] and reached - trained[-1] > 0.05:
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
            "The hidden states come across and the predictions do not (MSE falls, KL stays): the MSE has the upper hand; "
            "lower `beta`."
        )
    weak = _weak_inputs(metrics)
    if weak:
        found.append(
            f"The inputs of {', '.join(weak)} are badly explained by the target's activations (held-out R² below 0.3): "
            "more `fit_samples` give better maps."
        )
    unmapped = metrics.get("alignment", {}).get("unmapped", ())
    if unmapped:
        found.append(
            f"{len(unmapped)} adapted modules of the source found no place on the target: {list_not_carried(unmapped)}. Where "
            "one would fit, name it in `module_map`."
        )
    return found


def list_not_carried(parts: Sequence[Mapping[str, str]]) -> str:
    """`"trained bias (model.layers.0.q_proj and 5 more), ..."`"""
    by_kind: dict[str, list[str]] = {}
    for part in parts:
        by_kind.setdefault(part["what"], []).append(part["module"])
    more = {what: f" and {len(names) - 1} more" if len(names) > 1 else "" for what, names in by_kind.items()}
    return ", ".join(f"{what} ({names[0]}{more[what]})" for what, names in by_kind.items())


def _weak_inputs(metrics: Mapping[str, Any]) -> list[str]:
    """Roles (last parts of module names) whose mean held-out R² of P_in is below 0.3."""
    by_role: dict[str, list[float]] = {}
    for name, fits in metrics.get("closed_form", {}).get("modules", {}).items():
        by_role.setdefault(name.rsplit(".", 1)[-1], []).extend(fit["r2_in"] for fit in fits)
    return [role for role, values in by_role.items() if sum(values) / len(values) < 0.3]
