"""Fold a CAST adapter into a plain LoRA of a rank that vLLM takes, and print the command that serves it.

    python examples/serve_folded.py my-translated-lora --output my-lora

Neither the source model nor the target's weights are loaded. See docs/serving.md for what was checked.
"""

import argparse

import peft_cast


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("adapter", help="a CAST adapter: folder or hub id")
parser.add_argument("--output", default="my-lora", help="folder of the LoRA")
parser.add_argument(
    "--rank", type=int, default=16, help="8, 16, 32, 64, ...; smaller than needed is cut, and reported"
)
args = parser.parse_args()

folded = peft_cast.to_lora(args.adapter, rank=args.rank)
folded.save_pretrained(args.output)
print(folded)  # its rank, and what was lost if it had to be cut
print("\nServe it:\n")
target = folded.config.base_model_name_or_path
print(f"    vllm serve {target} --enable-lora --max-lora-rank {args.rank} --lora-modules cast={args.output}")
