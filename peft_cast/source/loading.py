"""Load the source with its adapter, refuse what cannot be translated, and give the source back as it was."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..models import (
    as_peft_reads,
    as_skeleton,
    check_loaded,
    check_own_weights,
    check_unwrapped,
    load_model,
    load_on_skeleton,
    unload_adapters,
    without_advice,
)
from ..tuner.checks import TensorInfo, check_finite, shown
from ..utils import (
    adapter_folder,
    hub_revision,
    read_adapter_config,
    read_weights_header,
    why_no_model,
    without_secrets,
)
from .disagreement import other_masks, other_shape, other_tokens, warn_of_base
from .files import holdings_of, of_another_file, unusable
from .idle import idle
from .kernels import SourceAdapter, nothing_carried, read_adapter, saved_dtype
from .kinds import ELSEWHERE, MISNAMED, PREFIX, changes_weights, kind_of, refusal, refusal_to_run, type_of
from .mismatch import deeper, disagreement, misplaced, refused_by_peft, resized
from .names import Match
from .renamed import Readable, readable
from .switching import disabling, unmerged


_NAME = "peft_cast_source"


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
    check_adapter(adapter, adapter_revision)
    if isinstance(adapter, PeftModel):
        model = adapter.get_base_model()
        if isinstance(source, nn.Module) and source is not model:
            raise ValueError("`adapter` is a PeftModel on another model object than `source`: pass `source=None`.")
        check_loaded(model, "source")
        named = model.name_or_path
        if isinstance(source, (str, Path)) and named and Path(source).resolve() != Path(named).resolve():
            raise ValueError(
                without_secrets(
                    f"`adapter` is a PeftModel on '{named}', which is not `source`, '{source}': pass `source=None`."
                )
            )
        check_own_weights(model, "source")
        return model
    if source is None:
        source, named = base_of(adapter, adapter_revision)
        revision = revision or named
    return load_model(source, "source", device, revision, dtype)


def base_of(adapter: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """The model that an adapter says it was trained on, and the revision of it.

    Raises:
        ValueError: If it does not say, or names a folder that is not here.
    """
    config = read_adapter_config(adapter, revision)
    name, named = config.base_model_name_or_path, f"The adapter '{without_secrets(adapter)}'"
    if not name:
        raise ValueError(f"{named} does not say which model it was trained on: pass it as `source`.")
    if (why := why_no_model(name)) is not None:
        raise ValueError(without_secrets(f"{named} names its model '{name}', but {why}: pass the model as `source`."))
    return name, hub_revision(name, config.revision)


def check_adapter(adapter: Any, revision: str | None = None) -> None:
    """Refuse, before gigabytes are loaded, what the adapter's own files tell.

    Args:
        adapter: Folder, hub id or PeftModel.
        revision (`str`, *optional*): Its hub revision.

    Raises:
        ValueError: If it is no adapter, cannot be translated, or was never trained.
    """
    if isinstance(adapter, PeftModel):
        return _check_in_memory(adapter)
    if isinstance(adapter, nn.Module):
        check_unwrapped(adapter, "adapter")
        raise ValueError(
            f"`adapter` is a model ({type(adapter).__name__}), not an adapter: pass the LoRA's folder or hub id, or a "
            "PeftModel."
        )
    config, named = read_adapter_config(adapter, revision), f"The adapter '{without_secrets(adapter)}'"
    check_config(config, named)
    header = read_weights_header(adapter, revision)
    if (why := unusable(adapter, revision, config, header)) is not None:
        raise ValueError(f"{named} {why}.")
    if type_of(config) in ELSEWHERE and holdings_of(config, header).not_carried:
        raise nothing_of(adapter, config, header)


def nothing_of(adapter: str | Path, config: PeftConfig, header: Mapping[str, TensorInfo]) -> ValueError:
    """`nothing_carried` of an adapter in a file."""
    rest = [(part["module"], part["what"]) for part in holdings_of(config, header).not_carried]
    return nothing_carried(kind_of(config), rest, adapter)


def _check_in_memory(adapter: PeftModel) -> None:
    """The same for an adapter on its model."""
    if len(adapter.active_adapters) != 1:
        raise ValueError(
            f"Exactly one adapter of the source must be active, not {adapter.active_adapters}: call `set_adapter`."
        )
    check_loaded(adapter.get_base_model(), "source")
    config = adapter.active_peft_config
    check_config(config, "The adapter", in_memory=True)
    layers = [layer for layer in adapter.modules() if isinstance(layer, BaseTunerLayer)]
    if not layers:
        raise ValueError(
            "The adapter is no longer on its model, as after `merge_and_unload()`, which put it into the weights: "
            "load it again, or pass its folder."
        )
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "The adapter is disabled, so that it changes nothing: call `adapter.base_model.enable_adapter_layers()` "
            "first."
        )
    state = get_peft_model_state_dict(adapter, adapter_name=adapter.active_adapter, save_embedding_layers=False)
    for name, tensor in state.items():
        try:
            check_finite(name, tensor)
        except ValueError:
            raise ValueError(
                f"The adapter holds NaN or infinite numbers ({shown(name)}), as after a training that diverged: pass "
                "an earlier state of it."
            ) from None
    if (why := idle(config, list(state), state.__getitem__)) is not None:
        raise ValueError(f"The adapter {why}.")


@contextmanager
def adapted_source(
    source: PreTrainedModel,
    adapter: str | Path | PeftModel,
    revision: str | None = None,
    source_rank: int | float | None = None,
    which: str = "source",
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
        which: The argument that the model is passed as, or `BRIDGED`.

    Raises:
        ValueError: If the adapter cannot be read, does not fit the model, or nothing of it can be carried over.
    """
    check_adapter(adapter, revision)
    if isinstance(adapter, PeftModel):
        adapter.eval()
        with unmerged(adapter):
            read = _acting(read_adapter(adapter, {}, source_rank))
            state = get_peft_model_state_dict(
                adapter, adapter_name=adapter.active_adapter, save_embedding_layers=False
            )
            yield dataclasses.replace(read, dtype=saved_dtype(tensor.dtype for tensor in state.values()))
        return
    config = read_adapter_config(adapter, revision)
    with _loaded(source, adapter, revision, config, which) as (model, changed, renamed):
        read = _acting(read_adapter(model, changed, source_rank, adapter), adapter)
        header = read_weights_header(adapter, revision)
        yield dataclasses.replace(read, renamed=renamed, dtype=saved_dtype(info.dtype for info in header.values()))


@contextmanager
def with_adapter(target: PreTrainedModel, adapter: str | Path, revision: str | None = None) -> Iterator[PeftModel]:
    """Within the context a target has an adapter from a folder or the hub, of any kind and in eval mode; afterwards it
    is as it was, its own weights too.

    Raises:
        ValueError: If the adapter cannot be used on this model; the message says why.
    """
    with _loaded(target, adapter, revision, _config_to_run(adapter, revision), "target") as (model, *_):
        yield model


def check_on_target(
    target: str | Path | PreTrainedModel, *adapters: str | Path, target_revision: str | None = None
) -> None:
    """Refuse, before the target is loaded, adapters in folders or on the hub that cannot be put on it.

    Raises:
        ValueError, OSError: As `with_adapter`, and if the target is none.
    """
    base = as_skeleton(target, "target", target_revision)
    for adapter in adapters:
        config = _config_to_run(adapter)
        if base is not None:
            check_on(base, adapter, None, config, "target")


def check_on(
    base: PreTrainedModel, adapter: str | Path, revision: str | None, config: PeftConfig, which: str = "source"
) -> None:
    """Refuse an adapter that does not fit its model, which is passed as `which`: on a skeleton it is put there as it
    will be put on the model, of a loaded model the names are compared.

    Raises:
        ValueError: If they do not go together.
    """
    if base.device.type != "meta":
        matched(adapter, revision, base, config, which)
        return
    with warnings.catch_warnings(), suppress(NotImplementedError):  # SHiRA looks at weights: loading it tells more
        warnings.simplefilter("ignore")  # it is loaded once more
        with _loaded(base, adapter, revision, config, which):
            pass


def _config_to_run(adapter: str | Path, revision: str | None = None) -> PeftConfig:
    config = read_adapter_config(adapter, revision)
    if (why := refusal_to_run(config) or of_another_file(config, read_weights_header(adapter, revision))) is not None:
        raise ValueError(f"The adapter '{without_secrets(adapter)}' {why}.")
    return config


@contextmanager
def _loaded(
    base: PreTrainedModel, adapter: str | Path, revision: str | None, config: PeftConfig, which: str = "source"
) -> Iterator[tuple[PeftModel, dict[str, torch.Tensor], str | None]]:
    """A model with an adapter of its own, what that changed of its weights, and as what its tensors were read."""
    match = matched(adapter, revision, base, config, which)
    if config.task_type in MISNAMED:
        warnings.warn(
            f"The adapter '{without_secrets(adapter)}' names the task type {config.task_type}, but its model is a "
            "decoder: it is read as CAUSAL_LM."
        )
        config.task_type = "CAUSAL_LM"
    warn_of_base(adapter, match)
    with readable(adapter, revision, match) as file:
        parameters = dict(base.named_parameters(remove_duplicate=False))
        names = parameters if changes_weights(config) else _base_names(file.header) & parameters.keys()
        kept = {name: parameters[name].detach().clone() for name in names}
        skeleton = base.device.type == "meta"  # until weights of its own come with the adapter
        lists = [(m, n, child) for m in base.modules() for n, child in m.named_children() if _is_list(child)]
        try:
            model = _load(adapter, file, match, parameters)
            # The others may be spread over processes and given up here.
            parameters = {name: parameters[name] for name in kept}
            changed = {n: v for n, v in kept.items() if v.is_meta or not torch.equal(parameters[n], v)}
            back = {} if skeleton else {parameters[name]: value for name, value in changed.items()}
            if back or getattr(file.config, "bias", "none") != "none":
                model.disable_adapter = disabling(model, back)
            yield model.eval(), changed, file.renamed
        finally:
            unload_adapters(base)
            for name, value in kept.items():
                parameters[name].data = value
            for parent, name, child in lists:  # layer_replication makes a longer list
                setattr(parent, name, child)


def _acting(read: SourceAdapter, where: str | Path | None = None) -> SourceAdapter:
    if not read.has_effect:
        raise nothing_carried(read.kind, read.not_carried, where)
    return read


def _load(adapter: str | Path, file: Readable, match: Match, own: Mapping[str, nn.Parameter]) -> PeftModel:
    source = match.source
    try:
        with without_advice():
            if source.device.type == "meta":
                model = load_on_skeleton(source, file.place, _NAME, file.revision, file.config)
            else:
                folder = str(adapter_folder(file.place, file.revision))
                model = PeftModel.from_pretrained(source, folder, adapter_name=_NAME, config=file.config)
            why = _other_keys(model, own, file, match)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # PEFT raises whatever a wrong configuration leads to
        if (why := refused_by_peft(match, error)) is None:
            raise NotImplementedError("It can be put on a model with weights alone.") from error
        raise no_match(adapter, match, why) from error
    if why is not None:
        raise no_match(adapter, match, why)
    return model


def matched(
    adapter: str | Path, revision: str | None, source: PreTrainedModel, config: PeftConfig, which: str = "source"
) -> Match:
    """The adapter's file beside the modules of its model, which is passed as `which`.

    Raises:
        ValueError: If they do not go together.
    """
    match = Match(read_weights_header(adapter, revision), source, config, which)
    checks = (misplaced, resized, other_shape, other_tokens, other_masks, deeper)
    if (why := next(filter(None, (check(match) for check in checks)), None)) is not None:
        raise no_match(adapter, match, why)
    return match


def no_match(adapter: str | Path, match: Match, why: str) -> ValueError:
    name = match.source.name_or_path or type(match.source).__name__
    return ValueError(
        without_secrets(f"The adapter '{adapter}' does not fit the {match.which} model '{name}': {why}.")
    )


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def check_config(config: PeftConfig, name: str, in_memory: bool = False) -> None:
    """Refuse by its configuration what cannot be translated."""
    if (why := refusal(config, in_memory)) is not None:
        raise ValueError(f"{name} {why}.")


def base_name(key: str) -> str:
    """The name that a tensor in the file has in the base model, if it is one of the base model's own."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, ".")
    return key


# What PEFT puts between a module and its weight. With `save_embedding_layers` such weights are in the file too.
_WRAPPERS = (".token_adapter.base_layer.", ".original_module.", ".modules_to_save.", ".base_layer.")


def _base_names(header: Iterable[str]) -> set[str]:
    return {base_name(key.removeprefix(PREFIX)) for key in header}


def _other_keys(model: PeftModel, own: Mapping[str, nn.Parameter], file: Readable, match: Match) -> str | None:
    """PEFT ignores weights in the file that the model has no place for; here they mean that the two do not match."""
    expected = set(get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False))
    # With `bias`, PEFT saves the biases of a module that is trained in full under its inner names too.
    twice = {name: name.replace(f".modules_to_save.{_NAME}.", ".") for name in expected}
    expected = {name for name, one in twice.items() if one == name or one not in expected}
    expected = {name for name in expected if ".original_module." not in name}

    def is_copy(key: str) -> bool:
        """Whether a tensor is one of the base model's, or one that the file holds once more under its usual name."""
        trained = ".modules_to_save." in key and key.replace(".modules_to_save.", ".") not in expected
        return base_name(key.removeprefix(PREFIX)) in own and not trained

    def found(keys: Iterable[str]) -> set[str]:
        # What MonteCLoRA samples with while it is trained is not there on a skeleton.
        return {key for key in keys if key in expected or not (is_copy(key) or ".lora_monteclora_sampler." in key)}

    if (keys := found(file.header)) == expected:
        return None
    shapes = {name: info.shape for name, info in file.header.items()}
    read = found(as_peft_reads(model, model.peft_config[_NAME], shapes, _NAME))
    return None if read == expected else disagreement(match, expected, read if read & expected else keys)
