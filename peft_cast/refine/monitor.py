"""Monitoring a refinement: the best projections so far are kept, and one that diverges is stopped."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainerCallback

from ..utils import write_tensors


FILE = "monitor.safetensors"
REMEDY = "Lower `learning_rate`, or load the models in float32 if they are not."


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what is trained, on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in trained_parameters(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Undo what was trained since `copies` was called."""
    for name, parameter in trained_parameters(model).items():
        parameter.copy_(values[name])


class DivergenceMonitor(TrainerCallback):
    """Keeps the best projections so far, and stops a training whose loss became useless.

    The best are those at the end of the stretch of steps, a twentieth of the training, with the lowest mean loss. A
    training diverges when, for a tenth of all steps on end and at least ten, every loss is above three times that of
    the
    first stretch and half a nat more: noise does not last that long, and a training that comes back is left alone.

    Attributes:
        best: Copies of what was trained, with `best_step`; empty as long as nothing good exists.
        stopped (`str`, *optional*): Why the training was stopped.
        together: Texts that all processes read at a time.
    """

    def __init__(self, together: int = 0) -> None:
        self.together = together
        self.losses: list[float] = []  # of the batches of this step
        self.stretch: list[float] = []  # of the steps since the last look
        self.start: float | None = None
        self.lowest: float | None = None
        self.above = 0
        self.best: dict[str, torch.Tensor] = {}
        self.best_step = 0
        self.stopped: str | None = None

    def see(self, loss: float) -> None:
        """Note the loss of a batch, the mean of all processes: the KL divergence in nats, where it is trained on."""
        self.losses.append(loss)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        loss = sum(self.losses) / max(1, len(self.losses))
        self.losses.clear()
        self.stretch.append(loss)
        if self.start is not None:
            self.above = self.above + 1 if loss > 3 * self.start + 0.5 else 0
        if len(self.stretch) >= max(1, state.max_steps // 20):
            self._look(model, state.global_step)
        if self.above >= max(10, state.max_steps // 10):
            self.stop(f"The loss diverged: {self.start:.3g} at the start, {loss:.3g} at step {state.global_step}.")
            control.should_training_stop = True

    def _look(self, model: nn.Module, step: int) -> None:
        mean = sum(self.stretch) / len(self.stretch)
        self.stretch.clear()
        self.start = mean if self.start is None else self.start
        if self.lowest is None or mean < self.lowest:
            # A step on a broken gradient shows in the next loss only.
            if all(p.isfinite().all() for p in trained_parameters(model).values()):
                self.lowest, self.best, self.best_step = mean, copies(model), step

    @staticmethod
    def together_in(folder: Path) -> int:
        """How many texts were read at a time in a training that was saved."""
        with safe_open(folder / FILE, framework="pt") as saved:
            return json.loads(saved.metadata()["monitor"])["together"]

    def stop(self, why: str) -> None:
        """Note why the training ends early."""
        kept = f" The projections of step {self.best_step}, the best so far, were kept." if self.best else ""
        self.stopped = f"{why}{kept} {REMEDY}"

    def save(self, folder: Path) -> None:
        """Write what a resumed training must know; at a step's end."""
        names = ("stretch", "start", "lowest", "above", "best_step", "together")
        write_tensors(self.best, folder / FILE, monitor=json.dumps({name: getattr(self, name) for name in names}))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, all but `together`, which is this training's own."""
        with safe_open(folder / FILE, framework="pt") as saved:
            for name, value in json.loads(saved.metadata()["monitor"]).items():
                setattr(self, name, value if name != "together" else self.together)
            self.best = {name: saved.get_tensor(name) for name in saved.keys()}
