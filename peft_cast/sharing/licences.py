"""Licences of the models and adapters that an artifact comes from, as far as their metadata tells them."""

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
_NON_COMMERCIAL = ("-nc-", "-nc", "noncommercial")
_OWN_TERMS = ("llama", "gemma", "other", "openrail", "bigscience", "creativeml", "apple-", "deepfloyd", "h-research")


@dataclass(frozen=True)
class Licence:
    """What the metadata of a model card says: `license`, and for licences that the Hub has no name for a name and link.

    Args:
        id (`str`, *optional*): `"apache-2.0"`, `"gemma"`, `"other"`, ...; `None` if it could not be read.
        name, link (`str`, *optional*): `license_name` and `license_link`.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Licence:
        """From the metadata of a model card; a list of licences is none that could be compared or inherited."""
        texts = [metadata.get(key) for key in ("license", "license_name", "license_link")]
        return cls(*(text.strip() if isinstance(text, str) and text.strip() else None for text in texts))

    @property
    def known(self) -> bool:
        """Whether it says which terms are meant."""
        return self.id is not None and self.id != "unknown" and (self.id != "other" or self.name is not None)

    def same_as(self, other: Licence) -> bool:
        """Whether both state the same licence; the name only tells those apart that the Hub has no identifier for."""
        return self.id == other.id and (self.id != "other" or self.name == other.name)

    def __str__(self) -> str:
        return self.name or self.id or "unknown"


UNKNOWN = Licence()


@dataclass(frozen=True)
class Licences:
    """The licences of everything an artifact comes from.

    Args:
        by_role (`dict[str, Licence]`): Of `source`, `adapter` (not for bridges) and `target`.
    """

    by_role: Mapping[str, Licence]

    @property
    def inherited(self) -> Licence:
        """The licence that all name alike; unknown when they do not, or one of them is unknown."""
        first, *others = self.by_role.values()
        return first if first.known and all(other.same_as(first) for other in others) else UNKNOWN

    @property
    def warning(self) -> str | None:
        """Why nothing is inherited and what to do, in one sentence; `None` if a licence is inherited."""
        if self.inherited.known:
            return None
        unknown = [ROLES[role] for role, licence in self.by_role.items() if not licence.known]
        listed = ", ".join(f"{ROLES[role]}: {licence}" for role, licence in self.by_role.items())
        if not unknown:
            reason = f"they differ ({listed}"
        elif len(unknown) < len(self.by_role):
            reason = f"that of the {' and the '.join(unknown)} is unknown ({listed}"
        else:
            reason = f"none is known (of the {', '.join(unknown)}"
        named = dict.fromkeys(licence for licence in self.by_role.values() if licence.known)
        terms = [
            f"{licence} is for non-commercial use by its name" for licence in named if _has(licence, _NON_COMMERCIAL)
        ]
        terms += [f"{licence} has terms of its own" for licence in named if _has(licence, _OWN_TERMS)]
        remark = f"; {', '.join(terms)}" if terms else ""
        return (
            f"No licence is inherited from what this was made of, because {reason}{remark}): "
            "read their terms and state yours as `license:` in README.md."
        )


def read_licences(artifact: Artifact, token: str | bool | None = None) -> Licences:
    """The licences of what an artifact comes from; unknown where none is stated or it cannot be reached now."""
    return Licences({role: read_licence(origin, token) for role, origin in artifact.origins.items()})


def read_licence(origin: Origin, token: str | bool | None = None) -> Licence:
    """From the README of a folder; for a hub id from the Hub, or if it is out of reach from the local cache."""
    try:
        if origin.hub_id is None:
            card = Path(origin.name or "", "README.md")
            return _of_file(card) if origin.name and card.is_file() else UNKNOWN
        try:
            info = HfApi().model_info(origin.hub_id, revision=origin.revision, timeout=TIMEOUT, token=token)
            return Licence.of(info.card_data.to_dict()) if info.card_data else UNKNOWN
        except (HTTPError, OSError):
            cached = try_to_load_from_cache(origin.hub_id, "README.md", revision=origin.revision)
            return _of_file(Path(cached)) if isinstance(cached, str) else UNKNOWN
    except (OSError, ValueError, yaml.YAMLError):
        return UNKNOWN


def _of_file(card: Path) -> Licence:
    return Licence.of(metadata_load(card) or {})


def _has(licence: Licence, parts: tuple[str, ...]) -> bool:
    return any(part in f"{licence.id} {licence.name}".lower() for part in parts)
