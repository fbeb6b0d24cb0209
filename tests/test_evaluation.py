"""How results are judged."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import c4_texts, make_lora, save_model, tiny_model
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from peft.tuners.lora.config import MontecloraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast import AnswerLikelihood, CastConfig, Classification, Evaluation, Generation, HarnessTask
from peft_cast.evaluation.drift import drift
from peft_cast.evaluation.tasks import Scores
from peft_cast.models.likelihood import answer_nats, choice_nats
from peft_cast.results.rows import Measurement


ROWS = [
    {"question": f"How many are {a} and {b}?", "answer": f"They are {a + b}", "label": "ab"[a % 2]}
    for a in range(2, 9)
    for b in (3, 11)
]
LIKELIHOOD = AnswerLikelihood("sums", ROWS, "Question: {question}\nAnswer:", " {answer}", batch_size=4)
LABELS = (" yes", " no, not at all", " maybe so")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model_and_tokenizer(request, byte_tokenizer, piece_tokenizer):
    tokenizer = byte_tokenizer if request.param == "llama" else piece_tokenizer
    return tiny_model(request.param, len(tokenizer)), tokenizer


def nats_one_by_one(model, tokenizer, prompt, answer):
    p, a = tokenizer(prompt).input_ids, tokenizer(answer, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([p + a])).logits[0, len(p) - 1 : -1]
    return float(F.cross_entropy(logits, torch.tensor(a), reduction="sum"))


def test_answer_likelihood_is_the_models_own(model_and_tokenizer):
    items = [(f"Question: {row['question']}", f" {row['answer']}" * (i % 3 + 1)) for i, row in enumerate(ROWS)]
    found = answer_nats(*model_and_tokenizer, items, batch_size=5)
    expected = [nats_one_by_one(*model_and_tokenizer, *item) for item in items]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_choices_read_each_prompt_once_and_score_the_same(model_and_tokenizer):
    prompts = ["Is it so?", "Would you say, after all of this, that it is so?", "Why?"]
    found = choice_nats(*model_and_tokenizer, prompts, LABELS, batch_size=2)
    expected = [[nats_one_by_one(*model_and_tokenizer, p, label) for label in LABELS] for p in prompts]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    single = choice_nats(*model_and_tokenizer, prompts, ["a", "b"])
    expected = [[nats_one_by_one(*model_and_tokenizer, p, label) for label in "ab"] for p in prompts]
    torch.testing.assert_close(single, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_likelihood_task(model_and_tokenizer):
    metrics = LIKELIHOOD.run(*model_and_tokenizer).metrics
    items = [(f"Question: {r['question']}\nAnswer:", f" {r['answer']}") for r in ROWS]
    nats = sum(nats_one_by_one(*model_and_tokenizer, *item) for item in items)
    assert metrics["nats_per_character"] == pytest.approx(nats / sum(len(a) for _, a in items), rel=1e-4)
    assert metrics["items"] == len(ROWS) and 0 < metrics["stderr"] < metrics["nats_per_character"]


def test_classification_counts_the_likeliest_label(model_and_tokenizer):
    prompts = [f"{r['question']} Is it?" for r in ROWS]
    best = choice_nats(*model_and_tokenizer, prompts, LABELS).argmin(1).tolist()
    right = [{**row, "label": LABELS[b]} for row, b in zip(ROWS, best)]
    wrong = [{**row, "label": LABELS[(b + 1) % 3]} for row, b in zip(ROWS[:3], best)]
    task = Classification("kinds", right[3:] + wrong, "{question} Is it?", LABELS, continuation="{label}")
    # the order of the rows changes, so the likeliest labels are looked up again
    metrics = task.run(*model_and_tokenizer).metrics
    assert metrics["accuracy"] == pytest.approx((len(ROWS) - 3) / len(ROWS))
    assert metrics["nats_per_label"] > 0
    with pytest.raises(ValueError, match=r"labels \['no'\], not in `labels`"):
        Classification("kinds", [{"question": "x", "label": "no"}], "{question}", LABELS).run(*model_and_tokenizer)


def test_generation_matches_the_group_of_the_pattern(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    written = peft_cast.evaluation.tasks.generate(model, tokenizer, [r["question"] for r in ROWS], 6, batch_size=3)
    ids = tokenizer(ROWS[0]["question"], return_tensors="pt").input_ids
    alone = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert written[0] == tokenizer.decode(alone, skip_special_tokens=True)
    rows = [{**row, "answer": text if i % 2 else "otherwise"} for i, (row, text) in enumerate(zip(ROWS, written))]
    task = Generation("write", rows, "{question}", "{answer}", r"(?s)^(.+)$", max_new_tokens=6)
    scores = task.run(model, tokenizer)
    assert scores.metrics["exact_match"] == 0.5 and scores.metrics["in_format"] == 1.0
    assert scores.samples[1]["written"] == rows[1]["answer"] and scores.samples[1]["prompt"] == ROWS[1]["question"]
    with pytest.raises(ValueError, match="needs a group"):
        Generation("write", rows, "{question}", "{answer}", r"####")
    with pytest.raises(ValueError, match="`fallback` is no regular expression"):
        Generation("write", rows, "{question}", "{answer}", r"(.)", fallback="(")
    with pytest.raises(ValueError, match="`metric` must be"):
        Generation("write", rows, "{question}", "{answer}", r"(.)", metric="accuracy")
    strict = Generation("write", rows, "{question}", "{answer}", r"#### (\d+)", max_new_tokens=6)
    assert strict.run(model, tokenizer).metrics["in_format"] == 0


def test_drift_is_the_divergence_from_the_own_base(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    texts = c4_texts(3)
    names = ["q_proj", "down_proj"]
    still = get_peft_model(model, CastConfig(target_modules=names)).eval()
    assert drift(still, tokenizer, texts, max_length=40)["drift"] == 0
    still.unload()
    moved = get_peft_model(model, CastConfig(target_modules=names, init_weights=False)).eval().requires_grad_(False)
    found = drift(moved, tokenizer, texts, max_length=40, batch_size=2)
    assert not any(p.requires_grad for p in moved.parameters())
    divergence = loss = count = 0
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=40).input_ids
            q = moved(ids).logits[0, :-1].log_softmax(-1)
            with moved.disable_adapter():
                p = moved(ids).logits[0, :-1].log_softmax(-1)
            divergence += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            loss += float(F.nll_loss(q, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    moved.unload()
    assert found["tokens"] == count and found["drift"] == pytest.approx(divergence / count, rel=1e-3)
    assert found["perplexity"] == pytest.approx(torch.tensor(loss / count).exp().item(), rel=1e-3)
    assert found["perplexity"] != found["perplexity_base"]
    with pytest.raises(ValueError, match="drift on is empty"):
        drift(model, tokenizer, [""])


RUNS: list[str] = []


@dataclass(frozen=True)
class Counted:
    """Scores a model by its logits at one input; its runs are counted. One of them can be made to stop."""

    name: str = "counted"
    metric: str = "score"
    higher_is_better: bool = True

    def run(self, model, tokenizer):
        if self.name in STOPS:
            raise KeyboardInterrupt
        RUNS.append(self.name)
        with torch.no_grad():
            return Scores({"score": float(model(torch.arange(5, 20)[None]).logits.abs().mean())})


STOPS: set[str] = set()


@pytest.fixture
def loras(source_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source_folder)
    return {name: make_lora(model, tmp_path / name, seed=seed) for seed, name in enumerate("abc")}


def test_evaluate_compares_with_base_and_retrained(source_folder, loras, tmp_path):
    found = peft_cast.evaluate(
        source_folder,
        {"several": [loras["a"], loras["b"]], "best": loras["c"]},
        [Counted(higher_is_better=False), LIKELIHOOD],
        retrained="best",
        drift_text=c4_texts(4),
        progress=False,
    )
    (base,), (top,) = (found.row(name, "counted").scores for name in ("base", "best"))
    several = found.row("several", "counted")
    assert top < base and len(several.scores) == 2
    assert found.row("base", "counted").lift == (0.0,) and found.row("best", "counted").lift == (1.0,)
    assert several.lift == tuple((s - base) / (top - base) for s in several.scores)
    assert [row.adapter for row in found.rows if row.task == "drift"] == ["several", "best"]
    assert "±" in str(found) and f"{top:.3f} (1.00)" in str(found)
    found.save(tmp_path / "rows.json")
    assert Evaluation.load(tmp_path / "rows.json").rows == found.rows
    versions = json.loads((tmp_path / "rows.json").read_text())["settings"]["environment"]["versions"]
    assert versions["torch"] == torch.__version__
    found.plot(tmp_path / "lift.png")
    assert (tmp_path / "lift.png").stat().st_size > 5000
    with pytest.raises(KeyError, match="not measured"):
        found.row("nobody", "counted")


@pytest.mark.parametrize(
    ("higher_is_better", "top", "lift"), [(True, 0.7, 0.5), (True, 0.4, None), (False, 0.4, -1.0)]
)
def test_there_is_no_lift_where_retraining_gained_nothing(higher_is_better, top, lift):
    scores = {"base": 0.5, "cast": 0.6, "best": top}
    made = [Measurement(name, 0, "t", "m", higher_is_better, {"m": score}) for name, score in scores.items()]
    found = Evaluation(tuple(made), {"t": "best"}, {}).row("cast", "t").lift
    assert found == (() if lift is None else (pytest.approx(lift),))


@dataclass(frozen=True)
class Told:
    """A task whose items went as they are told, by whether the model has an adapter."""

    name: str = "told"
    metric: str = "right"
    higher_is_better: bool = True
    base: tuple = (1.0, 1.0, 0.0, 0.0)
    adapted: tuple = (1.0, 0.0, 1.0, 1.0)
    others: tuple = ()

    def run(self, model, tokenizer):
        each = self.adapted if isinstance(model, PeftModel) else self.base
        return Scores({"right": sum(each) / len(each)}, each=each)

    def for_base(self):
        return {f"prompt {i}": Told(base=base) for i, base in enumerate(self.others)}


def test_flips_are_counted_item_by_item_against_the_best_prompt(source_folder, loras):
    found = peft_cast.evaluate(source_folder, {"a": loras["a"]}, [Told()], progress=False)
    (paired,) = found.paired
    assert (paired.gained, paired.lost, paired.difference, paired.base) == (2, 1, 0.25, "base")
    assert paired.margin == pytest.approx(1.96 * (0.6875 * 4 / 3) ** 0.5 / 2)
    assert "| a | told | +0.250 ± 0.938 | 2 | 1 | base |" in str(found)
    better = Told(others=((0.0,) * 4, (1.0, 1.0, 1.0, 0.0)))
    found = peft_cast.evaluate(source_folder, {"a": loras["a"]}, [better], progress=False)
    (paired,) = found.paired
    assert (paired.gained, paired.lost, paired.base) == (1, 1, "base, prompt 1")
    assert found.judged == ["a"]


def test_numbers_that_are_not_finite_are_told_and_stop_nothing(source_folder, loras):
    told = Told(adapted=(float("nan"), 0.0, 1.0, 1.0))
    with pytest.warns(UserWarning, match="'a' gives NaN or infinite numbers on 'told', as in a `dtype` too narrow"):
        found = peft_cast.evaluate(source_folder, {"a": [loras["a"], loras["a"]]}, [told], progress=False)
    assert "nan" in str(found)


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize("alpha, why", [(8, "all of its B is zero"), (0, "its `lora_alpha` is 0")])
def test_adapters_that_change_nothing_are_measured_with_a_warning(alpha, why, where, source_folder, loras, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source_folder)
    idle = get_peft_model(model, LoraConfig(lora_alpha=alpha, init_lora_weights=alpha > 0, target_modules=["q_proj"]))
    if where == "folder":
        idle.save_pretrained(tmp_path / "idle")
    adapters = {"idle": tmp_path / "idle" if where == "folder" else idle, "trained": loras["a"]}
    with pytest.warns(UserWarning, match="changes nothing") as said:
        found = peft_cast.evaluate(source_folder, adapters, [Counted()], progress=False)
    (only,) = [str(one.message) for one in said if "changes nothing" in str(one.message)]
    assert only.startswith(f"The adapter 'idle' changes nothing: {why}") and "trained" in str(found)


def test_items_that_are_not_right_or_wrong_have_no_flips(source_folder, loras):
    found = peft_cast.evaluate(source_folder, {"a": loras["a"]}, [LIKELIHOOD], progress=False)
    (paired,) = found.paired
    assert paired.items == len(ROWS) and paired.gained is None and paired.margin > 0


@pytest.mark.parametrize(
    ("written", "right", "in_format"),
    [
        ("#### 5", 1, 1),
        ("It is 4.", 0, 0),
        ("2 + 3 is 5.00", 1, 0),
        ("5 of them\n\nQuestion: 7?", 1, 0),
        ("none", 0, 0),
    ],
)
def test_an_answer_out_of_format_counts_by_its_last_number(written, right, in_format, monkeypatch):
    monkeypatch.setattr("peft_cast.evaluation.tasks.generate", lambda *_: [written])
    task = Generation(
        "sums", [{"a": 5}], "?", "#### {a}", r"#### (\d+)", fallback=r"(\d[\d.]*\d|\d)", until="\n\nQuestion:"
    )
    metrics = task.run(None, None).metrics
    assert (metrics["exact_match"], metrics["in_format"]) == (right, in_format)


def test_evaluate_takes_up_where_it_stopped(source_folder, loras, tmp_path):
    options = {"output": tmp_path / "out" / "rows.json", "progress": False}
    tasks = [Counted(), Counted("second")]
    adapters = {"a": loras["a"], "b": loras["b"]}
    RUNS.clear()
    STOPS.add("second")
    with pytest.raises(KeyboardInterrupt):
        peft_cast.evaluate(source_folder, adapters, tasks, **options)
    assert RUNS == ["counted"]
    STOPS.clear()
    first = peft_cast.evaluate(source_folder, adapters, tasks, **options)
    assert RUNS == ["counted", "second", "counted", "second", "counted", "second"]  # none of them twice
    model = AutoModelForCausalLM.from_pretrained(source_folder)
    make_lora(model, loras["b"], seed=9)  # other weights in the same folder
    second = peft_cast.evaluate(source_folder, adapters, tasks, **options)
    assert len(RUNS) == 8
    assert first.row("a", "counted") == second.row("a", "counted")
    assert first.row("b", "counted") != second.row("b", "counted")
    config = json.loads(Path(loras["a"], "adapter_config.json").read_text())
    Path(loras["a"], "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert peft_cast.evaluate(source_folder, adapters, tasks, **options).row("a", "counted") != first.row(
        "a", "counted"
    )


def test_edited_data_is_measured_again(source_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    task = AnswerLikelihood("rows", tmp_path / "rows.jsonl", "{question}", " {answer}")
    options = {"output": tmp_path / "out.json", "progress": False}
    first = peft_cast.evaluate(source_folder, {}, [task], **options)
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({**ROWS[0], "question": "line\u2028separator"}, ensure_ascii=False)
    )
    second = peft_cast.evaluate(source_folder, {}, [task], **options)
    assert first.row("base", "rows") != second.row("base", "rows")


def test_a_target_that_carries_an_adapter_is_refused(source_folder, loras):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), loras["a"])
    with pytest.raises(ValueError, match="carries an adapter already"):
        peft_cast.evaluate(model.get_base_model(), {}, [LIKELIHOOD], progress=False)
    other = get_peft_model(tiny_model("gemma3"), CastConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="is on another model"):
        peft_cast.evaluate(source_folder, {"other": other}, [LIKELIHOOD], progress=False)


def test_trained_heads_and_biases_do_not_stay_in_the_target(source_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source_folder)
    head = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(source_folder), head)
    with torch.no_grad():
        trained.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    trained.save_pretrained(tmp_path / "head")
    options = {"target_tokenizer": source_folder, "progress": False}
    found = peft_cast.evaluate(model, {"head": str(tmp_path / "head")}, [Counted()], **options)
    assert found.row("head", "counted").scores[0] == pytest.approx(2 * found.row("base", "counted").scores[0], rel=0.1)
    again = peft_cast.evaluate(model, {}, [Counted()], **options)
    assert again.row("base", "counted") == found.row("base", "counted")


@pytest.mark.parametrize("config", [ShiraConfig(r=2), LoraConfig(monteclora_config=MontecloraConfig())])
def test_kinds_that_need_weights_to_be_loaded_are_measured(config, source_folder, tmp_path):
    config.target_modules, options = ["q_proj"], {"progress": False}
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(source_folder), config)
    for parameter in trained.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    trained.save_pretrained(tmp_path)
    found = peft_cast.evaluate(source_folder, {"a": tmp_path}, [Counted()], **options)
    expected = Counted().run(trained.eval(), None).metrics["score"]
    assert found.row("a", "counted").scores[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [{"init_lora_weights": "pissa"}, {"layer_replication": [[0, 2], [1, 3]]}])
def test_adapters_that_change_the_models_own_weights_leave_nothing_of_it(kind, source_folder, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **kind)
    get_peft_model(AutoModelForCausalLM.from_pretrained(source_folder), config).save_pretrained(tmp_path)
    model, other = (AutoModelForCausalLM.from_pretrained(source_folder) for _ in range(2))
    found = peft_cast.evaluate(model, {"a": tmp_path}, [Counted()], target_tokenizer=source_folder, progress=False)
    expected = Counted().run(PeftModel.from_pretrained(copy.deepcopy(other), tmp_path).eval(), None).metrics["score"]
    assert found.row("a", "counted").scores[0] == pytest.approx(expected, rel=1e-6)
    before, after = other.state_dict(), model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_translations_that_share_a_model_are_each_measured(source_folder, loras):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), loras["a"], "a")
    model.load_adapter(loras["b"], "b")
    both = {name: peft_cast.TranslationResult(model, {}, [], None, name) for name in "ab"}
    found = peft_cast.evaluate(source_folder, {**both, "file": loras["b"]}, [Counted()], progress=False)
    a, b, file = (found.row(name, "counted").scores for name in ("a", "b", "file"))
    assert a != b and b == pytest.approx(file) and model.active_adapters == ["a"]


def foreign(kind: str, folder):
    """An adapter that is none for the source folder's model."""
    sizes = {"deeper": {"num_hidden_layers": 5}, "shallower": {"num_hidden_layers": 2}, "wider": {"hidden_size": 64}}
    model = tiny_model("opt" if kind == "other names" else "llama", **sizes.get(kind, {}))
    if kind == "cast":
        get_peft_model(tiny_model(hidden_size=64), CastConfig(target_modules=["q_proj"])).save_pretrained(folder)
        return str(folder)
    return make_lora(model, folder, ["q_proj"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("deeper", "made for at least 5 layers"),
        ("shallower", "made for 2 layers"),
        ("wider", "for another width"),
        ("other names", "model.decoder"),
        ("cast", "this model needs"),
        ("SEQ_CLS", "task type SEQ_CLS, whose head a causal language model has not"),
        ("unmatched names", "is for a model of another class"),
        ("use_dora", "`use_dora` is set, and no tensor of its file is for it. Correct it in adapter_config.json"),
        ("lora_bias", "`lora_bias` is set, and no tensor of its file is for it"),
        ("absent", "there is no folder"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_target_is_loaded(
    kind, message, source_folder, loras, tmp_path, monkeypatch
):
    folder = tmp_path / "foreign"
    if kind != "absent":
        foreign(kind, folder)
    if kind in ("SEQ_CLS", "use_dora", "lora_bias"):
        config = json.loads((folder / "adapter_config.json").read_text())
        change = {"task_type": kind} if kind == "SEQ_CLS" else {kind: True}
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    if kind == "unmatched names":
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({k.replace("q_proj", "query"): v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source_folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message) as error:
        peft_cast.evaluate(source_folder, {"a": loras["a"], "b": folder}, [Counted()], progress=False)
    assert "`source`" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        peft_cast.evaluate(model, {"b": folder}, [Counted()], target_tokenizer=source_folder, progress=False)


def test_evaluate_gives_models_back(source_folder, loras):
    model = AutoModelForCausalLM.from_pretrained(source_folder).train()
    types = [type(m) for m in model.modules()]
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), loras["b"])
    peft_cast.evaluate(
        model,
        {"file": loras["a"], "memory": peft_model},
        [LIKELIHOOD],
        drift_text=c4_texts(2),
        target_tokenizer=source_folder,
        progress=False,
    )
    assert [type(m) for m in model.modules()] == types and model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("adapters", "tasks", "options", "message"),
    [
        ({"base": "x"}, [LIKELIHOOD], {}, "'base' is the name of the untouched"),
        ({"a": "x"}, [LIKELIHOOD, LIKELIHOOD], {}, "name of its own"),
        ({"a": "x"}, [LIKELIHOOD], {"retrained": "b"}, "none of the adapters"),
        ({"a": "x"}, [LIKELIHOOD], {"retrained": {"other": "a"}}, "none of \\['sums'\\]"),
        ({"a": "no/adapter"}, [LIKELIHOOD], {}, "'no/adapter' could not be read"),
        (["x"], [LIKELIHOOD], {}, "`adapters` must be a mapping from names to adapters"),
        ("x", [LIKELIHOOD], {}, "`adapters` must be a mapping from names to adapters"),
        ({"a": []}, [LIKELIHOOD], {}, "'a' is an empty list: pass"),
        ({"": "x"}, [LIKELIHOOD], {}, "Every adapter needs a name"),
        ({5: "x"}, [LIKELIHOOD], {}, "Every adapter needs a name"),
        ({}, [], {}, "nothing to measure: pass `tasks`"),
        ({}, [], {"drift_text": ["a text"]}, "nothing to measure: pass `tasks`"),
        ({"a": 5}, [LIKELIHOOD], {}, "'a' must be a folder, a hub id, a PeftModel"),
        ({}, LIKELIHOOD, {}, "`tasks` must be a list of tasks"),
        ({}, ["sums"], {}, "`tasks` must be a list of tasks"),
        ({}, [LIKELIHOOD], {"retrained": 5}, "`retrained` must be the name of an adapter"),
        ({}, [AnswerLikelihood("x", ROWS, "{nothing}", "a")], {}, "names 'nothing', but the data has the columns"),
        ({}, [AnswerLikelihood("x", ROWS, "a", "a", start=99)], {}, "has no rows from 99 on"),
        ({}, [AnswerLikelihood("x", ROWS, "a", "a", limit="3")], {}, "`limit` must be a whole number"),
        ({}, [AnswerLikelihood("x", ROWS, "a", "a", base_prompts={"b": "{c}"})], {}, "names 'c', but the data has"),
        ({}, [AnswerLikelihood("x", ROWS, "{", "a")], {}, "cannot be filled in"),
        ({}, [AnswerLikelihood("x", ["a"], "a", "a")], {}, "must hold records, from columns to values, got 'a'"),
        ({}, [AnswerLikelihood("x", iter(ROWS), "a", "a")], {}, "must be a jsonl file or a list of records"),
        ({}, [Classification("x", ROWS, "a", LABELS, "kind")], {}, "labels from 'kind', but the data has the columns"),
        ({}, [Classification("x", ROWS, "a", ("a",))], {}, r"rows with the labels \['b'\], not in `labels`"),
        ({}, [LIKELIHOOD], {"drift_text": "no.jsonl"}, "text file 'no.jsonl' does not exist"),
        ({}, [LIKELIHOOD], {"output": 5}, "`output` must be the name of a file"),
        ({}, [LIKELIHOOD], {"output": "."}, "`output`, '.', is a folder"),
        ({}, [LIKELIHOOD], {"output": __file__}, "is no JSON file of an evaluation"),
        ({}, [LIKELIHOOD], {"output": f"{__file__}/x"}, "cannot be written .*: write to another folder"),
        ({}, [AnswerLikelihood], {}, "`tasks` must be a list of tasks"),
        ({}, [AnswerLikelihood("x", [{"q": "?", "a": None}], "{q}", "{a}")], {}, "Row 0 of the task 'x' has no 'a'"),
        ({}, [AnswerLikelihood("x", [{"a": {"b": None}}], "{a[b]}", "a")], {}, r"Row 0 .* has no 'a\[b\]'"),
        ({}, [AnswerLikelihood("x", [*ROWS, {"answer": ""}], "a", "{answer}")], {}, "Row 14 .* has an empty answer"),
        ({}, [AnswerLikelihood("x", ROWS, 5, "a")], {}, "template 5 is neither a string"),
        ({}, [AnswerLikelihood("x", ROWS, "a", "a", base_prompts=["b"])], {}, "`base_prompts` must map names"),
    ],
)
def test_bad_evaluations_are_one_clear_error(adapters, tasks, options, message, source_folder, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, OSError), match=message):
        peft_cast.evaluate(source_folder, adapters, tasks, progress=False, **options)


def test_a_file_that_is_no_evaluation_is_not_overwritten(source_folder):
    config = Path(source_folder, "config.json")
    before = config.read_bytes()
    with pytest.raises(ValueError, match="is no JSON file of an evaluation: choose another"):
        peft_cast.evaluate(source_folder, {}, [LIKELIHOOD], output=config, progress=False)
    assert config.read_bytes() == before


def test_a_harness_that_is_not_installed_is_told_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("peft_cast.evaluation.harness.find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install"):
        HarnessTask("arc_easy").check()


def test_a_task_that_the_harness_does_not_have_is_told_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("peft_cast.evaluation.harness.find_spec", lambda _: True)
    monkeypatch.setattr("peft_cast.evaluation.harness._index", lambda: SimpleNamespace(all_tasks=["arc_easy"]))
    (tmp_path / "own.yaml").write_text("task: own")
    for task in (HarnessTask("arc_easy"), HarnessTask({"task": "own"}), HarnessTask(str(tmp_path / "own.yaml"))):
        task.check()
    HarnessTask("arc_esy", options={"metadata": {"a": 1}}).check()
    with pytest.raises(ValueError, match="has no task 'arc_esy': `lm-eval ls tasks`"):
        HarnessTask("arc_esy").check()


@pytest.mark.parametrize(
    "task",
    [
        AnswerLikelihood("x", ROWS[:2], "{question}", " {answer}", start=1),
        AnswerLikelihood("x", ROWS[:2], lambda row: "", " {answer}", start=1, base_prompts={"more": "{question}"}),
        Classification("x", ROWS[:2], "{question}", ("a", "b"), continuation=" It is {label}.", start=1),
        Generation("x", ROWS[:2], "{question}", "{answer}", "(.*)", max_new_tokens=9, start=1),
    ],
)
def test_rows_longer_than_learned_positions_are_told_before_the_model_is_loaded(
    task, byte_tokenizer, tmp_path, monkeypatch
):
    def works(run, *given):
        try:
            return run(*given) or True
        except (ValueError, IndexError):
            return False

    fits = next(n for n in range(4, 99) if works(task.check_positions, byte_tokenizer, n))
    short, enough = (tiny_model("gpt2", len(byte_tokenizer), max_position_embeddings=n) for n in (fits - 1, fits))
    runs = list(task.for_base().values()) or [task]  # with the longest prompts
    assert works(runs[0].run, enough, byte_tokenizer) and not works(runs[0].run, short, byte_tokenizer)
    folder, texts = save_model(short, byte_tokenizer, tmp_path), c4_texts(1)
    adapter = make_lora(short, tmp_path / "a", target_modules="all-linear")
    found = peft_cast.evaluate(folder, {"a": adapter}, [], drift_text=texts, progress=False)
    assert found.row("a", "drift").scores
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=f"Row 1 of the task 'x' takes {fits} tokens .* has {fits - 1} positions"):
        peft_cast.evaluate(folder, {}, [task], progress=False)


def test_bad_files_are_one_clear_error(source_folder, tmp_path):
    with pytest.raises(OSError, match="cannot be opened"):
        AnswerLikelihood("x", tmp_path, "a", "a").check()
    with pytest.raises(OSError, match="'nowhere.jsonl', does not exist"):
        peft_cast.evaluate(source_folder, {}, [AnswerLikelihood("x", "nowhere.jsonl", "a", "a")], progress=False)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ValueError, match="is no jsonl file"):
        peft_cast.evaluate(
            source_folder, {}, [AnswerLikelihood("x", tmp_path / "bad.jsonl", "a", "a")], progress=False
        )
    with pytest.raises(ValueError, match="no recovered lift to plot"):
        peft_cast.evaluate(source_folder, {}, [LIKELIHOOD], progress=False).plot(tmp_path / "x.png")


def test_harness_tasks_give_the_same_choice_as_ours(source_folder, loras, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [
        {"question": r["question"], "choices": ["yes", "no, not at all", "maybe so"], "gold": i % 3}
        for i, r in enumerate(ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} Is it?",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    labeled = [{**row, "label": row["choices"][row["gold"]]} for row in rows]
    ours = Classification("ours", labeled, "{question} Is it?", tuple(rows[0]["choices"]))
    found = peft_cast.evaluate(
        source_folder, {"a": loras["a"]}, [HarnessTask(config, num_fewshot=0), ours], progress=False
    )
    for name in ("base", "a"):
        assert found.row(name, "local_choice").scores == pytest.approx(found.row(name, "ours").scores)
    with pytest.raises(ValueError, match="has no metric 'f1'"):
        peft_cast.evaluate(source_folder, {}, [HarnessTask(config, metric="f1")], progress=False)
