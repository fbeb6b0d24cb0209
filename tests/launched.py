"""One process of several: does the translations that a file lists and writes down what it got.

    torchrun --standalone --nproc_per_node 2 tests/launched.py FOLDER

FOLDER/jobs.json is a list of arguments of `translate`, each with a `name`, or of another `verb` of the package.
Process r writes FOLDER/NAME.r.json and FOLDER/NAME.r.safetensors. A job may have an `environment`, and `fail_at`,
[process, step, how]: there that process kills itself ("kill") or meets a loss that is no number ("nan").
"""

import copy
import gc
import json
import os
import signal
import sys
import warnings
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import peft_cast
from peft_cast.refine.trainer import CastTrainer
from peft_cast.utils import distributed


HELD_OUT = 100  # positions of the closed form that are kept: fewer than there are


@contextmanager
def watched(folder: Path, fail_at: list | None):
    """Within the context note the texts of every step, and fail where it is asked for."""
    loss, seen = CastTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append([list(pair.target_ids) for pair in inputs["texts"][0]])
        if fail_at and fail_at[:2] == [distributed.rank(), self.state.global_step]:
            if fail_at[2] == "kill":
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            self.teacher.training = copy.copy(self.teacher.training)
            object.__setattr__(self.teacher.training, "alpha", float("nan"))  # past its own check
        return loss(self, model, inputs, *args, **kwargs)

    CastTrainer.compute_loss = compute_loss
    try:
        yield seen
    finally:
        CastTrainer.compute_loss = loss


def product(found) -> torch.Tensor:
    """A map of a bridge as one matrix, float32."""
    return found.after(torch.eye(found.shape[0]))


def weights_of(result) -> dict[str, torch.Tensor]:
    """What was fitted or trained, by name: of a bridge its maps, of a translation or distillation the adapter's
    tensors.
    """
    if isinstance(result, peft_cast.Bridge):
        maps = {f"{name}.{i}": fit for name, fits in result.maps.kernels.items() for i, fit in enumerate(fits)}
        return {f"{n}.{side}": product(getattr(fit, side)) for n, fit in maps.items() for side in ("P_in", "P_out")}
    model = (result[0] if isinstance(result, list) else result).model
    own = ("peft_cast_kernels", "lora_")
    return {n: t.contiguous().clone() for n, t in model.state_dict().items() if any(part in n for part in own)}


def run(folder: Path, job: dict) -> dict:
    """Do one job; what came of it, JSON-ready."""
    name, fail_at, environment = job.pop("name"), job.pop("fail_at", None), job.pop("environment", {})
    verb = attrgetter(job.pop("verb", "translate"))(peft_cast)
    if isinstance(job.get("text"), dict):
        job["text"] = peft_cast.SelfWritten(**job["text"])
    os.environ.update(environment)
    try:
        with watched(folder, fail_at) as seen:
            result = verb(**job, dtype=torch.float32, progress=False)
    except ValueError as error:
        return {"error": str(error)}
    finally:
        for variable in environment:
            del os.environ[variable]
    save_file(weights_of(result), folder / f"{name}.{distributed.rank()}.safetensors")
    if isinstance(result, peft_cast.Bridge):
        return {"metrics": result.metrics}
    if isinstance(result, list):
        return {"metrics": [each.metrics for each in result]}
    spread = [p for p in result.model.parameters() if isinstance(p, DTensor)]
    return {
        "metrics": result.metrics,
        "history": result.history,
        "texts": seen,
        "spread": [sum(p.numel() for p in spread), sum(p.to_local().numel() for p in spread)],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    gc.freeze()  # a training ends with a search for garbage, of which what is imported is none
    peft_cast.fit.moments.HELD_OUT = HELD_OUT
    warnings.simplefilter("ignore")
    for job in json.loads((folder / "jobs.json").read_text()):
        file = folder / f"{job['name']}.{os.environ['RANK']}.json"
        file.write_text(json.dumps(run(folder, job)))


if __name__ == "__main__":
    main()
