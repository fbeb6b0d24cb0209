"""What README and docs claim is what was measured, and their code is not made up."""

import ast
import json
import re

import pytest
from conftest import ROOT

import peft_cast


README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = json.loads((ROOT / "docs" / "figures" / "demo.json").read_text(encoding="utf-8"))


def row(name: str) -> list[str]:
    line = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("Gemma-3-270m, untouched", "base"),
        ("Gemma-3-270m with the translated LoRA", "translated"),
        ("SmolLM2-135M with its own LoRA (the source)", "source_with_lora"),
    ],
)
def test_the_readmes_table_is_the_committed_measurement(name, scores):
    cells = row(name)
    assert cells[0] == f"{DEMO[scores]['nats_per_character']:.3f}"
    if "format_share" in DEMO[scores]:
        assert cells[1] == f"{DEMO[scores]['format_share']:.0%}"


def test_the_readmes_costs_are_the_committed_measurement():
    for name, cost in {**DEMO["phases"], **DEMO["translation"]["phases"]}.items():
        assert row(f"`{name}`") == [f"{cost['seconds']:.0f}", f"{cost['peak_memory_mb'] / 1024:.1f}"]
    for count in DEMO["translation"]["parameters"].values():
        assert f"{count:,}" in README
    assert f"{DEMO['way_to_source']:.0%} of the way" in README


def test_the_demo_was_better_than_the_base_when_it_was_measured():
    assert DEMO["base"]["nats_per_character"] - DEMO["translated"]["nats_per_character"] > 0.05


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


def test_no_file_of_the_package_is_too_long():
    for path in (ROOT / "peft_cast").rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
