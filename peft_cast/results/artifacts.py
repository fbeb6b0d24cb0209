"""What a saved folder holds: a CAST adapter, a LoRA folded from one, or a bridge, and where it comes from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..tuner.checks import read_json
from ..utils import METRICS_NAME, as_place, complete_folder, read_json_if_there
from .beside import read_beside


BRIDGE_CONFIG_NAME, BRIDGE_WEIGHTS_NAME = "bridge_config.json", "bridge_model.safetensors"
REPORT_NAME = "cast_report.json"  # quotes texts, so it is never uploaded
_NAMES = {"cast": "adapter", "lora": "LoRA", "bridge": "bridge"}


@dataclass(frozen=True)
class Origin:
    """A model or adapter that an artifact comes from.

    Args:
        name (`str`, *optional*): Its hub id or path; `None` if it had neither (a model in memory).
        revision (`str`, *optional*): Its revision on the Hub.
    """

    name: str | None
    revision: str | None = None

    @property
    def hub_id(self) -> str | None:
        """The name, if it is a hub id and not a folder here."""
        if not self.name or os.path.exists(self.name):
            return None
        try:
            validate_repo_id(self.name)
        except HFValidationError:
            return None
        return self.name

    @property
    def label(self) -> str:
        """The last part of the name: folders elsewhere on this machine are nobody's business."""
        return Path(self.name).name if self.name else "unknown"


@dataclass(frozen=True)
class Artifact:
    """What can be published.

    Args:
        kind (`str`): `"cast"` (an adapter for PEFT with this package), `"lora"` (folded from one) or `"bridge"`.
        origins (`dict[str, Origin]`): `source` and `target`, the models, and `adapter`, which bridges have not.
        report (`dict`): What `cast_metrics.json` holds: `metrics` and `history` of the translation, for a folded LoRA
            `folded`, and `evaluation`; each may be missing. For a bridge its `metrics`.
        beside (`dict`): For a CAST adapter the formats in which the LoRA folded from it lies beside it, with its rank.
        others (`list[str]`): Where there a LoRA lies that was not folded from this adapter as it is.
    """

    kind: Literal["cast", "lora", "bridge"]
    origins: Mapping[str, Origin]
    report: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, int | None] = field(default_factory=dict)
    others: Sequence[str] = ()

    @classmethod
    def of_bridge(cls, config: Mapping[str, Any]) -> Artifact:
        """From what `bridge_config.json` holds."""
        origins = {role: Origin(config[role]["name"], config[role]["revision"]) for role in ("source", "target")}
        return cls("bridge", origins, {"metrics": {**config["metrics"], "modules": len(config["found"])}})

    @classmethod
    def of_adapter(cls, config: Mapping[str, Any], report: Mapping[str, Any]) -> Artifact | None:
        """From what `adapter_config.json` and `cast_metrics.json` hold; `None` if the adapter is not ours."""
        if config["peft_type"] == "CAST":
            return cls("cast", _origins(config), with_not_carried(report, config.get("not_carried")))
        if config["peft_type"] == "LORA" and "folded" in report:
            target = {key: config.get(key) for key in ("base_model_name_or_path", "revision")}
            return cls("lora", _origins({**report["folded"]["origin"], **target}), report)
        return None

    @property
    def not_carried(self) -> list[dict[str, str]]:
        """What of the source adapter no kernel expresses: `module` and `what`."""
        return list(self.report.get("metrics", {}).get("source", {}).get("not_carried", ()))

    @property
    def largest_error(self) -> float:
        """The largest relative error of a module's weight change, where a rank was cut; else 0."""
        return max(self.report.get("folded", {}).get("errors", {}).values(), default=0.0)


def with_not_carried(report: Mapping[str, Any], known: Mapping[str, list[str]] | None) -> dict[str, Any]:
    """A report, in which what is not carried over is that of the configuration, if it does not say itself."""
    metrics = report.get("metrics", {})
    source = {"not_carried": not_carried(known), **metrics.get("source", {})}
    return {**report, "metrics": {**metrics, "source": source}} if known else dict(report)


def not_carried(known: Mapping[str, list[str]] | None) -> list[dict[str, str]]:
    """What a CAST adapter's configuration says of it, by module, as metrics have it."""
    return [{"module": module, "what": what} for what, modules in (known or {}).items() for module in modules]


def _origins(config: Mapping[str, Any]) -> dict[str, Origin]:
    """Source model, source adapter and target of a CAST adapter, from its configuration."""
    source = Origin(config.get("source_model_name_or_path"), config.get("source_model_revision"))
    adapter = Origin(config.get("source_adapter_name_or_path"), config.get("source_adapter_revision"))
    if adapter.name == source.name:  # all that a PeftModel in memory tells is its base model
        adapter = Origin(None)
    target = Origin(config.get("base_model_name_or_path"), config.get("revision"))
    return {"source": source, "adapter": adapter, "target": target}


def read_artifact(folder: str | Path) -> Artifact:
    """What a folder holds.

    Raises:
        ValueError: If it is none of the three, incomplete, or broken; the message says which.
    """
    folder = Path(folder)
    is_bridge, is_adapter = ((folder / name).is_file() for name in (BRIDGE_CONFIG_NAME, CONFIG_NAME))
    if not is_bridge and not is_adapter:
        raise ValueError(
            f"'{folder}' holds neither a CAST adapter, nor a folded LoRA, nor a bridge ({CONFIG_NAME} or "
            f"{BRIDGE_CONFIG_NAME} is missing): pass a folder that `save_pretrained` wrote, for an adapter of "
            "another name than 'default' its subfolder of that name."
        )
    try:
        config = read_json(folder / (BRIDGE_CONFIG_NAME if is_bridge else CONFIG_NAME))
        artifact = Artifact.of_bridge(config) if is_bridge else Artifact.of_adapter(config, read_metrics(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"A configuration file in '{folder}' is broken ({type(error).__name__}: {error}): save it again."
        ) from error
    if artifact is None:
        raise ValueError(
            f"'{folder}' holds an adapter of type {config['peft_type']} that peft-cast did not translate: publish it "
            "with PEFT's own `push_to_hub`, or pass the folder of a CAST adapter or of a LoRA that `to_lora` folded."
        )
    weights = BRIDGE_WEIGHTS_NAME if is_bridge else SAFETENSORS_WEIGHTS_NAME
    if not (folder / weights).is_file():
        raise ValueError(f"'{folder}' has no {weights}: save the {_NAMES[artifact.kind]} again.")
    if artifact.kind == "cast":
        beside, others = read_beside(folder)
        return replace(artifact, beside=beside, others=others)
    return artifact


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `cast_metrics.json` holds, in which numbers may be NaN; nothing if it is not there."""
    file = folder / METRICS_NAME
    found = read_json_if_there(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{METRICS_NAME} holds no JSON object")
    return found


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """`complete_folder`, with the cards that are there, which may be somebody's own."""
    folder = as_place(folder)
    with complete_folder(folder) as partial:
        for card in (*folder.glob("README.md"), *folder.glob("*/README.md")):
            kept = partial / card.relative_to(folder)
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(card, kept)
        yield partial
