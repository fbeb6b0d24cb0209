"""A model pair made ready for a translation: loaded, aligned, with the text that both read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import ranks, shards
from .align import (
    AlignedPair,
    ModuleMap,
    SharedVocabulary,
    layer_pairs,
    layer_paths,
    linear_cka,
    linear_layers,
    map_layers,
    map_modules,
    monotone_map,
    shared_vocabulary,
)
from .files import optional
from .fit import (
    ClosedForm,
    TeacherMemory,
    TeacherSettings,
    collate_pairs,
    fingerprint,
    fit_closed_form,
    load_closed_form,
    save_closed_form,
)
from .fit.batches import ANCHOR_EVERY, anchor_length, side_of
from .fit.capture import layer_outputs
from .install import check_shapes
from .models import (
    LoraKernel,
    default_dtype,
    layer_count,
    load_model,
    load_tokenizer,
    logits_at,
    moved,
    untouched,
)
from .source import SourceAdapter, adapted_source, load_source
from .text import C4, SelfWritten, TextSample, align_samples, default_text, is_written, read_text, write_texts


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
    """

    source: PreTrainedModel
    adapter: SourceAdapter | None
    target: PreTrainedModel
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    modules: ModuleMap
    vocabulary: SharedVocabulary
    device: torch.device

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


@dataclass(frozen=True)
class PairTexts:
    """Aligned texts by what they are for.

    Args:
        train: Read by the refinement.
        held_out: Kept out of it to measure the distance to the teacher. With few prompts the two may share prompts, never
            answers.
        fit: Read by the closed form.
        anchors: General text on which the target shall stay as it is; empty when it may move.
        metrics: Counts and shares, JSON-ready.
        answers: What was written after a prompt to be trained on, as text.
    """

    train: list[AlignedPair]
    held_out: list[AlignedPair]
    fit: list[AlignedPair]
    anchors: list[AlignedPair]
    metrics: dict[str, Any]
    answers: list[TextSample] = field(default_factory=list)


@contextmanager
def open_pair(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel | None,
    target: str | Path | PreTrainedModel,
    *,
    depth_map: str | Mapping[int, int] = "proportional",
    module_map: Mapping[str, str] | None = None,
    source_tokenizer: PreTrainedTokenizerBase | str | None = None,
    target_tokenizer: PreTrainedTokenizerBase | str | None = None,
    source_revision: str | None = None,
    adapter_revision: str | None = None,
    target_revision: str | None = None,
    source_rank: int | float | None = None,
    device: str | torch.device | None = None,
    source_device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    spread: bool = False,
) -> Iterator[Pair]:
    """Load and align a pair; afterwards both models are as they were. Arguments and errors as in `translate`.

    Without an `adapter` (`None`) every linear layer of the source is mapped. With `spread` the models are spread over the
    processes, see `shards`.
    """
    device = ranks.begin(device)
    of_source = ranks.device_of_source(source_device, device)
    if spread and any(isinstance(model, torch.nn.Module) for model in (source, adapter, target)):
        raise ValueError(
            "FSDP and ZeRO-3 spread models for good, so they take none that are loaded: pass hub ids or folders."
        )
    on_source = None
    with ExitStack() as stack:
        stack.enter_context(ranks.unknown_to_others())
        if adapter is None:
            load = partial(load_model, source, "source", revision=source_revision)
        else:
            load = partial(load_source, source, adapter, revision=source_revision, adapter_revision=adapter_revision)
        adapt = partial(adapted_source, adapter=adapter, revision=adapter_revision, source_rank=source_rank)
        load_target = partial(load_model, target, "target", revision=target_revision)
        if spread:
            dtype = dtype or default_dtype(device)
            load, load_target = partial(load, dtype=dtype), partial(load_target, dtype=dtype)
            source, target, on_source = stack.enter_context(shards.opened(load, load_target, adapt, device))
        else:
            source, target = load(device=of_source, dtype=dtype), load_target(device=device, dtype=dtype)
        if source is target:
            raise ValueError("`source` and `target` are the same object: load the model twice.")
        tokenizers = (
            load_tokenizer(source_tokenizer, source, "source", source_revision),
            load_tokenizer(target_tokenizer, target, "target", target_revision),
        )
        # A PeftModel as `adapter` is its source's wrapper: its own modes are restored too.
        stack.enter_context(untouched(adapter if isinstance(adapter, PeftModel) else source, target))
        stack.enter_context(moved(source, of_source))
        stack.enter_context(moved(target, device))
        if adapter is not None and on_source is None:
            on_source = stack.enter_context(adapt(source))
        proportional = "proportional" if depth_map == "similarity" else depth_map
        layers = map_layers(layer_count(source), layer_count(target), proportional)
        adapted = on_source.kernels if on_source else linear_layers(source)
        modules = map_modules(adapted, target, layers, module_map, source)
        vocabulary = shared_vocabulary(*tokenizers, *(_rows(model) for model in (source, target)))
        yield Pair(source, on_source, target, tokenizers, modules, vocabulary, device)


def map_by_similarity(
    pair: Pair, texts: Sequence[AlignedPair], module_map: Mapping[str, str] | None = None, positions: int = 1500
) -> Pair:
    """The pair with its kernels moved to the target layers that resemble their own most.

    Args:
        pair (`Pair`): The models.
        texts: General texts.
        module_map: As in `translate`.
        positions (`int`): About how many aligned positions to compare the layers at.
    """
    similarity, _ = layer_similarity(pair, texts, positions)
    layers = monotone_map(ranks.same(similarity))
    return replace(pair, modules=map_modules(pair.kernels, pair.target, layers, module_map, pair.source))


@torch.no_grad()
def layer_similarity(pair: Pair, texts: Sequence[AlignedPair], positions: int) -> tuple[torch.Tensor, int]:
    """Linear CKA of every source layer with every target layer, (source layers, target layers), of the plain models.

    Args:
        pair (`Pair`): The models. An adapter that is already on the target must be disabled.
        texts: General texts.
        positions (`int`): About how many aligned positions to compare the layers at; less than twice as many are used.

    Returns:
        The similarities and the number of positions.
    """
    chosen, count = [], 0
    for text in texts:
        if count < positions:
            chosen.append(text)
            count += len(text.target_positions)
    batch = collate_pairs(chosen)
    step = max(1, count // positions)  # a single long text may hold far more than are wanted
    states = {}
    with pair.adapted.disable_adapter():
        for side, model in (("source", pair.source), ("target", pair.target)):
            inputs, rows, at = side_of(batch, side, model.device)
            with logits_at(model, rows[:1], at[:1]), layer_outputs(model, layer_paths(model)) as outputs:
                model(**inputs)
            states[side] = [outputs[path][rows[::step], at[::step]].cpu() for path in layer_paths(model)]
    return linear_cka(states["source"], states["target"]), len(states["source"][0])


def fitted(
    pair: Pair,
    texts: Sequence[AlignedPair],
    cache_dir: str | Path | None,
    *,
    progress: Callable,
    also: str = "",
    **options: Any,
) -> ClosedForm:
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
        key = f"{_identity(pair)} {pair.modules.kernels} {texts} {options}{also}"
        file = Path(cache_dir) / f"closed_form_{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        known = ranks.shared(lambda: _known(file, pair, bool(options.get("hidden"))))
        if known is not None:
            return known
    fit = fit_closed_form(
        pair.source, pair.target, texts, pair.vocabulary, pair.kernels, pair.modules, progress=progress, **options
    )
    return ranks.shared(lambda: _kept(fit, file)) if file is not None else fit


def _known(file: Path, pair: Pair, hidden: bool) -> ClosedForm | None:
    """The closed form in the cache; `None` if it is not there, broken, or another pair's."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        fit = load_closed_form(file)
        if _belongs_to(fit, pair, hidden):
            return fit
    return None


def _kept(fit: ClosedForm, file: Path) -> ClosedForm:
    """The closed form as a later run will read it: another order of the numbers in memory shows in the last digits."""
    with optional("The closed form"):
        save_closed_form(fit, file)
        return load_closed_form(file)
    return fit


def _belongs_to(fit: ClosedForm, pair: Pair, hidden: bool) -> bool:
    """Whether a closed form from the cache is one of this pair, whatever its file is called."""
    check_shapes(pair.target, pair.kernels, fit)
    widths = [model.config.get_text_config().hidden_size for model in (pair.target, pair.source)]
    kernels = {name: [f.source_module for f in fits] for name, fits in fit.kernels.items()}
    return (
        kernels == pair.modules.kernels
        and set(fit.hidden_maps) == (set(layer_pairs(pair.modules)) if hidden else set())
        and all(weight.shape == (widths[0], widths[1] + 1) for weight in fit.hidden_maps.values())
    )


def teacher_memory(pair: Pair, settings: TeacherSettings, folder: str | Path | None) -> TeacherMemory | None:
    """Where the teacher's predictions are kept, between runs too if there is a folder; `None` if they are not kept.

    To be made before the target gets its adapter: the files' names tell models, adapters and settings apart.
    """
    if not settings.top_k:
        return None
    identity = f"{_identity(pair)} {settings.target_share}" if folder is not None else ""
    return TeacherMemory(settings.top_k, settings.temperature, folder, identity, vocabulary=len(pair.vocabulary))


def _identity(pair: Pair) -> str:
    """Tells pairs apart: the models' weights, the shared vocabulary, the adapter's options and its kernels' ranks."""
    ids = (pair.vocabulary.source_ids, pair.vocabulary.target_ids)
    return f"{fingerprint(pair.adapted, pair.target, extra=ids)} {pair.given.identity}"


def _rows(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no language-modelling head: pass a causal language model.")
    return head.weight.shape[0]


def read_texts(
    pair: Pair,
    text: Any,
    fit_text: Any = None,
    *,
    train: int,
    held_out: int,
    fit: int,
    anchored: bool = False,
    max_length: int = 256,
    seed: int = 0,
    bar: Callable = lambda items, **_: items,
    translated: PeftModel | None = None,
    keep: Callable[[str, Callable[[], list[str]]], list[str]] = lambda key, write: write(),
) -> PairTexts:
    """Read, write and align the text of a translation.

    Args:
        pair (`Pair`): The models.
        text: What is imitated on: anything `translate(text=...)` takes.
        fit_text: General text for the closed form and the anchors. When `None`: C4 if the models write `text` themselves,
            else `text` serves the closed form too and there are no anchors.
        train, held_out, fit (`int`): The most texts of each kind.
        anchored (`bool`): Whether to read anchors: as many as the texts to train on can use, at most 512. They follow the
            texts of the closed form; if the text ends before, they are the same.
        max_length (`int`): Most tokens per text and model.
        seed (`int`): Seed of what the models write.
        bar: Wrapper around batches that shows progress, e.g. `tqdm`.
        translated: The target with the adapter to go on from, which writes on-policy text.
        keep: Where written batches are kept, see `write_texts`.

    Raises:
        ValueError: If too little of the text is usable.
    """

    def write(spec: SelfWritten, limit: int):
        if spec.on_policy and translated is None:
            raise ValueError("On-policy text is written by a translated model: pass its adapter as `start`.")
        progress = partial(bar, desc="writing text")
        writer = translated if spec.on_policy else pair.adapted
        return write_texts(writer, *pair.tokenizers, spec, limit, seed, translated or pair.target, progress, keep)

    align = partial(align_samples, pair.tokenizers, max_length=max_length)
    if text is None:
        text = default_text(pair.tokenizers[0])
    if fit_text is None and is_written(text):
        fit_text = C4
    wanted = train if fit_text is not None else max(train, fit)
    anchors = min(512, max(1, train // ANCHOR_EVERY)) if anchored else 0
    # First: whether it can be reached is known before minutes of writing.
    general = read_text(fit_text, fit + anchors + held_out, write) if fit_text is not None else []
    # The same text twice says nothing new, and must not be trained on and measured with.
    samples = read_text(text, wanted + held_out, write)
    pairs = list(dict.fromkeys(align(samples)))
    if len(pairs) < 3:
        raise ValueError(
            f"The text gives {len(pairs)} usable samples, at least 3 are needed (to train on and to measure with): "
            f"pass more or longer text, or a larger `max_length` than {max_length}."
        )
    kept_out = how_many_held_out(pairs, held_out)
    evaluation, training = pairs[:kept_out], pairs[kept_out:]
    seen = set(evaluation)
    fitting = [pair for pair in align(general) if pair not in seen][:fit] if fit_text is not None else training[:fit]
    usable = min(anchors, -(-len(training) // ANCHOR_EVERY))
    rest = align((general[fit:] or general)[:usable], max_length=anchor_length(max_length)) if usable else []
    if len(fitting) < 2:
        raise ValueError(
            f"`{'text' if fit_text is None else 'fit_text'}` gives {len(fitting)} usable samples for the closed form, at "
            "least 2 are needed: pass more or longer text."
        )
    positions, tokens = sum(len(p.target_positions) for p in pairs), sum(len(p.target_ids) for p in pairs)
    metrics = {
        "train": len(training), "held_out": len(evaluation), "closed_form": len(fitting), "anchors": len(rest),
        "target_tokens": tokens, "aligned_positions": positions,
    }  # fmt: skip
    answers = [sample for sample in samples[kept_out:] if sample.target_prompt]
    return PairTexts(training, evaluation, fitting, rest, metrics, answers)


def how_many_held_out(pairs: Sequence[AlignedPair], wanted: int) -> int:
    """Of how many texts the distance to the teacher is measured: those wanted, a third at most, and one in any case."""
    return min(wanted, len(pairs) // 3 or 1)
