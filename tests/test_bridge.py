"""Bridges: the maps of a pair, fitted once, carry any adapter over, from file to file or as a start for the
refinement.
"""

import copy
import dataclasses
import json
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT, c4_texts, make_lora, save_model, tiny_model
from peft import BeftConfig, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast import Bridge, fit_bridge
from peft_cast.cli.inspect import inspect
from peft_cast.fit.bridge_config import Side
from peft_cast.fit.closed_form import LEAST_RANK
from peft_cast.fit.initial import check_bridge
from peft_cast.fit.maps import Map
from peft_cast.options import Pairing
from peft_cast.refine.losses import kl_divergence
from peft_cast.results.artifacts import BRIDGE_CONFIG_NAME, BRIDGE_WEIGHTS_NAME
from peft_cast.utils import change_dtype


INPUTS = torch.randint(3, 300, (4, 30), generator=torch.Generator().manual_seed(0))


def distance(teacher, model, inputs=INPUTS):
    with torch.no_grad():
        teacher, student = (m(inputs).logits.flatten(0, 1) for m in (teacher, model))
    return float(kl_divergence(teacher, student).mean())


def dtypes_in(folder) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()}


@pytest.fixture(scope="module")
def same(tmp_path_factory, byte_tokenizer):
    """A model, a bridge from it to itself, and its folder."""
    model = tiny_model("llama", len(byte_tokenizer))
    folder = save_model(model, byte_tokenizer, tmp_path_factory.mktemp("same") / "model")
    bridge = fit_bridge(
        folder, folder, text=c4_texts(60), samples=40, max_length=128, dtype=torch.float32, progress=False
    )
    return model, bridge, folder


def test_one_bridge_carries_any_adapter_of_the_same_model(same, tmp_path):
    model, bridge, folder = same
    for number, options in enumerate(({}, {"target_modules": ["q_proj", "v_proj"]}, {"r": 2, "seed": 7})):
        lora = make_lora(copy.deepcopy(model), tmp_path / str(number), size=0.5, **options)
        wanted = PeftModel.from_pretrained(copy.deepcopy(model), lora)
        cast = bridge.cast(lora, copy.deepcopy(model))
        assert distance(wanted, model) > 0.02
        assert distance(wanted, cast) < 0.02 * distance(wanted, model)
        assert cast.active_peft_config.source_adapter_name_or_path == lora and not any(
            p.requires_grad for p in cast.parameters()
        )


def test_a_file_has_the_precision_of_its_lora(same, tmp_path):
    model, bridge, _ = same
    lora = make_lora(copy.deepcopy(model), tmp_path / "lora", size=0.5)
    change_dtype(f"{lora}/adapter_model.safetensors", torch.bfloat16)
    bridge.cast_file(lora, tmp_path / "cast")
    assert dtypes_in(tmp_path / "cast") == {torch.bfloat16}
    bridge.cast_file(lora, tmp_path / "whole", dtype=torch.float32)
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    # What the LoRA gave is kept exactly; what was fitted is rounded.
    cast = load_file(tmp_path / "cast" / "adapter_model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(cast[name].float(), tensor, rtol=0 if name[-2:] in (".A", ".B") else 2**-8, atol=0)
    too_large = {"x": torch.tensor([1e6])}
    save_file(too_large, tmp_path / "wide.safetensors")
    with pytest.warns(UserWarning, match="'x' has numbers beyond the range of torch.float16"):
        change_dtype(tmp_path / "wide.safetensors", torch.float16)
    assert load_file(tmp_path / "wide.safetensors") == too_large


def test_from_file_to_file_without_either_models_weights(same, tmp_path, monkeypatch):
    model, bridge, folder = same
    lora = make_lora(copy.deepcopy(model), tmp_path / "lora", size=0.5)
    expected = bridge.cast(lora, copy.deepcopy(model))
    with monkeypatch.context() as patch:
        patch.setattr("peft_cast.fit.bridge.load_model", lambda *_: pytest.fail("a model was loaded"))
        patch.setattr("peft_cast.source.loading.load_model", lambda *_: pytest.fail("a model was loaded"))
        bridge.cast_file(lora, tmp_path / "cast")
    assert dtypes_in(tmp_path / "cast") == {torch.float32}  # as the LoRA
    bridge.cast_file(lora, tmp_path / "half", dtype=torch.bfloat16)
    assert dtypes_in(tmp_path / "half") == {torch.bfloat16}
    half = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "half")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "cast")
    assert 0 < distance(loaded, half) < 0.05 * distance(loaded, model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUTS).logits, expected(INPUTS).logits, rtol=1e-4, atol=1e-4)
    assert loaded.active_peft_config.base_model_name_or_path == folder


def test_saved_bridges_are_the_same(same, tmp_path):
    model, bridge, _ = same
    lora = make_lora(copy.deepcopy(model), tmp_path / "lora", size=0.5)
    bridge.save_pretrained(tmp_path / "bridge")
    again = Bridge.from_pretrained(str(tmp_path / "bridge"))
    assert again.modules == bridge.modules and again.metrics == bridge.metrics and again.source == bridge.source
    first, second = (b.cast(lora, copy.deepcopy(model)) for b in (bridge, again))
    with torch.no_grad():
        assert torch.equal(first(INPUTS).logits, second(INPUTS).logits)
    # q, k and v read the same: their map is kept once
    attention = again.maps.kernels["model.layers.0.self_attn.q_proj"][0].P_in.factors[0]
    assert attention is again.maps.kernels["model.layers.0.self_attn.v_proj"][0].P_in.factors[0]
    assert (tmp_path / "bridge" / BRIDGE_WEIGHTS_NAME).exists() and (tmp_path / "bridge" / "README.md").exists()


def test_a_bridge_of_a_model_without_a_limit_is_read(same, tmp_path):
    model, bridge, _ = same
    source = copy.deepcopy(model)
    source.config.time_step_limit = [0.0, float("inf")]  # as Falcon-H1 says
    open_ended = Bridge(bridge.maps, bridge.modules, Side.of(source, None), bridge.target, bridge.metrics)
    open_ended.save_pretrained(tmp_path / "bridge")
    again = Bridge.from_pretrained(tmp_path / "bridge")
    assert again.source.skeleton().config.time_step_limit == [0.0, float("inf")]


def test_bridges_saved_before_maps_were_cut_still_load(same, tmp_path):
    model, bridge, _ = same
    whole = {
        name: [
            dataclasses.replace(
                fit,
                P_in=Map((fit.P_in.after(torch.eye(fit.P_in.shape[0])),)),
                P_out=Map((fit.P_out.after(torch.eye(fit.P_out.shape[0])),)),
            )
            for fit in fits
        ]
        for name, fits in bridge.maps.kernels.items()
    }
    old = Bridge(dataclasses.replace(bridge.maps, kernels=whole), bridge.modules, bridge.source, bridge.target, {})
    old.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / BRIDGE_WEIGHTS_NAME
    with safe_open(file, framework="pt") as saved:
        metadata = json.loads(saved.metadata()["peft_cast"])
    for entry in (entry for entries in metadata["kernels"].values() for entry in entries):
        assert isinstance(entry["in"], str) and isinstance(entry["out"], str)
        for new in ("in_plus_identity", "out_plus_identity", "shrunk"):
            del entry[new]
    save_file(load_file(file), file, metadata={"peft_cast": json.dumps(metadata)})
    lora = make_lora(copy.deepcopy(model), tmp_path / "lora", size=0.5)
    first, second = (
        one.cast(lora, copy.deepcopy(model), gain=1.0) for one in (bridge, Bridge.from_pretrained(tmp_path / "old"))
    )
    with torch.no_grad():
        torch.testing.assert_close(first(INPUTS).logits, second(INPUTS).logits, rtol=1e-3, atol=1e-3)


def test_a_bridge_of_strangers_is_small(source_folder, target_folder):
    bridge = fit_bridge(source_folder, target_folder, text=c4_texts(40), samples=24, max_length=64, progress=False)
    for fits in bridge.maps.kernels.values():
        for fit in fits:
            for found in (fit.P_in, fit.P_out):
                assert len(found.factors) == 2 and found.factors[0].shape[1] <= LEAST_RANK and not found.plus_identity
    kept = {id(t): t.numel() for fits in bridge.maps.kernels.values() for f in fits for m in f.maps for t in m.factors}
    assert bridge.metrics["numbers"] == sum(kept.values())


def test_models_of_different_families_meet(source_folder, lora_folder, target_folder, tmp_path):
    bridge = fit_bridge(source_folder, target_folder, text=c4_texts(40), samples=24, max_length=64, progress=False)
    assert bridge.metrics["positions"] > 100 and not bridge.modules.unmapped
    options = {"text": c4_texts(20), "batch_size": 4, "fit_samples": 8, "max_length": 40, "progress": False}
    started = peft_cast.translate(source_folder, lora_folder, target_folder, bridge=bridge, steps=0, **options)
    cast = bridge.cast(lora_folder)
    with torch.no_grad():
        torch.testing.assert_close(cast(INPUTS).logits, started.model(INPUTS).logits, rtol=1e-3, atol=1e-3)
    bridge.save_pretrained(tmp_path)
    refined = peft_cast.translate(source_folder, lora_folder, target_folder, bridge=tmp_path, steps=12, **options)
    assert refined.metrics["kl"]["translated"] < refined.metrics["kl"]["closed_form"]


def test_adapters_that_are_no_plain_lora_need_the_source(same, tmp_path):
    model, bridge, folder = same
    torch.manual_seed(0)
    dora = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in dora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    dora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass `source`"):
        bridge.cast(str(tmp_path), copy.deepcopy(model))
    cast = bridge.cast(str(tmp_path), copy.deepcopy(model), source=copy.deepcopy(model))
    assert distance(dora.eval(), cast) < 0.05 * distance(dora, model)


def test_an_adapter_of_another_model_is_refused(same, tmp_path, byte_tokenizer):
    _, bridge, _ = same
    other = tiny_model("llama", len(byte_tokenizer), hidden_size=64)
    lora = make_lora(other, tmp_path)
    resized = tiny_model("llama", len(byte_tokenizer) + 5)
    larger = make_lora(resized, tmp_path / "larger", ["q_proj"], modules_to_save=["lm_head"])
    for given, remedy in (
        (lora, "fit a bridge from the model that it was trained on.$"),
        (larger, "fit a bridge from it"),
    ):
        for work in (bridge.cast, bridge.cast_file):
            with pytest.raises(ValueError, match=f"does not fit the bridge's source model .*{remedy}"):
                work(given, tiny_model("llama", len(byte_tokenizer)) if work == bridge.cast else tmp_path / "out")
    opt = tiny_model("opt", len(byte_tokenizer))
    foreign = make_lora(opt, tmp_path / "opt", ["fc1"])
    with pytest.raises(ValueError, match="None of the adapter's modules"):
        bridge.cast(PeftModel.from_pretrained(opt, foreign), tiny_model("llama", len(byte_tokenizer)))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (LoraConfig(target_modules=["lm_head"], init_lora_weights=False), "lm_head: adapter on the output head"),
        (LNTuningConfig(target_modules=["norm"]), "model.norm: adapter on a normalization layer"),
        (BeftConfig(target_modules=["v_proj"]), "self_attn.v_proj: trained bias"),
    ],
)
def test_adapters_without_a_kernel_are_refused_alike_and_before_a_model_is_loaded(config, what, same, tmp_path):
    model, bridge, folder = same
    adapted = get_peft_model(copy.deepcopy(model), config)
    for parameter in adapted.parameters():
        parameter.data += 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    adapter, said = str(tmp_path / "adapter"), set()
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        for work in (
            lambda: peft_cast.translate(folder, adapter, folder, text=c4_texts(9)),
            lambda: peft_cast.plan(folder, adapter, folder),
            lambda: peft_cast.baselines.direct_copy(folder, adapter, folder),
            lambda: bridge.cast(adapter),
            lambda: bridge.cast(adapter, source=folder),
            lambda: bridge.cast_file(adapter, tmp_path / "out"),
        ):
            with pytest.raises(ValueError, match=f"^Nothing of the .* adapter '{adapter}' can be .*{what}") as error:
                work()
            said.add(str(error.value))
    assert loads.call_count == 0 and len(said) == 1


def test_what_does_not_fit_a_bridge_is_refused_before_a_model_is_loaded(same, tmp_path, byte_tokenizer):
    model, bridge, folder = same
    wide = tiny_model("llama", len(byte_tokenizer), hidden_size=64)
    lora, other = make_lora(wide, tmp_path / "lora"), save_model(wide, byte_tokenizer, tmp_path / "model")
    own = make_lora(copy.deepcopy(model), tmp_path / "own", modules_to_save=["norm"])
    file = tmp_path / "own" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.norm.weight": torch.full((32,), torch.nan)}, file)
    dora = get_peft_model(copy.deepcopy(model), LoraConfig(use_dora=True, target_modules=["q_proj"]))
    dora.active_peft_config.base_model_name_or_path = "org/chat"
    dora.save_pretrained(tmp_path / "dora")
    cut = save_model(model, byte_tokenizer, tmp_path / "cut")
    save_file({"model.norm.weight": torch.ones(32)}, f"{cut}/model.safetensors", metadata={"format": "pt"})
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        with pytest.raises(OSError, match="The target model .* lacks the weights of"):
            bridge.cast(tmp_path / "own", cut, source=folder)
        for given, source, message in (
            (lora, None, "does not fit the bridge's source model"),
            (lora, folder, "does not fit the source model"),
            (lora, other, "The bridge was made for another source, .* whose `hidden_size` is 32 and not 64"),
            (own, None, "holds NaN or infinite numbers"),
            (tmp_path / "dora", None, "was made for 'org/chat', and the bridge leads from .*: if that is no copy"),
        ):
            with pytest.raises(ValueError, match=message):
                bridge.cast(given, source=source)
    assert loads.call_count == 0
    (tmp_path / "twin").symlink_to(folder)  # a link is the same model
    save_model(model, byte_tokenizer, tmp_path / "newer")
    with pytest.warns(UserWarning, match="The bridge was fitted for .* the target model is called '.*newer'") as told:
        for target in (folder, str(tmp_path / "twin"), str(tmp_path / "newer")):
            bridge.target.check(target, "target")
    assert len(told) == 1
    with pytest.raises(ValueError, match="the same object: load the model twice"):
        bridge.cast(make_lora(model, tmp_path / "again"), model, source=model)


def test_broken_bridges_are_one_clear_error(same, tmp_path):
    _, bridge, _ = same
    with pytest.raises(ValueError, match="holds no bridge"):
        Bridge.from_pretrained(str(tmp_path))
    bridge.save_pretrained(tmp_path)
    (tmp_path / BRIDGE_WEIGHTS_NAME).write_bytes(b"broken")
    with pytest.raises(ValueError, match="is broken .*: get it again, or fit it anew.$") as error:
        Bridge.from_pretrained(str(tmp_path))
    assert "delete it" not in str(error.value) and "Pass a folder" not in str(error.value)
    (tmp_path / BRIDGE_WEIGHTS_NAME).unlink()
    with pytest.raises(ValueError, match=f"it lacks {BRIDGE_WEIGHTS_NAME}: get that file"):
        Bridge.from_pretrained(str(tmp_path))
    config = json.loads((tmp_path / BRIDGE_CONFIG_NAME).read_text())
    del config["layers"]
    (tmp_path / BRIDGE_CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no bridge"):
        Bridge.from_pretrained(str(tmp_path))


def test_bad_arguments(source_folder, target_folder, lora_folder, same, tmp_path):
    with pytest.raises(ValueError, match="depth map beforehand"):
        fit_bridge(source_folder, target_folder, depth_map="similarity")
    with pytest.raises(ValueError, match="no maps between hidden states"):
        peft_cast.translate(source_folder, lora_folder, target_folder, bridge=same[1], beta=0.1)
    bridge, folder = same[1], same[2]
    for work, message in (
        (lambda: fit_bridge(None, folder), "`source` must be a folder, a hub id or a loaded model, got NoneType"),
        (lambda: Bridge.from_pretrained(None), "type NoneType is no name of one"),
        (lambda: Bridge.from_pretrained(lora_folder), "holds no bridge, but an adapter: pass a folder or hub id"),
        (lambda: Bridge.from_pretrained(folder), "holds no bridge, but a model: pass a folder or hub id"),
        (lambda: Bridge.from_pretrained(tmp_path), "holds no bridge, it has no bridge_config.json: pass"),
        (lambda: Bridge.from_pretrained("./no/where"), "there is no folder './no/where'"),
        (lambda: bridge.cast(lora_folder, folder, adapter_name=5), "`adapter_name` must be a string, got 5"),
        (lambda: bridge.cast(lora_folder, folder, adapter_name="a.b"), "cannot be called 'a.b'"),
        (lambda: bridge.cast_file(lora_folder, tmp_path, gain="2"), "`gain` must be a number above 0"),
        (lambda: bridge.cast_file(lora_folder, tmp_path, dtype="float16"), "`dtype` must be torch.float32"),
        (lambda: bridge.cast_file(lora_folder, 5), "must be written to a folder, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            work()
    for option, message in (("source", "choose from adapter_revision, dtype"), ("dtyp", "did you mean 'dtype'")):
        with pytest.raises(TypeError, match=f"`cast_file` has no argument '{option}': {message}"):
            bridge.cast_file(lora_folder, tmp_path, **{option: folder})
    bridge.save_pretrained(tmp_path / "bridge")
    for work in (bridge.cast, peft_cast.to_lora, lambda given: peft_cast.plan(source_folder, given, target_folder)):
        with pytest.raises(ValueError, match="holds a bridge, not an adapter: pass a hub id or a folder with adapter"):
            work(tmp_path / "bridge")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bridge": 5}, "`bridge` must be a `Bridge`, or the folder or hub id of one, got int"),
        ({"bridge": {}}, "`bridge` must be a `Bridge`"),
        ({"bridge": "./no/where"}, "there is no folder './no/where'"),
        ({}, "made for another target, .* whose `model_type` is 'llama' and not 'gemma3_text'"),
        ({"depth_map": {0: 0}}, "A bridge brings its depth map, .*: leave `depth_map` out"),
        ({"module_map": {"q": "q"}}, "leave `module_map` out"),
        ({"ridge": 0.1}, "leave `ridge` out"),
        ({"first_maps": "copy"}, "`bridge` brings the first maps: leave `first_maps` out"),
        ({"adapter_name": ""}, "cannot be called ''"),
        ({"adapter_name": "a.b"}, "cannot be called 'a.b'"),
        ({"source_tokenizer": 5}, "`source_tokenizer` must be"),
        ({"text": []}, "holds no text of at least 50 characters"),
        ({"text": ["short"]}, "holds no text of at least 50 characters"),
        ({"text": 5}, "must be a hub id, a path, an iterable of strings or a dataset, got int"),
        ({"fit_text": [1, 2]}, "must hold strings, got int"),
        ({"fit_text": c4_texts(1)}, "1 usable sample, at least 2"),
        ({"text": str(ROOT)}, "holds no dataset that `save_to_disk` wrote"),
        ({"text": {"default": c4_texts(9)}}, "an iterable of strings or a dataset, got dict"),
    ],
)
def test_what_can_be_told_before_models_are_loaded_is(given, message, same, lora_folder, target_folder, monkeypatch):
    monkeypatch.setattr(
        sys.modules["peft_cast.translate.one"], "open_pair", lambda *_, **__: pytest.fail("models were loaded")
    )
    with pytest.raises(ValueError, match=message):
        peft_cast.translate(same[2], lora_folder, target_folder, **{"bridge": same[1], **given})


def test_the_revision_that_is_given_goes_before_the_one_that_the_adapter_names(same, monkeypatch):
    seen = []
    monkeypatch.setattr(Side, "check", lambda side, model, which, revision=None: seen.append((model, revision)))
    monkeypatch.setattr("peft_cast.source.pair.base_of", lambda *_: ("user/model", "named"))
    for given in (None, "given"):
        check_bridge(same[1], None, "adapter", "target", Pairing(source_revision=given))
    assert seen[::2] == [("user/model", "named"), ("user/model", "given")]


def test_a_bridge_in_a_subfolder_on_the_hub(same, hub, tmp_path):
    same[1].save_pretrained(tmp_path / "files" / "to-gemma")
    hub.add("user/bridges", tmp_path / "files")
    assert Bridge.from_pretrained("user/bridges/to-gemma").modules == same[1].modules
    assert inspect("user/bridges/to-gemma")["kind"] == "bridge"


class Place:
    """A path of another library."""

    def __init__(self, path):
        self.path = str(path)

    def __fspath__(self):
        return self.path


def test_a_path_of_any_library_will_do(same, lora_folder, tmp_path):
    model, bridge, folder = same
    bridge.save_pretrained(Place(tmp_path / "bridge"))
    Bridge.from_pretrained(Place(tmp_path / "bridge")).cast_file(Place(lora_folder), Place(tmp_path / "cast"))
    assert inspect(Place(tmp_path / "bridge"))["kind"] == "bridge"
    assert peft_cast.to_lora(Place(tmp_path / "cast")).config.r == 4
    peft_cast.plan(Place(folder), Place(lora_folder), Place(folder), on="h100")
    result = peft_cast.translate(
        Place(folder),
        Place(lora_folder),
        Place(folder),
        text=c4_texts(8),
        start=Place(tmp_path / "cast"),
        target_tokenizer=Place(folder),
        output_dir=Place(tmp_path / "out"),
        steps=0,
        progress=False,
    )
    assert result.metrics["settings"]["start"] == str(tmp_path / "cast") and (tmp_path / "out" / "run.json").exists()


def test_models_are_given_back_untouched(byte_tokenizer, piece_tokenizer, source_folder, target_folder):
    source, target = (AutoModelForCausalLM.from_pretrained(f) for f in (source_folder, target_folder))
    before = [p.requires_grad for m in (source, target) for p in m.parameters()]
    fit_bridge(source, target, text=c4_texts(20), samples=8, max_length=32, progress=False)
    assert [p.requires_grad for m in (source, target) for p in m.parameters()] == before
    assert not any(m._forward_hooks for model in (source, target) for m in model.modules())
