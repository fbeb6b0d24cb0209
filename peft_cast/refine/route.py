"""Which first maps a translation begins with, and whether it needs more than them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..align import AlignedPair, ModuleMap
from ..fit import (
    Bridge,
    ClosedForm,
    KernelFit,
    StackedPart,
    can_be_copied,
    cast_config,
    copied,
    initial_maps,
    install,
    map_by_similarity,
)
from ..models import seeded, unload_adapters, unloaded_on_error
from ..options import Options
from ..source import Pair
from ..text import PairTexts
from ..utils import within_memory
from .imitate import distance_to_teacher
from .shown import open_teacher
from .teacher import compares_outputs_alone


# Share of the way to the teacher that the adapter as it is must cover to be taken: the models then are of one origin.
HALF = 0.5


def check_first_maps(modules: ModuleMap, source: PreTrainedModel, target: PreTrainedModel, options: Options) -> None:
    """
    Args:
        modules (`ModuleMap`): Where kernels land.
        source, target: The models, or their skeletons.
        options (`Options`): What is asked.

    Raises:
        ValueError: If the adapter is to be copied and does not fit the target, or what else is asked needs the closed
            form.
    """
    if options.fit.first_maps != "copy":
        return
    if not compares_outputs_alone(options.training):
        raise ValueError("`first_maps='copy'` goes with no `beta` and no FSDP or ZeRO-3: leave it or them out.")
    if not can_be_copied(modules, source, target):
        raise ValueError(
            "`first_maps='copy'` needs a target whose modules have the shapes of the source's, and these have others: "
            "leave `first_maps` out."
        )


def first_maps(
    pair: Pair,
    texts: PairTexts,
    options: Options,
    *,
    bridge: Bridge | StackedPart | None = None,
    start: ClosedForm[KernelFit] | None = None,
    cache: Path | None = None,
) -> tuple[ClosedForm[KernelFit], Pair, dict[str, Any]]:
    """The maps before the refinement: those that are given, else the adapter as it is where that alone brings the
    target at least half of the way to the teacher, else the closed form.

    Args:
        pair (`Pair`): The models, the target without an adapter.
        texts (`PairTexts`): What was read.
        options (`Options`): Their settings.
        bridge, start, cache: As in `initial_maps`.

    Returns:
        The maps, the pair with the module map that they follow, and JSON-ready how they were chosen: `first_maps`,
        `start`, `bridge`, `copy` or `closed_form`; `copy`, the share of the way that the adapter as it is covers, if
        that was measured.
    """
    wanted, how = options.fit.first_maps, {}
    given = "start" if start is not None else "bridge" if isinstance(bridge, Bridge) else None
    if given is None and options.pairing.depth_map == "similarity":
        with pair.adapted.disable_adapter():
            pair = map_by_similarity(pair, texts.fit, options.pairing.module_map)
    tried = given is None and wanted != "closed_form" and compares_outputs_alone(options.training)
    if tried and (copy := copied(pair)) is not None:
        if wanted == "copy":
            return copy, pair, {"first_maps": "copy"}
        how = {"copy": way_to_teacher(pair, copy, texts.held_out, options, cache)}
        if how["copy"] >= HALF:
            return copy, pair, {"first_maps": "copy", **how}
    maps, pair = initial_maps(pair, texts.fit, options, bridge=bridge, start=start, cache=cache)
    return maps, pair, {"first_maps": given or "closed_form", **how}


def way_to_teacher(
    pair: Pair, maps: ClosedForm[KernelFit], held_out: Sequence[AlignedPair], options: Options, cache: Path | None
) -> float:
    """The share of the KL between target and teacher on held-out texts that is gone with these maps, below 0 if it
    grew.
    """
    teacher = open_teacher(pair, options.training, folder=cache)
    config = cast_config(pair.kernels, pair.modules, **vars(options.projections))
    with unloaded_on_error(pair.target), teacher.heads(pair), seeded(options.training.seed):
        model = install(pair.target, config, pair.kernels, maps, gain=options.fit.gain)
        distance = partial(distance_to_teacher, model, teacher, held_out)
        with model.disable_adapter():
            before = within_memory(distance, options.training.batch_size)
        after = within_memory(distance, options.training.batch_size)
    unload_adapters(pair.target)
    return 1 - after / before if before > 0 else 0.0
