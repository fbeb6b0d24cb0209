"""What a bridge costs and is worth on the real pair: seconds to fit it and to carry an adapter over, sizes of the
files.

    .venv/bin/python benchmarks/bridge.py

Writes docs/figures/bridge.json. The bridge itself is kept in bench-output/bridge.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import experiments
import setting

import peft_cast
from peft_cast.utils.environment import environment
from peft_cast.utils.phases import Phases


def megabytes(path: Path) -> float:
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 2**20


def main() -> None:
    source, target = setting.PAIRS["smollm2-gemma3"]
    adapter, general = source.adapter("gsm8k"), setting.c4_documents()[0]
    folder, phases = setting.OUTPUT / "bridge", Phases()
    with phases.measure("fit"):
        bridge = peft_cast.fit_bridge(source.folder(), target.folder(), text=general, samples=64)
    bridge.save_pretrained(folder)
    with phases.measure("load"):
        bridge = peft_cast.Bridge.from_pretrained(str(folder))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        bridge.cast_file(adapter, setting.OUTPUT / "bridge-cast")
        seconds.append(time.perf_counter() - began)
    own = peft_cast.translate(
        source.folder(), adapter, target.folder(), text=general, fit_text=general, fit_samples=64, steps=0
    )
    own.save_pretrained(setting.OUTPUT / "own-closed-form")
    peft_cast.to_lora(setting.OUTPUT / "bridge-cast").save_pretrained(setting.OUTPUT / "bridge-lora")
    found = peft_cast.evaluate(
        target.folder(),
        {"bridge": setting.OUTPUT / "bridge-cast", "own closed form": setting.OUTPUT / "own-closed-form"},
        [experiments.TASK],
    )
    names = {
        "source LoRA": adapter,
        "CAST adapter": setting.OUTPUT / "bridge-cast",
        "folded": setting.OUTPUT / "bridge-lora",
    }
    report = {
        "phases": phases.costs,
        "cast_file_seconds": seconds,
        "megabytes": {name: megabytes(path) for name, path in {**names, "bridge": folder}.items()},
        "bytes_per_number": {"source LoRA": 2, "CAST adapter": 4, "folded": 4, "bridge": 2},
        "nats_per_character": {
            name: found.row(name, experiments.TASK.name).scores[0] for name in ("base", "bridge", "own closed form")
        },
        "positions": bridge.metrics["positions"],
        "environment": environment(),
    }
    (setting.FIGURES / "bridge.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
