"""docs/peft.md promises what the tests check, and all of it."""

import ast

from conftest import ROOT


ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "peft.md").read_text(encoding="utf-8").split("## Versions")[0].splitlines()
    if line.startswith("| ") and not line.endswith("| test |")
]
UNTESTED = ("not applicable", "not seen", "do not use")


def functions_of(pattern):
    for path in (ROOT / "tests").glob(pattern):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield node.name


def named(cell):
    return [part.strip().strip("`") for part in cell.split(",") if part.strip()]


def test_every_promise_names_tests_that_exist():
    existing = set(functions_of("test_peft_*.py"))
    assert len(ROWS) > 50
    for behavior, result, tests in ROWS:
        assert named(tests) or result.startswith(UNTESTED), f"no test for: {behavior}"
        assert set(named(tests)) <= existing, f"no such test: {tests}"


def test_every_test_is_a_promise():
    promised = {name for *_, tests in ROWS for name in named(tests)}
    own = set(functions_of("test_peft_docs.py"))
    assert set(functions_of("test_peft_*.py")) - own == promised


def test_every_promise_says_how_it_ends():
    for behavior, result, _ in ROWS:
        known = ("works", "refused", "as LoRA", "chooses LoRA's", "`ValueError`", "by PEFT's dispatch", *UNTESTED)
        assert result.startswith(known), f"{behavior}: {result}"
