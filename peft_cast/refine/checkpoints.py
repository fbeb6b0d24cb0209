"""Checkpoints: whole or not there, written also when something stops the training, and gone on from bit for bit."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
import zipfile
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils import PARTIAL, distributed, optional, replacing, why_unwritten
from .monitor import FILE as MONITOR
from .monitor import DivergenceMonitor, put_back


ADAPTER, STATE = "adapter_model.safetensors", "trainer_state.json"
UNWRITABLE = (OSError, RuntimeError, SafetensorError)  # a full disk, says Python, torch or safetensors
PICKLES = ("optimizer.pt", "scheduler.pt")
RANDOM = "rng_state*.pth"  # of each process


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder, the oldest first."""
    found = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: int(found[path]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; Trainer's own search takes the newest, whole or not."""
    return next((path for path in reversed(checkpoints(folder)) if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that a training needs to go on is there and complete."""
    weights = [*checkpoint.glob(ADAPTER), *checkpoint.glob(f"*/{ADAPTER}")]
    try:
        for file in (*weights, checkpoint / MONITOR):
            with safe_open(file, framework="pt"):  # compares the header with the file's size
                pass
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError):
        return False
    random = list(checkpoint.glob(RANDOM))
    pickles = [*(checkpoint / name for name in PICKLES), *random]
    return bool(weights and random) and "global_step" in state and all(map(zipfile.is_zipfile, pickles))


def read_state(checkpoint: Path) -> TrainerState:
    """Trainer's state: the step, the log, the batch size."""
    return TrainerState.load_from_json(str(checkpoint / STATE))


def _replace_state(state: TrainerState, checkpoint: Path) -> None:
    with optional("The smaller batch size"), replacing(checkpoint / STATE) as file:
        state.save_to_json(str(file))


def _partial_folder(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=PARTIAL, dir=folder)


class _Boundary(TrainerCallback):
    """Knows whether the training is between two updates of the weights, and the random state at the last one's end."""

    def __init__(self) -> None:
        self.whole = False
        self.random: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.whole = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        on_gpu = torch.cuda.is_available()
        self.random = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None
        self.whole = True

    def put_back(self) -> None:
        if self.random is None:  # before the first step nothing was drawn
            return
        state, on_gpu = self.random
        torch.set_rng_state(state)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


class CheckpointedTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints are whole or not there, with a `DivergenceMonitor`.

    A checkpoint is written to a folder of another name and renamed; one that cannot be written is a warning. Of
    several processes each writes its random state and the main one everything else.

    Attributes:
        monitor (`DivergenceMonitor`): To be told the losses.
        last_saved (`Path`, *optional*): The newest checkpoint that this trainer wrote.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.current_flos: float = 0
        self.monitor, self.boundary = (
            DivergenceMonitor(self.args.per_device_train_batch_size * distributed.world_size()),
            _Boundary(),
        )
        self.last_saved: Path | None = None
        self._writing: str | None = None
        self.add_callback(self.monitor)
        self.add_callback(self.boundary)

    def _get_output_dir(self, trial) -> str:
        return self._writing or super()._get_output_dir(trial)

    def store_flos(self) -> None:
        # Trainer adds up those of all processes, in the middle of a checkpoint: one that cannot write would be waited
        # for.
        self.state.total_flos += self.current_flos
        self.current_flos = 0

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial))
        place = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        save = super()._save_checkpoint

        def finish() -> None:
            written = Path(str(self._writing)) / place.name
            self.monitor.save(written)
            if place.exists():
                shutil.rmtree(place)
            written.replace(place)

        try:
            self._writing = distributed.on_main_process(lambda: _partial_folder(folder))
            distributed.on_every_process(lambda: save(model, trial))
            distributed.on_main_process(finish)
        except UNWRITABLE as error:
            if distributed.is_main_process():
                warnings.warn(
                    f"The checkpoint of step {self.state.global_step} could not be written to '{folder}' "
                    f"({why_unwritten(error)}): the training goes on without it."
                )
            return
        finally:
            if self._writing and distributed.is_main_process():
                shutil.rmtree(self._writing, ignore_errors=True)
            self._writing = None
        if distributed.on_main_process(lambda: is_whole(place)):  # not with `save_only_model`
            self.last_saved = place
        if self.args.save_total_limit and distributed.is_main_process():
            others = [path for path in checkpoints(folder) if path != place]
            for old in others[: max(0, len(others) - self.args.save_total_limit + 1)]:
                shutil.rmtree(old, ignore_errors=True)

    def save_last_step(self) -> None:
        """Write a checkpoint of the last whole step, unless there is none or something stopped an update halfway.

        Several processes write none: what stopped this one need not have stopped the others, which a checkpoint takes.
        """
        step = self.state.global_step
        if distributed.world_size() > 1:
            return
        if self.boundary.whole and (self.last_saved is None or read_state(self.last_saved).global_step < step):
            self.boundary.put_back()
            self._save_checkpoint(self.model_wrapped, None)

    def train_from(self, checkpoint: Path | None = None) -> None:
        """Train, from a checkpoint on if there is one. What stops the training is raised after the last step is saved.

        A loss that is not finite, or diverges, ends the training with the best projections so far and a warning.

        Raises:
            FloatingPointError: If there are none yet.
        """
        if checkpoint is not None:
            self.monitor.load(checkpoint)
            state = read_state(checkpoint)
            if state.global_step >= state.max_steps:  # Trainer would take another step
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
            size = self.args.per_device_train_batch_size
            if state.train_batch_size != size:  # memory ran out; Trainer would take the old size from here
                state.train_batch_size = size
                distributed.on_main_process(partial(_replace_state, state, checkpoint))
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except FloatingPointError as error:
            self.monitor.stop(str(error))
        except BaseException:
            self.save_last_step()
            raise
        if self.monitor.stopped:
            if not self.monitor.best:
                raise FloatingPointError(self.monitor.stopped)
            put_back(self.model, self.monitor.best)
            self.model.zero_grad()
            warnings.warn(self.monitor.stopped)
