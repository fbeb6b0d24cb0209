"""Options are data: one field is all that a new option takes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import c4_texts, sentencepiece_tokenizer, tiny_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers.training_args import OptimizerNames
from typer.testing import CliRunner

import peft_cast
from peft_cast import Evaluation, Fit, Pairing, Projections, Run, Training, options
from peft_cast.cli import app as cli
from peft_cast.cli.flags import with_flags
from peft_cast.cli.settings import arguments_for
from peft_cast.options import Options, names_taken, table
from peft_cast.refine.run import described
from peft_cast.results.artifacts import Artifact, Origin, replacing_folder
from peft_cast.results.cards import make_card
from peft_cast.results.licenses import License, Licenses
from peft_cast.source.pair import open_pair
from peft_cast.utils.fields import option


@pytest.fixture
def novelty(monkeypatch):
    """A group with one option more, in the place of `Training`."""

    @dataclasses.dataclass(frozen=True)
    class Larger(Training):
        novelty: int = option(3, "How novel. And why.", everyday=True, least=1)

    Larger.__name__ = "Training"
    monkeypatch.setitem(options.GROUPS, "training", Larger)
    return Larger


def test_folders_may_be_named_from_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = Options.of({"output_dir": "~/out", "cache_dir": Path("~/kept")}).run
    assert (run.output_dir, run.cache_dir) == (tmp_path / "out", tmp_path / "kept")
    for name in ("output_dir", "cache_dir"):
        with pytest.raises(ValueError, match=f"`{name}` is empty"):
            Options.of({name: ""})
    with replacing_folder("~/a") as partial:
        (partial / "x").write_text("")
    Evaluation((), {}, {}).save("~/b/e.json")
    assert (tmp_path / "a" / "x").exists() and (tmp_path / "b" / "e.json").exists()


def test_a_new_field_is_checked(novelty):
    assert Options.of({}).training.novelty == 3 and Options.of({"novelty": 5}).values()["novelty"] == 5
    for wrong, message in ((0, "`novelty` must be at least 1, got 0"), ("x", "`novelty` must be a whole number")):
        with pytest.raises(ValueError, match=message):
            Options.of({"novelty": wrong})
    with pytest.raises(TypeError, match="has no argument 'novelti': did you mean 'novelty'"):
        Options.of({"novelti": 5})


def test_a_new_field_is_a_flag_a_key_and_a_row(novelty):
    seen = {}
    app = cli.typer.Typer()
    app.command()(with_flags("translate")(lambda flags: seen.update(flags)))
    assert CliRunner().invoke(app, ["--novelty", "7", "--steps", "2"]).exit_code == 0
    assert seen == {"novelty": 7, "steps": 2}
    assert "How novel." in CliRunner().invoke(app, ["--help"]).stdout
    assert arguments_for(peft_cast.translate, {"novelty": 4}) == {"novelty": 4}
    assert "| `novelty` | `3` | How novel. And why. |" in table()


def test_a_new_field_is_compared_by_a_resumed_run_and_named_on_a_card(
    novelty, source_folder, lora_folder, target_folder
):
    with open_pair(source_folder, lora_folder, target_folder) as pair:
        begun, now = (described(Options.of({"novelty": n}), pair, text=None) for n in (3, 4))
    assert begun["novelty"] == 3 and [name for name in begun if begun[name] != now[name]] == ["novelty"]
    origins = {role: Origin("a/b") for role in ("source", "adapter", "target")}
    licenses = Licenses(dict.fromkeys(origins, License()))
    cards = []
    for value in (3, 4):
        metrics = {"settings": Options.of({"novelty": value}).settings()}
        cards.append(make_card(Artifact("cast", origins, {"metrics": metrics}), licenses).content)
    assert "novelty" not in cards[0] and "novelty" in cards[1]


def test_options_come_in_groups_or_by_name_and_names_go_before():
    made = Options.of({"steps": 7}, training=Training(steps=3, gamma=0.5), run=Run(progress=False))
    assert (made.training.steps, made.training.gamma, made.run.progress) == (7, 0.5, False)
    with pytest.raises(TypeError, match="`training` must be a `Training`, got Run"):
        Options.of({}, training=Run())


def test_training_arguments_that_trainer_takes_are_taken():
    Training(training_args={"optim": OptimizerNames.SGD, "eval_strategy": "no", "save_steps": 0.5, "fsdp": True})
    Training(training_args={"logging_strategy": "no", "logging_steps": 0, "max_grad_norm": 1, "bf16": True})


@pytest.mark.parametrize(
    ("group", "wrong", "message"),
    [
        (Training, {"steps": -1}, "`steps` must be at least 0, got -1"),
        (Training, {"steps": True}, "`steps` must be a whole number"),
        (Training, {"gamma": float("nan")}, "`gamma` must be a number of at least 0"),
        (Training, {"learning_rate": 0}, "`learning_rate` must be a number above 0"),
        (
            Training,
            {"teacher": "pupil"},
            "`teacher` must be 'auto', 'source', 'shown', 'delta' or a number from 0 to 1",
        ),
        (Training, {"training_args": {"warmup": 1}}, "TrainingArguments has no 'warmup'"),
        *(
            (Training, {"training_args": args}, f"`training_args`: `{next(iter(args))}` {words}")
            for args, words in (
                ({"optim": "adam_torch"}, "cannot be 'adam_torch': did you mean 'adamw_torch'"),
                ({"lr_scheduler_type": "cosin"}, "cannot be 'cosin': did you mean 'cosine'"),
                ({"lr_scheduler_type": "greedy"}, "cannot be 'greedy', for which Trainer evaluates: leave it out"),
                ({"eval_strategy": "steps"}, "cannot be 'steps', for which Trainer evaluates: leave it out"),
                ({"gradient_accumulation_steps": 0}, "must be at least 1, got 0"),
                ({"gradient_accumulation_steps": "2"}, "must be an integer, got '2'"),
                ({"weight_decay": "1e-3"}, "must be a finite number, got '1e-3'"),
                ({"save_steps": 0}, "must be a number above 0, got 0"),
            )
        ),
        (Pairing, {"depth_map": "nearest"}, "`depth_map` must be 'proportional', 'similarity' or a mapping"),
        (Pairing, {"dtype": torch.int8}, "`dtype` must be torch.float32"),
        (Pairing, {"dtype": torch.float8_e4m3fn}, "`dtype` must be torch.float32"),
        (Pairing, {"source_rank": 1.5}, "`source_rank` must be a whole number from 1 or a share"),
        (Pairing, {"module_map": "up"}, "`module_map` must be a mapping"),
        (Projections, {"projection_type": "round"}, "`projection_type` must be"),
        (Fit, {"first_maps": "coppy"}, "`first_maps` must be 'auto', 'copy' or 'closed_form', got 'coppy'"),
        (Pairing, {"depth_map": {"0": 1}}, "a mapping of layer numbers, as `{0: 0, 1: 2}`, got {'0': 1}"),
        (Pairing, {"depth_map": {}}, "a mapping of layer numbers"),
        (Projections, {"projection_sharing": "layer"}, "`projection_size`"),
        (Fit, {"fit_samples": 1}, "`fit_samples` must be at least 2"),
        (Training, {"seed": 2**70}, "`seed` must be a whole number from 0 to"),
        (Training, {"alpha": 0, "gamma": 0}, "nothing is learned"),
        (Pairing, {"module_map": {"q_proj": None}}, "`module_map` must be a mapping of module names"),
        (Run, {"progress": "yes"}, "`progress` must be True or False"),
    ],
)
def test_groups_look_at_their_own_values(group, wrong, message):
    with pytest.raises(ValueError, match=message):
        group(**wrong)


def test_functions_refuse_options_that_they_do_not_read():
    assert "gamma" in names_taken(peft_cast.plan) and "gamma" not in names_taken(peft_cast.fit_bridge)
    with pytest.raises(TypeError, match="`fit_bridge` has no argument 'gamma'"):
        peft_cast.fit_bridge("a", "b", gamma=1)
    with pytest.raises(TypeError, match="`evaluate` has no argument 'steps'"):
        peft_cast.evaluate("a", {}, [], steps=1)


def test_groups_do_what_names_do(source_folder, lora_folder, target_folder):
    models, text = (source_folder, lora_folder, target_folder), c4_texts(20)
    flat = {"steps": 2, "batch_size": 4, "max_length": 48, "eval_samples": 2, "fit_samples": 8}
    by_name = peft_cast.translate(*models, text=text, progress=False, **flat)
    training = Training(steps=2, batch_size=4, max_length=48, eval_samples=2)
    groups = {"training": training, "fit": Fit(fit_samples=8), "run": Run(progress=False)}
    by_group = peft_cast.translate(*models, text=text, **groups)
    assert by_name.metrics["kl"] == by_group.metrics["kl"]
    assert by_name.metrics["settings"] == by_group.metrics["settings"]


SAVED = Path(__file__).parent / "data" / "version_0.1"


def test_what_earlier_versions_saved_still_loads():
    tokens = torch.arange(3, 24).reshape(3, 7)
    expected = load_file(SAVED / "expected.safetensors")
    bridge = peft_cast.Bridge.from_pretrained(SAVED / "bridge")
    models = {
        "translated": PeftModel.from_pretrained(tiny_target(), SAVED / "adapter").eval(),
        "cast": bridge.cast(SAVED / "lora", tiny_target()),
    }
    for name, model in models.items():
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits[:, :, :16], expected[name], rtol=1e-4, atol=1e-5)
    metrics = json.loads((SAVED / "adapter" / "cast_metrics.json").read_text())["metrics"]
    assert "loss" in metrics["settings"]  # as it was then


def tiny_target():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    return tiny_model("phi3", len(sentencepiece_tokenizer()), seed=5, **sizes)


def test_an_old_translation_can_be_reported_again(tmp_path):
    page = peft_cast.write_report(SAVED / "adapter", tmp_path)
    assert "What limits it" in page.read_text(encoding="utf-8")
