"""What stands in a report, from a translation's metrics: numbers as text, figures, and nothing where there is no
data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from ...source import by_reason, list_not_carried
from ...tuner.checks import number_of
from ..diagnosis import KL_NAMES, diagnose, fit_by_role, way_covered
from ..paired import PAIRED_COLUMNS
from ..rows import Evaluation
from ..settings import flat, is_comparable
from .figures import color_scale, curve, heat_map
from .redact import redact, redact_pieces


# Nats at which a piece of text is marked weakly, clearly and strongly.
LEVELS = (0.1, 0.5, 2.0)
NAMES = {
    "kl": "KL on the training text",
    "own": "KL on its own answers",
    "kl_anchor": "KL on the anchors",
    "mse": "MSE of hidden states",
}


@dataclass(frozen=True)
class Contents:
    """The parts of a report; those without data are empty. Strings are plain text, neither HTML nor markdown, but
    `Markup`. The first row of a table is its heads.
    """

    models: Mapping[str, str]  # `source`, `adapter` and `target`, as far as they are known
    verdict: str  # the one line
    advice: Sequence[str] | None  # what limits it and what to do, sentences; `None` where the metrics do not say
    facts: Sequence[tuple[str, str]]  # name and value of the few numbers that matter most
    remarks: Sequence[str]  # of the route, its own words and the source adapter, for the summary
    kl: Sequence[tuple[str, str, float]]  # name, nats, and share of the largest, from 0 to 1
    tasks: Sequence[Sequence[str]]  # the table of an evaluation
    paired: Sequence[Sequence[str]]  # the adapters beside the untouched target, item by item
    samples: Sequence[Mapping[str, str]]  # `prompt`, `untouched`, `translated`, `text` of each
    # `most` and `least`, lists of quotes: `mean`, `before`, `marked` (pairs of level 0 to 3 and text), `cut`
    excitement: Mapping[str, Sequence[Mapping[str, Any]]]
    by_text: Sequence[float]  # nats per position of each held-out text, most exciting first
    curves: Sequence[tuple[str, Markup, bool]]  # name, figure, and whether the KL on held-out text is drawn in
    similarity: tuple[Markup, Markup, int] | None  # figure, legend, and at how many positions layers were compared
    fit: Sequence[tuple[str, Markup]]  # name and figure of the maps' R²
    fit_scale: Markup  # their legend
    roles: Sequence[Sequence[str]]  # role and means of R²
    landing: Sequence[Sequence[str]]  # role, source, target, what it was found by, kernels
    left_out: Sequence[tuple[str, Mapping[str, Sequence[str]]]]  # title, and modules by reason
    costs: Sequence[Sequence[str]]  # the table of the phases
    settings: Sequence[tuple[str, Sequence[tuple[str, str]]]]  # title and name–value pairs

    @property
    def title(self) -> str:
        names = (str(self.models.get(name) or "") for name in ("adapter", "source", "target"))
        adapter, source, target = (name.rstrip("/").rsplit("/", 1)[-1] for name in names)
        return f"{adapter or 'LoRA'}: {source} → {target}" if source and target else "Translation of a LoRA"


def contents(
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, float]] = (),
    evaluation: Evaluation | None = None,
    models: Mapping[str, str] | None = None,
) -> Contents:
    """Make the contents of a report of `TranslationResult.metrics`, of which older ones lack parts, of Trainer's log,
    what `evaluate` measured, and the names of `source`, `adapter` and `target`, where the metrics do not have them.
    """
    metrics, history = redact(metrics), redact(list(history))
    gathered, alignment = metrics.get("report", {}), metrics.get("alignment", {})
    excitement, similarity = gathered.get("excitement", {}), gathered.get("layer_similarity")
    named = {**redact(models or {}), **gathered.get("models", {})}
    left_out = {
        "Found no place on the target": by_reason(alignment.get("unmapped", ())),
        "Expressed by no kernel": by_reason(metrics.get("source", {}).get("not_carried", ())),
    }
    settings = {
        "Options": gathered.get("arguments") or metrics.get("settings"),
        "Text": metrics.get("text"),
        "Machine and versions": gathered.get("environment"),
    }
    return Contents(
        models={role: name for role, name in named.items() if name},
        verdict=verdict(metrics, evaluation),
        advice=diagnose(metrics, history) if {"kl", "excitement", "settings"} <= metrics.keys() else None,
        facts=_facts(metrics, evaluation),
        remarks=list(_remarks(metrics)),
        kl=_bars(metrics.get("kl", {})),
        tasks=_tasks(evaluation) if evaluation else (),
        paired=_paired(evaluation),
        samples=gathered.get("samples", ()),
        excitement={
            end: [_marked(quote) for quote in excitement[end]] for end in ("most", "least") if excitement.get(end)
        },
        by_text=sorted(excitement.get("by_text", ()), reverse=True),
        curves=_curves(history, metrics),
        similarity=_similarity(similarity, alignment.get("depth_map", {})) if similarity else None,
        fit=_fit(metrics.get("closed_form", {}).get("modules", {})),
        fit_scale=color_scale((0.0, 1.0), "Held-out R²"),
        roles=[(role, f"{r2_in:.2f}", f"{r2_out:.2f}") for role, (r2_in, r2_out) in fit_by_role(metrics).items()],
        landing=[
            (r["role"] or "?", r["source"], r["target"], r["found"].replace("_", " "), str(r["kernels"]))
            for r in alignment.get("routes", ())
        ],
        left_out=[(title, reasons) for title, reasons in left_out.items() if reasons],
        costs=_costs(metrics.get("phases", {})),
        settings=[(title, list(flat(values))) for title, values in settings.items() if values],
    )


def verdict(metrics: Mapping[str, Any], evaluation: Evaluation | None = None) -> str:
    """In one line, how much of the adapter came across."""
    kl, lift = metrics.get("kl", {}), _lift(evaluation)
    covered = way_covered(kl)
    if not {"target", "translated"} <= kl.keys():
        said = "The metrics do not say how far the translation went."
    elif not math.isfinite(kl["target"] + kl["translated"]):
        said = "The KL on held-out text is not a finite number, so the translation failed: lower `learning_rate`."
    elif covered is None:
        said = "The untouched target already predicts what the adapted source does: there was nothing to translate."
    else:
        parts = {0.9: "Nearly all of it", 0.6: "Most of it", 0.25: "A part of it", 0.0: "Little of it"}
        part = next((part for least, part in parts.items() if covered >= least), None)
        word = f"{part} came across" if part else "The translation led away from its teacher"
        shown = metrics.get("text", {}).get("teacher") == "shown"
        teacher = "what it says when it is shown the adapter's answers" if shown else "the adapted source"
        said = (
            f"{word}: on held-out text the target covers {covered:.0%} of the way to {teacher} "
            f"(KL {kl['target']:.3f} → {kl['translated']:.3f} nats)."
        )
    tasks = " and ".join(f"{value:.2f} of the lift on {task}" for task, value in lift.items())
    paired, name = evaluation.paired if evaluation else (), _translated(evaluation)
    flips = [redact(one.sentence) for one in paired if one.adapter == name]
    return " ".join([said, *([f"It recovers {tasks}."] if lift else []), *filter(None, flips)])


def _translated(evaluation: Evaluation | None) -> str | None:
    """The translated adapter: the one of that name, else the only one there is that was not trained on the target."""
    judged = evaluation.judged if evaluation else []
    chosen = [name for name in judged if name == "translated"] or judged
    return chosen[0] if len(chosen) == 1 else None


def _lift(evaluation: Evaluation | None) -> dict[str, float]:
    """Mean recovered lift by task of the translated adapter."""
    name = _translated(evaluation)
    rows = evaluation.of(name) if evaluation and name else []
    return {redact(row.task): row.mean_lift for row in rows if row.mean_lift is not None}


def _paired(evaluation: Evaluation | None) -> list[Sequence[str]]:
    """Adapters beside the untouched target, item by item; nothing where no task says how its items went."""
    rows = [one.cells for one in evaluation.paired] if evaluation else []
    return redact([PAIRED_COLUMNS, *rows]) if rows else []


def _facts(metrics: Mapping[str, Any], evaluation: Evaluation | None) -> list[tuple[str, str]]:
    facts = [(f"recovered lift, {task}", f"{value:.2f}") for task, value in _lift(evaluation).items()]
    if (covered := way_covered(metrics.get("kl", {}))) is not None:
        facts.append(("way covered", f"{covered:.0%}"))
    if "excitement" in metrics:
        facts.append(("excitement, nats per position", f"{metrics['excitement']:.3f}"))
    if "parameters" in metrics:
        facts.append(("trained parameters", f"{metrics['parameters']['trained']:,}"))
        facts.append(("parameters of the source LoRA", f"{metrics['parameters']['source_lora']:,}"))
    if "phases" in metrics:
        facts.append(("seconds in all", f"{sum(cost['seconds'] for cost in metrics['phases'].values()):.0f}"))
    return facts


ROUTES = {
    "copy": "put on the target as it is",
    "closed_form": "mapped by the closed form",
    "bridge": "mapped by a bridge",
    "start": "begun from an earlier translation",
}


TEACHERS = {
    "source": "the adapted source",
    "shown": "the target itself, shown answers of the adapted source",
    "delta": "the target with what the LoRA changes",
}


def _route(route: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[str]:
    """In a line each, what was done and who taught."""
    if (first := route.get("first_maps")) is not None:
        said = ROUTES.get(first, str(first))
        if "copy" in route:
            said += f" (as it is it covers {route['copy']:.0%} of the way on held-out text)"
        yield f"Route: the LoRA {said}, then {'refined' if route['refined'] else 'left as it was'}"
    if route.get("strength", 1.0) != 1.0:
        strengths = route["strengths"]
        yield (
            f"Strength: it acts at {route['strength']:g} of the strength it was given, where it covers "
            f"{strengths[str(route['strength'])]:.0%} of the way to the teacher, not {strengths['1.0']:.0%}"
        )
    survey = text.get("survey", {})
    counts = {"example": survey.get("examples", 0), "template": len(survey.get("templates", []))}
    first = [number_of(count, noun) for noun, count in counts.items() if count]
    first += [f"dataset {name!r}" for name in survey.get("datasets", [])]
    if first:
        yield f"Asked first, by the adapter's card: {', '.join(first)}"
    for number, found in enumerate(survey.get("forms", []), start=1):
        yield f"Asked ({number}): {found['form']!r}, in which the adapter acts {found['acts']:.2f}"
    if not survey.get("trusted", True):
        yield "Asked: the adapter hardly acts on any of it; give one to three prompts of its kind"
    if (teacher := text.get("teacher")) is not None:
        said = TEACHERS.get(str(teacher), f"a mixture of share {teacher}")
        if minds := text.get("minds"):
            said += (
                f" (on {number_of(minds['prompts'], 'prompt')} the adapted source minds the target's answers by "
                f"{minds['source']:.3f} nats per character, the target the source's by {minds['target']:.3f}; "
                f"standard error of the difference {minds['error']:.3f})"
            )
        yield f"Teacher: {said}"


def _remarks(metrics: Mapping[str, Any]) -> Iterator[str]:
    yield from _route(metrics.get("route", {}), metrics.get("text", {}))
    if own := metrics.get("on_policy"):
        before, after = own["kl"]["before"], own["kl"]["after"]
        yield f"KL on its own answers to {number_of(own['texts'], 'prompt')} {before:.4f}, then {after:.4f}"
    source = metrics.get("source", {})
    if {"type", "rank"} <= source.keys():
        said = [f"Source adapter {source['type']}, kernels of rank {source['rank']}"]
        if errors := source.get("converted", {}).values():
            said.append(f"{len(errors)} weight changes approximated, mean relative error {fmean(errors):.2g}")
        if source.get("not_carried"):
            said.append(f"not carried over: {list_not_carried(source['not_carried'])}")
        yield "; ".join(said)


def _bars(kl: Mapping[str, float]) -> list[tuple[str, str, float]]:
    largest = max((value for value in kl.values() if math.isfinite(value)), default=0.0)
    return [
        (
            KL_NAMES.get(name, name),
            f"{value:.4f}",
            max(value, 0.0) / largest if largest and math.isfinite(value) else 0.0,
        )
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
    """A quote with the level of each piece; neighbors of one level are one piece."""
    before, *pieces = redact_pieces([quote["before"], *quote["pieces"]])
    marked: list[tuple[int, str]] = []
    for piece, nats in zip(pieces, quote["nats"]):
        level = sum(nats >= limit for limit in LEVELS)
        if marked and marked[-1][0] == level:
            piece = marked.pop()[1] + piece
        marked.append((level, piece))
    return {**quote, "before": before, "marked": marked}


def _curves(history: Sequence[Mapping[str, float]], metrics: Mapping[str, Any]) -> list[tuple[str, Markup, bool]]:
    held_out = metrics.get("kl", {}).get("translated", math.nan)
    if not is_comparable(metrics) or not math.isfinite(held_out):
        held_out = None
    own = metrics.get("on_policy", {}).get("history", ())
    logs = [(NAMES[key], history, key, held_out if key == "kl" else None) for key in ("kl", "kl_anchor", "mse")]
    figures = []
    for name, log, key, level in [*logs, (NAMES["own"], own, "kl", None)]:
        points = [(e["step"], e[key]) for e in log if {key, "step"} <= e.keys() and math.isfinite(e[key])]
        if points:
            text = f"{name}: from {points[0][1]:.3f} to {points[-1][1]:.3f} over {number_of(points[-1][0], 'step')}"
            figures.append((name, curve(points, text, level), level is not None))
    return figures


def _similarity(found: Mapping[str, Any], depth_map: Mapping[Any, int]) -> tuple[Markup, Markup, int]:
    cka = found["cka"]
    flat_cka = [value for row in cka for value in row if math.isfinite(value)]
    scale = (min(flat_cka, default=0.0), max(flat_cka, default=1.0))
    rows, columns = ([str(i) for i in range(len(side))] for side in (cka, cka[0]))
    figure = heat_map(
        cka,
        rows,
        columns,
        scale,
        name=f"Similarity of {len(rows)} source layers with {len(columns)} target layers, the depth map drawn over it",
        axes=("source layer", "target layer"),
        marked={int(s): int(t) for s, t in depth_map.items() if int(s) < len(rows) and int(t) < len(columns)},
    )
    return figure, color_scale(scale, "Similarity"), found.get("positions", 0)


def _fit(modules: Mapping[str, Sequence[Mapping[str, float]]]) -> list[tuple[str, Markup]]:
    """Heat maps of the mean R² of the kernels on each target module: layers down, modules across."""
    if not modules:
        return []
    numbers = {name: re.search(r"\.(\d+)\.", name) for name in modules}
    places = {
        name: (int(found[1]) if found else 0, name.rsplit(".", 1)[-1].replace("_proj", ""))
        for name, found in numbers.items()
    }
    layers, columns = (
        sorted({layer for layer, _ in places.values()}),
        list(dict.fromkeys(c for _, c in places.values())),
    )
    figures = []
    for key, title in (("r2_in", "P_in: inputs"), ("r2_out", "P_out: effects")):
        means = {places[name]: fmean(fit[key] for fit in fits) for name, fits in modules.items() if fits}
        figure = heat_map(
            [[means.get((layer, column)) for column in columns] for layer in layers],
            [str(layer) for layer in layers],
            columns,
            (0.0, 1.0),
            name=f"Held-out R² of {title}, by layer and module",
            axes=("target layer", "module"),
            numbers=True,
        )
        figures.append((title, figure))
    return figures


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


def with_code(text: str) -> list[tuple[str, bool]]:
    """A sentence in parts, each with whether it is an expression in backticks, which it keeps.

    Expressions as our advice has them: others' names in it may bring backticks around anything.
    """
    return [(part, i % 2 == 1) for i, part in enumerate(re.split(r"(`[\w.,=()\[\]'\" ]+`)", text))]
