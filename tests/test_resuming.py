"""A translation never loses work: what stops it (a kill, Ctrl-C, a full disk or memory, a NaN) costs some steps at
most.
"""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, c4_texts
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

import peft_cast
from peft_cast import Bridge, SelfWritten
from peft_cast.refine.cache import TeacherCache
from peft_cast.refine.checkpoints import last_checkpoint, read_state
from peft_cast.refine.monitor import DivergenceMonitor
from peft_cast.refine.trainer import CastTrainer
from peft_cast.results import write_report
from peft_cast.text import written
from peft_cast.utils.files import check_writable, complete_folder, remove_partial, replacing, write_json, write_tensors
from peft_cast.utils.out_of_memory import within_memory


TRANSLATE = sys.modules["peft_cast.translate.one"]  # the name in the package is the function
STEPS = 8
OPTIONS = {
    "text": c4_texts(24),
    "steps": STEPS,
    "batch_size": 4,
    "fit_samples": 8,
    "eval_samples": 4,
    "max_length": 40,
    "dtype": torch.float32,
    "progress": False,
    "report_samples": 0,
    "training_args": {"save_steps": 3},
}
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def translate(source_folder, lora_folder, target_folder):
    """A small translation into a folder; the options change those above."""

    def run(folder=None, **options):
        return peft_cast.translate(
            source_folder, lora_folder, target_folder, output_dir=folder, **{**OPTIONS, **options}
        )

    return run


@pytest.fixture(scope="module")
def plain(source_folder, lora_folder, target_folder, tmp_path_factory):
    """The folder of an undisturbed run with a checkpoint of every step, and its result."""
    folder, often = tmp_path_factory.mktemp("plain"), {"training_args": {"save_steps": 1, "save_total_limit": 20}}
    return folder, peft_cast.translate(
        source_folder, lora_folder, target_folder, output_dir=folder, **{**OPTIONS, **often}
    )


def at_step(patch, step, error, every=False):
    """Let the refinement fail in the step after so many, once or each time; returns the steps begun by then."""
    begun, loss = [], CastTrainer.compute_loss

    def failing(self, model, inputs, *args, **kwargs):
        begun.append(self.state.global_step)
        if self.state.global_step == step and (every or begun.count(step) == 1):
            return error(self, inputs)
        return loss(self, model, inputs, *args, **kwargs)

    patch.setattr(CastTrainer, "compute_loss", failing)
    return begun


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def stop(monkeypatch, translate, folder, step, **options):
    """Ctrl-C in the step after so many."""
    with monkeypatch.context() as patch:
        at_step(patch, step, raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt) as interrupt:
            translate(folder, **options)
    return str(interrupt.value)


def adapter(folder, name="default"):
    return load_file((folder if name == "default" else folder / name) / "adapter_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        {"adapter_name": "other", "projection_size": 6, "teacher": 0.5},
        {"projection_type": "full", "projection_sharing": "layer"},
        {"projection_type": "mlp", "beta": 0.1, "training_args": {"gradient_accumulation_steps": 2, "save_steps": 3}},
    ],
    ids=["other-name", "shared", "mlp"],
)
def test_a_stopped_run_ends_where_an_uninterrupted_one_does(options, translate, tmp_path, monkeypatch):
    name = options.get("adapter_name", "default")
    whole = translate(tmp_path / "whole", **options)
    message = stop(monkeypatch, translate, tmp_path / "stopped", 5, **options)
    assert "up to step 5" in message and str(tmp_path / "stopped") in message and "resume_from_checkpoint" in message
    torch.manual_seed(99)
    with monkeypatch.context() as patch:
        patch.setattr("peft_cast.fit.initial.fit_closed_form", lambda *_, **__: pytest.fail("fitted again"))
        patch.setattr(TRANSLATE, "read_texts", lambda *_, **__: pytest.fail("read again"))
        begun = at_step(patch, None, None)
        resumed = translate(tmp_path / "stopped", resume_from_checkpoint=True, **options)
    assert sorted(set(begun)) == [5, 6, 7]
    assert same(adapter(tmp_path / "whole", name), adapter(tmp_path / "stopped", name))
    assert resumed.metrics["kl"] == whole.metrics["kl"]
    assert [entry["step"] for entry in resumed.history][:STEPS] == list(range(1, STEPS + 1))


def test_ctrl_c_gives_the_models_back(source_folder, lora_folder, target_folder, translate, tmp_path, monkeypatch):
    source, target = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source_folder, target_folder))
    before = [[type(module) for module in model.modules()] for model in (source, target)]
    at_step(monkeypatch, 2, raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        peft_cast.translate(source, lora_folder, target, output_dir=tmp_path, **OPTIONS)
    assert before == [[type(module) for module in model.modules()] for model in (source, target)]


def test_a_finished_run_resumed_is_the_same_and_leaves_no_predictions(translate, plain, tmp_path, monkeypatch):
    shutil.copytree(plain[0], tmp_path, dirs_exist_ok=True)
    begun = at_step(monkeypatch, None, None)
    again = translate(tmp_path, resume_from_checkpoint=True)
    assert not begun and same(adapter(plain[0]), adapter(tmp_path))
    assert again.metrics["kl"] == plain[1].metrics["kl"]
    assert (tmp_path / "README.md").read_text().count("## Use\n") == 1
    assert not list((tmp_path / "work").glob("predictions_*"))


def test_a_run_that_never_began_is_begun(translate, tmp_path):
    translate(tmp_path, resume_from_checkpoint=True, steps=1)
    assert adapter(tmp_path)


def test_a_broken_checkpoint_is_skipped(translate, tmp_path, monkeypatch):
    stop(monkeypatch, translate, tmp_path, 7)
    newest = last_checkpoint(tmp_path / "checkpoints")
    assert newest.name == "checkpoint-7"
    for name in ("optimizer.pt", "adapter_model.safetensors", "monitor.safetensors", "trainer_state.json"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[: len(whole) // 2])
        assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-6"
        (newest / name).write_bytes(whole)
    (newest / "rng_state.pth").unlink()
    begun = at_step(monkeypatch, None, None)
    translate(tmp_path, resume_from_checkpoint=True)
    assert begun[0] == 6


def test_another_run_is_neither_resumed_nor_overwritten(
    translate, tmp_path, monkeypatch, source_folder, target_folder, lora_folder
):
    stop(monkeypatch, translate, tmp_path, 4)
    with pytest.raises(ValueError, match="holds a run that was stopped: pass `resume_from_checkpoint=True`"):
        translate(tmp_path)
    for options, what in (
        ({"learning_rate": 0.1}, "`learning_rate` was 0.2 and is 0.1"),
        ({"steps": 9, "seed": 1}, "`steps` was 8 and is 9; `seed` was 0 and is 1"),
        ({"text": c4_texts(25)[1:]}, "(`text`)"),
        ({"training_args": {"weight_decay": 0.1}}, "`training_args` was {} and is {'weight_decay': 0.1}"),
        ({"dtype": torch.bfloat16}, "the source model or its adapter; the target model"),
    ):
        with pytest.raises(ValueError, match=re.escape(what)), monkeypatch.context() as patch:
            if "dtype" in options:  # also the source, which the fixture keeps in float32
                patch.setattr("peft_cast.models.loading.default_dtype", lambda _: torch.bfloat16)
            else:
                patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
            translate(tmp_path, resume_from_checkpoint=True, **options)
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"
    translate(tmp_path, resume_from_checkpoint=True, training_args={"save_steps": 1, "logging_steps": 2})


def test_what_cannot_be_resumed_is_one_clear_error(translate, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="needs `output_dir`"):
        translate(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="must be True or False"):
        translate(tmp_path, resume_from_checkpoint="checkpoint-3")
    stop(monkeypatch, translate, tmp_path, 4)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="no run.json"):
        translate(tmp_path, resume_from_checkpoint=True)
    for foreign in ("[1]", '{"finished": false}', '{"begun_with": {}}'):
        (tmp_path / "run.json").write_text(foreign)
        for resume in (True, False):
            with pytest.raises(ValueError, match="is not what a translation writes there: choose another"):
                translate(tmp_path, resume_from_checkpoint=resume)


def test_a_new_run_takes_nothing_from_the_finished_one_before(translate, plain, tmp_path, monkeypatch):
    translate(tmp_path, steps=STEPS + 4, text=c4_texts(30))
    with monkeypatch.context() as patch:  # a kill before the first checkpoint
        patch.setattr(TRANSLATE, "install", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            translate(tmp_path)
    translate(tmp_path, resume_from_checkpoint=True)
    assert same(adapter(tmp_path), adapter(plain[0]))


@pytest.mark.slow
def test_killed_runs_resume_to_the_identical_result(tmp_path):
    kills = int(os.environ.get("PEFT_CAST_KILLS", 4))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tests" / "killed.py", tmp_path, "--kills", str(kills)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == kills, done.stderr[-2000:]
    for line in lines:
        assert line["killed"] and line["resumed"] and line["identical"], (line, done.stderr[-2000:])
        assert line["phase"] != "save" or line["from step"] == 10, line  # nothing is done twice
        assert line["left"] in ("nothing", "the result") and line["half-written left"] == 0, line


def test_files_appear_complete_or_not_at_all(tmp_path):
    file = tmp_path / "tensors.safetensors"
    write_tensors({"a": torch.ones(2)}, file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as a full disk: the file grows no further
    try:
        with pytest.raises(OSError, match="too large"):
            write_tensors({"a": torch.ones(2000)}, file)
        with pytest.raises(OSError, match="too large"):
            write_json(["a" * 2000], tmp_path / "new.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(load_file(file)["a"], torch.ones(2)) and list(tmp_path.iterdir()) == [file]


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    with complete_folder(tmp_path / "a") as partial:
        write_json(1, partial / "adapter_config.json")
        write_json(1, partial / "sub" / "other.json")
    with pytest.raises(ZeroDivisionError), complete_folder(tmp_path / "a") as partial:
        write_json(2, partial / "adapter_config.json")
        1 / 0
    with pytest.raises(ZeroDivisionError), complete_folder(tmp_path / "b"):
        1 / 0
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["a/adapter_config.json", "a/sub/other.json"] and not (tmp_path / "b").exists()
    assert (tmp_path / "a" / "adapter_config.json").read_text() == "1\n"
    (tmp_path / "a" / ".partial-1-x").write_text("half")
    remove_partial(tmp_path)
    assert not list(tmp_path.rglob(".partial-*"))


def full_disk(patch, where):
    """Nothing can be written where the path has the words."""

    def check(function, place):
        def write(*args, **kwargs):
            if re.search(where, str(args[place])):
                raise SafetensorError("I/O error: No space left on device") if place else FULL
            return function(*args, **kwargs)

        return write

    patch.setattr("peft_cast.utils.files.save_file", check(peft_cast.utils.files.save_file, 1))
    patch.setattr("pathlib.Path.write_text", check(peft_cast.utils.files.Path.write_text, 0))
    patch.setattr("peft.peft_model.safe_save_file", check(sys.modules["peft.peft_model"].safe_save_file, 1))


def test_a_full_disk_costs_the_caches_and_checkpoints_only(translate, plain, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, "work/|checkpoint-")
        with pytest.warns(UserWarning) as raised:
            result = translate(tmp_path)
    said = [str(w.message) for w in raised if "No space left" in str(w.message)]
    for what, times in (("The text", 1), ("The closed form", 1), ("predictions", 1), ("checkpoint of step", 3)):
        assert sum(what in sentence for sentence in said) == times, said
    assert result.metrics["kl"] == pytest.approx(plain[1].metrics["kl"]) and adapter(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_result_that_cannot_be_saved_is_not_lost(translate, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, r"full/\.partial-[^/]*/adapter_model")
        with pytest.raises(peft_cast.NotSavedError, match="could not be saved to .*full.*No space left") as raised:
            translate(tmp_path / "full")
    assert not (tmp_path / "full" / "adapter_config.json").exists()
    raised.value.result.save_pretrained(tmp_path / "elsewhere")
    translate(tmp_path / "full", resume_from_checkpoint=True)
    assert same(adapter(tmp_path / "full"), adapter(tmp_path / "elsewhere"))


@pytest.mark.parametrize("place", ["file/folder", "/proc/folder/inner"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    place, source_folder, lora_folder, target_folder, translate, plain, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    folder = tmp_path / place
    if not folder.parents[1].is_dir():
        pytest.skip("only Linux has it")
    models, bridge = (source_folder, lora_folder, target_folder), Bridge(None, None, None, None, {})
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
        for work in (
            lambda: translate(folder),
            lambda: peft_cast.baselines.distill_lora(*models, output_dir=folder),
            lambda: bridge.cast_file(lora_folder, folder),
            lambda: bridge.save_pretrained(folder),
            lambda: plain[1].save_pretrained(folder),
            lambda: write_report(plain[1], folder),
        ):
            with pytest.raises(OSError, match=r"' cannot be written \([^[]*\): write to another folder\.") as error:
                work()
            assert str(folder) in str(error.value)


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_to_be_full(tmp_path):
    with pytest.raises(OSError, match=r"out' cannot be written \(No space left .*\): make room there, or write to"):
        with complete_folder(tmp_path / "out") as partial, replacing(partial / "file"):
            raise FULL


def test_a_nan_ends_the_refinement_with_the_best_projections_so_far(translate, plain, tmp_path, monkeypatch):
    at_step(
        monkeypatch, 6, lambda self, _: raising(FloatingPointError("The loss became nan at step 7."))(), every=True
    )
    with pytest.warns(UserWarning, match="The loss became nan at step 7.*Lower `learning_rate`"):
        result = translate(tmp_path / "nan")
    best = int(re.search(r"projections of step (\d+)", result.metrics["refinement"]["stopped"])[1])
    kls = [entry["kl"] for entry in result.history if "kl" in entry]
    assert kls[best - 1] == min(kls) and result.metrics["refinement"]["steps"] == 6
    assert any("became nan" in sentence for sentence in result.diagnosis())
    assert same(adapter(tmp_path / "nan"), adapter(plain[0] / "checkpoints" / f"checkpoint-{best}"))
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "nan").values())
    # a resumed run knows the best of before
    with pytest.warns(UserWarning, match="became nan"):
        translate(tmp_path / "nan", resume_from_checkpoint=True)
    assert same(adapter(tmp_path / "nan"), adapter(plain[0] / "checkpoints" / f"checkpoint-{best}"))


def test_a_nan_in_the_first_step_is_an_error(translate, monkeypatch):
    at_step(monkeypatch, 0, raising(FloatingPointError("The loss became nan at step 1.")))
    with pytest.raises(FloatingPointError, match="step 1. Lower `learning_rate`"):
        translate()


def watched(losses, model=None):
    """A watch that saw one loss for each step; it stops at the end, or when it wants to."""
    watch, control = DivergenceMonitor(), TrainerControl()
    model = model or torch.nn.Linear(2, 2)
    for step, loss in enumerate(losses, start=1):
        watch.see(loss)
        watch.on_step_end(None, TrainerState(global_step=step, max_steps=len(losses)), control, model=model)
        if control.should_training_stop:
            return watch
    return watch


def test_noise_is_no_divergence_and_divergence_is():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=draw).exp().tolist()  # a factor of e either way
    assert watched([3 * n / (1 + step / 50) for step, n in enumerate(noise)]).stopped is None
    # a bump of eighteen steps far above the start, and one that starts near zero
    assert watched([1.0] * 100 + [9.0] * 18 + [0.5] * 82).stopped is None
    assert watched([0.001] * 20 + [0.4] * 180).stopped is None
    gone = watched([1.0] * 20 + [0.8] * 80 + [5.0] * 100)
    assert "1 at the start, 5 at step 120" in gone.stopped and "step 30, the best" in gone.stopped


def test_broken_projections_are_never_the_best():
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    assert not watched([1.0] * 20, model).best


def test_a_run_that_diverges_is_stopped_with_the_best_projections_so_far(translate, tmp_path, monkeypatch):
    options = {"steps": 30, "training_args": {"save_steps": 1, "save_total_limit": 40}}
    calm = translate(**options)
    assert calm.metrics["refinement"] == {
        "steps": 30,
        "stopped": None,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    seen, see = [], DivergenceMonitor.see
    # Tiny random models have no certainties to get wrong: their loss is raised by hand.
    monkeypatch.setattr(
        DivergenceMonitor, "see", lambda self, loss: seen.append(loss) or see(self, loss + 9 * (len(seen) > 12))
    )
    with pytest.warns(UserWarning, match="The loss diverged: .* at step 22"):
        wild = translate(tmp_path, **options)
    assert wild.metrics["refinement"]["steps"] == 22 and "diverged" in wild.diagnosis()[0]
    kept = last_checkpoint(tmp_path / "checkpoints").with_name(
        f"checkpoint-{1 + min(range(12), key=seen.__getitem__)}"
    )
    assert same(adapter(tmp_path), adapter(kept))


def out_of_memory(self, inputs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("step", [0, 4])
def test_where_memory_runs_out_the_batches_get_smaller_and_no_step_is_lost(
    step, translate, plain, monkeypatch, tmp_path
):
    sizes, loss = [], CastTrainer.compute_loss

    def small_memory(self, model, inputs, *args, **kwargs):
        sizes.append((self.state.global_step, len(inputs["source_input_ids"])))
        if self.state.global_step >= step and sizes[-1][1] > 2:
            out_of_memory(self, inputs)
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CastTrainer, "compute_loss", small_memory)
    with pytest.warns(UserWarning, match="Memory ran out with 4 texts at a time: going on with 2"):
        result = translate(tmp_path / "out")
    used = result.metrics["refinement"]
    assert (used["batch_size"], used["gradient_accumulation_steps"], used["steps"]) == (2, 2, STEPS)
    assert sizes == [(s, 4) for s in range(step + 1)] + [(s, 2) for s in range(step, STEPS) for _ in range(2)]
    assert result.metrics["kl"]["translated"] == pytest.approx(plain[1].metrics["kl"]["translated"], rel=0.05)
    assert read_state(last_checkpoint(tmp_path / "out" / "checkpoints")).train_batch_size == 2


def test_memory_that_does_not_suffice_for_one_text_is_one_clear_error():
    tried = []
    full = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 1 bytes.")
    with (
        pytest.raises(torch.OutOfMemoryError, match="one text at a time: lower `max_length`"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        within_memory(lambda size: tried.append(size) or raising(full)(), 6)
    assert tried == [6, 3, 1]
    with pytest.raises(RuntimeError, match="something else"):
        within_memory(raising(RuntimeError("something else")), 6)


def test_a_batch_of_predictions_is_kept_whole_or_not_at_all(byte_tokenizer, tmp_path):
    texts = peft_cast.align.align_texts(c4_texts(5), byte_tokenizer, byte_tokenizer, max_length=40)
    memory = TeacherCache(4, folder=tmp_path)
    memory.get_or_make("teacher", texts[:3], [2] * 3, lambda absent: torch.randn(2 * len(absent), 10))
    assert len(list(tmp_path.iterdir())) == 1
    again, made = TeacherCache(4, folder=tmp_path), []
    again.get_or_make(
        "teacher", texts, [2] * 5, lambda absent: made.extend(absent) or torch.randn(2 * len(absent), 10)
    )
    assert made == texts[3:]


@pytest.mark.parametrize("stopped_in", [0, 1, 2, 3])
def test_text_that_was_being_written_goes_on_batch_by_batch(stopped_in, translate, tmp_path, monkeypatch):
    text = SelfWritten(prompts=["Say: one thing", "Say: another"], more_prompts=4, max_new_tokens=8, batch_size=6)
    options = {"text": text, "fit_text": c4_texts(20), "steps": 3}
    sample, asked = written._sample, []

    def counted(model, tokenizer, texts, *args, **kwargs):
        asked.append(list(texts))
        # what looks like a token comes back as it was, too
        return [f"{text} hf_{'a' * 30}" for text in sample(model, tokenizer, texts, *args, **kwargs)]

    monkeypatch.setattr(written, "_sample", counted)
    translate(tmp_path / "whole", **options)
    whole, asked[:] = list(asked), []
    assert len(whole) > 3 and len({len(batch) for batch in whole}) > 1  # rounds of prompts, then of answers
    with monkeypatch.context() as patch:
        patch.setattr(
            written,
            "_sample",
            lambda *a, **o: counted(*a, **o) if len(asked) < stopped_in else raising(KeyboardInterrupt())(),
        )
        with pytest.raises(KeyboardInterrupt):
            translate(tmp_path / "stopped", **options)
    torch.manual_seed(99)
    translate(tmp_path / "stopped", resume_from_checkpoint=True, **options)
    assert asked == whole  # no batch twice
    kept = [(tmp_path / name / "work" / "texts.json").read_bytes() for name in ("whole", "stopped")]
    assert kept[0] == kept[1] and same(adapter(tmp_path / "whole"), adapter(tmp_path / "stopped"))
    assert not (tmp_path / "stopped" / "work" / "written").exists()


def test_written_text_is_kept(translate, tmp_path, monkeypatch):
    text = SelfWritten(prompts=["Say: one thing", "Say: another"], max_new_tokens=8, batch_size=16)
    options = {"text": text, "fit_text": c4_texts(20), "steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(TRANSLATE, "first_maps", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt, match="what was done is kept"):
            translate(tmp_path, **options)
    monkeypatch.setattr("peft_cast.text.reading.write_texts", lambda *_, **__: pytest.fail("written again"))
    result = translate(tmp_path, resume_from_checkpoint=True, **options)
    assert result.metrics["text"]["train"] > 0
