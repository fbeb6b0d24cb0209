"""The refinement losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`T² KL(softmax(teacher / T) ‖ softmax(student / T))` in nats at each position.

    The factor T² keeps the gradient's size independent of the temperature (Hinton et al., 2015).

    Args:
        teacher (`torch.Tensor`): Logits, shape (n, vocabulary).
        student (`torch.Tensor`): Logits, same shape.
        temperature (`float`): T above.

    Returns:
        `torch.Tensor`: Shape (n,).
    """
    teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    student = F.log_softmax(student.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def normalised_mse(prediction: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
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
            target over the shared vocabulary. They are normalised first, so that their offsets do not matter.
        share (`float`): Share of the target's own prediction.
    """
    adapted, source, target = (F.log_softmax(z.float(), dim=-1) for z in (adapted, source, target))
    return adapted + share * (target - source)
