"""Licenses of the models and adapters that an artifact comes from, as far as their metadata tells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # httpx's, under whichever name this version of the client has it

from .artifacts import Artifact, Origin


# Seconds to wait for one answer of the Hub: a card is not worth more.
TIMEOUT = 5
ROLES = {"source": "source model", "adapter": "source adapter", "target": "target model"}
# What the identifiers themselves say (https://huggingface.co/docs/hub/repositories-licenses).
_OWN_TERMS = ("llama", "gemma", "other", "openrail", "bigscience", "creativeml", "apple-", "deepfloyd", "h-research")
_REMARKS = {"is for non-commercial use by its name": ("-nc", "noncommercial"), "has terms of its own": _OWN_TERMS}


@dataclass(frozen=True)
class License:
    """What the metadata of a model card says: `license`, and a name and link for those the Hub has no name for.

    Args:
        id (`str`, *optional*): `"apache-2.0"`, `"gemma"`, `"other"`, ...; `None` if it could not be read.
        name, link (`str`, *optional*): `license_name` and `license_link`.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> License:
        """From the metadata of a model card; a list of licenses is none that could be compared or inherited."""
        texts = [metadata.get(key) for key in ("license", "license_name", "license_link")]
        return cls(*(text.strip() if isinstance(text, str) and text.strip() else None for text in texts))

    @property
    def known(self) -> bool:
        """Whether it says which terms are meant."""
        return self.id is not None and self.id != "unknown" and (self.id != "other" or self.name is not None)

    def same_as(self, other: License) -> bool:
        """Whether both state the same license; the name only tells those apart that the Hub has no identifier for."""
        return self.id == other.id and (self.id != "other" or self.name == other.name)

    def __str__(self) -> str:
        return self.name or self.id or "unknown"


UNKNOWN = License()


@dataclass(frozen=True)
class Licenses:
    """The licenses of everything an artifact comes from: `source`, `adapter` (not for bridges) and `target`."""

    by_role: Mapping[str, License]

    @property
    def inherited(self) -> License:
        """The license that all name alike; unknown when they do not, or one of them is unknown."""
        first, *others = self.by_role.values()
        return first if first.known and all(other.same_as(first) for other in others) else UNKNOWN

    @property
    def warning(self) -> str | None:
        """Why nothing is inherited and what to do, in one sentence; `None` if a license is inherited."""
        if self.inherited.known:
            return None
        unknown = [ROLES[role] for role, license in self.by_role.items() if not license.known]
        listed = ", ".join(f"{ROLES[role]}: {license}" for role, license in self.by_role.items())
        if not unknown:
            reason = f"they differ ({listed}"
        elif len(unknown) < len(self.by_role):
            reason = f"that of the {' and the '.join(unknown)} is unknown ({listed}"
        else:
            reason = f"none is known (of the {', '.join(unknown)}"
        named = dict.fromkeys(license for license in self.by_role.values() if license.known)
        remarks = [
            f"{license} {remark}"
            for remark, parts in _REMARKS.items()
            for license in named
            if any(part in f"{license.id} {license.name}".lower() for part in parts)
        ]
        reason += f"; {', '.join(remarks)}" if remarks else ""
        return (
            f"No license is inherited from what this was made of, because {reason}): "
            "read their terms and state yours as `license:` in README.md."
        )


def read_licenses(artifact: Artifact, token: str | bool | None = None) -> Licenses:
    """The licenses of what an artifact comes from; unknown where none is stated or it cannot be reached now."""
    return Licenses({role: read_license(origin, token) for role, origin in artifact.origins.items()})


def read_license(origin: Origin, token: str | bool | None = None) -> License:
    """From the README of a folder; for a hub id from the Hub, or if it is out of reach from the local cache."""
    try:
        if origin.hub_id is None:
            return _of_file(Path(origin.name, "README.md")) if origin.name else UNKNOWN
        try:
            info = HfApi().model_info(origin.hub_id, revision=origin.revision, timeout=TIMEOUT, token=token)
            return License.of(info.card_data.to_dict()) if info.card_data else UNKNOWN
        except (HTTPError, OSError):
            cached = try_to_load_from_cache(origin.hub_id, "README.md", revision=origin.revision)
            return _of_file(cached) if isinstance(cached, str) else UNKNOWN
    except (OSError, ValueError, yaml.YAMLError):
        return UNKNOWN


def _of_file(card: str | Path) -> License:
    return License.of(metadata_load(card) or {})
