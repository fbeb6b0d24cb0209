"""Who may import whom: the picture in CONTRIBUTING.md, held against every import of the package."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_cast"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def floors() -> list[str]:
    """The places of the picture, from the ground up."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = text.split("<!-- imports: each may import those above it -->")[1].split("```")[1]
    return [line.split()[0] for line in picture.splitlines()[1:] if line.strip()]


def place(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def as_file(parts: tuple[str, ...]) -> str | None:
    path = "/".join(parts)
    return next((f for f in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if f in FILES), None)


def imports(file: str) -> dict[str, set[str]]:
    """The files that a file imports, those under TYPE_CHECKING and in functions too, with the names taken from each.

    A name that a folder's `__init__` only passes on counts as taken from where it is made.
    """
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom):
            here = tuple(file.split("/")[:-1])
            if node.level:
                start = here[: len(here) - (node.level - 1)]
            elif (node.module or "").split(".")[0] == "peft_cast":
                start = ()
            else:
                continue
            rest = tuple((node.module or "").split(".")) if node.module else ()
            parts = start + (rest if node.level else rest[1:])
            for alias in node.names:
                module = as_file((*parts, alias.name)) or as_file(parts)
                assert module is not None, f"{file} imports from {parts}"
                found.setdefault(made_in(module, alias.name), set()).add(alias.name)
    return found


@cache
def made_in(file: str, name: str) -> str:
    if file.endswith("__init__.py") and not file == "__init__.py":
        for other, names in imports(file).items():
            if name in names:
                return other
    return file


def test_the_picture_shows_every_place():
    assert floors() == list(dict.fromkeys(floors()))
    assert set(floors()) == {place(file) for file in FILES} - {"__init__", "__main__"}
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "options.py"}


@pytest.mark.parametrize("file", [file for file in FILES if place(file) not in ("__init__", "__main__")])
def test_no_import_leads_down_the_picture(file):
    order = floors()
    below = {other for other in imports(file) if place(other) in order[order.index(place(file)) + 1 :]}
    assert not below, f"{file} imports {below}, which stand below it"


def test_there_is_no_circle():
    arrows = {file: set(imports(file)) - {file} for file in FILES if not file.endswith("__init__.py")}
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(f"these import each other: {error.args[1]}")


def test_modules_of_a_folder_import_each_other_and_not_the_folder():
    for file in FILES:
        up = re.findall(r"^from \.+(\w*)", (PACKAGE / file).read_text(encoding="utf-8"), flags=re.M)
        if "/" in file and not file.endswith("__init__.py"):
            assert place(file) not in up, file


def test_files_answer_one_question():
    for file in FILES:
        assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= 400, file
