"""Load the source with its adapter, refuse what cannot be translated, and give the source back as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..models import as_peft_reads, load_model, load_on_skeleton, unload_adapters
from ..utils import one_line, read_adapter_config, read_weights_header, without_secrets
from .kernels import SourceAdapter, check_rank, read_adapter
from .mismatch import deeper, disagreement, misplaced, refused_by_peft
from .names import Match
from .renamed import Readable, readable


_NAME = "peft_cast_source"
_PREFIX = "base_model.model."
# Methods whose effect is no fixed change of weights, and that cannot be told by trying.
_NO_DELTA = {"XLORA": "mixes other adapters token by token", "POLY": "needs task ids"}


def load_source(
    source: str | Path | PreTrainedModel | None,
    adapter: str | Path | PeftModel,
    device: torch.device,
    revision: str | None = None,
    adapter_revision: str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The source model: the given one, the base of an adapter that is a PeftModel, or the one the adapter names.

    Raises:
        ValueError: If `adapter` is a PeftModel on another model than `source`, or its configuration cannot be read.
        OSError: If the model cannot be found.
    """
    if isinstance(adapter, PeftModel):
        model = adapter.get_base_model()
        if isinstance(source, nn.Module) and source is not model:
            raise ValueError("`adapter` is a PeftModel on another model object than `source`: pass `source=None`.")
        return model
    if source is None:
        source = read_adapter_config(adapter, adapter_revision).base_model_name_or_path
    return load_model(source, "source", device, revision, dtype)


@contextmanager
def adapted_source(
    source: PreTrainedModel,
    adapter: str | Path | PeftModel,
    revision: str | None = None,
    source_rank: int | float | None = None,
) -> Iterator[SourceAdapter]:
    """The source model with its adapter active, and the adapter's kernels; afterwards a loaded `source` is as it was.

    Some adapters change the base model's own weights when they are loaded (trained biases, PiSSA's and OLoRA's
    residual, KaSA's truncation). They are put back at the end, and under `disable_adapter()`, where PEFT leaves them
    changed.

    Args:
        source: The model.
        adapter: Hub id, folder, or a PeftModel on `source`.
        revision: Hub revision of the adapter.
        source_rank: How far delta weights that are no plain LoRA are cut, see `translate`.

    Raises:
        ValueError: If the adapter cannot be read, does not fit the model, or nothing of it can be carried over.
    """
    check_rank(source_rank)
    if isinstance(adapter, PeftModel):
        _check_config(adapter.active_peft_config, "The adapter", in_memory=True)
        adapter.eval()
        yield read_adapter(adapter, {}, source_rank)
        return
    config = read_adapter_config(adapter, revision)
    _check_config(config, f"The adapter '{without_secrets(adapter)}'")
    match = Match(read_weights_header(adapter, revision), source, config)
    if (why := misplaced(match) or deeper(match)) is not None:
        raise _no_match(adapter, source, why)
    with readable(adapter, revision, match) as file:
        shapes = {name.removeprefix(_PREFIX): info.shape for name, info in file.header.items()}
        _check_vocabulary(source, adapter, shapes)
        parameters = dict(source.named_parameters(remove_duplicate=False))
        changes = _changes_weights(config)
        names = parameters if changes else {_base_name(key) for key in shapes} & parameters.keys()
        kept = {name: parameters[name].detach().clone() for name in names}
        lists = [(m, n, child) for m in source.modules() for n, child in m.named_children() if _is_list(child)]
        try:
            model = _load(source, adapter, file, match, parameters)
            parameters = {
                name: parameters[name] for name in kept
            }  # the others may be spread over processes and given up here
            changed = {n: v for n, v in kept.items() if v.is_meta or not torch.equal(parameters[n], v)}
            if changed:
                model.disable_adapter = _disabling(model, {parameters[name]: value for name, value in changed.items()})
            read = read_adapter(model.eval(), changed, source_rank)
            yield dataclasses.replace(read, renamed=file.renamed)
        finally:
            unload_adapters(source)
            for name, value in kept.items():
                parameters[name].data = value
            for parent, name, child in lists:  # layer_replication makes a longer list
                setattr(parent, name, child)


def _load(
    source: PreTrainedModel, adapter: str | Path, file: Readable, match: Match, own: Mapping[str, nn.Parameter]
) -> PeftModel:
    try:
        if source.device.type == "meta":
            model = load_on_skeleton(source, file.place, _NAME, file.revision)
        else:
            model = PeftModel.from_pretrained(source, file.place, adapter_name=_NAME, revision=file.revision)
        why = _other_keys(model, own, file, match)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # PEFT raises whatever a wrong configuration leads to
        raise _no_match(adapter, source, refused_by_peft(match, one_line(error))) from error
    if why is not None:
        raise _no_match(adapter, source, why)
    return model


def _no_match(adapter: str | Path, source: PreTrainedModel, why: str) -> ValueError:
    name = source.name_or_path or type(source).__name__
    return ValueError(without_secrets(f"The adapter '{adapter}' does not fit the source model '{name}': {why}."))


def _disabling(model: PeftModel, originals: Mapping[nn.Parameter, torch.Tensor]):
    """`model.disable_adapter` that also has the base model's own weights back within the context."""
    disable = model.disable_adapter

    @contextmanager
    def disable_adapter() -> Iterator[None]:
        changed = {parameter: parameter.data for parameter in originals}
        with disable():
            for parameter, value in originals.items():
                parameter.data = value
            try:
                yield
            finally:
                for parameter, value in changed.items():
                    parameter.data = value

    return disable_adapter


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def _check_config(config: PeftConfig, name: str, in_memory: bool = False) -> None:
    """Refuse by its configuration what cannot be translated."""
    kind = config.peft_type.value
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"{name} is of type {kind}, which adds virtual tokens and changes no weight, so there is nothing to carry "
            "over: only adapters that change linear layers can be translated."
        )
    if kind in _NO_DELTA:
        raise ValueError(
            f"{name} is of type {kind}, which {_NO_DELTA[kind]}, so it is no fixed change of weights and cannot be "
            "translated: translate one plain adapter at a time."
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"{name} was trained for the task type {config.task_type}, whose head a causal language model has not: "
            "only adapters of causal language models can be translated."
        )
    start = _start(config)
    lost = start.startswith(("pissa_niter", "corda", "lora_ga", "loftq"))
    if lost or (in_memory and _changes_weights(config)):
        remedy = (
            "save it with `save_pretrained(folder, path_initial_model_for_weight_conversion=...)`, which makes it a "
            "plain LoRA, or set `init_lora_weights` to true in its configuration and pass the changed model as "
            "`source`"
            if lost
            else "save it with `save_pretrained(folder)` and pass the folder"
        )
        raise ValueError(
            f"{name} is relative to base weights that its initialization ({start or 'kasa'}) changed, and what they "
            f"were before is not known here: {remedy}."
        )


def _start(config: PeftConfig) -> str:
    start = getattr(config, "init_lora_weights", None)
    return start.lower() if isinstance(start, str) else ""


def _changes_weights(config: PeftConfig) -> bool:
    """Whether PEFT changes the base weights when it puts the adapter on a model, in a way that is always the same."""
    return _start(config) in ("pissa", "olora") or bool(getattr(config, "kasa_config", None))


def _check_vocabulary(source: PreTrainedModel, adapter: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Embeddings or a head in the adapter's file must have the model's number of rows."""
    for part in (source.get_input_embeddings(), source.get_output_embeddings()):
        name = next((name for name, module in source.named_modules() if module is part), None)
        shape = shapes.get(f"{name}.weight") or shapes.get(f"{name}.base_layer.weight")
        if shape and shape[0] != part.weight.shape[0]:
            raise ValueError(
                f"The adapter '{without_secrets(adapter)}' was trained with a vocabulary of {shape[0]} tokens and the "
                f"source model has {part.weight.shape[0]}: load the model, call `resize_token_embeddings({shape[0]})` "
                "and pass it with the adapter's tokenizer as `source_tokenizer`."
            )


def _base_name(key: str) -> str:
    """The name that a tensor in the file has in the base model, if it is one of the base model's own."""
    return key.replace(".base_layer.", ".")


def _other_keys(model: PeftModel, own: Mapping[str, nn.Parameter], file: Readable, match: Match) -> str | None:
    """PEFT ignores weights in the file that the model has no place for; here they mean that the two do not match."""
    expected = set(get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False))

    def found(keys: Iterable[str]) -> set[str]:
        return {key for key in keys if key in expected or _base_name(key.removeprefix(_PREFIX)) not in own}

    if (keys := found(file.header)) == expected:
        return None
    shapes = {name: info.shape for name, info in file.header.items()}
    read = found(as_peft_reads(model, model.peft_config[_NAME], shapes, _NAME))
    return None if read == expected else disagreement(match, expected, read if read & expected else keys)
