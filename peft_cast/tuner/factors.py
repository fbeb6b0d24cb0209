"""The LoRA that the kernels of a module amount to, kept as long as nothing it was made of changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


def stack_factors(kernels: nn.ModuleList) -> tuple[torch.Tensor, torch.Tensor]:
    """`A'` (R, in_T) and `B'` (out_T, R) of kernels on one module, R the sum of their ranks."""
    A, B = zip(*(kernel.factors() for kernel in kernels))
    return (A[0], B[0]) if len(A) == 1 else (torch.cat(A), torch.cat(B, dim=1))


class CachedFactors(NamedTuple):
    """Factors, and the tensors they were made of as these then were: where each is kept, its version and its memory."""

    factors: tuple[torch.Tensor, torch.Tensor]
    made_of: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor, int, int]]

    @classmethod
    def of(cls, kernels: nn.Module, factors: tuple[torch.Tensor, torch.Tensor]) -> CachedFactors | None:
        """`None` if nothing tells when they change."""
        stores = [store for m in kernels.modules() for store in (m._parameters, m._buffers)]
        tensors = [(store, name, t) for store in stores for name, t in store.items() if t is not None]
        if any(
            t.requires_grad or t.is_inference() for _, _, t in tensors
        ):  # inference tensors count no versions at all
            return None
        return cls(factors, [(store, name, t, t._version, t.data_ptr()) for store, name, t in tensors])

    def current(self) -> bool:
        return all(
            t._version == version and t.data_ptr() == pointer and not t.requires_grad and store.get(name) is t
            for store, name, t, version, pointer in self.made_of
        )
