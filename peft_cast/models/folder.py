"""What the files in a model's folder tell before it is loaded: weights that lack or are broken, ids that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..tuner.checks import TensorInfo, read_header, shown
from ..utils import one_line, read_json_if_there, said_by
from ..utils.fields import is_a


def read_folder(folder: Path, named: str) -> dict[str, TensorInfo]:
    """Names, types and shapes of a model's tensors; none of them is read.

    Args:
        folder: Where transformers would load it from.
        named (`str`): What a message calls it.

    Returns:
        `dict`: Empty where only loading tells them, as of files of PyTorch before 1.6.

    Raises:
        OSError: If weights of a model are not in its folder, cut off, or no tensors; or if a token that it writes is
            none.
    """
    _check_generation(folder / "generation_config.json", named)
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)  # as transformers looks
    first = next((name for name in names if (folder / name).is_file()), None)
    if first is None:
        part = next(
            (file.name for file in sorted(folder.glob("*-of-*")) if file.suffix in (".safetensors", ".bin")), None
        )
        has = f"has '{part}' without the index of such files" if part else "has no weights in its folder"
        raise OSError(f"{named} {has}, none of {', '.join(names)}: get the whole model.")
    shards = {first}
    if first.endswith(".json"):
        index = read_json_if_there(folder / first)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
            raise OSError(f"{named} could not be loaded: its {first} is broken, get it again.")
        shards = set(map(str, index["weight_map"].values()))
    found: dict[str, TensorInfo] = {}
    whole = True
    for shard in sorted(shards):
        if not (folder / shard).is_file():
            raise OSError(f"{named} could not be loaded: '{shard}', which its {first} names, is missing: get it.")
        try:
            header = (read_header if shard.endswith(".safetensors") else _read_pickled)(folder / shard)
        except (OSError, ValueError) as error:
            raise OSError(f"{named} could not be loaded: {one_line(error)}") from error
        whole &= bool(header)
        found |= header
    return found if whole else {}


def _check_generation(file: Path, named: str) -> None:
    values = read_json_if_there(file)
    if file.exists() and not isinstance(values, dict):  # without one it is loaded
        raise OSError(f"{named} could not be loaded: its {file.name} holds no object, get it again.")
    try:
        GenerationConfig.from_dict(values or {})
    except Exception as error:  # as it comes from a stranger, whatever it leads to
        raise OSError(
            f"{named} could not be loaded: its {file.name} cannot be used ({said_by(error)}): correct it."
        ) from error
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = (values or {}).get(name)
        if ids is not None and not all(is_a(one, int) for one in (ids if isinstance(ids, list) else [ids])):
            raise OSError(
                f"{named} could not be loaded: `{name}` in its {file.name} is {shown(ids)}, which is no number of a "
                "token: correct it."
            )


def _read_pickled(file: Path) -> dict[str, TensorInfo]:
    """As `read_header`, of a file that PyTorch wrote; nothing of one in its old format, which would be read whole.

    Raises:
        ValueError: If it is none, or holds more than tensors, which could run code.
    """
    if not is_zipfile(file):
        if file.open("rb").read(1) != b"\x80":
            raise ValueError(f"'{file.name}' is no file that PyTorch wrote, or cut off: get it again.")
        return {}
    try:
        held: Any = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # whatever its pickle asks for, told at length and in colors
        held = None
    if not isinstance(held, dict) or not all(isinstance(one, torch.Tensor) for one in held.values()):
        raise ValueError(
            f"'{file.name}' is broken, or holds something else than tensors by their names, which is not loaded: get "
            "the model again, as safetensors if there are."
        )
    return {name: TensorInfo(str(tensor.dtype), tuple(tensor.shape)) for name, tensor in held.items()}
