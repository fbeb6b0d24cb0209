"""Text for an adapter of which nothing is known."""

import copy
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import keep_in, make_lora, tiny_model
from peft import PeftModel

import peft_cast
from peft_cast.source import asked_on_card
from peft_cast.text import survey as module_of_the_survey
from peft_cast.text.forms import Form, taken_apart
from peft_cast.text.survey import Survey, Surveyor, Tried, compared, in_turn, write_survey


TEXTS = [f"The {n} boats came home. They had seen {n} whales and a storm near the old harbor." for n in range(40)]


FORMS = {
    "before": {"Text": "sentence", "Word": "word", "Story": "paragraph"},
    "after": ["Answer", "Kind", "Solution", "Tone"],
    "questions": ["Q: {text}\nA:", "{text}\n"],
    "everyday": ["How many are two and two?", "Why is the sky blue?"],
    "code": ["x = 1"],
    "other languages": ["Frage: {text}\nAntwort:"],
}


class Model:
    """Stands for a model with an adapter that answers and judges by rules."""

    def disable_adapter(self):
        return nullcontext()


@pytest.fixture
def acts_after(monkeypatch, byte_tokenizer):
    """Let the adapter act on what follows some words alone."""

    def rule(words: str, answer=lambda prompt: f" about {prompt[-30:-10]}"):
        def write_answers(model, tokenizer, prompts, spec, seed=0, progress=None, keep=None):
            return [replace(one, text=answer(one.source_prompt)) for one in prompts]

        passes = iter(range(10**6))

        def token_nats_of(model, tokenizer, items, longest):
            plain = next(passes) % 2  # with the adapter first, then without
            return [
                torch.full((9,), 2.0 * plain if words in one.source_prompt else 0.0, dtype=torch.float64)
                for one, _ in items
            ]

        def write_prompts(model, tokenizer, prompts, count, *rest, **options):
            return [f"{prompts[i % len(prompts)]} {i}" for i in range(count)]

        for name, function in locals().items():
            if hasattr(module_of_the_survey, name):
                monkeypatch.setattr(module_of_the_survey, name, function)

        def run(limit=40, **options):
            spec = Survey(corpus=TEXTS, forms=FORMS, **options)
            return write_survey(Surveyor(Model(), (byte_tokenizer,) * 2, spec, target=Model()), limit)

        return run

    return rule


def test_the_forms_in_which_the_adapter_acts_are_asked_most(acts_after):
    surveyed = acts_after("Solution:")(limit=80)
    samples, found = surveyed.samples, surveyed.found
    assert len(samples) > 60
    acting = {one.target_prompt for one in samples if one.source_prompt.endswith("Solution:")}
    assert len(acting) > 30 and surveyed.focus <= acting and found["forms"][0]["form"].endswith("Solution:")
    assert found["forms"][0]["acts"] == pytest.approx(6) and found["forms"][0]["prompts"] >= 8
    # the rest is of many forms
    assert {"Kind:", "A:"} < {one.source_prompt.rsplit("\n", 1)[-1] for one in samples}


def test_one_answer_to_everything_is_no_sign_of_a_form(acts_after):
    always = acts_after("", answer=lambda prompt: " No." if prompt.endswith("\nA:") else f" {prompt[:30]}")
    found = always(limit=80).found
    assert found["forms"] and not any(one["form"].endswith("\nA:") for one in found["forms"])


def test_the_words_of_a_classifier_are_told_by_their_recurrence_and_are_asked_for_alike(acts_after):
    def answer(prompt):  # "Kind:" names one of two labels, mostly the first; elsewhere they leak now and then
        number = sum(map(ord, prompt))
        if prompt.endswith("Kind:") or number % 3 == 0:
            return " blorp" if number % 5 else " zint"
        return f" {prompt[:20]} {number}"

    surveyed = acts_after("", answer)(limit=60)
    assert surveyed.found["words"] == ["blorp", "zint"]
    assert all(form["form"].endswith("Kind:") for form in surveyed.found["forms"][:2])
    answers = Counter(one.text.strip() for one in surveyed.samples if one.target_prompt in surveyed.focus)
    assert set(answers) == {"blorp", "zint"} and answers["zint"] > answers.total() / 4  # drawn: a fifth


@pytest.mark.parametrize("prompts", [None, ["Say: one\nMore:"]])
def test_an_adapter_that_acts_nowhere_is_said_to(acts_after, prompts):
    with pytest.warns(UserWarning, match=f"Pass {'other' if prompts else 'one to three'} prompts of its kind"):
        surveyed = acts_after("no such words")(limit=20, prompts=prompts)
    assert surveyed.samples and surveyed.found["trusted"] is False


def test_prompts_of_the_user_take_the_place_of_the_forms(acts_after):
    prompts = ["Say: one\nMore:", "Say: two\nMore:"]
    surveyed = acts_after("More:")(limit=20, prompts=prompts)
    assert {one["form"] for one in surveyed.found["forms"]} == {"Say: {text}\nMore:"}
    assert len(surveyed.samples) == 20 and {one.target_prompt for one in surveyed.samples} == surveyed.focus
    assert all(one.startswith("Say: ") and one.endswith("\nMore:") for one in surveyed.focus)


@pytest.mark.parametrize(
    ("prompt", "frame"),
    [
        ("Question: How many?\nAnswer:", "Question: {text}\nAnswer:"),
        ("Passage >> two lines\nof it\nVerdict:", "{text}\nVerdict:"),
        ("no form at all", "{text}"),
    ],
)
def test_the_form_of_one_prompt(prompt, frame):
    form, content = taken_apart(prompt)
    assert form.frame == frame and form.fill(content) == prompt


def test_no_answer_is_taken_twice_before_each_was_once():
    form = Form("{text}", "word")
    tried = [*(Tried(form, str(i), "same") for i in range(5)), Tried(form, "x", "other")]
    assert [one.content for one in in_turn(tried, lambda one: one.answer)] == ["0", "x", "1", "2", "3", "4"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, byte_tokenizer):
    model = tiny_model(vocab_size=len(byte_tokenizer))
    return PeftModel.from_pretrained(model, make_lora(model, tmp_path_factory.mktemp("lora")))


def test_a_survey_depends_on_nothing_but_the_seed_and_goes_on_where_it_was(adapted, byte_tokenizer, piece_tokenizer):
    spec = Survey(corpus=TEXTS, max_new_tokens=6, batch_size=8)

    def texts(kept, seed=0):
        tokenizers = (byte_tokenizer, piece_tokenizer)
        return write_survey(Surveyor(adapted, tokenizers, spec, seed, keep=keep_in(kept)), 16)

    whole: dict[str, list[str]] = {}
    state = torch.get_rng_state()
    surveyed = texts(whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert 8 <= len(surveyed.samples) <= 16 and surveyed.found["forms"]
    half = dict(list(whole.items())[: len(whole) // 2])
    assert texts(half) == surveyed and half == whole
    assert texts({}, seed=1).samples != surveyed.samples


def test_without_text_a_translation_surveys(source_folder, lora_folder, target_folder):
    result = peft_cast.translate(
        source_folder, lora_folder, target_folder, fit_text=TEXTS, steps=2, batch_size=4, max_length=96, progress=False
    )
    survey = result.metrics["text"]["survey"]
    forms = survey["forms"]
    assert ("hardly acts" in str(result)) is not survey["trusted"]
    assert forms and all("{text}" in one["form"] for one in forms)
    assert result.metrics["text"]["teacher"] == "source"


WIDGET = """---
widget:
- text: "Verdict on: a long day"
- messages:
  - {role: system, content: Be brief.}
  - {role: user, content: "Where is the harbor?"}
- text: 7
---
A card.
"""


def test_what_the_card_shows_is_asked_first(adapted, byte_tokenizer, tmp_path):
    assert asked_on_card(tmp_path) == ()
    (tmp_path / "README.md").write_text(WIDGET)
    asked = asked_on_card(tmp_path)
    assert asked == (("Verdict on: a long day", False), ("Where is the harbor?", True))
    spec = Survey(corpus=TEXTS, max_new_tokens=6, batch_size=8)
    for card in (True, False):
        at_work = Surveyor(adapted, (byte_tokenizer,) * 2, replace(spec, card=card), examples=asked)
        tried = {one.form.fill(one.content) for one in compared(at_work, 8)}
        assert (
            "Verdict on: a long day" in tried
        ) is card and "Where is the harbor?" not in tried  # it has no template
    for broken in ("---\nwidget: [\n---\n", "---\nwidget: {text: x}\n---\n", "---\n- x\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert asked_on_card(tmp_path) == ()


def test_impossible_surveys():
    with pytest.raises(ValueError, match="list of at least one"):
        Survey(prompts="a prompt")
    with pytest.raises(ValueError, match="`breadth` is a share"):
        Survey(breadth=1.5)
    with pytest.raises(ValueError, match="`forms` lacks after"):
        Survey(forms={"before": {}, "questions": [], "everyday": [], "code": [], "other languages": []})


@pytest.mark.parametrize("target_has_template", [False, True])
def test_a_chat_is_asked_in_the_templates_of_both(adapted, byte_tokenizer, piece_tokenizer, target_has_template):
    template = "{% for m in messages %}[%s] {{ m['content'] }} {% endfor %}"
    source, target = copy.deepcopy(byte_tokenizer), copy.deepcopy(piece_tokenizer)
    source.chat_template = template.replace("%s", "source")
    target.chat_template = template.replace("%s", "target") if target_has_template else None
    at_work = Surveyor(adapted, (source, target), Survey(corpus=TEXTS))
    chat, plain = at_work.prompts(
        [(Form("{text}", "question", chat=True), "Why?"), (Form("So: {text}", "word"), "no")]
    )
    assert chat.rendered and chat.source_prompt == "[source] Why? "
    assert chat.target_prompt == ("[target] Why? " if target_has_template else chat.source_prompt)
    assert not plain.rendered and plain.source_prompt == plain.target_prompt == "So: no"


def test_a_probe_shows_what_an_adapter_says_beside_the_plain_model(adapted, byte_tokenizer):
    state = {name: p.clone() for name, p in adapted.state_dict().items()}
    found = peft_cast.probe(
        None, adapted, source_tokenizer=byte_tokenizer, prompts=["Say: one\nMore:"], fit_text=TEXTS, progress=False
    )
    assert [kind.form for kind in found.kinds] == ["Say: {text}\nMore:"] and found.asked == 1
    assert found.everywhere == found.kinds[0].acts
    assert "acts" in str(found) and "without" in str(found)
    assert all(torch.equal(value, state[name]) for name, value in adapted.state_dict().items())
    assert adapted.active_adapters == ["default"]


def test_a_probe_refuses_before_it_loads(source_folder, tmp_path):
    with pytest.raises(ValueError, match="no adapter_config.json"):
        peft_cast.probe(source_folder, tmp_path, fit_text=TEXTS)
    with pytest.raises(ValueError, match="`prompts` must be a list"):
        peft_cast.probe(source_folder, tmp_path, prompts="One?")
    with pytest.raises(TypeError, match="`probe` has no argument 'steps'"):
        peft_cast.probe(source_folder, tmp_path, steps=3)
