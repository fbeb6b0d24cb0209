"""The three-argument call: translations for which nothing is given but the adapter, from SmolLM2 to Gemma.

    .venv/bin/python benchmarks/survey.py agnews gsm8k --rows survey        # some; all without arguments

Rows: `survey` (nothing given), `one prompt` and `three prompts` (the first of our sixteen, as a survey's seed),
`breadth` (a survey that asks broadly alone), and a LoRA trained on the target with the task's data. No survey knows
the task's own template: its words are taken off the lists. Writes docs/figures/survey_<task>.json after each
measurement, with what each survey found, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path

import setting
from table import REFINEMENT

import peft_cast
from peft_cast.text.forms import package_forms


SOURCE, TARGET = setting.SMOLLM2, setting.GEMMA3
NAMES = {"gsm8k": ("Question", "Answer"), "agnews": ("Article", "Topic"), "kinds": ("Definition", "Kind")}
NAMES["definitions"] = ("Word", "Definition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["agnews", "gsm8k"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    for task in args.tasks:
        adapters = {row: [made(row, task, seed) for seed in args.seeds] for row in args.rows}
        evaluation = peft_cast.evaluate(
            TARGET.folder(),
            {**adapters, "retrained": TARGET.adapter(task)},
            setting.tasks(task, generate=0),
            retrained="retrained",
            drift_text=setting.c4_documents()[1],
            drift_samples=setting.DRIFT_DOCUMENTS,
            output=setting.FIGURES / f"survey_{task}.json",
        )
        print(evaluation, flush=True)


def made(row: str, task: str, seed: int) -> Path:
    """The folder of a row's adapter, made unless it is there already."""
    folder = setting.OUTPUT / "survey" / f"{task}_{row.replace(' ', '-')}_seed{seed}"
    if (folder / "adapter_config.json").exists():
        return folder
    print(f"{task}: {row}, seed {seed}", flush=True)
    result = peft_cast.translate(
        SOURCE.folder(),
        SOURCE.adapter(task),
        TARGET.folder(),
        text=ROWS[row](task),
        fit_text=setting.c4_documents()[0],
        seed=seed,
        cache_dir=setting.OUTPUT / "cache",
        output_dir=folder.with_name(folder.name + ".run"),
        resume_from_checkpoint=True,
        report_similarity=False,
        **REFINEMENT[task],
    )
    print(result, flush=True)
    print(json.dumps(result.metrics["text"], indent=1, ensure_ascii=False), flush=True)
    result.save_pretrained(folder)
    setting.note_run(result, f"survey_{folder.name}")
    del result
    gc.collect()
    return folder


def surveyed(task: str, **options) -> peft_cast.Survey:
    return peft_cast.Survey(
        forms=others(task),
        samples=setting.SAMPLES[task],
        max_new_tokens=setting.NEW_TOKENS[task],
        batch_size=setting.TOGETHER,
        **options,
    )


def others(task: str) -> dict:
    """The lists of the package without what the task's own prompts are made of."""
    known = copy.deepcopy(package_forms())
    before, after = NAMES[task]
    known["before"] = {word: kind for word, kind in known["before"].items() if word not in (before, after)}
    known["after"] = [word for word in known["after"] if word not in (before, after)]
    known["questions"] = [frame for frame in known["questions"] if not frame.startswith(f"{before}:")]
    return known


def prompted(count: int) -> Callable[[str], peft_cast.Survey]:
    return lambda task: surveyed(task, prompts=setting.prompts(task)[:count])


ROWS: dict[str, Callable[[str], peft_cast.Survey]] = {
    "survey": surveyed,
    "one prompt": prompted(1),
    "three prompts": prompted(3),
    "breadth": lambda task: surveyed(task, breadth=1.0),
}


if __name__ == "__main__":
    main()
