"""How strongly the finished adapter should act: a few strengths tried on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel

from ..source import Pair
from ..text import PairTexts
from ..tuner import CastLayer
from ..utils import Phases, within_memory
from .imitate import distance_to_teacher
from .teacher import Teacher, compares_outputs_alone


STRENGTHS = (0.5, 0.75, 1.25, 1.5)  # beside 1, as it was trained, and 0, the untouched target
# What another strength must gain, as a share of the way to the teacher, to be taken: less than that a few texts cannot
# tell.
WORTH_IT = 0.01


def settle_strength(
    pair: Pair, model: PeftModel, teacher: Teacher, texts: PairTexts, kl: Mapping[str, float], phases: Phases
) -> tuple[float, dict[str, Any]]:
    """Let the adapter act as strongly as brings it nearest to the teacher on held-out text.

    A strength multiplies what its projections write; another than 1 is kept in their weights.

    Args:
        pair (`Pair`): The models.
        model (`PeftModel`): The translated model.
        teacher (`Teacher`): Its teacher.
        texts (`PairTexts`): Of which the held-out ones are read.
        kl: The KL from the teacher of the untouched `target` and at the `end`, in nats per aligned position.
        phases: Where the costs are noted, as `evaluate`.

    Returns:
        The KL after that, and JSON-ready the `strength`, with the share of the way covered at each one (`strengths`);
        empty where it is not tried: with FSDP, ZeRO-3 or hidden states, or where there is no way.
    """
    if not compares_outputs_alone(teacher.training) or kl["target"] <= 0:
        return kl["end"], {}
    layers = [module for module in model.modules() if isinstance(module, CastLayer)]
    kernels = [kernel for layer in layers for group in layer.peft_cast_kernels.values() for kernel in group]
    factors = {id(one): (one, one.detach().clone()) for kernel in kernels for one in kernel.P_out.last_factors()}

    def act(strength: float) -> None:
        with torch.no_grad():
            for one, trained in factors.values():
                one.copy_(strength * trained)

    found = {0.0: kl["target"], 1.0: kl["end"]}
    with phases.measure("evaluate"), teacher.heads(pair):
        distance = partial(distance_to_teacher, model, teacher, texts.held_out)
        for strength in STRENGTHS:
            act(strength)
            found[strength] = within_memory(distance, teacher.training.batch_size)
        best = min((strength for strength in found if strength), key=found.__getitem__)
        if found[1.0] - found[best] < WORTH_IT * kl["target"]:
            best = 1.0
        act(best)
    covered = {str(strength): 1 - found[strength] / kl["target"] for strength in sorted(found)}
    return found[best], {"strength": best, "strengths": covered}
