"""The truth on the real pair: SmolLM2-135M-Instruct (Llama) and Gemma-3-270m, on real text."""

import subprocess
import sys

import models
import pytest
import torch
from conftest import ROOT, c4_texts
from transformers import AutoTokenizer

import peft_cast
from peft_cast.align.tokens import align_texts
from peft_cast.align.vocab import shared_vocabulary


LORA = ROOT / "examples" / "adapters" / "smollm2-135m-gsm8k"


@pytest.fixture(scope="module")
def tokenizers():
    return AutoTokenizer.from_pretrained(models.smollm2()), AutoTokenizer.from_pretrained(models.gemma3())


def test_shared_vocabulary_of_the_real_tokenizers(tokenizers):
    source, target = tokenizers
    vocabulary = shared_vocabulary(source, target, source_size=49152, target_size=262144)
    assert len(vocabulary) >= 45_592  # design, section 2
    pairs = dict(zip(vocabulary.source_ids.tolist(), vocabulary.target_ids.tolist()))
    assert len(pairs) == len(vocabulary) == len(set(pairs.values()))
    for text in (" the", "\n", "7", " Question", "é", "####", "\t", " \u4e2d"[1:]):
        source_ids = source(text, add_special_tokens=False).input_ids
        if len(source_ids) == 1:
            assert target.decode([pairs[source_ids[0]]]) == text
    assert pairs[source.eos_token_id] == target.eos_token_id


def test_token_alignment_of_the_real_tokenizers_on_c4(tokenizers):
    pairs = align_texts(c4_texts(100), *tokenizers, max_length=512, skip=0)
    # all of the target's tokens that are inside the part of the text both models read, BOS aside
    partners = sum(len(p.target_positions) for p in pairs)
    tokens = sum(max(p.target_positions) for p in pairs)
    assert partners / tokens >= 0.985
    source, target = tokenizers
    for pair in pairs[:20]:
        for s, t in list(zip(pair.source_positions, pair.target_positions))[::25]:
            assert source.decode(pair.source_ids[: s + 1]) == target.decode(pair.target_ids[1 : t + 1])


def test_translation_between_the_real_models(tmp_path):
    result = peft_cast.translate(
        models.smollm2(),
        LORA,
        models.gemma3(),
        text=peft_cast.SelfWritten(prefix="Question:", max_new_tokens=40, batch_size=16, samples=16),
        fit_text=c4_texts(6),
        fit_samples=6,
        eval_samples=4,
        steps=12,
        batch_size=4,
        max_length=48,
        report_samples=0,
        report_similarity=False,
        progress=False,
    )
    kl = result.metrics["kl"]
    assert kl["translated"] < 0.85 * kl["target"]
    assert kl["translated"] < kl["closed_form"]
    fits = [fit for fits in result.metrics["closed_form"]["modules"].values() for fit in fits]
    assert len(fits) == 30 * 7 and len(result.metrics["closed_form"]["modules"]) == 18 * 7
    trained, lora = (result.metrics["parameters"][name] for name in ("trained", "source_lora"))
    assert lora == 2_442_240 and trained < 2.5 * lora

    result.save_pretrained(tmp_path / "cast", dtype=torch.float32)  # as in memory; by default as its source
    ids = torch.arange(1000, 1016)[None]
    with torch.no_grad():
        torch.save(result.model(input_ids=ids).logits, tmp_path / "logits.pt")
    script = f"""
import torch, peft_cast
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(r"{models.gemma3()}", dtype=torch.float32)
model = PeftModel.from_pretrained(model, r"{tmp_path / "cast"}")
with torch.no_grad():
    logits = model(input_ids=torch.arange(1000, 1016)[None]).logits
assert torch.equal(logits, torch.load(r"{tmp_path / "logits.pt"}")), "logits differ"
print("identical")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip().endswith("identical"), done.stderr
