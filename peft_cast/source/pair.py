"""A model pair made ready for a translation: loaded and aligned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..align import (
    ModuleMap,
    SharedVocabulary,
    check_offsets,
    layer_count,
    linear_layers,
    map_layers,
    map_modules,
    shared_vocabulary,
)
from ..models import (
    adapter_tokenizer,
    check_model,
    check_positions,
    default_dtype,
    fingerprint,
    load_model,
    load_tokenizer,
    moved,
    sharding,
    skeleton_of,
    untouched,
)
from ..options import Pairing
from ..utils import distributed, read_adapter_config, without_secrets
from .card import Card, read_card
from .kernels import LoraKernel, SourceAdapter
from .loading import adapted_source, base_of, check_adapter, check_on, load_source
from .planned import planned_source


@dataclass(frozen=True)
class Pair:
    """Two models side by side.

    Args:
        source: The model the LoRA was trained on, frozen.
        adapter: The adapter on the source, with its kernels; `None` when only the models matter (bridges).
        target: The model it shall work on, frozen.
        tokenizers: Those of source and target.
        modules: Where the kernels land.
        vocabulary: Tokens that both tokenizers have.
        device: Where training happens.
        source_revision (`str`, *optional*): Hub revision of the source, given or named by the adapter.
        card: Folder or hub id of the adapter, whose card tells what it is asked, and its hub revision.
    """

    source: PreTrainedModel
    adapter: SourceAdapter | None
    target: PreTrainedModel
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    modules: ModuleMap
    vocabulary: SharedVocabulary
    device: torch.device
    source_revision: str | None = None
    card: tuple[str | Path, str | None] | None = None

    @property
    def given(self) -> SourceAdapter:
        """The adapter, where there must be one."""
        assert self.adapter is not None, "a pair of models alone has no adapter"
        return self.adapter

    @property
    def adapted(self) -> PeftModel:
        """The source with its adapter active: the teacher. Its adapter can be disabled."""
        return self.given.model

    @property
    def kernels(self) -> Mapping[str, LoraKernel]:
        """The kernel of each source place that can be carried over."""
        return self.given.kernels

    def asked(self) -> Card:
        """What the adapter's card says it is asked; nothing of an adapter in memory."""
        return distributed.on_main_process(partial(read_card, *self.card)) if self.card else Card()

    @property
    def identity(self) -> str:
        """Tells pairs apart: the models' weights, the shared vocabulary, the adapter's options and its kernels'
        ranks.
        """
        ids = (self.vocabulary.source_ids, self.vocabulary.target_ids)
        return f"{fingerprint(self.adapted, self.target, extra=ids)} {self.given.identity}"


def map_kernels(
    places: Iterable[str], source: PreTrainedModel, target: PreTrainedModel, pairing: Pairing
) -> ModuleMap:
    """Where kernels land by the options, by depth in proportion where that is decided by similarity, later.

    Args:
        places: Source places with kernels.
        source, target: The models, or their skeletons.
        pairing (`Pairing`): The options.

    Raises:
        ValueError: If a map does not fit the models, or nothing has a place.
    """
    depth_map = "proportional" if pairing.depth_map == "similarity" else pairing.depth_map
    layers = map_layers(layer_count(source), layer_count(target), depth_map)
    return map_modules(places, target, layers, pairing.module_map, source)


def named_source(source: Any, adapter: Any, pairing: Pairing) -> tuple[Any, Pairing]:
    """The source, or the one that an adapter on disk or on the hub names, with the options for it.

    Raises:
        ValueError, OSError: If the adapter does not say, or names what cannot be read.
    """
    if source is not None or not isinstance(adapter, (str, Path)):
        return source, pairing
    named, revision = distributed.on_main_process(partial(base_of, adapter, pairing.adapter_revision))
    revision = pairing.source_revision or revision
    try:
        check_model(named, "source", revision)
    except (OSError, ValueError) as error:
        raise type(error)(
            f"{str(error).rstrip('.')} (it is named in the adapter_config.json of '{without_secrets(adapter)}'; what "
            "is passed as `source`, and as `source_revision`, goes before)."
        ) from error
    return named, replace(pairing, source_revision=revision)


def check_pair(
    source: Any,
    adapters: Sequence[Any],
    target: Any,
    pairing: Pairing,
    then: Callable[..., Any] = map_kernels,
    max_length: int | None = None,
) -> None:
    """What the files of the models and adapters tell before one of them is loaded.

    Args:
        source, adapters, target, pairing: As in `open_pair`, with any number of adapters.
        then: Refuses what cannot be done with an adapter, as `map_kernels`, whose arguments it is given; models that
            are not loaded yet are skeletons.
        max_length (`int`, *optional*): Most tokens of a text, where texts are read.

    Raises:
        ValueError, OSError: As `open_pair`.
    """
    for adapter in adapters:
        if isinstance(adapter, torch.nn.Module):
            check_adapter(adapter)
    source, pairing = named_source(source, adapters[0] if adapters else None, pairing)
    if source is not None or not any(isinstance(adapter, PeftModel) for adapter in adapters):
        check_model(source, "source", pairing.source_revision)
    there = skeleton_of(target, "target", pairing.target_revision)
    for adapter in adapters:
        if not isinstance(adapter, torch.nn.Module):
            check_adapter(adapter, pairing.adapter_revision)

    def check(places: list[str], here: PreTrainedModel) -> None:
        check_positions(here, "source", max_length)
        if there is not None:
            check_positions(there, "target", max_length)
            then(places, here, there, pairing)

    for adapter in adapters or [None]:
        try:
            check_source(source, adapter, pairing, check)
        except ValueError as error:
            if len(adapters) < 2 or not str(error).endswith("as `source`."):
                raise
            raise ValueError(f"{str(error)[:-1]}, with it alone: adapters in a list are all on one source.") from error
    if len(adapters) > 1:  # whose models are loaded before pairs are opened
        for adapter in adapters:
            _open_tokenizers(source, adapter, target, pairing)


def check_source(
    source: Any, adapter: Any, pairing: Pairing, then: Callable[[list[str], PreTrainedModel], Any] = lambda *_: None
) -> None:
    """What the files of a source and an adapter for it tell before the source is loaded.

    Args:
        source, adapter, pairing: As in `open_pair`.
        then: Is given the places that kernels come from, and the source, a skeleton if it is not loaded yet. Without
            an adapter, or with a model that is loaded, the places are all there are.

    Raises:
        ValueError, OSError: As `open_pair`, and what `then` raises.
    """
    with warnings.catch_warnings(), suppress(NotImplementedError):  # SHiRA looks at weights: loading it tells more
        warnings.simplefilter("ignore")  # it is loaded once more
        if isinstance(adapter, PeftModel):
            base = adapter.get_base_model()
        elif (base := skeleton_of(source, "source", pairing.source_revision)) is None:
            return
        elif adapter is not None and base.device.type == "meta":
            with planned_source(base, adapter, pairing.adapter_revision, pairing.source_rank) as (read, *_):
                then(list(read.kernels), base)
                return
        elif adapter is not None:
            config = read_adapter_config(adapter, pairing.adapter_revision)
            check_on(base, adapter, pairing.adapter_revision, config)
            if getattr(config, "layer_replication", None):  # with which the source will have other layers
                return
        then(linear_layers(base), base)


@contextmanager
def open_pair(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel | None,
    target: str | Path | PreTrainedModel,
    pairing: Pairing | None = None,
    *,
    shard: bool = False,
) -> Iterator[Pair]:
    """Load and align a pair; afterwards both models are as they were. Errors as in `translate`.

    Args:
        source, adapter, target: As in `translate`. Without an adapter (`None`) every linear layer of the source is
            mapped.
        pairing (`Pairing`, *optional*): How they are loaded and aligned.
        shard (`bool`): Whether the models are sharded over the processes, see `models.sharding`.
    """
    chosen = pairing or Pairing()
    device = distributed.init(chosen.device)
    source, chosen = named_source(source, adapter, chosen)
    source_device = distributed.resolve_source_device(chosen.source_device, device)
    if shard and any(isinstance(model, torch.nn.Module) for model in (source, adapter, target)):
        raise ValueError(
            "FSDP and ZeRO-3 shard models for good, so they take none that are loaded: pass hub ids or folders."
        )
    on_source = None
    reached = isinstance(adapter, PeftModel) or check_model(source, "source", chosen.source_revision) is not None
    # Before gigabytes are loaded; of a source out of reach after, because that is told as a model.
    tokenizers = _open_tokenizers(source, adapter, target, chosen) if reached else None
    with ExitStack() as stack:
        stack.enter_context(distributed.hide_launcher_settings())
        if adapter is None:
            load = partial(load_model, source, "source", revision=chosen.source_revision)
        else:
            load = partial(
                load_source, source, adapter, revision=chosen.source_revision, adapter_revision=chosen.adapter_revision
            )
        adapt = partial(
            adapted_source, adapter=adapter, revision=chosen.adapter_revision, source_rank=chosen.source_rank
        )
        load_target = partial(load_model, target, "target", revision=chosen.target_revision)
        if shard:
            dtype = chosen.dtype or default_dtype(device)
            load, load_target = partial(load, dtype=dtype), partial(load_target, dtype=dtype)
            source, target, on_source = stack.enter_context(sharding.open_sharded(load, load_target, adapt, device))
        else:
            source = load(device=source_device, dtype=chosen.dtype)
        if source is target:
            raise ValueError("`source` and `target` are the same object: load the model twice.")
        # A PeftModel as `adapter` is its source's wrapper: its own modes are restored too.
        stack.enter_context(untouched(adapter if isinstance(adapter, PeftModel) else source))
        stack.enter_context(moved(source, source_device))
        # Before the target is loaded, because only the source's weights tell some of what cannot be translated.
        if adapter is not None and on_source is None:
            on_source = stack.enter_context(adapt(source))
        if not shard:
            target = load_target(device=device, dtype=chosen.dtype)
        tokenizers = tokenizers or _open_tokenizers(source, adapter, target, chosen)
        stack.enter_context(untouched(target))
        stack.enter_context(moved(target, device))
        modules = map_kernels(on_source.kernels if on_source else linear_layers(source), source, target, chosen)
        vocabulary = shared_vocabulary(*tokenizers, *(_rows(model) for model in (source, target)))
        card = (adapter, chosen.adapter_revision) if isinstance(adapter, (str, Path)) else None
        yield Pair(source, on_source, target, tokenizers, modules, vocabulary, device, chosen.source_revision, card)


def source_tokenizer(source: Any, adapter: Any, pairing: Pairing) -> PreTrainedTokenizerBase:
    """The one given, or the adapter's own, or the source's.

    Args:
        source, adapter, pairing: As in `open_pair`; the source may be loaded later.

    Raises:
        ValueError, OSError: As `load_tokenizer`.
    """
    own = None
    if isinstance(adapter, PeftModel):
        source = adapter.get_base_model()
    elif adapter is not None and pairing.source_tokenizer is None:
        own = adapter_tokenizer(adapter, source, pairing.adapter_revision, pairing.source_revision)
    return load_tokenizer(own or pairing.source_tokenizer, source, "source", pairing.source_revision)


def _open_tokenizers(
    source: Any, adapter: Any, target: Any, pairing: Pairing
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Those of source and target, held against the models, which may be loaded later."""
    tokenizers = (
        source_tokenizer(source, adapter, pairing),
        load_tokenizer(pairing.target_tokenizer, target, "target", pairing.target_revision),
    )
    for tokenizer, which in zip(tokenizers, ("source", "target")):
        check_offsets(tokenizer, which)
    return tokenizers


def _rows(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[0]
