"""The three-argument call: translations for which nothing is given but the adapter, from SmolLM2 to Gemma.

    .venv/bin/python benchmarks/survey.py agnews gsm8k --rows survey        # some; all without arguments
    .venv/bin/python benchmarks/survey.py gsm8k --demo                      # as small as `make demo`

Rows: `survey` (nothing given), `one prompt` and `three prompts` (the first of our sixteen, as a survey's seed),
`sixteen prompts`, `breadth` (a survey that asks broadly alone), and a LoRA trained on the target with the task's data.
No survey knows the task's own template: its words are taken off the lists. Writes docs/figures/survey_<task>.json
(with `--demo` survey_<task>_demo.json) after each measurement, run_survey_*.json with what each survey found, and goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import setting
from table import REFINEMENT

import peft_cast
from peft_cast.text.forms import package_forms


@dataclass(frozen=True)
class Scale:
    """How much text, of which length, is read how often."""

    samples: int
    new_tokens: int
    refinement: dict
    suffix: str = ""
    together: int = setting.TOGETHER
    more_prompts: int | None = None

    @property
    def written(self) -> dict:
        return {"samples": self.samples, "max_new_tokens": self.new_tokens, "batch_size": self.together}


DEMO = Scale(
    160, 112, {"steps": 32, "batch_size": 6, "max_length": 192, "fit_samples": 30, "eval_samples": 8}, "_demo", 80, 48
)
SOURCE, TARGET = setting.SMOLLM2, setting.GEMMA3
NAMES = {"gsm8k": ("Question", "Answer"), "agnews": ("Article", "Topic"), "kinds": ("Definition", "Kind")}
NAMES["definitions"] = ("Word", "Definition")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["agnews", "gsm8k"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--demo", action="store_true", help="at the scale of the demo")
    args = parser.parse_args()
    for task in args.tasks:
        scale = DEMO if args.demo else Scale(setting.SAMPLES[task], setting.NEW_TOKENS[task], REFINEMENT[task])
        adapters = {row: [made(row, task, seed, scale) for seed in args.seeds] for row in args.rows}
        evaluation = peft_cast.evaluate(
            TARGET.folder(),
            {**adapters, "retrained": TARGET.adapter(task)},
            setting.tasks(task, generate=0),
            retrained="retrained",
            drift_text=setting.c4_documents()[1],
            drift_samples=setting.DRIFT_DOCUMENTS,
            output=setting.FIGURES / f"survey_{task}{scale.suffix}.json",
        )
        print(evaluation, flush=True)


def made(row: str, task: str, seed: int, scale: Scale) -> Path:
    """The folder of a row's adapter, made unless it is there already."""
    folder = setting.OUTPUT / "survey" / f"{task}{scale.suffix}_{row.replace(' ', '-')}_seed{seed}"
    if (folder / "adapter_config.json").exists():
        return folder
    print(f"{task}: {row}, seed {seed}", flush=True)
    models, text = (SOURCE.folder(), SOURCE.adapter(task), TARGET.folder()), ROWS[row](task, scale)
    setting.translated(*models, folder, f"survey_{folder.name}", text=text, seed=seed, **scale.refinement)
    gc.collect()
    return folder


def surveyed(task: str, scale: Scale, **options) -> peft_cast.Survey:
    return peft_cast.Survey(forms=others(task), **scale.written, **options)


def sixteen(task: str, scale: Scale) -> peft_cast.SelfWritten:
    return peft_cast.SelfWritten(prompts=setting.prompts(task), more_prompts=scale.more_prompts, **scale.written)


def others(task: str) -> dict:
    """The lists of the package without what the task's own prompts are made of."""
    known = copy.deepcopy(package_forms())
    before, after = NAMES[task]
    known["before"] = {word: kind for word, kind in known["before"].items() if word not in (before, after)}
    known["after"] = [word for word in known["after"] if word not in (before, after)]
    known["questions"] = [frame for frame in known["questions"] if not frame.startswith(f"{before}:")]
    return known


def prompted(count: int) -> Callable[[str, Scale], peft_cast.Survey]:
    return lambda task, scale: surveyed(task, scale, prompts=setting.prompts(task)[:count])


ROWS: dict[str, Callable[[str, Scale], Any]] = {
    "survey": surveyed,
    "one prompt": prompted(1),
    "three prompts": prompted(3),
    "sixteen prompts": sixteen,
    "breadth": lambda task, scale: surveyed(task, scale, breadth=1.0),
}


if __name__ == "__main__":
    main()
