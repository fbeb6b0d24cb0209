"""Score the adapters of a model on GSM8K, beside the model without any. A process of its own loads what was saved.

python examples/score.py --model FOLDER --adapter translated=FOLDER --adapter retrained=FOLDER --output scores.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import peft_cast


HERE = Path(__file__).parent
PROMPT, ANSWER = "Question: {question}\nAnswer:", " {answer}"
PROBLEMS = HERE / "data" / "gsm8k_test_200.jsonl"
NUMBER = r"#### *(-?[\d.,]*\d)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--retrained", help="name of the adapter that was trained on the model itself")
    parser.add_argument("--problems", type=int, default=40, help="problems whose gold answers are scored")
    parser.add_argument("--generate", type=int, default=16, help="problems that are answered; 0 for none")
    parser.add_argument("--max-new-tokens", type=int, default=112)
    parser.add_argument("--output", required=True, help="JSON file")
    args = parser.parse_args()

    tasks = [peft_cast.AnswerLikelihood("likelihood", PROBLEMS, PROMPT, ANSWER, limit=args.problems)]
    if args.generate:
        tasks.append(
            peft_cast.Generation(
                "generation", PROBLEMS, PROMPT, ANSWER, NUMBER, args.max_new_tokens, limit=args.generate
            )
        )
    c4 = peft_cast.text.read_corpus(HERE / "data" / "c4_en_400.jsonl", 400)
    evaluation = peft_cast.evaluate(
        args.model,
        dict(adapter.split("=", 1) for adapter in args.adapter),
        tasks,
        retrained=args.retrained,
        drift_text=c4[-24:],
    )
    evaluation.save(args.output)


if __name__ == "__main__":
    main()
