"""Nothing of an adapter is dropped in silence: one description of what it holds and what becomes of it, which every
verb prints, and the table of docs/sources.md, made of it.
"""

import copy
import json
import os
import warnings

import peft
import pytest
import torch
from conftest import ROOT, c4_texts, make_lora, save_model, tiny_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import call
from test_sources import APPROXIMATED, EXACT, FEW, REFUSED, REPORTED, lora, opened, reported_source, save_adapter

import peft_cast
from peft_cast.cli.inspect import describe, inspect
from peft_cast.source import VERBS, read_holdings
from peft_cast.source.kinds import beside_text


KINDS = {**EXACT, **{kind: (config, None) for kind, config in APPROXIMATED.items()}, **REPORTED, **REFUSED}
IN_THE_CONFIG = ("sequence classification", "LoRA-GA", "PiSSA by fast SVD", "CorDA", "LoftQ")
WITHOUT_MODEL = ("prompt tuning", "prefix tuning", "X-LoRA", "Poly")


def saved(kind: str, folder, vocab_size: int = 300):
    """An adapter of a kind of tests/test_sources.py, and its model."""
    config = KINDS[kind][0]
    source = reported_source(KINDS[kind][1] if kind in REPORTED else "llama", vocab_size)
    if kind in WITHOUT_MODEL:
        config.save_pretrained(folder)
        save_file({"prompt_embeddings": torch.zeros(4, 32)}, folder / "adapter_model.safetensors")
    elif kind in IN_THE_CONFIG:
        make_lora(source, folder)
        edit(folder, **{name: getattr(config, name) for name in ("task_type", "init_lora_weights", "loftq_config")})
    else:
        save_adapter(source, config, folder, size=0.4 if kind in ("AdaLoRA", "VeRA", "VB-LoRA") else 0.1)
    return source


def edit(folder, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def parts(holdings) -> set:
    return {(part.what, part.fate, tuple(sorted(part.modules))) for part in holdings.parts}


@pytest.mark.parametrize("kind", [*EXACT, *APPROXIMATED, *REPORTED])
def test_the_files_say_what_reading_the_adapter_on_its_model_finds(kind, tmp_path):
    source = saved(kind, tmp_path)
    described = read_holdings(tmp_path)
    with opened(source, tmp_path, source_rank=6 if kind in APPROXIMATED else None) as on_source:
        found = on_source.holdings
    said = {part for part in parts(described) if "weights of the base model" not in part[0]}  # those may be unchanged
    assert said == parts(found) and described.read == found.read and described.refused is None
    assert found.kind == described.kind and found.options == described.options
    if kind in EXACT:
        assert {part.rank for part in described.parts} == {part.rank for part in found.parts} == {EXACT[kind][1]}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_files_tell_cannot_be_a_source_is_refused(kind, tmp_path):
    source = saved(kind, tmp_path)
    refused = read_holdings(tmp_path).refused
    text = describe(inspect(tmp_path))
    assert f"cannot be a source: it {refused}" in text and "carried exactly" not in text
    with pytest.raises(ValueError) as error:
        with opened(source, tmp_path):
            pass
    # Those whose tensors tell are refused once they are on the model, which names the layer's class.
    assert refused in str(error.value) or "changes no linear layer" in refused and "Nothing of" in str(error.value)


# The table of docs/sources.md


PAGE = ROOT / "docs" / "sources.md"
MARKS = "<!-- verbs: made by PEFT_CAST_WRITE_DOCS=1 pytest tests/test_holdings.py -->\n\n", "\n<!-- end of verbs -->"


def test_the_docs_say_what_every_verb_does_with_every_kind(tmp_path):
    verbs = ("`translate`", "`plan`", "`Bridge.cast`", "`cast_file`", "`to_lora` of the result", "`inspect`")
    heads = ("kernels", "not carried", *verbs)
    rows = [("source", *heads), ("---",) * (1 + len(heads))]
    for number, kind in enumerate(KINDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        saved(kind, folder)
        holdings = read_holdings(folder)
        rest = ", ".join(dict.fromkeys(part["what"] for part in holdings.not_carried))
        rows.append((kind, holdings.carried, rest, *(holdings.on(verb) for verb in VERBS)))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    committed, mark, after = rest.partition(MARKS[1])
    if os.environ.get("PEFT_CAST_WRITE_DOCS"):
        PAGE.write_text("".join((before, MARKS[0], table, MARKS[1], after)), encoding="utf-8")
        committed = table
    assert committed == table, f"run {MARKS[0].strip()}"


# Bridges


@pytest.fixture(scope="module")
def bridges(byte_tokenizer, tmp_path_factory):
    """A source and a bridge to another model, of an architecture with biases and of one without."""
    made, folder = {}, tmp_path_factory.mktemp("bridges")
    target = save_model(tiny_model("qwen2", len(byte_tokenizer), hidden_size=40), byte_tokenizer, folder / "target")
    for name in ("llama", "opt"):
        source = reported_source(name, len(byte_tokenizer))
        path = save_model(source, byte_tokenizer, folder / name)
        options = {"samples": 12, "max_length": 48, "progress": False, "dtype": torch.float32}
        made[name] = source, peft_cast.fit_bridge(path, target, text=c4_texts(20), **options)
    return made


def warned(work) -> tuple:
    """What a call returns, and its warnings of what is not carried over."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = work()
    return result, [str(warning.message) for warning in said if "carried over" in str(warning.message)]


OVER_A_BRIDGE = {
    "head and embeddings in full": ("llama", lora(modules_to_save=["embed_tokens", "lm_head"]), "modules_to_save"),
    "norms in full": ("llama", lora(modules_to_save=["input_layernorm", "norm"]), "model.layers.0.input_layernorm"),
    "trained tokens": ("llama", lora(trainable_token_indices=[7]), "trained tokens (model.embed_tokens)"),
    "LoRA on the head": ("llama", lora(target_modules=["q_proj", "lm_head"]), "adapter on the output head (lm_head)"),
    "LoRA on embeddings": ("llama", lora(target_modules=["q_proj", "embed_tokens"]), "adapter on an Embedding"),
    "a linear layer in full": ("llama", lora(target_modules=["q_proj"], modules_to_save=["up_proj"]), "up_proj and 2"),
    "biases of the LoRA": ("llama", lora(lora_bias=True), "trained bias (model.layers.0.self_attn.q_proj and 5 more)"),
    "all biases": ("opt", lora(target_modules=["q_proj", "fc2"], bias="all"), "trained bias"),
    "biases of LoRA's layers": ("opt", lora(target_modules=["q_proj"], bias="lora_only"), "q_proj and 2 more"),
    "aLoRA": ("llama", lora(alora_invocation_tokens=[5]), "invocation tokens only (aLoRA)"),
}


@pytest.mark.parametrize("case", OVER_A_BRIDGE)
def test_a_bridge_says_what_it_loses(case, bridges, tmp_path):
    architecture, config, what = OVER_A_BRIDGE[case]
    source, bridge = bridges[architecture]
    adapter, folder = save_adapter(source, config, tmp_path / "a"), tmp_path / "out"
    held, said = warned(lambda: bridge.cast_file(adapter, folder))
    assert "weights of the base model" not in said[0]  # which PEFT saves beside an adapter on the head
    assert len(said) == 1 and what in said[0] and said[0].endswith("does.") and "use `translate`" in said[0]
    metrics = json.loads((folder / "cast_metrics.json").read_text())["metrics"]["source"]
    assert metrics["not_carried"] == held.not_carried != []
    card = (folder / "README.md").read_text()
    assert what in card.partition("## What is not carried over")[2]
    assert what.partition(" (")[0] in describe(inspect(folder)).partition("its source")[2]
    model, said = warned(lambda: bridge.cast(adapter, source=copy.deepcopy(source)))
    assert len(said) == 1 and what in said[0]
    model.save_pretrained(tmp_path / "by_peft")  # PEFT writes no metrics; the configuration knows
    for place in (folder, tmp_path / "by_peft"):
        folded = peft_cast.to_lora(place)
        assert folded.not_carried and f"source adapter: {folded.not_carried[0]['what']}" in str(folded)
        folded.save_pretrained(tmp_path / "lora")
        assert "## What is not carried over" in (tmp_path / "lora" / "README.md").read_text()
        assert "not carried over from there" in describe(inspect(tmp_path / "lora"))


def test_an_adapter_in_memory_is_not_called_by_the_name_of_its_model(bridges):
    source, bridge = bridges["llama"]
    adapter = get_peft_model(copy.deepcopy(source), lora(modules_to_save=["lm_head"], init_lora_weights=False))
    _, said = warned(lambda: bridge.cast(adapter))
    assert len(said) == 1 and said[0].startswith("The adapter is not carried over whole; lost is")


def test_a_bridge_is_silent_where_nothing_is_lost(bridges, tmp_path):
    source, bridge = bridges["llama"]
    held, said = warned(lambda: bridge.cast_file(make_lora(source, tmp_path / "a", FEW), tmp_path / "out"))
    assert not said and held.not_carried == []
    assert "not carried" not in (tmp_path / "out" / "README.md").read_text()
    assert "not carried" not in describe(inspect(tmp_path / "out"))
    assert "not_carried" not in str(peft_cast.to_lora(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["DoRA", "PiSSA", "IA3", "target_parameters (2-D)"])
def test_what_must_be_measured_is_refused_from_file_to_file_with_what_to_do(kind, bridges, byte_tokenizer, tmp_path):
    source = saved(kind, tmp_path, len(byte_tokenizer))
    with pytest.raises(
        ValueError, match=r"not loaded from file to file: use `Bridge.cast` with `source`, or `translate`"
    ):
        bridges["llama"][1].cast_file(tmp_path, tmp_path / "out")
    assert bridges["llama"][1].cast(str(tmp_path), source=source)


def test_kernels_without_a_place_are_named_too(bridges, tmp_path):
    source, bridge = bridges["llama"]
    adapter = save_adapter(source, lora(), tmp_path / "a")
    lacking = copy.deepcopy(bridge)
    fits = lacking.maps.kernels.pop("model.layers.0.self_attn.q_proj")
    lacking.modules.kernels.pop("model.layers.0.self_attn.q_proj")
    lacking.modules.found.pop(fits[0].source_place)
    _, said = warned(lambda: lacking.cast_file(adapter, tmp_path / "out"))
    assert "have no place on the target" in said[0] and "self_attn.q_proj" in said[0]


def test_the_command_says_it_and_ends_well(bridges, tmp_path):
    source, bridge = bridges["llama"]
    bridge.save_pretrained(tmp_path / "bridge")
    adapter = save_adapter(source, lora(modules_to_save=["lm_head"]), tmp_path / "a")
    done = call("cast", tmp_path / "bridge", adapter, "-o", tmp_path / "out", "--json")
    account = json.loads(done.stdout)
    assert account["not_carried"] == [{"module": "lm_head", "what": "module trained in full (modules_to_save)"}]
    assert account["holdings"]["ranks"] == [4] and "is not carried over whole" in done.stderr
    assert "module trained in full" in call("cast", tmp_path / "bridge", adapter, "-o", tmp_path / "out").stdout
    folded = json.loads(call("to-lora", tmp_path / "out", "-o", tmp_path / "lora", "--json").stdout)
    assert folded["not_carried"] == account["not_carried"]
    report = call("report", tmp_path / "out")
    assert "report" in report.stdout and "module trained in full" in (tmp_path / "out" / "report.md").read_text()


# Folding


@pytest.mark.parametrize("saved_in_full", [["lm_head"], ["norm"], ["embed_tokens"]])
def test_what_a_cast_adapter_has_besides_its_kernels_is_not_folded_in_silence(saved_in_full, byte_tokenizer, tmp_path):
    base = save_model(tiny_model("llama", len(byte_tokenizer)), byte_tokenizer, tmp_path / "base")
    config = peft_cast.CastConfig(
        r=4, target_modules=FEW, init_weights=False, modules_to_save=saved_in_full, base_model_name_or_path=base
    )
    adapted = get_peft_model(tiny_model("llama", len(byte_tokenizer)), config)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "cast")
    for adapter in (adapted, tmp_path / "cast"):
        folded, said = warned(lambda: peft_cast.to_lora(adapter))
        assert len(said) == 1 and saved_in_full[0] in said[0] and "`merge_and_unload`" in said[0]
        assert "Not carried over from the CAST adapter: module trained in full" in str(folded)
        folded.save_pretrained(tmp_path / "lora")
        assert "has no place for these parts of the CAST adapter" in (tmp_path / "lora" / "README.md").read_text()


# Plans and translations


@pytest.mark.parametrize("config", [lora(modules_to_save=["lm_head"]), lora(lora_bias=True)])
def test_a_plan_names_what_is_not_carried(config, byte_tokenizer, tmp_path):
    source = tiny_model("llama", len(byte_tokenizer))
    path = save_model(source, byte_tokenizer, tmp_path / "source")
    adapter = save_adapter(source, config, tmp_path / "a")
    plan = peft_cast.plan(path, adapter, path, on="h100", batch_size=2, max_length=32)
    what = plan.as_dict()["not_carried"][0]["what"]
    assert f"not carried  {what}" in str(plan)


def test_without_a_refinement_nothing_is_said_to_imitate_what_kernels_lack():
    from peft_cast.results import diagnose

    metrics = {"kl": {"target": 1.0, "translated": 0.5}, "excitement": 1.0, "settings": {"steps": 0}}
    metrics["source"] = {"not_carried": [{"module": "lm_head", "what": "trained"}], "rank": 4}
    assert any("so they are lost: pass `steps`" in sentence for sentence in diagnose(metrics, []))
    metrics["settings"]["steps"] = 5
    assert any("the refinement imitates them" in sentence for sentence in diagnose(metrics, []))
    metrics["source"]["not_carried"][0]["what"] = beside_text("trained bias", "model.vision_tower.layers.0.fc1")
    assert any(sentence.endswith("They are lost.") for sentence in diagnose(metrics, []))


def test_a_changed_norm_in_the_file_is_named(tmp_path):
    # PEFT loads any weight of the base model that the file has, in the layers too.
    source = tiny_model("llama", 300)
    adapter = save_adapter(source, lora(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.input_layernorm.weight"] = torch.full((32,), 1.5)
    save_file(tensors, file, metadata={"format": "pt"})
    what = ("model.layers.1.input_layernorm", "weights of the base model in the adapter's file")
    with opened(source, adapter) as on_source:
        assert on_source.not_carried == (what,)
    assert read_holdings(adapter).not_carried == [{"module": what[0], "what": what[1]}]


# inspect


SHOWN = {
    "DoRA": (lora(use_dora=True), ["use_dora", "approximated by rank 16"]),
    "rsLoRA with patterns": (lora(use_rslora=True, rank_pattern={"q_proj": 2}), ["use_rslora", "rank_pattern"]),
    "head in full": (lora(modules_to_save=["lm_head"]), ["modules_to_save", "lm_head", "not carried"]),
    "biases": (lora(lora_bias=True), ["lora_bias", "trained bias", "not carried"]),
    "aLoRA": (lora(alora_invocation_tokens=[5, 6]), ["[5, 6]", "invocation tokens"]),
    "LoRA on embeddings": (lora(target_modules=["q_proj", "embed_tokens"]), ["adapter on an Embedding"]),
    "another task": (lora(task_type="TOKEN_CLS"), ["TOKEN_CLS", "cannot be a source"]),
    "IA3": (APPROXIMATED["IA3"], ["IA3 on 6 linear layers", "approximated"]),
    "LN tuning": (peft.LNTuningConfig(target_modules=["norm"]), ["LN_TUNING", "changes no linear layer"]),
    "AdaLoRA": (EXACT["AdaLoRA"][0], ["ADALORA", "init_r=6", "carried exactly (rank 6)"]),
    "of an unlisted kind": (peft.RoadConfig(group_size=4, target_modules=FEW), ["ROAD on 6", "else approximated"]),
}


@pytest.mark.parametrize("case", SHOWN)
def test_inspect_shows_all_that_an_adapter_holds(case, tmp_path):
    config, words = SHOWN[case]
    if config.task_type == "TOKEN_CLS":
        make_lora(tiny_model("llama", 300), tmp_path)
        edit(tmp_path, task_type="TOKEN_CLS")
    else:
        save_adapter(tiny_model("llama", 300), config, tmp_path)
    account = inspect(tmp_path)
    text = describe(account)
    assert [word for word in words if word not in text] == []
    assert json.loads(json.dumps(account))["holdings"]["verbs"].keys() == set(VERBS)


@pytest.mark.parametrize("config", [lora(), lora(modules_to_save=["lm_head"]), APPROXIMATED["IA3"]])
def test_inspect_says_that_only_a_pickle_is_there(config, tmp_path):
    save_adapter(tiny_model("llama", 300), config, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    account = inspect(tmp_path)
    assert account["weights_file"] == "adapter_model.bin"
    assert "cannot be a source: it has only pickled weights (adapter_model.bin)" in describe(account)
    (tmp_path / "adapter_model.bin").unlink()
    assert "it has no adapter_model.safetensors" in describe(inspect(tmp_path))


@pytest.mark.parametrize("kind", ["KIND_OF_2031", "MEGALORA"])
def test_inspect_of_a_kind_that_peft_does_not_know(kind, tmp_path):
    make_lora(tiny_model("llama", 300), tmp_path)
    edit(tmp_path, peft_type=kind, a_new_option={"x": 1})
    text = describe(inspect(tmp_path))
    assert text.startswith(kind) and "a_new_option={'x': 1}" in text and "update PEFT" in text


def test_inspect_of_several_adapters_in_a_folder(tmp_path):
    model = get_peft_model(tiny_model("llama", 300), lora(), adapter_name="first")
    model.add_adapter("second", lora(use_dora=True))
    model.save_pretrained(tmp_path / "named")
    text = describe(inspect(tmp_path / "named"))
    assert text.startswith("2 adapters in subfolders") and "first:" in text and "use_dora" in text
    model.add_adapter("default", lora(r=2))
    model.save_pretrained(tmp_path / "both")
    assert "more adapters in the subfolders first, second" in describe(inspect(tmp_path / "both"))


def test_inspect_of_a_lora_folded_from_an_adapter_without_metrics(tmp_path, byte_tokenizer):
    model = tiny_model("llama", len(byte_tokenizer))
    adapted = get_peft_model(model, peft_cast.CastConfig(r=4, target_modules=FEW, init_weights=False))
    peft_cast.to_lora(adapted).save_pretrained(tmp_path)
    assert "LORA for" in describe(inspect(tmp_path))
    assert PeftModel.from_pretrained(tiny_model("llama", len(byte_tokenizer)), tmp_path)
