"""What `bridge_config.json` says: the two models of a bridge, and where modules of the one land on the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..align import ModuleMap
from ..models import skeleton
from ..tuner.checks import check_fields, is_name, read_json, shown
from ..utils import check_model_config, one_line, without_secrets


@dataclass(frozen=True)
class Side:
    """One of the two models of a bridge.

    Args:
        name (`str`): Hub id or path.
        revision (`str`, *optional*): Its revision.
        config (`dict`): The model's configuration, with its `model_type`: enough for a skeleton without weights.
    """

    name: str
    revision: str | None
    config: dict[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel, revision: str | None) -> Side:
        return cls(
            without_secrets(model.name_or_path), revision, json.loads(model.config.to_json_string(use_diff=False))
        )

    def skeleton(self) -> PreTrainedModel:
        """The model without weights, on the meta device.

        Raises:
            ValueError: If the configuration is none of a model.
        """
        try:
            model = skeleton(AutoConfig.for_model(**self.config))
        except Exception as error:  # the values may come from a file, and lead to anything in a model's code
            raise ValueError(
                f"The model '{self.name}' cannot be built from its configuration in the bridge ({one_line(error)}): "
                "fit the bridge anew, or pass a loaded model."
            ) from error
        model.name_or_path = self.name
        return model


@dataclass
class _Config:
    """The types in `bridge_config.json`."""

    source: dict[str, Any]
    target: dict[str, Any]
    layers: dict[str, int]
    unmapped: dict[str, str]
    found: dict[str, list[str | None]]
    metrics: dict[str, Any]


def _side(config: Mapping[str, Any], which: str) -> Side:
    side = config[which]
    if set(side) != {"name", "revision", "config"} or not isinstance(side["config"], dict):
        raise ValueError(f"`{which}` must have a name, a revision and a config.")
    if not is_name(side["name"]) or not (side["revision"] is None or is_name(side["revision"])):
        raise ValueError(f"`{which}` must have texts as its name and revision.")
    check_model_config(side["config"], f"the config of its {which}")
    return Side(**side)


def _route(name: str, route: list) -> tuple[str | None, str, str, str]:
    if len(route) != 4 or not all(isinstance(part, str) for part in route[1:]):
        raise ValueError(f"`found` of {shown(name)} must hold four texts.")
    return tuple(route)


def read_bridge_config(file: Path) -> tuple[tuple[Side, Side], ModuleMap, dict[str, Any]]:
    """Read and check the configuration of a bridge; it may be a stranger's.

    Returns:
        Source and target; the map of their modules, as yet without kernels; the metrics.

    Raises:
        ValueError: Naming what is wrong.
        FileNotFoundError: If there is none.
    """
    config = read_json(file)
    names = [field for field in _Config.__annotations__ if field not in config or config[field] is None]
    if names:
        raise ValueError(f"'{file}' lacks `{names[0]}`.")
    check_fields(_Config, config)
    try:
        layers = {int(source): target for source, target in config["layers"].items()}
    except ValueError:
        raise ValueError(f"`layers` in '{file}' must lead from numbers to numbers.") from None
    found = {name: _route(name, route) for name, route in config["found"].items()}
    sides = _side(config, "source"), _side(config, "target")
    return sides, ModuleMap({}, layers, dict(config["unmapped"]), found), config["metrics"]
