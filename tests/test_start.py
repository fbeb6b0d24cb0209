"""Going on from a finished translation, on other text or on what the translated model writes itself."""

import json
import sys

import pytest
import torch
from conftest import c4_texts, make_lora, tiny_model
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast import CastConfig, SelfWritten
from peft_cast.refine.trainer import CastTrainer


TEXTS = c4_texts(60)
OPTIONS = {
    "text": TEXTS[:30],
    "fit_text": TEXTS[30:],
    "batch_size": 4,
    "fit_samples": 8,
    "eval_samples": 4,
    "max_length": 48,
    "dtype": torch.float32,
    "progress": False,
}
PROMPTS = ("Say: one thing", "Say: another thing", "Say: a third")


@pytest.fixture(scope="module")
def models(source_folder, lora_folder, target_folder):
    return source_folder, lora_folder, target_folder


@pytest.fixture(scope="module")
def first(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    result = peft_cast.translate(*models, **OPTIONS, steps=6, output_dir=folder)
    return folder, result.metrics["kl"]["translated"], result


def logits(result):
    with torch.no_grad():
        return result.model(torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("projection_type", ["compact", "factored"])
def test_it_begins_where_the_first_ended(models, first, projection_type):
    folder, _, before = first
    same = peft_cast.translate(*models, **OPTIONS, steps=0, start=folder, projection_type=projection_type)
    torch.testing.assert_close(logits(same), logits(before), rtol=1e-3, atol=1e-4)
    assert list(same.metrics["kl"]) == ["target", "start", "translated"] and "closed_form" not in same.metrics
    assert "way covered" in str(same) and str(folder) in same.metrics["settings"]["start"]


def test_it_goes_on_and_its_folder_can_be_gone_on_from(models, first, tmp_path):
    folder, reached, _ = first
    result = peft_cast.translate(*models, **OPTIONS, steps=6, start=folder, output_dir=tmp_path, learning_rate=0.1)
    assert result.metrics["kl"]["start"] == pytest.approx(reached, rel=1e-3)
    assert result.metrics["kl"]["translated"] < 0.999 * reached
    assert (tmp_path / "report.html").exists() and json.loads((tmp_path / "run.json").read_text())["finished"]
    first_file, second_file = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path))
    assert first_file.keys() == second_file.keys()
    again = peft_cast.translate(*models, **OPTIONS, steps=0, start=tmp_path)
    torch.testing.assert_close(logits(again), logits(result), rtol=1e-3, atol=1e-4)


def test_on_policy_text_is_the_translated_models(models, first, monkeypatch):
    folder, _, before = first
    writers, sample = [], peft_cast.text.written._sample

    def noting(model, tokenizer, texts, *args, **options):
        with torch.no_grad():
            writers.append((list(texts), tokenizer.name_or_path, model(torch.arange(5, 25)[None]).logits))
        return sample(model, tokenizer, texts, *args, **options)

    monkeypatch.setattr("peft_cast.text.written._sample", noting)
    text = SelfWritten(prompts=PROMPTS, max_new_tokens=12, on_policy=True)
    result = peft_cast.translate(*models, **{**OPTIONS, "text": text}, steps=3, start=folder)
    *prompts, (asked, tokenizer, answering) = writers
    assert prompts and set(PROMPTS) <= set(asked) and tokenizer == models[2]
    torch.testing.assert_close(answering, logits(before), rtol=1e-3, atol=1e-4)
    with before.model.disable_adapter():
        untouched = logits(before)
    for _, tokenizer, writing in prompts:
        assert tokenizer == models[2]
        torch.testing.assert_close(writing, untouched)
    assert result.metrics["text"]["anchors"] > 0 and result.metrics["refinement"]["steps"] == 3


def test_a_stopped_run_goes_on_with_the_text_it_wrote(models, first, tmp_path, monkeypatch):
    text = SelfWritten(prompts=PROMPTS, more_prompts=0, max_new_tokens=12, on_policy=True)
    options = {**OPTIONS, "text": text, "steps": 4, "start": first[0], "training_args": {"save_steps": 2}}
    whole = peft_cast.translate(*models, **options)
    step = CastTrainer.compute_loss

    def stop(self, *args, **more):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(CastTrainer, "compute_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            peft_cast.translate(*models, **options, output_dir=tmp_path)
    monkeypatch.setattr("peft_cast.text.written._sample", lambda *_, **__: 1 / 0)
    resumed = peft_cast.translate(*models, **options, output_dir=tmp_path, resume_from_checkpoint=True)
    assert resumed.metrics["kl"] == whole.metrics["kl"]


def test_what_cannot_be_gone_on_from_is_one_clear_error(models, first, tmp_path, monkeypatch):
    source, lora, target = models
    folder = first[0]

    def refused(message, adapter=lora, **options):
        with pytest.raises(ValueError, match=message):
            peft_cast.translate(source, adapter, target, **{**OPTIONS, "steps": 1, **options})

    other = make_lora(AutoModelForCausalLM.from_pretrained(source), tmp_path / "other", seed=9)
    refused("is no CAST adapter", start=make_lora(AutoModelForCausalLM.from_pretrained(target), tmp_path / "plain"))
    refused("goes with no `bridge`", start=folder, beta=0.1)
    refused("for one adapter at a time", adapter=[lora, other], start=folder)
    refused("pass its adapter as `start`", text=SelfWritten(prompts=PROMPTS, on_policy=True))
    refused("would be overwritten while it is read", start=folder, output_dir=folder)
    refused("`start` must be the folder or hub id of a translation, got TranslationResult", start=first[2])
    refused("The adapter to start from could not be read: there is no folder './nowhere'", start="./nowhere")
    wide = tiny_model("gemma3", hidden_size=64)
    get_peft_model(wide, CastConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "wide")
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["peft_cast.translate.one"], "open_pair", lambda *_, **__: pytest.fail("models were loaded")
        )
        refused("The adapter to start from '.*wide' does not fit the target model", start=tmp_path / "wide")
        refused("is no CAST adapter", start=tmp_path / "plain")
        refused("carries another LoRA", adapter=other, start=folder)
        refused("pass the depth and module map", start=folder, depth_map={0: 1, 1: 0, 2: 1})
        refused("brings its projections, of size 4: leave `projection_size` out", start=folder, projection_size=2)
        for name in ("gain", "ridge"):
            refused(f"brings its projections and their strength: leave `{name}` out", start=folder, **{name: 2.0})
    mlp = peft_cast.translate(*models, **OPTIONS, steps=0, projection_type="mlp")
    mlp.save_pretrained(tmp_path / "mlp")
    refused("nonlinear projections or a bias", start=tmp_path / "mlp")
