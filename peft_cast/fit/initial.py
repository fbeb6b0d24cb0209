"""The initial maps of a translation: the closed form, a bridge's maps, or those of an earlier translation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm

from ..align import AlignedPair, layer_pairs
from ..options import Fit, Options, Pairing
from ..source import Pair, named_source
from ..utils import distributed, optional, within_memory
from .bridge import Bridge
from .bridge_config import read_bridge
from .closed_form import fit_closed_form
from .install import check_shapes
from .maps import ClosedForm, KernelFit
from .saved import load_closed_form, save_closed_form
from .stacked import StackedPart
from .start import check_start


def check_bridge(bridge: Any, source: Any, adapter: Any, target: Any, pairing: Pairing) -> None:
    """Refuse, before models are loaded, what is no bridge, or one between other models.

    Args:
        bridge: A `Bridge`, or the folder or hub id of one, of which only the configuration is read.
        source, adapter, target, pairing: As in `translate`.

    Raises:
        ValueError, OSError: As `Bridge.from_pretrained`; if a model is not of the sizes that the bridge is for.
    """
    if not isinstance(bridge, (Bridge, str, Path)):
        raise ValueError(f"`bridge` must be a `Bridge`, or the folder or hub id of one, got {type(bridge).__name__}.")
    sides = (bridge.source, bridge.target) if isinstance(bridge, Bridge) else read_bridge(bridge, weights=False)[0]
    if isinstance(adapter, PeftModel):
        source = adapter.get_base_model()
    source, pairing = named_source(source, adapter, pairing)
    sides[0].check(source, "source", pairing.source_revision)
    sides[1].check(target, "target", pairing.target_revision)


def check_maps(bridge: Any, start: Any, source: Any, adapter: Any, target: Any, options: Options) -> None:
    """Refuse, before models are loaded, first maps that are not the closed form's and cannot be used.

    Raises:
        ValueError, OSError: As `check_bridge` and `check_start`, for what is given of the two; if an option goes
            against it.
    """
    pairing, fit = options.pairing, options.fit
    for name, maps in (("bridge", bridge), ("start", start)):
        if maps is not None:
            _leave_out(f"`{name}` brings the first maps", {"first_maps": fit.first_maps != Fit.first_maps})
    if bridge is not None:
        given = {"depth_map": pairing.depth_map != Pairing.depth_map, "module_map": pairing.module_map is not None}
        _leave_out("A bridge brings its depth map, module map and ridge", given | {"ridge": fit.ridge is not None})
        check_bridge(bridge, source, adapter, target, pairing)
    if start is not None:
        given = {"gain": fit.gain is not None, "ridge": fit.ridge is not None}
        _leave_out("`start` brings its projections and their strength", given)
        check_start(start, source, adapter, target, options)


def _leave_out(brought: str, given: Mapping[str, bool]) -> None:
    for name in (name for name, is_given in given.items() if is_given):
        raise ValueError(f"{brought}: leave `{name}` out.")


def initial_maps(
    pair: Pair,
    texts: Sequence[AlignedPair],
    options: Options,
    *,
    bridge: Bridge | StackedPart | None = None,
    start: ClosedForm[KernelFit] | None = None,
    cache: Path | None = None,
    also: str = "",
) -> tuple[ClosedForm[KernelFit], Pair]:
    """The maps of the pair's kernels before they are refined, and the pair with the module map that they follow.

    Args:
        pair (`Pair`): The models.
        texts: General texts, for the closed form.
        options (`Options`): Its settings.
        bridge: Maps that were fitted before, to be used instead.
        start (`ClosedForm`, *optional*): The projections of an earlier translation, to be used instead.
        cache (`Path`, *optional*): Folder in which the closed form is kept.
        also (`str`): What else tells it from others there.
    """
    if start is not None:
        return start, pair
    if bridge is not None:
        closed_form, modules = bridge.closed_form(pair.kernels)
        return closed_form, replace(pair, modules=modules)
    with pair.adapted.disable_adapter():
        fit = partial(
            fitted,
            pair,
            texts,
            cache,
            also=also,
            ridge=options.fit.ridge,
            hidden=options.training.beta > 0,
            progress=partial(tqdm, disable=not options.run.progress, desc="closed form"),
        )
        return within_memory(lambda size: fit(batch_size=size), options.training.batch_size), pair


def fitted(
    pair: Pair,
    texts: Sequence[AlignedPair],
    cache_dir: str | Path | None,
    *,
    progress: Callable,
    also: str = "",
    **options: Any,
) -> ClosedForm[KernelFit]:
    """The closed form of the pair on some texts: from the cache if it is there, else fitted and put there.

    Args:
        pair: The models; the source's adapter must be disabled.
        texts: General texts.
        cache_dir: The folder; nothing is kept when `None`.
        also (`str`): What else tells this closed form from others.
        progress, options: As in `fit_closed_form`.
    """
    file = None
    if cache_dir is not None:
        key = f"{pair.identity} {pair.modules.kernels} {texts} {options}{also}"
        file = Path(cache_dir) / f"closed_form_{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        known = distributed.on_main_process(lambda: _known(file, pair, bool(options.get("hidden"))))
        if known is not None:
            return known
    fit = fit_closed_form(
        pair.source, pair.target, texts, pair.vocabulary, pair.kernels, pair.modules, progress=progress, **options
    )
    return distributed.on_main_process(lambda: _kept(fit, file)) if file is not None else fit


def _known(file: Path, pair: Pair, hidden: bool) -> ClosedForm[KernelFit] | None:
    """The closed form in the cache; `None` if it is not there, broken, or another pair's."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        fit = load_closed_form(file, KernelFit)
        if _belongs_to(fit, pair, hidden):
            return fit
    return None


def _kept(fit: ClosedForm[KernelFit], file: Path) -> ClosedForm[KernelFit]:
    """The closed form as a later run will read it: another order of the numbers in memory shows in the last digits."""
    with optional("The closed form"):
        save_closed_form(fit, file)
        return load_closed_form(file, KernelFit)
    return fit


def _belongs_to(fit: ClosedForm[KernelFit], pair: Pair, hidden: bool) -> bool:
    """Whether a closed form from the cache is one of this pair, whatever its file is called."""
    check_shapes(pair.target, pair.kernels, fit)
    widths = [model.config.get_text_config().hidden_size for model in (pair.target, pair.source)]
    kernels = {name: [f.source_place for f in fits] for name, fits in fit.kernels.items()}
    return (
        kernels == pair.modules.kernels
        and set(fit.hidden_maps) == (set(layer_pairs(pair.modules)) if hidden else set())
        and all(weight.shape == (widths[0], widths[1] + 1) for weight in fit.hidden_maps.values())
    )
