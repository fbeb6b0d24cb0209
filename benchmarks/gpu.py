"""What a translation of 7B models takes on a GPU: seconds, share of the card's rate, and peak memory.

    python benchmarks/gpu.py OUTPUT_FOLDER              # one GPU of 80 GB
    python benchmarks/gpu.py OUTPUT_FOLDER --tiny       # the same on whatever is here, with models of two layers

Llama-2-7B to Mistral-7B by their shapes, with random weights and a tokenizer that is made here: neither speed nor
memory depends on what the weights are. And the demo pair with its own (`--parts demo`). Writes gpu.json, anew after
every part; what fails is in it with its traceback. benchmarks/plan.py puts the plan beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plan as plans
import setting
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import peft_cast
from peft_cast.models.loading import load_model
from peft_cast.planning.devices import matmul_rate, this_machine
from peft_cast.refine.trainer import CastTrainer
from peft_cast.utils.distributed import default_device
from peft_cast.utils.environment import environment
from peft_cast.utils.files import write_json


STEPS = 10
DEMO_STEPS = 40
WARM_UP = 3  # steps that are not timed
GIB = 2**30
CONFIGS = plans.LLAMA_2_7B, plans.MISTRAL_7B


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="models of two layers")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["whole", "quantized"])
    args = parser.parse_args()
    card, rate = this_machine(), matmul_rate(default_device(), torch.bfloat16)
    file = args.output / "gpu.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    report["card"] = {"name": card.name, "device": vars(card)}
    args.output.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        runs = report[part] = {}
        try:
            for name, run in PARTS[part](args.tiny):
                run["share_of_product_rate"] = run["needed_flops_per_step"] / run["seconds_per_step"] / rate
                print(f"{name}: {run['share_of_product_rate']:.2f} of the product rate", flush=True)
                runs[name] = run | {"bfloat16_product_flops": rate, "environment": environment()}
                write_json(report, file)
        except Exception:
            runs["error"] = traceback.format_exc()
            print(runs["error"], flush=True)
            write_json(report, file)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def whole_precision(tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """In bfloat16: 16 texts of 512 tokens a step, in two passes, and in one with checkpointing."""
    length = 64 if tiny else 512
    loaded = pair(tiny, length)
    for name, batch_size, fit_samples, extra in (
        ("two passes of 8", 8, 64, {"gradient_accumulation_steps": 2}),
        ("one of 16, checkpointing", 16, 16, {"gradient_checkpointing": True}),
    ):
        yield name, one(*loaded, batch_size, length, fit_samples, training_args=extra)


def four_bits(tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Both models in 4 bits, on a card of which all but 24 GiB is taken."""
    length = 64 if tiny else 256
    loaded = pair(tiny, length, quantized=True)
    taken = None
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        taken = torch.empty(torch.cuda.mem_get_info()[1] - 24 * GIB, dtype=torch.uint8, device="cuda")
    extra = {"gradient_checkpointing": True}
    run = one(*loaded, 4, length, 16, training_args=extra)
    yield "4 texts of 256, checkpointing", run | {"taken_mb": taken.nbytes / 2**20 if taken is not None else 0}


def demo_pair(tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """SmolLM2-135M to Gemma-3-270m with the GSM8K adapter: small products, many of them, and a large vocabulary."""
    length, batch_size = (64, 2) if tiny else (512, 16)
    folders = {"source": setting.SMOLLM2.folder(), "target": setting.GEMMA3.folder()}
    source, target = (load_model(path, which, default_device()) for which, path in folders.items())
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in folders.values()]
    texts = made_texts(tokenizers[1], batch_size * (DEMO_STEPS + 1) + 100, length)
    lora = str(setting.SMOLLM2.adapter("gsm8k"))
    run = one(source, target, tokenizers, texts, batch_size, length, 64, {}, lora=lora, steps=DEMO_STEPS)
    yield f"{batch_size} texts of {length}", run


PARTS = {"whole": whole_precision, "quantized": four_bits, "demo": demo_pair}


def pair(
    tiny: bool, length: int, quantized: bool = False
) -> tuple[PreTrainedModel, PreTrainedModel, list[PreTrainedTokenizerFast], list[str]]:
    """Source, target, the tokenizers of both, and texts that it cuts into `length` tokens or a few more."""
    tokenizer = made_tokenizer(setting.c4_documents()[0])
    configs = [two_layers(config) for config in CONFIGS] if tiny else CONFIGS
    source, target = (random_model(config, quantized) for config in configs)
    return source, target, [tokenizer, tokenizer], made_texts(tokenizer, 16 * (STEPS + 1) + 100, length)


def two_layers(config: PretrainedConfig) -> PretrainedConfig:
    """The architecture of a configuration, tiny."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return type(config)(**{**config.to_dict(), **sizes, "head_dim": 16, "num_key_value_heads": 2})


def random_model(config: PretrainedConfig, quantized: bool) -> PreTrainedModel:
    device = default_device()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if not quantized:
        return model.eval()
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    options = {"quantization_config": nf4, "device_map": device, "dtype": torch.bfloat16}
    return type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), **options).eval()


def made_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 32,000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def made_texts(tokenizer: PreTrainedTokenizerFast, count: int, length: int) -> list[str]:
    """Words of C4 in random order."""
    draw, words = random.Random(0), " ".join(setting.c4_documents()[0]).split()
    texts = [" ".join(draw.choices(words, k=length)) for _ in range(count)]  # a word is a token at least
    assert all(len(tokenizer(text).input_ids) >= length for text in texts)
    return texts


def one(
    source: PreTrainedModel,
    target: PreTrainedModel,
    tokenizers: list[PreTrainedTokenizerFast],
    texts: list[str],
    batch_size: int,
    length: int,
    fit_samples: int,
    training_args: dict[str, Any],
    lora: str | None = None,
    steps: int = STEPS,
) -> dict[str, Any]:
    """One translation of a LoRA, by default one of rank 16 on all linear layers."""
    each_step = training_args.get("gradient_accumulation_steps", 1)
    with tempfile.TemporaryDirectory() as folder, clocked_steps() as starts:
        lora = lora or random_lora(source.config, Path(folder))
        result = peft_cast.translate(
            source,
            lora,
            target,
            text=texts,
            steps=steps,
            batch_size=batch_size,
            max_length=length,
            fit_samples=fit_samples,
            source_tokenizer=tokenizers[0],
            target_tokenizer=tokenizers[1],
            training_args={**training_args, "logging_steps": 1},
            report_samples=0,
            report_similarity=False,
            progress=False,
        )
        result.model.unload()
    metrics = result.metrics
    used = metrics["refinement"]
    if (used["batch_size"], used["gradient_accumulation_steps"]) != (batch_size, each_step):
        print(f"memory ran out: {used}", flush=True)
    seconds = (starts[-1] - starts[WARM_UP * each_step]) / (len(starts) - 1 - WARM_UP * each_step) * each_step
    tokens, shared = batch_size * each_step * length, metrics["alignment"]["shared_tokens"]
    found = {
        "tokens_per_step": tokens,
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
        "needed_flops_per_step": needed(source.config, target.config, tokens, length, shared),
        "minutes_for_1000_steps": 1000 * seconds / 60,
        "refinement": used,
        "kl": metrics["kl"],
        "losses": [row["loss"] for row in result.history if "loss" in row],
        "phases": metrics["phases"],
        "fit_samples": fit_samples,
    }
    print(f"{seconds:.3f} s a step, phases {metrics['phases']}", flush=True)
    return found


@contextmanager
def clocked_steps() -> Iterator[list[float]]:
    """When each pass of the refinement began, with all work of the one before done."""
    starts: list[float] = []
    compute_loss = CastTrainer.compute_loss

    def timed(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        starts.append(time.perf_counter())
        return compute_loss(*args, **kwargs)

    CastTrainer.compute_loss = timed
    try:
        yield starts
    finally:
        CastTrainer.compute_loss = compute_loss


def random_lora(config: PretrainedConfig, folder: Path) -> str:
    lora = plans.make_lora(config, folder)
    file = folder / "adapter_model.safetensors"
    torch.manual_seed(0)
    save_file({name: 0.02 * torch.randn_like(w) for name, w in load_file(file).items()}, file)
    return lora


def needed(source: PretrainedConfig, target: PretrainedConfig, tokens: int, length: int, vocabulary: int) -> float:
    """Operations of matrix products that a step cannot avoid: the source forward, the target forward and back to
    activations.
    """

    def forward(config: PretrainedConfig) -> float:
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or width // heads
        kv = head * (config.num_key_value_heads or heads)
        layer = 2 * width * (2 * head * heads + 2 * kv + 3 * inner)
        attention = 2 * 2 * head * heads * length / 2  # causal: half of the products
        return tokens * (config.num_hidden_layers * (layer + attention) + 2 * width * vocabulary)

    return forward(source) + 2 * forward(target)


if __name__ == "__main__":
    main()
