"""The benchmarks are in working order: what they say they compare is there, and a table can be made end to end."""

import json
import sys

import pytest
import torch
from conftest import ROOT, c4_texts, make_lora
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast.refine.trainer import CastTrainer
from peft_cast.text.samples import TextSample


sys.path.insert(0, str(ROOT / "benchmarks"))
import aside_tasks  # noqa: E402
import experiments  # noqa: E402
import gpu  # noqa: E402
import setting  # noqa: E402
import table  # noqa: E402


def test_what_is_compared_is_in_the_repository():
    for model in (setting.SMOLLM2, setting.GEMMA3):
        for task in ("gsm8k", "agnews"):
            assert (model.adapter(task) / "adapter_model.safetensors").exists()
    assert all(len(set(setting.prompts(task))) == 16 for task in setting.TASKS)
    read, unseen = setting.c4_documents()
    assert len(unseen) == setting.DRIFT_DOCUMENTS and not set(read) & set(unseen)


@pytest.mark.parametrize("task", setting.HELD_OUT)
def test_held_out_tasks_are_whole_and_read_nothing_they_train_on(task):
    train, test = (
        [json.loads(line) for line in (setting.HERE / "data" / f"wordnet_{task}_{part}.jsonl").open(encoding="utf-8")]
        for part in ("train", "test")
    )
    assert not {row["definition"] for row in train} & {row["definition"] for row in test}
    (judged,) = setting.tasks(task)
    assert judged.limit <= len(test)
    head, tail, _ = setting.PROMPTS[task]
    assert judged.prompt.startswith(head) and judged.prompt.endswith(tail)
    text = {value for row in train + test for value in row.values()}
    bodies = {prompt[len(head) : -len(tail)] for prompt in setting.prompts(task)}
    assert bodies and not (bodies & text if task == "kinds" else bodies & {row["word"] for row in test})


@pytest.mark.parametrize("name", aside_tasks.TASKS)
def test_tasks_kept_aside_are_whole_and_read_nothing_they_train_on(name):
    task = aside_tasks.TASKS[name]
    train, test = ([json.loads(line) for line in task.data(part).open(encoding="utf-8")] for part in ("train", "test"))
    assert len(train) >= 400 and len(test) >= 300
    of_train, of_test = ({task.prompt.format_map(row) for row in rows} for rows in (train, test))
    assert len(of_test) == len(test) and not of_train & of_test
    assert len(set(task.prompts())) == 16 and not set(task.prompts()) & (of_train | of_test)
    answers = {task.answer.format_map(row).strip() for row in test}
    assert answers == set(task.labels) if task.labels else len(answers) > 200


def test_development_problems_are_not_the_tables():
    scored = {task.name: set(range(task.start, task.start + task.limit)) for task in setting.tasks("gsm8k")}
    developed = set(range(experiments.TASK.start, experiments.TASK.start + experiments.TASK.limit))
    assert scored and not any(developed & rows for rows in scored.values())


def test_our_prompts_are_none_of_the_data():
    rows = [
        json.loads(line)["question"]
        for name in ("gsm8k_train_1600", "gsm8k_test_200")
        for line in (setting.EXAMPLES / "data" / f"{name}.jsonl").open(encoding="utf-8")
    ]
    assert not {f"Question: {q}\nAnswer:" for q in rows} & set(setting.prompts("gsm8k"))


@pytest.fixture
def tiny_benchmark(monkeypatch, tmp_path, source_folder, target_folder, lora_folder):
    """The table's own code on tiny models, text that is already written, and a task of three rows."""
    retrained = make_lora(AutoModelForCausalLM.from_pretrained(target_folder), tmp_path / "retrained")

    class Tiny(setting.Model):
        def adapter(self, task, modules="all"):
            return lora_folder if self.name == "source" else retrained

    pair = Tiny("source", lambda: source_folder), Tiny("target", lambda: target_folder)
    monkeypatch.setitem(setting.PAIRS, "tiny", pair)
    monkeypatch.setattr(setting, "OUTPUT", tmp_path / "output")
    monkeypatch.setattr(setting, "FIGURES", tmp_path / "figures")
    texts = c4_texts(40)
    monkeypatch.setattr(setting, "c4_documents", lambda: (texts[:36], texts[36:]))
    written = [TextSample(t[40:200], t[:40], t[:40]) for t in texts[:24]]
    monkeypatch.setattr(setting, "written", lambda *args: written)
    rows = [{"question": t[:30], "answer": t[30:60]} for t in texts[:3]]
    task = peft_cast.AnswerLikelihood("tiny", rows, "{question}", "{answer}")
    monkeypatch.setattr(setting, "tasks", lambda name: [task])
    monkeypatch.setitem(table.REFINEMENT, "gsm8k", {"steps": 4, "batch_size": 4, "max_length": 64})
    monkeypatch.setitem(setting.NEW_TOKENS, "gsm8k", 12)
    monkeypatch.setattr(sys, "argv", ["table.py", "--pair", "tiny", "--seeds", "0", "1"])
    return tmp_path


def test_a_table_is_made_end_to_end_and_only_once(tiny_benchmark, monkeypatch, capsys):
    table.main()
    found = peft_cast.Evaluation.load(tiny_benchmark / "figures" / "table_tiny_gsm8k.json")
    names = [row.adapter for row in found.rows if row.task == "tiny"]
    made = ["Cross-LoRA", "CAST closed form", "distilled from scratch", "CAST", "CAST and own words"]
    assert names == ["base", *made, "retrained"]
    assert len(found.row("CAST", "tiny").scores) == 2 and found.row("retrained", "tiny").lift == (1.0,)
    assert "direct copy does not apply" in capsys.readouterr().out
    assert (tiny_benchmark / "figures" / "table_tiny_gsm8k.png").exists()
    run = json.loads((tiny_benchmark / "figures" / "run_tiny_gsm8k_all_CAST_seed1.json").read_text())
    assert run["metrics"]["settings"]["seed"] == 1 and run["environment"]["versions"]
    monkeypatch.setattr(table, "ROWS", {name: None for name in table.ROWS if name != "direct copy"})
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rows", "CAST"])
    table.main()  # everything is there already
    assert peft_cast.Evaluation.load(tiny_benchmark / "figures" / "table_tiny_gsm8k.json").row("CAST", "tiny") == (
        found.row("CAST", "tiny")
    )


def test_rows_that_are_kept_are_marked_unless_their_code_is_todays(tiny_benchmark, monkeypatch):
    command = [*sys.argv[:-1], "--no-source", "--rows"]
    for rows, earlier in (
        (["Cross-LoRA"], None),
        (["CAST closed form", "--same-code"], []),
        (["CAST closed form"], ["Cross-LoRA"]),
        (["CAST closed form", "--same-code"], ["Cross-LoRA"]),
        (["Cross-LoRA", "--same-code"], []),
    ):
        monkeypatch.setattr(sys, "argv", command + rows)
        table.main()
        found = peft_cast.Evaluation.load(tiny_benchmark / "figures" / "table_tiny_gsm8k.json")
        assert found.settings.get("earlier") == earlier


def test_a_row_that_was_stopped_goes_on_from_its_last_step(tiny_benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--rows", "CAST", "--no-source"])
    steps, loss = [], CastTrainer.compute_loss

    def stopped(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(CastTrainer, "compute_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        table.main()
    table.main()
    assert steps == [0, 1, 2, 2, 3]
    assert [path.name for path in (tiny_benchmark / "output" / "tiny_gsm8k_all").iterdir()] == ["CAST_seed0"]


def test_the_operations_that_a_step_needs_are_those_of_its_passes():
    configs = [gpu.two_layers(config) for config in gpu.CONFIGS]
    models = [AutoModelForCausalLM.from_config(config) for config in configs]
    ids, counts = torch.zeros(3, 8, dtype=torch.long), []
    for model in models:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids)
        counts.append(counter.get_total_flops())
    needed = gpu.needed(*configs, tokens=24, length=8, vocabulary=configs[0].vocab_size)
    assert needed == pytest.approx(counts[0] + 2 * counts[1], rel=0.02)  # the counter takes no account of causality


def test_the_texts_for_a_gpu_are_as_long_as_they_should_be():
    documents = setting.c4_documents()[0][:40]
    tokenizer = gpu.made_tokenizer(documents)
    texts = gpu.made_texts(tokenizer, 3, 64)
    assert len(set(texts)) == 3
    assert all(len(tokenizer(text).input_ids) >= 64 for text in texts)
