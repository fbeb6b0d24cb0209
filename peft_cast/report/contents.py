"""What stands in a report, from a translation's metrics: numbers as text, figures, and nothing where there is no data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ..diagnosis import diagnose
from .figures import colour_scale, curve, heat_map
from .redact import redact, redact_pieces


if TYPE_CHECKING:
    from ..evaluation import Evaluation

# Nats at which a piece of text is marked weakly, clearly and strongly.
LEVELS = (0.1, 0.5, 2.0)
NAMES = {
    "target": "untouched target", "closed_form": "closed form", "start": "where it began",
    "refined": "before its own words", "translated": "translated",
    "kl": "KL on the training text", "own": "KL on its own answers", "kl_anchor": "KL on the anchors", "mse": "MSE of hidden states",
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """The parts of a report; those without data are empty. Strings are plain text, neither HTML nor markdown, but `Markup`.

    Args:
        models: `source`, `adapter` and `target`, as far as they are known.
        verdict: The one line.
        advice: What limits the translation and what to do, a sentence each; `None` where the metrics do not say.
        facts: Name and value of the few numbers that matter most.
        kl: Name, nats as text, and share of the largest, from 0 to 1.
        tasks: The table of an evaluation, its first row the heads.
        samples: `prompt`, `untouched`, `translated`, `text` of each.
        excitement: `most` and `least`, lists of quotes: `mean`, `before`, `marked` (pairs of level 0 to 3 and text), `cut`.
        by_text: Nats per position of each held-out text, most exciting first.
        curves: Name, figure, and whether the KL on held-out text is drawn in.
        similarity: Figure and legend.
        positions: At how many positions the layers were compared.
        fit: Name and figure of the maps' R².
        fit_scale: Their legend.
        landing: Role, source, target, what it was found by, kernels.
        unplaced: Reason and modules, of what has no place on the target.
        not_carried: Likewise, of what no kernel expresses.
        costs: The table of the phases, its first row the heads.
        settings: Title and name–value pairs.
    """

    models: Mapping[str, str]
    verdict: str
    advice: Sequence[str] | None
    facts: Sequence[tuple[str, str]]
    kl: Sequence[tuple[str, str, float]]
    tasks: Sequence[Sequence[str]]
    samples: Sequence[Mapping[str, str]]
    excitement: Mapping[str, Sequence[Mapping[str, Any]]]
    by_text: Sequence[float]
    curves: Sequence[tuple[str, Markup, bool]]
    similarity: tuple[Markup, Markup] | None
    positions: int
    fit: Sequence[tuple[str, Markup]]
    fit_scale: Markup | None
    landing: Sequence[Sequence[str]]
    unplaced: Sequence[tuple[str, Sequence[str]]]
    not_carried: Sequence[tuple[str, Sequence[str]]]
    costs: Sequence[Sequence[str]]
    settings: Sequence[tuple[str, Sequence[tuple[str, str]]]]

    @property
    def title(self) -> str:
        adapter, source, target = (_last(self.models.get(name)) for name in ("adapter", "source", "target"))
        if source and target:
            return f"{adapter or 'LoRA'}: {source} → {target}"
        return "Translation of a LoRA"


def contents(
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, float]] = (),
    evaluation: Evaluation | None = None,
    models: Mapping[str, str] | None = None,
) -> Contents:
    """Make the contents of a report.

    Args:
        metrics: `TranslationResult.metrics`; older ones lack parts.
        history: Trainer's log.
        evaluation: What `evaluate` measured of the adapter.
        models: `source`, `adapter`, `target`, where the metrics do not name them.
    """
    metrics, history = redact(metrics), redact(list(history))
    gathered = metrics.get("report", {})
    alignment, source = metrics.get("alignment", {}), metrics.get("source", {})
    excitement = gathered.get("excitement", {})
    advice = diagnose(metrics, history) if {"kl", "excitement", "settings"} <= metrics.keys() else None
    similarity = gathered.get("layer_similarity", {})
    fit, fit_scale = _fit(metrics.get("closed_form", {}).get("modules", {}))
    return Contents(
        models={name: name_ for name, name_ in {**redact(models or {}), **gathered.get("models", {})}.items() if name_},
        verdict=verdict(metrics, evaluation),
        advice=advice,
        facts=_facts(metrics, evaluation),
        kl=_bars(metrics.get("kl", {})),
        tasks=_tasks(evaluation) if evaluation else (),
        samples=gathered.get("samples", ()),
        excitement={
            end: [_marked(quote) for quote in excitement[end]] for end in ("most", "least") if excitement.get(end)
        },
        by_text=sorted(excitement.get("by_text", ()), reverse=True),
        curves=_curves(history, metrics),
        similarity=_similarity(similarity["cka"], alignment.get("depth_map", {})) if similarity else None,
        positions=similarity.get("positions", 0),
        fit=fit,
        fit_scale=fit_scale,
        landing=[
            (r["role"] or "?", r["source"], r["target"], r["found"].replace("_", " "), str(r["kernels"]))
            for r in alignment.get("routes", ())
        ],
        unplaced=_by_reason(alignment.get("unmapped", ())),
        not_carried=_by_reason(source.get("not_carried", ())),
        costs=_costs(metrics.get("phases", {})),
        settings=_settings(metrics, gathered),
    )  # fmt: skip


def verdict(metrics: Mapping[str, Any], evaluation: Evaluation | None = None) -> str:
    """In one line, how much of the adapter came across."""
    kl = metrics.get("kl", {})
    covered, lift = way_covered(kl), _lift(evaluation)
    if covered is None:
        said = "The metrics do not say how far the translation went."
    elif not math.isfinite(kl["target"] + kl["translated"]):
        said = "The KL on held-out text is not a finite number, so the translation failed: lower `learning_rate`."
    elif kl["target"] <= 0:
        said = "The untouched target already predicts what the adapted source does: there was nothing to translate."
    else:
        limits = (
            (0.9, "Nearly all of it came across"),
            (0.6, "Most of it came across"),
            (0.25, "A part of it came across"),
        )
        word = next((words for limit, words in limits if covered >= limit), "Little of it came across")
        if covered < 0:
            word = "The translation led away from the adapted source"
        said = (
            f"{word}: on held-out text the target covers {covered:.0%} of the way to the adapted source "
            f"(KL {kl['target']:.3f} → {kl['translated']:.3f} nats)."
        )
    tasks = " and ".join(f"{value:.2f} of the lift on {task}" for task, value in lift.items())
    return f"{said} It recovers {tasks}." if lift else said


def way_covered(kl: Mapping[str, float]) -> float | None:
    """Share of the KL between untouched target and teacher that is gone; NaN if there was none, `None` if not measured."""
    if not {"target", "translated"} <= kl.keys():
        return None
    return 1 - kl["translated"] / kl["target"] if kl["target"] > 0 else math.nan


def _lift(evaluation: Evaluation | None) -> dict[str, float]:
    """Mean recovered lift by task of the translated adapter: the one of that name, else the only one there is."""
    if evaluation is None:
        return {}
    others = dict.fromkeys(m.adapter for m in evaluation.measurements if m.adapter != "base")
    names = [name for name in others if name not in evaluation.retrained.values()]
    name = "translated" if "translated" in names else names[0] if len(names) == 1 else None
    lifts = {row.task: row.lift for row in evaluation.rows if row.adapter == name and row.lift}
    return {redact(task): sum(values) / len(values) for task, values in lifts.items()}


def _facts(metrics: Mapping[str, Any], evaluation: Evaluation | None) -> list[tuple[str, str]]:
    facts = [(f"recovered lift, {task}", f"{value:.2f}") for task, value in _lift(evaluation).items()]
    covered = way_covered(metrics.get("kl", {}))
    if covered is not None and math.isfinite(covered):
        facts.append(("way covered", f"{covered:.0%}"))
    if "excitement" in metrics:
        facts.append(("excitement, nats per position", f"{metrics['excitement']:.3f}"))
    if "parameters" in metrics:
        facts.append(("trained parameters", f"{metrics['parameters']['trained']:,}"))
        facts.append(("parameters of the source LoRA", f"{metrics['parameters']['source_lora']:,}"))
    if "phases" in metrics:
        facts.append(("seconds in all", f"{sum(cost['seconds'] for cost in metrics['phases'].values()):.0f}"))
    return facts


def _bars(kl: Mapping[str, float]) -> list[tuple[str, str, float]]:
    largest = max((value for value in kl.values() if math.isfinite(value)), default=0.0)
    return [
        (NAMES.get(name, name), f"{value:.4f}", max(value, 0.0) / largest if largest and math.isfinite(value) else 0.0)
        for name, value in kl.items()
    ]


def _tasks(evaluation: Evaluation) -> list[list[str]]:
    """Adapters down, tasks across, with a column for recovered lift where there is one."""
    rows = evaluation.rows
    columns: dict[tuple[str, str], str] = {}
    for row in rows:
        columns[row.task, "score"] = (
            row.task if row.task == "drift" else f"{row.task} ({row.metric.replace('_', ' ')})"
        )
        if row.lift:
            columns[row.task, "lift"] = "recovered lift"
    cells = {(row.adapter, row.task, kind): getattr(row, f"{kind}_text") for row in rows for kind in ("score", "lift")}
    table = [["", *columns.values()]]
    for adapter in dict.fromkeys(row.adapter for row in rows):
        table.append([adapter, *(cells.get((adapter, *column), "") for column in columns)])
    return redact(table)


def _marked(quote: Mapping[str, Any]) -> dict[str, Any]:
    """A quote with the level of each piece; neighbours of one level are one piece."""
    before, *pieces = redact_pieces([quote["before"], *quote["pieces"]])
    marked: list[tuple[int, str]] = []
    for piece, nats in zip(pieces, quote["nats"]):
        level = sum(nats >= limit for limit in LEVELS)
        if marked and marked[-1][0] == level:
            piece = marked.pop()[1] + piece
        marked.append((level, piece))
    return {**quote, "before": before, "marked": marked}


def _curves(history: Sequence[Mapping[str, float]], metrics: Mapping[str, Any]) -> list[tuple[str, Markup, bool]]:
    # At another temperature the logged KL is in other units than the one on held-out text.
    comparable = metrics.get("settings", {}).get("loss", {}).get("temperature", 1.0) == 1.0
    held_out = metrics.get("kl", {}).get("translated")
    if not comparable or held_out is None or not math.isfinite(held_out):
        held_out = None
    own = metrics.get("on_policy", {}).get("history", ())
    logs = [(NAMES[key], history, key, held_out if key == "kl" else None) for key in ("kl", "kl_anchor", "mse")]
    figures = []
    for name, log, key, level in [*logs, (NAMES["own"], own, "kl", None)]:
        points = [(e["step"], e[key]) for e in log if {key, "step"} <= e.keys() and math.isfinite(e[key])]
        if points:
            text = f"{name}: from {points[0][1]:.3f} to {points[-1][1]:.3f} over {points[-1][0]} steps"
            figures.append((name, curve(points, text, level), level is not None))
    return figures


def _similarity(cka: Sequence[Sequence[float]], depth_map: Mapping[Any, int]) -> tuple[Markup, Markup]:
    flat = [value for row in cka for value in row if math.isfinite(value)]
    scale = (min(flat, default=0.0), max(flat, default=1.0))
    marked = {int(s): int(t) for s, t in depth_map.items() if int(s) < len(cka) and int(t) < len(cka[0])}
    figure = heat_map(
        cka, [str(i) for i in range(len(cka))], [str(j) for j in range(len(cka[0]))], scale,
        name=f"Similarity of {len(cka)} source layers with {len(cka[0])} target layers, the depth map drawn over it",
        axes=("source layer", "target layer"), marked=marked,
    )  # fmt: skip
    return figure, colour_scale(scale, "Similarity")


def _fit(modules: Mapping[str, Sequence[Mapping[str, float]]]) -> tuple[list[tuple[str, Markup]], Markup | None]:
    """Heat maps of the mean R² of the kernels on each target module: layers down, modules across."""
    if not modules:
        return [], None
    places = {name: (_layer(name), _short(name)) for name in modules}
    layers = sorted({layer for layer, _ in places.values()})
    columns = list(dict.fromkeys(column for _, column in places.values()))
    figures = []
    for key, title in (("r2_in", "P_in: inputs"), ("r2_out", "P_out: effects")):
        found = {places[name]: sum(fit[key] for fit in fits) / len(fits) for name, fits in modules.items() if fits}
        values = [[found.get((layer, column)) for column in columns] for layer in layers]
        figure = heat_map(
            values, [str(layer) for layer in layers], columns, (0.0, 1.0), name=f"Held-out R² of {title}, by layer and module",
            axes=("target layer", "module"), numbers=True,
        )  # fmt: skip
        figures.append((title, figure))
    return figures, colour_scale((0.0, 1.0), "Held-out R²")


def _layer(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1].replace("_proj", "")


def _by_reason(parts: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    reasons: dict[str, list[str]] = {}
    for part in parts:
        reasons.setdefault(part["what"], []).append(part["module"])
    return list(reasons.items())


def _costs(phases: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    if not phases:
        return []
    memory = {"peak_memory_mb": "peak memory (GiB)", "peak_device_memory_mb": "on the device (GiB)"}
    memory = {key: head for key, head in memory.items() if any(key in cost for cost in phases.values())}
    table = [["phase", "seconds", *memory.values()]]
    for name, cost in phases.items():
        gib = [f"{cost[key] / 1024:.2f}" if key in cost else "" for key in memory]
        table.append([name.replace("_", " "), f"{cost['seconds']:.1f}", *gib])
    return table


def _settings(metrics: Mapping[str, Any], gathered: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    tables = {
        "Arguments": gathered.get("arguments", {}),
        "Settings of the run": metrics.get("settings", {}),
        "Text": metrics.get("text", {}),
        "Machine and versions": gathered.get("environment", {}),
    }
    return [(title, list(_flat(values))) for title, values in tables.items() if values]


def _flat(values: Mapping[str, Any], before: str = ""):
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", "not given" if value is None else str(value)


def with_code(text: str) -> list[tuple[str, bool]]:
    """A sentence in parts, each with whether it is an expression in backticks, which it keeps.

    Expressions as our advice has them: others' names in it may bring backticks around anything.
    """
    return [(part, i % 2 == 1) for i, part in enumerate(re.split(r"(`[\w.,=()\[\]'\" ]+`)", text))]


def _last(name: str | None) -> str:
    return str(name).rstrip("/").rsplit("/", 1)[-1] if name else ""
