"""One process of several: translates what a file says and writes down what it got.

    torchrun --standalone --nproc_per_node 2 tests/launched.py FOLDER

FOLDER/arguments.json holds the arguments of a translation, or a list of them that are done one after another, each with a `name`.
Process r writes FOLDER/NAME.r.json and FOLDER/NAME.r.safetensors. With `die_at` the process of that number kills itself at a step,
with `fail_at` it raises the named error there.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

import peft_cast
from peft_cast import ranks
from peft_cast.fit import CastTrainer


FAILURES = {"memory": torch.OutOfMemoryError("out of memory"), "kill": None}


def fail_at(process: int, step: int, how: str) -> None:
    loss = CastTrainer.compute_loss

    def failing(self, *args, **kwargs):
        if self.state.global_step == step and ranks.rank() == process:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "nan":
                return loss(self, *args, **kwargs) * float("nan")
            raise FAILURES[how]
        return loss(self, *args, **kwargs)

    CastTrainer.compute_loss = failing


def written(folder: Path, job: dict) -> None:
    name, failure = job.pop("name"), job.pop("fail_at", None)
    if failure:
        fail_at(*failure)
    text = job["text"]
    if isinstance(text, dict):
        job["text"] = peft_cast.SelfWritten(**text)
    seen, texts = [], CastTrainer.compute_loss

    def watching(self, model, inputs, *args, **kwargs):
        seen.append([list(pair.target_ids) for pair in inputs["texts"][0]])
        return texts(self, model, inputs, *args, **kwargs)

    CastTrainer.compute_loss = watching
    try:
        result = peft_cast.translate(**job, dtype=torch.float32, progress=False)
        found = {"metrics": result.metrics, "history": result.history, "texts": seen, "rank": ranks.rank()}
        weights = {n: t.contiguous().clone() for n, t in result.model.state_dict().items() if "peft_cast_kernels" in n}
        save_file(weights, folder / f"{name}.{ranks.rank()}.safetensors")
    except (ValueError, FloatingPointError) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    finally:
        CastTrainer.compute_loss = texts
    (folder / f"{name}.{ranks.rank()}.json").write_text(json.dumps(found))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for job in json.loads((folder / "arguments.json").read_text()):
        written(folder, job)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        raise
