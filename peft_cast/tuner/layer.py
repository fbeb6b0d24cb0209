"""The CAST layer: frozen kernels between trainable projections."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import psutil
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge, onload_layer
from peft.utils import quantization_extra_repr
from peft.utils.other import transpose
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import CastConfig, KernelSpec
from .merging import check_foldable, merged_weight
from .projection import Projection
from .quantized import quantization_backend


Shared = dict[tuple[str, int, int], Projection]  # by side and shape


class Kernel(nn.Module):
    """One source module's LoRA between its two projections: `delta(x) = scaling * P_out(B A P_in(x))`.

    `A` and `B` are buffers, so no flag or optimizer can train them.

    Args:
        spec (`KernelSpec`): Shapes and scaling of the kernel (r, in_S, out_S below).
        P_in (`Projection`): in_T → in_S. It may be shared with other kernels.
        P_out (`Projection`): out_S → out_T, likewise; to the rows of `spec.rows` alone, if the kernel lands on a part.
        width (`int`): Output width of the target module, out_T.

    Shapes:
        A (r, in_S), B (out_S, r).
    """

    def __init__(self, spec: KernelSpec, P_in: Projection, P_out: Projection, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.register_buffer("A", torch.empty(spec.r, spec.in_features))
        self.register_buffer("B", torch.empty(spec.out_features, spec.r))
        self.P_in, self.P_out = P_in, P_out

    @property
    def foldable(self) -> bool:
        """Whether this is a plain LoRA on the target."""
        return not any(P.nonlinear or P.bias is not None for P in (self.P_in, self.P_out))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The LoRA that this kernel is on the target: `A' = A P_in` (r, in_T) and `B' = scaling P_out B` (out_T, r).

        Only products with a side of length r are formed, so the cost does not depend on the number of tokens.
        """
        return self.P_in.after(self.A), self._placed(self.spec.scaling * self.P_out.before(self.B).T).T

    def _placed(self, delta: torch.Tensor) -> torch.Tensor:
        """What `P_out` writes, on the rows of the module where it belongs: (..., rows) → (..., out_T)."""
        return delta if self.spec.rows is None else self.spec.rows.into(delta, self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The delta: (..., in_T) → (..., out_T)."""
        P_in, P_out = self.P_in, self.P_out
        a = F.linear(x, P_in.after(self.A))
        if P_in.nonlinear:
            a = a + F.linear(F.gelu(F.linear(x, P_in.mlp_V)), self.A @ P_in.mlp_U)
        if P_in.bias is not None:
            a = a + self.A @ P_in.bias
        delta = F.linear(a, P_out.before(self.B))
        if P_out.nonlinear:
            delta = delta + F.linear(F.gelu(F.linear(a, P_out.mlp_V @ self.B)), P_out.mlp_U)
        if P_out.bias is not None:
            delta = delta + P_out.bias
        return self.spec.scaling * self._placed(delta)

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """Random kernel, identity-like `P_in`, zero `P_out`: a no-op that can learn."""
        nn.init.normal_(self.A, std=self.spec.in_features**-0.5)
        nn.init.normal_(self.B, std=self.spec.r**-0.5)
        P_in, P_out = self.P_in, self.P_out
        if next(P_in.parameters()).device.type == "meta":
            return
        std = P_out.in_features**-0.5
        if P_in.full:
            nn.init.eye_(P_in.W)
            nn.init.zeros_(P_out.W) if init_weights else nn.init.normal_(P_out.W, std=std)
            return
        # Every adapter that is loaded comes by here: no matrix of the full projections' size is made on the way.
        same = min(P_in.in_features, P_in.out_features)
        A_P_in = F.pad(self.A[:, :same].float(), (0, P_in.in_features - same))
        P_out_B = torch.zeros(P_out.out_features, self.spec.r, device=self.B.device)
        if not init_weights:
            P_out_B = torch.empty(P_out.out_features, P_out.in_features, device=self.B.device).normal_(std=std)
            P_out_B = P_out_B @ self.B.float()
        self.set_effective(A_P_in, P_out_B)

    def set_effective(self, A_P_in: torch.Tensor, P_out_B: torch.Tensor) -> None:
        """Choose the linear parts of the projections so that `A P_in` (r, in_T) and `P_out B` (out_T, r) are as given.

        Of a kernel that lands on some rows of the module, `P_out B` has these rows alone.
        """
        self.P_in.set_after(self.A, A_P_in)
        self.P_out.set_before(self.B, P_out_B)


def _fetched(kernels: nn.Module) -> AbstractContextManager:
    """Bring offloaded projections while entered: accelerate does that only for modules that are called."""
    offloaded = any(tensor.is_meta for tensor in (*kernels.parameters(), *kernels.buffers()))
    return onload_layer(kernels) if offloaded else nullcontext()


class _CachedFactors(NamedTuple):
    """Factors, and the tensors they were made of as these then were: where each is kept, its version and memory."""

    factors: tuple[torch.Tensor, torch.Tensor]
    made_of: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor, int, int]]

    @classmethod
    def of(cls, kernels: nn.Module, factors: tuple[torch.Tensor, torch.Tensor]) -> _CachedFactors | None:
        """`None` if nothing tells when they change."""
        stores = [store for m in kernels.modules() for store in (m._parameters, m._buffers)]
        tensors = [(store, name, t) for store in stores for name, t in store.items() if t is not None]
        if any(t.requires_grad or t.is_inference() for *_, t in tensors):  # inference tensors count no versions at all
            return None
        return cls(factors, [(store, name, t, t._version, t.data_ptr()) for store, name, t in tensors])

    def current(self) -> bool:
        return all(
            t._version == version and t.data_ptr() == pointer and not t.requires_grad and store.get(name) is t
            for store, name, t, version, pointer in self.made_of
        )


class CastLayer(BaseTunerLayer):
    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = ("peft_cast_kernels",)
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, **kwargs) -> None:
        self.base_layer = base_layer
        self.peft_cast_kernels = nn.ModuleDict({})
        self._factor_cache: dict[str, _CachedFactors | None] = {}
        self.quantization_backend = quantization_backend(self.get_base_layer(), **kwargs)
        self.kwargs = kwargs
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, specs: list[KernelSpec], config: CastConfig, shared: Shared | None = None
    ) -> None:
        """Add the kernels of one adapter to this module.

        Args:
            adapter_name (`str`): The name of the adapter.
            specs (`list[KernelSpec]`): One or more kernels; their deltas are summed.
            config (`CastConfig`): The configuration of the adapter.
            shared (`dict`, *optional*): The projections that modules share, by side and shape; new ones are added.

        Raises:
            ValueError: If the module does not have the rows on which a kernel shall land, or a kernel does not fit
                into memory.
        """
        kernels = nn.ModuleList()
        for spec in specs:
            if spec.rows and not spec.rows.fit(self.out_features):
                raise ValueError(
                    f"A kernel is made for the rows {spec.rows} of a module that has {self.out_features} here: load "
                    f"the model this adapter was made for, '{config.base_model_name_or_path}'."
                )
            rows = spec.rows.size(self.out_features) if spec.rows else self.out_features
            needed = 4 * (spec.in_features * (self.in_features + spec.r) + spec.out_features * (rows + spec.r))
            # Asking the system takes longer than making a small kernel.
            if needed > 2**26 and needed > (free := psutil.virtual_memory().available + psutil.swap_memory().free):
                raise ValueError(
                    f"A kernel of the CAST adapter needs {needed / 2**30:,.0f} GiB and {free / 2**30:,.1f} are free: "
                    "its configuration is broken, or made for a larger machine."
                )
            made = {} if shared is None else shared
            maps = ("in", self.in_features, spec.in_features), ("out", spec.out_features, rows)
            for side, width_in, width_out in maps:
                if (side, width_in, width_out) not in made:
                    size = config.projection_size or spec.r
                    made[side, width_in, width_out] = Projection(width_in, width_out, size, config, side, spec.r)
            kernel = Kernel(spec, made[maps[0]], made[maps[1]], self.out_features)
            kernel.reset_parameters(config.init_weights)
            kernels.append(kernel)
        self.peft_cast_kernels[adapter_name] = kernels
        self._factor_cache.pop(adapter_name, None)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The adapter as one LoRA on this module: `A'` (R, in_T) and `B'` (out_T, R), R the sum of the ranks.

        Those of a frozen adapter are kept until a kernel or projection changes. A trainable adapter's never are: fused
        optimizers change parameters without counting it as a new version.
        """
        kernels = self.peft_cast_kernels[adapter_name]
        compiling = torch.compiler.is_compiling()
        cached = None if compiling else self._factor_cache.get(adapter_name)
        if cached is not None and cached.current():
            return cached.factors
        with nullcontext() if compiling else _fetched(kernels):
            A, B = zip(*(kernel.factors() for kernel in kernels))
            factors = (A[0], B[0]) if len(A) == 1 else (torch.cat(A), torch.cat(B, dim=1))
            if not compiling:
                self._factor_cache[adapter_name] = _CachedFactors.of(kernels, factors)
        return factors

    def delete_adapter(self, adapter_name: str) -> None:
        self._factor_cache.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a plain LoRA on this module: linear projections without biases."""
        return all(kernel.foldable for kernel in self.peft_cast_kernels[adapter_name])


class Linear(nn.Module, CastLayer):
    """CAST on a dense layer (`nn.Linear` or transformers' `Conv1D`).

    Forward: `y = W x + sum_i scaling_i P_out_i B_i A_i P_in_i x`, input (..., in_T), output (..., out_T).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        specs: list[KernelSpec],
        config: CastConfig,
        shared: Shared | None = None,
        **kwargs,
    ) -> None:
        nn.Module.__init__(self)
        CastLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, specs, config, shared)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The weight change of the given adapter, shaped as the base layer's weight.

        Args:
            adapter (`str`): The name of the adapter for which the delta weight should be computed.

        Raises:
            ValueError: If the adapter has nonlinear projections or biases, and so no delta weight.
        """
        check_foldable(self, adapter)
        A, B = self.get_factors(adapter)
        return transpose(B.float() @ A.float(), self.fan_in_fan_out)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weights, quantized ones anew: all adapters or, after an error, none.

        Args:
            safe_merge (`bool`, *optional*): Check for NaNs before the base weights are changed.
            adapter_names (`list[str]`, *optional*): The adapters to merge; all active ones when omitted.

        Raises:
            ValueError: If `safe_merge` finds NaN or infinite values, or see `merging.merged_weight`.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.peft_cast_kernels]
        if names:
            if self.quantization_backend is not None:
                warnings.warn("Merging into quantized weights rounds them once more: the outputs change slightly.")
            self.set_base_weight(merged_weight(self, names, safe_merge=safe_merge))
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Unmerge all merged adapter weights from the base weights."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        names = [name for name in self.merged_adapters if name in self.peft_cast_kernels]
        self.set_base_weight(merged_weight(self, names, sign=-1))
        self.merged_adapters.clear()

    def delta(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """What one adapter adds to the output, (..., in_T) → (..., out_T), in its dtype or `torch.autocast`'s."""
        kernels = self.peft_cast_kernels[adapter_name]
        if not torch.is_autocast_enabled(x.device.type):  # which chooses for itself
            x = self._cast_input_dtype(x, kernels[0].A.dtype)
        # Only foldable adapters have factors in the cache: asking it first saves walking through the kernels.
        if self._factor_cache.get(adapter_name) is not None or self.supports_lora_conversion(adapter_name):
            A, B = self.get_factors(adapter_name)
            return F.linear(F.linear(x, A), B)
        with _fetched(kernels):
            return sum(kernel(x) for kernel in kernels)

    def forward(self, x: torch.Tensor, *args, adapter_names: list[str] | None = None, **kwargs) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor`): Shape (..., in_T).
            adapter_names (`list[str]`, *optional*): The adapter of each example, set by `CastModel` for mixed batches.
        """
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for active_adapter in self.active_adapters:
            if active_adapter in self.peft_cast_kernels:
                result = result + self.delta(x, active_adapter).to(result.dtype)
        return result

    def _mixed_batch_forward(self, x: torch.Tensor, *args, adapter_names: list[str], **kwargs) -> torch.Tensor:
        """Each example, x (batch, ..., in_T), with its own adapter."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively. OPT's MLP and routed experts flatten their inputs, "
                "which cannot be told apart then: leave such modules out of the adapters."
            )
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name in self.peft_cast_kernels:
                rows = [i for i, other in enumerate(adapter_names) if other == name]
                result[rows] += self.delta(x[rows], name).to(result.dtype)
        return result

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return f"cast.{super().__repr__()}"
