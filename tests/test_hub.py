"""Hub ids: the real huggingface_hub client against a small hub on loopback."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import peft_cast


COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves `repos` (id → folder) the way huggingface.co serves files: HEAD and GET of /{id}/resolve/{revision}/{path}."""

    repos: dict[str, str] = {}

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api" and "/".join(parts[2:4]) in self.repos and len(parts) in (4, 6):
            return self.send(json.dumps({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []}).encode())
        if parts[0] == "api" and "tree" in parts:
            return self.send(b"", 404, {"X-Error-Code": "EntryNotFound"})  # no repository here has folders
        folder = self.repos.get("/".join(parts[:2]))
        if folder is None:
            return self.send(b"", 404, {"X-Error-Code": "RepoNotFound"})
        if len(parts) < 5 or parts[2] != "resolve" or parts[3] not in ("main", COMMIT):
            return self.send(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        path = Path(folder, *parts[4:])
        if not path.is_file():
            return self.send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        body = path.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return self.send(body, 200, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


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
for adapter, message in (("user/pickled", "(adapter_model.bin) are not read"), ("user/absent", "could not be read")):
    try:
        peft_cast.translate(None, adapter, "user/target", text=CORPUS)
    except ValueError as error:
        assert f"The adapter '{adapter}'" in str(error) and message in str(error), error
        print("worked")
"""


def test_hub_ids_everywhere(hub, source_folder, lora_folder, target_folder, tmp_path):
    lora, cast = tmp_path / "lora", tmp_path / "cast"
    corpus = Path(__file__).parent.parent / "examples" / "data" / "c4_en_400.jsonl"
    result = peft_cast.translate(
        source_folder, lora_folder, target_folder, steps=0, progress=False,
        text=[f"text number {i} that is long enough for the reader to take it" for i in range(4)],
    )  # fmt: skip
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
    Hub.repos = {
        "user/bridge": str(tmp_path / "bridge"),
        "user/pickled": str(pickled),
        "user/source": source_folder,
        "user/target": target_folder,
        "user/lora": str(lora),
        "user/cast": str(cast),
    }
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
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
