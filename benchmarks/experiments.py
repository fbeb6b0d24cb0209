"""The questions that readers of the CAST paper ask, each answered by a few translations that differ in one setting.

    .venv/bin/python benchmarks/experiments.py teacher projection_size      # some; all without arguments

Pair SmolLM2-135M-Instruct → Gemma-3-270m, GSM8K LoRA, a small budget (see COMMON). Writes
docs/figures/experiments.json after every run, takes up where it stopped, and draws docs/figures/experiment_<name>.png.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import setting
from matplotlib.figure import Figure
from setting import score

import peft_cast
from peft_cast.utils.environment import environment


RESULTS = setting.FIGURES / "experiments.json"
# Development problems: those that the table never scores.
TASK = peft_cast.AnswerLikelihood("GSM8K likelihood", score.PROBLEMS, score.PROMPT, score.ANSWER, start=100, limit=40)
COMMON: dict[str, Any] = {
    "steps": 50,
    "learning_rate": 0.1,
    "projection_type": "factored",
    "fit_samples": 40,
    "seed": 0,
    "progress": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS), help=", ".join(EXPERIMENTS))
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": {}}
    for name in args.experiments:
        for variant, options in EXPERIMENTS[name].items():
            key = key_of(options)
            if key not in results["runs"]:
                print(f"{name}: {variant}", flush=True)
                results["runs"][key] = run({**COMMON, **options})
                results["environment"] = environment()
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(name, variant, results["runs"][key]["scores"], flush=True)
        draw(name, {v: results["runs"][key_of(o)] for v, o in EXPERIMENTS[name].items()})


def key_of(options: dict[str, Any]) -> str:
    """What a run is found by: all its settings."""
    return json.dumps({**COMMON, **options}, sort_keys=True)


def run(options: dict[str, Any]) -> dict[str, Any]:
    """One translation and its scores."""
    options = dict(options)
    text = TEXTS[options.pop("text", "prompts and more")]()
    source, target = setting.PAIRS["smollm2-gemma3"]
    general, unseen = setting.c4_documents()
    result = peft_cast.translate(
        source.folder(),
        source.adapter("gsm8k"),
        target.folder(),
        text=text,
        fit_text=general,
        cache_dir=setting.OUTPUT / "cache",
        report_samples=0,
        report_similarity=False,
        **options,
    )
    retrained = target.adapter("gsm8k")
    found = peft_cast.evaluate(
        target.folder(),
        {"translated": result, "retrained": retrained},
        [TASK],
        retrained="retrained",
        drift_text=unseen,
        output=setting.OUTPUT / "experiments_known.json",
        progress=False,
    )
    metrics = result.metrics
    scores = {
        "nats_per_character": found.row("translated", TASK.name).scores[0],
        "recovered_lift": found.row("translated", TASK.name).lift[0],
        "drift": found.row("translated", "drift").scores[0],
    }
    del result
    gc.collect()
    return {
        "scores": scores,
        "kl": metrics["kl"],
        "excitement": metrics["excitement"],
        "trained_parameters": metrics["parameters"]["trained"],
        "seconds": {name: cost["seconds"] for name, cost in metrics["phases"].items()},
    }


def draw(name: str, runs: dict[str, dict]) -> None:
    """Recovered lift and drift of the variants side by side."""
    figure = Figure(figsize=(8, 0.9 + 0.4 * len(runs)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = list(runs)[::-1]
    for axis, key, color in ((left, "recovered_lift", "#4477aa"), (right, "drift", "#cc6677")):
        values = [runs[label]["scores"][key] for label in labels]
        axis.bar_label(axis.barh(labels, values, color=color), [f"{v:.3f}" for v in values], padding=3, fontsize=8)
        axis.set_xlabel(key.replace("_", " "))
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(setting.FIGURES / f"experiment_{name}.png", dpi=130)


def _written(**options: Any) -> list:
    return setting.written("smollm2-gemma3", "gsm8k", "all", 0, **options)


def _cut() -> list:
    return _written(max_new_tokens=128)


def _given_prompts_alone():
    return peft_cast.SelfWritten(prompts=setting.prompts("gsm8k"), more_prompts=0, max_new_tokens=128, batch_size=96)


def _real_questions():
    rows = [
        json.loads(line) for line in Path(setting.EXAMPLES / "data" / "gsm8k_train_1600.jsonl").open(encoding="utf-8")
    ]
    questions = tuple(f"Question: {row['question']}\nAnswer:" for row in rows[:416])
    return peft_cast.SelfWritten(prompts=questions, more_prompts=0, max_new_tokens=128, batch_size=96)


def _c4() -> list[str]:
    return setting.c4_documents()[0]


TEXTS = {
    "prompts and more": _cut,
    "to their end": _written,  # answers to the same prompts, of 192 tokens at most
    "C4": _c4,
    "C4 answered as chat": lambda: peft_cast.SelfWritten(corpus=_c4(), max_new_tokens=128, batch_size=96),
    "half C4": lambda: peft_cast.Mixture((_written(), 1), (_c4(), 1)),
    "real questions": _real_questions,
    "the 16 prompts": _given_prompts_alone,
    "at temperature 0.7": lambda: _written(temperature=0.7),
}

# Every target layer takes the kernels of one source layer, the others are dropped.
ONE_TO_ONE = {round(target * 29 / 17): target for target in range(18)}
LONGER: dict[str, Any] = {"text": "to their end"}
FULL = {**LONGER, "projection_type": "full"}

EXPERIMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "anchor": {f"gamma {gamma:g}": {"gamma": gamma} if gamma != 1 else {} for gamma in (0.0, 0.3, 1.0, 3.0)},
    "learning_rate": {f"{rate:g}": {"learning_rate": rate} if rate != 0.1 else {} for rate in (0.03, 0.1, 0.2, 0.4)},
    "teacher": {"source": {}, "halfway": {"teacher": 0.5}, "delta": {"teacher": "delta"}},
    "projection_size": {
        "r/4": {"projection_size": 2},
        "r/2": {"projection_size": 4},
        "r": {},
        "2r": {"projection_size": 16},
        "4r": {"projection_size": 32},
        "full": {"projection_type": "full"},
    },
    "parametrization": {
        "factored, 0.1": {},
        "factored, 0.2": {"learning_rate": 0.2},
        "compact, 0.1": {"projection_type": "compact"},
        "compact, 0.2": {"projection_type": "compact", "learning_rate": 0.2},
    },
    "loss": {"KL": {}, "KL and MSE": {"beta": 0.1}, "MSE": {"alpha": 0.0, "beta": 0.1}},
    "text": {name: {} if name == "prompts and more" else {"text": name} for name in TEXTS},
    "sharing": {
        "per module, thin": LONGER,
        "per module, full": FULL,
        "per layer, full": {**FULL, "projection_sharing": "layer"},
        "one for all, full": {**FULL, "projection_sharing": "all"},
    },
    "nonlinear": {"linear": {}, "with an MLP": {"projection_type": "mlp"}, "with a bias": {"projection_bias": True}},
    "depth_map": {
        "proportional": {},
        "by similarity": {"depth_map": "similarity"},
        "one to one": {"depth_map": ONE_TO_ONE},
    },
    "start": {"scaled by fit": {}, "gain 1": {"gain": 1.0}, "weak (gain 0.1)": {"gain": 0.1}},
    "steps": {str(n): {**LONGER, "steps": n} if n != 50 else LONGER for n in (0, 25, 50, 100, 200)},
}


if __name__ == "__main__":
    main()
