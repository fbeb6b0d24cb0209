"""Tiny random models and tokenizers of several architectures; no network, no downloads."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def c4_texts(count: int) -> list[str]:
    with open(ROOT / "examples" / "data" / "c4_en_400.jsonl", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(count), lines)]


def tiny_config(architecture: str, vocab_size: int, **sizes):
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **sizes,
    }
    if architecture == "opt":
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            common.pop(name)
        return transformers.OPTConfig(ffn_dim=48, word_embed_proj_dim=common["hidden_size"], **common)
    classes = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma2": transformers.Gemma2Config,
        "gemma3": transformers.Gemma3TextConfig,
    }
    return classes[architecture](**common)


def tiny_model(architecture: str = "llama", vocab_size: int = 300, seed: int = 0, **sizes):
    """A random model whose layers matter: PyTorch's initial weights are too small for a few layers to be felt."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, vocab_size, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def byte_level_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(c4_texts(20), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


def sentencepiece_tokenizer(vocab_size: int = 420) -> PreTrainedTokenizerFast:
    """Gemma's kind: spaces marked, byte fallback, BOS in front."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = marks = pre_tokenizers.Metaspace(prepend_scheme="never")
    names = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 256, special_tokens=names, show_progress=False)
    trained.train_from_iterator(c4_texts(20), trainer)
    model = json.loads(trained.to_str())["model"]
    # Byte pieces are ordinary entries of the vocabulary; the trainer could only add them as special tokens.
    vocab = {**model["vocab"], **{f"<0x{b:02X}>": len(model["vocab"]) + b for b in range(256)}}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.add_special_tokens(names)
    tokenizer.pre_tokenizer = marks
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )


def make_lora(model, folder, target_modules=None, r: int = 4, seed: int = 1, size: float = 1.0, **options) -> str:
    """Save a random LoRA with a clear effect for `model`, which is left as it was."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=target_modules or ALL_LINEAR, task_type="CAUSAL_LM", **options
    )
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=size * (0.3 if "lora_B" in name else 1) * parameter.shape[1] ** -0.5)
    peft_model.save_pretrained(folder)
    peft_model.unload().requires_grad_(True)
    return str(folder)


def save_model(model, tokenizer, folder) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def byte_tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def piece_tokenizer():
    return sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory, byte_tokenizer):
    return save_model(
        tiny_model("llama", len(byte_tokenizer)), byte_tokenizer, tmp_path_factory.mktemp("models") / "tiny-llama"
    )


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory, piece_tokenizer):
    model = tiny_model("gemma3", len(piece_tokenizer), seed=5, hidden_size=40, num_hidden_layers=2, head_dim=16)
    return save_model(model, piece_tokenizer, tmp_path_factory.mktemp("models") / "tiny-gemma3")


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory, source_folder):
    model = AutoModelForCausalLM.from_pretrained(source_folder)
    return make_lora(model, tmp_path_factory.mktemp("adapters") / "tiny-lora")


@pytest.fixture(autouse=True)
def float32_everywhere(monkeypatch):
    # Tests compare to many digits; a machine that is fast at bfloat16 would load models in it.
    monkeypatch.setattr("peft_cast.models.default_dtype", lambda device: torch.float32)


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Tiny matrices lose more to a second thread's hand-over than they gain.
    torch.set_num_threads(1)
