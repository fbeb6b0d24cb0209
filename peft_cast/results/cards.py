"""Model cards: what a published adapter, folded LoRA or bridge says of itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from ..source import list_not_carried
from ..utils import environment, replacing
from .artifacts import Artifact, Origin
from .diagnosis import KL_NAMES, way_covered
from .licenses import ROLES, License, Licenses
from .report.markdown import escaped
from .rows import Row
from .settings import changed_settings


TEMPLATE = Path(__file__).parent / "card.md"
# Whoever deletes this line keeps the card: it is not written again.
MARK = "<!-- Written by peft-cast. Delete this line to keep your own changes when the adapter is saved or pushed "
MARK += "again. -->"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` may be
_INHERITED = "which the metadata of"
_TAGS = {
    "cast": ["cast", "lora-translation", "transformers"],
    "lora": ["cast", "lora", "lora-translation", "transformers"],
    "bridge": ["bridge", "cast", "lora-translation", "peft"],
}
# What PEFT adds to its empty form: versions, and how the base was quantized.
_OF_PEFT = re.compile(r"|- .*|#+ (Framework versions|Training procedure)|The following `bitsandbytes` .*:")


def make_card(
    artifact: Artifact,
    licenses: Licenses,
    repo_id: str | None = None,
    stated: License | None = None,
    before: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The card of an artifact.

    Args:
        artifact: What it is and where it comes from.
        licenses: Of what it comes from.
        repo_id (`str`, *optional*): Where it is published, for the example; a placeholder when `None`.
        stated (`License`, *optional*): The license that its publisher chose, which goes before an inherited one.
        before (`dict`, *optional*): Metadata of the card it replaces; entries and tags that are none of ours stay.
    """
    license, is_bridge = stated or licenses.inherited, artifact.kind == "bridge"
    metrics, before = artifact.report.get("metrics", {}), before or {}
    ids = {role: origin.hub_id for role, origin in artifact.origins.items()}
    base, target = None if is_bridge else ids["target"], artifact.origins["target"]
    named = {
        "source_model": ids["source"],
        "source_adapter": ids.get("adapter"),
        "target_model": ids["target"] if is_bridge else None,
    }
    tags = {*_TAGS[artifact.kind], *(f"{key}:{name}" for key, name in named.items() if name)}
    tags |= {f"base_model:adapter:{base}"} if base else set()
    tags |= {tag for tag in before.get("tags") or () if str(tag).partition(":")[0] not in ("base_model", *named)}
    title, results = _title(artifact), list(_eval_results(artifact))
    # Made anew with every card: left alone, an old license or score would outlive its reason.
    ours: dict[str, Any] = {
        "base_model": [base] if base else None,
        "base_model_relation": "adapter" if base else None,
        **named,
        "library_name": "peft-cast" if is_bridge else "peft",
        "pipeline_tag": None if is_bridge else "text-generation",
        "license": license.id,
        "license_name": license.name,
        "license_link": license.link,
        "tags": sorted(tags),
        "eval_results": results or None,
        "model_name": title if results else None,
    }
    card = ModelCard.from_template(
        ModelCardData(**ours),
        template_path=str(TEMPLATE),
        mark=MARK,
        inherited=_INHERITED,
        title=title,
        artifact=artifact,
        here=repo_id or f"path or hub id of this {'bridge' if is_bridge else 'adapter'}",
        served_rank=next((rank for rank in VLLM_RANKS if rank >= (artifact.beside.get("peft") or 1)), None),
        base=target.hub_id or f"path of {target.label}",
        origins={role: _link(origin) for role, origin in artifact.origins.items()},
        roles=ROLES,
        licenses=licenses,
        license=str(license) if license.known else None,
        stated=stated is not None,
        settings={name: escaped(value) for name, value in changed_settings(metrics).items()},
        metrics=metrics,
        distances={KL_NAMES.get(name, name): nats for name, nats in metrics.get("kl", {}).items()},
        covered=way_covered(metrics.get("kl", {})),
        not_carried=_listed(artifact.not_carried),
        unfolded=_listed(artifact.report.get("folded", {}).get("not_carried", ())),
        versions=environment()["versions"],
    )
    for key, value in before.items():
        if key not in ours and key != "model-index":
            card.data[key] = value
    return card


def write_card(folder: str | Path, artifact: Artifact, licenses: Licenses, repo_id: str | None = None) -> bool:
    """Write the README.md of a saved folder, unless it has one that somebody wrote or changed.

    Tags and entries that PEFT, or a model's own `model_tags`, put into the metadata are kept, and so is a `license:`
    that somebody wrote there. Returns whether the card was written.
    """
    file = Path(folder) / "README.md"
    if file.exists() and not _is_generated(file):
        return False
    before = (metadata_load(file) or {}) if file.exists() else {}
    stated = License.of(before)
    # A generated card says of the license in its metadata whether it was inherited.
    own = stated.id and f"License: {stated}, {_INHERITED}" not in file.read_text(encoding="utf-8-sig")
    with replacing(file) as partial:
        make_card(artifact, licenses, repo_id, stated if own else None, before).save(partial)
    return True


def _is_generated(file: Path) -> bool:
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


@cache
def _empty_form() -> str:
    return ModelCard.from_template(ModelCardData()).text.strip()


def _listed(parts: Sequence[Mapping[str, str]]) -> str:
    """What is not carried over, in markdown. Underscores within words do nothing there."""
    return escaped(list_not_carried(parts)).replace(r"\_", "_")


def _title(artifact: Artifact) -> str:
    source, target = (artifact.origins[role].label for role in ("source", "target"))
    if artifact.kind == "bridge":
        return f"Bridge from {source} to {target}"
    adapter = artifact.origins["adapter"]
    return f"{adapter.label if adapter.name else 'LoRA'} of {source} for {target}"


def _link(origin: Origin) -> str:
    """The name in markdown: a link for what is on the Hub, the bare name for a folder."""
    if origin.hub_id is None:
        return f"`{origin.label}` (not on the Hub)" if origin.name else "not recorded"
    revision = f" at `{origin.revision}`" if origin.revision else ""
    return f"[`{origin.hub_id}`](https://huggingface.co/{origin.hub_id}){revision}"


def _eval_results(artifact: Artifact) -> Iterator[EvalResult]:
    """Scores for the Hub's model index. What was measured before ranks were cut is not the published LoRA's."""
    kl = artifact.report.get("metrics", {}).get("kl")
    scores: list[tuple[str, str, str, float | None]] = []
    if kl and not artifact.largest_error:
        where = "held-out texts"
        scores.append((where, "kl_divergence", "KL from the adapted source model (nats)", kl["translated"]))
        scores.append((where, "way_covered", "Share of the untouched target's KL that is gone", way_covered(kl)))
    for saved in artifact.report.get("evaluation", {}).get("rows", ()):
        row = Row(**{"adapter": "", **saved})  # earlier versions did not save its name
        scores.append((row.task, row.metric, row.metric.replace("_", " "), fmean(row.scores)))
        scores.append((row.task, "recovered_lift", "Recovered lift", row.mean_lift))
    for where, metric, name, value in scores:
        if value is not None and math.isfinite(value):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"[^\w.-]+", "-", where),
                dataset_name=where,
                metric_type=metric,
                metric_name=name,
                metric_value=round(value, 6),
            )
