"""Text for an adapter of which nothing is known."""

import copy
import json
import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import datasets
import pytest
import torch
from conftest import keep_in, make_lora, tiny_model
from peft import PeftModel

import peft_cast
from peft_cast.results.report.contents import contents
from peft_cast.source import Card, read_card
from peft_cast.text import survey as module_of_the_survey
from peft_cast.text.effort import PROMPT, _lines, effort_of
from peft_cast.text.forms import Form, drawn_forms, package_forms, taken_apart
from peft_cast.text.ranking import Tried, crossed, exciting, in_turn, ranked, recurring, the_best, weighed
from peft_cast.text.rows import read_asked
from peft_cast.text.survey import SHORT, Survey, Surveyor, compared, write_survey


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

    def named_modules(self):
        return ()  # none of them a table of learned positions


@pytest.fixture
def acts_after(monkeypatch, byte_tokenizer):
    """Let the adapter act on what follows some words alone."""

    def rule(words: str, answer=lambda prompt: f" about {prompt[-30:-10]}"):
        def write_answers(model, tokenizer, prompts, spec, seed=0, progress=None, keep=None):
            found = [replace(one, text=answer(one.source_prompt)) for one in prompts]
            if not any(one.text for one in found):
                raise ValueError("only empty texts")
            return [one for one in found if one.text]

        passes = iter(range(10**6))

        def token_nats_of(model, tokenizer, items, longest):
            plain = next(passes) % 2  # with the adapter first, then without
            return [
                torch.full((9,), 2.0 * plain if words in one.source_prompt else 0.0, dtype=torch.float64)
                for one, _ in items
            ]

        def moved_nats(model, tokenizer, prompts, batch_size):
            return torch.tensor([2.0 if prompt.endswith(words) else 0.0 for prompt in prompts])

        def write_prompts(model, tokenizer, prompts, count, *rest, **options):
            return [f"{prompts[i % len(prompts)]} {i}" for i in range(count)]

        for name, function in locals().items():
            if hasattr(module_of_the_survey, name):
                monkeypatch.setattr(module_of_the_survey, name, function)

        def run(limit=40, says=Card(), **options):
            spec = Survey(corpus=TEXTS, forms=FORMS, **options)
            return write_survey(Surveyor(Model(), (byte_tokenizer,) * 2, spec, target=Model(), card=says), limit)

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
def test_an_adapter_that_answers_nothing_is_told(acts_after, prompts):
    with pytest.raises(ValueError, match="ends at once whatever it is asked: pass prompts"):
        acts_after("", answer=lambda prompt: "")(limit=20, prompts=prompts)


def test_forms_in_which_it_ends_at_once_do_no_harm(acts_after):
    surveyed = acts_after("A:", answer=lambda prompt: f" {prompt[:9]}" if prompt.endswith("\nA:") else "")(limit=20)
    assert surveyed.samples and all(one.source_prompt.endswith("\nA:") for one in surveyed.samples)


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


def tried(form, content, answer, ratio=1.0):
    tokens = tuple(answer.split())
    return Tried(Form(form, "question"), content, answer, tokens, (ratio,) * len(tokens))


def test_what_an_adapter_says_everywhere_counts_more_than_what_it_says_once_or_in_circles():
    answers = {"{text} A:": "so #### {n}", "{text} B:": "hence #### {n}", "{text} C:": "as said #### {n}"}
    asked = [tried(form, str(n), answer.format(n=n)) for form, answer in answers.items() for n in range(4)]
    asked += [tried("{text} D:", str(n), f"{n}th {n}th {n}th") for n in range(4)]  # as likely as the others
    assert asked[0].acts == pytest.approx(3**0.5) == pytest.approx(asked[-1].acts)
    acts = weighed(asked)
    assert acts[asked[-1]] < 0.5 * min(acts[one] for one in asked[:8])
    assert list(ranked(asked))[-1].frame == "{text} D:"


def test_forms_are_compared_by_the_contents_on_which_the_adapter_acts():
    asked = [tried("{text} A:", str(n), f"{n} x", ratio=2.0 if n < 2 else 0.0) for n in range(4)]
    asked += [tried("{text} B:", str(n), f"{n} x", ratio=0.9) for n in range(4)]
    assert [form.frame for form in ranked(asked)] == ["{text} A:", "{text} B:"]
    assert exciting(asked, [Form("{text} A:", "question")]) == {"question": ["0", "1"]}


@pytest.mark.parametrize("chat_first", [True, False])
def test_where_a_chats_form_is_the_best_only_such_are_asked(chat_first):
    forms = [
        Form("{text}", "question", chat=True),
        Form("Q: {text}\nA:", "question"),
        Form("{text}", "code", chat=True),
    ]
    ratios = (1.0, 0.9, 0.8) if chat_first else (0.9, 1.0, 0.8)
    asked = [
        Tried(form, str(n), f"{n} x", (str(n), "x"), (ratio,) * 2)
        for form, ratio in zip(forms, ratios)
        for n in range(4)
    ]
    best = the_best(asked)
    assert best == [forms[0], forms[2]] if chat_first else set(best) == set(forms)


def test_every_chat_form_is_tried():
    chats = {form.content for form in drawn_forms(package_forms(), random.Random(3), 12, chat=True) if form.chat}
    assert chats == {"question", "paragraph", "sentence", "code"}


def test_words_of_good_forms_are_tried_in_each_others_places():
    forms = [Form("Word: {text}\nTone:", "word"), Form("Claim: {text}\nKind:", "sentence"), Form("{text}", "word")]
    assert [(one.frame, one.content) for one in crossed(forms)] == [
        ("Word: {text}\nKind:", "word"),
        ("Claim: {text}\nTone:", "sentence"),
    ]


def test_a_word_of_a_classifier_counts_in_one_spelling():
    texts = ["Ship", "ship", "Boat"]
    tried = [
        Tried(Form(f"{{text}} {n}", "word"), f"content {n}", text)
        for text in texts
        for n in range(5 if text == "ship" else 4)
    ]
    assert recurring(tried) == ["ship", "Boat"]
    assert recurring([one for one in tried if one.answer != "Boat"]) == []
    long = [replace(one, answer=f'{{"name": "{one.answer}", "city": null, "date": null}}') for one in tried]
    assert recurring(long) == []


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


def test_a_plan_knows_how_much_is_asked(adapted, byte_tokenizer, monkeypatch):
    asked, ask = [], Surveyor.ask
    monkeypatch.setattr(Surveyor, "ask", lambda self, items: asked.append(len(items)) or ask(self, items))
    spec = Survey(corpus=TEXTS, max_new_tokens=6, batch_size=64)
    write_survey(Surveyor(adapted, (byte_tokenizer,) * 2, spec), 80)
    asking = effort_of(spec, 80).source - _lines(spec).source - 80 * (PROMPT + spec.max_new_tokens)
    assert asking / (3 * (PROMPT + SHORT)) == pytest.approx(sum(asked), rel=0.3)


def test_without_text_a_translation_surveys(source_folder, lora_folder, target_folder):
    result = peft_cast.translate(
        source_folder, lora_folder, target_folder, fit_text=TEXTS, steps=2, batch_size=4, max_length=96, progress=False
    )
    survey = result.metrics["text"]["survey"]
    assert result.metrics["settings"]["gamma"] == 3  # whose many forms pull at the target in many places
    forms = survey["forms"]
    assert ("hardly acts" in str(result)) is not survey["trusted"]
    assert result.metrics["text"]["teacher"] == ("source" if survey["trusted"] else "delta")
    assert forms and all("{text}" in one["form"] for one in forms)


CARD = """---
widget:
- text: "Verdict on: a long day"
- messages:
  - {role: system, content: Be brief.}
  - {role: user, content: "Where is the harbor?"}
- text: 7
datasets:
- %s
- someone/data
- [7]
---
It's `Ask: {query}`.
"""


def test_what_the_card_shows_is_asked_first(adapted, byte_tokenizer, tmp_path, monkeypatch):
    assert read_card(tmp_path) == Card()
    (tmp_path / "README.md").write_text(CARD % tmp_path)
    asked = read_card(tmp_path)
    assert asked.examples == (("Verdict on: a long day", False), ("Where is the harbor?", True))
    assert asked.templates == ("Ask: {text}",) and asked.datasets == (str(tmp_path), "someone/data")
    with monkeypatch.context() as patched:
        patched.setattr("peft_cast.source.card.find_file", lambda *_: tmp_path / "README.md")
        assert read_card("someone/lora").datasets == ("someone/data",)  # no stranger's card leads to files here
    spec = Survey(corpus=TEXTS, max_new_tokens=6, batch_size=8)
    for card in (True, False):
        at_work = Surveyor(adapted, (byte_tokenizer,) * 2, replace(spec, card=card), card=replace(asked, datasets=()))
        tried = {one.form.fill(one.content) for one in compared(at_work, 8)}
        assert (
            "Verdict on: a long day" in tried
        ) is card and "Where is the harbor?" not in tried  # it has no template
        assert any(one.startswith("Ask: ") for one in tried) is card
    for broken in ("---\nwidget: [\n---\n", "---\nwidget: {text: x}\ndatasets: {a: b}\n---\n", "---\n- x\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert read_card(tmp_path) == Card()


def test_an_example_longer_than_learned_positions_is_left_out(byte_tokenizer, tmp_path):
    model = tiny_model("gpt2", max_position_embeddings=64)
    make_lora(model, tmp_path, target_modules=["c_attn"])
    at_work = Surveyor(PeftModel.from_pretrained(model, tmp_path), (byte_tokenizer,) * 2, Survey(corpus=TEXTS))
    long, short = ((Form("{text}", "given"), text) for text in ("word " * 60, "word"))
    assert [bool(one.tokens) for one in at_work.ask([long, short])] == [False, True]
    assert at_work.write(["word " * 60], 4) == [] and len(at_work.plain_answers(at_work.ask([long, short]))) == 2


@pytest.mark.parametrize(
    ("quoted", "templates"),
    [
        ("```\n### Ask:\n{prompt}\n\n### Say:\n```\n", ["### Ask:\n{text}\n\n### Say:"]),
        ("```python\nask = (\n    'Ask:\\n'\n    f\"{row['input']}\\nSay:\"\n)\n```\n", ["Ask:\n{text}\nSay:"]),
        ('```py\nask = f"""Ask:\n{text}\nSay:"""\n```\n', ["Ask:\n{text}\nSay:"]),
        ('```yaml\nformat: "[INST] {instruction} [/INST]"\n```\n', ["[INST] {text} [/INST]"]),
        ("".join(f"`{n}. Ask: {{user_input}}`\n" for n in range(9)), [f"{n}. Ask: {{text}}" for n in range(4)]),
        ('```\nprint(f"Asked: {question}")\n```\n', []),
        ('`{% if x %}Ask: {text}` `Ask: {{ text }}` `Ask: {input} {prompt}` `Ask: {other}` "{text}"', []),
        (f"`{'Ask ' * 125}{{text}}`", []),
        ("Ask: {text}", []),
    ],
)
def test_templates_quoted_on_a_card(tmp_path, quoted, templates):
    (tmp_path / "README.md").write_text(f"# A card that's short\n\n{quoted}")
    assert list(read_card(tmp_path).templates) == templates


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"messages": TURNS, "prompt": "So: why?"}, ("Why?", True)),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, ("Why?", True)),
        ({"prompt": TURNS}, ("Why?", True)),
        ({"prompt": "So: why?"}, ("So: why?", False)),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ("Add.\n\n1, 2", None)),
        ({"instruction": "Sing.", "input": ""}, ("Sing.", None)),
        ({"question": "Why?", "query": "no"}, ("Why?", None)),
        ({"query": "Why?"}, ("Why?", None)),
    ],
)
def test_what_a_row_asks(tmp_path, row, asked):
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for _ in range(70)))
    assert read_asked(str(tmp_path / "rows.jsonl")) == [asked] * 64


@pytest.mark.parametrize("name", ["someone/gone", "json", "other.jsonl", "gone.jsonl", "two words"])
def test_a_dataset_that_says_nothing_is_said(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "Why?", "question": "w" * 2001}) + "\n")
    with pytest.warns(UserWarning, match=f"The dataset '{name}'.*the survey goes on without it"):
        assert read_asked(name) == []


def test_a_dataset_on_the_hub_is_read_in_its_first_configuration_and_split(monkeypatch):
    split = datasets.Dataset.from_list([{"question": "Why?"}]).to_iterable_dataset()
    load = {("someone/data", "main"): datasets.IterableDatasetDict({"train_sft": split, "test_sft": split})}
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda name: None)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["main", "other"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *which, streaming: load[which])
    assert read_asked("someone/data") == [("Why?", None)]


def test_what_the_card_names_is_asked_and_named(acts_after, tmp_path):
    rows = [*({"question": f"Own {n}?"} for n in range(20)), *({"prompt": f"Do: {n}\nNow:"} for n in range(20))]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    name = str(tmp_path / "rows.jsonl")
    says = Card(templates=("Ask: {text}\nSay:",), datasets=(name,))
    run = acts_after("Say:")
    surveyed = run(limit=60, says=says)
    assert {key: surveyed.found[key] for key in ("examples", "templates", "datasets")} == {
        "examples": 8,
        "templates": list(says.templates),
        "datasets": [name],
    }
    assert surveyed.found["forms"][0]["form"] == says.templates[0]
    asked = {one.source_prompt for one in surveyed.samples}
    assert any(one.startswith("Ask: Own ") and one.endswith("?\nSay:") for one in asked)
    (line,) = (one for one in contents({"text": {"survey": surveyed.found}}).remarks if one.startswith("Asked first"))
    assert line == f"Asked first, by the adapter's card: 8 examples, 1 template, dataset {name!r}"
    for off in ({"card": False}, {"prompts": ["Say: one\nSay:"]}):
        found = run(limit=20, says=says, **off).found
        assert (found["examples"], found["templates"], found["datasets"]) == (0, [], [])


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
    assert chat.target_prompt == ("[target] Why? " if target_has_template else f"<bos>{chat.source_prompt}")
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
