"""Which first maps a translation begins with, and when they are enough."""

import pytest
import torch
from conftest import c4_texts, make_lora, save_model, tiny_model

import peft_cast


QUICK = {"text": c4_texts(24), "fit_samples": 8, "eval_samples": 4, "batch_size": 4, "max_length": 48}
OPTIONS = {**QUICK, "gamma": 0.0, "progress": False, "report_samples": 0, "report_similarity": False}


@pytest.fixture(scope="module")
def successors(tmp_path_factory, byte_tokenizer):
    """An old model with its LoRA, the same model in a new version, and another of the same shapes."""
    folder, size = tmp_path_factory.mktemp("successors"), len(byte_tokenizer)
    old = tiny_model("llama", size)
    lora = make_lora(old, folder / "lora")
    save_model(old, byte_tokenizer, folder / "old")
    with torch.no_grad():
        for parameter in old.model.layers.parameters():
            parameter.add_(0.03 * parameter.std() * torch.randn_like(parameter))
    save_model(old, byte_tokenizer, folder / "new")
    save_model(tiny_model("llama", size, seed=7), byte_tokenizer, folder / "stranger")
    return folder, lora


def translated(successors, target, **options):
    folder, lora = successors
    return peft_cast.translate(folder / "old", lora, folder / target, **{**OPTIONS, **options})


def test_a_new_version_gets_the_lora_as_it_is(successors):
    result = translated(successors, "new", steps=0)
    route, kl = result.metrics["route"], result.metrics["kl"]
    assert route["first_maps"] == "copy" and not route["refined"] and "closed_form" not in result.metrics
    assert route["copy"] == pytest.approx(1 - kl["copy"] / kl["target"]) and route["copy"] > 0.5
    folder, lora = successors
    copied = peft_cast.baselines.direct_copy(folder / "old", lora, folder / "new")
    ids = torch.arange(3, 24).reshape(3, 7)
    torch.testing.assert_close(result.model(ids).logits, copied(ids).logits, rtol=1e-4, atol=1e-4)
    assert f"the LoRA put on the target as it is (as it is it covers {route['copy']:.0%}" in result.summary()


def test_a_stranger_of_the_same_shapes_gets_the_closed_form(successors):
    route = translated(successors, "stranger", steps=0).metrics["route"]
    assert route["first_maps"] == "closed_form" and route["copy"] < 0.5


def test_nothing_is_refined_where_the_first_maps_are_enough(successors):
    enough = translated(successors, "new", steps=2, enough=0.5).metrics
    assert not enough["route"]["refined"] and enough["kl"]["translated"] == enough["kl"]["copy"]
    assert translated(successors, "new", steps=2, enough=1).metrics["route"]["refined"]


def test_first_maps_can_be_chosen(successors):
    route = translated(successors, "new", steps=0, first_maps="closed_form").metrics["route"]
    assert route["first_maps"] == "closed_form" and "copy" not in route and not route["refined"]
    assert translated(successors, "stranger", steps=0, first_maps="copy").metrics["route"]["first_maps"] == "copy"
    hidden = translated(successors, "new", steps=0, beta=0.1).metrics
    assert hidden["route"]["first_maps"] == "closed_form"


def test_a_copy_that_is_impossible_is_refused(successors, target_folder):
    folder, lora = successors
    with pytest.raises(ValueError, match="needs a target whose modules have the shapes of the source's"):
        peft_cast.translate(folder / "old", lora, target_folder, first_maps="copy", **OPTIONS)
    with pytest.raises(ValueError, match="goes with no `beta`"):
        translated(successors, "new", first_maps="copy", beta=0.1)


def test_an_adapter_acts_as_strongly_as_is_best_on_held_out_text(successors, monkeypatch):
    monkeypatch.setattr("peft_cast.fit.maps.KernelFit.usual_gain", 2 / 3)
    result = translated(successors, "new", steps=0, first_maps="copy")
    route, kl = result.metrics["route"], result.metrics["kl"]
    assert route["strength"] == 1.5 and max(route["strengths"], key=route["strengths"].get) == "1.5"
    assert route["strengths"]["0.0"] == 0 and list(route["strengths"]) == sorted(route["strengths"], key=float)
    assert kl["translated"] == pytest.approx((1 - route["strengths"]["1.5"]) * kl["target"])
    assert kl["translated"] < kl["copy"]
    assert "acts at 1.5 of the strength it was given" in result.summary()
    folder, lora = successors
    copied = peft_cast.baselines.direct_copy(folder / "old", lora, folder / "new")
    ids = torch.arange(3, 24).reshape(3, 7)
    torch.testing.assert_close(result.model(ids).logits, copied(ids).logits, rtol=1e-3, atol=1e-3)
    as_given = translated(successors, "new", steps=0, first_maps="copy", gain=0.5).metrics
    assert "strength" not in as_given["route"] and as_given["kl"]["translated"] == as_given["kl"]["copy"]
