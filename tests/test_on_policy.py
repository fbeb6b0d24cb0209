"""A second refinement, in the same call, on what the translated model answers itself."""

import json

import pytest
import torch
from conftest import c4_texts

import peft_cast
from peft_cast import Mixture, SelfWritten
from peft_cast.refine.trainer import CastTrainer
from peft_cast.text.samples import TextSample


PROMPTS = ("Say: one thing", "Say: another thing", "Say: a third")
TEXTS = c4_texts(30)
TEXT = SelfWritten(prompts=PROMPTS, more_prompts=0, max_new_tokens=12)
OPTIONS = {
    "teacher": "source",  # whose answers are compared with nobody's
    "text": TEXT,
    "fit_text": TEXTS,
    "batch_size": 4,
    "fit_samples": 8,
    "eval_samples": 4,
    "max_length": 48,
    "steps": 4,
    "on_policy_steps": 6,
    "dtype": torch.float32,
    "progress": False,
    "training_args": {"save_steps": 2},
}


@pytest.fixture(scope="module", autouse=True)
def as_trained():
    """Every adapter acts as strongly as it was trained, so that what came before its own words compares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_cast.refine.strength.STRENGTHS", ())
        yield


@pytest.fixture(scope="module")
def models(source_folder, lora_folder, target_folder):
    return source_folder, lora_folder, target_folder


@pytest.fixture(scope="module")
def whole(models):
    return peft_cast.translate(*models, **OPTIONS)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def test_the_translated_model_answers_the_same_prompts_and_learns_from_it(models, whole, monkeypatch):
    writers, sample = [], peft_cast.text.written._sample

    def noting(model, tokenizer, texts, tokens, *options):
        writers.append((logits(model), tokenizer.name_or_path, list(texts), tokens))
        return sample(model, tokenizer, texts, tokens, *options)

    monkeypatch.setattr("peft_cast.text.written._sample", noting)
    before = peft_cast.translate(*models, **{**OPTIONS, "on_policy_steps": 0})
    of_source = len(writers)
    result = peft_cast.translate(*models, **OPTIONS)
    (answering, tokenizer, asked, tokens) = writers[-1]
    assert len(writers) == 2 * of_source + 1 and tokenizer == models[2] and set(asked) == set(PROMPTS) and tokens <= 48
    torch.testing.assert_close(answering, logits(before.model))
    own, kl = result.metrics["on_policy"], result.metrics["kl"]
    assert own["steps"] == 6 and 0 < own["texts"] <= 24 and own["kl"]["after"] < 0.99 * own["kl"]["before"]
    assert any("kl_anchor" in entry for entry in own["history"])
    assert list(kl) == ["target", "closed_form", "refined", "translated"]
    assert kl["refined"] == before.metrics["kl"]["translated"] != kl["translated"]
    assert kl == whole.metrics["kl"]


def test_its_rate_is_half(whole):
    peaks = [
        max(entry["learning_rate"] for entry in log if "learning_rate" in entry)
        for log in (whole.history, whole.metrics["on_policy"]["history"])
    ]
    assert 0 < peaks[1] < 0.75 * peaks[0]


def test_result_report_and_card_tell_of_it(whole, tmp_path):
    whole.save_pretrained(tmp_path)
    assert "before its own words" in str(whole) and "KL on its own answers to " in str(whole)
    assert "KL on its own answers: from" in (tmp_path / "report.html").read_text()
    assert all("before its own words" in (tmp_path / name).read_text() for name in ("report.html", "README.md"))
    assert json.loads((tmp_path / "cast_metrics.json").read_text())["metrics"]["on_policy"]["steps"] == 6


@pytest.mark.parametrize("place", ["first", "writing", "second"])
def test_a_stopped_run_goes_on_to_the_same_result(models, whole, tmp_path, monkeypatch, place):
    step, sample, calls = CastTrainer.compute_loss, peft_cast.text.written._sample, []

    def stop_step(self, *args, **more):
        calls.append(None)
        if len(calls) == {"first": 4, "second": 8}.get(place):
            raise KeyboardInterrupt
        return step(self, *args, **more)

    def stop_writing(model, tokenizer, texts, *args, **more):
        if place == "writing" and tokenizer.name_or_path == models[2]:
            raise KeyboardInterrupt
        return sample(model, tokenizer, texts, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(CastTrainer, "compute_loss", stop_step)
        patch.setattr("peft_cast.text.written._sample", stop_writing)
        with pytest.raises(KeyboardInterrupt) as stopped:
            peft_cast.translate(*models, **OPTIONS, output_dir=tmp_path)
    assert f"up to step {({'first': 3, 'writing': 4, 'second': 7})[place]} " in str(stopped.value)
    if place == "second":
        monkeypatch.setattr("peft_cast.text.written._sample", lambda *_, **__: 1 / 0)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(CastTrainer, "compute_loss", lambda *a, **m: (calls.append(None), step(*a, **m))[1])
        resumed = peft_cast.translate(*models, **OPTIONS, output_dir=tmp_path, resume_from_checkpoint=True)
    assert len(calls) == {"first": 7, "writing": 6, "second": 3}[place]
    assert resumed.metrics["kl"] == whole.metrics["kl"]
    torch.testing.assert_close(logits(resumed.model), logits(whole.model), rtol=0, atol=0)


def test_answers_written_earlier_and_mixtures_have_prompts_too(models):
    samples = [TextSample(text[:60], PROMPTS[0], PROMPTS[0]) for text in TEXTS[:9]]
    options = {**OPTIONS, "steps": 0, "on_policy_steps": 1}
    for text in (samples, Mixture((TEXT, 1), (TEXTS[10:], 1))):
        result = peft_cast.translate(*models, **{**options, "text": text})
        assert result.metrics["on_policy"]["texts"] > 0


def test_several_adapters_each_answer_for_themselves(models):
    source, lora, target = models
    results = peft_cast.translate(source, [lora, lora], target, **{**OPTIONS, "adapter_name": ["a", "b"]})
    assert [result.metrics["on_policy"]["steps"] for result in results] == [6, 6]


def test_what_has_no_prompts_is_refused_before_anything_is_loaded(models, monkeypatch):
    with pytest.raises(ValueError, match="`on_policy_steps` needs prompts"):
        peft_cast.translate("nowhere", "nowhere", "nowhere", **{**OPTIONS, "text": TEXTS})
    with pytest.raises(ValueError, match="`on_policy_steps` needs prompts"):
        peft_cast.translate(*models, **{**OPTIONS, "text": [TextSample(text) for text in TEXTS]})
    with pytest.raises(ValueError, match="`on_policy_steps` must be at least 0"):
        peft_cast.translate(*models, **{**OPTIONS, "on_policy_steps": -1})
    monkeypatch.setattr("peft_cast.models.sharding.is_requested", lambda training_args: True)
    with pytest.raises(ValueError, match="`on_policy_steps` and .* go with no FSDP or ZeRO-3"):
        peft_cast.translate(*models, **OPTIONS)
