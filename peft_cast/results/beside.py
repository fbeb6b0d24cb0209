"""The folded LoRA that lies beside a CAST adapter, for programs that do not know this package.

Each says from which weights it was folded, so that none is published beside an adapter that has changed since.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..utils import METRICS_NAME, read_json_if_there
from ..utils.fields import unknown
from .mlx_folder import MLX_WEIGHTS_NAME


# Where each format of the LoRA lies in the adapter's folder, and of which files it consists.
PLACES = {"peft": "lora", "gguf": "lora.gguf", "mlx": "mlx"}
FILES = {
    "peft": [f"lora/{name}" for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, METRICS_NAME)],
    "gguf": ["lora.gguf"],
    "mlx": [f"mlx/{name}" for name in (CONFIG_NAME, MLX_WEIGHTS_NAME)],
}
FOLDED_FROM = "peft_cast.folded_from"  # SHA-256 of the CAST adapter's weights, in hexadecimal digits
# The entry of a GGUF file: its name, the number of the type text, its length in eight bytes, the text.
_IN_GGUF = re.compile(re.escape(FOLDED_FROM).encode() + rb"\x08\0\0\0\x40\0{7}([0-9a-f]{64})")


def check_formats(formats: str | Iterable[str]) -> list[str]:
    """
    Raises:
        ValueError: If one of the formats, in a sequence or a text with commas, is none of `PLACES`.
    """
    names = [name.strip() for name in (formats.split(",") if isinstance(formats, str) else formats)]
    for name in names:
        if name not in PLACES:
            raise ValueError(f"There is no format '{name}' of a LoRA: {unknown(str(name), list(PLACES))}")
    return [name for name in PLACES if name in names]


def digest_of(file: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    sha = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            sha.update(part)
    return sha.hexdigest()


def read_beside(folder: Path) -> tuple[dict[str, int | None], list[str]]:
    """What was folded from the adapter in a folder and lies beside it.

    Returns:
        The rank by format, `None` where it is not read; and the places with a LoRA folded from anything else.
    """
    found: dict[str, int | None] = {}
    others: list[str] = []
    for name, place in PLACES.items():
        if (read := _read(name, folder / place)) is None:
            continue
        of, rank = read
        if of == digest_of(folder / SAFETENSORS_WEIGHTS_NAME):
            found[name] = rank
        else:
            others.append(place)
    return found, others


def _read(name: str, place: Path) -> tuple[str | None, int | None] | None:
    """From what a LoRA was folded, and its rank; `None` if there is none of ours."""
    if name == "gguf":
        if not place.is_file():
            return None
        with place.open("rb") as opened:
            said = _IN_GGUF.search(opened.read(2**16))
        return None if said is None else (said[1].decode(), None)
    held: Any = read_json_if_there(place / (METRICS_NAME if name == "peft" else CONFIG_NAME))
    folded = held.get("folded") if isinstance(held, dict) and name == "peft" else held
    if not isinstance(folded, dict) or (name == "mlx" and FOLDED_FROM not in folded):
        return None
    return folded.get(FOLDED_FROM), folded.get("rank") or folded.get("lora_parameters", {}).get("rank")
