"""A closed form in a file: safetensors, with what is not a tensor in its metadata."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..tuner.checks import FLOATS, check_finite, check_number, is_name, read_header, shown
from ..utils import one_line, write_tensors
from .maps import ClosedForm, FitOrMaps, Map


def save_closed_form(fit: ClosedForm[Any], file: Path) -> None:
    """Write the file; it appears complete or not at all."""
    tensors = {f"hidden.{path}": weight.contiguous().cpu() for path, weight in fit.hidden_maps.items()}
    names: dict[int, str] = {}  # modules may share a map (those of a bridge): it is written once

    def written(side: str, found: Map, name: str) -> dict[str, Any]:
        keys = []
        for i, tensor in enumerate(found.factors):
            if id(tensor) not in names:
                names[id(tensor)] = key = f"{side}.{name}.{i}" if i else f"{side}.{name}"
                tensors[key] = tensor.cpu().clone(memory_format=torch.contiguous_format)  # no view of another one
            keys.append(names[id(tensor)])
        # One key alone is how files up to version 0.1 name a matrix.
        return {side: keys if len(keys) > 1 else keys[0], f"{side}_plus_identity": found.plus_identity}

    kernels = {
        name: [
            {
                "source_place": f.source_place,
                "r2_in": f.r2_in,
                "r2_out": f.r2_out,
                "shrunk": f.shrunk,
                **written("in", f.maps[0], f"{i}.{name}"),
                **written("out", f.maps[1], f"{i}.{name}"),
            }
            for i, f in enumerate(fits)
        ]
        for name, fits in fit.kernels.items()
    }
    metadata = {"kernels": kernels, "hidden_r2": fit.hidden_r2, "positions": fit.positions}
    write_tensors(tensors, file, peft_cast=json.dumps(metadata))


def load_closed_form(file: Path, kind: type[FitOrMaps]) -> ClosedForm[FitOrMaps]:
    """Read what `save_closed_form` wrote. It may come from a stranger: every entry is checked.

    Args:
        file (`Path`): The file.
        kind: What it holds for each place: `KernelFit`, in a bridge's `PlaceMaps`.

    Raises:
        ValueError: If the file is broken or no closed form.
        FileNotFoundError: If there is none.
    """
    try:
        header = read_header(file)
        with safe_open(file, framework="pt") as saved:
            metadata = json.loads((saved.metadata() or {})["peft_cast"])

            @cache
            def tensor(key: str) -> torch.Tensor:
                if key not in header or header[key].dtype not in FLOATS or len(header[key].shape) != 2:
                    raise ValueError(f"it has no matrix {shown(key)}")
                found = saved.get_tensor(key)
                check_finite(key, found)
                return found

            def read(entry: dict, side: str, place: str) -> Map:
                keys = entry[side] if isinstance(entry[side], list) else [entry[side]]
                found = Map(tuple(map(tensor, keys)), entry.get(f"{side}_plus_identity", False) is True)
                found.check(place)
                return found

            def fit(entry: dict) -> Any:
                place = entry.get("source_place", entry.get("source_module"))  # its name up to version 0.1
                if not is_name(place):
                    raise ValueError(f"it has a module called {shown(place)}")
                into, out_of = (read(entry, side, str(place)) for side in ("in", "out"))
                r2_in, r2_out = (_finite(name, entry[name]) for name in ("r2_in", "r2_out"))
                return kind.of(str(place), into, out_of, r2_in, r2_out, entry.get("shrunk", True) is True)

            hidden_r2 = {path: _finite("hidden_r2", r2) for path, r2 in metadata["hidden_r2"].items()}
            check_number("`positions`", metadata["positions"], 0, whole=True)
            return ClosedForm(
                kernels={name: [fit(entry) for entry in fits] for name, fits in metadata["kernels"].items()},
                hidden_maps={path: tensor(f"hidden.{path}") for path in hidden_r2},
                hidden_r2=hidden_r2,
                positions=metadata["positions"],
            )
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        why = one_line(error).replace(f"'{file}' is", "it is").removesuffix(": get it again.").rstrip(".")
        raise ValueError(
            f"'{file}' holds no closed form, or is broken ({why}): get it again, or fit it anew."
        ) from error


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {shown(value)}")
    return value
