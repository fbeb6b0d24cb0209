"""A target with an adapter that was saved, and what one that was translated holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel

from ..align import ModuleMap, split_place
from ..source import LoraKernel
from ..tuner import CastConfig
from .maps import ClosedForm, KernelFit


@torch.no_grad()
def projections_of(
    adapted: PeftModel, kernels: Mapping[str, LoraKernel], modules: ModuleMap, name: str
) -> ClosedForm[KernelFit]:
    """What the projections of a translated adapter make of its kernels, to go on from.

    Args:
        adapted: The target with the adapter active.
        kernels: Those of the LoRA, which must be the adapter's own, by source place.
        modules: Where they must be.
        name (`str`): The adapter's, for messages.

    Raises:
        ValueError: If it is no CAST adapter, is nonlinear or has a bias, or carries another LoRA or to other places.
    """
    if not isinstance(adapted.active_peft_config, CastConfig):
        raise ValueError(f"`start`, '{name}', is no CAST adapter: pass one that `translate` has made.")
    fits: dict[str, list[KernelFit]] = {}
    for place, sources in modules.kernels.items():
        module, rows = split_place(place)
        layer = adapted.get_base_model().get_submodule(module)
        placed = {
            (kernel.spec.source_place, kernel.spec.rows): kernel
            for group in getattr(layer, "peft_cast_kernels", {}).values()
            for kernel in group
        }
        for source in sources:
            kernel = placed.get((source, rows))
            if kernel is None:
                raise ValueError(
                    f"`start`, '{name}', does not carry '{source}' to '{place}': pass the depth and module map it was "
                    "made with."
                )
            if not kernel.foldable:
                raise ValueError(
                    f"`start`, '{name}', has nonlinear projections or a bias, from which no other can go on."
                )
            for own, given in ((kernel.A, kernels[source].A), (kernel.B, kernels[source].B)):
                if own.shape != given.shape or not torch.allclose(
                    own.float().cpu(), given.float().cpu(), rtol=1e-2, atol=1e-4
                ):
                    raise ValueError(
                        f"`start`, '{name}', carries another LoRA: pass the one that it was translated from."
                    )
            A_P_in, P_out_B = kernel.P_in.after(kernel.A), kernel.P_out.before(kernel.B)
            fits.setdefault(place, []).append(KernelFit(source, A_P_in.cpu().float(), P_out_B.cpu().float(), 1.0, 1.0))
    return ClosedForm(fits, {}, {}, 0)
