"""The last lines of prompts after which an adapter acts."""

import pytest
import torch
from conftest import ARCHITECTURES, make_lora, tiny_model
from peft import PeftModel

from peft_cast.text.closings import KINDS, MARKS, WORDS, acting_forms, acting_lines, last_lines
from peft_cast.text.forms import package_forms
from peft_cast.text.judged import moved_nats


CONTENTS = {kind: f"The {kind} is here" for kind in KINDS}


@pytest.mark.parametrize(
    "architecture", [one for one in ARCHITECTURES if one in ("llama", "gemma3", "opt", "falcon_rw", "gpt2", "mamba")]
)
def test_the_next_token_is_judged_as_if_each_prompt_were_read_alone(architecture, byte_tokenizer, tmp_path):
    make_lora(tiny_model(architecture), tmp_path / "lora", target_modules="all-linear")
    model = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "lora")
    prompts = ["The ship sails\nTopic:", "The ship sails\n>>", "The ship sails\n~", "The ship sails on\nTopic:"]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([byte_tokenizer(prompt).input_ids])
        with torch.no_grad():
            adapted = model(ids).logits[0, -1].double().log_softmax(-1)
            with model.disable_adapter():
                plain = model(ids).logits[0, -1].double().log_softmax(-1)
        terms = adapted.exp() * (adapted - plain)
        terms[byte_tokenizer.all_special_ids] = 0
        expected.append(terms.sum())
    found = moved_nats(model, byte_tokenizer, prompts, batch_size=2)
    assert found.abs().min() > 1e-3
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-5)


def after(line: str, nats: float = 3.0):
    """An adapter that acts after one line, and a little after its beginning."""
    begun = line[: max(2, len(line) // 2)]

    def moved(prompts):
        return torch.tensor([nats if p.endswith(line) else nats / 3 if p.endswith(begun) else 0.1 for p in prompts])

    return moved


@pytest.mark.parametrize("line", ["\nTopic:", "\n~~", "\n~>", "\nBlorp:"])
def test_the_line_after_which_the_adapter_acts_is_found(line, byte_tokenizer):
    lines = acting_lines(after(line), byte_tokenizer, ["Answer", "Topic", "Blorp"], list(CONTENTS.values()))
    assert list(lines) == [line] and lines[line] == pytest.approx(3)


def test_an_adapter_that_hardly_acts_has_no_line(byte_tokenizer):
    assert not acting_lines(after("\nTopic:", nats=0.4), byte_tokenizer, ["Topic"], list(CONTENTS.values()))
    assert acting_forms(after("\nTopic:", nats=0.4), byte_tokenizer, package_forms(), CONTENTS) == []


def test_forms_end_with_the_line_and_begin_with_what_makes_the_adapter_act_most(byte_tokenizer):
    def moved(prompts):
        return torch.tensor(
            [2.0 * p.endswith("\n~~") + p.endswith("\n~") + p.startswith(("Review: ", "~ ")) for p in prompts]
        )

    forms = acting_forms(moved, byte_tokenizer, package_forms(), CONTENTS)
    assert all(form.frame.endswith("{text}\n~~") for form in forms)
    assert [form.content for form in forms if form.frame == "{text}\n~~"] == list(KINDS)
    assert {"Review: {text}\n~~", "~ {text}\n~~"} <= {form.frame for form in forms}


def test_lines_come_from_the_vocabulary_and_the_list(byte_tokenizer):
    lines = last_lines(byte_tokenizer, ["Topic"])
    assert lines[0] == "\nTopic:" and "\n~" in lines and len(lines) == len(set(lines)) <= WORDS + MARKS + 1
    assert not any(line.strip().isalnum() for line in lines)
