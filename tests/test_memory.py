"""The teacher's predictions are made once per text and kept, in memory and between runs."""

import pytest
import torch
from conftest import c4_texts
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast.align.batches import collate_pairs
from peft_cast.models.loading import fingerprint
from peft_cast.options import Training
from peft_cast.refine.cache import TeacherCache, TopKLogProbs
from peft_cast.refine.losses import Predictions, kl_divergence, whole
from peft_cast.refine.teacher import Teacher


def test_kl_of_the_likeliest_tokens_is_that_of_all_with_the_others_as_one():
    teacher, student = 3 * torch.randn(20, 50), 3 * torch.randn(20, 50)
    found = TopKLogProbs.of(teacher, 8).kl_divergence(student)
    p, q = teacher.softmax(-1), student.softmax(-1)
    top = p.topk(8).indices
    p, q = (torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q))
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1), rtol=5e-3, atol=2e-3)
    assert (found <= kl_divergence(teacher, student) + 2e-3).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_of_all_tokens_is_the_ordinary_one(temperature):
    teacher, student = 3 * torch.randn(20, 50), 3 * torch.randn(20, 50)
    found = TopKLogProbs.of(teacher, 128, temperature).kl_divergence(student, temperature)
    torch.testing.assert_close(found, kl_divergence(teacher, student, temperature), rtol=5e-3, atol=5e-3)


def test_gradients_are_finite_where_the_teacher_is_certain():
    teacher = torch.tensor([[80.0, 0.0, 0.0, 0.0]])
    student = torch.tensor([[60.0, 0.0, 1.0, 0.0]], requires_grad=True)
    TopKLogProbs.of(teacher, 2).kl_divergence(student).sum().backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(("k", "temperature"), [(8, 1.0), (8, 2.0), (50, 1.0)])
def test_its_gradient_is_that_of_its_value(k, temperature, monkeypatch):
    monkeypatch.setattr("peft_cast.refine.losses.rows_at_once", lambda _: 3)  # blocks, the last of them smaller
    goal = TopKLogProbs.of(3 * torch.randn(7, 50), k, temperature)
    tokens = goal.tokens.long()
    p = goal.log_p[:, : 9 if k == 8 else 50].double().exp()
    student = (3 * torch.randn(7, 50)).double().requires_grad_(True)
    q = (student / temperature).softmax(-1)
    at = q.gather(-1, tokens)
    q = torch.cat([at, 1 - at.sum(-1, keepdim=True)], -1) if k == 8 else at
    expected = (p * (p / q).log()).sum(-1) * temperature**2
    weights = torch.rand(7)
    (expected * weights).sum().backward()
    mine = student.detach().float().requires_grad_(True)
    found = goal.kl_divergence(mine, temperature)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.grad, student.grad.float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [8, 50])
def test_from_the_states_that_a_head_reads_value_and_gradient_are_the_same(k, monkeypatch):
    monkeypatch.setattr("peft_cast.refine.losses.rows_at_once", lambda _: 3)
    monkeypatch.setattr("peft_cast.refine.losses.positions_together", lambda *_: 6)
    head, states, goal = torch.nn.Linear(16, 50).requires_grad_(False), torch.randn(20, 16), 3 * torch.randn(20, 50)
    weights, first, second = torch.rand(20), states.clone().requires_grad_(True), states.clone().requires_grad_(True)
    kept = TopKLogProbs.of(goal, k)
    expected, found = kept.kl_divergence(head(first)), kept.kl_divergence(Predictions(second, head))
    torch.testing.assert_close(found, expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(second.grad, first.grad)
    assert first.grad.abs().min(dim=-1).values.max() > 0
    torch.testing.assert_close(kl_divergence(goal, Predictions(states, head)), kl_divergence(goal, head(states)))
    blocks = list(Predictions(states, head).split(3))
    assert [len(block) for block in blocks] == [3] * 6 + [2]
    torch.testing.assert_close(torch.cat(blocks), whole(Predictions(states, head)))


def pair_of_texts(tokenizer, count=3):
    return peft_cast.align.align_texts(c4_texts(count), tokenizer, tokenizer, max_length=40)


def test_every_text_is_made_once_and_told_apart(byte_tokenizer):
    texts, calls = pair_of_texts(byte_tokenizer), []

    def make(absent):
        calls.append(absent)
        return torch.cat([torch.full((2, 10), float(texts.index(text))) + torch.arange(10.0) for text in absent])

    memory = TeacherCache(k=4)
    first = memory.get_or_make("teacher", texts[:2], [2, 2], make)
    second = memory.get_or_make("teacher", [texts[2], texts[1], texts[2]], [2, 2, 2], make)
    assert [len(c) for c in calls] == [2, 1] and first.tokens.shape == (4, 4) and second.tokens.shape == (6, 4)
    torch.testing.assert_close(second.log_p[2:4], first.log_p[2:])
    memory.get_or_make("target", texts[:1], [2], make)
    assert len(calls) == 3  # another role


def test_what_does_not_fit_is_made_again(byte_tokenizer):
    texts, calls = pair_of_texts(byte_tokenizer, 1), []

    def make(absent):
        calls.append(absent)
        return torch.randn(2, 10)

    memory = TeacherCache(k=4, limit=10)
    for _ in range(2):
        memory.get_or_make("teacher", texts, [2], make)
    assert len(calls) == 2 and memory.bytes == 0


def test_a_folder_serves_the_next_run_and_survives_a_broken_file(byte_tokenizer, tmp_path):
    texts = pair_of_texts(byte_tokenizer, 2)
    logits = torch.randn(4, 10)
    made = TeacherCache(4, folder=tmp_path, identity="a").get_or_make("teacher", texts, [2, 2], lambda _: logits)
    again = TeacherCache(4, folder=tmp_path, identity="a").get_or_make("teacher", texts, [2, 2], lambda _: 1 / 0)
    assert torch.equal(made.tokens, again.tokens) and torch.equal(made.log_p, again.log_p)
    with pytest.raises(ZeroDivisionError):
        TeacherCache(4, folder=tmp_path, identity="b").get_or_make("teacher", texts, [2, 2], lambda _: 1 / 0)
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    mended = TeacherCache(4, folder=tmp_path, identity="a").get_or_make("teacher", texts, [2, 2], lambda _: logits)
    assert torch.equal(made.tokens, mended.tokens)


def test_fingerprints_tell_adapters_apart(source_folder, lora_folder):
    plain, adapted = (AutoModelForCausalLM.from_pretrained(source_folder) for _ in range(2))
    adapted = PeftModel.from_pretrained(adapted, lora_folder)
    before = fingerprint(adapted)
    assert before == fingerprint(adapted) != fingerprint(plain)
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_B" in n).mul_(1.01)
    assert fingerprint(adapted) != before


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_remembered_goals_are_the_teachers(share, source_folder, lora_folder, byte_tokenizer):
    source, target = (AutoModelForCausalLM.from_pretrained(source_folder) for _ in range(2))
    adapted = PeftModel.from_pretrained(source, lora_folder).eval()
    student = get_peft_model(target, peft_cast.CastConfig(target_modules=["q_proj"], init_weights=False)).eval()
    first, second, anchor = pair_of_texts(byte_tokenizer)
    teacher = Teacher(adapted, Training(teacher=share, teacher_top_k=10**6))
    goal, _ = teacher.goals(student, collate_pairs([first, second], [anchor]))
    teacher.cached_goals(student, [second], [])  # the other text and the anchor are new in the second call
    kept = teacher.cached_goals(student, [first, second], [anchor])
    goal = whole(goal)
    logits = torch.randn_like(goal)
    torch.testing.assert_close(kept.kl_divergence(logits), kl_divergence(goal, logits), rtol=1e-2, atol=1e-2)


def test_translations_share_a_cache(source_folder, lora_folder, target_folder, tmp_path, monkeypatch):
    options = {"text": c4_texts(20), "steps": 4, "batch_size": 4, "fit_samples": 8, "max_length": 40, "gamma": 1.0}
    folders = source_folder, lora_folder, target_folder
    alone = peft_cast.translate(*folders, **options, progress=False)
    peft_cast.translate(*folders, **options, cache_dir=tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(TeacherCache, "_write", lambda *_: pytest.fail("a text was made again"))
        patch.setattr("peft_cast.fit.initial.fit_closed_form", lambda *_, **__: pytest.fail("fitted again"))
        cached = peft_cast.translate(*folders, **options, cache_dir=tmp_path, progress=False)
    assert cached.metrics["kl"]["translated"] == pytest.approx(alone.metrics["kl"]["translated"], rel=1e-4)
    assert cached.metrics["closed_form"] == alone.metrics["closed_form"]
    for file in tmp_path.glob("closed_form_*"):
        file.write_bytes(b"broken")
    mended = peft_cast.translate(*folders, **options, cache_dir=tmp_path, progress=False)
    assert mended.metrics["closed_form"] == alone.metrics["closed_form"]


def test_the_heap_is_given_back_as_a_refinement_goes_on(source_folder, lora_folder, target_folder, monkeypatch):
    given, give_back = [], peft_cast.utils.phases.give_back_memory
    monkeypatch.setattr("peft_cast.refine.trainer.give_back_memory", lambda: given.append(give_back()))
    options = {"text": c4_texts(12), "batch_size": 2, "fit_samples": 4, "max_length": 32, "progress": False}
    peft_cast.translate(source_folder, lora_folder, target_folder, **options, steps=3)
    assert len(given) == 3
