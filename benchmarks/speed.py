"""What each part costs beside the least it could cost, on the real pair: `make bench-speed`.

Writes docs/figures/speed.json; with `--parts` those alone anew. Nothing else should run on the machine, and the bridge
of benchmarks/bridge.py must be there.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import setting
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast.align.batches import collate_pairs
from peft_cast.fit import closed_form as fitting
from peft_cast.fit.closed_form import fit_closed_form
from peft_cast.fit.install import cast_config, install
from peft_cast.fit.moments import Moments
from peft_cast.models.capture import next_token_loss
from peft_cast.models.heads import logits_at, shared_head
from peft_cast.models.loading import default_dtype
from peft_cast.options import Training
from peft_cast.refine.teacher import Teacher
from peft_cast.refine.trainer import training_precision
from peft_cast.source.pair import Pair, open_pair
from peft_cast.text.reading import ANCHOR_EVERY, PairTexts, read_texts
from peft_cast.utils.environment import environment


SOURCE, TARGET = setting.PAIRS["smollm2-gemma3"]
LORA = SOURCE.adapter("gsm8k")
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parts = parser.parse_args().parts
    file = setting.FIGURES / "speed.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    # What another machine or other versions took is not mixed with this.
    report = known if known.get("environment") == environment() else {"environment": environment()}
    for part in parts:
        report |= PARTS[part]()
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        gc.collect()
    for name, cost in report.items():
        if "ratio" in cost:
            print(f"{name:<28} {cost['seconds']:.4g} s, floor {cost['floor']:.4g} s, ratio {cost['ratio']:.3f}")


def fit_part() -> dict[str, Any]:
    with open_pair(SOURCE.folder(), LORA, TARGET.folder()) as pair:
        return {"fit": closed_form(pair, texts_for(pair))}


def step_part() -> dict[str, Any]:
    with open_pair(SOURCE.folder(), LORA, TARGET.folder()) as pair:
        texts = texts_for(pair)
        maps, _ = fitted_bridge().closed_form(pair.kernels)  # what is in them takes no time
        model = install(pair.target, cast_config(pair.kernels, pair.modules), pair.kernels, maps)
        return {"step": step(pair, model, texts)}


def adapters_part() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return adapters(fitted_bridge(), Path(folder))


PARTS = {"fit": fit_part, "step": step_part, "adapters": adapters_part}


def texts_for(pair: Pair) -> PairTexts:
    written, general = setting.written("smollm2-gemma3", "gsm8k", "all", 0), setting.c4_documents()[0]
    return read_texts(pair, written, general, train=32, held_out=8, fit=64, anchored=True)


def fitted_bridge() -> peft_cast.Bridge:
    return peft_cast.Bridge.from_pretrained(str(setting.OUTPUT / "bridge"))


def by_turns(works: dict[str, Callable[[], Any]], times: int, warm_up: bool = True) -> dict[str, float]:
    """Seconds of each one's fastest run. By turns, so that all see the same machine."""
    found = dict.fromkeys(works, float("inf"))
    for turn in range(-1 if warm_up else 0, times):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 0:
                found[name] = min(found[name], time.perf_counter() - start)
    return found


@contextmanager
def clocked(*functions: tuple[Any, str]) -> Iterator[dict[str, float]]:
    """Seconds spent in some functions, each given by the class or module that has it and its name."""
    spent = {name: 0.0 for _, name in functions}

    def watched(name: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return timed

    with ExitStack() as stack:
        for owner, name in functions:
            stack.enter_context(patch.object(owner, name, watched(name, getattr(owner, name))))
        yield spent


def beside(seconds: float, floor: float) -> dict[str, float]:
    return {"seconds": seconds, "floor": floor, "ratio": seconds / floor}


def closed_form(pair: Pair, texts: PairTexts) -> dict[str, Any]:
    """The fit beside one forward and backward pass per model over the same tokens."""

    def passes(read) -> None:
        for i in range(0, len(read), BATCH):
            batch = collate_pairs(read[i : i + BATCH])
            for side, model, ids in sides:
                start = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_(True))
                inputs = batch[f"{side}_input_ids"].to(model.device)
                labels = (inputs % len(ids)).masked_fill(batch[f"{side}_attention_mask"].to(model.device) == 0, -100)
                mask = batch[f"{side}_attention_mask"].to(model.device)
                with torch.enable_grad():
                    loss = next_token_loss(
                        model(input_ids=inputs, attention_mask=mask, use_cache=False).logits, labels
                    )
                    loss.backward()
                start.remove()

    def fit(read) -> Any:
        return fit_closed_form(
            pair.source, pair.target, read, pair.vocabulary, pair.kernels, pair.modules, batch_size=BATCH, hidden=False
        )

    ids = pair.vocabulary.source_ids, pair.vocabulary.target_ids
    sides = ("source", pair.source, ids[0]), ("target", pair.target, ids[1])
    few = texts.fit[: 2 * BATCH]  # warm up
    found: list[dict[str, float]] = []

    def whole() -> None:
        with clocked((fitting, "_pass"), (Moments, "update"), (Moments, "solve")) as spent:
            fit(texts.fit)
        found.append(spent)

    def floor(read=texts.fit) -> None:
        with shared_head(pair.source, ids[0]), shared_head(pair.target, ids[1]):
            passes(read)

    with pair.adapted.disable_adapter():
        fit(few)
        floor(few)
        seconds = by_turns({"fit": whole, "floor": floor}, 2, warm_up=False)
    spent = min(found, key=lambda run: sum(run.values()))
    parts = {"passes": spent["_pass"], "moments": spent["update"], "solving": spent["solve"]}
    return beside(seconds["fit"], seconds["floor"]) | parts


def step(pair: Pair, model: PeftModel, texts: PairTexts) -> dict[str, float]:
    """A refinement step (predictions kept) beside the untouched target's forward and backward pass over the same
    batch.
    """
    teacher = Teacher(pair.adapted, Training())
    chunk, anchors = texts.train[:BATCH], texts.anchors[: BATCH // ANCHOR_EVERY]
    batch = collate_pairs(chunk, anchors)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    ids = pair.vocabulary
    base = model.get_base_model()

    def whole() -> None:
        goal = teacher.remembered(model, chunk, anchors)
        with training_precision(model):
            logits, _ = teacher.student(model, model, batch)
        goal.kl_divergence(logits).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def floor() -> None:
        rows = torch.cat([batch["rows"], batch["anchor_rows"]]).to(base.device)
        positions = torch.cat([batch["target_positions"], batch["anchor_positions"]]).to(base.device)
        inputs = {name: batch[f"target_{name}"].to(base.device) for name in ("input_ids", "attention_mask")}
        start = base.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
        with model.disable_adapter(), logits_at(base, rows, positions):
            base(**inputs, use_cache=False).logits.sum().backward()
        start.remove()

    with shared_head(pair.source, ids.source_ids), shared_head(pair.target, ids.target_ids):
        seconds = by_turns({"step": whole, "floor": floor}, 10)
    return beside(seconds["step"], seconds["floor"])


def adapters(bridge: peft_cast.Bridge, folder: Path) -> dict[str, Any]:
    """Forward passes, loading and saving beside PEFT's LoRA of the same rank; files; a bridge's cast beside
    reading.
    """
    report: dict[str, Any] = {}
    seconds = by_turns(
        {
            "cast": lambda: bridge.cast_file(LORA, folder / "cast", dtype=torch.float32),
            "reading": lambda: load_file(LORA / "adapter_model.safetensors"),
        },
        3,
    )
    report["cast over a bridge"] = beside(seconds["cast"], seconds["reading"])
    base = AutoModelForCausalLM.from_pretrained(TARGET.folder(), dtype=default_dtype(torch.device("cpu")))
    folded = peft_cast.to_lora(folder / "cast")
    folded.save_pretrained(folder / "lora")
    names = list(folded.config.target_modules)
    plain = LoraConfig(r=folded.config.r, target_modules=names, task_type="CAUSAL_LM")
    models = {
        "cast": PeftModel.from_pretrained(copy.deepcopy(base), folder / "cast"),
        "folded": PeftModel.from_pretrained(copy.deepcopy(base), folder / "lora"),
        "lora": get_peft_model(copy.deepcopy(base), plain),
    }
    for model in models.values():
        model.eval().requires_grad_(False)
    for what, shape, times in (("decoding", (1, 1), 100), ("prefill", (4, 128), 20)):
        ids = torch.ones(shape, dtype=torch.long)
        with torch.no_grad():
            seconds = by_turns({name: partial(decoder_pass, model, ids) for name, model in models.items()}, times)
        for name in ("cast", "folded"):
            report[f"{what}, {name}"] = beside(seconds[name], seconds["lora"])
    verbs = {
        "load": lambda name: PeftModel.from_pretrained(base, folder / name).unload(),
        "save": lambda name: models[name].save_pretrained(folder / f"{name} again"),
    }
    for verb, work in verbs.items():
        seconds = by_turns({name: partial(work, name) for name in ("cast", "lora")}, 20)
        report[verb] = beside(seconds["cast"], seconds["lora"])
    source = (LORA / "adapter_model.safetensors").stat().st_size
    bridge.cast_file(LORA, folder / "cast_bfloat16")  # as the source LoRA
    folded = peft_cast.to_lora(folder / "cast", dtype=torch.bfloat16)
    folded.save_pretrained(folder / "lora_bfloat16")
    names = "cast", "lora", "cast_bfloat16", "lora_bfloat16"
    sizes = {n: (folder / n / "adapter_model.safetensors").stat().st_size for n in names}
    report["files"] = {"source_lora": source, **sizes}
    return report


def decoder_pass(model: PeftModel, ids: torch.Tensor) -> None:
    model.get_base_model().model(input_ids=ids, use_cache=False)


if __name__ == "__main__":
    main()
