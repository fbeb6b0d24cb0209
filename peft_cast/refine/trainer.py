"""Refinement: train the projections against the adapted source model, on transformers' Trainer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from ..models import sharding
from ..utils import distributed, give_back_memory, within_memory
from .batches import ByLength, TrainingTexts, collate_items
from .cache import TopKLogProbs
from .checkpoints import CheckpointedTrainer
from .losses import kl_divergence, normalized_mse, whole
from .monitor import DivergenceMonitor, copies, put_back
from .teacher import Teacher


def training_precision(model: PeftModel) -> torch.autocast:
    """What the student is run under while it trains: an adapter on a bfloat16 model is multiplied in bfloat16 too.

    The gradients are as near to those of a float32 model as with float32 products (docs/lab-book.md, Speed).
    """
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)


# Root mean square that a LoRA's B, which begins at zero, is taken to have: about a tenth of its A's.
SIZE_OF_B = 2e-3


def _sizes(module: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """The module's own trainable parameters and their root mean squares; what starts at zero takes the first's, or a
    B's.
    """
    own = [p for p in module.parameters(recurse=False) if p.requires_grad]
    sizes = [float(p.detach().square().mean().sqrt()) for p in own]
    return [(p, size or sizes[0] or SIZE_OF_B) for p, size in zip(own, sizes)]


class _GiveBack(TrainerCallback):
    """On a CPU: what each batch leaves in the heap adds up to gigabytes (docs/lab-book.md, Memory)."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if args.use_cpu:
            give_back_memory()


class CastTrainer(CheckpointedTrainer):
    """`transformers.Trainer` with the loss `alpha T² KL(teacher ‖ student) + beta MSE(hidden) + gamma KL(target ‖
    student)`.

    The first two are taken at aligned positions, the last at the anchors.

    Args:
        teacher (`Teacher`): The adapted source model and the loss settings.
        Everything else as in `transformers.Trainer`; the dataset is a `TrainingTexts`.
    """

    def __init__(self, *args, teacher: Teacher, **kwargs) -> None:
        super().__init__(*args, data_collator=collate_items, **kwargs)
        self.teacher = teacher
        # The loss is a mean over the batch: let Trainer divide by the number of accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.parts: dict[str, list[float]] = {"kl": [], "mse": [], "kl_anchor": []}
        self.add_callback(_GiveBack())

    def _get_train_sampler(self, *args, **kwargs) -> ByLength:
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * distributed.world_size()
        return ByLength([len(pair.target_ids) for pair in self.train_dataset.pairs], together, self.args.seed)

    def create_optimizer(self, model=None):
        # Factors differ in size by orders of magnitude (activations and gradients of two models have their own units),
        # and Adam's steps do not know: each tensor's step is in proportion to its root mean square at the start.
        if self.optimizer is None:
            found = [pair for module in self.model.modules() for pair in _sizes(module)]
            sizes = distributed.broadcast([size for _, size in found])
            groups = [
                {"params": [parameter], "lr": self.args.learning_rate * max(size, 1e-4)}
                for (parameter, _), size in zip(found, sizes)
            ]
            optimizer_cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_cls(groups, **kwargs)
        return super().create_optimizer()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        training = self.teacher.training
        base = self.accelerator.unwrap_model(model)
        if self.teacher.cache is not None:
            goal, goal_states = self.teacher.cached_goals(base, *inputs["texts"]), {}
        else:
            goal, goal_states = self.teacher.goals(base, inputs)
        with training_precision(base):
            logits, states = self.teacher.student(model, base, inputs)
        if isinstance(goal, TopKLogProbs):
            divergence = goal.kl_divergence(logits, training.temperature)
        else:
            divergence = kl_divergence(goal, logits, training.temperature)
        # Means over the batch, of which each process has a part: gradients are averaged over processes, so with sums
        # over the part, divided by what a process has on average, they are those of one process that has it all.
        aligned, texts = len(inputs["rows"]), len(inputs["source_input_ids"])
        anchors = len(inputs["target_input_ids"]) - texts
        every = [
            n / distributed.world_size()
            for n in distributed.sum_numbers(aligned, len(divergence) - aligned, texts, anchors)
        ]
        parts = {"kl": divergence[:aligned].sum() / every[0]}
        loss = training.alpha * parts["kl"]
        if every[1]:
            parts["kl_anchor"] = divergence[aligned:].sum() / every[1]
            # Batches hold more anchors or fewer, small ones often none: each counts alike, gamma on average.
            share = every[3] * self.train_dataset.every / every[2]
            loss = loss + training.anchor_weight * share * parts["kl_anchor"]
        if goal_states:  # its variance is that of each process's own positions
            mse = [normalized_mse(states[path], goal) for path, goal in goal_states.items()]
            parts["mse"] = torch.stack(mse).mean()
            loss = loss + training.beta * parts["mse"]
        # What decides must be the same in all processes, or they wait for each other for ever.
        numbers = distributed.sum_numbers(float(loss.detach()), *(float(part.detach()) for part in parts.values()))
        total, *means = (number / distributed.world_size() for number in numbers)
        if not math.isfinite(total):
            raise FloatingPointError(f"The loss became {total} at step {self.state.global_step + 1}.")
        for name, mean in zip(parts, means):
            self.parts[name].append(mean)
        self.monitor.see(means[0] if training.alpha else total)
        return (loss, {"logits": whole(logits)}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        for name, values in self.parts.items():
            if values and "loss" in logs:
                logs[name] = sum(values) / len(values)
                values.clear()
        if "learning_rate" in logs:  # of the first tensor; what was asked for is the relative rate
            group = self.optimizer.param_groups[0]
            logs["learning_rate"] = self.args.learning_rate * group["lr"] / group["initial_lr"]
        super().log(logs, *args, **kwargs)


@dataclass(frozen=True)
class Refinement:
    """What a refinement did.

    Args:
        history: Trainer's log.
        steps (`int`): How many steps were taken.
        stopped (`str`, *optional*): Why it ended before the last one, if it did.
        batch_size, gradient_accumulation_steps (`int`, *optional*): What was used; where memory ran out, smaller
            batches than asked for, more of them per step.
    """

    history: Sequence[dict[str, float]] = ()
    steps: int = 0
    stopped: str | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        """All but the log, JSON-ready."""
        return {name: value for name, value in vars(self).items() if name != "history"}


def refine(
    model: PeftModel,
    teacher: Teacher,
    texts: TrainingTexts,
    *,
    output_dir: str | Path | None = None,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> Refinement:
    """Train what is trainable in `model` towards the teacher.

    Args:
        model: The target with the adapter to train.
        teacher: The adapted source model with the `Training`: its steps, batch size and rate are those of this
            refinement. Of several processes each takes its part of a batch.
        texts: What is read.
        output_dir: Where checkpoints are written; nowhere when `None`.
        progress (`bool`): Show Trainer's progress bar.
        checkpoint (`Path`, *optional*): Where to go on from.

    Raises:
        FloatingPointError: If the loss becomes NaN or infinite before there is anything good to keep.
        torch.OutOfMemoryError: If memory does not suffice for one text at a time.
    """
    training = teacher.training
    if training.steps == 0:
        return Refinement()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = {
            "output_dir": str(Path(output_dir) / "checkpoints") if output_dir else scratch,
            "max_steps": training.steps,
            "per_device_train_batch_size": distributed.batch_per_process(training.batch_size),
            "learning_rate": training.learning_rate,
            "warmup_steps": min(10, training.steps // 5),
            "weight_decay": 0.0,
            "logging_steps": max(1, training.steps // 20),
            "save_strategy": "steps" if output_dir else "no",
            "save_steps": max(1, training.steps // 4),
            "save_total_limit": 2,
            "report_to": [],
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.accelerator.is_available(),
            "disable_tqdm": not progress,
            "use_cpu": model.device.type == "cpu",
            "ddp_find_unused_parameters": False,
            "ddp_broadcast_buffers": False,  # the kernels: they never change
            "seed": training.seed,
        }
        if sharding.is_requested(training.training_args) and not sharding.is_sharded(model):
            raise ValueError(
                "FSDP and ZeRO-3 shard the models that `translate` loads, and these are whole: leave `fsdp` or "
                "`deepspeed` out."
            )
        arguments |= sharding.without_sharding_arguments(training.training_args)
        if sharding.is_sharded(model):
            sharding.exclude_from_ddp(model)
        together = arguments["per_device_train_batch_size"] * arguments.setdefault("gradient_accumulation_steps", 1)
        start = copies(model)

        def train(size: int) -> CastTrainer:
            nonlocal checkpoint
            settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": together // size}
            settings = TrainingArguments(**{**arguments, **settings})
            settings._n_gpu = min(settings.n_gpu, 1)  # several GPUs in one process would mean nn.DataParallel
            trainer = CastTrainer(model=model, args=settings, train_dataset=texts, teacher=teacher)
            if not progress:
                trainer.remove_callback(PrinterCallback)
            put_back(model, start)
            try:
                trainer.train_from(checkpoint)
            finally:
                checkpoint = trainer.last_saved or checkpoint
            return trainer

        size = arguments["per_device_train_batch_size"]
        if checkpoint is not None:  # memory may have run out, and there may have been another number of processes
            before = DivergenceMonitor.together_in(checkpoint) // distributed.world_size()
            size = max(
                divisor for divisor in range(1, together + 1) if together % divisor == 0 and divisor <= max(before, 1)
            )
        trainer = within_memory(train, size)
        model.eval()
        used = trainer.args
        return Refinement(
            trainer.state.log_history,
            trainer.state.global_step,
            trainer.monitor.stopped,
            used.per_device_train_batch_size * distributed.world_size(),
            used.gradient_accumulation_steps,
        )
