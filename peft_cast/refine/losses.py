"""The refinement losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Predictions:
    """Logits (n, vocabulary) that are made in blocks, when they are asked for: memory does not grow with the
    vocabulary.

    Liger's and Apple's fused cross-entropies do the same for labels; here the goal is a distribution.

    Args:
        states (`torch.Tensor`): What the head reads at the n positions, shape (n, hidden).
        head (`nn.Linear`): The head, frozen.
    """

    states: torch.Tensor
    head: nn.Linear

    @property
    def device(self) -> torch.device:
        return self.states.device

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.states), self.head.out_features

    def __len__(self) -> int:
        return len(self.states)

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """The logits of `size` positions after another."""
        for states in self.states.split(positions_together(self, size)):
            yield from self.head(states).split(size)


@dataclass(frozen=True)
class MixedLogits:
    """The logits (n, vocabulary) of `mix_logits`, likewise in blocks.

    Args:
        parts: Those of the adapted source, the plain source and the plain target, each (n, vocabulary).
        share (`float`): Share of the target's own prediction.
        device (`torch.device`): Where they are mixed.
    """

    parts: tuple[torch.Tensor | Predictions, torch.Tensor | Predictions, torch.Tensor | Predictions]
    share: float
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape

    def __len__(self) -> int:
        return len(self.parts[0])

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """The logits of `size` positions after another."""
        adapted, source, target = (part.split(size) for part in self.parts)
        for blocks in zip(adapted, source, target):
            yield self._mixed(*blocks)

    def _mixed(self, adapted: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mix_logits(adapted.to(self.device), source.to(self.device), target.to(self.device), self.share)

    def whole(self) -> torch.Tensor:
        adapted, source, target = map(whole, self.parts)
        return self._mixed(adapted, source, target)


Logits: TypeAlias = torch.Tensor | Predictions | MixedLogits


def whole(logits: Logits) -> torch.Tensor:
    """All the logits at once, (n, vocabulary)."""
    if isinstance(logits, MixedLogits):
        return logits.whole()
    return logits.head(logits.states) if isinstance(logits, Predictions) else logits


def joined(first: Logits, second: Logits) -> Logits:
    """The logits (n + m, vocabulary) of two passes of one model."""
    if isinstance(first, Predictions) and isinstance(second, Predictions):
        return Predictions(torch.cat([first.states, second.states]), first.head)
    return torch.cat([whole(first), whole(second)])


def rows_at_once(logits: Logits) -> int:
    """How many positions of logits (n, vocabulary) to take at a time, so that float32 copies of them stay small.

    Passes over hundreds of positions of a large vocabulary wait for memory: five times as long on a CPU as in its
    cache.
    """
    return max(1, (2**20 if logits.device.type == "cpu" else 2**25) // logits.shape[-1])


def positions_together(logits: Logits, size: int) -> int:
    """How many positions, a multiple of `size`, go through the head together: with few it would wait for its own
    weights.
    """
    return size * max(1, 256 // size)


def kl_divergence(teacher: Logits, student: Logits, temperature: float = 1.0) -> torch.Tensor:
    """`T² KL(softmax(teacher / T) ‖ softmax(student / T))` in nats at each position.

    The factor T² keeps the gradient's size independent of the temperature (Hinton et al., 2015).

    Args:
        teacher (`torch.Tensor` or `Predictions`): Logits, shape (n, vocabulary).
        student (`torch.Tensor` or `Predictions`): Logits, same shape.
        temperature (`float`): T above.

    Returns:
        `torch.Tensor`: Shape (n,).
    """
    size = rows_at_once(student)
    parts = []
    for logits in zip(student.split(size), teacher.split(size)):  # `split`: the gradient of many slices is quadratic
        q, p = (F.log_softmax(z.float() / temperature, dim=-1) for z in logits)
        parts.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    return torch.cat(parts) * temperature**2


class TopKDivergence(torch.autograd.Function):
    """`T² KL` at each position between a teacher cut to its k likeliest tokens and a student, all other tokens taken
    as one.

    With p the teacher's probabilities and q = softmax(student / T), the gradient with respect to the student's logits
    is `T (q_j − p_j)` at the k tokens and `T q_j (1 − p_rest / q_rest)` at the others. It is made along with the
    value, block by block, in the student's dtype: nothing of the vocabulary's width is kept in float32. With a `head`
    it goes on to the states that the head reads, and nothing of the vocabulary's width is kept at all.

    Shapes:
        student (n, vocabulary), or (n, hidden) with a `head`; tokens (n, k); log_p (n, k + 1), or (n, k) when k is the
        whole vocabulary. Returns (n,).
    """

    @staticmethod
    def forward(ctx, student, tokens, log_p, temperature, head=None):
        made = student if head is None else Predictions(student, head)
        together = rows_at_once(made) if head is None else positions_together(made, rows_at_once(made))
        divergence = torch.empty(len(student), device=student.device)
        gradient = torch.empty_like(student) if student.requires_grad else None
        for i in range(0, len(student), together):
            rows = slice(i, i + together)
            logits = student[rows] if head is None else head(student[rows])
            divergence[rows], found = _top_k_divergence(
                logits, tokens[rows], log_p[rows], temperature, gradient is not None
            )
            if gradient is not None:
                gradient[rows] = found if head is None else found @ head.weight
        ctx.gradient = gradient
        return divergence

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient * upstream[:, None].to(ctx.gradient.dtype), None, None, None, None


def _top_k_divergence(
    logits: torch.Tensor, tokens: torch.Tensor, log_p: torch.Tensor, temperature: float, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Value of `TopKDivergence` at some positions and, if `wanted`, its gradient with respect to the logits."""
    size = rows_at_once(logits)
    divergence = torch.empty(len(logits), device=logits.device)
    gradient = torch.empty_like(logits) if wanted else None
    for i in range(0, len(logits), size):
        rows = slice(i, i + size)
        x, at, log_p_at = logits[rows].float() / temperature, tokens[rows].long(), log_p[rows].float()
        p, k = log_p_at.exp(), at.shape[-1]
        total = x.logsumexp(-1, keepdim=True)
        log_q = x.gather(-1, at) - total
        others = x.scatter_(-1, at, -torch.inf)
        if k < x.shape[-1]:
            log_q = torch.cat([log_q, others.logsumexp(-1, keepdim=True) - total], dim=-1)
        divergence[rows] = (p * (log_p_at - log_q)).sum(-1) * temperature**2
        if gradient is not None:
            mass = p.sum(-1, keepdim=True)  # 1 but for rounding
            q = others.sub_(total).exp_()
            if k < x.shape[-1]:
                q.mul_(mass - p[:, k:] * (-log_q[:, k:]).clamp_max(80).exp())
            q.scatter_(-1, at, mass * log_q[:, :k].exp() - p[:, :k])
            gradient[rows] = q.mul_(temperature)
    return divergence, gradient


def normalized_mse(prediction: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Mean squared error divided by the variance of `goal` over positions, so that layers count alike.

    Args:
        prediction (`torch.Tensor`): Shape (n, d).
        goal (`torch.Tensor`): Shape (n, d).
    """
    goal = goal.float()
    variance = goal.var(dim=0, unbiased=False).sum().clamp_min(1e-6)
    return (prediction.float() - goal).square().sum(dim=-1).mean() / variance


def mix_logits(adapted: torch.Tensor, source: torch.Tensor, target: torch.Tensor, share: float) -> torch.Tensor:
    """Teacher logits `z_S+LoRA + share * (z_T − z_S)`: `share` 0 is the `source` teacher, 1 the `delta` teacher.

    Args:
        adapted, source, target (`torch.Tensor`): Logits (n, vocabulary) of the adapted source, plain source and plain
            target over the shared vocabulary. They are normalized first, so that their offsets do not matter.
        share (`float`): Share of the target's own prediction.
    """
    adapted, source, target = (F.log_softmax(z.float(), dim=-1) for z in (adapted, source, target))
    return adapted + share * (target - source)
