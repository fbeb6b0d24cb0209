"""Load the source with its adapter, refuse what cannot be translated, and give the source back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..models import load_model, load_on_skeleton, unload_adapters
from ..tuner.checks import TensorInfo
from ..utils import check_weights, one_line, read_adapter_config, without_secrets
from .kernels import SourceAdapter, check_rank, read_adapter


_NAME = "peft_cast_source"
PREFIX = "base_model.model."
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
        check_config(adapter.active_peft_config, "The adapter", in_memory=True)
        adapter.eval()
        yield read_adapter(adapter, {}, source_rank)
        return
    config = read_adapter_config(adapter, revision)
    check_config(config, f"The adapter '{without_secrets(adapter)}'")
    header = check_weights(adapter, config, revision, source)
    shapes = {name.removeprefix(PREFIX): info.shape for name, info in header.items()}
    check_vocabulary(source, adapter, shapes)
    parameters = dict(source.named_parameters(remove_duplicate=False))
    names = parameters if changes_weights(config) else {base_name(key) for key in shapes} & parameters.keys()
    kept = {name: parameters[name].detach().clone() for name in names}
    skeleton = source.device.type == "meta"
    lists = [(m, n, child) for m in source.modules() for n, child in m.named_children() if _is_list(child)]
    try:
        model = _load(source, adapter, config, revision, parameters, header)
        parameters = {
            name: parameters[name] for name in kept
        }  # the others may be spread over processes and given up here
        changed = {n: v for n, v in kept.items() if v.is_meta or not torch.equal(parameters[n], v)}
        if changed and not skeleton:  # whose weights have no values to put back
            model.disable_adapter = _disabling(model, {parameters[name]: value for name, value in changed.items()})
        yield read_adapter(model.eval(), changed, source_rank)
    finally:
        unload_adapters(source)
        for name, value in kept.items():
            parameters[name].data = value
        for parent, name, child in lists:  # layer_replication makes a longer list
            setattr(parent, name, child)


def _load(
    source: PreTrainedModel,
    adapter: str | Path,
    config: PeftConfig,
    revision: str | None,
    own: Mapping[str, nn.Parameter],
    header: Mapping[str, TensorInfo],
) -> PeftModel:
    try:
        if source.device.type == "meta":
            model = load_on_skeleton(source, adapter, _NAME, revision)
        else:
            model = PeftModel.from_pretrained(source, str(adapter), adapter_name=_NAME, revision=revision)
        _check_same_keys(model, own, header)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # PEFT raises whatever a wrong configuration leads to
        named = config.base_model_name_or_path
        remedy = f"it was trained on '{named}'" if named else "pass the model that it was trained on as `source`"
        raise ValueError(
            without_secrets(
                f"The adapter '{adapter}' does not fit the source model '{source.name_or_path}'; {remedy}. "
                f"({one_line(error)})"
            )
        ) from error
    return model


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


def check_config(config: PeftConfig, name: str, in_memory: bool = False) -> None:
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
    if lost or (in_memory and changes_weights(config)):
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


def changes_weights(config: PeftConfig) -> bool:
    """Whether PEFT changes the base weights when it puts the adapter on a model, in a way that is always the same."""
    return _start(config) in ("pissa", "olora") or bool(getattr(config, "kasa_config", None))


def check_vocabulary(source: PreTrainedModel, adapter: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
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


def base_name(key: str) -> str:
    """The name that a tensor in the file has in the base model, if it is one of the base model's own."""
    return key.replace(".base_layer.", ".")


def _check_same_keys(model: PeftModel, own: Mapping[str, nn.Parameter], header: Mapping[str, TensorInfo]) -> None:
    """PEFT ignores weights in the file that the model has no place for; here they mean the wrong model."""
    in_model = set(get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False))
    in_file = {key for key in header if key in in_model or base_name(key.removeprefix(PREFIX)) not in own}
    if in_file != in_model:
        odd = sorted(in_file ^ in_model)
        where = "file, not in the model" if odd[0] in in_file else "model, not in the file"
        raise ValueError(f"'{odd[0][:200]}' is in the {where}; {len(odd)} such tensors")
