"""What README and docs claim is what was measured, and their code is not made up."""

import ast
import json
import re
from statistics import mean

import pytest
from conftest import ROOT

import peft_cast
from peft_cast.options import table


SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = json.loads((ROOT / "docs" / "figures" / "demo.json").read_text(encoding="utf-8"))


def row(name: str) -> list[str]:
    line = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("Gemma-3-270m, untouched", "base"),
        ("Gemma-3-270m with the translated LoRA", "translated"),
        ("Gemma-3-270m with a LoRA retrained on it", "retrained"),
    ],
)
def test_the_readmes_table_is_the_committed_measurement(name, adapter):
    scores = DEMO["scores"][adapter]
    assert row(name) == [
        f"{scores['nats_per_character']:.3f}",
        f"{scores['recovered_lift'] + 0:.2f}",
        f"{scores['in_format']:.0%}",
        f"{scores.get('drift', 0.0):.3f}",
    ]


def test_the_readmes_costs_are_the_committed_measurement():
    for name, cost in {**DEMO["phases"], **DEMO["translation"]["phases"]}.items():
        assert row(f"`{name}`") == [f"{cost['seconds']:.0f}", f"{cost['peak_memory_mb'] / 1024:.1f}"]
    for count in DEMO["translation"]["parameters"].values():
        assert f"{count:,}" in README


def test_the_demo_was_better_than_the_base_when_it_was_measured():
    base, translated = (DEMO["scores"][name]["nats_per_character"] for name in ("base", "translated"))
    assert base - translated > 0.05


def rows_of_markdown(text: str) -> list[list[str]]:
    lines = (line for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


TABLES = sorted((ROOT / "docs" / "figures").glob("table_*.json"))


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.stem)
def test_tables_in_the_results_are_the_committed_measurements(file):
    evaluation = peft_cast.Evaluation.load(file)
    page = rows_of_markdown((ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    for line in rows_of_markdown(evaluation.table()):
        assert line in page, f"docs/results.md lacks this row of {file.name}: {line}"


def numbers_of(text: str) -> set[str]:
    return set(re.findall(r"(?<![\d.])-?\d\.\d{2,3}(?![\d.])", text.replace("\u2212", "-")))


@pytest.mark.parametrize("page", ["comparison", "limits", "text"])
def test_numbers_on_other_pages_are_those_of_the_results(page):
    claimed = numbers_of((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    measured = numbers_of((ROOT / "docs" / "results.md").read_text(encoding="utf-8")) | numbers_of(README)
    assert claimed and claimed <= measured, f"docs/{page}.md: {sorted(claimed - measured)}"


def test_the_comparison_is_the_committed_measurement():
    head, *page = rows_of_markdown(
        (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8").partition("## What we measured")[2]
    )
    cells = {(line[0], task): cell for line in page for task, cell in zip(head[1:], line[1:])}
    measured = {}
    for file in (file for file in TABLES if "smollm2-gemma3" in file.name):
        evaluation, modules = peft_cast.Evaluation.load(file), ", q and v" if file.stem.endswith("_qv") else ""
        drifts = {row.adapter: f" ({mean(row.scores):.3f})" for row in evaluation.rows if row.task == "drift"}
        for row in evaluation.rows:
            if row.adapter != "base" and row.task != "drift":
                drift = "" if row.task == "GSM8K generation" else drifts[row.adapter]
                measured[row.adapter, row.task + modules] = f"{mean(row.lift):.2f}{drift}"
    assert {key: cell for key, cell in cells.items() if cell != "not run"} == measured


EXPERIMENTS = ROOT / "docs" / "figures" / "experiments.json"
RUNS = json.loads(EXPERIMENTS.read_text(encoding="utf-8"))["runs"] if EXPERIMENTS.exists() else {}


@pytest.mark.parametrize("key", RUNS)
def test_experiments_in_the_results_are_the_committed_measurements(key):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    cells = [f"{RUNS[key]['scores'][name]:.3f}" for name in ("nats_per_character", "recovered_lift", "drift")]
    assert " | ".join(cells) in page


def test_python_blocks_parse_and_use_real_names():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "peft_cast":
                assert hasattr(peft_cast, node.attr)


def test_links_inside_the_repository_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_of_the_site_is_in_its_navigation_once():
    navigation = re.search(r"^nav:\n(.*?)^\S", SITE, flags=re.M | re.S)[1]
    named = re.findall(r"\S+\.md$", navigation, flags=re.M)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert named[0] == "index.md"


def test_the_page_of_the_options_is_what_make_options_writes():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page.partition("<!-- options: made by make options -->\n\n")[2] == table()


def test_every_public_name_is_on_the_page_of_the_api():
    page = re.findall(r"^::: peft_cast\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(page) == len(set(page))
    assert {name.split(".")[0] for name in page} == set(peft_cast.__all__)
