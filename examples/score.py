"""Score a model, with and without an adapter, on GSM8K. Runs in a process of its own, so it loads what was saved.

python examples/score.py --model FOLDER --adapter FOLDER --output scores.json
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import torch
from gsm8k import correct_share, format_share, load_problems, nats_per_character, write_answers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_cast  # noqa: F401 (registers CAST with PEFT)


HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", default=str(HERE / "data" / "gsm8k_test_200.jsonl"))
    parser.add_argument("--problems", type=int, default=40, help="problems whose gold answers are scored")
    parser.add_argument("--generate", type=int, default=16, help="problems that are answered; 0 for none")
    parser.add_argument("--max-new-tokens", type=int, default=112)
    parser.add_argument("--without-base", action="store_true", help="score only the model with the adapter")
    parser.add_argument("--output", required=True, help="JSON file")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, args.adapter).eval()
    problems = load_problems(args.data, max(args.problems, args.generate))
    scores = {"settings": {**vars(args), "model": Path(args.model).name}}
    for name in ("adapted",) if args.without_base else ("base", "adapted"):
        with model.disable_adapter() if name == "base" else nullcontext():
            scores[name] = {"nats_per_character": nats_per_character(model, tokenizer, problems[: args.problems])}
            if args.generate:
                asked = problems[: args.generate]
                answers = write_answers(model, tokenizer, asked, args.max_new_tokens)
                scores[name]["format_share"] = format_share(answers)
                scores[name]["correct_share"] = correct_share(answers, asked)
                scores[name]["answers"] = answers
    Path(args.output).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
