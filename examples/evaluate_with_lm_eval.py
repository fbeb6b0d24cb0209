"""Compare adapters on tasks of lm-evaluation-harness: pip install "peft-cast[eval]".

    python examples/evaluate_with_lm_eval.py google/gemma-3-270m translated=my-translated-lora \\
        retrained=you/lora-trained-on-gemma --retrained retrained --tasks arc_easy hellaswag --output rows.json

Every measurement is kept in the output file as soon as it is made: run the command again after it was stopped.
"""

import argparse

import peft_cast


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("target", help="the model that the adapters are for")
parser.add_argument("adapters", nargs="+", metavar="NAME=ADAPTER", help="a folder or hub id")
parser.add_argument("--tasks", nargs="+", default=["arc_easy", "hellaswag"], help="names of the harness")
parser.add_argument("--metric", default="acc_norm", help="the metric that recovered lift is taken of")
parser.add_argument("--limit", type=int, help="the first rows of each task alone")
parser.add_argument("--retrained", metavar="NAME", help="the adapter that was trained on the target")
parser.add_argument("--output", default="rows.json")
args = parser.parse_args()

evaluation = peft_cast.evaluate(
    args.target,
    dict(adapter.split("=", 1) for adapter in args.adapters),
    [peft_cast.HarnessTask(task, metric=args.metric, limit=args.limit) for task in args.tasks],
    retrained=args.retrained,
    output=args.output,
)
print(evaluation)
