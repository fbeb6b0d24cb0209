"""Refinement: train the projections against the adapted source model, on transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import Trainer

from ..align import AlignedPair
from .batches import collate_pairs, side_of
from .capture import layer_outputs
from .closed_form import with_bias
from .losses import kl_divergence, mix_logits, normalised_mse


@dataclass(frozen=True)
class TeacherSettings:
    """What the translated model is trained towards.

    Args:
        alpha (`float`): Weight of the KL divergence between the teacher's and the student's next-token predictions.
        beta (`float`): Weight of the normalised MSE between hidden states; 0 skips it.
        temperature (`float`): Temperature of the KL divergence.
        target_share (`float`): 0 is the `source` teacher (the source model with its LoRA), 1 the `delta` teacher (the
            target's own prediction changed by what the LoRA changes in the source); values between mix them.
    """

    alpha: float = 1.0
    beta: float = 0.0
    temperature: float = 1.0
    target_share: float = 0.0


class Teacher:
    """Teacher logits and hidden states at the aligned positions of a batch.

    Args:
        source (`PeftModel`): The source model with its LoRA.
        settings (`TeacherSettings`): The losses.
        hidden_maps: Path of each target layer → (path of its source layer, map from source state and 1 to target state).
    """

    def __init__(
        self,
        source: PeftModel,
        settings: TeacherSettings,
        hidden_maps: Mapping[str, tuple[str, torch.Tensor]] | None = None,
    ) -> None:
        self.source, self.settings = source, settings
        self.hidden_maps = dict(hidden_maps or {}) if settings.beta else {}
        self.layers = {"source": {path for path, _ in self.hidden_maps.values()}, "target": set(self.hidden_maps)}

    def _run(self, model, base, batch: dict, side: str) -> tuple[torch.Tensor, dict]:
        """Logits (m, vocabulary) and hidden states by layer path (m, hidden) at the m aligned positions."""
        inputs, rows, positions = side_of(batch, side, base.device)
        with layer_outputs(base, self.layers[side]) as states:
            logits = model(**inputs).logits
        return logits[rows, positions], {path: state[rows, positions] for path, state in states.items()}

    def student(self, model, base: PeftModel, batch: dict) -> tuple[torch.Tensor, dict]:
        """Logits (m, vocabulary) and, per target layer, hidden states (m, hidden_T) of the translated model.

        `model` is what is called (it may be wrapped for distributed training), `base` the PeftModel in it.
        """
        return self._run(model, base.get_base_model(), batch, "target")

    @torch.no_grad()
    def goals(self, target: PeftModel, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Teacher logits (m, vocabulary) and, per target layer, the hidden states (m, hidden_T) to reach."""
        share, device = self.settings.target_share, target.device
        source = (self.source, self.source.get_base_model(), batch, "source")
        adapted, adapted_states = self._run(*source)
        if share:
            with self.source.disable_adapter():
                plain, plain_states = self._run(*source)
            with target.disable_adapter():
                own, own_states = self.student(target, target, batch)
            logits = mix_logits(adapted.to(device), plain.to(device), own, share)
        else:
            logits = adapted.to(device)
        states = {}
        for path, (source_path, weight) in self.hidden_maps.items():
            weight = weight.to(device)
            state = with_bias(adapted_states[source_path].to(device).float()) @ weight.T
            if share:
                mapped = with_bias(plain_states[source_path].to(device).float()) @ weight.T
                state = state + share * (own_states[path].float() - mapped)
            states[path] = state
        return logits, states


class CastTrainer(Trainer):
    """`transformers.Trainer` with the loss `alpha T² KL(teacher ‖ student) + beta MSE(hidden)` on aligned positions.

    Args:
        teacher (`Teacher`): The adapted source model and the loss settings.
        Everything else as in `transformers.Trainer`; the dataset is a list of `AlignedPair`.
    """

    def __init__(self, *args, teacher: Teacher, **kwargs) -> None:
        super().__init__(*args, data_collator=collate_pairs, **kwargs)
        self.teacher = teacher
        # The loss is a mean over the batch: let Trainer divide by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.parts: dict[str, list[float]] = {"kl": [], "mse": []}

    def create_optimizer(self, model=None):
        # Factors differ in size by orders of magnitude (activations and gradients of two models have their own units),
        # and Adam's steps do not know: each tensor's step is in proportion to its root mean square at the start.
        if self.optimizer is None:
            groups = [
                {"params": [p], "lr": self.args.learning_rate * max(float(p.detach().square().mean().sqrt()), 1e-4)}
                for p in self.model.parameters()
                if p.requires_grad
            ]
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_cls(groups, **kwargs)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        settings = self.teacher.settings
        base = self.accelerator.unwrap_model(model)
        goal, goal_states = self.teacher.goals(base, inputs)
        logits, states = self.teacher.student(model, base, inputs)
        kl = kl_divergence(goal, logits, settings.temperature)
        loss = settings.alpha * kl
        self.parts["kl"].append(float(kl.detach()))
        if goal_states:
            mse = torch.stack([normalised_mse(states[path], goal) for path, goal in goal_states.items()]).mean()
            loss = loss + settings.beta * mse
            self.parts["mse"].append(float(mse.detach()))
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss became {float(loss)} at step {self.state.global_step}: lower `learning_rate`, or load the "
                "models in float32. Checkpoints written so far are intact."
            )
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        for name, values in self.parts.items():
            if values and "loss" in logs:
                logs[name] = sum(values) / len(values)
                values.clear()
        if "learning_rate" in logs:  # of the first tensor; what was asked for is the relative rate
            group = self.optimizer.param_groups[0]
            logs["learning_rate"] = self.args.learning_rate * group["lr"] / group["initial_lr"]
        super().log(logs, *args, **kwargs)


@torch.no_grad()
def distance_to_teacher(
    model: PeftModel, teacher: Teacher, pairs: Sequence[AlignedPair], batch_size: int = 8
) -> float:
    """KL(teacher ‖ model) in nats per aligned position over some texts, at temperature 1.

    Args:
        model: The translated model; put `model.disable_adapter()` around the call for the untouched target.
        teacher: The teacher.
        pairs: The texts.
        batch_size (`int`): Texts per pass.
    """
    total, count = 0.0, 0
    for i in range(0, len(pairs), batch_size):
        batch = collate_pairs(pairs[i : i + batch_size])
        goal, _ = teacher.goals(model, batch)
        logits, _ = teacher.student(model, model, batch)
        total += float(kl_divergence(goal, logits)) * len(goal)
        count += len(goal)
    return total / count
