"""A recipe for one large GPU: a LoRA of Llama-2-7B on Mistral-7B, in bfloat16.

We ran it on tiny models alone, never on these.

    python examples/llama2_to_mistral.py you/math-lora prompts.txt

The plan is printed first. Stopped or killed, the same command goes on; a second translation of the same pair and text
takes the closed form and the teacher's predictions from the cache.
"""

import sys
from pathlib import Path

import torch

import peft_cast


SOURCE, TARGET = "meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1"
STEPS, BATCH_SIZE, MAX_LENGTH = 1000, 8, 512


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("Pass the LoRA (hub id or folder) and a file with a dozen prompts of its kind, one per line.")
    adapter, prompts = sys.argv[1], Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
    text = peft_cast.SelfWritten(prompts=[prompt.replace("\\n", "\n") for prompt in prompts if prompt.strip()])
    sizes = {"steps": STEPS, "batch_size": BATCH_SIZE, "max_length": MAX_LENGTH}
    # Memory and time of every phase, for this GPU or, say, on="h100"; no weights are loaded.
    plan = peft_cast.plan(SOURCE, adapter, TARGET, text=text, **sizes)
    print(plan, flush=True)
    if not plan.fits:
        raise SystemExit("By the plan it does not fit: lower `BATCH_SIZE` or `MAX_LENGTH`, or take a larger GPU.")
    result = peft_cast.translate(
        SOURCE,
        adapter,
        TARGET,
        text=text,
        dtype=torch.bfloat16,
        training_args={"gradient_checkpointing": True, "logging_steps": 10},
        cache_dir="cache/llama2-mistral",
        output_dir="llama2-to-mistral",
        resume_from_checkpoint=True,
        **sizes,
    )
    print(result)


if __name__ == "__main__":
    main()
