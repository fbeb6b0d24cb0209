"""Files from strangers: whatever they hold, they work or end in one clear error, and do nothing else. See
SECURITY.md.
"""

import copy
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import make_lora, tiny_model
from mutations import HANGS, IMPORT, change_json, change_weights
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import peft_cast
from peft_cast import Bridge, CastConfig, KernelSpec, TranslationResult
from peft_cast.align.depth import map_layers
from peft_cast.align.modules import map_modules
from peft_cast.align.places import linear_layers, split_place
from peft_cast.evaluation.tasks import Scores
from peft_cast.fit.bridge_config import Side
from peft_cast.fit.maps import ClosedForm, Map, PlaceMaps
from peft_cast.models.adapters import unload_adapters
from peft_cast.models.restoring import untouched
from peft_cast.refine.cache import TeacherCache
from peft_cast.results.report.redact import redact, redact_pieces
from peft_cast.source.loading import adapted_source
from peft_cast.tuner.patterns import check_patterns
from peft_cast.tuner.quantized import linear_size
from peft_cast.utils import without_secrets


resource = pytest.importorskip("resource")  # not on Windows
# All cases together; the three kinds of files share them.
CASES = int(os.environ.get("PEFT_CAST_FUZZ", 2100))
SEED = int(os.environ.get("PEFT_CAST_FUZZ_SEED", 0))
SECONDS, MEMORY = 20, 2**29  # the most a case may take
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
TINY = {**SIZES, "vocab_size": 40, "num_key_value_heads": 1}
IDS = torch.arange(3, 9)[None]
WORDS = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=WORDS, unk_token="[UNK]")
TEXT = [f"A text at hand, number {i}, for the tests are not on the Hub. " * 2 for i in range(3)]
TASK = SimpleNamespace(name="any", metric="one", run=lambda model, tokenizer: Scores({"one": 1.0}))


def tiny(seed: int = 0, **sizes):
    return tiny_model("llama", seed=seed, **{**TINY, **sizes})


def map_all(source, target) -> Bridge:
    """A bridge of random maps, as one that was fitted would be laid out."""
    modules = map_modules(linear_layers(source), target, map_layers(2, 2), source=source)
    sizes = [{n: linear_size(m) for n, m in model.named_modules() if linear_size(m)} for model in (source, target)]
    maps = {}
    for place, (name,) in modules.kernels.items():
        (in_S, out_S), (in_T, out_T) = sizes[0][name], sizes[1][split_place(place)[0]]
        maps[place] = [PlaceMaps(name, Map((torch.randn(in_S, in_T),)), Map((torch.randn(out_T, out_S),)), 0.5, 0.5)]
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
    # PEFT itself reads pickles, by torch's loader that runs nothing in them; and what it takes for another kind is not
    # ours.
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


@pytest.mark.slow
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


def rewritten(folder, to, **values):
    """A copy of an adapter with other values in its configuration."""
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text()) | values
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


def opened(source, folder):
    with untouched(source), adapted_source(source, folder) as read:
        return read


def test_what_a_lora_promises_is_not_allocated_unless_its_file_holds_it(valid, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_cast.source.loading._load", lambda *_: pytest.fail("PEFT made tensors"))
    for number, values in enumerate([{"r": 60_000}, {"rank_pattern": {"q_proj": 50_000}}, {"r": 10**9}, {"r": 0}]):
        with pytest.raises(ValueError, match="the two do not belong together|`r` must be a positive integer up to"):
            opened(valid[1], rewritten(valid[0] / "lora", tmp_path / str(number), **values))


def test_what_a_cast_adapter_promises_is_not_allocated_unless_its_file_holds_it(valid, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_cast.tuner.layer.CastLayer.update_layer", lambda *_: pytest.fail("tensors were made"))
    kernels = json.loads((valid[0] / "cast" / "adapter_config.json").read_text())["kernels"]
    for name, value in (("r", 60_000), ("in_features", 2**24), ("out_features", 17)):
        changed = copy.deepcopy(kernels)
        next(iter(changed.values()))[0][name] = value
        with pytest.raises(ValueError, match="in its file, its configuration says .*download both again"):
            PeftModel.from_pretrained(valid[2], rewritten(valid[0] / "cast", tmp_path / name, kernels=changed))
    with pytest.raises(ValueError, match="`projection_size` must be a positive integer"):
        PeftModel.from_pretrained(valid[2], rewritten(valid[0] / "cast", tmp_path / "size", projection_size=10**9))


def test_a_kernel_that_no_memory_holds_is_refused(valid, monkeypatch):
    free = type("Free", (), {"available": 1000, "free": 0})
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("psutil.swap_memory", lambda: free)
    with pytest.raises(ValueError, match="needs .* GiB and .* are free"):
        huge = KernelSpec(r=8, in_features=2**22, out_features=8)
        get_peft_model(valid[2], CastConfig(kernels={"model.layers.0.self_attn.q_proj": [huge]}))
    unload_adapters(valid[2])


def test_pickles_are_refused_with_the_remedy(valid, tmp_path):
    for kind, read in (("lora", lambda f: opened(valid[1], f)), ("cast", peft_cast.to_lora)):
        folder = rewritten(valid[0] / kind, tmp_path / kind)
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        with pytest.raises(ValueError, match="pickled weights .*, which are not read.*convert them to safetensors"):
            read(folder)
        with pytest.raises(ValueError, match="pickled weights"):
            peft_cast.evaluate(valid[2], {"x": folder}, [TASK], target_tokenizer=TOKENIZER, progress=False)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_tensors_with_nan_or_infinity_are_named(number, valid, tmp_path):
    for kind, read in (
        ("lora", lambda f: opened(valid[1], f)),
        ("cast", lambda f: PeftModel.from_pretrained(valid[2], f)),
        ("bridge", Bridge.from_pretrained),
    ):
        file = next(shutil.copytree(valid[0] / kind, tmp_path / kind).glob("*.safetensors"))
        tensors = load_file(file)
        name = sorted(tensors)[1]
        tensors[name].view(-1)[0] = number
        with safe_open(file, "pt") as saved:
            save_file(tensors, file, metadata=saved.metadata())
        # An adapter's name comes between in the model.
        last = re.escape(name.rsplit(".", 3)[0].removeprefix("in.0.")[:30])
        with pytest.raises(ValueError, match=f"{last}.*holds NaN or infinite"):
            read(tmp_path / kind)
    unload_adapters(valid[2])


REGEXES_PEOPLE_WRITE = [
    "q_proj",
    r".*\.(0|2)\.self_attn\.(q|v)_proj",
    r".*layers\.1.*",
    r"^(?!.*vision).*(?:q_proj|v_proj|down_proj)$",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.(w1|w2)",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^(?!.*patch_embed)(?!.*vision_tower).*(?:gate_proj|k_proj|fc2|o_proj|v_proj|up_proj|q_proj|fc1|qkv|down_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|out_proj"
    r"|fc1|fc2|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn"
    r"|dense)\.(?:(?:k_proj|v_proj|q_proj|gate_proj|up_proj|down_proj)))",
]


@pytest.mark.parametrize("pattern", REGEXES_PEOPLE_WRITE)
def test_regular_expressions_that_people_write_are_taken(pattern):
    check_patterns([pattern], "`target_modules`")
    assert CastConfig(target_modules=pattern).target_modules == pattern


@pytest.mark.parametrize("pattern", [*HANGS, "(" * 5000, "a{5000}b", "[", "(.*)(.*)(.*)(.*)(.*)(.*)x", "(a?){40}a"])
def test_regular_expressions_that_could_hang_are_refused(pattern):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="regular expression .* in `target_modules`.*(list the names|correct it)"):
        CastConfig(target_modules=pattern)
    assert time.perf_counter() - start < 5


def test_the_bound_on_regular_expressions_holds():
    # The dearest that is let through, on names it nearly matches: a thousand names are a matter of seconds.
    pattern = ".*" * 4 + "x"
    check_patterns([pattern], "`target_modules`")
    start = time.perf_counter()
    for _ in range(20):
        re.fullmatch(pattern, "a" * 64)
    assert time.perf_counter() - start < 5
    with pytest.raises(ValueError, match="could take very long"):
        check_patterns([".*" + pattern], "`target_modules`")


def test_many_patterns_are_bounded_together(valid, tmp_path):
    check_patterns([f"model.layers.{i}.self_attn.q_proj" for i in range(2000)], "`rank_pattern`", behind=True)
    with pytest.raises(ValueError, match="could take very long"):
        check_patterns([".*.*.*x"] * 2000, "`rank_pattern`", behind=True)
    patterns = {f"layers.{i}.q_proj": 2 for i in range(5000)}
    with pytest.raises(ValueError, match="The patterns of `rank_pattern`, 5000 of them, have 88890 characters"):
        opened(valid[1], rewritten(valid[0] / "lora", tmp_path / "x", rank_pattern=patterns))


def test_no_module_is_imported_because_an_adapter_says_so(valid, tmp_path, monkeypatch):
    (tmp_path / f"{IMPORT}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "Thing", "parent_library": IMPORT}
    for kind in ("lora", "cast"):
        folder = rewritten(valid[0] / kind, tmp_path / kind, auto_mapping=mapping, task_type=None)
        if kind == "lora":
            opened(valid[1], folder)
        else:
            peft_cast.to_lora(folder)
            PeftModel.from_pretrained(valid[2], folder).unload()
            with pytest.raises(ValueError, match="not in the import allowlist"):
                AutoPeftModel.from_pretrained(folder)
    folder = rewritten(valid[0] / "lora", tmp_path / "megatron", megatron_config={"a": 1}, megatron_core=IMPORT)
    with pytest.raises(ValueError, match="`megatron_config` makes PEFT import a module"):
        opened(valid[1], folder)
    assert IMPORT not in sys.modules


@pytest.fixture
def needs_code(tmp_path):
    """A model and tokenizer with code of their own, which leaves a file behind when it runs."""
    folder = tmp_path / "needs_code"
    folder.mkdir()
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing: pass\n"
    (folder / "code.py").write_text(code)
    names = {"AutoConfig": "code.Thing", "AutoModelForCausalLM": "code.Thing", "AutoTokenizer": ["code.Thing", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "tokenizer_class": "Thing"}))
    yield str(folder)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_model_repository_is_not_run(needs_code, valid, tmp_path):
    lora = valid[0] / "lora"
    with pytest.raises(ValueError, match="source model .* never run here.*load it yourself .* as `source`"):
        peft_cast.translate(needs_code, lora, valid[2])
    with pytest.raises(
        ValueError, match="tokenizer of .* never run here.*pass the loaded object as `source_tokenizer`"
    ):
        peft_cast.translate(valid[1], lora, valid[2], source_tokenizer=needs_code, text=TEXT)
    with pytest.raises(ValueError, match="source model .* never run here"):
        peft_cast.translate(None, rewritten(lora, tmp_path / "lora", base_model_name_or_path=needs_code), valid[2])
    with pytest.raises(ValueError, match="pass the PeftModel"):
        peft_cast.to_lora(rewritten(valid[0] / "cast", tmp_path / "cast", base_model_name_or_path=needs_code))
    folder = shutil.copytree(valid[0] / "bridge", tmp_path / "bridge")
    config = json.loads((folder / "bridge_config.json").read_text())
    for model_type in ("stranger", "llama"):  # of a known type transformers has code of its own, and takes that
        config["target"]["config"] |= {
            "auto_map": {"AutoModelForCausalLM": f"{needs_code}--code.Thing"},
            "model_type": model_type,
        }
        (folder / "bridge_config.json").write_text(json.dumps(config))
        if model_type == "stranger":
            with pytest.raises(ValueError, match="cannot be built from its configuration"):
                Bridge.from_pretrained(folder).cast_file(lora, tmp_path / "out")
        else:
            Bridge.from_pretrained(folder).cast_file(lora, tmp_path / "out")


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "n_layer"])
def test_a_bridge_cannot_ask_for_a_model_that_takes_forever_to_build(key, valid, tmp_path):
    folder = shutil.copytree(valid[0] / "bridge", tmp_path / "bridge")
    config = json.loads((folder / "bridge_config.json").read_text())
    config["source"]["config"][key] = 10**9
    (folder / "bridge_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"`{key}` in the config of its source is 1000000000, at most"):
        Bridge.from_pretrained(folder)


def test_a_bridge_for_another_target_changes_nothing(valid):
    bridge, other = Bridge.from_pretrained(valid[0] / "bridge"), tiny(2)
    with pytest.raises(ValueError, match="made for another target"):
        bridge.cast(valid[0] / "lora", other)
    assert not any("peft_cast" in name for name, _ in other.named_modules())


def test_file_to_file_whatever_vocabulary_the_target_has_on_disk(valid, tmp_path):
    bridge = Bridge.from_pretrained(valid[0] / "bridge")
    bridge.target = dataclasses.replace(bridge.target, config={**bridge.target.config, "vocab_size": 7})
    bridge.cast_file(valid[0] / "lora", tmp_path / "cast")
    same = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "cast", valid[0] / "cast")]
    assert same[0].keys() == same[1].keys()


def test_a_poisoned_cache_is_made_anew(tmp_path):
    made = []

    def make(texts):
        made.append(texts)
        return torch.randn(3, 40, generator=torch.Generator().manual_seed(0))

    def recall():
        return TeacherCache(5, folder=tmp_path, vocabulary=40).get_or_make("source", ["a text"], [3], make)

    good = recall()
    assert len(made) == 1 and torch.equal(recall().log_p, good.log_p) and len(made) == 1
    file = next(tmp_path.glob("*.safetensors"))
    key = next(iter(load_file(file))).partition(".")[0]
    whole = {"tokens": good.tokens, "log_p": good.log_p}
    bad = [
        {"tokens": good.tokens},
        {**whole, "tokens": good.tokens[:2].clone()},
        {**whole, "tokens": good.tokens.long()},
        {**whole, "tokens": -good.tokens - 1},
        {**whole, "tokens": good.tokens + 40},
        {**whole, "log_p": good.log_p * float("nan")},
        {"tokens": torch.zeros(3, 30).int(), "log_p": torch.zeros(3, 31).half()},
    ]
    for number, tensors in enumerate(bad, 2):
        save_file({f"{key}.{name}": value for name, value in tensors.items()}, file)
        assert torch.equal(recall().tokens, good.tokens) and len(made) == number


TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz12345678"


def test_tokens_are_taken_out_of_texts(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-odd-token-of-a-mirror")
    text = f"at https://me:{TOKEN}@hub/x with {TOKEN} and an-odd-token-of-a-mirror"
    assert without_secrets(text) == "at https://***@hub/x with *** and ***"
    kept = "adapters/hf_models/hf_transformers_lora_v2 https://huggingface.co/user/name@main me@example.org"
    assert without_secrets(kept) == kept


def test_a_report_hides_what_everything_else_hides(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    for text in (
        f"a {TOKEN} b",
        "https://me:word@host/x",
        "an a-token-of-another-form b",
        "hf_transformers_lora hf_quantizers2026",
    ):
        assert redact({"x": [text]}) == {"x": [without_secrets(text)]}
        pieces = [text[:9], text[9:15], text[15:]]
        hidden = redact_pieces(pieces)
        assert [len(piece) for piece in hidden] == [len(piece) for piece in pieces]
        assert re.sub(r"\*+", "***", "".join(hidden)) == without_secrets(text)
    assert without_secrets(text) == text  # names are none


def test_no_error_shows_a_token(valid, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    bad = f"https://me:{TOKEN}@huggingface.co/user/name"
    lora, tokenizers = valid[0] / "lora", {"source_tokenizer": TOKENIZER, "target_tokenizer": TOKENIZER}
    calls = [
        lambda: peft_cast.translate(bad, lora, valid[2]),
        lambda: peft_cast.translate(valid[1], bad, valid[2], **tokenizers),
        lambda: peft_cast.translate(None, bad, valid[2]),
        lambda: peft_cast.translate(valid[1], lora, bad),
        lambda: peft_cast.translate(valid[1], lora, valid[2], source_tokenizer=bad, text=TEXT),
        lambda: peft_cast.translate(valid[1], lora, valid[2], bridge=bad, **tokenizers),
        lambda: peft_cast.to_lora(bad),
        lambda: peft_cast.evaluate(bad, {}, []),
        lambda: peft_cast.evaluate(valid[2], {"x": bad}, [TASK], target_tokenizer=TOKENIZER, progress=False),
        lambda: peft_cast.evaluate(valid[2], {}, [TASK], target_tokenizer=TOKENIZER, drift_text=bad, progress=False),
        lambda: Bridge.from_pretrained(bad),
    ]
    for number, call in enumerate(calls):
        with pytest.raises((ValueError, OSError)) as raised:
            call()
        shown = "".join(traceback.format_exception(raised.value))
        assert TOKEN not in shown, (number, shown)
        assert "***" in str(raised.value), (number, str(raised.value))


def test_no_saved_file_holds_a_token(valid, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    secret = tmp_path / f"https:--me:{TOKEN}@hub"
    lora = shutil.copytree(valid[0] / "lora", secret)
    model = copy.deepcopy(valid[1])
    bridge = map_all(valid[1], valid[2])
    bridge.source = dataclasses.replace(bridge.source, name=f"https://me:{TOKEN}@hub/x")
    bridge.save_pretrained(tmp_path / "bridge")
    bridge.cast_file(lora, tmp_path / "cast")
    loaded = PeftModel.from_pretrained(copy.deepcopy(valid[2]), tmp_path / "cast")
    metrics = {"settings": {"name": f"https://me:{TOKEN}@hub/x"}}
    TranslationResult(loaded, metrics, [], bridge.modules).save_pretrained(tmp_path / "result")
    model.name_or_path = bridge.source.name
    rows = tmp_path / "rows.json"
    peft_cast.evaluate(model, {"x": lora}, [TASK], target_tokenizer=TOKENIZER, output=rows, progress=False).save(
        tmp_path / "saved"
    )
    files = [file for file in tmp_path.rglob("*") if file.is_file() and secret not in file.parents]
    assert {"cast_metrics.json", "README.md", "bridge_config.json"} <= {file.name for file in files}
    for file in files:
        assert TOKEN.encode() not in file.read_bytes(), file
