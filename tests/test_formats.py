"""A folded LoRA as other programs read it, GGUF and MLX, taken apart again; benchmarks/serve_*.py run the programs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from adapters import base_model
from conftest import ROOT, save_model, tiny_model
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from test_cli import call
from test_sharing import CAST_FILES, logits, made
from test_tuner import random_cast
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_cast import TranslationResult, push, to_lora
from peft_cast.results.gguf_file import ARCHITECTURES
from peft_cast.results.mlx_folder import MODEL_TYPES


def folded_of(architecture: str, leave: tuple[str, ...] = ("lm_head",), **options):
    """A random CAST adapter on all linear modules of a tiny model, folded, and the weight changes by module."""
    model = tiny_model(architecture, **options.pop("sizes", {}))
    linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and not n.endswith(leave)}
    folded = to_lora(random_cast(model, target_modules=sorted(linear)), **options)
    start, end = "base_model.model.", ".lora_A.weight"
    names = [key[len(start) : -len(end)] for key in folded.weights if key.endswith(end)]
    assert set(names) == linear
    A, B = ({n: folded.weights[f"{start}{n}.lora_{x}.weight"].float() for n in names} for x in "AB")
    return folded, {name: B[name] @ A[name] for name in names}


def read(file):
    """Metadata, and by name the tensors of a GGUF file as float32."""
    reader = gguf.GGUFReader(file)
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors, reader


def rotated_side_by_side(heads: int, width: int) -> list[int]:
    """Which row of transformers' q or k projection is llama.cpp's n-th."""
    return [
        head * width + half * width // 2 + pair
        for head in range(heads)
        for pair in range(width // 2)
        for half in (0, 1)
    ]


@pytest.mark.parametrize(
    ("architecture", "known_as", "q"),
    [
        ("llama", "llama", "attn_q"),
        ("mistral", "llama", "attn_q"),
        ("qwen2", "qwen2", "attn_q"),
        ("gemma3", "gemma3", "attn_q"),
        ("phi3", "phi3", "attn_qkv"),
        ("gpt2", "gpt2", "attn_qkv"),
    ],
)
def test_gguf_holds_the_same_changes_in_llamacpps_order(architecture, known_as, q, tmp_path):
    folded, deltas = folded_of(architecture)
    folded.save_gguf(tmp_path / "lora.gguf")
    about, tensors, _ = read(tmp_path / "lora.gguf")
    assert about["general.type"] == "adapter" and about["adapter.type"] == "lora"
    assert about["general.architecture"] == known_as
    assert {name.rpartition(".")[0].split(".", 2)[2] for name in tensors} >= {f"{q}.weight", "ffn_down.weight"}
    changes = {}
    for name in (name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")):
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        changes[name] = about["adapter.lora.alpha"] / B.shape[1] * B @ A  # as llama.cpp scales it
    assert len(changes) == len(deltas) == len(tensors) / 2
    permuted = {"attn_q": rotated_side_by_side(4, 8), "attn_k": rotated_side_by_side(2, 8)}
    for (module, delta), (name, change) in zip(deltas.items(), changes.items()):
        assert module.split(".layers." if ".layers." in module else ".h.")[1][0] == name.split(".")[1]
        rows = permuted.get(name.split(".")[2]) if known_as == "llama" else None
        torch.testing.assert_close(change, delta if rows is None else delta[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gguf_has_the_precision_that_was_folded_with(dtype, tmp_path):
    folded, deltas = folded_of("llama", dtype=dtype)
    folded.save_gguf(tmp_path / "lora.gguf")
    _, tensors, reader = read(tmp_path / "lora.gguf")
    assert {t.tensor_type.name for t in reader.tensors} == {"F16" if dtype == torch.float16 else "BF16"}
    name = "blk.1.ffn_up.weight.lora_"
    torch.testing.assert_close(tensors[f"{name}b"] @ tensors[f"{name}a"], deltas["model.layers.1.mlp.up_proj"])


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    folded, _ = folded_of("llama")
    folded.weights["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] *= 1e6
    half = {name: weight.half() for name, weight in folded.weights.items()}
    folded.weights.update(half)
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj cannot be written as float16: fold with `dtype`"):
        folded.save_gguf(tmp_path / "lora.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "leave", "message"),
    [
        (
            "falcon",
            ("lm_head",),
            "A LoRA of a 'falcon' model is not written as GGUF, only of gemma, .*: write a LoRA fol",
        ),
        (
            "qwen3_moe",
            ("lm_head",),
            "llama.cpp has no tensor for model.layers.0.mlp.gate_proj, .* of a 'qwen3_moe' model",
        ),
        (
            "gemma3",
            ("_proj",),
            "llama.cpp has no tensor for lm_head of a 'gemma3_text' model",
        ),  # tied to the embeddings
    ],
)
def test_what_llamacpp_has_no_place_for_is_refused_by_name(architecture, leave, message, tmp_path):
    folded, _ = folded_of(architecture, leave)
    with pytest.raises(ValueError, match=message):
        folded.save_gguf(tmp_path / "lora.gguf")
    assert not list(tmp_path.iterdir())


def test_a_head_of_its_own_is_written(tmp_path):
    folded, deltas = folded_of("llama", ("_proj",))
    folded.save_gguf(tmp_path / "lora.gguf")
    tensors = read(tmp_path / "lora.gguf")[1]
    torch.testing.assert_close(tensors["output.weight.lora_b"] @ tensors["output.weight.lora_a"], deltas["lm_head"])


def test_gguf_files_are_whole_and_take_nobody_elses_place(tmp_path, monkeypatch):
    folded, _ = folded_of("llama")
    file = tmp_path / "lora.gguf"
    folded.save_gguf(file)
    folded.save_gguf(file)  # its own kind may be replaced
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(
            gguf.GGUFWriter, "write_tensors_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no"))
        )
        with pytest.raises(OSError, match="lora.gguf' cannot be written .*: write to another folder"):
            folded.save_gguf(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    (tmp_path / "model.gguf").write_bytes(b"GGUF a model")
    for place, message in (
        (tmp_path / "model.gguf", "holds something else than a GGUF LoRA"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            folded.save_gguf(place)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-cast\[gguf\]'"):
        folded.save_gguf(tmp_path / "other.gguf")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
def test_mlx_holds_the_same_changes_transposed(architecture, tmp_path):
    folded, deltas = folded_of(architecture)
    folded.save_mlx(tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    parameters = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora" and config["num_layers"] == 3
    assert parameters["rank"] == folded.config.r and parameters["scale"] == 1 and parameters["dropout"] == 0
    assert set(parameters["keys"]) == {name.split(".layers.")[1][2:] for name in deltas}
    tensors = load_file(tmp_path / "adapters.safetensors")
    assert len(tensors) == 2 * len(deltas)
    for name, delta in deltas.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape == (delta.shape[1], folded.config.r) and b.shape == (folded.config.r, delta.shape[0])
        torch.testing.assert_close((a @ b).T, delta)


def test_what_mlx_has_no_place_for_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="A LoRA of a 'gpt2' model is not written for MLX, only of gemma, "):
        folded_of("gpt2")[0].save_mlx(tmp_path)
    with pytest.raises(ValueError, match="mlx-lm has no module 'lm_head' of a model with tied embeddings"):
        folded_of("gemma3", ("_proj",))[0].save_mlx(tmp_path)
    folded, _ = folded_of("llama")
    folded.save_pretrained(tmp_path / "lora")
    folded.save_mlx(tmp_path / "mlx")
    folded.save_mlx(tmp_path / "mlx")
    with pytest.raises(ValueError, match="holds an adapter of type LORA, which would be overwritten"):
        folded.save_mlx(tmp_path / "lora")
    with pytest.raises(ValueError, match="holds an adapter of type MLX, which would be overwritten"):
        folded.save_pretrained(tmp_path / "mlx")


def test_the_command_line_writes_each_format(tmp_path, byte_tokenizer):
    base = save_model(tiny_model(), byte_tokenizer, tmp_path / "base")
    model = random_cast(tiny_model())
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "cast")
    words = ["to-lora", tmp_path / "cast", "-o"]
    call(*words, tmp_path / "lora.gguf", "--format", "gguf", "--dtype", "float16")
    assert {t.tensor_type.name for t in read(tmp_path / "lora.gguf")[2].tensors} == {"F16"}
    account = json.loads(call(*words, tmp_path / "mlx", "--format", "mlx", "--rank", 8, "--json").stdout)
    assert account["format"] == "mlx" and account["rank"] == 8
    assert (tmp_path / "mlx" / "adapters.safetensors").exists()
    refused = call(*words, tmp_path / "x", "--format", "gguff", code=1)
    assert (
        "There is no format 'gguff' of a LoRA: did you mean 'gguf'?" in refused.output
        and not (tmp_path / "x").exists()
    )


@pytest.mark.parametrize(("program", "kinds"), [("llamacpp", ARCHITECTURES), ("mlx", MODEL_TYPES)])
def test_every_architecture_was_run_and_answered_alike(program, kinds):
    cases = json.loads((ROOT / "docs" / "figures" / f"serve_{program}.json").read_text(encoding="utf-8"))["cases"]
    for kind in kinds:
        run = cases[kind]
        assert run["kind"] == kind
        # GPT-2's factors are swapped by llama.cpp's converter, and refused by llama.cpp (docs/serving.md).
        assert run.get("same_tensors_as_llama.cpp_converts", True) == (kind != "gpt2"), kind
        for which in ("without_the_adapter", "with_the_adapter"):
            assert run[which]["answers_equal"] == run["prompts"], kind
            assert run[which]["tokens_equal_before_first_difference"] == run[which]["tokens"], kind
        assert run["answers_equal_to_the_plain_model"] == 0, kind


# One folder for everybody


@pytest.fixture
def published(hub, tmp_path, byte_tokenizer, monkeypatch):
    """Target and adapter, with its LoRA in all formats, on the hub; the card's text."""
    save_model(base_model(), byte_tokenizer, tmp_path / "target")
    HfApi().create_repo("user/target")
    HfApi().upload_folder(repo_id="user/target", folder_path=tmp_path / "target")
    result = made(base_model_name_or_path="user/target")
    result.push_to_hub("user/cast", formats="mlx,peft,gguf")
    monkeypatch.chdir(tmp_path)
    return result, hub.repos["user/cast"].files()["README.md"].decode()


def snippets(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def run_bash(lines: str) -> None:
    """The commands of a snippet: `peft-cast` in this process, `hf` in its own; others are not installed here."""
    for line in lines.strip().splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "peft-cast":
            call(*words)
        elif program == "hf":
            command = [str(Path(sys.executable).parent / program), *words]
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "0"})
        else:
            assert program in ("vllm", "llama-cli", "mlx_lm.generate")


def test_the_cards_snippets_run_as_they_are(published, tmp_path):
    result, card = published
    with_cast, alone = snippets(card, "python")
    assert "import peft_cast" in with_cast and "peft_cast" not in alone and "KeyError: 'CAST'" in card
    for snippet in (with_cast, alone):
        names = {}
        exec(snippet, names)
        torch.testing.assert_close(logits(names["model"]), logits(result.model), rtol=1e-4, atol=1e-5)
    assert names["model"].active_peft_config.peft_type == "LORA"
    for snippet in snippets(card, "bash"):
        run_bash(snippet)
    used = set(re.findall(r"my-adapter/[\w./]+", card))
    assert used == {"my-adapter/lora", "my-adapter/lora.gguf", "my-adapter/mlx"}
    assert all((tmp_path / name).exists() for name in used)
    assert "--max-lora-rank 8 " in card and "ADAPTER ./my-adapter/lora.gguf" in "".join(snippets(card, "text"))


def test_without_a_lora_beside_it_the_card_says_how_to_make_one(published, tmp_path):
    result, _ = published
    result.push_to_hub("user/bare")
    (made_with,) = snippets(ModelCard.load("user/bare").content, "bash")
    run_bash(made_with)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base_model(), "my-lora")), logits(result.model), rtol=1e-4, atol=1e-5
    )
    assert Path("my-lora.gguf").is_file() and Path("my-lora-mlx").is_dir()


def test_only_what_was_folded_from_this_adapter_is_published_beside_it(hub, tmp_path):
    folder = tmp_path / "cast"
    made().save_pretrained(folder, formats=("peft", "gguf"))
    assert "subfolder=" in (folder / "README.md").read_text()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "plot.png").write_text("x")
    push(folder, "user/cast")
    beside = {"lora/adapter_config.json", "lora/adapter_model.safetensors", "lora/cast_metrics.json", "lora.gguf"}
    assert set(hub.repos["user/cast"].files()) == CAST_FILES | beside
    made(seed=8).save_pretrained(folder)  # another adapter, beside which the old LoRA lies now
    assert "subfolder=" not in (folder / "README.md").read_text()
    hub.requests.clear()
    with pytest.raises(ValueError, match="'lora' in .* was not folded from the adapter as it is now: delete it,"):
        push(folder, "user/cast")
    assert not hub.requests
    with pytest.raises(ValueError, match="There is no format 'ggml' of a LoRA: choose from peft, gguf, mlx"):
        made().save_pretrained(folder, formats="ggml")


def test_what_folds_into_no_lora_of_the_format_leaves_the_folder_as_it_was(tmp_path):
    model = random_cast(tiny_model("falcon"), target_modules=["dense"])
    with pytest.raises(ValueError, match="A LoRA of a 'falcon' model is not written as GGUF"):
        TranslationResult(model, {}, [], None).save_pretrained(tmp_path / "cast", formats="gguf")
    assert not (tmp_path / "cast").exists()
    made(adapter_name="lora").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lora' holds an adapter of type CAST, which would be overwritten"):
        made().save_pretrained(tmp_path, formats="peft")
