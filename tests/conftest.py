"""Tiny random models and tokenizers of several architectures; no network, no downloads."""

import os

from hub_server import HUB


os.environ["HF_ENDPOINT"] = HUB.url  # where the `hub` fixture goes online; everywhere else it is offline
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # on the CPU, also where there is a GPU: inputs are made there

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D


ROOT = Path(__file__).parent.parent
LONGEST = ("test_real_pair.py", "test_distributed.py")  # they begin, so that no worker waits for them in the end
sys.path.insert(0, str(ROOT / "examples"))
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Configuration class and options of each architecture.
ARCHITECTURES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "mixtral": ("MixtralConfig", EXPERTS),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]},
    ),
    "gemma2": ("Gemma2Config", {}),
    "gemma3": ("Gemma3TextConfig", {}),
    "phi3": ("Phi3Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True}),
    "falcon_mq": ("FalconConfig", {"multi_query": True}),
    "falcon_rw": (
        "FalconConfig",
        {"num_kv_heads": None, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    "gpt_oss": ("GptOssConfig", {**EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "bloom": ("BloomConfig", {}),
}
# Names that sizes have in other configurations; `None` where there is no such size.
NO_GROUPS = {"num_key_value_heads": None, "head_dim": None}
N_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
RENAMED = {
    "GPTNeoXConfig": NO_GROUPS,
    "GPT2Config": {**NO_GROUPS, **N_NAMES, "intermediate_size": "n_inner", "max_position_embeddings": "n_positions"},
    "OPTConfig": {**NO_GROUPS, "intermediate_size": None},
    "FalconConfig": {"num_key_value_heads": "num_kv_heads", "head_dim": None, "intermediate_size": "ffn_hidden_size"},
    "BloomConfig": {
        **NO_GROUPS,
        **N_NAMES,
        "hidden_size": "hidden_size",
        "intermediate_size": None,
        "max_position_embeddings": None,
    },
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


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
    kind, options = ARCHITECTURES[architecture]
    renamed = {RENAMED[kind].get(name, name): value for name, value in common.items()} if kind in RENAMED else common
    renamed.pop(None, None)
    return getattr(transformers, kind)(**{**renamed, **options})


def tiny_model(architecture: str = "llama", vocab_size: int = 300, seed: int = 0, **sizes):
    """A random model whose layers matter: PyTorch's initial weights are too small for a few layers to be felt."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, vocab_size, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                reads = -2 if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else -1
                parameter.normal_(std=parameter.shape[reads] ** -0.5)
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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub on loopback and a client that is online, logged in as "user", with a cache of its own."""
    HUB.reset()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    return HUB


@pytest.fixture(autouse=True)
def float32_everywhere(monkeypatch):
    # Tests compare to many digits; a machine that is fast at bfloat16 would load models in it.
    monkeypatch.setattr("peft_cast.models.loading.default_dtype", lambda device: torch.float32)


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    # Tiny matrices lose more to a second thread's hand-over than they gain.
    torch.set_num_threads(1)


def keep_in(kept: dict[str, list[str]]):
    """A `Keep` that remembers in a dictionary what was written."""

    def keep(key, make):
        if key not in kept:
            kept[key] = make()
        return kept[key]

    return keep


@pytest.fixture(autouse=True, scope="session")
def imported_is_no_garbage():
    # A training ends with a search for garbage, which took a fifth of a tiny translation's time to find none among the
    # half million objects of what is imported.
    gc.collect()
    gc.freeze()
