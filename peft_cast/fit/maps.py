"""The fitted maps: what a closed form, a bridge or an earlier translation gives an adapter to begin with."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch

from ..source import LoraKernel


@dataclass(frozen=True)
class Map:
    """A matrix as it is kept.

    Args:
        factors (`tuple[torch.Tensor, ...]`): One, or two that are multiplied.
        plus_identity (`bool`): Whether the identity is added to it.
    """

    factors: tuple[torch.Tensor, ...]
    plus_identity: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    def after(self, A: torch.Tensor) -> torch.Tensor:
        """`A @ self`, A (n, rows) → (n, columns), float32."""
        product = A
        for factor in self.factors:
            product = product @ factor.float()
        return product + A if self.plus_identity else product

    @property
    def T(self) -> Map:
        return Map(tuple(factor.T.contiguous() for factor in reversed(self.factors)), self.plus_identity)

    def check(self, place: str) -> None:
        """
        Raises:
            ValueError: If the factors do not fit each other, or the identity them.
        """
        fitting = all(one.shape[1] == other.shape[0] for one, other in pairwise(self.factors))
        if not self.factors or not fitting or (self.plus_identity and self.shape[0] != self.shape[1]):
            raise ValueError(f"the factors of a map on '{place[:200]}' do not fit each other")


@dataclass(frozen=True)
class KernelFit:
    """The fitted projections of one kernel on one target place.

    Args:
        source_place (`str`): The source place where the kernel comes from.
        A_P_in (`torch.Tensor`): Shape (r, in_T).
        P_out_B (`torch.Tensor`): Shape (out_T, r), of a place in a fused module its rows.
        r2_in (`float`): Held-out share of the kernel's inputs `A x_S` that the target's activations explain.
        r2_out (`float`): Held-out share of the kernel's gradients `Bᵀ g_S` that the target's gradients explain.
        shrunk (`bool`): Whether P_out B was drawn to 0, and is too small where it explains little.
    """

    source_place: str
    A_P_in: torch.Tensor
    P_out_B: torch.Tensor
    r2_in: float
    r2_out: float
    shrunk: bool = True

    @property
    def usual_gain(self) -> float:
        """What P_out B is multiplied by when no `gain` is given: 1/√R², at most 2, where it was drawn to 0."""
        return min(2.0, max(self.r2_out, 1e-6) ** -0.5) if self.shrunk else 1.0

    @classmethod
    def of(cls, source_place: str, into: Map, out_of: Map, r2_in: float, r2_out: float, shrunk: bool) -> KernelFit:
        """From what `maps` gives.

        Raises:
            ValueError: If one of them is in factors.
        """
        (A_P_in,), (P_out_B,) = into.factors, out_of.factors
        return cls(source_place, A_P_in, P_out_B, r2_in, r2_out, shrunk)

    @property
    def maps(self) -> tuple[Map, Map]:
        """The projections, in and out."""
        return Map((self.A_P_in,)), Map((self.P_out_B,))


@dataclass(frozen=True)
class PlaceMaps:
    """The fitted maps between a source place and the target place where it lands, whatever kernel is there: a
    bridge's.

    Args:
        source_place (`str`): The source place.
        P_in (`Map`): Shape (in_S, in_T).
        P_out (`Map`): Shape (out_T, out_S), of a place in a fused module its rows.
        r2_in, r2_out (`float`): As in `KernelFit`, of all of the place's inputs and gradients.
    """

    source_place: str
    P_in: Map
    P_out: Map
    r2_in: float
    r2_out: float

    @classmethod
    def of(cls, source_place: str, into: Map, out_of: Map, r2_in: float, r2_out: float, shrunk: bool) -> PlaceMaps:
        """From what `maps` gives; `shrunk` is what `P_out` says."""
        return cls(source_place, into, out_of, r2_in, r2_out)

    @property
    def shrunk(self) -> bool:
        return not self.P_out.plus_identity

    @property
    def maps(self) -> tuple[Map, Map]:
        """The maps, in and out."""
        return self.P_in, self.P_out

    def applied(self, kernel: LoraKernel) -> KernelFit:
        """What they make of a kernel: `A P_in` and `P_out B`, float32 on the CPU.

        Raises:
            ValueError: If the kernel does not have the source model's shapes.
        """
        A, B = kernel.A.float().cpu(), kernel.B.float().cpu()
        inputs, outputs = self.P_in.shape[0], self.P_out.shape[1]
        if A.shape[1] != inputs or B.shape[0] != outputs:
            raise ValueError(
                f"The adapter's kernel on '{self.source_place}' is {A.shape[1]} → {B.shape[0]}, the bridge's source "
                f"model has {inputs} → {outputs} there: the adapter belongs to another model."
            )
        made = self.P_in.after(A), self.P_out.T.after(B.T).T
        return KernelFit(self.source_place, *made, self.r2_in, self.r2_out, self.shrunk)


FitOrMaps = TypeVar("FitOrMaps", bound=KernelFit | PlaceMaps)


@dataclass(frozen=True)
class ClosedForm(Generic[FitOrMaps]):
    """The result of the closed-form fit.

    Args:
        kernels: For each target place, in the order of the module map: the fits of its kernels, or, where no kernels
            were given, the maps themselves.
        hidden_maps (`dict[str, torch.Tensor]`): For each target layer (path), the map from the hidden state of its
            source layer (see `layer_pairs`) and a 1 to the target's, shape (hidden_T, hidden_S + 1).
        hidden_r2 (`dict[str, float]`): Held-out R² of those maps.
        positions (`int`): Aligned positions used.
    """

    kernels: dict[str, list[FitOrMaps]]
    hidden_maps: dict[str, torch.Tensor]
    hidden_r2: dict[str, float]
    positions: int

    @property
    def metrics(self) -> dict[str, Any]:
        """The account of it in `TranslationResult.metrics`, JSON-ready."""
        names = ("source_place", "r2_in", "r2_out")
        modules = {
            place: [{n: getattr(fit, n) for n in names} for fit in fits] for place, fits in self.kernels.items()
        }
        return {"positions": self.positions, "modules": modules, "hidden_r2": self.hidden_r2}

    def part(self, sources: Container[str], change: Callable[[FitOrMaps], KernelFit]) -> ClosedForm[KernelFit]:
        """The fits of some source places alone, each changed; target places that carry none of them are left out."""
        kernels = {
            name: [change(fit) for fit in fits if fit.source_place in sources] for name, fits in self.kernels.items()
        }
        return ClosedForm(
            {name: fits for name, fits in kernels.items() if fits}, self.hidden_maps, self.hidden_r2, self.positions
        )
