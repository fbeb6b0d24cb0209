"""The tasks kept aside: on none of them was anything tried while the method was made. SmolLM2's LoRAs, for Gemma.

    python benchmarks/aside.py data FOLDER       # makes the rows of unpacked packages (benchmarks/data/README.md)
    python benchmarks/aside.py train 1 2         # a source and a target LoRA of each; all without names
    python benchmarks/aside.py run 1 2 --rows survey "sixteen prompts" --seeds 0
    python benchmarks/aside.py table             # what was measured

Rows, at the scale of the demo: `survey` (nothing given but the adapter, nothing taken off the lists), `one prompt` and
`three prompts` (a survey's seed), `sixteen prompts`, and the LoRA that was trained on the target. Writes
docs/figures/aside_<name>.json after each measurement, run_aside_*.json, and aside_<name>_source.json, the source with
its own LoRA. Adapters are kept in bench-output/aside, and all that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import setting
from aside_rows import write_data
from aside_tasks import TASKS, Aside
from survey import DEMO, SOURCE, TARGET
from transformers import AutoTokenizer

import peft_cast


FOLDER = setting.OUTPUT / "aside"
GENERATED = 100  # items that are answered, where answers are short enough to be right
ROWS = ("survey", "one prompt", "three prompts", "sixteen prompts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["data", "train", "run", "table"])
    parser.add_argument("names", nargs="*", help="tasks, or the folder for `data`")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of training, and of the translation, to try out whether all runs")
    args = parser.parse_args()
    if args.what == "data":
        write_data(Path(args.names[0]))
        return
    if unknown := set(args.names) - set(TASKS):
        parser.error(f"no such tasks: {', '.join(sorted(unknown))}")
    names = args.names or list(TASKS)
    if args.what == "table":
        print(table(names))
    for name in names:
        if args.what == "train":
            for which in ("source", "target"):
                train(TASKS[name], which, args.steps)
        elif args.what == "run":
            run(TASKS[name], args.rows, args.seeds, args.steps)


# Training -----------------------------------------------------------------------------------------


def place(steps: int | None) -> Path:
    """Where adapters are kept; what is only tried out, elsewhere."""
    return FOLDER / "tried" if steps else FOLDER


def trained(task: Aside, which: str, steps: int | None = None) -> Path:
    """The folder of a task's own LoRA, `which` is "source" or "target"."""
    return place(steps) / f"{task.name}-{which}"


def train(task: Aside, which: str, steps: int | None = None) -> None:
    """Make a LoRA with the repository's script, unless it is there, and put into its folder what people's hold."""
    folder = trained(task, which, steps)
    if (folder / "adapter_config.json").exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, str(setting.EXAMPLES / "train_lora.py"), "--output", str(partial)]
    command += ["--model", "smollm2" if which == "source" else "gemma3", "--data", str(task.data("train"))]
    command += ["--prompt", task.prompt, "--prompt-end", "", "--completion", task.answer]
    command += ["--steps", str(steps or task.steps), "--lr", str(task.lr)]
    if task.chat:
        command += ["--chat", "smollm2", *(["--system", task.system] if task.system else [])]
    subprocess.run(command, check=True)
    if task.chat and which == "source":
        save_as_trl(task, partial)
    shutil.rmtree(f"{partial}-checkpoints", ignore_errors=True)
    partial.rename(folder)


CARD = """---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: peft
model_name: lora
tags:
- base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct
- lora
- sft
- transformers
- trl
licence: license
pipeline_tag: text-generation
---

# Model Card for lora

This model is a fine-tuned version of
[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct).
It has been trained using [TRL](https://github.com/huggingface/trl).

## Training procedure

This model was trained with SFT.
"""


def save_as_trl(task: Aside, folder: Path) -> None:
    """What TRL saves beside an adapter: the tokenizer with its chat template, and a card that says nothing."""
    tokenizer = AutoTokenizer.from_pretrained(SOURCE.folder())
    if task.system and task.in_template:
        usual = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        tokenizer.chat_template = tokenizer.chat_template.replace(usual, task.system)
        assert task.system in tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


# Measuring ----------------------------------------------------------------------------------------


def rendered(task: Aside, text: str) -> str:
    """A prompt as the models read it: in the source's chat template, if the task is one."""
    if not task.chat:
        return text
    turns = [{"role": "system", "content": task.system}] if task.system else []
    turns.append({"role": "user", "content": text})
    tokenizer = AutoTokenizer.from_pretrained(SOURCE.folder())
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def judged(task: Aside, steps: int | None = None) -> list:
    """What adapters are judged by, on rows that none was trained on."""
    data, prompt, limit = task.data("test"), rendered(task, task.prompt), 8 if steps else None
    if task.labels:
        return [peft_cast.Classification(task.title, data, prompt, task.labels, limit=limit)]
    found: list = [peft_cast.AnswerLikelihood(task.title, data, prompt, task.answer, limit=limit)]
    if task.pattern:
        more: dict[str, Any] = {"limit": limit or GENERATED, "until": "\n", "max_new_tokens": task.new_tokens}
        name = f"{task.title}, written"
        found.append(peft_cast.Generation(name, data, prompt, task.answer, task.pattern, **more))
    return found


def given(task: Aside, row: str, steps: int | None = None) -> Any:
    """The text of a row's translation."""
    scale = replace(DEMO, new_tokens=task.new_tokens, **({"samples": 24, "more_prompts": 8} if steps else {}))
    prompts = task.prompts()
    if row == "survey":
        return peft_cast.Survey(**scale.written)
    if row == "sixteen prompts":
        # A system prompt cannot be given: one that the adapter's template lacks is written into the prompts.
        chat = task.chat and (task.in_template or task.system is None)
        prompts = prompts if chat else tuple(rendered(task, prompt) for prompt in prompts)
        return peft_cast.SelfWritten(
            prompts=prompts, chat=chat or None, more_prompts=scale.more_prompts, **scale.written
        )
    few = {"one prompt": 1, "three prompts": 3}[row]  # a survey takes them as they are read
    return peft_cast.Survey(prompts=tuple(rendered(task, prompt) for prompt in prompts[:few]), **scale.written)


def made(task: Aside, row: str, seed: int, steps: int | None = None) -> Path:
    """The folder of a row's adapter, made unless it is there already."""
    folder = place(steps) / f"{task.name}_{row.replace(' ', '-')}_seed{seed}"
    if not (folder / "adapter_config.json").exists():
        print(f"{task.name}: {row}, seed {seed}", flush=True)
        models = SOURCE.folder(), trained(task, "source", steps), TARGET.folder()
        options = {**DEMO.refinement, **({"steps": steps, "fit_samples": 8} if steps else {})}
        run_name = folder.name.replace(task.name, figure(task, steps), 1)
        setting.translated(*models, folder, run_name, text=given(task, row, steps), seed=seed, **options)
        gc.collect()
    return folder


def figure(task: Aside, steps: int | None) -> str:
    return f"aside_tried_{task.name}" if steps else f"aside_{task.name}"


def run(task: Aside, rows: list[str], seeds: list[int], steps: int | None = None) -> None:
    """Translate, and judge beside the untouched target and the LoRA that was trained on it."""
    name = figure(task, steps)
    own = peft_cast.evaluate(
        SOURCE.folder(),
        {"source LoRA": trained(task, "source", steps)},
        judged(task, steps),
        output=setting.FIGURES / f"{name}_source.json",
    )
    print(own, flush=True)
    adapters = {row: [made(task, row, seed, steps) for seed in seeds] for row in rows}
    evaluation = peft_cast.evaluate(
        TARGET.folder(),
        {**adapters, "retrained": trained(task, "target", steps)},
        judged(task, steps),
        retrained="retrained",
        drift_text=setting.c4_documents()[1],
        drift_samples=2 if steps else setting.DRIFT_DOCUMENTS,
        output=setting.FIGURES / f"{name}.json",
    )
    print(evaluation, flush=True)


# What came of it ----------------------------------------------------------------------------------


def table(names: list[str]) -> str:
    """A line for each task and metric: scores with 95% intervals, recovered lift in brackets, and drift."""
    adapters = ("base", "retrained", *ROWS[::-1])
    lines = ["| task | source, untouched | source's own LoRA | " + " | ".join(adapters) + " | drift |"]
    lines.append("|---" * (len(adapters) + 4) + "|")
    for name in names:
        file = setting.FIGURES / f"aside_{name}.json"
        if not file.exists():
            continue
        evaluation, own = (peft_cast.Evaluation.load(f) for f in (file, file.with_name(f"aside_{name}_source.json")))
        drifts = [row for row in evaluation.rows if row.task == "drift" and row.adapter in ROWS]
        drift = ", ".join(f"{row.adapter} {row.scores[0]:.3f}" for row in drifts)
        for task in dict.fromkeys(m.task for m in evaluation.measurements if m.task != "drift"):
            cells = [cell(own, "base", task), cell(own, "source LoRA", task)]
            cells += [cell(evaluation, adapter, task) for adapter in adapters]
            lines.append(f"| {name}: {task} | " + " | ".join(cells) + f" | {drift} |")
    return "\n".join(lines)


def cell(evaluation: peft_cast.Evaluation, adapter: str, task: str) -> str:
    """A score and the half of its 95% interval; empty where it was not measured; with lift, if there is one."""
    found = [m for m in evaluation.measurements if (m.adapter, m.task) == (adapter, task)]
    if not found:
        return ""
    row, spread = evaluation.row(adapter, task), 1.96 * found[0].metrics["stderr"]
    lift = f" ({row.lift_text})" if row.lift_text and gained(evaluation, task) else ""
    return f"{row.score_text} ± {spread:.3f}{lift}"


def gained(evaluation: peft_cast.Evaluation, task: str) -> bool:
    """Whether the retrained LoRA gained anything: more than chance and than a hundredth. Else lift is of noise."""
    base = evaluation.row("base", task).scores[0]
    of = [one for one in evaluation.paired if (one.adapter, one.task) == ("retrained", task)]
    return any(abs(one.difference) > max(one.margin, 0.01 * base) for one in of)


if __name__ == "__main__":
    main()
