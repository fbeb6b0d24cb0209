"""What `bridge_config.json` says: the two models of a bridge, and where modules of the one land on the other."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME
from transformers import AutoConfig, PreTrainedModel

from ..align import ModuleMap
from ..models import read_model_config, skeleton
from ..results import BRIDGE_CONFIG_NAME, BRIDGE_WEIGHTS_NAME
from ..tuner.checks import check_fields, is_name, read_json, shown
from ..utils import (
    WITH_REMEDY,
    check_model_config,
    differ,
    files_of,
    hub_parts,
    one_line,
    secrets_removed,
    why_no_folder,
    why_not_on_hub,
    without_secrets,
)
from .maps import ClosedForm, PlaceMaps
from .saved import load_closed_form


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
            values = json.loads(json.dumps(self.config), object_hook=_untagged)
            model = skeleton(AutoConfig.for_model(**values))
        except Exception as error:  # the values may come from a file, and lead to anything in a model's code
            raise ValueError(
                f"The model '{self.name}' cannot be built from its configuration in the bridge ({one_line(error)}): "
                "fit the bridge anew, or pass a loaded model."
            ) from error
        model.name_or_path = self.name
        return model

    def check(self, model: str | Path | PreTrainedModel, which: str, revision: str | None = None) -> None:
        """
        Raises:
            ValueError: If a model, which need not be loaded, is not of the sizes of this one. Of one that is, and is
                called otherwise, a warning tells: base, instruction-tuned and newer models have equal shapes.
            OSError: If its configuration cannot be read.
        """
        config = model.config if isinstance(model, PreTrainedModel) else read_model_config(model, which, revision)
        own, theirs = self.config.get("text_config") or self.config, config.get_text_config().to_dict()
        for size in ("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer"):
            if own.get(size) != theirs.get(size):
                raise ValueError(
                    f"The bridge was made for another {which}, '{self.name}', whose `{size}` is {own.get(size)!r} and "
                    f"not {theirs.get(size)!r}: pass that as `{which}`, or fit a bridge for this one."
                )
        called = model.name_or_path if isinstance(model, PreTrainedModel) else model
        if differ(self.name, called):
            warnings.warn(
                without_secrets(
                    f"The bridge was fitted for '{self.name}' as its {which}, and the {which} model is called "
                    f"'{called}': if that is no copy of it under another name, fit a bridge for this one."
                )
            )


def _untagged(values: dict[str, Any]) -> Any:
    """An infinite number, such as the lack of a limit, that transformers writes as `{"__float__": "Infinity"}`; other
    objects as they are.
    """
    return float(values["__float__"]) if values.keys() == {"__float__"} else values


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


def read_bridge(
    bridge: str | Path, weights: bool = True, **options: Any
) -> tuple[tuple[Side, Side], ModuleMap, dict[str, Any], ClosedForm[PlaceMaps]]:
    """What the files of a bridge hold, in a folder or on the hub, `user/repo` or `user/repo/subfolder`.

    Args:
        bridge: Folder or hub id.
        weights (`bool`): Whether the maps are read too, else there are none.
        options: As in `huggingface_hub.hf_hub_download`.

    Raises:
        ValueError: If it holds no bridge, or a broken one, or cannot be reached.
    """
    if (why := why_no_folder(bridge, BRIDGE_CONFIG_NAME, options.get("revision"))) is not None:
        raise ValueError(without_secrets(f"The bridge could not be read: {why}."))
    named = f"'{without_secrets(bridge)}'"

    def file(name: str) -> Path:
        if Path(bridge).is_dir():
            return Path(bridge) / name
        repo_id, subfolder = hub_parts(bridge)
        with secrets_removed():
            return Path(str(hf_hub_download(repo_id, name, subfolder=subfolder, **options)))

    try:
        sides, modules, metrics = read_bridge_config(file(BRIDGE_CONFIG_NAME))
        maps = load_closed_form(file(BRIDGE_WEIGHTS_NAME), PlaceMaps) if weights else ClosedForm({}, {}, {}, 0)
    except LocalEntryNotFoundError as error:
        why = why_not_on_hub(error, bridge, options.get("revision"), BRIDGE_CONFIG_NAME)
        raise ValueError(f"The bridge {named} could not be read: {why}") from error
    except (EntryNotFoundError, FileNotFoundError) as error:
        files = files_of(bridge, options.get("revision"))
        if BRIDGE_CONFIG_NAME in files:
            raise ValueError(
                f"{named} holds no whole bridge, it lacks {BRIDGE_WEIGHTS_NAME}: get that file."
            ) from error
        kinds = {CONFIG_NAME: "an adapter", "config.json": "a model"}
        why = next((f"but {kind}" for name, kind in kinds.items() if name in files), f"it has no {BRIDGE_CONFIG_NAME}")
        raise ValueError(f"{named} holds no bridge, {why}: pass a folder or hub id of one.") from error
    except ValueError as error:
        why = one_line(error)
        more = "" if why.endswith(WITH_REMEDY) else " Get it again, or fit it anew."
        raise ValueError(f"{named} holds no bridge, or a broken one: {why}{more}") from error
    except OSError as error:
        why = why_not_on_hub(error, bridge, options.get("revision"), BRIDGE_CONFIG_NAME)
        why = why or f"{one_line(error)} Pass a folder or hub id of one."
        raise ValueError(f"The bridge {named} could not be read: {why}") from error
    kernels = {name: [fit.source_place for fit in fits] for name, fits in maps.kernels.items()}
    if weights and not 0 < len({s for names in kernels.values() for s in names}) == sum(map(len, kernels.values())):
        raise ValueError(f"{named} holds no bridge, or one on which a module of the source lands twice: fit it anew.")
    return sides, replace(modules, kernels=kernels), metrics, maps
