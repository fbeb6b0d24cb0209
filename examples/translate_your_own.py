"""Translate a LoRA of yours, compare it if you have test data, and publish it if you like.

    python examples/translate_your_own.py SOURCE ADAPTER TARGET --prompts prompts.txt --output my-translated-lora
    ... --test test.jsonl --prompt "Question: {question}\\nAnswer:" --answer " {answer}"    # likelihood of gold
    answers ... --push you/my-translated-lora                                                      # needs `hf auth
    login`

Models and adapter are hub ids or folders. `prompts.txt` has a dozen prompts of the LoRA's kind, one per line, `\\n`
for a line break.
"""

import argparse
from pathlib import Path

import peft_cast


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", help="the model the LoRA was trained on")
parser.add_argument("adapter", help="the LoRA")
parser.add_argument("target", help="the model it shall work on")
parser.add_argument("--prompts", required=True, help="file with a dozen prompts of the LoRA's kind, one per line")
parser.add_argument("--output", default="my-translated-lora", help="folder of the run and of the finished adapter")
parser.add_argument("--test", help="jsonl file with a test row per line")
parser.add_argument("--prompt", help="how a row becomes a prompt, with its columns in braces")
parser.add_argument("--answer", help="how a row becomes the right answer")
parser.add_argument("--retrained", help="a LoRA that was trained on the target with the task's data, to compare with")
parser.add_argument("--push", metavar="USER/NAME", help="publish the result there")
args = parser.parse_args()
if args.test and not (args.prompt and args.answer):
    parser.error("--test needs --prompt and --answer: how a row becomes a prompt and its right answer.")

lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
# The target writes more prompts like these, the source with its LoRA answers them, and the target learns the answers.
text = peft_cast.SelfWritten(prompts=[line.replace("\\n", "\n") for line in lines if line.strip()])

# What it will cost, before anything large is loaded.
print(peft_cast.plan(args.source, args.adapter, args.target, text=text), flush=True)

# General text (C4, streamed) fits the projections and holds the target in place. Run the script again after it was
# stopped: it goes on where it was.
result = peft_cast.translate(
    args.source, args.adapter, args.target, text=text, output_dir=args.output, resume_from_checkpoint=True
)
print(result)
for advice in result.diagnosis():
    print("-", advice)

evaluation = None
if args.test:
    adapters = {"translated": args.output, **({"retrained": args.retrained} if args.retrained else {})}
    evaluation = peft_cast.evaluate(
        args.target,
        adapters,
        [
            peft_cast.AnswerLikelihood(
                "test", args.test, args.prompt.replace("\\n", "\n"), args.answer.replace("\\n", "\n")
            )
        ],
        retrained="retrained" if args.retrained else None,
    )
    print(evaluation)
    peft_cast.write_report(args.output, evaluation=evaluation)

if args.push:
    print(peft_cast.push(args.output, args.push, evaluation=evaluation))
