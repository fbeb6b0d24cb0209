"""What a translation's metrics say of its settings, those of earlier versions too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..options import all_options
from ..utils.fields import describe
from .artifacts import Origin


def settings_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decided the result, by name. Earlier versions kept those of the loss in a dictionary."""
    settings = dict(metrics.get("settings", {}))
    return {**settings.pop("loss", {}), **settings}


def is_comparable(metrics: Mapping[str, Any]) -> bool:
    """Whether the KL in the log has the units of the one on held-out text, which it has at no other temperature."""
    return settings_of(metrics).get("temperature", 1.0) == 1.0


def changed_settings(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Those that differ from the options' defaults, as text; of paths the last part."""
    settings = settings_of(metrics)
    defaults = {one.name: describe(one.default) for _, one in all_options() if one.metadata["decides"]}
    # The metrics name the type that was taken where none was given.
    defaults["projection_type"] = "factored" if settings.get("projection_sharing") else "compact"
    changed = {name: settings.get(name, default) for name, default in defaults.items()}
    return {name: _as_text(value) for name, value in changed.items() if value != defaults[name]}


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values as text; those of a dictionary in it one by one."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", "not given" if value is None else str(value)


def _as_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_as_text(item)}" for name, item in value.items())
    if isinstance(value, str):
        return Origin(value).hub_id or Origin(value).label
    return "not given" if value is None else str(value)
