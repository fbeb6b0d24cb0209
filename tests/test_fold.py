"""A CAST adapter as a plain LoRA: exact, of a rank that servers accept, without this package."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from adapters import KERNELS, two_adapters
from conftest import save_model, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_projections import OPTIONS, SHARED
from test_tuner import INPUTS, logits, random_cast

from peft_cast import to_lora


def delta(model, name, adapter="default"):
    return model.get_base_model().get_submodule(name).get_delta_weight(adapter)


@pytest.mark.parametrize("options", [{}, {"projection_type": "full"}, *SHARED.values()])
def test_folded_is_unfolded_token_by_token(options, tmp_path):
    model = random_cast(tiny_model(), kernels=KERNELS, **options)
    folded = to_lora(model)
    assert folded.config.r == 6 and set(folded.errors.values()) == {0.0} and "exact" in str(folded)
    folded.save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert lora.peft_config["default"].peft_type.value == "LORA"
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-4, atol=1e-5)
    written = [m.generate(input_ids=INPUTS, max_new_tokens=8, do_sample=False) for m in (model, lora)]
    assert torch.equal(*written)


def test_larger_ranks_pad_exactly(tmp_path):
    model = random_cast(tiny_model(), kernels=KERNELS)
    folded = to_lora(model, rank=16)
    shapes = {tuple(w.shape) for n, w in folded.weights.items() if "lora_A" in n}
    assert folded.config.r == folded.config.lora_alpha == 16 and {s[0] for s in shapes} == {16}
    folded.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_smaller_ranks_are_the_best_there_are_and_say_what_they_lose(rank, tmp_path):
    model = random_cast(tiny_model(), kernels=KERNELS)
    folded = to_lora(model, rank=rank)
    for name in KERNELS:
        whole = delta(model, name)
        A, B = (folded.weights[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        S = torch.linalg.svdvals(whole.double())
        assert float((whole - B @ A).norm() / whole.norm()) == pytest.approx(folded.errors[name], abs=1e-5)
        assert folded.errors[name] == pytest.approx(float(S[rank:].norm() / S.norm()), abs=1e-5)
    assert "cut, relative error" in str(folded) and max(folded.errors.values()) > 0.01
    folded.save_pretrained(tmp_path)
    assert not torch.allclose(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model), atol=1e-3)


def test_from_the_adapters_folder_without_the_models_weights(tmp_path, byte_tokenizer, monkeypatch):
    base = save_model(tiny_model(), byte_tokenizer, tmp_path / "base")
    model = random_cast(tiny_model(), kernels=KERNELS)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "cast")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        folded = to_lora(tmp_path / "cast", dtype=torch.bfloat16)
    assert {w.dtype for w in folded.weights.values()} == {torch.bfloat16}
    assert folded.config.base_model_name_or_path == base
    exact = to_lora(model).weights
    for name, weight in folded.weights.items():
        torch.testing.assert_close(weight.float(), exact[name], rtol=1e-2, atol=1e-2)


def test_the_folder_is_an_ordinary_lora_to_a_process_that_does_not_know_cast(tmp_path, byte_tokenizer):
    base = save_model(tiny_model(), byte_tokenizer, tmp_path / "base")
    model = random_cast(tiny_model(), kernels=KERNELS)
    model.save_pretrained(tmp_path / "cast")
    to_lora(model, rank=8).save_pretrained(tmp_path / "lora")
    torch.save(logits(model), tmp_path / "logits.pt")
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(r"{base}"), r"{tmp_path / "lora"}")
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 17).reshape(2, 7)).logits
torch.testing.assert_close(logits, torch.load(r"{tmp_path / "logits.pt"}"), rtol=1e-4, atol=1e-5)
assert "peft_cast" not in sys.modules
try:  # what the card of a CAST adapter quotes
    PeftModel.from_pretrained(model, r"{tmp_path / "cast"}")
except KeyError as error:
    assert repr(error) == "KeyError('CAST')"
    print("same")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-2000:]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 8 and not config["rank_pattern"] and config["peft_type"] == "LORA"


def test_modules_are_named_as_servers_expect_where_possible(tmp_path):
    everywhere = random_cast(tiny_model(), target_modules=["q_proj", "down_proj"])
    assert set(to_lora(everywhere).config.target_modules) == {"q_proj", "down_proj"}
    somewhere = random_cast(tiny_model(), kernels=KERNELS)
    assert set(to_lora(somewhere).config.target_modules) == set(KERNELS)


def test_pefts_own_conversion_agrees(tmp_path):
    model = random_cast(tiny_model(), kernels=KERNELS)
    peft.save_as_lora(tmp_path, model, rank=6)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model), rtol=1e-3, atol=1e-4
    )
    folded = to_lora(model)
    for name in KERNELS:
        key = f"base_model.model.{name}.lora_"
        converted = load_file(tmp_path / "adapter_model.safetensors")
        products = [w[f"{key}B.weight"] @ w[f"{key}A.weight"] for w in (converted, folded.weights)]
        torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_no_lora_is_refused(name):
    model = random_cast(tiny_model(), kernels=KERNELS, **OPTIONS[name])
    with pytest.raises(ValueError, match="nonlinear projections or biases"):
        to_lora(model)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=4)


def test_bad_arguments(lora_folder, tmp_path):
    model = random_cast(tiny_model(), kernels=KERNELS)
    for rank in (0, "16", True):
        with pytest.raises(ValueError, match="at least 1"):
            to_lora(model, rank=rank)
    with pytest.raises(ValueError, match="`rank` is 20000, and none above 512 is of use: pass a smaller one"):
        to_lora(model, rank=20000)
    for wrong in (model.get_base_model(), 5, None):
        with pytest.raises(ValueError, match="`adapter` must be the folder or hub id of a CAST adapter, or the Peft"):
            to_lora(wrong)
    with pytest.raises(ValueError, match="`adapter` is wrapped in OptimizedModule: pass the model in it"):
        to_lora(torch.compile(model))
    with pytest.raises(ValueError, match="`dtype` must be torch.float32"):
        to_lora(model, dtype="float16")
    with pytest.raises(ValueError, match="there is no folder './no/where'"):
        to_lora("./no/where")
    with pytest.raises(ValueError, match="pass one of them as `adapter_name`"):
        both = two_adapters()
        both.base_model.set_adapter(["default", "other"])
        to_lora(both)
    with pytest.raises(ValueError, match="no CAST adapter"):
        to_lora(model, adapter_name="absent")
    with pytest.raises(ValueError, match="not a CAST adapter"):
        to_lora(lora_folder)
    with pytest.raises(ValueError, match="no CAST adapter"):
        to_lora(get_peft_model(copy.deepcopy(tiny_model()), LoraConfig(target_modules=["q_proj"])))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "absent")
    model.save_pretrained(tmp_path / "cast")
    with pytest.raises(ValueError, match="pass the PeftModel"):
        to_lora(tmp_path / "cast")
