"""What a saved folder holds: a CAST adapter, a LoRA folded from one, or a bridge, and where it comes from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..files import complete_folder, write_json


if TYPE_CHECKING:
    from ..evaluation import Evaluation

BRIDGE_CONFIG_NAME, BRIDGE_WEIGHTS_NAME = "bridge_config.json", "bridge_model.safetensors"
METRICS_NAME = "cast_metrics.json"
REPORT_NAME = "cast_report.json"  # quotes texts, so it is never uploaded


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
        if not self.name or Path(self.name).exists():
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
    """

    kind: Literal["cast", "lora", "bridge"]
    origins: Mapping[str, Origin]
    report: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_bridge(cls, config: Mapping[str, Any]) -> Artifact:
        """From what `bridge_config.json` holds."""
        origins = {role: Origin(config[role]["name"], config[role]["revision"]) for role in ("source", "target")}
        return cls("bridge", origins, {"metrics": {**config["metrics"], "modules": len(config["found"])}})


def origins_of(config: Mapping[str, Any]) -> dict[str, Origin]:
    """Source model, source adapter and target of a CAST adapter, from its configuration."""
    source = Origin(config.get("source_model_name_or_path"), config.get("source_model_revision"))
    adapter = Origin(config.get("source_adapter_name_or_path"), config.get("source_adapter_revision"))
    if adapter.name == source.name:  # all that a PeftModel in memory tells is its base model
        adapter = Origin(None)
    return {
        "source": source,
        "adapter": adapter,
        "target": Origin(config.get("base_model_name_or_path"), config.get("revision")),
    }


def read_artifact(folder: str | Path) -> Artifact:
    """What a folder holds.

    Raises:
        ValueError: If it is none of the three, incomplete, or broken; the message says which.
    """
    folder = Path(folder)
    try:
        if (folder / BRIDGE_CONFIG_NAME).is_file():
            artifact, weights = Artifact.of_bridge(_read_json(folder / BRIDGE_CONFIG_NAME)), BRIDGE_WEIGHTS_NAME
        elif (folder / CONFIG_NAME).is_file():
            artifact, weights = _read_adapter(folder), SAFETENSORS_WEIGHTS_NAME
        else:
            raise ValueError(
                f"'{folder}' holds neither a CAST adapter, nor a folded LoRA, nor a bridge ({CONFIG_NAME} or "
                f"{BRIDGE_CONFIG_NAME} is missing): pass a folder that `save_pretrained` wrote, for an adapter of another name than "
                "'default' its subfolder of that name."
            )
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"A configuration file in '{folder}' is broken ({type(error).__name__}: {error}): save it again."
        ) from error
    if not (folder / weights).is_file():
        raise ValueError(f"'{folder}' has no {weights}: save the {_NAMES[artifact.kind]} again.")
    return artifact


_NAMES = {"cast": "adapter", "lora": "LoRA", "bridge": "bridge"}


def _read_adapter(folder: Path) -> Artifact:
    config = _read_json(folder / CONFIG_NAME)
    report = _read_json(folder / METRICS_NAME) if (folder / METRICS_NAME).is_file() else {}
    if config["peft_type"] == "CAST":
        return Artifact("cast", origins_of(config), report)
    if config["peft_type"] != "LORA" or "folded" not in report:
        raise ValueError(
            f"'{folder}' holds an adapter of type {config['peft_type']} that peft-cast did not translate: publish it with "
            "PEFT's own `push_to_hub`, or pass the folder of a CAST adapter or of a LoRA that `to_lora` folded."
        )
    target = {"base_model_name_or_path": config["base_model_name_or_path"], "revision": config.get("revision")}
    return Artifact("lora", origins_of({**report["folded"]["origin"], **target}), report)


def write_metrics(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `cast_metrics.json`."""
    write_json(report, folder / METRICS_NAME)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """`complete_folder`, with the cards that are there, which may be somebody's own."""
    folder = Path(folder)
    with complete_folder(folder) as partial:
        for card in (*folder.glob("README.md"), *folder.glob("*/README.md")):
            kept = partial / card.relative_to(folder)
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(card, kept)
        yield partial


def describe_evaluation(evaluation: Evaluation, name: str | None) -> dict[str, Any]:
    """What a card needs of an evaluation, JSON-ready: the whole table, and the rows of the adapter that is published.

    Args:
        evaluation: What `evaluate` returned.
        name: The adapter's name in it; not needed if only one is neither the target itself nor a retrained one.

    Raises:
        ValueError: If it is not clear which adapter is meant.
    """
    rows = [
        {"task": r.task, "metric": r.metric, "scores": list(r.scores), "lift": list(r.lift)}
        for r in evaluation.of(name)
    ]
    return {"table": evaluation.table(), "rows": rows}


def _read_json(file: Path) -> dict[str, Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise TypeError(f"{file.name} holds no JSON object")
    return data
