"""A target with an adapter that was saved, and what one that was translated holds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ..align import ModuleMap, split_place
from ..models import as_skeleton
from ..options import Options, Pairing
from ..source import LoraKernel, check_on_target, map_kernels, named_source, planned_source, with_adapter
from ..tuner import CastConfig
from ..utils import read_adapter_config, without_secrets
from .maps import ClosedForm, KernelFit


_NOT_FOLDABLE = "has nonlinear projections or a bias, from which no other can go on"


def check_start(start: Any, source: Any, adapter: Any, target: str | Path | PreTrainedModel, options: Options) -> None:
    """Refuse, before models are loaded, what no translation can go on from.

    Args:
        start: Folder or hub id of a CAST adapter.
        source, adapter, target, options: As in `translate`; models may be skeletons.

    Raises:
        ValueError, OSError: As `projections_of`; if it does not fit the target, or has larger projections than
            `projection_size` has room for.
    """
    if not isinstance(start, (str, Path)):
        raise ValueError(
            f"`start` must be the folder or hub id of a translation, got {type(start).__name__}: save it, with "
            "`save_pretrained(folder)`, and pass the folder."
        )
    with _said_of_start():
        name, config = without_secrets(start), read_adapter_config(start)
    if not isinstance(config, CastConfig):
        raise ValueError(f"`start`, '{name}', is no CAST adapter: pass one that `translate` has made.")
    if config.projection_type == "mlp" or config.projection_bias:
        raise ValueError(f"`start`, '{name}', {_NOT_FOLDABLE}.")
    held = min(config.projection_size or config.r, config.r)
    if (options.projections.projection_size or held) < held:
        raise ValueError(f"`start` brings its projections, of size {held}: leave `projection_size` out.")
    with _said_of_start():
        check_on_target(target, start, target_revision=options.pairing.target_revision)
    if isinstance(adapter, (str, Path)) and options.pairing.depth_map != "similarity":  # which is found out later
        _check_carried(start, source, adapter, target, options.pairing)


def _check_carried(start: str | Path, source: Any, adapter: str | Path, target: Any, pairing: Pairing) -> None:
    """Refuse, by the files of both, an adapter that is not the one that `start` carries, where it can be read so."""
    source, pairing = named_source(source, adapter, pairing)
    here = as_skeleton(source, "source", pairing.source_revision)
    there = as_skeleton(target, "target", pairing.target_revision)
    if here is None or there is None or not here.device.type == there.device.type == "meta":
        return
    with warnings.catch_warnings(), suppress(NotImplementedError):  # SHiRA looks at weights: loading it tells more
        warnings.simplefilter("ignore")  # both are loaded once more
        read_here = planned_source(here, adapter, pairing.adapter_revision, pairing.source_rank)
        with read_here as (read, _, estimated), with_adapter(there, start) as translated:
            if estimated is None:
                modules = map_kernels(read.kernels, here, there, pairing)
                projections_of(translated, read.kernels, modules, without_secrets(start))


@contextmanager
def _said_of_start() -> Iterator[None]:
    """Within the context what is said of an adapter is said of the one to start from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("he adapter", "he adapter to start from", 1)) from error


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
        ValueError: If it is nonlinear or has a bias, or carries another LoRA or to other places.
    """
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
                raise ValueError(f"`start`, '{name}', {_NOT_FOLDABLE}.")
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
