"""Adapters of SmolLM2 on a stronger model of another family: what users feel, right answers first.

    .venv/bin/python benchmarks/scenarios.py qwen-0.5b:gsm8k --rows CAST retrained    # some; all without arguments

Rows: the untouched target (also with four solved problems before the question, and in its chat template), the
translation by default, with the adapted source as teacher, and a LoRA trained on the target with the task's data.
Writes docs/figures/scenario_<target>_<task>.json after each measurement and goes on where it stopped. Adapters are
kept in bench-output/scenarios.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import setting
from setting import score

import peft_cast


ITEMS = 300
LAST_NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["qwen-0.5b:gsm8k", "qwen-0.5b:agnews"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the rows that are translated")
    args = parser.parse_args()
    for case in args.cases:
        target, task = case.split(":")
        adapters = {
            row: [made(row, target, task, seed) for seed in (args.seeds if row != "retrained" else [0])]
            for row in args.rows
        }
        evaluation = peft_cast.evaluate(
            setting.UPGRADES[target].folder(),
            adapters,
            tasks(task),
            retrained="retrained" if "retrained" in adapters else None,
            drift_text=setting.c4_documents()[1],
            drift_samples=setting.DRIFT_DOCUMENTS,
            output=setting.FIGURES / f"scenario_{target}_{task}.json",
        )
        print(evaluation, flush=True)


def tasks(task: str) -> list:
    """What users feel first: right answers; then the format, and the likelihood of gold answers."""
    if task != "gsm8k":
        return setting.tasks(task, classify=ITEMS // 2)
    rows = [json.loads(line) for line in (setting.data_folder() / "gsm8k_test.jsonl").open(encoding="utf-8")]
    rows = rows[20 : 20 + ITEMS]  # the first were looked at in development
    data = (rows, score.PROMPT, score.ANSWER)
    options = {"fallback": LAST_NUMBER, "until": "\nQuestion:", "batch_size": 50}
    best = {"solved examples": solved()}
    return [
        peft_cast.Generation(
            "GSM8K right", *data, score.NUMBER, 256, metric="exact_match", base_prompts=best, **options
        ),
        peft_cast.AnswerLikelihood("GSM8K likelihood", *data, limit=100),
    ]


def solved(count: int = 4) -> str:
    """A prompt with solved problems of the training set before the question."""
    rows = [json.loads(line) for line in (setting.data_folder() / "gsm8k_train.jsonl").open(encoding="utf-8")][-count:]
    before = "".join(f"{score.PROMPT}{score.ANSWER}\n\n".format_map(row) for row in rows)
    return before.replace("{", "{{").replace("}", "}}") + score.PROMPT


def made(row: str, target: str, task: str, seed: int) -> Path:
    """The folder of a row's adapter, made unless it is there already."""
    folder = setting.OUTPUT / "scenarios" / f"{target}_{task}_{row.replace(' ', '-')}_seed{seed}"
    if not (folder / "adapter_config.json").exists():
        print(f"{target} {task}: {row}, seed {seed}", flush=True)
        ROWS[row](target, task, seed, folder)
        gc.collect()
    return folder


def translated(target: str, task: str, seed: int, folder: Path, **options) -> None:
    # Fewer texts than the tables': a larger target writes and reads more slowly.
    text = setting.written(target, task, "all", seed, samples=TEXTS, batch_size=64)
    models = (setting.SMOLLM2.folder(), setting.SMOLLM2.adapter(task), setting.UPGRADES[target].folder())
    setting.translated(*models, folder, f"scenario_{folder.name}", text=text, steps=STEPS, seed=seed, **options)


def taught_by_source(target: str, task: str, seed: int, folder: Path) -> None:
    translated(target, task, seed, folder, teacher="source")


def retrained(target: str, task: str, seed: int, folder: Path) -> None:
    """By the recipe of the adapters in examples/adapters, with fewer steps: a stronger model needs fewer."""
    command = [
        sys.executable,
        str(setting.EXAMPLES / "train_lora.py"),
        "--model",
        str(setting.UPGRADES[target].folder()),
    ]
    command += ["--output", str(folder), "--steps", str(RETRAIN_STEPS), "--seed", str(seed)]
    if task == "agnews":
        data = setting.data_folder() / "ag_news_train.jsonl"
        command += ["--data", str(data), "--prompt", "Article: {text}", "--prompt-chars", "400"]
        command += ["--prompt-end", "\\nTopic:", "--completion", " {label}"]
    subprocess.run(command, check=True)


ROWS: dict[str, Callable] = {"CAST": translated, "source teaches": taught_by_source, "retrained": retrained}
TEXTS, STEPS = 192, 25
RETRAIN_STEPS = 60


if __name__ == "__main__":
    main()
