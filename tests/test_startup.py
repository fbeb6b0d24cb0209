"""What is imported when: the command line answers before PyTorch is there, and CAST is registered once PEFT is."""

import subprocess
import sys

import pytest


HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "safetensors", "numpy"}


def imported_by(code: str, before: str = "") -> set[str]:
    """The top-level modules that code imports in a fresh Python, whether or not it exits, beyond those before it."""
    program = (
        f"import sys\nexec({before!r})\nthere = set(sys.modules)\ntry:\n exec({code!r})\n"
        "finally:\n print('\\n', *{name.partition('.')[0] for name in set(sys.modules) - there})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("words", ["--help", "--version", "translate --help", "plan --help", "cast --help"])
def test_help_and_version_wait_for_no_library(words):
    found = imported_by(f"sys.argv = 'peft-cast {words}'.split()\nfrom peft_cast.cli import main\nmain()")
    assert "typer" in found and not found & HEAVY, found & HEAVY


def test_the_package_adds_nothing_heavy_to_peft_and_registers_with_it():
    registered = "import peft\nassert peft.PeftType.CAST and peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING['CAST']"
    added = imported_by(f"import peft_cast\n{registered}", before="import peft")
    assert "peft_cast" in added and not added & {"datasets", "lm_eval", "matplotlib", "rich", "typer"}, added
    # The other way round it waits for PEFT.
    assert not imported_by("import peft_cast") & HEAVY
    imported_by(f"import peft_cast\n{registered}")


def test_every_public_name_is_there_and_is_no_folder_of_its_name():
    import peft_cast.translate.job  # noqa: F401  # would put the folder in the function's place

    assert set(peft_cast.__all__) <= set(dir(peft_cast))
    for name in peft_cast.__all__:
        assert getattr(peft_cast, name).__name__.endswith(name), name
    with pytest.raises(AttributeError, match="module 'peft_cast' has no attribute 'translat'"):
        peft_cast.translat


def test_several_may_wait_for_one_module():
    wait = "when_imported('colorsys', lambda: print('first'))\nwhen_imported('colorsys', lambda: print('second'))"
    code = f"from peft_cast.utils.importing import when_imported\n{wait}\nimport colorsys"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert sorted(done.stdout.split()) == ["first", "second"], done.stderr
