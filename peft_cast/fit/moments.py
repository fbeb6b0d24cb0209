"""Second moments of a regression, and its ridge solution with the strength chosen on held-out data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from ..source import leading_triplets
from ..utils import distributed
from .maps import Map


# Ridge strengths that can be chosen, relative to the mean eigenvalue of the inputs' second moment.
RIDGES = (1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0, 100.0)
# Side of the blocks in which symmetric products are made: small enough to skip nearly half the work.
BLOCK = 256
# Share of what a map predicts that a bridge keeps at most: what lies beyond is the rounding of bfloat16.
CARRIED = 0.9999
# Most held-out positions that are kept.
HELD_OUT = 8192


@dataclass(frozen=True)
class RidgeFit:
    """Solution of `y ≈ W x`.

    Args:
        weight (`torch.Tensor`): W, shape (dim_y, dim_x), float32.
        r2 (`torch.Tensor`): Held-out share of explained variance (uncentered) of each block of outputs.
        ridge (`float`): The chosen relative strength.
    """

    weight: torch.Tensor
    r2: torch.Tensor
    ridge: float


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Lets float32 matrices be multiplied as bfloat16 (TF32 on a GPU) and summed in float32.

    Of numbers that come from bfloat16 the products are exact, and made several times as fast where there is hardware
    for it.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer torch.backends.*.fp32_precision: left as it is
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Moments:
    """Sums of x xᵀ and y xᵀ over the positions of fitting texts, and some held-out positions as they are.

    Memory does not grow with the text. Of several processes each has its own positions; `solve` brings them together.

    Args:
        dim_x (`int`): Width of the inputs x.
        dim_y (`int`): Width of the outputs y.
    """

    def __init__(self, dim_x: int, dim_y: int, device: torch.device) -> None:
        self.xx = torch.zeros(dim_x, dim_x, device=device)
        self.yx = torch.zeros(dim_y, dim_x, device=device)
        self.yy = torch.zeros(dim_y, device=device)
        self.held_out: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.any_held_out = False  # in any process
        self.guess: torch.Tensor | None = None  # what the solution is drawn to, (dim_y, dim_x)
        self.near: list[bool] = []  # for each block whether its guess was taken up

    def update(self, x: torch.Tensor, y: torch.Tensor, held_out: bool, elsewhere: int = 0) -> None:
        """Add positions: x (n, dim_x), y (n, dim_y). `elsewhere` is how many held-out ones before them other processes
        have.
        """
        y = y.to(x.device).float()
        if held_out:
            room = HELD_OUT - elsewhere - sum(len(kept) for kept, _ in self.held_out)
            if room > 0:
                self.held_out.append((x[:room].clone(), y[:room].clone()))
            return
        exact = x.dtype == torch.bfloat16
        x = x.float()
        with bfloat16_products() if exact else nullcontext():
            for i in range(0, x.shape[1], BLOCK):  # x xᵀ is symmetric: blocks on and above the diagonal will do
                self.xx[i : i + BLOCK, i:].addmm_(x[:, i : i + BLOCK].T, x[:, i:])
        self.yx.addmm_(y.T, x)
        self.yy += y.square().sum(0)

    def solve(
        self,
        blocks: list[int],
        ridge: float | None = None,
        start: float = 1e-2,
        guesses: Sequence[torch.Tensor | None] = (),
    ) -> RidgeFit:
        """Ridge regression on the fitting texts; the strength with the least error on the held-out texts is used.

        Args:
            blocks (`list[int]`): Sizes of the groups of outputs for which R² is reported; they sum to dim_y.
            guesses: For each block a map (block, dim_x) that it may be near to, or `None`. One that explains something
                of the held-out texts is what its block is drawn to, instead of 0.
            ridge (`float`, *optional*): A fixed strength instead of the choice.
            start (`float`): The strength in `RIDGES` where the search begins; it stops at the first that is no better.

        Raises:
            ValueError: If the moments are not finite.
        """
        distributed.all_reduce_sum(self.xx, self.yx, self.yy)
        for i in range(0, len(self.xx), BLOCK):
            self.xx[i + BLOCK :, i : i + BLOCK] = self.xx[i : i + BLOCK, i + BLOCK :].T
        given = [self.xx, self.yx, self.yy, *(y.square().sum() + x.float().square().sum() for x, y in self.held_out)]
        self.any_held_out = distributed.any_process(bool(self.held_out))
        if distributed.any_process(not all(torch.isfinite(m).all() for m in given)):
            raise ValueError(
                "The closed-form fit met NaN or infinite activations or gradients: load the models in float32 or "
                "bfloat16 instead of float16."
            )
        self._draw_to(blocks, guesses)
        if ridge is not None:
            fit = self._solve(blocks, ridge)
            if fit is None:
                raise ValueError(
                    f"`ridge={ridge}` is too weak for this little text: pass more text or a larger value."
                )
            return fit
        middle = RIDGES.index(start)
        while (best := self._solve(blocks, RIDGES[middle])) is None:
            middle += 1
        for direction in (RIDGES[middle + 1 :], RIDGES[:middle][::-1]):
            before = best
            for strength in direction:
                fit = self._solve(blocks, strength)
                if fit is None or fit.r2.mean() <= best.r2.mean():
                    break
                best = fit
            if best is not before:
                break
        return best

    def _draw_to(self, blocks: list[int], guesses: Sequence[torch.Tensor | None]) -> None:
        """Take up the guesses that explain something: models of one origin have nearly the same directions, and a
        ridge towards 0 would shrink what is right already.
        """
        self.near = [False] * len(blocks)
        if all(guess is None for guess in guesses):
            return
        parts = [
            self.yx.new_zeros(size, self.yx.shape[1]) if guess is None else guess.to(self.yx)
            for size, guess in zip(blocks, guesses)
        ]
        r2 = self._explained(torch.cat(parts), blocks)
        self.near = [guess is not None and bool(share > 0) for guess, share in zip(guesses, r2)]
        if any(self.near):
            self.guess = torch.cat([part * near for part, near in zip(parts, self.near)])

    def _solve(self, blocks: list[int], ridge: float) -> RidgeFit | None:
        """The solution of one strength, `None` if it is too weak for the rounding of the moments."""
        # Moments of language models are ill-conditioned (a few huge directions): weak damping needs float64.
        dtype = torch.float64 if ridge < 1e-2 else torch.float32
        damped = self.xx.to(dtype, copy=True)  # the one copy: of a width of 28672 it takes 6 GiB
        damped.diagonal().add_(ridge * damped.diagonal().mean().clamp_min(torch.finfo(dtype).tiny))
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if distributed.any_process(bool(failed)):
            return None
        goal = self.yx.to(dtype)
        if self.guess is not None:
            goal = goal - self.guess.to(dtype) @ self.xx.to(dtype)
        weight = torch.cholesky_solve(goal.T, factor).T.float()
        if self.guess is not None:
            weight += self.guess
        return RidgeFit(weight, self._explained(weight, blocks), ridge)

    def _explained(self, weight: torch.Tensor, blocks: list[int]) -> torch.Tensor:
        """The held-out share of explained variance of each block of outputs."""
        if self.any_held_out:
            zero = torch.zeros_like(self.yy)
            error = sum(((y - x.float() @ weight.T).square().sum(0) for x, y in self.held_out), start=zero)
            total = sum((y.square().sum(0) for _, y in self.held_out), start=zero)
            distributed.all_reduce_sum(error, total)
        else:  # ‖y − W x‖² of the fitting texts, from the moments alone
            error = self.yy - 2 * (weight * self.yx).sum(1) + ((weight @ self.xx) * weight).sum(1)
            total = self.yy
        parts = zip(error.split(blocks), total.split(blocks))
        return torch.stack([1 - e.sum() / y.sum().clamp_min(1e-30) for e, y in parts]).cpu()

    def cut(self, fit: RidgeFit, blocks: list[int], ranks: list[int]) -> tuple[list[Map], list[float]]:
        """The map of each block as two factors: the best of its rank in what it predicts (reduced-rank regression).

        `W x` of the fitting texts has the second moment `W Σ Wᵀ`; with its k leading eigenvectors U the map of rank k
        that predicts most alike is `U (Uᵀ W)`. Where the block was drawn to the identity, what differs from that is
        cut.

        Args:
            fit (`RidgeFit`): What `solve` gave.
            blocks (`list[int]`): As in `solve`.
            ranks (`list[int]`): The most rank of each block. Directions that hold less than `1 - CARRIED` of what a
                map predicts, all together, are left out too.

        Returns:
            For each block its map (block, dim_x), bfloat16 on the CPU, and its held-out R².
        """
        maps, whole = [], []
        for weight, rank, plus_identity in zip(fit.weight.split(blocks), ranks, self.near):
            identity = torch.eye(len(weight), device=weight.device) if plus_identity else 0
            weight = weight - identity
            predicted = weight @ self.xx @ weight.T
            vectors, energy, _ = leading_triplets(predicted, min(rank, len(predicted)))
            k = min(rank, int((energy.cumsum(0) < CARRIED * predicted.trace()).sum()) + 1)
            left = vectors[:, :k].to(torch.bfloat16)
            right = (vectors[:, :k].T @ weight).to(torch.bfloat16)
            maps.append(Map((left.cpu(), right.cpu()), plus_identity))
            whole.append(left.float() @ right.float() + identity)
        return maps, self._explained(torch.cat(whole), blocks).tolist()
