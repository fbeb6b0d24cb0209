"""The command line."""

import functools
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import c4_texts
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import peft_cast
from peft_cast.cli.app import app
from peft_cast.cli.settings import arguments_for, read_prompts, read_settings, tasks_of, text_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in c4_texts(40)))
    return str(file)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, corpus):
    """A config file that makes a translation take seconds."""
    file = tmp_path_factory.mktemp("config") / "quick.yaml"
    options = {"text": corpus, "fit-samples": 8, "eval_samples": 4, "max_length": 48, "batch_size": 4, "steps": 2}
    file.write_text(yaml.safe_dump(options))
    return str(file)


def call(*words, code: int = 0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def replace_translate(monkeypatch, function):
    """The command line asks `translate` for its arguments, so the replacement keeps them."""
    monkeypatch.setattr(peft_cast, "translate", functools.wraps(peft_cast.translate)(function))


@pytest.fixture(scope="module")
def translated(source_folder, lora_folder, target_folder, tmp_path_factory, quick):
    folder = tmp_path_factory.mktemp("translated")
    result = call(
        "translate", source_folder, lora_folder, target_folder, "-o", folder, "--config", quick, "--steps", 3, "--json"
    )
    return folder, result


def test_translates_and_says_what_it_will_cost(translated, target_folder):
    folder, result = translated
    account = json.loads(result.stdout)
    assert account["metrics"]["settings"]["steps"] == 3  # the option, not the file
    assert account["metrics"]["text"]["closed_form"] == 8
    assert "Plan for" in result.stderr and "Plan for" not in result.stdout
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target_folder), folder)
    assert model.active_peft_config.peft_type == "CAST"


def test_a_dry_run_writes_nothing(source_folder, lora_folder, target_folder, tmp_path, quick, monkeypatch):
    replace_translate(monkeypatch, lambda *_, **__: pytest.fail("it translated"))
    result = call(
        "translate", "-", lora_folder, target_folder, "-o", tmp_path / "out", "--config", quick, "--dry-run", "--json"
    )
    assert json.loads(result.stdout)["assumed"]["batch_size"] == 4
    assert not (tmp_path / "out").exists()
    assert call("translate", "-", lora_folder, target_folder, "--config", quick, "--dry-run").stderr
    assert "Invalid value for -o" in call("translate", "-", lora_folder, target_folder, code=2).stderr


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--text", "user/some-corpus"], "as `text`: a .jsonl, .txt or .parquet file (`--text FILE`"),
        (["--prompts", "prompts.txt", "--fit-text", "c4"], "as `fit_text`: a .jsonl, .txt or .parquet file (`--fit-t"),
    ],
)
def test_text_that_is_not_at_hand_offline_is_asked_for_before_models_are_loaded(
    words, remedy, source_folder, lora_folder, target_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("One?\nTwo?\n")
    error = call("translate", source_folder, lora_folder, target_folder, *words, "-o", "out", code=1).stderr
    assert remedy in error and error.count("FILE") == 1


def test_quiet_says_nothing(source_folder, lora_folder, target_folder, tmp_path, quick):
    command = [sys.executable, "-m", "peft_cast", "translate", source_folder, lora_folder, target_folder, "-q"]
    command += ["-o", str(tmp_path), "--config", quick, "--set", "steps=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_translation_without_a_plan_goes_on_and_says_so(
    source_folder, lora_folder, target_folder, monkeypatch, tmp_path
):
    def fail(*_, **__):
        raise ValueError("There is no telling.")

    monkeypatch.setattr(peft_cast, "plan", functools.wraps(peft_cast.plan)(fail))
    (tmp_path / "text.txt").write_text("\n\n".join(c4_texts(4)), encoding="utf-8")
    words = [source_folder, lora_folder, target_folder, "-o", tmp_path / "out", "--text", tmp_path / "text.txt"]
    result = call("translate", *words, "--steps", 0, "--max-length", 16)
    assert "There is no plan of this translation, which goes on all the same: There is no telling." in result.output
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert "There is no telling." in str(call("translate", *words, "--dry-run", code=1).output)


def test_plans(source_folder, lora_folder, target_folder):
    result = call("plan", source_folder, lora_folder, target_folder, "--on", "h100", "--set", "batch_size=2")
    assert "Plan for h100" in result.stdout and "refine" in result.stdout


def test_probes(source_folder, lora_folder):
    texts = json.dumps(
        [f"The {n} boats came home. They had seen whales and a storm near the harbor." for n in range(9)]
    )
    words = ("probe", source_folder, lora_folder, "--set", f"fit_text={texts}", "--quiet")
    account = json.loads(call(*words, "--json").stdout)
    acts = [kind["acts"] for kind in account["kinds"]]
    assert account["adapter"] == lora_folder and account["asked"] > 50 and len(acts) == 8
    example = account["kinds"][0]["examples"][0]
    assert set(example) == {"content", "with", "without"} and example["with"] != example["without"]
    assert f"asked {account['asked']} prompts" in call("probe", "-", *words[2:]).stdout


def test_inspects_a_cast_adapter(translated, source_folder, lora_folder):
    folder, _ = translated
    account = json.loads(call("inspect", folder, "--json").stdout)
    assert account["kind"] == "CAST adapter"
    assert account["source"]["model"] == source_folder and account["source"]["adapter"] == lora_folder
    assert account["file"]["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert {"target": "q_proj", "source": "q_proj", "count": 3, "ranks": [4]} in account["kernels"]
    text = call("inspect", folder).stdout
    assert "CAST adapter for" in text and "0+1→0, 2→1" in text and "KL from the teacher" in text


def test_the_report_is_there_and_can_be_made_again(translated):
    page = translated[0] / "report.html"
    before = page.read_text()
    page.unlink()
    assert str(page) in call("report", translated[0]).stdout
    assert page.read_text() == before and "Which layers resemble each other" in before


def test_inspects_other_adapters(lora_folder, source_folder, tmp_path):
    text = call("inspect", lora_folder).stdout
    assert f"LORA for {source_folder}" in text and "rank         4" in text
    for name in ("broken", "whole"):
        shutil.copytree(lora_folder, tmp_path / name)
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"x")
    text = call("inspect", tmp_path).stdout
    assert "broken' could not be read" in text and f"whole:\n  LORA for {source_folder}" in text
    shutil.rmtree(tmp_path / "whole")
    assert "broken' could not be read" in call("inspect", tmp_path, code=1).stderr


def test_folds(translated, tmp_path, target_folder):
    account = json.loads(call("to-lora", translated[0], "--rank", 16, "-o", tmp_path, "--json").stdout)
    assert account["rank"] == 16 and set(account["errors"].values()) == {0.0}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target_folder), tmp_path)
    assert model.active_peft_config.peft_type == "LORA" and model.active_peft_config.r == 16


def test_fits_a_bridge_and_casts_over_it(source_folder, lora_folder, target_folder, tmp_path, corpus, translated):
    call("bridge", source_folder, target_folder, "-o", tmp_path / "bridge", "--text", corpus, "--samples", 8, "-q")
    assert "bridge for" in call("inspect", tmp_path / "bridge").stdout
    call("cast", tmp_path / "bridge", lora_folder, "-o", tmp_path / "cast")
    assert json.loads(call("inspect", tmp_path / "cast", "--json").stdout)["kind"] == "CAST adapter"
    refused = call("cast", tmp_path / "bridge", translated[0], "-o", tmp_path / "no", code=1).stderr
    command = f"translate {source_folder} {translated[0]} {target_folder} --bridge {tmp_path / 'bridge'} --steps 0"
    assert f"use `peft-cast {command} -o {tmp_path / 'no'}`" in refused and "`Bridge" not in refused


def test_pushes_and_inspects_what_is_on_the_hub(translated, hub, monkeypatch):
    pushed = call("push", translated[0], "user/cast", "-m", "first", "--json")
    account = json.loads(pushed.stdout)
    assert "Warning  The target model is not named by a Hub id" in pushed.stderr and ".py" not in pushed.stderr
    assert {"cast_report.json", "report.html", "report.md"}.isdisjoint(
        hub.repos["user/cast"].files()
    )  # they quote texts
    assert account["url"].startswith(hub.url) and "first" in hub.repos["user/cast"].messages.values()
    assert json.loads(call("inspect", "user/cast", "--json").stdout)["kind"] == "CAST adapter"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "Error" in call("push", translated[0], "user/other", code=1).stderr


def test_evaluates(translated, target_folder, tmp_path):
    rows, config = tmp_path / "rows.jsonl", tmp_path / "tasks.yaml"
    rows.write_text("".join(json.dumps({"q": text[:40], "a": text[40:80]}) + "\n" for text in c4_texts(4)))
    task = {"type": "likelihood", "name": "next", "data": str(rows), "prompt": "{q}", "answer": "{a}"}
    config.write_text(yaml.safe_dump({"tasks": [task], "drift_samples": 2}))
    result = call("evaluate", target_folder, f"mine={translated[0]}", "--config", config, "-o", tmp_path / "e.json")
    assert "mine" in result.stdout and "next" in result.stdout
    assert json.loads((tmp_path / "e.json").read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "no/where"], "could not be read"),
        (["cast", "no/where", "x", "-o", "y"], "bridge 'no/where' could not be read"),
        (["plan", "a", "no/where", "b"], "could not be loaded"),
        (["translate", "a", "b", "c", "-o", "d", "--set", "speed=3"], "has no argument 'speed'"),
        (["translate", "a", "b", "c", "-o", "d", "--set", "speed"], "takes name=value"),
        (
            ["translate", "a", "b", "c", "-o", "d", "--config", "none.yaml"],
            "'none.yaml' could not be read: there is no such",
        ),
        (
            ["translate", "a", "b", "c", "-o", "d", "--prompts", "none.txt"],
            "'none.txt' could not be read: there is no such",
        ),
        (["translate", "a", "b", "c", "-o", "d", "--prompts", "."], "could not be read: it is a folder"),
        (["translate", "a", "b", "c", "-o", "d", "--dtype", "int8"], "`dtype` must be"),
        (["translate", "a", "b", "c", "-o", "d", "--set", "step=3"], "did you mean 'steps'?"),
        (["translate", "a", "b", "c", "-o", "d", "--steps", "-1"], "`steps` must be at least 0, got -1"),
        (["translate", "a", "b", "c", "-o", "d", "--set", "steps=many"], "`steps` must be a whole number"),
        (["translate", "a", "b", "c", "-o", "d", "--batch-size", "0"], "`batch_size` must be at least 1"),
        (["translate", "a", "b", "c", "-o", "d", "--learning-rate", "0"], "`learning_rate` must be a number above 0"),
        (["translate", "a", "b", "c", "-o", "d", "--set", "gamma=much"], "`gamma` must be a number"),
        (["translate", "a", "b", "c", "-o", "d", "--set", "depth_map={a: b}"], "maps layer numbers to layer numbers"),
        (["translate", "a", "b", "c", "-o", "d", "--set", "depth_map={a"], "neither YAML nor JSON (line 1, column 3"),
        (["evaluate", "a", "b=c", "--harness", "arc_easy", "--limit", "0"], "`limit` must be at least 1, got 0"),
        (["evaluate", "a", "b=c", "--harness", ","], "needs the name of a task"),
        (["translate", "a", "b", "c", "-o", "d", "--set", "module_map=up"], "`module_map` must be a mapping"),
        (
            ["translate", "a", "b", "c", "-o", "d", "--set", "training_args={weight_decai: 1}"],
            "did you mean 'weight_decay'?",
        ),
        (["translate", "a", "b", "c", "-o", "d", "--set", "projection_type=x"], "`projection_type` must be"),
        (["translate", "a", "b", "c", "-o", "d", "--device", "gpu"], "`device` must be 'cpu', 'cuda'"),
        (["translate", "a", "b", "c", "-o", "d", "--device", "meta"], "PyTorch finds no accelerator here"),
        (["translate", "a", "b", "c", "-o", "d", "--text", "no.jsonl"], "text file 'no.jsonl' does not exist"),
        (["plan", "a", "b", "c", "--set", "batch_size=0"], "`batch_size` must be at least 1"),
        (["translate", "a", "b", "c", "-o", "/dev/null/x"], "cannot be written (it is below a file): write"),
        (["bridge", "a", "b", "-o", "/dev/null/x"], "cannot be written (it is below a file)"),
        (["to-lora", "a", "-o", "/dev/null/x"], "cannot be written (it is below a file)"),
        (["translate", "a", "b", "c", "-o", ""], "`output_dir` is empty: pass where to write"),
        (["cast", "a", "b", "-o", ""], "`folder` is empty: pass where to write"),
        (["to-lora", "a", "-o", ""], "`folder` is empty: pass where to write"),
        (["evaluate", "a", "b=c", "--harness", "x", "-o", ""], "`output` is empty: pass where to write"),
        (["evaluate", "a", "b=c", "--harness", "x", "--plot", ""], "`plot` is empty: pass where to write"),
        (["evaluate", "a", "b=c", "--harness", "x", "--plot", "x.png"], "name the `--retrained` adapter"),
        (["evaluate", "a", "b=c", "--harness", "x", "--plot", "."], "`plot`, '.', is a folder"),
        (["inspect", "./no/where"], "there is no folder './no/where'"),
        (["bridge", "a", "b", "-o", "d", "--samples", "0"], "`samples` must be at least 2"),
        (["evaluate", "a", "b"], "name=folder"),
        (["evaluate", "a", "=b"], "name=folder"),
        (["evaluate", "a", "b="], "name=folder"),
        (["bridge", "-", "b", "-o", "d"], "source model could not be loaded: there is no folder '-', and no hub id"),
        (["report", "/nope"], "could not be read, there is no folder '/nope': pass the folder"),
        (["evaluate", "a", "b=c"], "nothing to evaluate on"),
    ],
)
def test_what_you_can_mend_is_one_sentence(words, message):
    result = call(*words, code=1)
    assert message in result.stderr and "Traceback" not in result.output
    assert result.stderr.startswith("Error")


def test_an_error_that_nobody_foresaw_is_one_sentence_too(monkeypatch):
    monkeypatch.setattr("peft_cast.cli.inspect.as_path", lambda adapter: {}[adapter])
    error = call("inspect", "lora", code=1).stderr
    assert error.startswith("Error  KeyError in cli/inspect.py, line ") and "'lora'. This should" in error
    assert "please report it" in error and "Traceback" not in error
    assert "No such command" in call("inspekt", code=2).stderr


@pytest.mark.parametrize("command", ["translate", "plan"])
def test_what_was_confused_with_what_is_one_sentence(command, source_folder, lora_folder, target_folder, tmp_path):
    out = ["-o", tmp_path / "out"] if command == "translate" else []
    for (source, adapter, target), message in (
        ((source_folder, lora_folder, lora_folder), "holds an adapter, not a model"),
        ((lora_folder, lora_folder, target_folder), "holds an adapter, not a model"),
        ((source_folder, target_folder, target_folder), "holds a model, no adapter"),
        ((source_folder, tmp_path, target_folder), "holds no adapter_config.json"),
        ((source_folder, tmp_path / "no" / "lora", target_folder), "there is no folder"),
        ((source_folder, lora_folder, tmp_path / "no" / "model"), "there is no folder"),
        ((target_folder, lora_folder, source_folder), "does not fit the source model"),
    ):
        error = call(command, source, adapter, target, *out, code=1).stderr
        assert message in error and "\nError" in f"\n{error}" and "None" not in error


def test_nothing_is_written_over_what_is_read_or_of_another_kind(
    translated, source_folder, lora_folder, target_folder, tmp_path, quick
):
    models = (source_folder, lora_folder, target_folder)
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    shutil.copytree(translated[0], kept)
    (tmp_path / "file").write_text("")
    call("to-lora", translated[0], "-o", plain)
    for words, message in (
        (["translate", *models, "--config", quick, "-o", lora_folder], "would be overwritten while it is read"),
        (["translate", *models, "--config", quick, "-o", plain], "holds an adapter of type LORA"),
        (["translate", *models, "--config", quick, "-o", target_folder], "would be overwritten while it is read"),
        (["translate", *models, "--config", quick, "-o", tmp_path / "file"], "is a file"),
        (["to-lora", kept, "-o", kept], "would be overwritten while it is read"),
        (["to-lora", kept, "-o", lora_folder], "holds a LoRA that is no result of peft-cast"),
        (["to-lora", translated[0], "-o", kept], "holds an adapter of type CAST"),
        (["to-lora", kept, "-o", source_folder], "holds a model"),
        (["bridge", source_folder, target_folder, "-o", plain], "holds an adapter of type LORA"),
    ):
        assert message in call(*words, code=1).stderr
    assert json.loads(call("inspect", lora_folder, "--json").stdout)["kind"] == "LORA"
    assert json.loads(call("inspect", kept, "--json").stdout)["kind"] == "CAST adapter"


def test_says_its_version():
    assert call("--version").stdout == f"peft-cast {peft_cast.__version__}\n"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (FloatingPointError("it grew"), 3)])
def test_exit_codes_tell_interruption_and_divergence(
    error, code, monkeypatch, tmp_path, quick, source_folder, lora_folder, target_folder
):
    def fail(*_, **__):
        raise error

    replace_translate(monkeypatch, fail)
    folders = (source_folder, lora_folder, target_folder)
    call("translate", *folders, "-o", tmp_path, "-q", "--config", quick, code=code)


def test_wrong_options_exit_with_2():
    call("translate", "only-one", code=2)


def test_texts_are_made_from_words_and_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("Question: two?\\nAnswer:\n\nQuestion: three?\\nAnswer:\n")
    prompts = ("Question: two?\nAnswer:", "Question: three?\nAnswer:")
    assert read_prompts(tmp_path / "prompts.txt") == prompts
    assert text_of({"self": {"prompts": str(tmp_path / "prompts.txt")}}).prompts == prompts
    assert (
        text_of("self") == peft_cast.SelfWritten() and text_of("c4") == peft_cast.text.C4 and text_of("a/b") == "a/b"
    )
    mixed = text_of([{"text": "self", "weight": 3}, {"text": {"corpus": {"source": "a/b", "split": "test"}}}])
    assert mixed == peft_cast.Mixture((peft_cast.SelfWritten(), 3), (peft_cast.Corpus("a/b", split="test"), 1))
    for wrong in (3, {"self": {"lines": 1}}, {"other": {}}, [], {"corpus": "x"}):
        with pytest.raises(ValueError):
            text_of(wrong)


def test_settings_are_yaml_and_checked_by_the_functions_signature():
    settings = read_settings(["depth-map={0: 1, 2: 3}", "gamma=0.5", "dtype=bfloat16"])
    given = arguments_for(peft_cast.translate, settings, {"gamma": 2, "steps": None})
    assert given["depth_map"] == {0: 1, 2: 3} and given["gamma"] == 2 and "steps" not in given
    assert str(given["dtype"]) == "torch.bfloat16"


def test_tasks_are_made_from_mappings():
    made = tasks_of([{"type": "classification", "name": "n", "data": "d", "prompt": "{text}", "labels": ["a", "b"]}])
    assert made == [peft_cast.Classification("n", "d", "{text}", ("a", "b"))]
    for wrong, message in (
        ([{"type": "poem"}], "must be one of"),
        ([{"type": ["likelihood"]}], "must be one of"),
        ({"type": "harness"}, "must be a list of mappings"),
        ([{"type": "likelihood", "name": "n"}], "^`likelihood` lacks `data`, `prompt` and `answer`: add them.$"),
        ([{"type": "likelihood", 5: 6, "x": 7}], "`likelihood` has no option '5'"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks_of(wrong)
