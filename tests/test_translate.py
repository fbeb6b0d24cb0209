"""The whole way on tiny models: from two models and a LoRA to a saved adapter."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import c4_texts, make_lora, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast import CastLayer, Mixture, SelfWritten
from peft_cast.evaluation.drift import drift
from peft_cast.options import Fit, Training
from peft_cast.results.diagnosis import diagnose
from peft_cast.source.pair import open_pair
from peft_cast.text.reading import read_texts
from peft_cast.text.samples import TextSample
from peft_cast.utils import change_dtype
from peft_cast.utils.distributed import resolve_device, training_device


TEXTS = c4_texts(80)
FAST = {
    "text": TEXTS,
    "fit_samples": 24,
    "eval_samples": 8,
    "batch_size": 8,
    "max_length": 96,
    "learning_rate": 0.1,
    "beta": 0.1,
    "progress": False,
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def snapshot(model):
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "types": [type(m) for m in model.modules()],
        "head": model.get_output_embeddings(),
        "attributes": set(vars(model)),
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
    }


def test_saved_in_half_precision(source_folder, lora_folder, target_folder, tmp_path):
    result = peft_cast.translate(source_folder, lora_folder, target_folder, steps=0, **FAST)
    result.save_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    loaded = PeftModel.from_pretrained(load(target_folder), tmp_path)
    ids = torch.arange(3, 24).reshape(3, 7)
    torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("asked", "saved"), [(None, torch.bfloat16), (torch.float32, torch.float32)])
def test_saved_as_the_lora_or_as_asked(asked, saved, source_folder, lora_folder, target_folder, tmp_path):
    half = shutil.copytree(lora_folder, tmp_path / "half")
    change_dtype(half / "adapter_model.safetensors", torch.bfloat16)
    models, out = (source_folder, half, target_folder), tmp_path / "out"
    result = peft_cast.translate(*models, steps=0, output_dir=out, save_dtype=asked, **FAST)
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {saved}
    # In memory nothing is rounded, for further training.
    assert any(p.dtype == torch.float32 for n, p in result.model.named_parameters() if "peft_cast_kernels" in n)


def test_a_device_that_is_not_there_or_that_trainer_would_not_take_is_refused(monkeypatch):
    for device, message in (("gpu", "another device of PyTorch"), ("meta", "finds no accelerator here")):
        with pytest.raises(ValueError, match=message):
            resolve_device(device)
    with monkeypatch.context() as patch:  # what PyTorch says on a machine with two GPUs
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        patch.setattr(torch.accelerator, "device_count", lambda: 2)
        assert training_device(None) == training_device("cuda") == torch.device("cuda")
        assert training_device("cuda:0").index == 0 and resolve_device("cuda:1").index == 1
        with pytest.raises(ValueError, match="finds 2 of type 'cuda' here"):
            resolve_device("cuda:2")
        with pytest.raises(ValueError, match="'cuda:1', but Trainer works on the first .*CUDA_VISIBLE_DEVICES"):
            peft_cast.translate("a", "b", "c", device="cuda:1")
        with pytest.raises(ValueError, match="'cuda:1', but Trainer works on the first"):
            peft_cast.baselines.distill_lora("a", "b", "c", device="cuda:1")


def assert_untouched(model, before):
    after = snapshot(model)
    weights, old = after.pop("weights"), before["weights"]
    assert weights.keys() == old.keys() and all(torch.equal(weights[name], old[name]) for name in weights)
    assert after == {key: value for key, value in before.items() if key != "weights"}
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks


def test_translation_moves_the_target_towards_the_teacher(source_folder, lora_folder, target_folder, tmp_path):
    result = peft_cast.translate(source_folder, lora_folder, target_folder, steps=60, **FAST)
    kl = result.metrics["kl"]
    assert kl["translated"] < 0.8 * kl["target"] and kl["translated"] < kl["closed_form"]
    assert len(result.history) > 10 and "kl" in result.history[0] and "mse" in result.history[0]
    assert result.metrics["parameters"]["trained"] > result.metrics["parameters"]["source_lora"] > 0
    assert set(result.metrics["phases"]) == {"load", "text", "closed_form", "evaluate", "refine", "report"}
    assert "way covered" in str(result)
    config = result.model.active_peft_config
    assert (config.source_model_name_or_path, config.source_adapter_name_or_path) == (source_folder, lora_folder)
    assert config.base_model_name_or_path == target_folder

    result.save_pretrained(tmp_path / "cast")
    assert json.loads((tmp_path / "cast" / "cast_metrics.json").read_text())["metrics"]["kl"] == kl
    readme = (tmp_path / "cast" / "README.md").read_text()
    assert "import peft_cast" in readme and Path(lora_folder).name in readme
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.save(result.model(input_ids=ids).logits, tmp_path / "logits.pt")
    script = f"""
import torch, peft_cast
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(r"{tmp_path / "cast"}")
with torch.no_grad():
    logits = model(input_ids=torch.arange(5, 25)[None]).logits
assert torch.equal(logits, torch.load(r"{tmp_path / "logits.pt"}")), "logits differ"
print("identical")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "identical", done.stderr


def test_kernels_are_the_sources_and_stay_so(source_folder, lora_folder, target_folder):
    result = peft_cast.translate(source_folder, lora_folder, target_folder, steps=5, **FAST)
    lora = load_file(f"{lora_folder}/adapter_model.safetensors")
    checked = 0
    for module in result.model.modules():
        if isinstance(module, CastLayer):
            for kernel in module.peft_cast_kernels["default"]:
                prefix = f"base_model.model.{kernel.spec.source_place}.lora_"
                assert torch.equal(kernel.A, lora[f"{prefix}A.weight"])
                assert torch.equal(kernel.B, lora[f"{prefix}B.weight"])
                assert kernel.spec.scaling == 2.0
                checked += 1
    assert checked == 3 * 7  # every module of every source layer landed once


def test_loaded_models_come_back_as_they_were(source_folder, lora_folder, target_folder, byte_tokenizer):
    source, target = load(source_folder).train(), load(target_folder)
    source.lm_head.requires_grad_(False)
    before = snapshot(source), snapshot(target)
    result = peft_cast.translate(source, lora_folder, target, steps=3, **FAST)
    assert_untouched(source, before[0])
    assert_untouched(result.model.unload(), before[1])


@pytest.mark.parametrize("moment", ["closed form", "refinement"])
def test_loaded_models_come_back_as_they_were_after_a_failure(
    source_folder, lora_folder, target_folder, monkeypatch, moment
):
    source, target = load(source_folder), load(target_folder)
    before = snapshot(source), snapshot(target)
    if moment == "closed form":
        monkeypatch.setattr("peft_cast.fit.closed_form.collate_pairs", lambda pairs: 1 / 0)
        error = ZeroDivisionError
    else:
        monkeypatch.setattr(
            "peft_cast.refine.trainer.kl_divergence", lambda goal, *_: torch.full((len(goal),), torch.nan)
        )
        error = FloatingPointError
    with pytest.raises(error):
        peft_cast.translate(source, lora_folder, target, steps=3, **FAST)
    assert_untouched(source, before[0])
    assert_untouched(target, before[1])


def test_adapter_as_peft_model(source_folder, lora_folder, target_folder):
    adapted = PeftModel.from_pretrained(load(source_folder), lora_folder)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    result = peft_cast.translate(None, adapted, target_folder, steps=2, **FAST)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())
    by_path = peft_cast.translate(source_folder, lora_folder, target_folder, steps=2, **FAST)
    assert result.metrics["kl"] == pytest.approx(by_path.metrics["kl"], rel=1e-4)


def test_source_is_found_through_the_adapter(lora_folder, target_folder, source_folder):
    result = peft_cast.translate(None, lora_folder, target_folder, steps=0, **FAST)
    assert result.model.active_peft_config.source_model_name_or_path == source_folder


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "delta"},
        {"teacher": 0.5, "beta": 0.0, "temperature": 2.0},
        {"projection_type": "full"},
        {"projection_size": 1},
        {"projection_size": 8},
        {"depth_map": {0: 1, 2: 0}},
        {"depth_map": "similarity"},
        {"gain": 1.0, "ridge": 1e-2},
        {"training_args": {"gradient_accumulation_steps": 2, "logging_steps": 1}},
    ],
)
def test_settings(options, source_folder, lora_folder, target_folder):
    result = peft_cast.translate(source_folder, lora_folder, target_folder, steps=30, **{**FAST, **options})
    kl = result.metrics["kl"]
    assert kl["translated"] < kl["target"]
    if isinstance(options.get("depth_map"), dict):
        assert {name.split(".")[2] for name in result.module_map.unmapped} == {"1"}
    if options.get("beta") == 0:
        assert "mse" not in result.history[0] and not result.metrics["closed_form"]["hidden_r2"]


def test_similar_layers_are_found(source_folder, lora_folder, byte_tokenizer):
    source = load(source_folder)
    # The same model with two layers that do nothing in front of its own: the target's layers 2, 3 and 4 are 0, 1 and
    # 2.
    target = tiny_model("llama", len(byte_tokenizer), num_hidden_layers=5)
    for layer in target.model.layers[:2]:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.data.zero_()
    for mine, its in zip(target.model.layers[2:], source.model.layers):
        mine.load_state_dict(its.state_dict())
    target.model.embed_tokens.load_state_dict(source.model.embed_tokens.state_dict())
    options = {**FAST, "depth_map": "similarity", "target_tokenizer": byte_tokenizer}
    result = peft_cast.translate(source_folder, lora_folder, target, steps=0, **options)
    assert result.metrics["alignment"]["depth_map"] == {0: 2, 1: 3, 2: 4}


def test_mixture_of_self_written_text_and_corpus(source_folder, lora_folder, target_folder):
    text = Mixture((SelfWritten(prefix="The", max_new_tokens=16), 1), (TEXTS, 1))
    options = {**FAST, "text": text, "fit_text": TEXTS}
    result = peft_cast.translate(source_folder, lora_folder, target_folder, steps=4, **options)
    assert result.metrics["text"]["train"] + result.metrics["text"]["held_out"] == 40


def test_anchors_hold_the_target_in_place(source_folder, lora_folder, target_folder, piece_tokenizer):
    written = [TextSample(text[40:], text[:40], text[:40]) for text in TEXTS[:24]]
    drifts = []
    for gamma in (0.0, 10.0):
        options = {**FAST, "text": written, "fit_text": TEXTS[24:], "beta": 0.0, "gamma": gamma}
        result = peft_cast.translate(source_folder, lora_folder, target_folder, steps=15, **options)
        assert result.metrics["text"]["anchors"] == (0 if gamma == 0 else 4)  # one for every four of 16 texts
        assert ("kl_anchor" in result.history[0]) == (gamma > 0)
        drifts.append(drift(result.model, piece_tokenizer, TEXTS[-8:], max_length=64)["drift"])
    assert drifts[1] < 0.8 * drifts[0]


def test_held_out_texts_are_read_by_nothing_else(source_folder, lora_folder, target_folder):
    with open_pair(source_folder, lora_folder, target_folder) as pair:
        training = Training(steps=5, batch_size=4, eval_samples=6, max_length=64)
        same = read_texts(pair, TEXTS[:40], Fit(fit_text=TEXTS[:40], fit_samples=10), training)
        twice = read_texts(pair, [*TEXTS[:20], *TEXTS[:20]], Fit(fit_text=TEXTS[40:], fit_samples=10), training)
    assert len(same.held_out) == 6 and not set(same.held_out) & {*same.train, *same.fit}
    assert not set(twice.held_out) & set(twice.train) and len(twice.anchors) == -(-len(twice.train) // 4)


def test_prompts_are_enough_text(source_folder, lora_folder, target_folder):
    text = SelfWritten(prompts=["Say: one thing", "Say: another thing"], max_new_tokens=12, batch_size=8)
    options = {**FAST, "text": text, "fit_text": TEXTS, "eval_samples": 4, "batch_size": 4}
    result = peft_cast.translate(source_folder, lora_folder, target_folder, steps=3, **options)
    assert result.metrics["text"]["train"] + result.metrics["text"]["held_out"] == 16
    assert result.metrics["excitement"] > 0.05


def metrics(start=1.0, end=0.5, excitement=0.5, size=None, r2=0.8, steps=100, unmapped=()):
    return {
        "kl": {"target": 1.0, "closed_form": start, "translated": end},
        "excitement": excitement,
        "closed_form": {"modules": {"model.layers.0.mlp.down_proj": [{"r2_in": r2, "r2_out": 0.1}]}},
        "alignment": {"unmapped": unmapped},
        "settings": {"projection_size": size, "rank": 8, "steps": steps},
    }


FLAT = [{"kl": 0.5}] * 8
FALLING = [{"kl": 1.0 - 0.05 * i} for i in range(10)]


@pytest.mark.parametrize(
    ("measured", "history", "words"),
    [
        (metrics(), FLAT, []),
        (metrics(end=0.05, size=2), FALLING, []),  # nothing to complain of
        (metrics(excitement=0.01), FLAT, ["hardly excites"]),
        (metrics(steps=0), [], ["Only the closed form"]),
        (metrics(end=0.55), FALLING, ["still falling"]),
        (metrics(end=0.9), [{"kl": 0.4}] * 8, ["more varied"]),
        (metrics(end=1.2), [{"kl": 1.0}, {"kl": 1.2}], ["no nearer to its teacher", "KL rose"]),
        (metrics(size=2), FLAT, ["inner size \\(2\\) is below the LoRA's rank"]),
        (metrics(end=0.4), [{"kl": 0.4, "mse": 1.0}] * 8, ["hidden states do not"]),
        (metrics(end=0.8), [{"kl": 0.8, "mse": 1.0}, {"kl": 0.8, "mse": 0.3}], ["predictions do not"]),
        (metrics(r2=0.1), FLAT, ["inputs of down_proj are badly explained"]),
        (
            metrics(unmapped=[{"module": m, "what": "no place for 'gate'"} for m in "ab"]),
            FLAT,
            ["2 adapted modules .*: no place for 'gate' \\(a and 1 more\\)"],
        ),
    ],
)
def test_diagnosis_says_what_limits(measured, history, words):
    found = diagnose(measured, history)
    assert len(found) == len(words)
    for sentence, word in zip(found, words):
        assert re.search(word, sentence) and sentence.endswith(".")


def test_same_seed_gives_the_same_adapter(source_folder, lora_folder, target_folder):
    weights = []
    for _ in range(2):
        result = peft_cast.translate(source_folder, lora_folder, target_folder, steps=3, **FAST)
        weights.append({n: t for n, t in result.model.state_dict().items() if "peft_cast_" in n})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_checkpoints_and_result_in_the_output_folder(source_folder, lora_folder, target_folder, tmp_path):
    peft_cast.translate(source_folder, lora_folder, target_folder, steps=4, output_dir=tmp_path, **FAST)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    assert (tmp_path / "adapter_model.safetensors").exists() and (checkpoint / "optimizer.pt").exists()
    at_end, saved = (load_file(folder / "adapter_model.safetensors") for folder in (checkpoint, tmp_path))
    assert all(torch.equal(at_end[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("source", "target"),
    [("gemma3", "llama"), ("qwen3", "mistral"), ("mistral", "qwen2"), ("llama", "opt"), ("qwen2", "gemma2")],
)
def test_pairs_of_architectures(source, target, byte_tokenizer, piece_tokenizer, tmp_path):
    source_model = tiny_model(source, len(byte_tokenizer), num_hidden_layers=2)
    target_model = tiny_model(target, len(piece_tokenizer), num_hidden_layers=4, hidden_size=48, num_attention_heads=6)
    lora = make_lora(source_model, tmp_path / "lora")
    result = peft_cast.translate(
        source_model,
        lora,
        target_model,
        steps=40,
        source_tokenizer=byte_tokenizer,
        target_tokenizer=piece_tokenizer,
        **FAST,
    )
    kl = result.metrics["kl"]
    assert kl["translated"] < kl["target"]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = result.model(input_ids=ids).logits
        merged = result.model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)
    if target == "opt":
        assert len(result.module_map.unmapped) == 2  # OPT has no gate


def refused(message, source, adapter, target, error=ValueError, **options):
    with pytest.raises(error, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_cast.translate(source, adapter, target, **{**FAST, "steps": 1, **options})


def test_bad_models_and_adapters_are_one_clear_error(source_folder, lora_folder, target_folder, tmp_path):
    refused("source model 'user/absent' could not be loaded", "user/absent", lora_folder, target_folder, OSError)
    refused("target model 'user/absent' could not be loaded", source_folder, lora_folder, "user/absent", OSError)
    refused("adapter 'user/absent' could not be read", source_folder, "user/absent", target_folder)
    source = load(source_folder)
    refused("same object", source, lora_folder, source)
    wide = tiny_model("llama", 300, hidden_size=40)
    wide.name_or_path = source_folder
    refused("does not fit the source model.*another width.*names this very model", wide, lora_folder, target_folder)
    shallow = tiny_model("llama", 300, num_hidden_layers=2)
    shallow.name_or_path = source_folder
    before = snapshot(shallow)
    refused("does not fit the source model.*in the file, not in the model", shallow, lora_folder, target_folder)
    assert_untouched(shallow, before)
    peft_model = get_peft_model(load(source_folder), LoraConfig())
    refused("`target` is a PeftModel", source_folder, lora_folder, peft_model)
    nameless = tiny_model("llama", 300)
    refused("pass `target_tokenizer=`", source_folder, lora_folder, nameless)


def test_corrupt_adapter_files(source_folder, lora_folder, target_folder, tmp_path):
    tensors = load_file(f"{lora_folder}/adapter_model.safetensors")
    shutil.copy(f"{lora_folder}/adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    refused("does not fit|could not be read", source_folder, str(tmp_path), target_folder)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refused("in the model, not in the file", source_folder, str(tmp_path), target_folder)
    (tmp_path / "adapter_config.json").write_text("{")
    refused("could not be read", source_folder, str(tmp_path), target_folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": []}, "holds no text"),
        ({"text": [TEXTS[0]]}, "1 usable sample, at least 3"),
        ({"text": TEXTS, "fit_text": ["a" * 60] * 2, "max_length": 3}, "0 usable samples"),
        ({"teacher": "nobody"}, "`teacher` must be"),
        ({"teacher": 2.0}, "`teacher` must be"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"adapter_name": ["a", "b"]}, "several names are for a list of adapters"),
        ({"depth_map": {0: 9}}, "source layer 0 to target layer 9"),
    ],
)
def test_bad_arguments_are_one_clear_error(options, message, source_folder, lora_folder, target_folder):
    refused(message, source_folder, lora_folder, target_folder, **options)


def test_text_on_the_hub_and_no_network_says_what_to_pass(source_folder, lora_folder, target_folder):
    written = {"text": peft_cast.SelfWritten(prompts=("Who?",)), "fit_text": "user/corpus"}
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        for texts in ({"text": "user/corpus"}, {"text": None, "fit_text": "user/corpus"}, written):
            refused("pass text that is at hand", source_folder, lora_folder, target_folder, OSError, **texts)
    assert loads.call_count == 0


def test_save_again_after_loading_keeps_the_origin(source_folder, lora_folder, target_folder, tmp_path):
    peft_cast.translate(source_folder, lora_folder, target_folder, steps=0, **FAST).save_pretrained(tmp_path / "a")
    PeftModel.from_pretrained(load(target_folder), tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in "ab")
    assert {**first, "target_modules": 0} == {**second, "target_modules": 0}
    assert set(first["target_modules"]) == set(second["target_modules"])
    assert first["source_adapter_name_or_path"] == lora_folder
