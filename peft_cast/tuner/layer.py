"""The CAST layer: frozen kernels between trainable projections."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.other import transpose
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import CastConfig, KernelSpec


class Kernel(nn.Module):
    """One source module's LoRA between its two projections: `delta(x) = scaling * P_out B A P_in x`.

    `A` and `B` are buffers, so no flag or optimizer can train them. With *factored* projections
    `P_in = in_U in_V` and `P_out = out_U out_V`.

    Args:
        spec (`KernelSpec`): Shapes and scaling of the kernel (r, in_S, out_S below).
        in_features (`int`): Input width of the target module (in_T).
        out_features (`int`): Output width of the target module (out_T).
        projection_size (`int`, *optional*): Inner size k of factored projections; `None` trains full matrices.

    Shapes:
        A (r, in_S), B (out_S, r); factored: in_U (in_S, k), in_V (k, in_T), out_U (out_T, k), out_V (k, out_S);
        full: P_in (in_S, in_T), P_out (out_T, out_S).
    """

    def __init__(self, spec: KernelSpec, in_features: int, out_features: int, projection_size: int | None) -> None:
        super().__init__()
        self.spec = spec
        self.projection_size = projection_size
        self.register_buffer("A", torch.empty(spec.r, spec.in_features))
        self.register_buffer("B", torch.empty(spec.out_features, spec.r))
        if projection_size is None:
            self.P_in = nn.Parameter(torch.empty(spec.in_features, in_features))
            self.P_out = nn.Parameter(torch.empty(out_features, spec.out_features))
        else:
            self.in_U = nn.Parameter(torch.empty(spec.in_features, projection_size))
            self.in_V = nn.Parameter(torch.empty(projection_size, in_features))
            self.out_U = nn.Parameter(torch.empty(out_features, projection_size))
            self.out_V = nn.Parameter(torch.empty(projection_size, spec.out_features))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The LoRA that this kernel is on the target: `A' = A P_in` (r, in_T) and `B' = scaling P_out B` (out_T, r).

        Only products with a side of length r are formed, so the cost does not depend on the number of tokens.
        """
        if self.projection_size is None:
            return self.A @ self.P_in, self.spec.scaling * (self.P_out @ self.B)
        return (self.A @ self.in_U) @ self.in_V, self.spec.scaling * (self.out_U @ (self.out_V @ self.B))

    @torch.no_grad()
    def reset_parameters(self, init_weights: bool = True) -> None:
        """Random kernel, identity-like `P_in`, zero `P_out`: a no-op that can learn."""
        nn.init.normal_(self.A, std=self.spec.in_features**-0.5)
        nn.init.normal_(self.B, std=self.spec.r**-0.5)
        parameters = list(self.parameters())
        if parameters[0].device.type == "meta":
            return
        in_features, out_features = self._target_features()
        eye = torch.eye(self.spec.in_features, in_features, device=self.A.device)
        P_out = torch.zeros(out_features, self.spec.out_features, device=self.A.device)
        if not init_weights:
            nn.init.normal_(P_out, std=self.spec.out_features**-0.5)
        if self.projection_size is None:
            self.P_in.copy_(eye)
            self.P_out.copy_(P_out)
        else:
            self.set_effective(self.A.float() @ eye, P_out @ self.B.float())

    @torch.no_grad()
    def set_effective(self, A_P_in: torch.Tensor, P_out_B: torch.Tensor) -> None:
        """Choose the projections so that `A P_in` and `P_out B` become the given matrices.

        Exact when the inner size is at least the rank, else the best approximation of that size (truncated SVD).

        Args:
            A_P_in (`torch.Tensor`): Shape (r, in_T).
            P_out_B (`torch.Tensor`): Shape (out_T, r).
        """
        A_inverse = _right_inverse(self.A)
        B_inverse = _right_inverse(self.B.T).T
        if self.projection_size is None:
            self.P_in.copy_(A_inverse @ A_P_in.double())
            self.P_out.copy_(P_out_B.double() @ B_inverse)
            return
        X, Y = _split(A_P_in, self.projection_size)
        self.in_U.copy_(A_inverse @ X)
        self.in_V.copy_(Y)
        X, Y = _split(P_out_B.T, self.projection_size)
        self.out_V.copy_(X.T @ B_inverse)
        self.out_U.copy_(Y.T)

    def _target_features(self) -> tuple[int, int]:
        if self.projection_size is None:
            return self.P_in.shape[1], self.P_out.shape[0]
        return self.in_V.shape[1], self.out_U.shape[0]


def _right_inverse(M: torch.Tensor) -> torch.Tensor:
    """Pseudo-inverse (n, r) of a wide matrix (r, n) by its small Gram matrix, in float64."""
    M = M.double()
    return M.T @ torch.linalg.pinv(M @ M.T, hermitian=True)


def _split(M: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`X @ Y = M` (r, n) with inner size k, X (r, k) and Y (k, n), in float64; the best rank k when k < r."""
    M = M.double()
    r, n = M.shape
    if k < r:
        X = torch.linalg.eigh(M @ M.T).eigenvectors[:, -k:]
        return X, X.T @ M
    X = torch.eye(r, k, dtype=M.dtype, device=M.device)
    # Spare inner directions: the zero columns of X keep the product exact, random rows of Y let them learn.
    spare = torch.randn(k - r, n, dtype=M.dtype, device=M.device) * M.square().mean().sqrt()
    return X, torch.cat([M, spare])


class CastLayer(BaseTunerLayer):
    # All names of layers that may contain (trainable) adapter weights
    adapter_layer_names: tuple[str, ...] = ("peft_cast_kernels",)
    # All names of other parameters that may contain adapter-related parameters
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, **kwargs) -> None:
        self.base_layer = base_layer
        self.peft_cast_kernels = nn.ModuleDict({})
        self._factor_cache: dict[str, tuple] = {}
        self.kwargs = kwargs

        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(self, adapter_name: str, specs: list[KernelSpec], config: CastConfig) -> None:
        """Add the kernels of one adapter to this module.

        Args:
            adapter_name (`str`): The name of the adapter.
            specs (`list[KernelSpec]`): One or more kernels; their deltas are summed.
            config (`CastConfig`): The configuration of the adapter.
        """
        kernels = nn.ModuleList()
        for spec in specs:
            size = None if config.projection_type == "full" else (config.projection_size or spec.r)
            kernel = Kernel(spec, self.in_features, self.out_features, size)
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
        tensors = [*kernels.parameters(), *kernels.buffers()]
        if any(t.requires_grad or t.is_inference() for t in tensors):  # inference tensors count no versions at all
            self._factor_cache.pop(adapter_name, None)
            return _stack_factors(kernels)
        state = [(t.data_ptr(), t._version, t.dtype, t.device) for t in tensors]
        cached = self._factor_cache.get(adapter_name)
        if cached is None or cached[0] != state:
            self._factor_cache[adapter_name] = cached = (state, _stack_factors(kernels))
        return cached[1]

    def delete_adapter(self, adapter_name: str) -> None:
        self._factor_cache.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


def _stack_factors(kernels: nn.ModuleList) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = zip(*(kernel.factors() for kernel in kernels))
    return (A[0], B[0]) if len(A) == 1 else (torch.cat(A), torch.cat(B, dim=1))


class Linear(nn.Module, CastLayer):
    """CAST on a dense layer (`nn.Linear` or transformers' `Conv1D`).

    Forward: `y = W x + sum_i scaling_i P_out_i B_i A_i P_in_i x`, input (..., in_T), output (..., out_T).
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, specs: list[KernelSpec], config: CastConfig, **kwargs
    ) -> None:
        super().__init__()
        CastLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, specs, config)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The weight change of the given adapter, shaped as the base layer's weight.

        Args:
            adapter (`str`): The name of the adapter for which the delta weight should be computed.
        """
        A, B = self.get_factors(adapter)
        return transpose(B.float() @ A.float(), self.fan_in_fan_out)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the active adapter weights into the base weights.

        Args:
            safe_merge (`bool`, *optional*): Check for NaNs on a copy before the base weights are changed.
            adapter_names (`list[str]`, *optional*): The adapters to merge; all active ones when omitted.

        Raises:
            ValueError: If `safe_merge` finds NaN or infinite values.
        """
        for active_adapter in check_adapters_to_merge(self, adapter_names):
            if active_adapter not in self.peft_cast_kernels:
                continue
            with torch.no_grad():
                weight = self.get_base_layer().weight
                merged = weight.data + self.get_delta_weight(active_adapter).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {active_adapter} seems to be broken"
                )
            weight.data = merged
            self.merged_adapters.append(active_adapter)

    def unmerge(self) -> None:
        """Unmerge all merged adapter weights from the base weights."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        while self.merged_adapters:
            active_adapter = self.merged_adapters.pop()
            if active_adapter in self.peft_cast_kernels:
                weight = self.get_base_layer().weight
                with torch.no_grad():
                    weight.data -= self.get_delta_weight(active_adapter).to(weight.dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        for active_adapter in self.active_adapters:
            if active_adapter not in self.peft_cast_kernels:
                continue
            A, B = self.get_factors(active_adapter)
            h = self._cast_input_dtype(x, A.dtype)
            result = result + F.linear(F.linear(h, A), B).to(result.dtype)
        return result

    def __repr__(self) -> str:
        rep = super().__repr__()
        return "cast." + rep
