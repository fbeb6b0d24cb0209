"""Where the last line of an adapter's own prompts comes among the thousands that a survey tries.

    .venv/bin/python benchmarks/closings.py smollm2:agnews gemma3:gsm8k    # some; all without arguments

Writes docs/figures/closings.json after each adapter, and leaves out those that are in it. A task's number is that of a
task kept aside, whose LoRA benchmarks/aside.py has trained.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import aside
import setting
import torch
from aside_tasks import TASKS
from peft import PeftModel
from setting import GEMMA3, SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cast.text.closings import KINDS, acting_lines, last_lines
from peft_cast.text.corpus import read_corpus
from peft_cast.text.forms import Contents, package_forms
from peft_cast.text.judged import moved_nats
from peft_cast.utils.environment import environment


SEED = 0
MODELS = {"smollm2": SMOLLM2, "gemma3": GEMMA3}
ALL = [f"{model}:{task}" for model in MODELS for task in setting.PROMPTS] + ["smollm2:5"]
FILE = setting.FIGURES / "closings.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", default=ALL, help="model:task")
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in parser.parse_args().adapters:
        if name not in found:
            found[name] = placed(*name.split(":")) | {"seed": SEED, "environment": environment()}
            FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, {key: value for key, value in found[name].items() if key != "environment"}, flush=True)


def placed(model: str, task: str) -> dict:
    """Where the task's own line comes: of all lines behind one content, and of those that are kept at last."""
    folder, line = own_of(model, task)
    base = MODELS[model].folder()
    tokenizer, first = AutoTokenizer.from_pretrained(base), []
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16"), folder).eval()

    def moved(prompts: Sequence[str]) -> torch.Tensor:
        first.append(moved_nats(adapted, tokenizer, prompts, 64))
        return first[-1]

    contents = Contents(package_forms(), random.Random(SEED), read_corpus(setting.C4, 64))
    start = time.perf_counter()
    kept = acting_lines(moved, tokenizer, package_forms()["after"], [contents.next(kind) for kind in KINDS])
    seconds = time.perf_counter() - start
    lines = last_lines(tokenizer, package_forms()["after"])
    tried = line if line in lines else line[:2]  # of repeated marks, one
    own = first[0][lines.index(tried)]
    return {
        "line": line,
        "lines": len(lines),
        "rank": int((first[0] > own).sum()),
        "nats": float(own),
        "nats_of_best": float(first[0].max()),
        "nats_of_median": float(first[0].median()),
        "kept": kept,
        "seconds": seconds,
    }


def own_of(model: str, task: str) -> tuple[Path, str]:
    """An adapter's folder, and the last line of the prompts that it was trained on."""
    if task in TASKS:
        return aside.trained(TASKS[task], "source"), "\n" + TASKS[task].prompt.rsplit("\n", 1)[-1]
    return MODELS[model].adapter(task), setting.PROMPTS[task][1]


if __name__ == "__main__":
    main()
