"""A closed form in a file: safetensors, with what is not a tensor in its metadata."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import write_tensors
from .closed_form import ClosedForm, KernelFit


def save_closed_form(fit: ClosedForm, file: Path) -> None:
    """Write the file; it appears complete or not at all."""
    tensors = {f"hidden.{path}": weight.contiguous().cpu() for path, weight in fit.hidden_maps.items()}
    names: dict[int, str] = {}  # modules may share a map (those of a bridge): it is written once

    def written(tensor: torch.Tensor, name: str) -> str:
        if id(tensor) not in names:
            names[id(tensor)] = name
            tensors[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)  # no view of another one
        return names[id(tensor)]

    kernels = {
        name: [
            {
                "source_module": f.source_module, "r2_in": f.r2_in, "r2_out": f.r2_out,
                "in": written(f.A_P_in, f"in.{i}.{name}"), "out": written(f.P_out_B, f"out.{i}.{name}"),
            }
            for i, f in enumerate(fits)
        ]
        for name, fits in fit.kernels.items()
    }  # fmt: skip
    metadata = {"kernels": kernels, "hidden_r2": fit.hidden_r2, "positions": fit.positions}
    write_tensors(tensors, file, peft_cast=json.dumps(metadata))


def load_closed_form(file: Path) -> ClosedForm:
    """Read what `save_closed_form` wrote.

    Raises:
        ValueError: If the file is broken or no closed form.
        FileNotFoundError: If there is none.
    """
    try:
        with safe_open(file, framework="pt") as saved:
            metadata = json.loads((saved.metadata() or {})["peft_cast"])

            @cache
            def tensor(key: str) -> torch.Tensor:
                return saved.get_tensor(key)

            def fit(entry: dict) -> KernelFit:
                return KernelFit(A_P_in=tensor(entry.pop("in")), P_out_B=tensor(entry.pop("out")), **entry)

            return ClosedForm(
                kernels={name: [fit(entry) for entry in fits] for name, fits in metadata["kernels"].items()},
                hidden_maps={path: tensor(f"hidden.{path}") for path in metadata["hidden_r2"]},
                hidden_r2=metadata["hidden_r2"],
                positions=metadata["positions"],
            )
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{file}' holds no closed form, or is broken: delete it and fit again. ({error})") from error
