"""A closed form in a file: safetensors, with what is not a tensor in its metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .closed_form import ClosedForm, KernelFit


def save_closed_form(fit: ClosedForm, file: Path) -> None:
    """Write the file; it appears complete or not at all."""
    kernels = {
        name: [{"source_module": f.source_module, "r2_in": f.r2_in, "r2_out": f.r2_out} for f in fits]
        for name, fits in fit.kernels.items()
    }
    metadata = {"kernels": kernels, "hidden_r2": fit.hidden_r2, "positions": fit.positions}
    tensors = {f"hidden.{path}": weight.contiguous() for path, weight in fit.hidden_maps.items()}
    for name, fits in fit.kernels.items():
        for i, f in enumerate(fits):
            # Copies: maps of one fit are views of one tensor, which safetensors does not write.
            tensors[f"in.{i}.{name}"], tensors[f"out.{i}.{name}"] = f.A_P_in.clone(), f.P_out_B.clone()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({k: t.cpu() for k, t in tensors.items()}, partial, metadata={"peft_cast": json.dumps(metadata)})
    partial.replace(file)


def load_closed_form(file: Path) -> ClosedForm:
    """Read what `save_closed_form` wrote.

    Raises:
        ValueError: If the file is broken or no closed form.
        FileNotFoundError: If there is none.
    """
    try:
        with safe_open(file, framework="pt") as saved:
            metadata = json.loads((saved.metadata() or {})["peft_cast"])

            def tensor(key: str) -> torch.Tensor:
                return saved.get_tensor(key)

            return ClosedForm(
                kernels={
                    name: [
                        KernelFit(A_P_in=tensor(f"in.{i}.{name}"), P_out_B=tensor(f"out.{i}.{name}"), **entry)
                        for i, entry in enumerate(entries)
                    ]
                    for name, entries in metadata["kernels"].items()
                },
                hidden_maps={path: tensor(f"hidden.{path}") for path in metadata["hidden_r2"]},
                hidden_r2=metadata["hidden_r2"],
                positions=metadata["positions"],
            )
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{file}' holds no closed form, or is broken: delete it and fit again. ({error})") from error
