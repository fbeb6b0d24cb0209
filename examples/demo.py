"""The demo: translate a GSM8K LoRA from SmolLM2-135M-Instruct to Gemma-3-270m, and show what came across.

    make demo          # or, in the environment: python examples/demo.py

Everything is real (models, C4 text, GSM8K problems) and nothing is downloaded from a model hub. Exits with 1 if the
translated model is not clearly better than the untouched one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

import models

import peft_cast
from peft_cast.phases import Phases


HERE = Path(__file__).parent
ADAPTER = HERE / "adapters" / "smollm2-135m-gsm8k"
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
            ADAPTER,
            target,
            # The adapted SmolLM2 answers 16 questions of ours, several times each: no task data, no labels.
            text=peft_cast.SelfWritten(prefix=prompts, samples=104, max_new_tokens=112, batch_size=104),
            fit_text=HERE / "data" / "c4_en_400.jsonl",
            fit_samples=30,
            eval_samples=8,
            steps=args.steps,
            batch_size=6,
            max_length=160,
            seed=args.seed,
        )
        result.save_pretrained(out / "adapter")
    print(f"\n{result}\n", flush=True)

    print("Scoring in fresh processes, adapters loaded from disk ...", flush=True)
    with phases.measure("score_target"):
        gemma = score(target, out / "adapter", out / "scores_target.json", args.problems, args.generate)
    with phases.measure("score_source"):
        smollm2 = score(source, ADAPTER, out / "scores_source.json", args.problems, 0, "--without-base")

    base, translated, teacher = gemma["base"], gemma["adapted"], smollm2["adapted"]
    gain = base["nats_per_character"] - translated["nats_per_character"]
    way = gain / (base["nats_per_character"] - teacher["nats_per_character"])
    print(table(base, translated, teacher, way, args))
    print(sample(base["answers"][0], translated["answers"][0]))
    report = {
        "base": without_answers(base),
        "translated": without_answers(translated),
        "source_with_lora": without_answers(teacher),
        "way_to_source": way,
        "translation": result.metrics,
        "phases": phases.costs,
        "seed": args.seed,
        "settings": {"steps": args.steps, "problems": args.problems, "generate": args.generate},
        "machine": machine(),
    }
    (out / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    total = sum(cost["seconds"] for cost in phases.costs.values())
    print(f"\nTook {total / 60:.1f} minutes. Adapter: {out / 'adapter'}, figures: {out / 'demo.json'}")
    if gain < LEAST_GAIN:
        print(f"FAILED: the translated model gains {gain:.3f} nats per character, less than {LEAST_GAIN}.")
        return 1
    return 0


def score(model: Path, adapter: Path, output: Path, problems: int, generate: int, *flags: str) -> dict:
    """Run score.py in a fresh process."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(HERE / "score.py"),
        "--model",
        str(model),
        "--adapter",
        str(adapter),
    ]
    command += ["--problems", str(problems), "--generate", str(generate), "--output", str(output), *flags]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return json.loads(output.read_text(encoding="utf-8"))


def table(base: dict, translated: dict, teacher: dict, way: float, args: argparse.Namespace) -> str:
    rows = [
        ("Gemma-3-270m", base),
        ("Gemma-3-270m + translated LoRA", translated),
        ("SmolLM2-135M + its own LoRA", teacher),
    ]
    lines = [
        "",
        f"Held-out GSM8K ({args.problems} answers scored, {args.generate} generated)",
        f"{'':<34}{'nats per character':>20}{'in GSM8K format':>18}",
    ]
    for name, scores in rows:
        share = f"{scores['format_share']:.0%}" if "format_share" in scores else "-"
        lines.append(f"{name:<34}{scores['nats_per_character']:>20.3f}{share:>18}")
    lines.append(f"The translation covers {way:.0%} of the way from the untouched target to the adapted source.")
    return "\n".join(lines)


def sample(before: str, after: str) -> str:
    question = json.loads((HERE / "data" / "gsm8k_test_200.jsonl").open(encoding="utf-8").readline())["question"]
    left, right = (column(title, text) for title, text in (("untouched", before), ("translated", after)))
    height = max(len(left), len(right))
    rows = zip(left + [""] * (height - len(left)), right + [""] * (height - len(right)))
    body = "\n".join(f"{a:<56} | {b}" for a, b in rows)
    return f"\n{textwrap.fill('Question: ' + question, 115)}\n\n{body}"


def column(title: str, text: str) -> list[str]:
    lines = [part for line in text.strip()[:400].splitlines() for part in textwrap.wrap(line, 56) or [""]]
    return [title, "-" * len(title), *lines]


def without_answers(scores: dict) -> dict:
    return {name: value for name, value in scores.items() if name != "answers"}


def machine() -> dict[str, object]:
    packages = ("torch", "transformers", "peft", "accelerate", "datasets")
    return {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


if __name__ == "__main__":
    sys.exit(main())
