"""The code of README, docs and examples runs: on tiny models behind the hub ids it names, with few steps and texts.

What cannot run here stands under `<!-- not run: reason -->` and is checked by name: modules, attributes, arguments,
options.
"""

import ast
import dataclasses
import functools
import gc
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import typer
import yaml
from conftest import ROOT, c4_texts, make_lora
from hub_server import TOKENS
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import peft_cast
from peft_cast.cli.app import app
from peft_cast.cli.settings import arguments_for, tasks_of
from peft_cast.options import names_taken


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("*.md"))
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "examples" / "translate_your_own.ipynb"
SOURCES = ["HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-2-7b-hf"]
TARGETS = ["google/gemma-3-270m", "mistralai/Mistral-7B-v0.1"]
LORAS = ["your-lora", "math-lora", "news-lora", "next-lora"]
RETRAINED = ["lora-trained-on-gemma", "other-lora"]
SOURCE, LORA, TARGET = SOURCES[0], f"you/{LORAS[0]}", TARGETS[0]
# The words that stand for the reader's own things.
WORDS = {"SOURCE": SOURCE, "ADAPTER": LORA, "TARGET": TARGET}
MOST = {
    "steps": 2,
    "batch_size": 4,
    "fit_samples": 8,
    "eval_samples": 4,
    "samples": 8,
    "max_length": 96,
    "report_samples": 0,
    "progress": False,
}
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n\n?)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start("code")), m["language"], m["code"], m["reason"])
        for m in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def pages_with(language: str) -> list:
    runs = {block.page: None for block in BLOCKS if block.language == language and not block.reason}
    return [pytest.param(page, id=page.name) for page in runs]


def run_python(blocks: list[Block], names: dict) -> None:
    for block in blocks:
        # Line breaks in front: a traceback then names the line of the page.
        exec(compile("\n" * block.line + block.code, str(block.page), "exec"), names)


def shortened(function):
    """The function with at most so many steps and texts. `translate(...)` means the page's usual arguments."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **options):
        given = signature.bind(*((SOURCE, LORA, TARGET) if args == (...,) else args), **options)
        given.apply_defaults()
        for name, field in names_taken(function).items():
            if name in MOST:
                given.arguments["options"][name] = min(given.arguments["options"].get(name, field.default), MOST[name])
        return function(*given.args, **given.kwargs)

    return call


def capped(monkeypatch, kind, name: str, most: int):
    made = kind.__post_init__

    def __post_init__(self):
        made(self)
        object.__setattr__(self, name, min(getattr(self, name) or most, most))

    monkeypatch.setattr(kind, "__post_init__", __post_init__)


def local_harness(run):
    """The task of the harness, on rows of ours: it would download them."""
    tasks = pytest.importorskip("lm_eval.tasks")
    rows = [{"question": text[:40], "choices": ["yes", "no, not at all"], "gold": 0} for text in c4_texts(2)]
    Path("harness.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": os.path.abspath("harness.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    # Without the tasks of the package, which take seconds to list for every model.
    options = {"task_manager": tasks.TaskManager(include_defaults=False)}
    return lambda task, *args: run(
        dataclasses.replace(task, task={**config, "task": task.name}, options=options), *args
    )


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect():
    # A translation collects garbage after each phase. What the imports made is never garbage, and going through it is
    # most of the time that a translation of tiny models takes.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def shelves(tmp_path_factory, source_folder, target_folder, lora_folder):
    """Folders by the hub ids that the pages name."""
    retrained = make_lora(AutoModelForCausalLM.from_pretrained(target_folder), tmp_path_factory.mktemp("lora"), seed=7)
    return {
        **dict.fromkeys(SOURCES, source_folder),
        **dict.fromkeys(TARGETS, target_folder),
        **{f"you/{name}": lora_folder for name in LORAS},
        **{f"you/{name}": retrained for name in RETRAINED},
    }


@pytest.fixture(scope="module")
def before(tmp_path_factory, source_folder, lora_folder, target_folder):
    """What pages take for granted: a translation that was saved, and a bridge."""
    folder, quick = tmp_path_factory.mktemp("before"), {"progress": False, "max_length": 32}
    result = peft_cast.translate(
        source_folder,
        lora_folder,
        target_folder,
        text=c4_texts(12),
        steps=1,
        fit_samples=8,
        eval_samples=2,
        batch_size=2,
        **quick,
    )
    result.save_pretrained(folder)
    return folder, peft_cast.fit_bridge(source_folder, target_folder, text=c4_texts(12), samples=8, **quick)


@pytest.fixture
def reader(hub, shelves, monkeypatch, tmp_path):
    """A reader called "you" in a folder of their own, with the hub ids of the pages and little patience."""
    for repo_id, folder in shelves.items():
        hub.add(repo_id, folder)
    monkeypatch.setitem(TOKENS, "hf_you", ("you", "write"))
    monkeypatch.setenv("HF_TOKEN", "hf_you")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(ROOT / "examples" / "prompts.txt", "prompts.txt")
    problems = (ROOT / "examples" / "data" / "gsm8k_test_200.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    Path("test.jsonl").write_text("\n".join(problems), encoding="utf-8")
    for name in ("translate", "plan", "fit_bridge"):
        monkeypatch.setattr(peft_cast, name, shortened(getattr(peft_cast, name)))
    capped(monkeypatch, peft_cast.SelfWritten, "max_new_tokens", 8)
    capped(monkeypatch, peft_cast.SelfWritten, "more_prompts", 0)
    capped(monkeypatch, peft_cast.Generation, "max_new_tokens", 4)
    rows_of = peft_cast.evaluation.tasks._rows
    monkeypatch.setattr("peft_cast.evaluation.tasks._rows", lambda task: rows_of(task)[:3])
    run = peft_cast.HarnessTask.run
    monkeypatch.setattr(peft_cast.HarnessTask, "run", lambda task, *args: local_harness(run)(task, *args))
    load = datasets.load_dataset

    def load_dataset(path, *args, **options):
        if path != "allenai/c4":
            return load(path, *args, **options)
        file = str(ROOT / "examples" / "data" / "c4_en_400.jsonl")
        return load("json", data_files=file, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_of_a_page_run_in_order(page, reader, before, tmp_path):
    folder, bridge = before
    shutil.copytree(folder, tmp_path / "my-translated-lora")
    names = {
        "peft_cast": peft_cast,
        "PeftModel": PeftModel,
        "source": SOURCE,
        "lora": LORA,
        "adapter": LORA,
        "target": TARGET,
        "retrained": "you/other-lora",
        "text": c4_texts(20),
        "bridge": bridge,
        "tasks": [peft_cast.AnswerLikelihood("GSM8K", "test.jsonl", "{question}", " {answer}")],
        "model": AutoModelForCausalLM.from_pretrained(TARGET),
    }
    run_python([b for b in blocks_of(page) if b.language == "python" and not b.reason], names)


def commands_of(block: Block) -> list[list[str]]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_of_a_page_run_in_order(page, reader):
    for block in blocks_of(page):
        for words in commands_of(block) if block.language == "bash" and not block.reason else []:
            if words[0] == "peft-cast":
                result = CliRunner().invoke(app, [WORDS.get(word, word) for word in words[1:]])
                assert result.exit_code == 0, f"{block.name}: {shlex.join(words)}\n{result.output}"
            else:
                check_other(words, block)


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
EXTRAS = set(re.findall(r"^(\w+) = \[", PYPROJECT.partition("[project.optional-dependencies]\n")[2], flags=re.M))


def check_other(words: list[str], block: Block) -> None:
    """Commands that are known to exist: targets of the Makefile, our package and its extras, our scripts."""
    match words:
        case ["make", target]:
            assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), f"{block.name}: no target '{target}'"
        case ["pip", "install", *wanted]:
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(wanted)):
                assert set(extra.split(",")) <= EXTRAS, f"{block.name}: no extra '{extra}'"
        case ["python", script, *options]:
            text = (ROOT / script).read_text(encoding="utf-8")
            for option in options:
                assert not option.startswith("--") or f'"{option}"' in text, f"{block.name}: no option {option}"
        case _:
            pytest.fail(f"{block.name}: '{shlex.join(words)}' is not run here, say so: <!-- not run: reason -->")


def test_settings_files_hold_arguments_of_the_functions(reader):
    found = [block for block in BLOCKS if block.language == "yaml"]
    assert found
    for block in found:
        given = yaml.safe_load(block.code)
        tasks = tasks_of(given.pop("tasks")) if "tasks" in given else None
        assert tasks != [] and arguments_for(peft_cast.evaluate if tasks else peft_cast.translate, given) is not None


def test_every_block_says_what_it_is():
    known = {"python", "bash", "yaml", "text"}
    assert [f"{block.name}: {block.language}" for block in BLOCKS if block.language not in known] == []
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks_of(page)), page
        marks = len(re.findall(r"^<!-- not run:", page.read_text(encoding="utf-8"), flags=re.M))
        assert marks == sum(block.reason is not None for block in blocks_of(page)), f"{page}: a mark without its block"


COMMANDS = typer.main.get_command(app).commands


def check_options(words: list[str], where: str) -> None:
    if words[0] == "peft-cast":
        known = {option for parameter in COMMANDS[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, f"{where}: {shlex.join(words)}"


def dotted(node: ast.AST) -> list[str]:
    """`a.b.c` as its parts; empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*inner, node.attr] if inner else []


def check_names(code: str, where: str) -> int:
    """That imports, attributes of what is imported and arguments of its functions exist. How many were looked at."""
    tree, names, looked_at = ast.parse(code), {"peft_cast": peft_cast}, 0
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module != "__future__":
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                (a.asname or a.name).split(".")[0]: importlib.import_module(a.name.split(".")[0]) for a in node.names
            }
    for node in ast.walk(tree):
        first, *rest = dotted(node.func if isinstance(node, ast.Call) else node) or [None]
        if first not in names:
            continue
        found = names[first]
        for part in rest:
            assert hasattr(found, part), f"{where}: {first}.{'.'.join(rest)} does not exist"
            found = getattr(found, part)
        looked_at += 1
        if isinstance(node, ast.Call) and getattr(found, "__module__", "").startswith("peft_cast"):
            known = dict(inspect.signature(found).parameters)
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
            if known.pop("options", None):
                known, anything = known | names_taken(found), False
            assert anything or given <= set(known), f"{where}: {first} has no argument {sorted(given - set(known))}"
    return looked_at


@pytest.mark.parametrize("block", [pytest.param(b, id=b.name) for b in BLOCKS if b.reason])
def test_blocks_that_are_not_run_use_real_names(block):
    if block.language == "python":
        assert check_names(block.code, block.name)
    for words in commands_of(block) if block.language == "bash" else []:
        check_options(words, block.name)


@pytest.mark.parametrize("script", [pytest.param(path, id=path.name) for path in SCRIPTS])
def test_example_scripts_use_real_names(script):
    assert check_names(script.read_text(encoding="utf-8"), script.name)


def test_the_check_of_names_finds_names_that_are_not_there():
    for code, message in (
        ("peft_cast.translat()", "peft_cast.translat does not exist"),
        ("from peft_cast import evaluate\nevaluate('m', {}, [], task=1)", r"no argument \['task'\]"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_names(code, "here")
    with pytest.raises(AssertionError, match="--outptu"):
        check_options(["peft-cast", "translate", "a", "b", "c", "--outptu", "x"], "here")


def run_script(monkeypatch, name: str, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def test_the_script_translates_compares_and_pushes(reader, monkeypatch, capsys):
    run_script(
        monkeypatch,
        "translate_your_own.py",
        SOURCE,
        LORA,
        TARGET,
        "--prompts",
        "prompts.txt",
        "--output",
        "mine",
        "--test",
        "test.jsonl",
        "--prompt",
        "Question: {question}\\nAnswer:",
        "--answer",
        " {answer}",
        "--retrained",
        "you/other-lora",
        "--push",
        "you/mine",
    )
    assert "adapter_model.safetensors" in reader.repos["you/mine"].files()
    table = capsys.readouterr().out
    assert "translated" in table and "(1.00)" in table  # the retrained LoRA's own lift
    model = AutoModelForCausalLM.from_pretrained(TARGET)
    assert PeftModel.from_pretrained(model, "mine").active_peft_config.peft_type == "CAST"


def test_the_recipe_for_a_large_gpu_runs_on_tiny_models_and_again_from_its_folder(reader, monkeypatch, capsys):
    for _ in range(2):
        run_script(monkeypatch, "llama2_to_mistral.py", LORA, "prompts.txt")
    assert json.loads(Path("llama2-to-mistral", "run.json").read_text())["finished"]
    assert "closed_form" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="Pass the LoRA"):
        run_script(monkeypatch, "llama2_to_mistral.py")


def test_the_notebook_runs_and_shows_nothing_that_was_not_run(reader):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    run_python([Block(NOTEBOOK, 0, "python", "".join(cell["source"]), None) for cell in cells], {})
    assert Path("my-translated-lora", "report.html").exists()
    assert "adapter_model.safetensors" in reader.repos["you/my-translated-lora"].files()


def test_the_script_of_the_harness_compares_adapters(reader, before, monkeypatch, capsys):
    run_script(
        monkeypatch,
        "evaluate_with_lm_eval.py",
        TARGET,
        f"translated={before[0]}",
        "retrained=you/other-lora",
        "--tasks",
        "arc_easy",
        "--retrained",
        "retrained",
        "--output",
        "rows.json",
    )
    assert {row.adapter for row in peft_cast.Evaluation.load("rows.json").rows} >= {"translated", "retrained"}
    assert "arc_easy" in capsys.readouterr().out


def test_the_script_for_servers_folds_to_the_rank_and_names_the_command(reader, before, monkeypatch, capsys):
    run_script(monkeypatch, "serve_folded.py", str(before[0]), "--output", "folded")
    assert json.loads(Path("folded", "adapter_config.json").read_text())["r"] == 16
    said = capsys.readouterr().out
    assert "--max-lora-rank 16" in said and "=folded" in said
