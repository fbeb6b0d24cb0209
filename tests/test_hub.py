"""Hub ids: the real huggingface_hub client against a small hub on loopback."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import peft_cast
from peft_cast.cli.inspect import inspect


SCRIPT = """
import torch, peft_cast
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
result = peft_cast.translate(
    None, "user/lora", "user/target", text=CORPUS, steps=2, batch_size=4, max_length=64, fit_samples=8,
    eval_samples=4, progress=False, adapter_revision="main",
)
config = result.model.active_peft_config
assert config.source_model_name_or_path == "user/source", config
assert config.source_adapter_name_or_path == "user/lora" and config.base_model_name_or_path == "user/target"
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/target"), "user/cast", revision="main")
auto = AutoPeftModelForCausalLM.from_pretrained("user/cast")
ids = torch.arange(5, 25)[None]
assert torch.equal(model(input_ids=ids).logits, auto(input_ids=ids).logits)
bridge = peft_cast.Bridge.from_pretrained("user/bridge", revision="main")
bridge.cast_file("user/lora", FOLDER)
carried = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/target"), FOLDER)
with carried.disable_adapter():
    plain = carried(input_ids=ids).logits
assert not torch.equal(carried(input_ids=ids).logits, plain)
try:
    peft_cast.Bridge.from_pretrained("user/lora")
except ValueError as error:
    assert "holds no bridge" in str(error), error
    print("worked")
for adapter, message in (("user/pickled", "which are not read"), ("user/absent", "could not be read")):
    try:
        peft_cast.translate(None, adapter, "user/target", text=CORPUS)
    except ValueError as error:
        assert f"The adapter '{adapter}'" in str(error) and message in str(error), error
        print("worked")
"""


def test_adapters_in_subfolders_of_a_repository_are_named(hub, lora_folder, target_folder, tmp_path):
    shutil.copytree(lora_folder, tmp_path / "first")
    hub.add("user/several", tmp_path)
    for work in (inspect, lambda name: peft_cast.plan(None, name, target_folder)):
        with pytest.raises(ValueError, match="in subfolders, first: pass one, as 'user/several/first'"):
            work("user/several")
    assert inspect("user/several/first")["kind"] == "LORA"


def test_hub_ids_everywhere(hub, source_folder, lora_folder, target_folder, tmp_path):
    lora, cast = tmp_path / "lora", tmp_path / "cast"
    corpus = Path(__file__).parent.parent / "examples" / "data" / "c4_en_400.jsonl"
    result = peft_cast.translate(
        source_folder,
        lora_folder,
        target_folder,
        steps=0,
        progress=False,
        text=[f"text number {i} that is long enough for the reader to take it" for i in range(4)],
    )
    result.save_pretrained(cast)
    for folder, original, base in ((lora, Path(lora_folder), "user/source"), (cast, cast, "user/target")):
        folder.mkdir(exist_ok=True)
        config = json.loads((original / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        (folder / "adapter_model.safetensors").write_bytes((original / "adapter_model.safetensors").read_bytes())
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_bytes((lora / "adapter_config.json").read_bytes())
    (pickled / "adapter_model.bin").write_bytes(b"")
    bridge = peft_cast.fit_bridge(
        source_folder, target_folder, text=str(corpus), samples=8, max_length=32, progress=False
    )
    bridge.source = dataclasses.replace(bridge.source, name="user/source")
    bridge.target = dataclasses.replace(bridge.target, name="user/target")
    bridge.save_pretrained(tmp_path / "bridge")
    for name, folder in (
        ("bridge", tmp_path / "bridge"),
        ("pickled", pickled),
        ("source", source_folder),
        ("target", target_folder),
        ("lora", lora),
        ("cast", cast),
    ):
        hub.add(f"user/{name}", folder)
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT.replace("CORPUS", repr(str(corpus))).replace("FOLDER", repr(str(tmp_path / "carried"))),
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.count("worked") == 3, done.stderr[-3000:]
