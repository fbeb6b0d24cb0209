"""Adapters whose tensors are called otherwise than PEFT calls them, or belong to no module of the model."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from conftest import byte_level_tokenizer, c4_texts, tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_sources import FEW, from_file, lora, opened, outputs, save_adapter
from test_translate import assert_untouched, snapshot
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast import fit_bridge
from peft_cast.models import skeleton
from peft_cast.source import TOWER, planned_source, read_holdings


ROOT = "base_model.model."


def changed(adapter, rename=None, edit=None, **settings) -> str:
    """Change an adapter's files: `rename` its tensors' names, `edit` the tensors, `settings` of the configuration."""
    file = Path(adapter) / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors = {(rename(name) if rename else name): tensor for name, tensor in tensors.items()}
    tensors = edit(tensors) if edit else tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    config = Path(adapter) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return str(adapter)


def with_name(name: str) -> str:
    """The name with `.default` behind the parameter, as in the state of a model."""
    return re.sub(r"(lora_(?:embedding_)?[AB]|lora_magnitude_vector)", r"\1.default", name)


@pytest.fixture
def source(byte_tokenizer):
    model = tiny_model("llama", len(byte_tokenizer))
    model.name_or_path = "me/my-llama"
    return model


def in_layers(wrapper: str):
    return lambda name: re.sub(r"(layers\.\d+)", rf"\1.{wrapper}", name)


def instead(old: str, new: str):
    return lambda name: name.replace(old, new)


RENAMED = {
    "the adapter's name left in": (with_name, "with the adapter's name 'default'"),
    "another adapter's name": (lambda n: re.sub("lora_([AB])", r"lora_\1.poet", n), "with the adapter's name 'poet'"),
    "the name without .weight": (lambda n: with_name(n).removesuffix(".weight"), "with the adapter's name 'default'"),
    "no .weight": (lambda n: n.removesuffix(".weight"), "without '.weight'"),
    "no head": (instead("model.model.model.", "model.model."), "of the model without its head"),
    "wrapped by PEFT twice": (lambda n: ROOT + n, "wrapped by PEFT twice"),
    "no prefix at all": (lambda n: n.removeprefix(ROOT), "without PEFT's 'base_model.model.'"),
    "neither prefix nor head": (lambda n: n.removeprefix(ROOT + "model."), "without PEFT's 'base_model.model.'"),
    "model doubled": (instead("model.layers", "model.model.layers"), "with another prefix"),
    "compiled": (instead(ROOT, ROOT + "_orig_mod."), "saved from a compiled model"),
    "compiled outside": (lambda n: "_orig_mod." + n, "saved from a compiled model"),
    "compiled by layer": (in_layers("_orig_mod"), "saved from a compiled model"),
    "DDP": (lambda n: "module." + n, "wrapped by DDP"),
    "DDP within PEFT": (instead(ROOT, ROOT + "module."), "wrapped by DDP"),
    "FSDP": (lambda n: "_fsdp_wrapped_module." + in_layers("_fsdp_wrapped_module")(n), "wrapped by FSDP"),
    "checkpointing": (in_layers("_checkpoint_wrapped_module"), "activation checkpointing"),
    "several at once": (lambda n: "module._orig_mod." + with_name(n), "compiled model.*by DDP.*'default'"),
    "part of a larger model": (lambda n: "policy.actor." + n, "with another prefix"),
    "of a larger model's backbone": (instead(ROOT + "model", ROOT + "llm.model"), "with another prefix"),
    "of a vision-language model": (instead("model.layers", "model.language_model.layers"), "vision-language"),
    "of an older one": (instead("model.model.layers", "model.language_model.model.layers"), "vision-language"),
}


@pytest.mark.parametrize("kind", RENAMED)
def test_tensors_under_other_names_are_read_and_it_is_said(kind, source, tmp_path):
    rename, reason = RENAMED[kind]
    adapter = save_adapter(source, lora(), tmp_path)
    expected, before = from_file(source, adapter), snapshot(source)
    changed(adapter, rename)
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.warns(UserWarning, match=rf"tensors are named '.*{reason}.*\): they were read as 'base_model"):
        with opened(source, adapter) as on_source:
            torch.testing.assert_close(outputs(on_source.model), expected, rtol=0, atol=0)
            assert set(on_source.kernels) == {
                f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")
            }
            assert "they were read as" in on_source.metrics["renamed"]
    assert_untouched(source, before)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept


OTHER_KINDS = {
    "DoRA": (lora(use_dora=True), with_name),
    "DoRA compiled": (lora(use_dora=True), lambda n: n.replace(ROOT, ROOT + "_orig_mod.")),
    "magnitudes as modules": (
        lora(use_dora=True),
        lambda n: n + ".default.weight" if n.endswith("magnitude_vector") else with_name(n),
    ),
    "rank_pattern": (
        lora(rank_pattern={"^model.layers.0.*q_proj": 2}, alpha_pattern={"^model.layers.0.*q_proj": 40}),
        lambda n: n.replace(ROOT, ROOT + "_orig_mod."),
    ),
    "head and embedding": (lora(modules_to_save=["lm_head", "embed_tokens"]), lambda n: "module." + n),
    "the embedding": (lora(target_modules=[*FEW, "embed_tokens"]), with_name),
    "modules_to_save by name": (
        lora(modules_to_save=["norm"]),
        lambda n: re.sub(r"norm\.weight", "norm.modules_to_save.default.weight", with_name(n)),
    ),
    "trained tokens": (lora(trainable_token_indices=[7, 9]), lambda n: ROOT + n),
    "AdaLoRA": (peft.AdaLoraConfig(target_modules=FEW, total_step=9, task_type="CAUSAL_LM"), lambda n: "module." + n),
    "IA3": (peft.IA3Config(target_modules=FEW, feedforward_modules=["down_proj"]), lambda n: n + ".default"),
    "LoHa": (peft.LoHaConfig(r=2, target_modules=FEW), lambda n: n.replace("base_model.model.model.", ROOT)),
    "VeRA": (peft.VeraConfig(r=6, target_modules=FEW), lambda n: n.replace("model.layers", "_orig_mod.model.layers")),
    "layer_replication": (lora(layer_replication=[[0, 2], [1, 3]]), lambda n: "_orig_mod." + n),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_are_renamed_too(kind, source, tmp_path):
    config, rename = OTHER_KINDS[kind]
    adapter = save_adapter(source, config, tmp_path)
    expected = from_file(source, adapter)
    changed(adapter, rename)
    with pytest.warns(UserWarning, match="they were read as"), opened(source, adapter, source_rank=8) as on_source:
        torch.testing.assert_close(outputs(on_source.model), expected, rtol=0, atol=0)


def test_a_configuration_with_the_old_names_follows_the_tensors(source, tmp_path):
    # Trained without the head, where the layers are 'layers...': neither pattern matches the model with a head.
    body = copy.deepcopy(source).model
    targets = r"layers\.\d+\.(self_attn\.q|mlp\.down)_proj"
    config = lora(target_modules=targets, alpha_pattern={r"^layers\.0\..*q_proj": 40}, task_type=None)
    adapter = save_adapter(body, config, tmp_path)
    with torch.no_grad():
        trained = PeftModel.from_pretrained(body, adapter)(input_ids=torch.arange(5, 25)[None]).last_hidden_state
        expected = source.lm_head(trained)
    with pytest.warns(UserWarning, match="of the model without its head"), opened(source, adapter) as on_source:
        torch.testing.assert_close(outputs(on_source.model), expected)
        scalings = {name: kernel.scaling for name, kernel in on_source.kernels.items()}
    assert len(scalings) == 6 and scalings["model.layers.0.self_attn.q_proj"] == 10


def test_names_that_are_right_are_neither_copied_nor_warned_of(source, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_cast.source.renamed.save_file", lambda *_, **__: pytest.fail("written"))
    adapter = save_adapter(source, lora(bias="none", modules_to_save=["norm"]), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with opened(source, adapter) as on_source:
            assert "renamed" not in on_source.metrics


def vision_language_model(kind: str):
    import transformers

    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    if kind == "gemma3":
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_index=290)
        return transformers.Gemma3ForConditionalGeneration(config).eval()
    vision = transformers.CLIPVisionConfig(**vision, projection_dim=16)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**text), image_token_index=290
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
@pytest.mark.parametrize("towers", ["language_model", "language_model|vision_tower"])
def test_older_names_of_vision_language_models_are_read(kind, towers, tmp_path):
    source = vision_language_model(kind)
    adapter = save_adapter(source, lora(target_modules=rf".*({towers}).*\.(q_proj|down_proj)"), tmp_path)
    expected = from_file(source, adapter)

    def older(name):
        name = name.replace("model.model.language_model.", "model.language_model.model.")
        return name.replace("model.model.vision_tower.", "model.vision_tower.")

    # The pattern of its time speaks of the names of its time.
    changed(adapter, older, target_modules=rf"({towers})\..*\.(q_proj|down_proj)")
    with pytest.warns(UserWarning, match="vision-language"), opened(source, adapter) as on_source:
        torch.testing.assert_close(outputs(on_source.model), expected, rtol=0, atol=0)
        assert {name.partition(".layers")[0] for name in on_source.kernels} == {"model.language_model"}
        seen = [part for part in on_source.holdings.not_carried if part["what"] == TOWER]
        assert all("vision" in part["module"] for part in seen) and bool(seen) == ("vision" in towers)
        assert {part["what"] for part in read_holdings(adapter).not_carried} == {part["what"] for part in seen}
        assert ("use the adapter on its own model" in (on_source.holdings.lost("a") or "")) == bool(seen)


def test_what_lies_beside_the_decoder_is_lost_and_said_to_be(tmp_path):
    source = vision_language_model("llava")
    config = lora(target_modules=r".*language_model.*\.q_proj", modules_to_save=["multi_modal_projector"], bias="all")
    adapter = save_adapter(source, config, tmp_path / "projector")
    with opened(source, adapter) as on_source:
        for held in (read_holdings(adapter), on_source.holdings):
            lost = {part.what.partition(",")[0] for part in held.parts if "lost, also in `translate`" in part.outcome}
            assert lost == {"module trained in full (modules_to_save)", "trained bias"}
            assert held.on("translate") == "yes, names the rest"
    tower = save_adapter(source, lora(target_modules=r".*vision_tower.*\.q_proj"), tmp_path / "tower")
    why = (
        "changes only parts that no text passes through \\(vision, audio\\): pass one that changes the language model"
    )
    with pytest.raises(ValueError, match=why):
        peft_cast.translate(source, tower, tiny_model("llama"))
    nothing = {"drift_text": c4_texts(2), "target_tokenizer": byte_level_tokenizer(), "progress": False}
    with pytest.warns(UserWarning, match=f"The adapter 'seeing' {why}"):
        peft_cast.evaluate(source, {"seeing": tower}, [], **nothing)


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_modules_of_a_tower_that_the_file_has_nothing_of_are_left_alone(dora, older, tmp_path):
    source = vision_language_model("llava")
    config = lora(target_modules=r".*language_model.*\.(q_proj|v_proj)", use_dora=dora)
    adapter = save_adapter(source, config, tmp_path)
    expected = from_file(source, adapter)
    rename = instead("model.model.language_model.", "model.model.") if older else None
    changed(adapter, rename, target_modules=["q_proj", "v_proj"])
    with opened(source, adapter) as on_source:
        torch.testing.assert_close(outputs(on_source.model), expected, rtol=0, atol=0)
        assert len(on_source.kernels) == 4 and on_source.not_carried == ()
    with planned_source(skeleton(source.config), adapter) as (read, _, _):
        assert len(read.kernels) == 4
    changed(adapter, edit=lambda t: {name: x for name, x in t.items() if "layers.1" not in name})
    with pytest.raises(ValueError, match="was made for 1 layers|disagree"):
        opened(source, adapter).__enter__()


def test_every_way_that_reads_an_adapter_reads_renamed_ones(source_folder, lora_folder, tmp_path):
    adapter = shutil.copytree(lora_folder, tmp_path / "lora")
    options = {"text": c4_texts(40), "max_length": 48, "progress": False, "dtype": torch.float32}
    bridge = fit_bridge(source_folder, source_folder, samples=24, **options)

    def results():
        translated = peft_cast.translate(
            source_folder, adapter, source_folder, steps=0, fit_samples=20, eval_samples=4, **options
        )
        planned = peft_cast.plan(source_folder, adapter, source_folder, on="h100")
        bridge.cast_file(adapter, tmp_path / "cast")
        source, target = (AutoModelForCausalLM.from_pretrained(source_folder, dtype=torch.float32) for _ in range(2))
        from_file = outputs(PeftModel.from_pretrained(copy.deepcopy(target), tmp_path / "cast"))
        cast = outputs(bridge.cast(adapter, copy.deepcopy(target)))
        copied = outputs(peft_cast.baselines.direct_copy(source, adapter, copy.deepcopy(target)))
        crossed = outputs(peft_cast.baselines.cross_lora(source, adapter, target, rank=4))
        return translated.metrics, planned.memory, [from_file, cast, copied, crossed]

    metrics, memory, expected = results()
    changed(adapter, lambda n: "module." + n.replace(ROOT, ROOT + "_orig_mod."))
    with pytest.warns(UserWarning) as warned:
        found_metrics, found_memory, found = results()
    assert sum("they were read as" in str(warning.message) for warning in warned) == 6
    assert found_metrics["kl"] == metrics["kl"] and found_memory == memory
    assert "saved from a compiled model" in found_metrics["source"]["renamed"]
    assert "renamed" not in metrics["source"]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# One LoRA for each expert: names and sizes (in, out) as transformers 4 had them.
QWEN = {
    f"mlp.experts.{{}}.{name}_proj": size for name, size in (("gate", (32, 24)), ("up", (32, 24)), ("down", (24, 32)))
}
MIXTRAL = {f"block_sparse_moe.experts.{{}}.{name}": size for name, size in zip(("w1", "w3", "w2"), QWEN.values())}
EXPERTS = {"qwen3_moe": QWEN, "olmoe": QWEN, "mixtral": MIXTRAL}


def mixture(kind: str):
    import transformers

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 128}
    sizes |= {"num_local_experts" if kind == "mixtral" else "num_experts": 4, "moe_intermediate_size": 24}
    sizes |= {"intermediate_size": 24, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapter_on_experts(model, kind: str, folder, only=None) -> str:
    """A LoRA on attention and experts, in the file as transformers 4 would have it; and on the model, merged."""
    names = {name: size for name, size in EXPERTS[kind].items() if only is None or name.endswith(only)}
    adapter = save_adapter(model, lora(target_modules=["q_proj", "v_proj"]), folder)
    merged = PeftModel.from_pretrained(copy.deepcopy(model), adapter).merge_and_unload()

    def with_experts(tensors):
        generator = torch.Generator().manual_seed(3)
        for layer in range(2):
            experts = merged.model.layers[layer].mlp.experts
            for expert in range(4):
                deltas = []
                for name, (width, height) in names.items():
                    A, B = torch.randn(4, width, generator=generator), torch.randn(height, 4, generator=generator)
                    key = f"{ROOT}model.layers.{layer}.{name.format(expert)}"
                    tensors |= {f"{key}.lora_A.weight": 0.3 * A, f"{key}.lora_B.weight": 0.3 * B}
                    deltas.append(2 * 0.09 * B @ A)
                if only is None:
                    experts.gate_up_proj.data[expert] += torch.cat(deltas[:2])
                    experts.down_proj.data[expert] += deltas[2]
        return tensors

    changed(adapter, edit=with_experts, target_modules=["q_proj", "v_proj", *(n.rpartition(".")[2] for n in names)])
    return adapter, outputs(merged)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("rename", [None, instead(ROOT, ROOT + "_orig_mod.")])
def test_experts_of_transformers_4_are_in_the_teacher_and_named(kind, rename, tmp_path):
    source = mixture(kind)
    adapter, expected = adapter_on_experts(source, kind, tmp_path)
    changed(adapter, rename)
    before = snapshot(source)
    with pytest.warns(UserWarning) as warned:
        warnings.warn("the one that there is always")
        with opened(source, adapter) as on_source:
            torch.testing.assert_close(outputs(on_source.model), expected, rtol=1e-3, atol=1e-4)
            assert set(on_source.kernels) == {f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qv"}
            assert {
                (f"model.layers.{i}.mlp.experts", f"adapter on the parameter '{name}' (target_parameters)")
                for i in range(2)
                for name in ("gate_up_proj", "down_proj")
            } == set(on_source.not_carried)
    assert any("they were read as" in str(warning.message) for warning in warned) == (rename is not None)
    assert_untouched(source, before)


def test_experts_of_transformers_4_are_read_on_models_without_weights(tmp_path):
    source = mixture("qwen3_moe")
    adapter, _ = adapter_on_experts(source, "qwen3_moe", tmp_path)
    with opened(source, adapter) as on_source:
        expected = {name: (kernel.A, kernel.B) for name, kernel in on_source.kernels.items()}
    with opened(skeleton(source.config), adapter) as on_source:
        assert {name: (kernel.A, kernel.B) for name, kernel in on_source.kernels.items()}.keys() == expected.keys()
        for name, kernel in on_source.kernels.items():
            assert torch.equal(kernel.A, expected[name][0]) and torch.equal(kernel.B, expected[name][1])
        own = {name: p for name, p in on_source.model.named_parameters() if "experts" in name and "lora_" in name}
        assert len(own) == 8 and not any(parameter.is_meta for parameter in own.values())


def test_experts_that_peft_cannot_place_are_named_with_the_remedy(tmp_path):
    source = mixture("qwen3_moe")
    adapter, _ = adapter_on_experts(source, "qwen3_moe", tmp_path / "half", only=("gate_proj", "down_proj"))
    with pytest.raises(ValueError, match=r"each expert .*them \('down_proj', 'gate_proj'\) on .*merge it into"):
        opened(source, adapter).__enter__()
    # PEFT converts the tensors for this model, and not the configuration.
    adapter_on_experts(source, "qwen3_moe", tmp_path / "qwen2")
    with pytest.raises(ValueError, match=r"each expert .*on the experts of the model \(Qwen2MoeForCausalLM\)"):
        opened(mixture("qwen2_moe"), str(tmp_path / "qwen2")).__enter__()
    plain = tiny_model("llama", 300, num_hidden_layers=2)
    whole, _ = adapter_on_experts(source, "qwen3_moe", tmp_path / "whole")
    with pytest.raises(ValueError, match="for each expert .*put them \\('down_proj', 'gate_proj', 'up_proj'\\) on"):
        opened(plain, whole).__enter__()


def emptied(shape):
    def edit(tensors):
        return {name: torch.empty(shape(tensor)) for name, tensor in tensors.items()}

    return edit


def first(tensors, change):
    name = min(tensors)
    return tensors | {name: change(tensors[name])}


# What is wrong: how the adapter is made, on which model it is put, and what is said of it.
WRONG = {
    "ZeRO-3": ({"edit": emptied(lambda t: (0,))}, "12 of its 12 tensors hold nothing.*ZeRO-3.*zero_to_fp32.py"),
    "ZeRO-3, rows": ({"edit": emptied(lambda t: (t.shape[0], 0))}, "hold nothing.*stage3_gather_16bit"),
    "one is empty": ({"edit": lambda t: first(t, lambda x: x[:0])}, "1 of its 12 tensors hold nothing"),
    "no tensors": ({"edit": lambda t: {}}, "its file holds no tensors.*zero_to_fp32.py"),
    "a number": ({"edit": lambda t: first(t, lambda x: x.sum())}, "1 of its 12 tensors should be matrices"),
    "flat shards": ({"edit": lambda t: {n: x.flatten() for n, x in t.items()}}, "should be matrices.*FULL_STATE_DICT"),
    "several adapters": (
        {"edit": lambda t: {n.replace(".weight", f".{a}.weight"): x + 0 for n, x in t.items() for a in ("x", "y")}},
        "several adapters, 'x', 'y': save one alone.*selected_adapters",
    ),
    "named by another tool": (
        {"rename": lambda n: n.replace("lora_A", "down_proj").replace("lora_B", "up_proj")},
        "none of its tensors, 12 in all, is named as PEFT names a LoRA's.*convert the file",
    ),
    "an unknown prefix": (
        {"rename": lambda n: n.replace("model.layers", "model.tall.layers")},
        "named 'base_model.model.model.tall.layers\\.*'.*are those of 'base_model.model.model.layers...': rename",
    ),
    "an encoder": (
        {"rename": lambda n: n.replace("model.layers", "model.encoder.layers")},
        "another part of a model, 'base_model.model.model.encoder.layers\\.*'.*, which the model .* does not have",
    ),
    "transposed": ({"edit": lambda t: {n: x.T for n, x in t.items()}}, "matrices are transposed .*transpose them, or"),
    "names of kohya": (
        {"rename": lambda n: n.replace("lora_A", "lora_down").replace("lora_B", "lora_up")},
        "none of its tensors, 12 in all, is named as PEFT names a LoRA's",
    ),
    "no targets": ({"target_modules": []}, "disagree: `target_modules` .* is \\[\\].*the file has 'down_proj'"),
    "other modules": (
        {"rename": lambda n: n.replace("self_attn.q_proj", "attention.query_key_value")},
        "another class, with modules named 'query_key_value' .*LlamaForCausalLM\\) has .*'q_proj'",
    ),
    "a classifier": (
        {"edit": lambda t: t | {ROOT + "score.weight": torch.zeros(2, 32)}, "modules_to_save": ["score"]},
        "whole modules that the model .* does not have .*score.*only adapters of causal",
    ),
    "a layer too many": (
        {"rename": lambda n: n.replace("layers.2", "layers.7")},
        "made for at least 8 layers and the model .* has 3 .*is in the file, not in the model; 4 such",
    ),
    "a layer too few": (
        {"edit": lambda t: {n: x for n, x in t.items() if "layers.2" not in n}},
        "made for 2 layers and the model .* has 3 .*in the model, not in the file",
    ),
    "a hole": (
        {"edit": lambda t: {n: x for n, x in t.items() if "layers.1.mlp" not in n}},
        "configuration and its file disagree.*'.*layers.1.mlp.*' is in the model, not in the file; 2 such tensors",
    ),
    "half of a LoRA": ({"edit": lambda t: {n: t[n] for n in sorted(t)[1:]}}, "its file is cut: '.*get the file again"),
    "another width": (
        {"edit": lambda t: {n: x[:, :20].clone() if "q_proj.lora_A" in n else x for n, x in t.items()}},
        "q_proj.lora_A.weight' of shape \\(4, 20\\) is for another width, '.*q_proj' takes 32",
    ),
    "another rank": ({"r": 8}, "configuration says rank 8 for '.*' and '.*' of shape .* has 4: correct `r` or"),
    "a cut list": ({"target_modules": ["q_proj"]}, "is \\['q_proj'\\], and '.*down_proj.*the file has 'down_proj'"),
    "a cut pattern": ({"target_modules": r".*\.q_pro"}, "disagree: `target_modules` .*12 such tensors: correct"),
    "layers left out": ({"layers_to_transform": [0]}, "`layers_to_transform` in .* leaves it out; 8 such tensors"),
    "modules left out": ({"exclude_modules": ["q_proj"]}, "`exclude_modules` in .* leaves it out; 6 such tensors"),
    "layers too far": ({"layer_replication": [[0, 2], [1, 9]]}, "speaks of layer 8, .* has 3: correct it in adapter"),
    "layers made too often": (
        {"layer_replication": [[0, 2], [1, 3]]},
        "makes 4 layers, and the file is for 3: correct",
    ),
    "layers made too seldom": ({"layer_replication": [[0, 2]]}, "`layer_replication` .* makes 2 layers, .* is for 3"),
    "further dimensions": ({"edit": lambda t: {n: x[..., None] for n, x in t.items()}}, "should be matrices.*: take"),
    "no whole module": ({"modules_to_save": ["lm_head"]}, "`modules_to_save` .* means 'lm_head', .*: correct `"),
    "a part that no LoRA has": (
        {"edit": lambda t: t | {min(t).replace("lora_A", "lora_C"): torch.zeros(4, 4)}},
        "lora_C.weight' is in its file, and PEFT has no such tensor for it; 1 such tensor: delete them",
    ),
    "an option of another kind": ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, "correct `use_bdlora` in "),
    "a tensor beside the modules": ({"edit": lambda t: t | {"epoch": torch.ones(1)}}, "'epoch' of .*or delete them"),
    "a tensor twice": (
        {"edit": lambda t: t | {min(t).replace("weight", "old.weight"): torch.zeros(4, 4)}},
        "old.weight' and '.*' .* are the same tensor by their names: delete the one",
    ),
    "a pattern of one": ({"target_modules": r".*layers\.0\.(self_attn\.q|mlp\.down)_proj"}, "8 such tensors: correct"),
}


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_match_is_said_in_one_sentence_with_the_remedy(kind, weights, source, tmp_path):
    change, message = WRONG[kind]
    source.name_or_path = ""
    adapter = changed(save_adapter(source, lora(), tmp_path), base_model_name_or_path="me/my-llama", **change)
    on = source if weights else skeleton(source.config)
    on.name_or_path = "me/my-llama"  # the very model that the adapter names: to pass it is no advice
    before, names = snapshot(source), list(on.state_dict())
    with pytest.raises(ValueError, match=f"does not fit the source model 'me/my-llama': .*{message}") as error:
        opened(on, adapter).__enter__()
    text = str(error.value)
    assert "trained on" not in text and text.endswith(".") and "\n" not in text and text.count(": ") <= 3
    assert_untouched(source, before)
    assert list(on.state_dict()) == names


IA3 = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
LOHA = peft.LoHaConfig(r=2, target_modules=FEW)
# The same of other kinds, which PEFT alone compares with a model.
WRONG_TOO = {
    "LoHa, half": (
        LOHA,
        {"edit": lambda t: {n: x for n, x in t.items() if "w1" in n}},
        "its file is cut: .*get the file again",
    ),
    "LoHa, no layer": (LOHA, {"edit": lambda t: {n: x for n, x in t.items() if "layers.2" not in n}}, "for 2 layers"),
    "LoHa, transposed": (LOHA, {"edit": lambda t: {n: x.T for n, x in t.items()}}, "matrices are transposed"),
    "LoHa, rank": (
        LOHA,
        {"r": 3},
        r"shape \(32, 2\) is in the file, and by `r` in .* would be \(32, 3\): correct `r`",
    ),
    "IA3, transposed": (IA3, {"edit": lambda t: {n: x.T for n, x in t.items()}}, "matrices are transposed"),
    "IA3, inputs": (IA3, {"feedforward_modules": []}, "correct `feedforward_modules`"),
    "OFT, blocks": (
        peft.OFTConfig(oft_block_size=4, target_modules=FEW),
        {"oft_block_size": 8},
        r"correct `oft_block_size`, .*\(if they are right, the adapter names this very model",
    ),
    "SHiRA, names": (
        peft.ShiraConfig(r=4, target_modules=FEW),
        {"rename": lambda n: n.replace("q_proj", "query")},
        "another class, with modules named 'query'",
    ),
    "CAST": (
        peft_cast.CastConfig(r=4, target_modules=FEW, init_weights=False),
        {"edit": lambda t: {n: x for n, x in t.items() if "layers.2" not in n}},
        "lacks the tensor .*layers.2",
    ),
}


@pytest.mark.parametrize("kind", WRONG_TOO)
def test_a_plan_says_what_a_translation_says_of_other_kinds(kind, source, tmp_path):
    config, change, message = WRONG_TOO[kind]
    adapter = changed(save_adapter(source, config, tmp_path), base_model_name_or_path="me/my-llama", **change)
    without = skeleton(source.config)
    without.name_or_path = source.name_or_path
    said = []
    for reading in (planned_source(without, adapter), opened(source, adapter)):
        with pytest.raises(ValueError, match=f"does not fit the source model .*{message}") as error:
            reading.__enter__()
        said.append(str(error.value))
    assert said[0] == said[1]


def test_an_adapter_of_another_model_names_the_model_to_pass(source, tmp_path):
    adapter = changed(save_adapter(source, lora(), tmp_path / "lora"), base_model_name_or_path="me/my-llama")
    loha = save_adapter(source, peft.LoHaConfig(r=2, target_modules=FEW), tmp_path / "loha")
    changed(loha, base_model_name_or_path="me/my-llama")
    for other in (
        tiny_model("llama", 300, hidden_size=64),
        tiny_model("llama", 300, num_hidden_layers=2),
        tiny_model("llama", 300, num_hidden_layers=5),
        tiny_model("opt", 300),
    ):
        other.name_or_path = "me/another"
        for given in (adapter, loha):
            with pytest.raises(ValueError, match="it was trained on 'me/my-llama', pass that as `source`.$"):
                opened(other, given).__enter__()


def test_tensors_that_would_land_on_one_place_are_not_renamed(source, tmp_path):
    adapter = save_adapter(source, lora(), tmp_path)
    changed(adapter, edit=lambda t: t | {"module." + name: tensor + 1 for name, tensor in t.items()})
    with pytest.raises(ValueError, match="could belong to several|rename the tensors"):
        opened(source, adapter).__enter__()


OF_KINDS = {
    "DoRA": lora(use_dora=True),
    "LoKr": peft.LoKrConfig(r=2, decompose_factor=4, target_modules=FEW),
    "AdaLoRA": peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=FEW, total_step=9),
}
CUT = "its file is cut: '.*2.mlp.down_proj.*' is in the model, .*others of its module .*: get the file again"
MASK = {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True]}


def without(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def reshaped(part: str, shape):
    return lambda tensors: {n: x.reshape(shape) if part in n else x for n, x in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("DoRA", {"edit": without("2.mlp.down_proj.lora_magnitude")}, CUT),
        ("LoKr", {"edit": without("2.mlp.down_proj.lokr_w1")}, CUT),
        ("AdaLoRA", {"edit": without("2.mlp.down_proj.lora_E")}, CUT),
        ("DoRA", {"edit": reshaped("magnitude", (1, -1))}, "PEFT wants it of shape \\(32,\\): reshape it"),
        ("LoKr", {"decompose_factor": 2}, "correct `r` or `decompose_factor`"),
        ("LoKr", {"rank_pattern": {"q_proj": 7}}, "lokr_w2_a' .*where '.*lokr_w2' would be; .*correct `rank_pattern`"),
        ("AdaLoRA", {"init_r": 3}, "by `init_r` in adapter_config.json"),
        ("AdaLoRA", {"rank_pattern": MASK}, "`rank_pattern` .* keeps .* and its file has 4 .*: correct `rank"),
        ("AdaLoRA", {"rank_pattern": {"odd": 3}}, "`rank_pattern` .* keeps 3 of 'odd', and its file has none"),
    ],
)
def test_other_kinds_that_are_broken_name_the_tensor_or_the_setting(kind, change, message, source, tmp_path):
    adapter = changed(save_adapter(source, OF_KINDS[kind], tmp_path), **change)
    for on in (source, skeleton(source.config)):
        with pytest.raises(ValueError, match=f"does not fit the source model .*{message}"):
            opened(on, adapter).__enter__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_parameters": None}, "None, '.*experts.lora_A.weight' would not be in the file, and it is: correct"),
        ({"edit": without("experts")}, "experts.lora_A.weight' would be in the file, and it is not: correct `target_"),
    ],
)
def test_experts_that_configuration_and_file_do_not_both_mean_are_told(change, message, tmp_path):
    source = mixture("qwen3_moe")
    config = lora(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    adapter = changed(save_adapter(source, config, tmp_path), **change)
    with pytest.raises(ValueError, match=f"by `target_parameters` in adapter_config.json, .*{message}"):
        opened(source, adapter).__enter__()


@pytest.mark.parametrize("option", ["modules_to_save", "target_parameters"])
def test_modules_that_the_model_does_not_have_are_passed_over_and_it_is_said(option, source, tmp_path):
    adapter = changed(save_adapter(source, lora(), tmp_path), **{option: ["odd"]})
    with pytest.warns(UserWarning, match=f"`{option}` in adapter_config.json names 'odd', .* passed over"):
        with opened(source, adapter) as on_source:
            assert len(on_source.kernels) == 6


def test_what_is_left_out_of_a_file_renames_nothing(source, tmp_path):
    adapter = save_adapter(source, lora(modules_to_save=["lm_head"]), tmp_path)
    own = {ROOT + "lm_head.original_module.weight": source.lm_head.weight.data.clone()}
    changed(adapter, edit=lambda tensors: tensors | own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with opened(source, adapter) as on_source:
            assert "renamed" not in on_source.metrics and len(on_source.kernels) == 6


@pytest.mark.parametrize("dora", [True, False])
def test_a_plan_says_which_layers_there_are_not(dora, source, tmp_path):
    adapter = changed(save_adapter(source, lora(use_dora=dora), tmp_path), layer_replication=[[0, 4]])
    with pytest.raises(ValueError, match="`layer_replication` speaks of layer 3"):
        planned_source(skeleton(source.config), adapter).__enter__()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([7, 8, 9], "names 3 tokens: correct it"),
        ([7, 999], "not among the 300"),
        ({"odd": [7, 9]}, "the module 'odd'"),
    ],
)
def test_trained_tokens_that_are_others_than_the_files_are_named(tokens, message, source, tmp_path):
    adapter = save_adapter(source, lora(trainable_token_indices=[7, 9]), tmp_path)
    changed(adapter, trainable_token_indices=tokens)
    for on in (source, skeleton(source.config)):
        with pytest.raises(ValueError, match=f"`trainable_token_indices` in adapter_config.json .*{message}"):
            opened(on, adapter).__enter__()


def test_a_renamed_adapter_is_checked_as_any_other(source, tmp_path):
    adapter = save_adapter(source, lora(), tmp_path / "nan")
    changed(adapter, lambda n: "module." + n, edit=lambda t: first(t, lambda x: x * float("nan")))
    with pytest.raises(ValueError, match=r"'module\..* holds NaN or infinite"):
        opened(source, adapter).__enter__()
    adapter = save_adapter(
        copy.deepcopy(source).model, lora(target_modules=r"layers\..*q_proj", task_type=None), tmp_path / "big"
    )
    changed(adapter, r=60_000)
    with pytest.raises(ValueError, match=r"/big' cannot be used. .*the two do not belong together") as error:
        opened(source, adapter).__enter__()
    assert "peft_cast_" not in str(error.value)
