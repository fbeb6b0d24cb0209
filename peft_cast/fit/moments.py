"""Second moments of a regression, and its ridge solution with the strength chosen on held-out data."""

from __future__ import annotations

from dataclasses import dataclass

import torch


# Ridge strengths tried, relative to the mean eigenvalue of the inputs' second moment.
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class RidgeFit:
    """Solution of `y ≈ W x`.

    Args:
        weight (`torch.Tensor`): W, shape (dim_y, dim_x), float32.
        r2 (`torch.Tensor`): Held-out share of explained variance (uncentred) of each block of outputs.
        ridge (`float`): The chosen relative strength.
    """

    weight: torch.Tensor
    r2: torch.Tensor
    ridge: float


class Moments:
    """Sums of x xᵀ, y xᵀ and y² over positions, for fitting and held-out texts apart. Memory does not grow with text.

    Args:
        dim_x (`int`): Width of the inputs x.
        dim_y (`int`): Width of the outputs y.
    """

    def __init__(self, dim_x: int, dim_y: int, device: torch.device) -> None:
        self.xx = torch.zeros(2, dim_x, dim_x, device=device)
        self.yx = torch.zeros(2, dim_y, dim_x, device=device)
        self.yy = torch.zeros(2, dim_y, device=device)
        self.count = [0, 0]

    def update(self, x: torch.Tensor, y: torch.Tensor, held_out: bool) -> None:
        """Add positions: x (n, dim_x), y (n, dim_y)."""
        part = int(held_out)
        x, y = x.float(), y.to(x.device).float()
        self.xx[part].addmm_(x.T, x)
        self.yx[part].addmm_(y.T, x)
        self.yy[part] += y.square().sum(0)
        self.count[part] += len(x)

    def solve(self, blocks: list[int], ridge: float | None = None) -> RidgeFit:
        """Ridge regression on the fitting texts; the strength with the least error on the held-out texts is used.

        Args:
            blocks (`list[int]`): Sizes of the groups of outputs for which R² is reported; they sum to dim_y.
            ridge (`float`, *optional*): A fixed strength instead of the choice.
        """
        fit, test = 0, 1
        if self.count[test] == 0:
            test = fit
        # float64: the moments of language models are ill-conditioned (a few huge directions).
        xx, yx = self.xx[fit].double(), self.yx[fit].double()
        xx_test, yx_test, yy_test = self.xx[test].double(), self.yx[test].double(), self.yy[test].double()
        scale = xx.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        best = None
        for strength in (ridge,) if ridge is not None else RIDGES:
            damped = xx + strength * scale * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                continue
            weight = torch.cholesky_solve(yx.T, factor).T
            # ‖y − W x‖² per output, from the moments alone
            error = yy_test - 2 * (weight * yx_test).sum(1) + ((weight @ xx_test) * weight).sum(1)
            r2 = torch.stack(
                [1 - e.sum() / y.sum().clamp_min(1e-30) for e, y in zip(error.split(blocks), yy_test.split(blocks))]
            )
            score = float(r2.mean())
            if best is None or score > best[0]:
                best = (score, RidgeFit(weight.float(), r2.float().cpu(), strength))
        if best is None:
            raise ValueError(
                "The closed-form fit could not be solved: the activations contain NaN or infinite values. Load the "
                "models in float32 or bfloat16."
            )
        return best[1]
