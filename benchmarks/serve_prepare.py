"""Write a folded adapter as other programs read it, and what transformers answers with it, for serve_llamacpp.py and
serve_mlx.py, which run in environments of their own:

    .venv/bin/python benchmarks/serve_prepare.py real FOLDER ADAPTER...
    .venv/bin/python benchmarks/serve_prepare.py tiny FOLDER

`real` takes CAST adapters; the prompts are held-out GSM8K problems. `tiny` makes, for each architecture of which such
files are written, a random model of two layers (Gemma 3: six) with a random CAST adapter on all its linear modules.
Each case is a subfolder: `lora` (PEFT's), `lora.gguf`, `mlx`, and `expected.json` with the model's folder, the prompts
as token ids and the greedy answers in float32 with the adapter and without.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import peft_cast
from peft_cast.results.gguf_file import ARCHITECTURES
from peft_cast.results.mlx_folder import MODEL_TYPES


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
import models  # noqa: E402


NEW_TOKENS, PROBLEMS = 32, 8
TINY_TOKENS, TINY_PROMPTS = 12, 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
# What llama.cpp or mlx-lm take for granted of an architecture, and sizes of other names.
OWN = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {"num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "gpt2": {"n_embd": 64, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"original_max_position_embeddings": 512, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "starcoder2": {"sliding_window": None},
}


def real(folder: Path, adapter: Path) -> None:
    """A CAST adapter that somebody translated, as a case of its target's name."""
    base = peft_cast.CastConfig.from_pretrained(adapter).base_model_name_or_path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = (HERE.parent / "examples" / "data" / "gsm8k_test_200.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [f"Question: {json.loads(row)['question']}\nAnswer:" for row in rows[:PROBLEMS]]
    folder = folder / Path(base).name
    write(folder, PeftModel.from_pretrained(model, adapter), base, tokenizer(prompts).input_ids, NEW_TOKENS)


def tiny(folder: Path, kind: str) -> None:
    """A random model with a random adapter. Its tokenizer is SmolLM2's: only token ids are compared."""
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2())
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    text = {**({} if kind == "gpt2" else SIZES), **OWN.get(kind, {}), **ids, "vocab_size": len(tokenizer)}
    made = transformers.AutoConfig.for_model(kind, **({"text_config": text} if kind == "gemma3" else text))
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # initial weights are too small to be felt
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "target")
    # mlx-lm reads what transformers leaves out as its default, and some by their earlier names.
    file = folder / "target" / "config.json"
    rope = getattr(made.get_text_config(), "rope_parameters", None) or {}
    earlier = {"rope_theta": rope.get("full_attention", rope).get("rope_theta", 1e4)}
    earlier |= {"num_experts": made.num_experts} if kind == "qwen3_moe" else {}
    earlier |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]} if "sliding_attention" in rope else {}
    saved = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**model.config.to_dict(), **earlier, **saved}, indent=1) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder / "target")
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and re.search(r"\.\d+\.", n)]
    names = [name for name in names if "vision" not in name]
    config = peft_cast.CastConfig(init_weights=False, target_modules=names)
    prompts = torch.randint(300, 40_000, (TINY_PROMPTS, 9)).tolist()
    write(folder, get_peft_model(model, config).eval(), str(folder / "target"), prompts, TINY_TOKENS)


@torch.no_grad()
def write(folder: Path, model: PeftModel, base: str, prompts: list[list[int]], new_tokens: int) -> None:
    kind = model.get_base_model().config.model_type
    folded = peft_cast.to_lora(model)
    folded.config.base_model_name_or_path = base
    folded.save_pretrained(folder / "lora")
    if kind in ARCHITECTURES:
        folded.save_gguf(folder / "lora.gguf")
    if kind in MODEL_TYPES:
        folded.save_mlx(folder / "mlx")

    def answers() -> list[list[int]]:
        options = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
        return [
            model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options)[
                0, len(ids) :
            ].tolist()
            for ids in prompts
        ]

    with_adapter = answers()
    with model.disable_adapter():
        plain = answers()
    report = {
        "kind": kind,
        "base": base,
        "folded": str(folded),
        "prompts": prompts,
        "new_tokens": new_tokens,
        "answers": {"cast": with_adapter, "base": plain},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "expected.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(f"{folder.name}: {folded}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("real", "tiny"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("given", nargs="*", help="CAST adapters, or architectures where not all are wanted")
    args = parser.parse_args()
    if args.what == "real":
        for adapter in map(Path, args.given):
            real(args.folder, adapter)
    else:
        for architecture in args.given or sorted({*ARCHITECTURES, *MODEL_TYPES}):
            tiny(args.folder / architecture, architecture)
