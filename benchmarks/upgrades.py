"""Adapters of SmolLM2 on its own successors: later versions, 4-bit weights, a sixth of the layers gone.

    .venv/bin/python benchmarks/upgrades.py quantized version-little     # some; all without arguments

Rows: the untouched successor, the LoRA copied as it is where shapes and layers allow, the closed form (`steps=0`), and
on the old model the LoRA itself. Writes docs/figures/upgrades.json after every scenario and goes on where it stopped.
Successors are made once, in bench-output/successors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import setting
import torch
from setting import score
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import peft_cast
from peft_cast.align import layer_count
from peft_cast.utils.environment import environment


RESULTS = setting.FIGURES / "upgrades.json"
DEVELOPMENT = 20  # the first rows of a task, on which nothing here is judged
LIMIT = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS), help=", ".join(SCENARIOS))
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "agnews"])
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"scenarios": {}}
    for scenario in args.scenarios:
        for task in args.tasks:
            known = results["scenarios"].setdefault(scenario, {})
            if task not in known:
                known[task] = judged(scenario, task)
                results["environment"], results["seed"] = environment(), 0
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(scenario, task, json.dumps(known[task]["rows"], indent=1), flush=True)


def judged(scenario: str, task: str) -> dict:
    """The rows of one scenario and task."""
    general, unseen = setting.c4_documents()
    source, lora, target = setting.SMOLLM2.folder(), setting.SMOLLM2.adapter(task), successor(scenario)
    translated = peft_cast.translate(
        source,
        lora,
        target,
        text=general,
        fit_text=general,
        first_maps="closed_form",
        steps=0,
        depth_map=depth_map(target),
        report_samples=0,
        report_similarity=False,
        progress=False,
    )
    folder = setting.OUTPUT / "upgrades" / f"{scenario}-{task}-closed-form"
    translated.save_pretrained(folder)
    adapters: dict[str, Path] = {"closed form": folder}
    if scenario != "pruned":  # where layer numbers are no longer the same
        copied = peft_cast.baselines.direct_copy(source, lora, target)
        adapters["direct copy"] = setting.OUTPUT / "upgrades" / f"{scenario}-{task}-copy"
        copied.save_pretrained(adapters["direct copy"])
    options = {"drift_text": unseen, "progress": False}
    found = peft_cast.evaluate(target, adapters, tasks(task), **options)
    old = peft_cast.evaluate(source, {"LoRA on the old model": lora}, tasks(task), **options)
    rows = [vars(row) for row in (*found.rows, *old.of("LoRA on the old model"))]
    return {
        "rows": [{name: row[name] for name in ("adapter", "task", "metric", "scores")} for row in rows],
        "paired": found.to_dict()["paired"],
        "r2": {side: mean_r2(translated, side) for side in ("r2_in", "r2_out")},
        "seconds": {name: cost["seconds"] for name, cost in translated.metrics["phases"].items()},
    }


def mean_r2(result: peft_cast.TranslationResult, side: str) -> float:
    values = [fit[side] for fits in result.metrics["closed_form"]["modules"].values() for fit in fits]
    return sum(values) / len(values)


def tasks(task: str) -> list:
    """What the old LoRA was trained for, on items that development never saw."""
    if task == "gsm8k":
        data = (score.PROBLEMS, score.PROMPT, score.ANSWER)
        return [
            peft_cast.AnswerLikelihood("GSM8K likelihood", *data, start=DEVELOPMENT),
            peft_cast.Generation(
                "GSM8K generation", *data, score.NUMBER, start=DEVELOPMENT, limit=96, batch_size=48, metric="in_format"
            ),
        ]
    return setting.tasks(task, classify=LIMIT // 2)


def successor(scenario: str) -> Path:
    """The folder of a successor, made at the first call."""
    folder = setting.OUTPUT / "successors" / scenario
    if not (folder / "config.json").exists():
        old = setting.SMOLLM2.folder()
        torch.manual_seed(0)
        model = SCENARIOS[scenario](AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32))
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(old).save_pretrained(folder)
    return folder


def depth_map(target: Path) -> str | dict[int, int]:
    """Layer to layer; of a pruned model those that are left, as its configuration says."""
    kept = json.loads((target / "config.json").read_text(encoding="utf-8")).get("kept_layers")
    return {old: new for new, old in enumerate(kept)} if kept else "proportional"


def trained_on(model: PreTrainedModel, steps: int, rate: float) -> PreTrainedModel:
    """Pretrained further, on documents of C4 that nothing else here reads."""
    tokenizer = AutoTokenizer.from_pretrained(setting.SMOLLM2.folder())
    file = setting.data_folder() / "c4_en_1480.jsonl"
    texts = [json.loads(line)["text"] for line in file.open(encoding="utf-8")][-1000:]
    stream = [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    rows = torch.tensor(stream[: len(stream) // 256 * 256]).view(-1, 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    order = torch.randperm(len(rows))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 5) * (1 - step / steps)
        batch = rows[order[8 * step % len(rows) :][:8]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: {float(loss):.3f}", flush=True)
    return model


@torch.no_grad()
def quantized(model: PreTrainedModel, bits: int = 4, group: int = 32) -> PreTrainedModel:
    """The weights of its decoder layers rounded to 4 bits, a scale for every 32 of a row."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            blocks = module.weight.view(-1, group)
            scale = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            module.weight.copy_(((blocks / scale).round() * scale).view_as(module.weight))
    return model


def pruned(model: PreTrainedModel, share: int = 6) -> PreTrainedModel:
    """Without the sixth of its layers that change their input least (ShortGPT, arXiv 2403.03853), briefly healed."""
    tokenizer, depth = AutoTokenizer.from_pretrained(setting.SMOLLM2.folder()), layer_count(model)
    batch = tokenizer(
        setting.c4_documents()[0][:8], return_tensors="pt", truncation=True, max_length=128, padding=True
    )
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    change = [
        1 - torch.cosine_similarity(a, b, dim=-1)[batch.attention_mask.bool()].mean()
        for a, b in zip(states, states[1:])
    ]
    dropped = sorted(range(1, depth - 1), key=lambda layer: change[layer])[: depth // share]
    kept = [layer for layer in range(depth) if layer not in dropped]
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in kept)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers, model.config.kept_layers = len(kept), kept
    return trained_on(model, steps=20, rate=1e-4)


SCENARIOS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "quantized": quantized,
    "version-little": lambda model: trained_on(model, steps=10, rate=3e-5),
    "pruned": pruned,
    "version-much": lambda model: trained_on(model, steps=60, rate=3e-4),
}


if __name__ == "__main__":
    main()
