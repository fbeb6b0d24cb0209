"""Let llama.cpp answer with a folded adapter in GGUF and compare, token by token, with transformers.

    .venv/bin/python benchmarks/serve_prepare.py tiny /tmp/served   # or `real`; writes the cases
    python -m venv /tmp/llama && /tmp/llama/bin/pip install xllamacpp torch transformers sentencepiece protobuf
    /tmp/llama/bin/python benchmarks/serve_llamacpp.py /tmp/served --sources llama.cpp

xllamacpp is llama.cpp as a wheel, llama-server among it. `--sources` is a folder with llama.cpp's sources, for its
converters: one makes of each target a GGUF model in float32, which answers without and with `lora.gguf`; the other
converts the LoRA that PEFT loads, and its tensors are compared with those of `lora.gguf`. The cache is float32 and
flash attention off, so that nothing but the order of additions differs from transformers. With `--model FILE` another
GGUF of the target, such as a quantized one, answers instead. Writes docs/figures/serve_llamacpp.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import xllamacpp


HERE = Path(__file__).parent


def convert(target: Path, file: Path) -> None:
    """A float32 GGUF of a model folder, by llama.cpp's converter."""
    import conversion
    import convert_hf_to_gguf

    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    # The converter knows tokenizers by what they make of a text. Not these: one is not the model's own, the others
    # were made from GGUF files. The vocabulary is right, and prompts are token ids.
    conversion.get_model_class(config["architectures"][0]).set_vocab = lambda model: model._set_vocab_gpt2()
    conversion.TextModel.get_vocab_base_pre = lambda model, tokenizer: "gpt-2"
    sys.argv = ["convert", str(target), "--outtype", "f32", "--outfile", str(file)]
    convert_hf_to_gguf.main()


def answers(file: Path, lora: Path | None, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers as token ids."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 1024, 1, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(os.environ.get("OMP_NUM_THREADS", 2))
    params.no_extra_bufts = True
    params.use_jinja = False
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)  # llama-server, with its own HTTP interface
    written = []
    for prompt in prompts:
        ask = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "return_tokens": True}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps({**ask, "cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            written.append(json.load(answer)["tokens"])
    return written


def compare(served: list[list[int]], expected: list[list[int]]) -> dict[str, int]:
    """Answers that are equal, and tokens before the first difference. llama.cpp leaves the token out that ends one."""
    pairs = [(one, other[: len(one)] if len(other) == len(one) + 1 else other) for one, other in zip(served, expected)]
    alike = [
        next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(map(len, (one, other))))
        for one, other in pairs
    ]
    return {
        "answers_equal": sum(one == other for one, other in pairs),
        "tokens_equal_before_first_difference": sum(alike),
        "tokens": sum(len(other) for _, other in pairs),
    }


def same_tensors(case: Path, sources: Path, base: str) -> bool | str:
    """Whether llama.cpp's own converter writes the same tensors, bit for bit; what it says where it cannot."""
    import gguf

    other = case / "converted.gguf"
    script = sources / "convert_lora_to_gguf.py"
    command = [sys.executable, str(script), str(case / "lora"), "--base", base, "--outfile", str(other)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    ours, theirs = (
        {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(file).tensors}
        for file in (case / "lora.gguf", other)
    )
    return ours == theirs


def serve(case: Path, model: Path | None, sources: Path) -> dict:
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    file = model or case / "base.gguf"
    if not file.exists():
        convert(Path(expected["base"]), file)
    prompts, count = expected["prompts"], expected["new_tokens"]
    plain = answers(file, None, prompts, count)
    began = time.perf_counter()
    served = answers(file, case / "lora.gguf", prompts, count)
    return {
        "kind": expected["kind"],
        "folded": expected["folded"],
        "model": "float32" if model is None else model.name,
        "prompts": len(prompts),
        "new_tokens": count,
        "same_tensors_as_llama.cpp_converts": same_tensors(case, sources, expected["base"]),
        "without_the_adapter": compare(plain, expected["answers"]["base"]),
        "with_the_adapter": compare(served, expected["answers"]["cast"]),
        "answers_equal_to_the_plain_model": sum(a == b for a, b in zip(served, plain)),
        "seconds": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sources", type=Path, required=True, help="folder of llama.cpp's sources")
    parser.add_argument("--model", type=Path, help="another GGUF file of the target")
    parser.add_argument("--only", help="one case")
    args = parser.parse_args()
    sys.path[:0] = [str(args.sources), str(args.sources / "gguf-py")]
    report = HERE.parent / "docs" / "figures" / "serve_llamacpp.json"
    known = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {"cases": {}}
    for case in sorted(file.parent for file in args.folder.glob("*/lora.gguf")):
        if args.only in (None, case.name):
            name = case.name if args.model is None else f"{case.name} on {args.model.name}"
            known["cases"][name] = serve(case, args.model, args.sources)
            print(name, json.dumps(known["cases"][name]), flush=True)
    known["environment"] = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "sources": args.sources.resolve().parent.name if args.sources.name == "llama.cpp" else args.sources.name,
        **{name: version(name) for name in ("xllamacpp", "torch", "transformers")},
    }
    report.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
