"""Several processes, as `accelerate launch` and `torchrun` start them: the same translation, shared. On the CPU, with
gloo.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from operator import attrgetter
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import ROOT, c4_texts, make_lora
from launched import HELD_OUT, weights_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast.models import sharding
from peft_cast.refine.checkpoints import last_checkpoint
from peft_cast.source.pair import open_pair
from peft_cast.utils import distributed
from peft_cast.utils.out_of_memory import within_memory


TEXTS = c4_texts(80)
STEPS = 6
OPTIONS = {
    "text": TEXTS[:40],
    "fit_text": TEXTS[40:],
    "steps": STEPS,
    "batch_size": 4,
    "fit_samples": 21,
    "eval_samples": 5,
    "max_length": 48,
    "report_samples": 0,
    "report_similarity": False,
    "training_args": {"save_steps": 2},
}
# What `accelerate launch --use_fsdp` tells its processes.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
# What `accelerate launch --use_deepspeed --zero_stage 3` does.
ZERO_3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
PROMPTS = {"prompts": ["Say: one thing", "Say: another thing"], "max_new_tokens": 12, "batch_size": 8, "samples": 10}


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (
    "accelerate.commands.launch",
    "--config_file",
    ROOT / "examples" / "accelerate_fsdp_8_gpus.yaml",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
)


def two_processes(launcher, *command):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, *command]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150)


def launch(folder, jobs):
    """Do jobs with two processes, see launched.py."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return two_processes(TORCHRUN, ROOT / "tests" / "launched.py", folder)


def found(folder, name):
    """What each process got."""
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


def weights(folder, name):
    return [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(2)]


def close(first, second, tolerance=1e-4):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=tolerance, atol=tolerance * float(tensor.abs().max()))


def shares(metrics):
    """The held-out R² of every kernel's closed form."""
    fits = [fit for group in metrics["closed_form"]["modules"].values() for fit in group]
    return [fit[side] for fit in fits for side in ("r2_in", "r2_out")]


def other_verbs(models, other):
    """What shares its work besides a translation: name of the job → verb and arguments."""
    few = {
        name: OPTIONS[name] for name in ("text", "fit_text", "batch_size", "fit_samples", "eval_samples", "max_length")
    }
    pair = {"source": models["source"], "target": models["target"]}
    return {
        "bridge": ("fit_bridge", {**pair, "text": TEXTS[40:61], "batch_size": 4, "max_length": 48}),
        "distilled": ("baselines.distill_lora", {**models, **few, "steps": 3}),
        "several": ("translate", {**models, **few, "steps": 2, "adapter": [models["adapter"], other]}),
    }


@pytest.fixture(scope="module")
def models(source_folder, lora_folder, target_folder):
    return {"source": source_folder, "adapter": lora_folder, "target": target_folder}


@pytest.fixture(scope="module")
def other(source_folder, tmp_path_factory):
    """Another adapter on the source."""
    model = AutoModelForCausalLM.from_pretrained(source_folder)
    return str(make_lora(model, tmp_path_factory.mktemp("other") / "tiny-other", r=2, seed=9))


@pytest.fixture(scope="module")
def alone(models):
    """One process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft_cast.fit.moments.HELD_OUT", HELD_OUT)
        result = peft_cast.translate(**models, **OPTIONS, dtype=torch.float32, progress=False)
    state = {n: t for n, t in result.model.state_dict().items() if "peft_cast_kernels" in n}
    return SimpleNamespace(metrics=result.metrics, history=result.history, weights=state)


@pytest.fixture(scope="module")
def killed(models, tmp_path_factory):
    """A run of which one process was killed in the last step but one: its folder, exit code, and seconds until all had
    ended.
    """
    folder = tmp_path_factory.mktemp("killed")
    job = {**models, **OPTIONS, "name": "run", "output_dir": str(folder / "run"), "fail_at": [1, 5, "kill"]}
    done = launch(folder, [job])
    left = time.time() - (folder / "killed").stat().st_mtime
    return SimpleNamespace(folder=folder / "run", code=done.returncode, said=done.stderr, seconds=left)


@pytest.fixture(scope="module")
def together(models, other, killed, tmp_path_factory):
    """Two processes, one job after another."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(killed.folder, folder / "resumed")
    base = {**models, **OPTIONS}
    jobs = [
        {"name": "ZeRO-3", "environment": ZERO_3},  # before accelerate's state is made: it would take up DeepSpeed
        {"name": "plain", "output_dir": str(folder / "plain"), "report_samples": 1, "report_similarity": True},
        {"name": "spread", "environment": FSDP},
        {"name": "resumed", "output_dir": str(folder / "resumed"), "resume_from_checkpoint": True},
        {"name": "nan", "fail_at": [1, 4, "nan"]},
        {
            "name": "written",
            "text": PROMPTS,
            "steps": 4,
            "training_args": {"fsdp": True},
        },  # few texts, read several times
        {"name": "own words", "text": {**PROMPTS, "samples": 8}, "steps": 2, "on_policy_steps": 3},
        {
            "name": "other losses",
            "steps": 2,
            "beta": 0.1,
            "teacher": 0.5,
            "depth_map": "similarity",
            "training_args": {"fsdp": True, "gradient_accumulation_steps": 2},
        },
        {"name": "odd", "batch_size": 3},
        {"name": "no text", "text": ["x"]},
    ]
    jobs = [{**base, **job} for job in jobs]
    jobs += [{"name": name, "verb": verb, **given} for name, (verb, given) in other_verbs(models, other).items()]
    done = launch(folder, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["plain", "spread", "ZeRO-3"])
def test_two_processes_give_what_one_gives(name, together, alone):
    first, second = found(together, name)
    assert first["metrics"] == second["metrics"] and first["history"] == second["history"]
    assert first["metrics"]["kl"] == pytest.approx(alone.metrics["kl"], rel=1e-5)
    assert first["metrics"]["excitement"] == pytest.approx(alone.metrics["excitement"], rel=1e-5)
    assert first["metrics"]["text"] == alone.metrics["text"]
    assert shares(first["metrics"]) == pytest.approx(shares(alone.metrics), rel=1e-4, abs=1e-6)
    for name_of in ("kl", "kl_anchor", "grad_norm"):
        here, there = ([entry[name_of] for entry in h if name_of in entry] for h in (first["history"], alone.history))
        assert here == pytest.approx(there, rel=1e-3)
    in_first, in_second = weights(together, name)
    assert all(torch.equal(in_first[n], in_second[n]) for n in in_first)
    close(in_first, {n: alone.weights[n] for n in in_first})


@pytest.mark.parametrize("name", ["bridge", "distilled", "several"])
def test_bridges_distillation_and_several_adapters_share_their_work(name, together, models, other, monkeypatch):
    monkeypatch.setattr("peft_cast.fit.moments.HELD_OUT", HELD_OUT)
    verb, given = other_verbs(models, other)[name]
    result = attrgetter(verb)(peft_cast)(**given, dtype=torch.float32, progress=False)
    first, second = found(together, name)
    kls = [
        [m["kl"] for m in (p["metrics"] if name == "several" else [p["metrics"]]) if "kl" in m]
        for p in (first, second)
    ]
    assert kls[0] == kls[1]
    in_first, in_second = weights(together, name)
    assert all(torch.equal(in_first[n], in_second[n]) for n in in_first)
    # A bridge keeps its maps in bfloat16; Adam's first steps make as much of a gradient's last digits as of its first
    # ones.
    close(in_first, weights_of(result), 2**-7 if name == "bridge" else 1e-3)


def test_each_process_reads_a_part_of_every_batch(together):
    first, second = (process["texts"] for process in found(together, "plain"))
    assert len(first) == STEPS and {len(texts) for texts in first + second} == {2}
    read = [tuple(ids) for texts in first + second for ids in texts]
    assert len(set(read)) == len(read)


def test_spread_models_are_kept_in_parts(together):
    for process in found(together, "spread") + found(together, "ZeRO-3"):
        whole, here = process["spread"]
        assert 0 < here == whole // 2
    assert found(together, "plain")[0]["spread"] == [0, 0]


def test_one_process_writes_the_files(together, alone):
    folder, strength = together / "plain", found(together, "plain")[0]["metrics"]["route"]["strength"]
    trained = load_file(folder / "checkpoints/checkpoint-6/adapter_model.safetensors")
    acting = {name: strength * tensor if name.endswith("P_out.U") else tensor for name, tensor in trained.items()}
    close(load_file(folder / "adapter_model.safetensors"), acting, 0)
    assert len(list((folder / "work").glob("closed_form_*"))) == 1 and (folder / "report.html").exists()
    assert json.loads((folder / "run.json").read_text())["finished"]
    assert not list(folder.rglob(".partial-*"))
    names = {path.name for path in (folder / "checkpoints" / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "monitor.safetensors"} <= names


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint(killed):
    assert killed.code != 0 and "SIGKILL" in killed.said and killed.seconds < 30
    assert last_checkpoint(killed.folder / "checkpoints").name == "checkpoint-4"
    assert not (killed.folder / "adapter_config.json").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_identical_result(together):
    for resumed, whole in zip(weights(together, "resumed"), weights(together, "plain")):
        close(resumed, whole, 0)
    first, second = found(together, "resumed")
    assert len(first["texts"]) == 2 and first["metrics"] == second["metrics"]
    assert first["metrics"]["kl"] == found(together, "plain")[0]["metrics"]["kl"]


@pytest.mark.slow
def test_another_number_of_processes_may_resume(killed, models, alone, tmp_path):
    shutil.copytree(killed.folder, tmp_path, dirs_exist_ok=True)
    result = peft_cast.translate(
        **models, **OPTIONS, output_dir=tmp_path, resume_from_checkpoint=True, dtype=torch.float32, progress=False
    )
    assert result.metrics["refinement"] == alone.metrics["refinement"]
    close({n: t for n, t in result.model.state_dict().items() if n in alone.weights}, alone.weights)


def test_a_loss_that_is_no_number_in_one_process_stops_all(together):
    first, second = (process["metrics"]["refinement"] for process in found(together, "nan"))
    assert first == second and first["steps"] == 4 and "The loss became nan at step 5" in first["stopped"]
    in_first, in_second = weights(together, "nan")
    assert all(torch.equal(in_first[n], in_second[n]) for n in in_first)


@pytest.mark.parametrize("name", ["written", "own words", "other losses"])
def test_all_processes_have_the_same_text_and_result(name, together):
    first, second = found(together, name)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]["kl"]["translated"] < first["metrics"]["kl"]["closed_form"]
    in_first, in_second = weights(together, name)
    assert all(torch.equal(in_first[n], in_second[n]) for n in in_first)


def test_errors_are_the_same_in_all_processes(together):
    for name, words in (("odd", "`batch_size` is 3, the texts of all 2 processes"), ("no text", "holds no text")):
        first, second = found(together, name)
        assert words in first["error"] and first == second


def test_the_command_line_with_the_configuration_for_eight_gpus(models, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": line}) for line in TEXTS))
    sizes = ("--steps", "2", "--batch-size", "4", "--max-length", "40", "--set", "fit_samples=8", "--dtype", "float32")
    done = two_processes(
        ACCELERATE, "-m", "peft_cast", "translate", *models.values(), "-o", tmp_path / "out", "--text", text, *sizes
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Saved in") == 1 and done.stderr.count("Plan for") == 1 and "each of 2" in done.stderr
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())


def test_memory_that_runs_out_in_one_process_ends_the_run(monkeypatch):
    sizes = []

    def attempt(size):
        sizes.append(size)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    with pytest.raises(torch.OutOfMemoryError, match="process 0 with 2 texts at a time: begin anew with a smaller"):
        within_memory(attempt, 8)
    assert sizes == [8]


def test_fsdp_spreads_no_quantized_models():
    quantized = SimpleNamespace(is_quantized=True, name_or_path="some/model-4bit")
    with pytest.raises(ValueError, match="'some/model-4bit' is quantized, which FSDP cannot spread"):
        sharding.spread(quantized, set(), torch.device("cpu"), None)


def test_what_does_not_go_together_is_one_clear_error(models, monkeypatch):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            peft_cast.translate(**{**models, **OPTIONS, **options})

    refused("FSDP and ZeRO-3 shard the models over several processes and there is one", training_args={"fsdp": True})
    refused("FSDP and ZeRO-3", training_args={"deepspeed": {"zero_optimization": {"stage": 3}}})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("there is one: start with `accelerate launch --num_processes`")
    monkeypatch.setattr(distributed, "launched_processes", lambda: 2)
    assert sharding.is_requested(None)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="take none that are loaded"):
        with open_pair(models["source"], models["adapter"], torch.nn.Linear(1, 1), shard=True):
            pass


def test_what_deepspeed_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "launched_processes", lambda: 2)
    for stage, spread in ((1, False), (2, False), (3, True)):
        config = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
        file = tmp_path / f"{stage}.json"
        file.write_text(json.dumps(config))
        assert (
            sharding.is_requested({"deepspeed": config}) == sharding.is_requested({"deepspeed": str(file)}) == spread
        )
        with monkeypatch.context() as launched:
            launched.setenv("ACCELERATE_USE_DEEPSPEED", "true")
            assert not sharding.is_requested(None)  # stage 2, as in accelerate
            launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
            assert sharding.is_requested(None) == spread
            launched.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE")
            launched.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
            assert sharding.is_requested(None) == spread
            launched.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
            with pytest.raises(ValueError, match="leave `offload_param` out of DeepSpeed's configuration"):
                sharding.is_requested(None)
    assert not sharding.is_requested({"deepspeed": {}}) and not sharding.is_requested(
        {"deepspeed": {"zero_optimization": {}}}
    )
    (tmp_path / "broken.json").write_text("{")
    for file in ("broken.json", "missing.json"):
        with pytest.raises(ValueError, match=f"{file}' cannot be read .*: pass a JSON file"):
            sharding.is_requested({"deepspeed": str(tmp_path / file)})
    with pytest.raises(ValueError, match="'True' cannot be read"):
        sharding.is_requested({"deepspeed": True})


def test_accelerate_that_began_with_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "launched_processes", lambda: 2)
    state = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(distributed, "PartialState", lambda **options: state)
    with pytest.raises(ValueError, match="before you make an `Accelerator` or a `PartialState`"):
        distributed.init("cpu")
