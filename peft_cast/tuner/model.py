"""The CAST tuner model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn

from .batches import mixed_batch_hooks
from .checks import check_finite
from .combine import combined_config, fill_combined
from .config import CastConfig, KernelSpec
from .layer import CastLayer, Linear, Projection
from .merging import check_mergeable
from .offload import base_weights
from .quantized import check_supported, linear_size


# PEFT finds adapter weights by this prefix in some paths. A bare "cast_" would also match "forecast_head".
PREFIX = "peft_cast_"


class CastModel(BaseTuner):
    """
    Creates a CAST (Cartridge Activation Space Transfer) model: frozen LoRA kernels of a source model on a target model.

    The method is described in https://arxiv.org/abs/2510.17902.

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
        names = {
            name.replace(".base_layer", "")
            for name, m in self.model.named_modules()
            if not isinstance(m, nn.ModuleDict)
        }
        absent = [name for name in config.kernels or () if name not in names]
        if absent:
            raise ValueError(
                f"This CAST adapter has a kernel for '{absent[0]}' ({len(absent)} such modules in all), which "
                f"{type(self.model).__name__} does not have: load the model it was made for, "
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
        check_supported(base_layer, current_key, **quantization)
        specs = self._kernel_specs(cast_config, base_layer, current_key)
        shared = self._shared_projections(cast_config, current_key)
        with base_weights(base_layer, current_key, getattr(self.model, "hf_device_map", {})):
            if isinstance(target, CastLayer):
                target.update_layer(adapter_name, specs, cast_config, shared)
                return
            new_module = Linear(target, adapter_name, specs, cast_config, shared, **quantization)
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
            raise ValueError(
                f"An adapter cannot be called '{adapter_name}', because torch keeps it in an nn.ModuleDict under that name: "
                "choose one without dots that is no method of nn.ModuleDict."
            )
        self._shared: dict[str, dict[tuple, Projection]] = {}  # of the adapter that is being added
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT would move every part of an adapter once more, which `update_layer` has done, and look for a `weight` when it
        # unloads, which layers of GPTQ or hqq do not have.
        setattr(parent, child_name, new_module)

    def _shared_projections(self, config: CastConfig, key: str) -> dict[tuple, Projection] | None:
        """The projections made so far that the module may share; `None` if modules do not share."""
        if config.projection_sharing is None:
            return None
        layer = re.match(r"(.*?\.\d+)\.", key) if config.projection_sharing == "layer" else None
        return self._shared.setdefault(layer[1] if layer else "", {})

    @staticmethod
    def _kernel_specs(config: CastConfig, base_layer: nn.Module, key: str) -> list[KernelSpec]:
        if config.kernels is None:
            size = linear_size(base_layer)
            assert size is not None, "modules that CAST cannot adapt were refused before"
            in_features, out_features = size
            return [KernelSpec(r=config.r, in_features=in_features, out_features=out_features)]
        if key not in config.kernels:
            raise ValueError(
                f"`target_modules` matches '{key}', for which `kernels` has no entry: leave `target_modules` out or "
                "list exactly the modules that have kernels."
            )
        return config.kernels[key]

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Look at all layers before the first is changed: a merge that fails halfway would leave a broken model.

        Raises:
            ValueError: If there is no such adapter, or a layer cannot merge it, see `merging.merged_weight`.
        """
        if unknown := set(adapter_names or ()) - set(self.peft_config):
            raise ValueError(
                f"There is no adapter {', '.join(sorted(unknown))} to merge: this model has {', '.join(self.peft_config)}."
            )
        for layer in self.model.modules():
            if isinstance(layer, CastLayer):
                names = layer.active_adapters if adapter_names is None else adapter_names
                with onload_layer(layer):
                    check_mergeable(layer, [n for n in names if n not in layer.merged_adapters], safe_merge)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, but after an error nothing is merged.

        Raises:
            ValueError: See `_check_mergeable`.
        """
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, num_beams: int | None = None, **kwargs: Any
    ) -> Iterator[None]:
        # PeftModel enters this around every forward and generate, with their arguments.
        if adapter_names is None:
            yield
            return
        with mixed_batch_hooks(self, adapter_names, num_beams):
            yield

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
        config = combined_config(self, adapters, weights, adapter_name, combination_type)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name)
            raise
        fill_combined(self, adapters, adapter_name)
        self.set_requires_grad(adapter_name, False)

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
        if config.projection_sharing is None:
            return kept
        # transformers saves no tensor twice; whoever loads the adapter shares them again.
        seen: set[int] = set()
        for key, tensor in kept.items():
            if not tensor.is_meta and tensor.data_ptr() in seen:
                kept[key] = tensor.clone()
            seen.add(tensor.data_ptr())
        return kept

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
                    f"The CAST adapter's tensor '{key}' is of type {value.dtype}, which holds no weights: download it again."
                )
            if key in own and own[key].shape != value.shape:
                raise ValueError(
                    f"The CAST adapter's tensor '{key}' has shape {tuple(value.shape)}, this model needs "
                    f"{tuple(own[key].shape)}. {made_for}"
                )
        missing = [key for key in own if marker in key and key not in remapped]
        if missing:
            raise ValueError(
                f"The CAST adapter's file lacks the tensor '{missing[0]}' ({len(missing)} in all). The file is "
                f"incomplete, or the adapter belongs to another model: download it again. {made_for}"
            )
        return remapped
