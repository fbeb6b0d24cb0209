"""The target as its own teacher, shown what the adapted source answers."""

import pytest
import torch
from conftest import c4_texts, save_model, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_cast
from peft_cast import SelfWritten
from peft_cast.align import collate_pairs
from peft_cast.models import continuations, keeps_prefixes
from peft_cast.options import Training
from peft_cast.refine.losses import whole
from peft_cast.refine.shown import open_teacher
from peft_cast.source.pair import open_pair
from peft_cast.text.samples import TextSample
from peft_cast.text.shown import EXAMPLES, align_shown, shown_prompts


PROMPTS = tuple(f"Say: thing number {i}" for i in range(6))
OPTIONS = {
    "text": SelfWritten(prompts=PROMPTS, more_prompts=0, max_new_tokens=12),
    "fit_text": c4_texts(30),
    "batch_size": 4,
    "fit_samples": 8,
    "eval_samples": 4,
    "max_length": 48,
    "steps": 8,
    "dtype": torch.float32,
    "progress": False,
}


@pytest.fixture(scope="module")
def models(source_folder, lora_folder, target_folder):
    return source_folder, lora_folder, target_folder


@pytest.fixture(scope="module")
def shown(models):
    return peft_cast.translate(*models, teacher="shown", **OPTIONS)


def answers(count, text="{i} is a fine thing"):
    return [TextSample(text.format(i=i), f"Source: {i}", f"Target: {i}") for i in range(count)]


def test_every_prompt_has_other_prompts_with_their_answers_before_it(piece_tokenizer):
    prompts = shown_prompts(answers(9), piece_tokenizer, seed=1)
    prompts.sort(key=lambda one: one.target_prompt)
    assert [p.target_prompt for p in prompts] == [f"Target: {i}" for i in range(9)]
    for i, prompt in enumerate(prompts):
        *examples, last = prompt.source_prompt.split(f"{piece_tokenizer.eos_token}\n\n")
        assert last == f"Target: {i}" and prompt.text == "" and len(set(examples)) == EXAMPLES
        shown = {one.removeprefix("Target: ").split(" ")[0] for one in examples}
        assert str(i)[0] not in {one[0] for one in shown}
    assert prompts != shown_prompts(answers(9), piece_tokenizer, seed=2)


def test_answers_that_were_cut_are_not_shown(piece_tokenizer):
    cut = [TextSample("and so on " * 9, "s", f"Target: long {i}") for i in range(5)]
    prompts = shown_prompts([*answers(5), *cut], piece_tokenizer, longest=30)
    assert len(prompts) == 10 and not any("and so on" in prompt.source_prompt for prompt in prompts)
    all_cut = shown_prompts(cut, piece_tokenizer, longest=30)  # there is nothing better
    assert all("and so on" in prompt.source_prompt for prompt in all_cut)
    with pytest.raises(ValueError, match="answers to 3 prompts, and more than 3 are needed"):
        shown_prompts(answers(3), piece_tokenizer)


def test_the_answer_is_compared_with_the_examples_and_without(piece_tokenizer):
    samples = [TextSample(" five boxes", "Target: one four</s>\n\nTarget: two", "Target: two")]
    (pair,) = align_shown(piece_tokenizer, samples, max_length=64)
    same = [(pair.source_ids[s], pair.target_ids[t]) for s, t in zip(pair.source_positions, pair.target_positions)]
    assert all(a == b for a, b in same) and len(same) > 2
    assert len(pair.source_ids) > len(pair.target_ids)
    (cut,) = align_shown(piece_tokenizer, samples, max_length=pair.target_positions[1] + 1)
    assert cut.target_positions == pair.target_positions[:2] and len(cut.target_ids) == pair.target_positions[1] + 1
    assert not align_shown(piece_tokenizer, samples, max_length=4)


def test_the_target_comes_nearer_to_itself_with_examples(shown):
    kl = shown.metrics["kl"]
    assert kl["translated"] < 0.9 * kl["target"] and kl["target"] == pytest.approx(
        shown.metrics["excitement"], rel=0.01
    )
    assert shown.metrics["text"]["shown"] > 3


def test_its_goal_is_the_untouched_target_after_the_examples(models, piece_tokenizer):
    samples = [TextSample(" five boxes", "Target: one four</s>\n\nTarget: two", "Target: two")]
    pairs = align_shown(piece_tokenizer, samples, max_length=64)
    with open_pair(*models) as pair:
        teacher = open_teacher(pair, Training(teacher="shown", gamma=0.0))
        with torch.no_grad():
            logits = pair.target(torch.tensor([pairs[0].source_ids])).logits[0, list(pairs[0].source_positions)]
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(pair.target, config).eval()
        with teacher.heads(pair):
            goal, _ = teacher.goals(model, collate_pairs(pairs))
            student, _ = teacher.student(model, model, collate_pairs(pairs))
        model.unload()
    torch.testing.assert_close(whole(goal), logits, rtol=1e-3, atol=1e-4)
    assert whole(student).shape == logits.shape and (whole(student) - logits).abs().max() > 0.01


def test_a_stopped_run_is_shown_the_same(models, shown, tmp_path):
    with_folder = peft_cast.translate(*models, teacher="shown", output_dir=tmp_path, **OPTIONS)
    assert with_folder.metrics["kl"] == pytest.approx(shown.metrics["kl"], rel=1e-4)


def test_a_lora_distilled_from_scratch_has_the_same_teacher(models, shown):
    result = peft_cast.baselines.distill_lora(*models, teacher="shown", **OPTIONS)
    assert result.metrics["kl"]["target"] == pytest.approx(shown.metrics["kl"]["target"], rel=1e-3)


def test_it_learns_on_its_own_words_too(models):
    own = peft_cast.translate(*models, teacher="shown", **OPTIONS, on_policy_steps=4).metrics["on_policy"]
    assert own["steps"] == 4 and own["texts"] > 0


@pytest.mark.parametrize("surer, teacher", [("source", "source"), ("target", "shown")])
def test_the_model_that_minds_the_others_answers_more_is_believed(models, tmp_path, surer, teacher):
    source, lora, target = models
    for name, folder in (("source", source), ("target", target)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():  # a larger head makes a model surer of what it says
            model.lm_head.weight.mul_(4 if name == surer else 0.25)
        save_model(model, AutoTokenizer.from_pretrained(folder), tmp_path / name)
    text = SelfWritten(prompts=[f"Say: thing {i}" for i in range(16)], more_prompts=0, max_new_tokens=12)
    result = peft_cast.translate(
        tmp_path / "source", lora, tmp_path / "target", **{**OPTIONS, "text": text, "steps": 2}
    )
    found = result.metrics["text"]
    minds = found["minds"]
    assert found["teacher"] == teacher == result.metrics["settings"]["teacher"] and minds["prompts"] >= 4
    clearly = minds["target"] > max(1.5 * minds["source"], minds["source"] + 3 * minds["error"])
    assert clearly == (teacher == "shown") and (minds["target"] > minds["source"]) == (surer == "target")
    assert f"minds the target's answers by {minds['source']:.3f} nats" in result.summary()


@pytest.mark.parametrize("options", [{"text": c4_texts(30)}, {"beta": 0.1}, {"text": SelfWritten(prefix="Say")}])
def test_the_adapted_source_teaches_where_nothing_can_be_compared(models, options):
    found = peft_cast.translate(*models, **{**OPTIONS, "steps": 0, **options}).metrics["text"]
    assert found["teacher"] == "source" and "minds" not in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": c4_texts(30)}, "`teacher='shown'` needs prompts"),
        ({"beta": 0.1}, "The teacher `shown` has no hidden states"),
    ],
)
def test_what_it_does_not_go_with_is_one_clear_error(models, options, message):
    with pytest.raises(ValueError, match=message):
        peft_cast.translate(*models, teacher="shown", **{**OPTIONS, **options})


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt", "mixtral", "falcon_mq"])
def test_what_prompts_begin_with_is_read_once_and_answers_are_the_same(architecture, piece_tokenizer, monkeypatch):
    model = tiny_model(architecture, len(piece_tokenizer))
    heads = list(range(20, 90)), list(range(21, 120))
    prompts = [[*heads[i % 2], *range(30, 30 + i)] for i in (1, 8, 5, 2)]
    read = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    once = continuations(model, piece_tokenizer, prompts, 6)
    hook.remove()
    assert sorted(read[:2]) == [(1, 71), (1, 99)] and read[2][0] == 4 and read[2][1] < 8
    monkeypatch.setattr("peft_cast.models.prefixes.WORTH_IT", 10**6)
    assert once == continuations(model, piece_tokenizer, prompts, 6) and len(set(once)) > 1


@pytest.mark.parametrize("architecture", ["gemma3", "gpt_oss", "bloom"])
def test_a_model_that_keeps_more_than_keys_and_values_reads_prompts_whole(architecture, piece_tokenizer):
    model = tiny_model(architecture, len(piece_tokenizer))
    assert not keeps_prefixes(model)
    assert len(continuations(model, piece_tokenizer, [[*range(20, 90), 5], [*range(20, 90), 6, 7]], 3)) == 2


def test_examples_are_read_once_for_all_texts(models, piece_tokenizer, tmp_path):
    target = save_model(tiny_model("qwen2", len(piece_tokenizer)), piece_tokenizer, tmp_path)
    first, second = "Target: one four</s>\n\n", "Target: five boxes and a dog</s>\n\n"
    samples = [
        TextSample(f" {i} boxes", f"{before}Target: {'two ' * i}", f"Target: {'two ' * i}")
        for i, before in enumerate((first, second, first, second), 1)
    ]
    pairs = align_shown(piece_tokenizer, samples, max_length=64)
    with open_pair(*models[:2], target) as pair:
        teacher = open_teacher(pair, Training(teacher="shown", gamma=0.0))
        with torch.no_grad():
            logits = torch.cat(
                [pair.target(torch.tensor([one.source_ids])).logits[0, list(one.source_positions)] for one in pairs]
            )
        model = get_peft_model(pair.target, LoraConfig(r=2, target_modules=["q_proj"])).eval()
        for _ in range(2):
            goal, _ = teacher.goals(model, collate_pairs(pairs))
            torch.testing.assert_close(whole(goal), logits, rtol=1e-3, atol=1e-4)
        assert len(teacher.prefixes) == 2
        model.unload()
