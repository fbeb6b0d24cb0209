"""The CAST tuner model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_tuner_state_dict_key_prefixes,
    _is_key_under_prefixes,
    onload_layer,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from .checks import check_finite, number_of, with_article
from .config import CastConfig, KernelSpec
from .layer import CastLayer, Linear, Shared
from .merging import check_mergeable
from .quantized import is_supported, linear_size


# PEFT finds adapter weights by this prefix in some paths. A bare "cast_" would also match "forecast_head".
PREFIX = "peft_cast_"


class CastModel(BaseTuner):
    """
    Creates a CAST (Cartridge Activation Space Transfer, https://arxiv.org/abs/2510.17902) model: frozen LoRA kernels
    of a source model on a target model.

    Args:
        model ([`torch.nn.Module`]): The model to be adapted.
        config ([`CastConfig`]): The configuration of the CAST model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Returns:
        `torch.nn.Module`: The CAST PEFT model.

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be adapted.
        - **peft_config** ([`CastConfig`]): The configuration of the CAST model.
    """

    prefix: str = PREFIX
    tuner_layer_cls = CastLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: CastConfig) -> None:
        super()._check_new_adapter_config(config)
        modules = self.model.named_modules()
        names = {name.replace(".base_layer", "") for name, module in modules if not isinstance(module, nn.ModuleDict)}
        if absent := [name for name in config.kernels or () if name not in names]:
            raise ValueError(
                f"This CAST adapter has a kernel for '{absent[0]}' ({number_of(len(absent), 'such module')} in all), "
                f"which {type(self.model).__name__} does not have: load the model it was made for, "
                f"'{config.base_model_name_or_path}'."
            )

    def _create_and_replace(
        self,
        cast_config: CastConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantization = get_quantization_kwargs(self.model)
        kind = f"{type(base_layer).__module__}.{type(base_layer).__name__}"
        if not is_supported(base_layer, **quantization):
            raise ValueError(
                f"CAST cannot adapt '{current_key}', {with_article(kind)}: only nn.Linear, transformers' "
                "Conv1D and linear layers quantized by a package that PEFT finds installed (bitsandbytes, torchao, "
                "hqq, gptqmodel, ...). Leave it out with `exclude_modules`, or install the package that quantized the "
                "model."
            )
        if cast_config.kernels is None:
            size = linear_size(base_layer)
            assert size is not None, "modules that CAST cannot adapt were refused before"
            specs = [KernelSpec(cast_config.r, *size)]
        elif current_key in cast_config.kernels:
            specs = cast_config.kernels[current_key]
        else:
            raise ValueError(
                f"`target_modules` matches '{current_key}', for which `kernels` has no entry: leave `target_modules` "
                "out or list exactly the modules that have kernels."
            )
        shared = None
        if cast_config.projection_sharing is not None:
            layer = re.match(r"(.*?\.\d+)\.", current_key) if cast_config.projection_sharing == "layer" else None
            shared = self._shared.setdefault(layer[1] if layer else "", {})
        with self._onloaded(base_layer, current_key):
            if isinstance(target, CastLayer):
                target.update_layer(adapter_name, specs, cast_config, shared)
                return
            new_module = Linear(target, adapter_name, specs, cast_config, shared, **quantization)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)

    def _onloaded(self, base_layer: nn.Module, name: str) -> AbstractContextManager:
        """Bring the weights of a layer that gets an adapter; it is made where they are, never on the meta device."""
        hook = getattr(base_layer, "_hf_hook", None)
        on_disk = "disk" in getattr(self.model, "hf_device_map", {}).values()
        if on_disk and not getattr(hook, "offload", False) and any(p.is_meta for p in base_layer.parameters()):
            # accelerate's hook that fetches them was taken off, as `PeftModel.from_pretrained` does
            raise ValueError(
                f"The weights of '{name}' are on disk, where PeftModel cannot load an adapter: load the model with a "
                "`device_map` without 'disk', or call `get_peft_model(model, PeftConfig.from_pretrained(folder))` and "
                "then `set_peft_model_state_dict(peft_model, load_peft_weights(folder))`."
            )
        return onload_layer(nn.ModuleList([base_layer]))  # of a module itself it brings only what is inside

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
            raise ValueError(
                f"An adapter cannot be called '{adapter_name}', because torch keeps it in an nn.ModuleDict under that "
                "name: choose one without dots that is no method of nn.ModuleDict."
            )
        # Of the adapter that is being added, by layer: the projections made so far, which other modules may share.
        self._shared: dict[str, Shared] = {}
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would move every part of an adapter once more, which `update_layer` has done, and look for a `weight`
        # when it unloads, which layers of GPTQ or hqq do not have.
        setattr(parent, child_name, new_module)

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Look at all layers before the first is changed: a merge that fails halfway would leave a broken model."""
        if unknown := set(adapter_names or ()) - set(self.peft_config):
            there = ", ".join(self.peft_config)
            raise ValueError(f"There is no adapter {', '.join(sorted(unknown))} to merge: this model has {there}.")
        for layer in self.model.modules():
            if isinstance(layer, CastLayer):
                names = layer.active_adapters if adapter_names is None else adapter_names
                with onload_layer(layer):
                    check_mergeable(layer, [n for n in names if n not in layer.merged_adapters], safe_merge)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, but after an error nothing is merged.

        Raises:
            ValueError: If there is no such adapter, or a layer cannot merge it, see `merging.merged_weight`.
        """
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As in PEFT, but after an error nothing is merged.

        Raises:
            ValueError: If there is no such adapter, or a layer cannot merge it, see `merging.merged_weight`.
        """
        self._check_mergeable(adapter_names, safe_merge)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, num_beams: int | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """PeftModel enters this around every forward and generate, with their arguments: a batch may mix adapters.

        Args:
            adapter_names (`list[str]`, *optional*): The adapter of each example, `"__base__"` for none.
            num_beams (`int`, *optional*): Beam search repeats each example that often, except in an encoder.
        """
        if adapter_names is None:
            yield
            return
        if isinstance(adapter_names, str):
            raise TypeError(f"`adapter_names` must be a list with one name for each example, got '{adapter_names}'.")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call `model.eval()`.")
        known = {name for layer in self.modules() if isinstance(layer, CastLayer) for name in layer.peft_cast_kernels}
        if unknown := set(adapter_names) - known - {"__base__"}:
            names, there = ", ".join(sorted(unknown)), ", ".join(sorted(known))
            raise ValueError(f"Trying to infer with non-existing adapter(s): {names}. This model has {there}.")
        repeated = [name for name in adapter_names for _ in range(num_beams or 1)]
        encoder = self.model.get_encoder() if getattr(self.model.config, "is_encoder_decoder", False) else None
        in_encoder = set(encoder.modules()) if encoder is not None else set()

        def pass_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return args, {**kwargs, "adapter_names": list(adapter_names) if module in in_encoder else repeated}

        kinds = (CastLayer, AuxiliaryTrainingWrapper)
        handles = [
            m.register_forward_pre_hook(pass_names, with_kwargs=True) for m in self.modules() if isinstance(m, kinds)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add the adapter `sum_i weight_i adapter_i`, exactly: it carries the kernels of all, with scaled scalings.

        Like LoRA's it is neither active nor trainable until `set_adapter`. It holds copies, and shares no projections
        between modules even if the given adapters do.

        Args:
            adapters (`list[str]`): Adapters of this model.
            weights (`list[float]`): A weight for each; negative ones subtract.
            adapter_name (`str`): Name of the new adapter.
            combination_type (`str`): Only `"cat"`, LoRA's name for this.

        Raises:
            ValueError: If a name or number does not fit, the new name is taken, the adapters mix full and factored
                projections, or for another `combination_type`.
        """
        self.peft_config[adapter_name] = self._combined_config(adapters, weights, adapter_name, combination_type)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name)
            raise
        for layer in self.model.modules():
            if not isinstance(layer, CastLayer) or adapter_name not in layer.peft_cast_kernels:
                continue
            with onload_layer(layer):
                placed = layer.peft_cast_kernels
                originals = [kernel for name in adapters if name in placed for kernel in placed[name]]
                widest = max((kernel.A for kernel in originals), key=torch.Tensor.element_size)
                placed[adapter_name].to(originals[0].A.device, widest.dtype)
                for copy, original in zip(placed[adapter_name], originals):
                    values = original.state_dict()
                    for name, tensor in copy.state_dict().items():
                        tensor.zero_()  # a larger inner size, an MLP or a bias that the original lacks changes nothing
                        if name in values:
                            tensor[tuple(map(slice, values[name].shape))].copy_(values[name])
        self.set_requires_grad(adapter_name, False)

    def _combined_config(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
    ) -> CastConfig:
        if combination_type != "cat":
            raise ValueError(
                f"CAST adapters are added exactly, by `combination_type='cat'`, not by {combination_type!r}: for the "
                "other ways of LoRA convert the adapters with `peft_cast.to_lora` and combine the LoRAs."
            )
        if missing := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"Adapter {missing[0]} does not exist: this model has {', '.join(self.peft_config)}.")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"Every adapter needs a weight, got {number_of(len(adapters), 'adapter')} and "
                f"{number_of(len(weights), 'weight')}."
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists: choose another or delete it.")
        configs = [self.peft_config[name] for name in adapters]
        if any(getattr(config, "modules_to_save", None) for config in configs):
            raise ValueError(
                "Adapters that train whole modules (`modules_to_save`) cannot be added: the sum would not have these."
            )
        types = {config.projection_type for config in configs}
        if len(types) > 1 and types & {"full", "compact"}:
            raise ValueError(
                f"The adapters have projections of the types {', '.join(sorted(types))}, which no single adapter can "
                "have: translate them with the same `projection_type`."
            )
        kernels: dict[str, list[KernelSpec]] = {}
        sizes = set()
        for name, layer in self.model.named_modules():
            placed = layer.peft_cast_kernels if isinstance(layer, CastLayer) else {}
            for adapter, weight in zip(adapters, weights):
                for kernel in placed[adapter] if adapter in placed else ():
                    spec = replace(kernel.spec, scaling=weight * kernel.spec.scaling)
                    kernels.setdefault(name, []).append(spec)
                    sizes.add(0 if kernel.P_in.full else len(kernel.P_in.V))
        sources = {
            field: values.pop() if len(values) == 1 else None  # the sum of two sources has no one name
            for field in vars(configs[0])
            if field.startswith("source_") and (values := {getattr(config, field) for config in configs})
        }
        by_rank = all(config.projection_size is None for config in configs)
        return replace(
            configs[0],
            kernels=kernels,
            target_modules=set(kernels),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            r=max(spec.r for specs in kernels.values() for spec in specs),
            projection_type="mlp" if "mlp" in types else configs[0].projection_type,
            projection_size=None if by_rank else max(sizes),
            projection_bias=any(config.projection_bias for config in configs),
            projection_sharing=None,
            **sources,
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            return
        # PEFT upcasts only parameters in here; a frozen kernel must not lose bits to a half-precision base either.
        for module in self.model.modules():
            if isinstance(module, CastLayer) and adapter_name in module.peft_cast_kernels:
                for kernel in module.peft_cast_kernels[adapter_name]:
                    for name, matrix in (("A", kernel.A), ("B", kernel.B)):
                        if matrix.dtype.itemsize < 4:  # setting a buffer takes time, and loading comes by here twice
                            setattr(kernel, name, matrix.float())

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        kept = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        unwanted = set(unwanted_adapter_names)
        # PEFT has left out all keys with another adapter's name in them: too many if one is called "self_attn" or "A".
        if unwanted:
            prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name)
            tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
            for key, tensor in tensors:
                if key not in kept and unwanted & set(key.split(".")) and _is_key_under_prefixes(key, prefixes):
                    kept[key] = tensor.detach()
        # transformers saves no tensor twice; whoever loads the adapter shares them again.
        return kept if config.projection_sharing is None else {key: tensor.clone() for key, tensor in kept.items()}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # "...q_proj.peft_cast_kernels.default.0.A" -> "...q_proj.peft_cast_kernels.0.A"
        head, container, tail = key.rpartition(f".{PREFIX}kernels.")
        return f"{head}{container}{tail.removeprefix(f'{adapter_name}.')}" if container else key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        made_for = f"Load the model this adapter was made for, '{config.base_model_name_or_path}'."
        marker = f".{PREFIX}kernels.{adapter_name}."
        for key, value in remapped.items():
            check_finite(key, value)
            if marker in key and not value.is_floating_point():
                raise ValueError(
                    f"The CAST adapter's tensor '{key}' is of type {value.dtype}, no weights: download it again."
                )
            if key in own and own[key].shape != value.shape:
                raise ValueError(
                    f"The CAST adapter's tensor '{key}' has shape {tuple(value.shape)}, this model needs "
                    f"{tuple(own[key].shape)}. {made_for}"
                )
        if missing := [key for key in own if marker in key and key not in remapped]:
            raise ValueError(
                f"The CAST adapter's file lacks the tensor '{missing[0]}' ({len(missing)} in all). The file is "
                f"incomplete, or the adapter belongs to another model: download it again. {made_for}"
            )
        return remapped
