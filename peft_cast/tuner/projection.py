"""Trainable maps between the spaces of two models."""

from __future__ import annotations

import torch
from torch import nn

from .config import CastConfig


class Projection(nn.Module):
    """A trainable map P between a model's space and the other's, in_features → out_features.

    Forward: `P x = U V x` (*factored*), `W x` (*full*) or `U V x + mlp_U gelu(mlp_V x)` (*mlp*, nonlinear), plus
    `bias` if there is one. It is never run as it stands: only products with a thin frozen kernel matter, see `Kernel`.
    A *compact* projection is a factored one of which only what the kernel sees is trained: `C = A U` in place of an
    input projection's U, `C = V B` in place of an output projection's V. With independent rows of A it is `U = A⁺ C`,
    likewise `V = C B⁺`.

    Args:
        in_features (`int`): Width of x.
        out_features (`int`): Width of P x.
        size (`int`): Inner size k, also of the MLP.
        config (`CastConfig`): For the type of the projection and whether it has a bias.
        side (`str`): `"in"` or `"out"`: whether it stands before the kernel or after.
        r (`int`): Rank of the kernel, for compact ones.

    Shapes:
        U, mlp_U (out_features, k); V, mlp_V (k, in_features); W (out_features, in_features); bias (out_features); C
        (r, k) of input, (k, r) of output projections.
    """

    def __init__(
        self, in_features: int, out_features: int, size: int, config: CastConfig, side: str = "in", r: int = 0
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.full, self.nonlinear = config.projection_type == "full", config.projection_type == "mlp"
        self.compact = config.projection_type == "compact"
        for name, shape in config.projection_shapes(side, in_features, out_features, size, r).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if self.nonlinear:
            nn.init.zeros_(self.mlp_U)
            nn.init.normal_(self.mlp_V, std=in_features**-0.5)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if config.projection_bias else None)

    def after(self, A: torch.Tensor) -> torch.Tensor:
        """The linear part of `A P`: A (r, out_features) → (r, in_features)."""
        if self.compact:
            return self.C @ self.V
        return A @ self.W if self.full else (A @ self.U) @ self.V

    def before(self, B: torch.Tensor) -> torch.Tensor:
        """The linear part of `P B`: B (in_features, r) → (out_features, r)."""
        if self.compact:
            return self.U @ self.C
        return self.W @ B if self.full else self.U @ (self.V @ B)

    @torch.no_grad()
    def set_after(self, A: torch.Tensor, A_P: torch.Tensor) -> None:
        """Choose the linear part so that `A P` becomes the given matrix.

        Exact when the inner size is at least the rank of A, whose rows must then be independent; else the best of that
        size (truncated SVD), or by least squares.

        Args:
            A (`torch.Tensor`): Shape (r, out_features).
            A_P (`torch.Tensor`): Shape (r, in_features).
        """
        near, far = (self.W, None) if self.full else (self.C if self.compact else self.U, self.V)
        self._set(A, A_P, near, far)

    @torch.no_grad()
    def set_before(self, B: torch.Tensor, P_B: torch.Tensor) -> None:
        """Likewise so that `P B` becomes the given matrix: B (in_features, r), P B (out_features, r)."""
        near, far = (self.W.T, None) if self.full else ((self.C if self.compact else self.V).T, self.U.T)
        self._set(B.T, P_B.T, near, far)

    def last_factors(self) -> list[nn.Parameter]:
        """The parameters that are multiplied last: times a number they multiply `P x` by it."""
        return [one for name, one in self.named_parameters() if name in ("U", "W", "mlp_U", "bias")]

    def _set(self, M: torch.Tensor, M_P: torch.Tensor, near: torch.Tensor, far: torch.Tensor | None) -> None:
        """Fill the factor next to M and the other one (a full P has none), so that `M P = M_P`."""
        if far is not None:
            M_P, Y = _split(M_P, far.shape[0])
            far.copy_(Y)
        near.copy_(M_P if self.compact else _right_inverse(M) @ M_P.double())


def _right_inverse(M: torch.Tensor) -> torch.Tensor:
    """Pseudo-inverse (n, r) of a matrix (r, n) by its Gram matrix (r, r), in float64."""
    M = M.double()
    return M.T @ torch.linalg.pinv(M @ M.T, hermitian=True)


def _split(M: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`X @ Y = M` (r, n), X (r, k) and Y (k, n), in float64 unless Y is M; the best of rank k when k < r."""
    r, n = M.shape
    if k == r:  # every adapter that is loaded comes by here
        return torch.eye(r, dtype=M.dtype, device=M.device), M
    M = M.double()
    if k < r:
        X = torch.linalg.eigh(M @ M.T).eigenvectors[:, -k:]
        return X, X.T @ M
    # Spare inner directions: the zero columns of X keep the product exact, random rows of Y let them learn.
    spare = torch.randn(k - r, n, dtype=M.dtype, device=M.device) * M.square().mean().sqrt()
    return torch.eye(r, k, dtype=M.dtype, device=M.device), torch.cat([M, spare])
