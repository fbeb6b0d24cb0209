"""The alternatives that a translation is compared with."""

import warnings
from unittest import mock

import pytest
import torch
from conftest import c4_texts, make_lora, tiny_model
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from peft_cast.evaluation.baselines import cross_lora, direct_copy, lora_from_factors
from peft_cast.refine.distill import distill_lora


IDS = torch.arange(5, 25)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_direct_copy_to_the_same_model_is_the_adapter(source_folder, lora_folder):
    target = AutoModelForCausalLM.from_pretrained(source_folder)
    copied = direct_copy(source_folder, lora_folder, target)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), lora_folder)
    torch.testing.assert_close(logits(copied), logits(expected))
    assert not torch.allclose(logits(copied), logits(copied.unload()))


def test_direct_copy_needs_a_shape_that_fits(source_folder, lora_folder, target_folder):
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        with pytest.raises(ValueError, match="direct copy is impossible.*: use `translate`, which fits maps"):
            direct_copy(source_folder, lora_folder, target_folder)
        with pytest.raises(ValueError, match="source layer 9 to target layer 0"):
            cross_lora(source_folder, lora_folder, target_folder, depth_map={9: 0})
        with pytest.raises(ValueError, match="got int"):
            distill_lora(source_folder, lora_folder, target_folder, text=5)
    assert loads.call_count == 0


PARTS = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, {}, "module trained in full", (direct_copy, cross_lora)),
    "a wider MLP": ({}, {"intermediate_size": 64}, "9 modules, which have no place", (direct_copy,)),
    "one layer": ({}, {"num_hidden_layers": 1}, "14 modules, which have no place", (direct_copy,)),
    "nothing": ({}, {}, None, (direct_copy, cross_lora)),
}


@pytest.mark.parametrize("case", PARTS)
def test_baselines_say_what_they_lose(case, tmp_path):
    options, sizes, what, baselines = PARTS[case]
    adapter = make_lora(tiny_model(), tmp_path, **options)
    for baseline in baselines:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            baseline(tiny_model(), adapter, tiny_model(**sizes))
        lost = [one for one in said if "is not carried over whole; lost is" in str(one.message)]
        assert len(lost) == (what is not None) and all(what in str(one.message) for one in lost)
        assert all(one.filename == __file__ and "bridge" not in str(one.message) for one in lost)


def test_cross_lora_to_the_same_model_is_the_adapter_at_full_rank(source_folder, lora_folder):
    # ΔW = U Uᵀ ΔW V Vᵀ only where the subspaces are whole: the square projections.
    target = AutoModelForCausalLM.from_pretrained(source_folder)
    translated = cross_lora(source_folder, lora_folder, target)
    source = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), lora_folder)
    for name in ("q_proj", "o_proj"):
        path = f"model.layers.1.self_attn.{name}"
        deltas = [m.get_base_model().get_submodule(path).get_delta_weight("default") for m in (translated, source)]
        torch.testing.assert_close(*deltas, rtol=1e-3, atol=1e-5)


def test_cross_lora_follows_its_formula(tmp_path):
    source, target = tiny_model("llama", seed=1), tiny_model("gemma3", seed=2, hidden_size=40, num_hidden_layers=2)
    lora = make_lora(source, tmp_path / "lora")
    weights = {n: m.weight.clone() for n, m in source.named_modules() if hasattr(m, "weight")}
    target_weights = {n: m.weight.clone() for n, m in target.named_modules() if hasattr(m, "weight")}
    adapted = PeftModel.from_pretrained(source, lora)
    deltas = {
        n: m.get_delta_weight("default").detach()
        for n, m in adapted.get_base_model().named_modules()
        if hasattr(m, "lora_A")
    }
    translated = cross_lora(None, adapted, target, rank=6).get_base_model()
    # three layers on two: 0 → 0, 1 and 2 → 0 or 1 in proportion
    for path, layers in (("mlp.up_proj", {0: (0, 1), 1: (2,)}), ("self_attn.k_proj", {0: (0, 1), 1: (2,)})):
        for layer, sources in layers.items():
            U_T, _, V_T = torch.linalg.svd(target_weights[f"model.layers.{layer}.{path}"], full_matrices=False)
            expected = 0
            for s in sources:
                name = f"model.layers.{s}.{path}"
                U_S, _, V_S = torch.linalg.svd(weights[name], full_matrices=False)
                expected += U_T[:, :6] @ U_S[:, :6].T @ deltas[name] @ V_S[:6].T @ V_T[:6]
            found = translated.get_submodule(f"model.layers.{layer}.{path}").get_delta_weight("default")
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_cross_lora_can_be_saved_and_loaded_without_this_package(source_folder, lora_folder, target_folder, tmp_path):
    translated = cross_lora(source_folder, lora_folder, target_folder, rank=8)
    expected = logits(translated)
    translated.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target_folder), tmp_path)
    torch.testing.assert_close(logits(loaded), expected)
    assert loaded.active_peft_config.peft_type == "LORA"
    with pytest.raises(ValueError, match="reads no text"):
        cross_lora(source_folder, lora_folder, target_folder, depth_map="similarity")
    with pytest.raises(ValueError, match="`rank` must be at least 1"):
        cross_lora(source_folder, lora_folder, target_folder, rank=0)


def test_a_loaded_source_comes_back_as_it_was(source_folder, lora_folder, target_folder):
    source = AutoModelForCausalLM.from_pretrained(source_folder)
    types = [type(m) for m in source.modules()]
    cross_lora(source, lora_folder, target_folder)
    assert [type(m) for m in source.modules()] == types and all(p.requires_grad for p in source.parameters())


def test_lora_of_several_ranks():
    model = tiny_model()
    factors = {
        "model.layers.0.mlp.up_proj": (torch.randn(2, 32), torch.randn(48, 2)),
        "model.layers.1.mlp.up_proj": (torch.randn(5, 32), torch.randn(48, 5)),
    }
    wrapped = lora_from_factors(model, factors).get_base_model()
    for name, (A, B) in factors.items():
        torch.testing.assert_close(wrapped.get_submodule(name).get_delta_weight("default"), B @ A)


def test_distilled_lora_moves_the_target_towards_the_teacher(source_folder, lora_folder, target_folder, tmp_path):
    texts = c4_texts(70)
    result = distill_lora(
        source_folder,
        lora_folder,
        target_folder,
        text=texts[:40],
        fit_text=texts[40:],
        fit_samples=10,
        steps=40,
        max_length=64,
        learning_rate=2.0,
        gamma=0.1,
        progress=False,
        output_dir=tmp_path,
    )
    kl = result.metrics["kl"]
    assert kl["translated"] < 0.8 * kl["target"] and "closed_form" not in result.metrics
    assert result.metrics["text"]["anchors"] == 7 and "kl_anchor" in result.history[0]
    config = result.model.active_peft_config
    assert isinstance(config, LoraConfig) and config.r == 8  # three layers on two: two kernels of rank 4 on one module
    assert "way covered" in str(result)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target_folder), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(result.model))


def test_a_failed_distillation_gives_the_target_back(source_folder, lora_folder, target_folder, monkeypatch):
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    types = [type(m) for m in target.modules()]
    monkeypatch.setattr("peft_cast.refine.teacher.kl_divergence", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill_lora(source_folder, lora_folder, target, text=c4_texts(9), steps=1, progress=False)
    assert [type(m) for m in target.modules()] == types
