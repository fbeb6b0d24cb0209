"""Let mlx-lm answer with a folded adapter and compare, token by token, with transformers.

    .venv/bin/python benchmarks/serve_prepare.py tiny /tmp/served   # or `real`; writes the cases
    python -m venv /tmp/mlx && /tmp/mlx/bin/pip install 'mlx[cpu]' mlx-lm
    /tmp/mlx/bin/python benchmarks/serve_mlx.py /tmp/served

mlx's build for Linux computes on the CPU; models and loaders are those that a Mac has. Greedy, float32 on both sides.
Writes docs/figures/serve_mlx.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


HERE = Path(__file__).parent


def answers(target: str, adapter: Path | None, prompts: list[list[int]], expected: list[list[int]]) -> list[list[int]]:
    """Greedy answers as token ids, each as long as the expected one."""
    model, _ = load_model(Path(target))
    model.set_dtype(mx.float32)
    if adapter is not None:
        load_adapters(model, str(adapter))  # refuses tensors of other names or shapes
        model.eval()
    written = []
    for prompt, other in zip(prompts, expected):
        cache, tokens, read = make_prompt_cache(model), [], prompt
        while len(tokens) < len(other):
            tokens.append(int(mx.argmax(model(mx.array([read]), cache=cache)[0, -1])))
            read = tokens[-1:]
        written.append(tokens)
    return written


def compare(served: list[list[int]], expected: list[list[int]]) -> dict[str, int]:
    """Answers that are equal, and tokens before the first difference."""
    pairs = list(zip(served, expected))
    alike = [next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), len(pair[0])) for pair in pairs]
    return {
        "answers_equal": sum(one == other for one, other in pairs),
        "tokens_equal_before_first_difference": sum(alike),
        "tokens": sum(map(len, expected)),
    }


def serve(case: Path) -> dict:
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    given, base = expected["prompts"], expected["base"]
    plain = answers(base, None, given, expected["answers"]["base"])
    served = answers(base, case / "mlx", given, expected["answers"]["cast"])
    return {
        "kind": expected["kind"],
        "folded": expected["folded"],
        "prompts": len(given),
        "new_tokens": expected["new_tokens"],
        "without_the_adapter": compare(plain, expected["answers"]["base"]),
        "with_the_adapter": compare(served, expected["answers"]["cast"]),
        "answers_equal_to_the_plain_model": sum(a == b for a, b in zip(served, plain)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="one case")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    report = HERE.parent / "docs" / "figures" / "serve_mlx.json"
    known = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {"cases": {}}
    for case in sorted(folder.parent for folder in args.folder.glob("*/mlx")):
        if args.only in (None, case.name):
            known["cases"][case.name] = serve(case)
            print(case.name, json.dumps(known["cases"][case.name]), flush=True)
    known["environment"] = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in ("mlx", "mlx-lm", "transformers")},
    }
    report.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
