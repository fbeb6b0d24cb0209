"""What the benchmarks compare: models, adapters, tasks, and the text that a user would give."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm


HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import models  # noqa: E402 (examples/models.py)
import score  # noqa: E402 (examples/score.py)
import wordnet  # noqa: E402 (benchmarks/wordnet.py)

import peft_cast  # noqa: E402
from peft_cast.source.pair import open_pair  # noqa: E402
from peft_cast.text.samples import TextSample  # noqa: E402
from peft_cast.text.written import SelfWritten, write_texts  # noqa: E402
from peft_cast.utils.environment import environment  # noqa: E402
from peft_cast.utils.phases import Phases  # noqa: E402


FIGURES = Path(os.environ.get("PEFT_CAST_BENCH_FIGURES", HERE.parent / "docs" / "figures"))
OUTPUT = HERE.parent / "bench-output"
C4 = EXAMPLES / "data" / "c4_en_400.jsonl"
# Drift is measured on documents that nothing else reads: fit and anchors take the first ones.
DRIFT_DOCUMENTS = 40
TOGETHER = 2080 if torch.cuda.is_available() else 96  # texts that are written at a time


@dataclass(frozen=True)
class Model:
    """A model of the benchmark: how its adapters' folders begin, and how to get it."""

    name: str
    folder: Callable[[], Path]

    def adapter(self, task: str, modules: str = "all") -> Path:
        suffix = "" if modules == "all" else f"-{modules}"
        return EXAMPLES / "adapters" / f"{self.name}-{task}{suffix}"


SMOLLM2 = Model("smollm2-135m", models.smollm2)
GEMMA3 = Model("gemma3-270m", models.gemma3)
PAIRS = {"smollm2-gemma3": (SMOLLM2, GEMMA3), "gemma3-smollm2": (GEMMA3, SMOLLM2), "same": (SMOLLM2, SMOLLM2)}
# Targets of scenarios.py and stronger.py, by their names there.
UPGRADES = {
    "qwen-0.5b": Model("qwen-0.5b", models.qwen_small),
    "qwen-1.5b": Model("qwen-1.5b", models.qwen_large),
    "gemma3-270m": GEMMA3,
}


# What every prompt of a task begins and ends with, and the file with our sixteen.
PROMPTS = {
    "gsm8k": ("Question: ", "\nAnswer:", EXAMPLES / "prompts.txt"),
    "agnews": ("Article: ", "\nTopic:", HERE / "prompts_agnews.txt"),
    "kinds": ("Definition: ", "\nKind:", HERE / "prompts_kinds.txt"),
    "definitions": ("Word: ", "\nDefinition:", HERE / "prompts_definitions.txt"),
}
TASKS = tuple(PROMPTS)
HELD_OUT = ("kinds", "definitions")  # tasks on which nothing was ever tried out


def prompts(task: str) -> tuple[str, ...]:
    """Sixteen prompts of the task's kind, written by us: all that a translation knows of it."""
    head, tail, file = PROMPTS[task]
    return tuple(f"{head}{line}{tail}" for line in _lines(file))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def c4_documents() -> tuple[list[str], list[str]]:
    """C4 in two parts: what translations may read, and what drift is measured on."""
    texts = peft_cast.text.read_corpus(C4, 10**6)
    return texts[:-DRIFT_DOCUMENTS], texts[-DRIFT_DOCUMENTS:]


def data_folder() -> Path:
    """Where data lies that is not ours to pass on: `$PEFT_CAST_BENCH_DATA`, `../shared/data` by default."""
    return Path(os.environ.get("PEFT_CAST_BENCH_DATA", HERE.parent.parent / "shared" / "data"))


def news_prompt(row: dict) -> str:
    """How the AG News adapters were trained: article cut so that what precedes the topic has 400 characters at
    most.
    """
    return f"Article: {row['text']}"[:400] + "\nTopic:"


def tasks(task: str, likelihood: int = 100, generate: int = 48, classify: int = 500) -> list:
    """The tasks that adapters trained on `task` are judged by. Counts are of rows; 0 leaves a task out.

    GSM8K (MIT) lies in examples/data, what is made of WordNet in benchmarks/data. AG News is for research use and not
    ours to pass on: it is read from the folder `$PEFT_CAST_BENCH_DATA` (`ag_news_test.jsonl`, one {"text", "label"} a
    line), `../shared/data` by default.
    """
    if task == "gsm8k":
        data, prompt, answer = score.PROBLEMS, score.PROMPT, score.ANSWER
        found = [peft_cast.AnswerLikelihood("GSM8K likelihood", data, prompt, answer, limit=likelihood)]
        if generate:
            found.append(
                peft_cast.Generation(
                    "GSM8K generation",
                    data,
                    prompt,
                    answer,
                    score.NUMBER,
                    limit=generate,
                    batch_size=48,
                    metric="in_format",  # models of this size are hardly ever right
                )
            )
        return found
    if task == "definitions":
        data = HERE / "data" / "wordnet_definitions_test.jsonl"
        return [
            peft_cast.AnswerLikelihood(
                "WordNet definitions", data, "Word: {word}\nDefinition:", " {definition}", limit=2 * likelihood
            )
        ]
    if task == "kinds":
        data, labels = HERE / "data" / "wordnet_kinds_test.jsonl", tuple(wordnet.KINDS.values())
        return [
            peft_cast.Classification(
                "WordNet kinds", data, "Definition: {definition}\nKind:", labels, label="kind", limit=classify
            )
        ]
    labels = ("World", "Sports", "Business", "Technology")
    return [
        peft_cast.Classification(
            "AG News", data_folder() / "ag_news_test.jsonl", news_prompt, labels, limit=2 * classify
        )
    ]


def written(
    pair: str, task: str, modules: str, seed: int, times: int = 1, template: bool = False, **options: Any
) -> list[TextSample]:
    """What the adapted source answers to our prompts and to further ones of the target's; written once and kept.

    `times` is how many times the table's number of texts, with `template` the prompts are snippets of C4 between what
    all ours begin and end with, and `options` are those of `SelfWritten` that shall differ from the table's.

    Beside it lies `<name>_cost.json`: seconds and memory that the writing took, a part of every translation's cost.
    """
    differs = "".join(f"_{name}={value}" for name, value in options.items()) + (f"_times={times}" if times > 1 else "")
    differs += "_template" if template else ""
    file = OUTPUT / "text" / f"{pair}_{task}_{modules}_seed{seed}{differs}.json"
    if not file.exists():
        source, target = PAIRS.get(pair) or (SMOLLM2, UPGRADES[pair])
        asked: dict[str, Any] = {"prompts": prompts(task)}
        if template:
            head, tail, _ = PROMPTS[task]
            asked = {"template": f"{head}{{text}}{tail}", "corpus": c4_documents()[0], "snippet_chars": 250}
        spec = SelfWritten(**{**asked, "max_new_tokens": NEW_TOKENS[task], "batch_size": TOGETHER, **options})
        phases = Phases()
        with (
            phases.measure("text"),
            open_pair(source.folder(), source.adapter(task, modules), target.folder()) as opened,
        ):
            samples = write_texts(
                opened.adapted, *opened.tokenizers, spec, times * SAMPLES[task], seed, opened.target, progress=tqdm
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_name(f"{file.stem}_cost.json").write_text(json.dumps(phases.costs) + "\n", encoding="utf-8")
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps([asdict(sample) for sample in samples], indent=0), encoding="utf-8")
        partial.replace(file)
    return [TextSample(**sample) for sample in json.loads(file.read_text(encoding="utf-8"))]


def translated(source: Path, adapter: Path, target: Path, folder: Path, name: str, **options: Any) -> None:
    """A translation that goes on where it was stopped, kept in `folder` and noted as the run `name`."""
    result = peft_cast.translate(
        source,
        adapter,
        target,
        fit_text=c4_documents()[0],
        cache_dir=OUTPUT / "cache",
        output_dir=folder.with_name(folder.name + ".run"),
        resume_from_checkpoint=True,
        report_similarity=False,
        **options,
    )
    print(result, flush=True)
    result.save_pretrained(folder)
    note_run(result, name)


def note_run(result: peft_cast.TranslationResult, name: str) -> None:
    """Write what a translation says of itself to `run_<name>.json`, without the report, which is a page of its own."""
    metrics = {key: part for key, part in result.metrics.items() if key != "report"}
    run = {
        "metrics": metrics,
        "history": result.history,
        "diagnosis": result.diagnosis(),
        "environment": environment(),
    }
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / f"run_{name}.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


# Of the answers to GSM8K that the source writes 59% end within 128 tokens, 78% within 192.
NEW_TOKENS = {"gsm8k": 192, "agnews": 8, "kinds": 8, "definitions": 40}
SAMPLES = {"gsm8k": 416, "agnews": 656, "kinds": 656, "definitions": 656}
