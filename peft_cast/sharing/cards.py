"""Model cards: what a published adapter, folded LoRA or bridge says of itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from ..diagnosis import list_not_carried
from ..environment import environment
from .artifacts import Artifact, Origin
from .licences import ROLES, Licence, Licences


TEMPLATE = Path(__file__).parent / "card.md"
# Whoever deletes this line keeps the card: it is not written again.
MARK = "<!-- Written by peft-cast. Delete this line to keep your own changes when the adapter is saved or pushed again. -->"
_INHERITED = "which the metadata of"
HERE = "path or hub id of this"
_TAGS = {
    "cast": ["cast", "lora-translation", "transformers"],
    "lora": ["cast", "lora", "lora-translation", "transformers"],
    "bridge": ["bridge", "cast", "lora-translation", "peft"],
}
_TAG_NAMES = {"source": "source_model", "adapter": "source_adapter", "target": "target_model"}
_VERSIONS = ("peft-cast", "peft", "transformers", "torch")
_KL_LABELS = {
    "target": "untouched target",
    "closed_form": "closed form alone",
    "start": "where it began",
    "refined": "before its own words",
    "translated": "this adapter",
}


def make_card(
    artifact: Artifact, licences: Licences, repo_id: str | None = None, stated: Licence | None = None
) -> ModelCard:
    """The card of an artifact.

    Args:
        artifact: What it is and where it comes from.
        licences: Of what it comes from.
        repo_id (`str`, *optional*): Where it is published, for the example; a placeholder when `None`.
        stated (`Licence`, *optional*): The licence that its publisher chose, which goes before an inherited one.
    """
    target, source = artifact.origins["target"], artifact.origins["source"]
    adapter = artifact.origins.get("adapter", Origin(None))
    licence = stated or licences.inherited
    results = list(_eval_results(artifact))
    title = _title(artifact)
    data = ModelCardData(
        base_model=[target.hub_id] if target.hub_id and artifact.kind != "bridge" else None,
        base_model_relation="adapter" if target.hub_id and artifact.kind != "bridge" else None,
        source_model=source.hub_id,
        source_adapter=adapter.hub_id,
        target_model=target.hub_id if artifact.kind == "bridge" else None,
        library_name="peft-cast" if artifact.kind == "bridge" else "peft",
        pipeline_tag="text-generation" if artifact.kind != "bridge" else None,
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        tags=sorted(_tags(artifact)),
        eval_results=results or None,
        model_name=title if results else None,
    )
    metrics, folded = artifact.report.get("metrics", {}), artifact.report.get("folded")
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        mark=MARK,
        inherited=_INHERITED,
        kind=artifact.kind,
        title=title,
        here=repo_id or f"{HERE} {'bridge' if artifact.kind == 'bridge' else 'adapter'}",
        base=target.hub_id or f"path of {target.label}",
        revision=target.revision,
        target=_named(target),
        source=_named(source),
        adapter=_named(adapter),
        origins=[(ROLES[role], _named(o), str(licences.by_role[role])) for role, o in artifact.origins.items()],
        licence=str(licence) if licence.known else None,
        stated=stated is not None,
        licence_warning=licences.warning,
        roles="both models" if artifact.kind == "bridge" else "both models and the source adapter",
        metrics=metrics,
        distances=[(label, metrics["kl"][key]) for key, label in _KL_LABELS.items() if key in metrics.get("kl", {})],
        covered=_covered(metrics),
        not_carried=list_not_carried(metrics.get("source", {}).get("not_carried", ())),
        cut=_largest_error(artifact),
        rank=folded["rank"] if folded else None,
        evaluation=artifact.report.get("evaluation"),
        versions={name: found for name, found in environment()["versions"].items() if name in _VERSIONS},
    )


def write_card(folder: str | Path, artifact: Artifact, licences: Licences, repo_id: str | None = None) -> bool:
    """Write the README.md of a saved folder, unless it has one that somebody wrote or changed.

    Tags and entries that PEFT, or a model's own `model_tags`, put into the metadata are kept, and so is a `license:` that
    somebody wrote there.

    Returns:
        `bool`: Whether the card was written.
    """
    file = Path(folder) / "README.md"
    if file.exists() and not is_generated(file):
        return False
    known = (metadata_load(file) or {}) if file.exists() else {}
    card = make_card(artifact, licences, repo_id, _stated(known, file))
    if known:
        made = ("base_model", *_TAG_NAMES.values())
        own_tags = {tag for tag in known.get("tags") or () if str(tag).partition(":")[0] not in made}
        card.data["tags"] = sorted(own_tags | set(card.data["tags"]))
        for key, value in known.items():
            if key not in _OWN_KEYS:
                card.data[key] = value
    partial = file.with_suffix(".partial")
    card.save(partial)
    partial.replace(file)
    return True


def _stated(metadata: Mapping[str, Any], file: Path) -> Licence | None:
    """The licence in a generated card's metadata, if its text does not say that it was inherited."""
    licence = Licence.of(metadata)
    if licence.id is None or f"Licence: {licence}, {_INHERITED}" in file.read_text(encoding="utf-8-sig"):
        return None
    return licence


# Metadata that is made anew with every card: left alone, an old licence or score would outlive its reason.
_OWN_KEYS = {
    "base_model", "base_model_relation", "source_model", "source_adapter", "target_model", "library_name", "pipeline_tag",
    "license", "license_name", "license_link", "tags", "model-index",
}  # fmt: skip


def is_generated(file: Path) -> bool:
    """Whether a README.md is ours or the empty form that PEFT writes, in which nobody has filled anything in."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        metadata_load(file)
    except (ValueError, yaml.YAMLError):
        return False
    if MARK in text:
        return True
    body = re.sub(r"\A---\n.*?\n---\n", "", text.replace("\r\n", "\n"), flags=re.DOTALL).strip()
    form = _empty_form()
    return body.startswith(form) and all(_OF_PEFT.fullmatch(line) for line in body[len(form) :].splitlines())


# What PEFT adds to the form: versions, and how the base was quantised.
_OF_PEFT = re.compile(r"|- .*|#+ (Framework versions|Training procedure)|The following `bitsandbytes` .*:")


@cache
def _empty_form() -> str:
    return ModelCard.from_template(ModelCardData()).text.strip()


def _title(artifact: Artifact) -> str:
    source, target = (artifact.origins[role].label for role in ("source", "target"))
    if artifact.kind == "bridge":
        return f"Bridge from {source} to {target}"
    adapter = artifact.origins["adapter"]
    return f"{adapter.label if adapter.name else 'LoRA'} of {source} for {target}"


def _tags(artifact: Artifact) -> Iterator[str]:
    yield from _TAGS[artifact.kind]
    for role, origin in artifact.origins.items():
        if origin.hub_id and role == "target" and artifact.kind != "bridge":
            yield f"base_model:adapter:{origin.hub_id}"
        elif origin.hub_id:
            yield f"{_TAG_NAMES[role]}:{origin.hub_id}"


def _named(origin: Origin) -> str:
    """The name in markdown: a link for what is on the Hub, the bare name for a folder."""
    if origin.hub_id is None:
        return f"`{origin.label}` (not on the Hub)" if origin.name else "not recorded"
    revision = f" at `{origin.revision}`" if origin.revision else ""
    return f"[`{origin.hub_id}`](https://huggingface.co/{origin.hub_id}){revision}"


def _covered(metrics: Mapping[str, Any]) -> float | None:
    """The share of the distance to the teacher that the translation covered."""
    kl = metrics.get("kl", {})
    return 1 - kl["translated"] / kl["target"] if kl.get("target", 0) > 0 else None


def _largest_error(artifact: Artifact) -> float:
    return max(artifact.report.get("folded", {}).get("errors", {}).values(), default=0.0)


def _eval_results(artifact: Artifact) -> Iterator[EvalResult]:
    """Scores for the Hub's model index. What was measured before ranks were cut is not the published LoRA's."""
    metrics = artifact.report.get("metrics", {})
    if "kl" in metrics and not _largest_error(artifact):
        where = ("held-out-texts", "Held-out texts of the translation")
        yield from _result(
            where, "kl_divergence", "KL from the adapted source model (nats)", metrics["kl"]["translated"]
        )
        yield from _result(where, "way_covered", "Share of the untouched target's KL that is gone", _covered(metrics))
    for row in artifact.report.get("evaluation", {}).get("rows", ()):
        where = (re.sub(r"[^\w.-]+", "-", row["task"]), row["task"])
        yield from _result(where, row["metric"], row["metric"].replace("_", " "), mean(row["scores"]))
        yield from _result(where, "recovered_lift", "Recovered lift", mean(row["lift"]) if row["lift"] else None)


def _result(where: tuple[str, str], metric: str, name: str, value: float | None) -> Iterator[EvalResult]:
    if value is not None and math.isfinite(value):
        yield EvalResult(
            task_type="text-generation", dataset_type=where[0], dataset_name=where[1],
            metric_type=metric, metric_name=name, metric_value=round(value, 6),
        )  # fmt: skip
