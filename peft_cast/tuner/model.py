"""The CAST tuner model."""

from __future__ import annotations

import re

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import CastConfig, KernelSpec
from .layer import CastLayer, Linear, Projection


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
        specs = self._kernel_specs(cast_config, target, current_key)
        shared = self._shared_projections(cast_config, current_key)
        if isinstance(target, CastLayer):
            target.update_layer(adapter_name, specs, cast_config, shared)
            return
        new_module = self._create_new_module(cast_config, adapter_name, target, specs, shared)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def inject_adapter(self, *args, **kwargs) -> None:
        self._shared: dict[str, dict[tuple, Projection]] = {}  # of the adapter that is being added
        super().inject_adapter(*args, **kwargs)

    def _shared_projections(self, config: CastConfig, key: str) -> dict[tuple, Projection] | None:
        """The projections made so far that the module may share; `None` if modules do not share."""
        if config.projection_sharing is None:
            return None
        layer = re.match(r"(.*?\.\d+)\.", key) if config.projection_sharing == "layer" else None
        return self._shared.setdefault(layer[1] if layer else "", {})

    @staticmethod
    def _kernel_specs(config: CastConfig, target: nn.Module, key: str) -> list[KernelSpec]:
        if config.kernels is None:
            layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            if not isinstance(layer, (nn.Linear, Conv1D)):
                raise ValueError(f"CAST does not support target modules of type {type(layer)} ('{key}') yet.")
            if isinstance(layer, nn.Linear):
                in_features, out_features = layer.in_features, layer.out_features
            else:
                in_features, out_features = layer.weight.shape
            return [KernelSpec(r=config.r, in_features=in_features, out_features=out_features)]
        if key not in config.kernels:
            raise ValueError(
                f"`target_modules` matches '{key}', for which `kernels` has no entry: leave `target_modules` out or "
                "list exactly the modules that have kernels."
            )
        return config.kernels[key]

    @staticmethod
    def _create_new_module(
        config: CastConfig, adapter_name: str, target: nn.Module, specs: list[KernelSpec], shared: dict | None
    ) -> nn.Module:
        target_base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(target_base_layer, (nn.Linear, Conv1D)):
            return Linear(target, adapter_name, specs, config, shared)
        raise ValueError(f"CAST does not support target modules of type {type(target_base_layer)} yet.")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            return
        # PEFT upcasts only parameters in here; a frozen kernel must not lose bits to a half-precision base either.
        for module in self.model.modules():
            if isinstance(module, CastLayer) and adapter_name in module.peft_cast_kernels:
                for kernel in module.peft_cast_kernels[adapter_name]:
                    kernel.A = kernel.A.to(torch.promote_types(kernel.A.dtype, torch.float32))
                    kernel.B = kernel.B.to(torch.promote_types(kernel.B.dtype, torch.float32))

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
