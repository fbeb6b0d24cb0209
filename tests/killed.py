"""Kills translations with SIGKILL at seeded moments, resumes them and compares with one that was left alone.

    python tests/killed.py FOLDER --kills 20 --seed 0

A moment is a call of a module, or something done to a file of the output folder (while models are loaded, to their
files); they are numbered within each phase, so that short ones are hit as often as long ones. The phase "writing" is
every writing of tensors, stopped with half of the file on the disk. One line of JSON for each kill.
"""

import argparse
import gc
import json
import os
import random
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import conftest
import torch

import peft_cast
from peft_cast.refine.checkpoints import last_checkpoint, read_state
from peft_cast.refine.run import RunFolder
from peft_cast.refine.trainer import CastTrainer
from peft_cast.utils.phases import Phases


PHASES = ("refine", "checkpoint", "writing", "save", "text", "closed_form", "evaluate", "load")
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


class Moments:
    """Counts what happens in each phase, and kills the process at one moment."""

    def __init__(self, folder: Path, at: tuple[str, int] | None = None) -> None:
        self.folder, self.at, self.counts, self.phase = str(folder), at, Counter(), None

    def pass_by(self, phase: str | None = None) -> bool:
        """Count a moment of the phase, by default the one at work; whether it is the one to die at."""
        phase = phase or self.phase
        self.counts[phase] += phase is not None
        return (phase, self.counts[phase]) == self.at

    def die_at(self, *_) -> None:
        if self.pass_by():
            os.kill(os.getpid(), signal.SIGKILL)

    def within(self, phase: str, function):
        def wrapped(*args, **kwargs):
            before, self.phase = self.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self.phase = before

        return wrapped

    def halfway(self, function, place: int):
        """The function that writes a file, whose path is its argument number `place`."""

        def wrapped(*args, **kwargs):
            function(*args, **kwargs)
            if self.pass_by("writing"):
                os.truncate(args[place], os.path.getsize(args[place]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    def listen(self) -> None:
        torch.nn.modules.module.register_module_forward_pre_hook(self.die_at)

        def on_event(event: str, args: tuple) -> None:
            if event not in FILE_EVENTS or not args:
                return
            path, reads = str(args[0]), event == "open" and "r" in str(args[1])
            is_model = self.phase == "load" and path.startswith(os.path.dirname(self.folder))
            if is_model or (path.startswith(self.folder) and not reads):
                self.die_at()

        sys.addaudithook(on_event)
        torch.save = self.halfway(torch.save, 1)
        peft_cast.utils.files.save_file = self.halfway(peft_cast.utils.files.save_file, 1)
        sys.modules["peft.peft_model"].safe_save_file = self.halfway(sys.modules["peft.peft_model"].safe_save_file, 1)
        CastTrainer._save_checkpoint = self.within("checkpoint", CastTrainer._save_checkpoint)
        RunFolder.save = self.within("save", RunFolder.save)
        measure = Phases.measure

        class Measured:
            def __init__(phase, phases, name):
                phase.context, phase.name = measure(phases, name), name

            def __enter__(phase):
                phase.before, self.phase = self.phase, phase.name
                phase.context.__enter__()

            def __exit__(phase, *error):
                self.phase = phase.before
                return phase.context.__exit__(*error)

        Phases.measure = lambda phases, name: Measured(phases, name)


def make_models(folder: Path) -> dict:
    """The arguments of a small translation that uses what is hard to resume: written text, dropout, random
    directions.
    """
    byte, piece = conftest.byte_level_tokenizer(), conftest.sentencepiece_tokenizer()
    source = conftest.save_model(conftest.tiny_model("llama", len(byte)), byte, folder / "source")
    target = conftest.save_model(conftest.tiny_model("opt", len(piece), seed=5), piece, folder / "target")
    lora = conftest.make_lora(conftest.tiny_model("llama", len(byte)), folder / "lora")
    text = peft_cast.SelfWritten(prompts=["Say: one thing", "Say: another"], max_new_tokens=12, batch_size=16)
    return {
        "source": source,
        "adapter": lora,
        "target": target,
        "text": text,
        "fit_text": conftest.c4_texts(30),
        "fit_samples": 12,
        "eval_samples": 4,
        "steps": 10,
        "batch_size": 4,
        "max_length": 48,
        "projection_size": 6,
        "adapter_name": "carried",
        "dtype": torch.float32,
        "progress": False,
        "report_samples": 0,
        "training_args": {"gradient_accumulation_steps": 2, "save_steps": 3},
    }


def run(folder: Path, at: tuple[str, int] | None, arguments: dict, resume: bool) -> int:
    """Translate in a child process; its exit status, as of `os.waitpid`."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        warnings.simplefilter("ignore")
        torch.manual_seed(os.getpid())  # the result must not depend on it
        moments = Moments(folder, at)
        if not resume:
            moments.listen()
        peft_cast.translate(**arguments, output_dir=folder, resume_from_checkpoint=resume)
        folder.with_suffix(".json").write_text(json.dumps(moments.counts))
        os._exit(0)
    except BaseException as error:  # the child must not go on in the parent's code
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def outcome(folder: Path) -> tuple[bytes, dict] | None:
    """The finished adapter, `None` if there is none."""
    own = folder / "carried"
    if not (own / "adapter_config.json").exists():
        return None
    report = json.loads((own / "cast_metrics.json").read_text())
    return (own / "adapter_model.safetensors").read_bytes(), report["metrics"]["kl"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # a training ends with a search for garbage, of which what is imported is none
    draw = random.Random(options.seed)
    arguments = make_models(options.folder)
    whole = options.folder / "whole"
    assert run(whole, None, arguments, resume=False) == 0
    expected, counts = outcome(whole), json.loads(whole.with_suffix(".json").read_text())
    for i in range(options.kills):
        phase = PHASES[i % len(PHASES)]
        moment = draw.randint(1, counts[phase])
        folder = options.folder / f"killed{i}"
        killed = run(folder, (phase, moment), arguments, resume=False)
        left, last = outcome(folder), last_checkpoint(folder / "checkpoints")
        step = read_state(last).global_step if last else 0
        resumed = run(folder, None, arguments, resume=True)
        line = {
            "phase": phase,
            "moment": f"{moment} of {counts[phase]}",
            "killed": killed == signal.SIGKILL,
            "left": "nothing" if left is None else "the result" if left == expected else "something broken",
            "from step": step,
            "resumed": resumed == 0,
            "identical": outcome(folder) == expected,
            "half-written left": len([path for path in folder.rglob(".partial-*") if path.is_file()]),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
