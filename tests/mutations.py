"""Ways to break the files of an adapter: seeded, one small change at a time."""

import copy
import json
import random
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


HANGS = ["(a+)+$", "(.*)*x", "(.|.)*y", ".*" * 9 + "x", "((x?)+)+", "(?:[a-z_.]+)+!", "(a|a|a){30}b"]
NAMES = ["", "x", "../../../etc/passwd", "/etc/passwd", "a\0b", "\u202eü" * 5, "x" * 10_000, "[", "(", "a\nb", "%s{0}"]
NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    10**9,
    -(10**9),
    10**30,
    10**400,
    2**63,
    2**31,
    1.5,
    -0.5,
    1e308,
    float("nan"),
    float("-inf"),
]
OTHERS = [None, True, False, [], {}, [[]], [None], [1, "a"], {"a": None}, {"": {}}, list(range(300)), ["q_proj"] * 300]
VALUES = [*HANGS, *NAMES, *NUMBERS, *OTHERS]
IMPORT = "module_of_a_stranger"  # must never be imported

# Settings that make PEFT, transformers or we do more than read a number.
SETTINGS = [
    ("auto_mapping", {"base_model_class": "Thing", "parent_library": IMPORT}),
    ("megatron_config", {"a": 1}),
    ("megatron_core", IMPORT),
    ("peft_type", IMPORT),
    ("peft_type", "XLORA"),
    ("peft_type", "LORA"),
    ("peft_type", "CAST"),
    ("peft_type", "VERA"),
    ("peft_type", "PROMPT_TUNING"),
    ("task_type", "SEQ_CLS"),
    ("task_type", IMPORT),
    ("self", 1),
    ("cls", 1),
    ("runtime_config", {"x": 1}),
    ("layer_replication", [[0, 10**9]]),
    ("layer_replication", [[0, 1], [0, 2]]),
    ("layer_replication", [[5, 9]]),
    ("layer_replication", [[1, 0]]),
    ("target_modules", "all-linear"),
    ("target_modules", ".*"),
    ("target_modules", None),
    ("target_modules", ["nothing"]),
    ("target_modules", ["lm_head", "embed_tokens"]),
    ("modules_to_save", ["lm_head"]),
    ("modules_to_save", ["model"]),
    ("trainable_token_indices", [0, 10**9]),
    ("trainable_token_indices", {"lm_head": [1]}),
    ("target_parameters", ["q_proj.weight"]),
    ("target_parameters", ["nothing"]),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("use_dora", True),
    ("use_rslora", True),
    ("lora_bias", True),
    ("use_qalora", True),
    ("fan_in_fan_out", True),
    ("alora_invocation_tokens", [1]),
    ("exclude_modules", ".*"),
    ("layers_to_transform", [0]),
    ("layers_to_transform", 7),
    ("rank_pattern", {"q_proj": 10**9}),
    ("rank_pattern", {"q_proj": 60_000}),
    ("rank_pattern", {"(": 1}),
    ("alpha_pattern", {"q_proj": 0}),
    ("r", 60_000),
    ("r", 4096),
    ("lora_alpha", 2**60),
    ("lora_dropout", 7.0),
    ("projection_type", "full"),
    ("projection_type", "mlp"),
    ("projection_size", 60_000),
    ("projection_bias", True),
    ("projection_sharing", "all"),
    ("kernels", {}),
    ("kernels", {"lm_head": []}),
    ("inference_mode", False),
    *(
        ("init_lora_weights", name)
        for name in ("pissa", "olora", "loftq", "corda", "eva", "gaussian", "pissa_niter_9", IMPORT)
    ),
    *(("base_model_name_or_path", name) for name in (None, IMPORT, "../..", "https://a:b@c/d", "/proc/self/mem")),
    *(
        (name, {"x": 1})
        for name in ("eva_config", "kasa_config", "velora_config", "arrow_config", "monteclora_config")
    ),
    *((name, pattern) for name in ("target_modules", "exclude_modules", "layers_pattern") for pattern in HANGS),
    *((name, {pattern: 2}) for name in ("rank_pattern", "alpha_pattern") for pattern in HANGS),
]
TEXTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b'{"a": 1e999}',
    b"[" * 100_000,
    b'{"a":' * 5000,
    b'{"peft_type": NaN}',
    b'{"r": ' + b"9" * 5000 + b"}",
    b'{"peft_type": "LORA", "peft_type": 1}',
]


def places(value, path=()):
    """Paths to everything in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def change_json(file: Path, rng: random.Random, texts: bool = True) -> str:
    """Change one thing in a JSON object; returns what, for the message of a failure."""
    original = file.read_bytes()
    if texts and rng.random() < 0.08:
        text = rng.choice([*TEXTS, original[: rng.randrange(len(original))]])
        file.write_bytes(text)
        return f"text {text[:40]!r}"
    config = json.loads(original)
    if rng.random() < 0.35:
        name, value = rng.choice(SETTINGS)
        config[name] = value
        file.write_text(json.dumps(config))
        return f"{name} = {str(value)[:80]!r}"
    path = rng.choice(places(config))
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    key, how = path[-1], rng.choice(["replace", "replace", "replace", "delete", "wrap", "rename", "copy", "scale"])
    if how == "delete":
        del parent[key]
    elif how == "wrap":
        parent[key] = rng.choice([[parent[key]], {"x": parent[key]}, str(parent[key])])
    elif how == "rename" and isinstance(parent, dict):
        parent[rng.choice([*NAMES, *HANGS])] = parent.pop(key)
    elif how == "copy" and isinstance(parent, dict):
        parent[rng.choice(list(parent))] = copy.deepcopy(parent[key])
    elif how == "scale" and isinstance(parent[key], int):
        parent[key] = rng.choice([parent[key] * 1000, -parent[key], parent[key] + 1, float(parent[key])])
    else:
        how, parent[key] = "replace", rng.choice(VALUES)
    try:
        file.write_text(json.dumps(config))
    except ValueError:  # Python writes no numbers of so many digits
        file.write_text("{}")
    return f"{how} {path} → {str(parent[key] if isinstance(parent, dict) and key in parent else '')[:60]!r}"


def change_weights(file: Path, rng: random.Random) -> str:
    """Change one thing in a safetensors file: bytes, the header, or tensors."""
    how = rng.choice(["flip", "cut", "header", "header", "tensor", "tensor", "tensor", "replace"])
    data = bytearray(file.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    if how == "flip":
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(8 + size if rng.random() < 0.8 else len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        data = rng.choice([data[: rng.randrange(len(data))], data + b"\0" * 9, data[8:], b""])
    elif how == "replace":
        data = rng.choice([b"\x80\x02}q\0.", b"PK\3\4" + bytes(60), struct.pack("<Q", 2**62) + data[8:], bytes(64)])
    elif how == "header":
        header = json.loads(data[8 : 8 + size])
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        part = rng.choice(["dtype", "shape", "data_offsets", "name", "name", "metadata", "twice"])
        if part == "name":
            header[rng.choice([*NAMES, name + ".x", name[1:], rng.choice(names)])] = header.pop(name)
        elif part == "metadata":
            header["__metadata__"] = rng.choice(
                [None, {}, {"peft_cast": rng.choice(["", "{}", "[" * 9999, "null"])}, {"a": 1}]
            )
        elif part == "twice":
            other = rng.choice(names)
            header[other] = header[name]
        else:
            header[name][part] = rng.choice(
                [
                    *VALUES,
                    [2**40, 2**40],
                    [0, 0],
                    [0, 2**62],
                    [-1, 4],
                    "F64",
                    "I64",
                    "BOOL",
                    "F8_E4M3",
                    "C64",
                    "F4",
                    "BF16",
                ]
            )
        try:
            text = json.dumps(header).encode()
        except ValueError:
            text = b"{}"
        data = struct.pack("<Q", len(text)) + text + data[8 + size :]
    else:
        return _change_tensor(file, rng)
    file.write_bytes(data)
    return how


def _change_tensor(file: Path, rng: random.Random) -> str:
    tensors = load_file(file)
    with open(file, "rb") as opened:
        size = struct.unpack("<Q", opened.read(8))[0]
        metadata = json.loads(opened.read(size)).get("__metadata__")
    name, other = rng.sample(sorted(tensors), 2)
    how = rng.choice(["nan", "inf", "drop", "swap", "rename", "dtype", "shape", "more", "rows", "empty", "huge"])
    value = tensors[name]
    if how in ("nan", "inf", "huge"):
        value.view(-1)[rng.randrange(value.numel())] = {"nan": float("nan"), "inf": float("-inf"), "huge": 3e38}[how]
    elif how == "drop":
        del tensors[name]
    elif how == "swap":
        tensors[name], tensors[other] = tensors[other].clone(), value.clone()
    elif how == "rename":
        tensors[rng.choice([*NAMES, name.replace("0", "1", 1), name.replace("base_model.model.", "", 1)]) or "y"] = (
            tensors.pop(name)
        )
    elif how == "dtype":
        dtypes = [
            torch.float64,
            torch.bfloat16,
            torch.float16,
            torch.int32,
            torch.bool,
            torch.uint8,
            torch.float8_e5m2,
        ]
        tensors[name] = value.to(rng.choice([*dtypes, torch.complex64]))
    elif how == "shape":
        tensors[name] = rng.choice([value.T.contiguous(), value.flatten(), value[None], value[:, :-1].clone()])
    elif how == "rows":
        tensors[name] = torch.cat([value, value])
    elif how == "empty":
        tensors[name] = value[:0].clone()
    else:
        extra = ["base_model.model.model.norm.weight", "base_model.model.lm_head.weight", "model.layers.0.x", "a/../b"]
        tensors[rng.choice([*extra, *NAMES]) or "z"] = torch.ones(rng.choice([16, 3]))
    try:
        save_file(tensors, file, metadata=metadata)
    except KeyError:  # safetensors 0.6 writes no complex numbers
        save_file({**tensors, name: value.to(torch.int8)}, file, metadata=metadata)
    return f"{how} {name}"
