"""Several adapters of one model in one call."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import c4_texts, make_lora
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast.refine.trainer import CastTrainer


INPUTS = torch.arange(5, 25)[None]
OPTIONS = {"steps": 6, "batch_size": 4, "fit_samples": 8, "max_length": 40, "dtype": torch.float32, "progress": False}


@pytest.fixture(scope="module")
def loras(source_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    sizes = {"first": {"r": 4}, "second": {"r": 2, "target_modules": ["q_proj", "down_proj"], "seed": 9}}
    return [
        make_lora(AutoModelForCausalLM.from_pretrained(source_folder), folder / name, **options)
        for name, options in sizes.items()
    ]


def logits(model, name):
    model.set_adapter(name)
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def test_all_adapters_on_one_model(source_folder, target_folder, loras, tmp_path, monkeypatch):
    fits = []
    fit = peft_cast.fit.initial.fit_closed_form
    monkeypatch.setattr("peft_cast.fit.initial.fit_closed_form", lambda *a, **o: fits.append(1) or fit(*a, **o))
    first, second = peft_cast.translate(source_folder, loras, target_folder, text=c4_texts(40), **OPTIONS)
    assert len(fits) == 1 and first.model is second.model
    assert [first.adapter_name, second.adapter_name] == ["first", "second"] == list(first.model.peft_config)
    for result in (first, second):
        assert result.metrics["kl"]["translated"] < result.metrics["kl"]["target"]
        config = result.model.peft_config[result.adapter_name]
        assert config.source_adapter_name_or_path.endswith(result.adapter_name)
    assert second.metrics["source"]["rank"] == 2 and len(second.module_map.kernels) < len(first.module_map.kernels)
    here = {name: logits(first.model, name) for name in ("first", "second")}
    assert not torch.allclose(here["first"], here["second"], atol=1e-3)
    for result in (first, second):
        result.save_pretrained(tmp_path / "saved")
        alone = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(target_folder), tmp_path / "saved" / result.adapter_name
        )
        torch.testing.assert_close(logits(alone, "default"), here[result.adapter_name], rtol=1e-4, atol=1e-5)
        assert (tmp_path / "saved" / result.adapter_name / "cast_metrics.json").exists()


def test_a_shared_fit_is_each_adapters_own(source_folder, target_folder, loras):
    options = {**OPTIONS, "steps": 0, "ridge": 0.1, "gain": 1.0, "text": c4_texts(30), "fit_text": c4_texts(60)[30:]}
    together = peft_cast.translate(source_folder, loras, target_folder, **options)
    for lora, result in zip(loras, together):
        alone = peft_cast.translate(source_folder, lora, target_folder, **options)
        torch.testing.assert_close(
            logits(result.model, result.adapter_name), logits(alone.model, "default"), rtol=1e-3, atol=1e-4
        )


def test_each_has_its_own_text_and_name(source_folder, target_folder, loras):
    texts = {"a": c4_texts(12), "b": c4_texts(30)[12:]}
    results = peft_cast.translate(
        source_folder, loras, target_folder, text=texts, adapter_name=["a", "b"], **{**OPTIONS, "steps": 2}
    )
    assert [r.adapter_name for r in results] == ["a", "b"]
    assert results[0].metrics["text"]["target_tokens"] != results[1].metrics["text"]["target_tokens"]


@pytest.fixture(scope="module")
def run(source_folder, loras, target_folder):
    """Translates both adapters into a folder."""
    return lambda folder, **options: peft_cast.translate(
        source_folder, loras, target_folder, text=c4_texts(30), output_dir=folder, **{**OPTIONS, **options}
    )


@pytest.fixture(scope="module")
def earlier(run, tmp_path_factory):
    """The folder of a finished run with other settings, which a new one replaces."""
    folder = tmp_path_factory.mktemp("earlier")
    run(folder, steps=2, seed=3)
    return folder


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The folder of an uninterrupted run, and its results."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


@pytest.mark.parametrize("step", [None, 3, 9], ids=["before the first", "in the first", "in the second"])
def test_a_stopped_run_of_several_ends_where_an_uninterrupted_one_does(
    step, run, earlier, whole, target_folder, tmp_path, monkeypatch
):
    shutil.copytree(earlier, tmp_path / "stopped")
    begun, loss = [], CastTrainer.compute_loss

    def stopping(self, *args, **kwargs):
        begun.append(step)
        if len(begun) == step + 1:
            raise KeyboardInterrupt
        return loss(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="what was done.*is kept in"):
        patch.setattr(CastTrainer, "compute_loss", stopping)
        if step is None:
            patch.setattr(
                "peft_cast.fit.initial.fit_closed_form", lambda *a, **o: (_ for _ in ()).throw(KeyboardInterrupt())
            )
        run(tmp_path / "stopped")
    with pytest.raises(ValueError, match="holds a run that was stopped: pass `resume_from_checkpoint=True`"):
        run(tmp_path / "stopped")
    with pytest.raises(ValueError, match="`seed` was 0 and is 1"):
        run(tmp_path / "stopped", resume_from_checkpoint=True, seed=1)
    if step is not None:
        monkeypatch.setattr("peft_cast.fit.initial.fit_closed_form", lambda *a, **o: pytest.fail("fitted again"))
    torch.manual_seed(99)
    resumed = run(tmp_path / "stopped", resume_from_checkpoint=True)
    for before, after, name in zip(whole[1], resumed, ("first", "second")):
        files = [load_file(at / name / "adapter_model.safetensors") for at in (whole[0], tmp_path / "stopped")]
        assert files[0].keys() == files[1].keys() and all(
            torch.equal(files[0][key], files[1][key]) for key in files[0]
        )
        assert before.metrics["kl"] == after.metrics["kl"] and after.adapter_name == name
        assert torch.equal(logits(before.model, name), logits(after.model, name))
        alone = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(target_folder), tmp_path / "stopped" / name
        )
        torch.testing.assert_close(logits(alone, "default"), logits(after.model, name), rtol=1e-4, atol=1e-5)


def test_what_is_for_one_adapter_only(source_folder, target_folder, loras, tmp_path):
    for options, message in (
        ({"beta": 0.1}, "one adapter at a time"),
        ({"bridge": tmp_path}, "one adapter at a time"),
        ({"adapter_name": ["a.b", "c"]}, "cannot be called 'a.b'"),
        ({"adapter_name": ["../b", "c"]}, "cannot be called '../b'"),
        ({"output_dir": Path(loras[0]).parent}, "would be overwritten while it is read"),
        ({"depth_map": "similarity"}, "one adapter at a time"),
        ({"adapter_name": ["same", "same"]}, "all different"),
        ({"adapter_name": ["alone"]}, "2 names"),
        ({"adapter_name": "mine"}, "must be a list of names, one for each adapter, got 'mine'"),
        ({"adapter_name": [1, 2]}, r"must be a list of names, one for each adapter, got \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            peft_cast.translate(source_folder, loras, target_folder, text=c4_texts(9), **OPTIONS, **options)
    for names, message in (
        (("first",), "no text for the adapter 'second': it has first"),
        (("first", "second", "third"), "a text for 'third', which is the name of no adapter: first, second are"),
    ):
        with pytest.raises(ValueError, match=message):
            text = dict.fromkeys(names, c4_texts(9))
            peft_cast.translate(source_folder, loras, target_folder, text=text, **OPTIONS)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), loras[0])
    with pytest.raises(ValueError, match="folders or hub ids"):
        peft_cast.translate(source_folder, [model], target_folder, text=c4_texts(9))
