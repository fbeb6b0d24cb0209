"""The demo: translate a GSM8K LoRA from SmolLM2-135M-Instruct to Gemma-3-270m, and show what came across.

    make demo          # or, in the environment: python examples/demo.py

Everything is real (models, C4 text, GSM8K problems) and nothing is downloaded from a model hub. Exits with 1 if the
translated model is not clearly better than the untouched one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import models

import peft_cast
from peft_cast.utils.environment import environment
from peft_cast.utils.phases import Phases


HERE = Path(__file__).parent
SOURCE_LORA = HERE / "adapters" / "smollm2-135m-gsm8k"
RETRAINED = HERE / "adapters" / "gemma3-270m-gsm8k"
SHOWN = ("nats_per_character", "in_format", "exact_match", "drift", "perplexity_base", "perplexity")
# "Clearly better" in nats per character of held-out answers; the untouched model scores about 0.75.
LEAST_GAIN = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(HERE.parent / "demo-output"), help="folder for adapter and scores")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--generate", type=int, default=8)
    args = parser.parse_args()
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    phases = Phases()

    with phases.measure("models"):
        source, target = models.smollm2(), models.gemma3()

    questions = (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()
    prompts = tuple(f"Question: {question}\nAnswer:" for question in questions)

    print("\nTranslating the LoRA (SmolLM2-135M-Instruct -> Gemma-3-270m) ...", flush=True)
    with phases.measure("translate"):
        result = peft_cast.translate(
            source,
            SOURCE_LORA,
            target,
            # Sixteen questions of ours, a few more by Gemma in their manner, answered by the adapted SmolLM2: no task
            # data.
            text=peft_cast.SelfWritten(
                prompts=prompts, more_prompts=48, samples=160, max_new_tokens=112, batch_size=80
            ),
            fit_text=HERE / "data" / "c4_en_400.jsonl",
            fit_samples=30,
            eval_samples=8,
            steps=args.steps,
            batch_size=6,
            max_length=192,
            seed=args.seed,
        )
        result.save_pretrained(out / "adapter")
    print(f"\n{result}\n", flush=True)

    print("Scoring in a fresh process, the adapter loaded from disk ...", flush=True)
    with phases.measure("score"):
        evaluation = score(target, out, args)
    scores = {name: scores_of(evaluation, name) for name in ("base", "translated", "retrained")}
    gain = scores["base"]["nats_per_character"] - scores["translated"]["nats_per_character"]
    print(table(scores, args))
    print(sample(*(written(evaluation, name) for name in ("base", "translated"))))
    report = {
        "scores": scores,
        "translation": {name: part for name, part in result.metrics.items() if name != "report"},
        "phases": phases.costs,
        "seed": args.seed,
        "settings": {"steps": args.steps, "problems": args.problems, "generate": args.generate},
        "environment": environment(),
    }
    (out / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    total = sum(cost["seconds"] for cost in phases.costs.values())
    print(f"\nTook {total / 60:.1f} minutes. Adapter: {out / 'adapter'}, figures: {out / 'demo.json'}")
    if gain < LEAST_GAIN:
        print(f"FAILED: the translated model gains {gain:.3f} nats per character, less than {LEAST_GAIN}.")
        return 1
    return 0


def score(model: Path, out: Path, args: argparse.Namespace) -> peft_cast.Evaluation:
    """Run score.py in a fresh process."""
    command = [sys.executable, "-W", "ignore", str(HERE / "score.py"), "--model", str(model)]
    command += ["--adapter", f"translated={out / 'adapter'}", "--adapter", f"retrained={RETRAINED}"]
    command += ["--retrained", "retrained", "--problems", str(args.problems), "--generate", str(args.generate)]
    command += ["--output", str(out / "scores.json")]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return peft_cast.Evaluation.load(out / "scores.json")


def scores_of(evaluation: peft_cast.Evaluation, name: str) -> dict[str, float]:
    """All figures of one adapter."""
    found = {}
    for m in evaluation.measurements:
        if m.adapter == name:
            found |= {key: m.metrics[key] for key in SHOWN if key in m.metrics}
    return {**found, "recovered_lift": evaluation.row(name, "likelihood").lift[0]}


def written(evaluation: peft_cast.Evaluation, name: str) -> dict[str, str]:
    """What a model answered to the first problem."""
    return next(m.samples[0] for m in evaluation.measurements if m.adapter == name and m.task == "generation")


def table(scores: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    names = {
        "base": "Gemma-3-270m, untouched",
        "translated": "Gemma-3-270m + translated LoRA",
        "retrained": "Gemma-3-270m + LoRA retrained on it",
    }
    head = f"{'nats per character':>20}{'recovered lift':>16}{'in format':>11}{'drift on C4':>13}"
    lines = ["", f"Held-out GSM8K ({args.problems} answers scored, {args.generate} generated)", f"{'':<38}{head}"]
    for name, title in names.items():
        found = scores[name]
        cells = f"{found['nats_per_character']:>20.3f}{found['recovered_lift'] + 0:>16.2f}{found['in_format']:>11.0%}"
        lines.append(f"{title:<38}{cells}{found.get('drift', 0.0):>13.3f}")
    return "\n".join(lines)


def sample(before: dict[str, str], after: dict[str, str]) -> str:
    left, right = (column(title, s["written"]) for title, s in (("untouched", before), ("translated", after)))
    height = max(len(left), len(right))
    rows = zip(left + [""] * (height - len(left)), right + [""] * (height - len(right)))
    body = "\n".join(f"{a:<56} | {b}" for a, b in rows)
    return f"\n{textwrap.fill(before['prompt'].removesuffix('Answer:').strip(), 115)}\n\n{body}"


def column(title: str, text: str) -> list[str]:
    lines = [part for line in text.strip()[:400].splitlines() for part in textwrap.wrap(line, 56) or [""]]
    return [title, "-" * len(title), *lines]


if __name__ == "__main__":
    sys.exit(main())
