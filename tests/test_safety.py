"""Files from strangers: whatever they hold, they work or end in one clear error, and do nothing else. See SECURITY.md."""

import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings

import psutil
import pytest
import torch
from conftest import make_lora, tiny_model
from mutations import IMPORT, change_json, change_weights
from peft import PeftModel

import peft_cast
from peft_cast import Bridge
from peft_cast.align import linear_layers, map_layers, map_modules, split_place
from peft_cast.bridge import Side
from peft_cast.fit import ClosedForm, KernelFit
from peft_cast.models import unload_adapters, untouched
from peft_cast.source import adapted_source
from peft_cast.tuner.quantized import linear_size


# All cases together; the three kinds of files share them.
CASES = int(os.environ.get("PEFT_CAST_FUZZ", 2400))
SEED = int(os.environ.get("PEFT_CAST_FUZZ_SEED", 0))
SECONDS, MEMORY = 20, 2**29  # the most a case may take
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
TINY = {**SIZES, "vocab_size": 40, "num_key_value_heads": 1}
IDS = torch.arange(3, 9)[None]


def tiny(seed: int = 0, **sizes):
    return tiny_model("llama", seed=seed, **{**TINY, **sizes})


def map_all(source, target) -> Bridge:
    """A bridge of random maps, as one that was fitted would be laid out."""
    modules = map_modules(linear_layers(source), target, map_layers(2, 2), source=source)
    sizes = [{n: linear_size(m) for n, m in model.named_modules() if linear_size(m)} for model in (source, target)]
    maps = {}
    for place, (name,) in modules.kernels.items():
        (in_S, out_S), (in_T, out_T) = sizes[0][name], sizes[1][split_place(place)[0]]
        maps[place] = [KernelFit(name, torch.randn(in_S, in_T), torch.randn(out_T, out_S), 0.5, 0.5)]
    sides = Side.of(source, None), Side.of(target, None)
    return Bridge(ClosedForm(maps, {}, {}, 64), modules, *sides, {"texts": 4})


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Two models and valid folders for them: a LoRA for the first, a CAST adapter for the second, a bridge between."""
    folder = tmp_path_factory.mktemp("valid")
    source, target = tiny(), tiny(1, hidden_size=24)
    source.save_pretrained(folder / "source")
    target.save_pretrained(folder / "target")
    source.name_or_path, target.name_or_path = str(folder / "source"), str(folder / "target")
    source.config._name_or_path, target.config._name_or_path = source.name_or_path, target.name_or_path
    options = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5}, "layers_to_transform": [0, 1]}
    make_lora(source, folder / "lora", ["q_proj", "down_proj"], r=2, **options)
    bridge = map_all(source, target)
    bridge.save_pretrained(folder / "bridge")
    bridge.cast_file(folder / "lora", folder / "cast")
    return folder, source.requires_grad_(False), target.requires_grad_(False)


class Hang(BaseException):
    """No error that `except Exception` could hide."""


def in_time(signum, frame):
    raise Hang


def read_lora(folder, valid, rng):
    """As `translate` reads its source; now and then as a bridge does."""
    if rng.random() < 0.1:
        Bridge.from_pretrained(valid[0] / "bridge").cast_file(folder, folder / "out")
        return
    before = {name: parameter.clone() for name, parameter in valid[1].named_parameters()}
    try:
        with untouched(valid[1]), adapted_source(valid[1], folder) as read:
            assert read.kernels and all(k.A.isfinite().all() and k.B.isfinite().all() for k in read.kernels.values())
            read.model(input_ids=IDS)
    finally:
        after = dict(valid[1].named_parameters())
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def read_cast(folder, valid, rng):
    """As PEFT loads it, or as it is folded into a LoRA."""
    # PEFT itself reads pickles, by torch's loader that runs nothing in them; and what it takes for another kind is not ours.
    theirs = (folder / "adapter_model.bin").exists() or '"peft_type": "CAST"' not in (
        folder / "adapter_config.json"
    ).read_text()
    if theirs or rng.random() < 0.3:
        peft_cast.to_lora(folder)
        return
    try:
        PeftModel.from_pretrained(valid[2], folder)(input_ids=IDS)
    finally:
        unload_adapters(valid[2])


def read_bridge(folder, valid, rng):
    bridge = Bridge.from_pretrained(folder)
    if rng.random() < 0.1:
        bridge.cast_file(valid[0] / "lora", folder / "out")
        return
    try:
        bridge.cast(valid[0] / "lora", valid[2])(input_ids=IDS)
    finally:
        unload_adapters(valid[2])


READ = {"lora": (read_lora, "adapter"), "cast": (read_cast, "adapter"), "bridge": (read_bridge, "bridge")}
SHARE = {"lora": 0.4, "cast": 0.3, "bridge": 0.3}


def complaint(error: Exception) -> str | None:
    """What is wrong with an error that a user gets to see; `None` if nothing is."""
    text = str(error)
    if not isinstance(error, (ValueError, OSError)):
        return "is no ValueError or OSError"
    if not any(mark in text for mark in "`'\"") and "Target modules" not in text:  # PEFT's own sentence
        return "names neither field nor file"
    depths = ("NoneType", "has no attribute", "object is not", "allocate memory", "unexpected keyword", "Traceback")
    return next((f"comes from the depths ('{word}')" for word in depths if word in text), None)


@pytest.mark.parametrize("kind", READ)
def test_broken_files_work_or_are_one_clear_error(kind, valid, tmp_path, monkeypatch):
    read, stem = READ[kind]
    (tmp_path / f"{IMPORT}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    rng = random.Random(f"{kind} {SEED}")
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, in_time)
    worked, bad = 0, []
    try:
        for case in range(int(CASES * SHARE[kind])):
            folder = tmp_path / f"{kind}_{case}"
            shutil.copytree(valid[0] / kind, folder)
            config, weights = folder / f"{stem}_config.json", folder / f"{stem}_model.safetensors"
            number, rss = rng.random(), psutil.Process().memory_info().rss
            if number < 0.02:
                weights.rename(folder / f"{stem}_model.bin")
                change = "pickle"
            elif number < 0.5:
                change = change_weights(weights, rng)
            else:
                # What PEFT reads before it knows that the adapter is ours is not ours to check.
                change = change_json(config, rng, texts=kind != "cast")
            start = time.perf_counter()
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2 * MEMORY, before[1]))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(folder, valid, rng)
                worked += 1
            except Hang:
                bad.append(f"case {case}, {change}: hangs")
            except MemoryError:
                bad.append(f"case {case}, {change}: fills the memory")
            except Exception as error:
                if problem := complaint(error):
                    bad.append(f"case {case}, {change}: {problem}: {type(error).__name__}: {str(error)[:300]}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                resource.setrlimit(resource.RLIMIT_AS, before)
            if psutil.Process().memory_info().rss - rss > MEMORY or time.perf_counter() - start > SECONDS:
                bad.append(f"case {case}, {change}: {time.perf_counter() - start:.1f} s, or too much memory")
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert not bad, f"{len(bad)} bad cases of {CASES * SHARE[kind]:.0f}:\n" + "\n".join(bad[:40])
    assert IMPORT not in sys.modules
    assert worked > 0.03 * CASES * SHARE[kind]  # not everything is refused
