"""Several adapters of one model at once: models are loaded once, and one pass of text fits all closed forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import get_peft_model, set_peft_model_state_dict
from transformers import PreTrainedModel

from ..align import ModuleMap
from ..results import TranslationResult
from ..source import LoraKernel
from ..tuner.checks import number_of
from .install import check_adapter_name
from .maps import ClosedForm, KernelFit


@dataclass(frozen=True)
class StackedPart:
    """One adapter's part of a closed form that was fitted for several.

    Args:
        maps: The closed form of the stacked kernels.
        modules: Where they land.
        rows (`dict[str, slice]`): For each source module of this adapter its rows of the stacked A.
    """

    maps: ClosedForm[KernelFit]
    modules: ModuleMap
    rows: dict[str, slice]

    def closed_form(self, kernels: Mapping[str, LoraKernel]) -> tuple[ClosedForm[KernelFit], ModuleMap]:
        """As `Bridge.closed_form`."""

        def own(fit: KernelFit) -> KernelFit:
            rows = self.rows[fit.source_place]
            return replace(fit, A_P_in=fit.A_P_in[rows], P_out_B=fit.P_out_B[:, rows])

        return self.maps.part(kernels, own), self.modules.part(kernels)


def stacked(parts: Sequence[Mapping[str, LoraKernel]]) -> tuple[dict[str, LoraKernel], list[dict[str, slice]]]:
    """The kernels of several adapters on top of each other, and each one's rows."""
    kernels: dict[str, LoraKernel] = {}
    rows: list[dict[str, slice]] = []
    for part in parts:
        rows.append({})
        for name, kernel in part.items():
            A, B = kernel.A.cpu(), kernel.B.cpu()
            if name in kernels:
                A, B = torch.cat([kernels[name].A, A]), torch.cat([kernels[name].B, B], dim=1)
            kernels[name] = LoraKernel(A, B, 1.0)
            rows[-1][name] = slice(len(A) - len(kernel.A), len(A))
    return kernels, rows


def adapter_names(adapters: Sequence[str | Path], given: str | Sequence[str]) -> list[str]:
    """The given names, or the last parts of the adapters' paths, with `_` for dots, which torch's names cannot have.

    Raises:
        ValueError: If they are not one for each, not distinct, or no names for a module.
    """
    if given != "default" and not (isinstance(given, (list, tuple)) and all(isinstance(one, str) for one in given)):
        raise ValueError(f"`adapter_name` must be a list of names, one for each adapter, got {given!r}.")
    names = [Path(one).name.replace(".", "_") for one in adapters] if isinstance(given, str) else list(given)
    for name in names:
        check_adapter_name(name, "`adapter_name=[...]`, names")
    if len(names) != len(adapters) or len(set(names)) != len(names):
        raise ValueError(
            f"Several adapters need a name each, all different, got {names}: pass `adapter_name=[...]`, "
            f"{number_of(len(adapters), 'name')}."
        )
    return names


def on_one_model(
    target: PreTrainedModel,
    results: Sequence[TranslationResult],
    names: Sequence[str],
    states: Sequence[Mapping[str, torch.Tensor]],
) -> list[TranslationResult]:
    """The results with all their adapters on one model."""
    configs = [result.model.peft_config[result.adapter_name] for result in results]
    model = get_peft_model(target, configs[0], adapter_name=names[0])
    for config, name in zip(configs[1:], names[1:]):
        model.add_adapter(name, config)
    for name, state in zip(names, states):
        set_peft_model_state_dict(model, state, adapter_name=name)
    model.requires_grad_(False)
    return [replace(result, model=model.eval(), adapter_name=name) for result, name in zip(results, names)]
