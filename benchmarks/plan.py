"""The plan beside what was measured, and plans for models that do not fit here.

    .venv/bin/python benchmarks/plan.py

Reads the costs in docs/figures/demo.json, of runs of the table and in gpu.json, and writes docs/figures/plan.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import setting
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, MistralConfig, PretrainedConfig

import peft_cast
from peft_cast.planning.devices import REACHED_ON_GPU, Device, this_machine
from peft_cast.planning.plan import PhasePlan
from peft_cast.utils.environment import environment


LLAMA_2_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)
MISTRAL_7B = MistralConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, vocab_size=32000
)
LLAMA_3_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
)
OPTIONS = ("steps", "batch_size", "max_length")
READ = "c4"  # text that no model writes: what writing takes is not compared
# Runs of the table: pair, task, and how long they were.
RUNS = (
    ("smollm2-gemma3", "gsm8k", "CAST_seed2", "GSM8K, 120 steps of 8"),
    ("gemma3-smollm2", "agnews", "CAST_seed0", "AG News in reverse, 100 steps of 12"),
)


def main() -> None:
    device = this_machine()
    here = compare("demo", "smollm2-gemma3", "gsm8k", read("demo.json")["translation"], device)
    for pair, task, name, title in RUNS:
        here += compare(title, pair, task, read(f"run_{pair}_{task}_all_{name}.json")["metrics"], device)
    report = {"measured": [*here, *compare_gpu()], "elsewhere": elsewhere(), "environment": environment()}
    (setting.FIGURES / "plan.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    return json.loads((setting.FIGURES / name).read_text(encoding="utf-8"))


def compare(run: str, pair: str, task: str, metrics: dict[str, Any], device: Device) -> list[dict[str, Any]]:
    """Plan and measurement of every phase of a translation between the real models here, with nothing else on the
    machine.

    Phases that had nothing to do, such as a closed form that was kept from before, are left out.
    """
    source, target = setting.PAIRS[pair]
    text = metrics["text"]
    planned = peft_cast.plan(
        source.folder(),
        source.adapter(task),
        target.folder(),
        text=READ,
        on=device,
        tokens=round(text["target_tokens"] / (text["train"] + text["held_out"])),
        aligned=text["aligned_positions"] / text["target_tokens"],
        fit_samples=text["closed_form"],
        eval_samples=text["held_out"],
        teacher=metrics["settings"].get("teacher", "source"),
        **{name: metrics["settings"][name] for name in OPTIONS},
    )
    costs = metrics["phases"]
    return [
        beside(run, name, phase, costs[name]["seconds"], costs[name]["peak_memory_mb"])
        for name, phase in planned.phases.items()
        if costs[name]["seconds"] > 1
    ]


def compare_gpu() -> list[dict[str, Any]]:
    """Plan and measurement of every phase of the runs on a GPU (benchmarks/gpu.py), by the rates that were measured
    there.

    What was measured is the memory of tensors, without the driver's own.
    """
    found = read("gpu.json")
    card = found["card"]["device"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shapes = LLAMA_2_7B, make_lora(LLAMA_2_7B, Path(folder)), MISTRAL_7B
        demo = setting.SMOLLM2.folder(), setting.SMOLLM2.adapter("gsm8k"), setting.GEMMA3.folder()
        for title, part, models, options in (
            ("7B, bfloat16", "whole", shapes, {"dtype": torch.bfloat16, "aligned": 1.0}),
            ("7B, 4 bits", "quantized", shapes, {"dtype": torch.bfloat16, "aligned": 1.0, "weight_bits": 4}),
            ("demo pair, H100", "demo", demo, {}),
        ):
            for name, run in found[part].items():
                taken = run.get("taken_mb", 0)
                device = Device(
                    card["name"],
                    REACHED_ON_GPU * run["bfloat16_product_flops"],
                    card["flops32"],
                    memory=card["memory"] - int(taken * 2**20),
                    runtime=0,
                )
                used, passes = run["refinement"], run["refinement"]["gradient_accumulation_steps"]
                planned = peft_cast.plan(
                    *models,
                    text=READ,
                    on=device,
                    steps=used["steps"] * passes,
                    batch_size=used["batch_size"],
                    max_length=run["tokens_per_step"] // (used["batch_size"] * passes),
                    fit_samples=run["fit_samples"],
                    gamma=0.0,
                    training_args={"gradient_checkpointing": "checkpointing" in name},
                    **options,
                )
                rows += [
                    beside(
                        f"{title}, {name}",
                        phase,
                        planned.phases[phase],
                        cost["seconds"],
                        cost["peak_device_memory_mb"] - taken,
                    )
                    for phase, cost in run["phases"].items()
                    if phase in planned.phases and phase != "load"  # they were given loaded
                ]
    return rows


def beside(run: str, phase: str, planned: PhasePlan, seconds: float, megabytes: float) -> dict[str, Any]:
    """One phase's plan and measurement."""
    row = {
        "run": run,
        "phase": phase,
        "planned_seconds": planned.seconds,
        "seconds": seconds,
        "planned_mb": planned.memory / 2**20,
        "mb": megabytes,
    }
    print(
        f"{run:<40} {phase:<12} time {planned.seconds:7.1f} of {seconds:7.1f} s   "
        f"memory {row['planned_mb']:7.0f} of {megabytes:7.0f} MB"
    )
    return row


def elsewhere() -> dict[str, Any]:
    """Plans for models that cannot be run here, for a LoRA of rank 16 on all linear layers of the source."""
    plans = {}
    with tempfile.TemporaryDirectory() as folder:
        lora = make_lora(LLAMA_2_7B, Path(folder))
        checkpointing = {"gradient_checkpointing": True}
        options = {"steps": 1000, "batch_size": 16, "max_length": 512, "training_args": checkpointing}
        quantized = {"weight_bits": 4, "batch_size": 4, "max_length": 256}
        sharded = {"processes": 8, "training_args": {**checkpointing, "fsdp": True}, "batch_size": 8}
        for name, target, device, more in (
            ("Llama-2-7B to Mistral-7B, one H100", MISTRAL_7B, "h100", {}),
            ("Llama-2-7B to Mistral-7B, one A100", MISTRAL_7B, "a100", {}),
            ("Llama-2-7B to Mistral-7B, both in 4 bits, one RTX 4090", MISTRAL_7B, "rtx4090", quantized),
            ("Llama-2-7B to Llama-3-70B, one H200", LLAMA_3_70B, "h200", {}),
            ("Llama-2-7B to Llama-3-70B, each of eight H100", LLAMA_3_70B, "h100", sharded),
        ):
            planned = peft_cast.plan(LLAMA_2_7B, lora, target, text=READ, on=device, **{**options, **more})
            print(f"\n{name}\n{planned}")
            plans[name] = planned.as_dict()
    return plans


def make_lora(config: PretrainedConfig, folder: Path, r: int = 16) -> str:
    """The file of a LoRA on all linear layers, all zeros."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = width // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, kv),
        "self_attn.v_proj": (width, kv),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (width, inner),
        "mlp.up_proj": (width, inner),
        "mlp.down_proj": (inner, width),
    }
    weights = {}
    for layer in range(layers):
        for name, (read, written) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.zeros(r, read, dtype=torch.bfloat16)
            weights[f"{prefix}.lora_B.weight"] = torch.zeros(written, r, dtype=torch.bfloat16)
    save_file(weights, folder / "adapter_model.safetensors")
    names = [name.split(".")[-1] for name in shapes]
    LoraConfig(r=r, target_modules=names, task_type="CAUSAL_LM", base_model_name_or_path="llama").save_pretrained(
        folder
    )
    return str(folder)


if __name__ == "__main__":
    main()
