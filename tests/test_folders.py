"""What people's folders really hold: what a folder says besides its weights is read early, and read right."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from conftest import c4_texts, make_lora, save_model, tiny_model
from peft import AdaLoraConfig, FourierFTConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import call
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast

import peft_cast
from peft_cast.cli.inspect import describe, inspect
from peft_cast.models import check_positions, continuations, load_model, skeleton_of
from peft_cast.source.files import check_is_read
from peft_cast.source.pair import open_pair


TEXTS = c4_texts(30)
QUICK = {"text": TEXTS, "steps": 0, "fit_samples": 12, "eval_samples": 3, "max_length": 48, "progress": False}
QUICK |= {"report_similarity": False, "report_samples": 0}
IDS = torch.arange(5, 25)[None]
NEXT = peft_cast.AnswerLikelihood("next", [{"q": "one two", "a": " three"}], "{q}", "{a}")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def edited(folder, to, **values) -> str:
    """A copy of an adapter's folder with other values in its configuration, without those that are `...`."""
    shutil.copytree(folder, to)
    file = Path(to) / "adapter_config.json"
    values = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    return str(to)


def refused(work, *words) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        work()
    sentence = str(error.value)
    assert all(word in sentence for word in words), sentence
    return sentence


@pytest.mark.parametrize("given", [5, None, "", "./no/where"])
def test_what_is_no_name_is_refused_by_its_type(given):
    refused(lambda: inspect(given), "The adapter could not be read", "pass a hub id or a folder")


@pytest.mark.parametrize(
    ("given", "words"), [("", "its name is empty: pass a hub id"), ({"a": "b"}, "type dict is no name of one: pass")]
)
def test_no_name_and_several_are_told_by_every_verb(given, words, source_folder, target_folder, tmp_path):
    refused(lambda: peft_cast.translate(source_folder, given, target_folder, **QUICK), words)
    refused(lambda: peft_cast.plan(source_folder, given, target_folder), words)
    refused(lambda: peft_cast.probe(source_folder, given), words)
    refused(lambda: inspect(given), words)
    if given:
        refused(lambda: inspect([given]), "and to `translate` several as a list, with names as `adapter_name=[...]`")
    else:
        refused(lambda: peft_cast.evaluate(target_folder, {"a": given}, [NEXT]), words)
        assert words in call("translate", source_folder, given, target_folder, "-o", tmp_path / "out", code=1).stderr


def test_a_peft_model_is_translated_from_its_own_model(source_folder, lora_folder, target_folder):
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), lora_folder)

    def translated(source):
        return peft_cast.translate(source, adapter, target_folder, **QUICK)

    refused(lambda: translated(target_folder), "which is not `source`", "`source=None`")
    assert translated(source_folder).metrics["kl"]
    adapter.load_adapter(lora_folder, "more")
    adapter.base_model.set_adapter(["default", "more"])
    refused(lambda: translated(None), "Exactly one adapter", "`set_adapter`")


def test_an_adapter_of_another_model_is_refused_before_a_model_is_loaded(
    source_folder, target_folder, lora_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    for work in (peft_cast.translate, peft_cast.baselines.direct_copy, peft_cast.baselines.distill_lora):
        refused(lambda: work(target_folder, lora_folder, target_folder), "does not fit the source model")
    loha = tmp_path / "loha"
    get_peft_model(tiny_model(), LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)).save_pretrained(loha)
    wrong = edited(loha, tmp_path / "wrong", r=3)
    refused(lambda: peft_cast.translate(source_folder, wrong, target_folder, **QUICK), "would be (32, 3): correct `r`")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth_map": {0: 9}}, "sends source layer 0 to target layer 9"),
        ({"depth_map": {-1: 0}}, "sends source layer -1 to target layer 0"),
        ({"module_map": {"q_proj": "foo"}}, "sends kernels to 'foo', which no layer of the target has"),
        ({"module_map": {"foo": "q_proj"}}, "speaks of 'foo', which no layer of the source has"),
        ({"first_maps": "copy"}, "and these have others: leave `first_maps` out"),
    ],
)
def test_maps_that_do_not_fit_the_models_are_told_before_a_model_is_loaded(
    options, words, source_folder, target_folder, lora_folder, tmp_path
):
    loaded, (name, value) = AutoModelForCausalLM.from_pretrained(source_folder), next(iter(options.items()))
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    command = ["translate", source_folder, lora_folder, target_folder, "-o", tmp_path / "out"]
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        for source in (source_folder, loaded):
            refused(lambda: peft_cast.translate(source, lora_folder, target_folder, **QUICK, **options), words)
        said = call(*command, "--text", tmp_path / "text.txt", "--set", f"{name}={value}", code=1).output
    assert loads.call_count == 0 and words.split(",")[0] in said and "goes on all the same" not in said


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        ("meta-llama/Llama-3-8B", None),
        ("meta-llama/Llama-3-8B", "meta-llama/Llama-3-8B-Instruct"),
        ("meta-llama/Llama-3-8B", "/home/me/llama-3-8b"),
        ("user/Tiny-Llama", None),
        ("/gone/model", None),
        ("", None),
        (None, None),
    ],
)
def test_an_adapter_that_names_another_model_of_equal_shapes_is_warned_of(
    base, kept, source_folder, lora_folder, tmp_path
):
    adapter = edited(lora_folder, tmp_path / "a", base_model_name_or_path=base)
    model = folder_of(source_folder, tmp_path / "tiny-llama", settings(**({"_name_or_path": kept} if kept else {})))
    few = {"steps": 1, "batch_size": 2, "max_length": 8, "fit_samples": 4, "gamma": 0.0}
    for which, work in {
        "source": lambda: peft_cast.plan(model, adapter, model, **few),
        "target": lambda: peft_cast.evaluate(model, {"a": adapter}, [], drift_text=TEXTS[:1], progress=False),
    }.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            work()
        words = [str(one.message) for one in said if "if that is no copy of it" in str(one.message)]
        assert len(words) == (base == "meta-llama/Llama-3-8B" and kept != "/home/me/llama-3-8b")
        assert all(f"it was trained on '{base}', pass that as `{which}`" in one for one in words)


@pytest.mark.parametrize("argument", ["source_revision", "adapter_revision", "target_revision"])
def test_a_revision_of_a_folder_is_refused(argument, source_folder, lora_folder, target_folder, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    given, revision = (source_folder, lora_folder, target_folder), {argument: "v2"}
    works = [lambda: peft_cast.translate(*given, **revision, **QUICK), lambda: peft_cast.plan(*given, **revision)]
    works += [lambda: peft_cast.baselines.direct_copy(*given, **revision)]
    if argument == "adapter_revision":
        works += [lambda: peft_cast.to_lora(lora_folder, revision="v2"), lambda: inspect(lora_folder, "v2")]
        works += [lambda: peft_cast.Bridge.from_pretrained(lora_folder, revision="v2")]
    else:
        works += [lambda: peft_cast.fit_bridge(source_folder, target_folder, text=TEXTS, **revision)]
    if argument == "target_revision":
        works += [lambda: peft_cast.evaluate(target_folder, {}, [NEXT], **revision)]
    for work in works:
        refused(work, "is a folder", "'v2'", "hub ids", "leave it out")


@pytest.fixture
def both(target_folder, lora_folder, tmp_path):
    """A folder with a model and an adapter in it."""
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    folder = Path(shutil.copytree(target_folder, tmp_path / "both"))
    other = make_lora(model, tmp_path / "other", seed=9)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(other) / name, folder)
    return str(folder)


def test_a_target_folder_with_an_adapter_is_used_without_it(both, source_folder, lora_folder, target_folder, tmp_path):
    with pytest.warns(UserWarning, match="holds an adapter too: the model is used without it"):
        result = peft_cast.translate(source_folder, lora_folder, both, **QUICK)
    alone = peft_cast.translate(source_folder, lora_folder, target_folder, **QUICK)
    torch.testing.assert_close(logits(result.model), logits(alone.model))
    assert result.model.active_peft_config.base_model_name_or_path == both


def test_so_is_a_source_folder_and_one_that_is_evaluated(both, target_folder, tmp_path):
    lora = make_lora(AutoModelForCausalLM.from_pretrained(target_folder), tmp_path / "lora")
    with (
        pytest.warns(UserWarning, match="The folder of the source model"),
        open_pair(both, lora, target_folder) as pair,
    ):
        with pair.adapted.disable_adapter():
            plain = logits(pair.source)
    torch.testing.assert_close(plain, logits(AutoModelForCausalLM.from_pretrained(target_folder).eval()))
    with pytest.warns(UserWarning, match="holds an adapter too"):
        measured = peft_cast.evaluate(both, {}, [NEXT], progress=False).rows[0].scores
    assert measured == peft_cast.evaluate(target_folder, {}, [NEXT], progress=False).rows[0].scores


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def chat(lora_folder, byte_tokenizer, tmp_path):
    """An adapter whose folder brings a tokenizer with a chat template."""
    folder = shutil.copytree(lora_folder, tmp_path / "chat")
    own = copy.deepcopy(byte_tokenizer)
    own.chat_template = TEMPLATE
    own.save_pretrained(folder)
    return Path(folder)


def test_the_adapters_tokenizer_and_template_count(chat, source_folder, lora_folder, target_folder):
    with open_pair(source_folder, str(chat), target_folder) as pair:
        assert pair.tokenizers[0].chat_template == TEMPLATE
    with open_pair(source_folder, lora_folder, target_folder) as pair:
        assert pair.tokenizers[0].chat_template is None


def test_the_users_tokenizer_goes_before_the_adapters(chat, source_folder, target_folder):
    given = peft_cast.Pairing(source_tokenizer=source_folder)
    with open_pair(source_folder, str(chat), target_folder, given) as pair:
        assert pair.tokenizers[0].chat_template is None


def test_a_tokenizer_with_more_tokens_than_the_model_is_left_alone_and_said(
    chat, source_folder, target_folder, byte_tokenizer
):
    own = copy.deepcopy(byte_tokenizer)
    own.add_tokens([f"<new{i}>" for i in range(40)])
    own.save_pretrained(chat)
    with pytest.warns(UserWarning, match="has tokens up to number .* the source model's own is used"):
        with open_pair(source_folder, str(chat), target_folder) as pair:
            assert len(pair.tokenizers[0]) < len(own)


def test_a_broken_tokenizer_of_an_adapter_is_a_warning(chat, source_folder, target_folder):
    (chat / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match="could not be loaded, the source model's own is used"):
        with open_pair(source_folder, str(chat), target_folder) as pair:
            assert pair.tokenizers[0].chat_template is None


def test_the_revision_of_the_base_in_the_adapters_configuration_is_the_one_loaded(
    hub, source_folder, lora_folder, target_folder, tmp_path
):
    refs = hub.add("someone/base", source_folder).refs
    refs["v2"] = refs["v3"] = refs["main"]
    adapter = edited(lora_folder, tmp_path / "a", base_model_name_or_path="someone/base", revision="v2")
    target = "transformers.AutoModelForCausalLM.from_pretrained"
    with mock.patch(target, side_effect=OSError("stop")) as asked:
        refused(lambda: peft_cast.translate(None, adapter, target_folder, **QUICK), "stop")
        assert asked.call_args.kwargs["revision"] == "v2"
        refused(lambda: peft_cast.translate(None, adapter, target_folder, source_revision="v3", **QUICK), "stop")
        assert asked.call_args.kwargs["revision"] == "v3"
    with mock.patch("transformers.AutoConfig.from_pretrained", side_effect=OSError("stop")) as asked:
        refused(lambda: peft_cast.plan(None, adapter, target_folder), "stop")
        assert asked.call_args.kwargs["revision"] == "v2"
    gone = edited(adapter, tmp_path / "gone", revision="gone")
    for verb in (peft_cast.translate, peft_cast.plan):
        refused(
            lambda: verb(None, gone, target_folder),
            "no revision 'gone'",
            f"named in the adapter_config.json of '{gone}'",
        )


@pytest.mark.parametrize("verb", ["translate", "plan"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", ["does not say which model it was trained on", "`source`"]),
        (None, ["does not say which model it was trained on", "`source`"]),
        ("/home/somebody/llama", ["names its model '/home/somebody/llama'", "no folder", "`source`"]),
        ("./outputs/base", ["there is no folder './outputs/base'", "`source`"]),
    ],
)
def test_an_adapter_that_names_no_model_that_is_here_says_so(verb, name, words, lora_folder, target_folder, tmp_path):
    adapter = edited(lora_folder, tmp_path / "a", base_model_name_or_path=name)
    refused(lambda: getattr(peft_cast, verb)(None, adapter, target_folder), *words)


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def vision_models():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    seeing = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    yield (
        "qwen2.5-vl",
        transformers.Qwen2_5_VLConfig(
            text_config={**SIZES, "rope_parameters": rope},
            image_token_id=290,
            video_token_id=291,
            vision_start_token_id=292,
            vision_end_token_id=293,
            vision_config={**seeing, "patch_size": 4, "in_channels": 3, "fullatt_block_indexes": [0]},
        ),
    )
    clip = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    yield (
        "llava",
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**SIZES),
            image_token_index=290,
            vision_config=transformers.CLIPVisionConfig(**clip, image_size=16, patch_size=4),
        ),
    )


@pytest.fixture(scope="module", params=["qwen2.5-vl", "llava"])
def vision(request, byte_tokenizer, tmp_path_factory):
    """The folder of a vision-language model that AutoModelForCausalLM does not know."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(dict(vision_models())[request.param])
    return save_model(model, byte_tokenizer, tmp_path_factory.mktemp("vision") / request.param)


def test_vision_language_models_are_sources_and_targets_by_folder(
    vision, source_folder, lora_folder, target_folder, tmp_path
):
    model = AutoModelForImageTextToText.from_pretrained(vision)
    lora = make_lora(model, tmp_path / "lora", r".*language_model.*\.(q_proj|down_proj)")
    assert peft_cast.plan(vision, lora, target_folder, steps=1).parameters["trained"] > 0
    result = peft_cast.translate(vision, lora, target_folder, **QUICK)
    assert len(result.metrics["alignment"]["unmapped"]) == 0
    onto = peft_cast.translate(source_folder, lora_folder, vision, **QUICK)
    onto.save_pretrained(tmp_path / "onto")
    folded = peft_cast.to_lora(tmp_path / "onto")
    assert folded.weights and all("language_model" in name for name in folded.weights)


def test_what_is_no_decoder_is_refused_by_name(source_folder, lora_folder, target_folder, byte_tokenizer, tmp_path):
    t5 = transformers.T5Config(vocab_size=300, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
    bert = transformers.BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    models = {
        "t5": transformers.T5ForConditionalGeneration(t5),
        "vit": transformers.ViTModel(
            transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        ),
    }
    assert bert.model_type == "bert"
    for kind, model in models.items():
        folder = save_model(model, byte_tokenizer, tmp_path / kind)
        with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
            for models_given in ((folder, lora_folder, target_folder), (source_folder, lora_folder, folder)):
                sentence = refused(lambda: peft_cast.translate(*models_given, **QUICK), f"'{kind}'", "decoder")
                assert len(sentence) < 300
        assert loads.call_count == 0
        refused(lambda: peft_cast.plan(folder, lora_folder, target_folder), "decoder")


def test_a_head_whose_precision_a_model_looks_up_can_be_cut(source_folder, lora_folder, byte_tokenizer, tmp_path):
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, state_size=4, num_hidden_layers=2)
    target = save_model(AutoModelForCausalLM.from_config(config), byte_tokenizer, tmp_path / "mamba")
    lora = make_lora(AutoModelForCausalLM.from_pretrained(target), tmp_path / "lora", ["in_proj", "x_proj"])
    options = {**QUICK, "steps": 1, "batch_size": 4, "first_maps": "closed_form", "enough": 1}
    result = peft_cast.translate(target, lora, target, module_map=None, **options)
    assert result.metrics["refinement"]["steps"] == 1


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq"])
def test_a_quantized_base_whose_package_is_missing_names_the_remedy(
    method, source_folder, lora_folder, target_folder, tmp_path
):
    settings = {"bitsandbytes": {"load_in_4bit": True}, "gptq": {"bits": 4, "group_size": 128}, "awq": {"bits": 4}}
    folder = Path(shutil.copytree(source_folder, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings[method]}
    (folder / "config.json").write_text(json.dumps(config))
    refused(
        lambda: peft_cast.translate(str(folder), lora_folder, target_folder, **QUICK),
        str(folder),
        "quantized",
        "unquantized model as `source`",
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task_type": "SEQ_CLS"}, ["SEQ_CLS"]),
        ({"lora_alpha": "16"}, ["`lora_alpha`"]),
        ({"rank_pattern": None}, ["`rank_pattern`", "write {}"]),
        ({"megatron_config": {"tensor_model_parallel_size": 2}}, ["`megatron_config`", "null"]),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, ["virtual tokens"]),
        ({"r": -1}, ["`r`"]),
        ({"init_lora_weights": "corda"}, ["corda"]),
        ({"init_lora_weights": "loftq"}, ["initialization (loftq) changed"]),
        ({"init_lora_weights": "best"}, ["'best'", "correct `init_lora_weights` in adapter_config.json"]),
        ({"bias": "some"}, ["`bias`", "'some'", "correct adapter_config.json"]),
        ({"bias": None}, ["`bias`", "None", "correct adapter_config.json"]),
        (
            {"bias": "foo_only"},
            ["`bias` must be 'none', 'all' or 'lora_only', got 'foo_only': correct adapter_config"],
        ),
        ({"peft_type": "C3A", "init_weights": "odd"}, ["`peft_type` is 'C3A', and the file is a LoRA's"]),
        ({"r": ...}, ["names no rank, for which PEFT takes 8, and", "has 4: add `r` to adapter_config.json"]),
        ({"lora_dropout": 2.0}, ["`lora_dropout` must be a number from 0 to 1, got 2.0"]),
        ({"task_type": "causal_lm"}, ["`task_type` must be CAUSAL_LM", "'causal_lm'"]),
        ({"layer_replication": 5}, ["`layer_replication` must be a list of lists of 2 integers or null, got 5"]),
        ({"target_modules": None}, ["correct `target_modules`, the file has 'down_proj'"]),
        ({"arrow_config": {"top_k": 1}}, ["PEFT could not put it there", "correct `arrow_config` (ArrowConfig("]),
        ({"lora_alpha": 0}, ["changes nothing", "`lora_alpha`"]),
        *(
            ({"peft_type": kind}, [f"`peft_type` is {kind}, and the file is a LoRA's", "Correct `peft_type` in"])
            for kind in ("LOHA", "IA3", "ADALORA")
        ),
        *(
            ({"peft_type": kind}, [f"`peft_type` is '{kind}', and the file is a LoRA's: correct it in"])
            for kind in ("OFT", "ADAPTION_PROMPT")
        ),
        *(
            ({option: value}, [f"`{option}` is set", "Correct it in adapter_config.json"])
            for option, value in (("use_dora", True), ("lora_bias", True), ("trainable_token_indices", [7]))
        ),
    ],
)
def test_what_the_configuration_tells_is_told_before_a_model_is_loaded(
    values, words, source_folder, lora_folder, target_folder, tmp_path
):
    adapter = edited(lora_folder, tmp_path / "a", **values)
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        sentence = refused(lambda: peft_cast.translate(source_folder, adapter, target_folder, **QUICK), *words)
    assert loads.call_count == 0 and "Pass a hub id" not in sentence


@pytest.mark.parametrize("kind", ["XLORA", "ADALORA"])
def test_advice_for_training_is_not_told(kind, source_folder, lora_folder, target_folder, tmp_path):
    unknown = set(json.loads((Path(lora_folder) / "adapter_config.json").read_text())) - {"task_type", "r"}
    folder = edited(lora_folder, tmp_path / "odd", **{**dict.fromkeys(unknown, ...), "peft_type": kind})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(lambda: peft_cast.translate(source_folder, folder, target_folder, **QUICK), kind)


@pytest.mark.parametrize("kind", ["LOHA", "ADALORA"])
def test_a_file_of_another_kind_is_named_everywhere(kind, source_folder, lora_folder, tmp_path):
    """Also where the kind that the configuration names would be refused."""
    wrong = edited(lora_folder, tmp_path / "a", peft_type=kind)
    assert "the file is a LoRA's" in describe(inspect(wrong))
    refused(lambda: peft_cast.evaluate(source_folder, {"a": wrong}, [], drift_text=TEXTS[:2]), "the file is a LoRA's")
    refused(lambda: check_is_read(wrong), "the file is a LoRA's")
    loha = tmp_path / "loha"
    get_peft_model(tiny_model(), LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)).save_pretrained(loha)
    assert "the file is a LOHA's" in describe(inspect(edited(loha, tmp_path / "b", peft_type="LORA")))
    dora = edited(lora_folder, tmp_path / "c", use_dora=True)
    refused(lambda: check_is_read(dora), "`use_dora` is set, and no tensor of its file is for it")


def test_so_are_weights_that_cannot_be_read(source_folder, lora_folder, target_folder, tmp_path):
    pickled, cut = edited(lora_folder, tmp_path / "pickled"), edited(lora_folder, tmp_path / "cut")
    file = Path(pickled) / "adapter_model.safetensors"
    torch.save(load_file(file), Path(pickled) / "adapter_model.bin")
    file.unlink()
    file = Path(cut) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        refused(lambda: peft_cast.translate(source_folder, pickled, target_folder, **QUICK), "safetensors")
        refused(lambda: peft_cast.translate(source_folder, cut, target_folder, **QUICK), "is broken", "get it again")
    assert loads.call_count == 0


def test_an_adapter_that_was_never_trained_is_said_to_do_nothing(source_folder, target_folder, tmp_path):
    for name, options in (("lora", {}), ("rslora", {"use_rslora": True}), ("attention", {"layers_to_transform": [0]})):
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        get_peft_model(AutoModelForCausalLM.from_pretrained(source_folder), config).save_pretrained(tmp_path / name)
        with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
            refused(
                lambda: peft_cast.translate(source_folder, tmp_path / name, target_folder, **QUICK),
                "changes nothing",
                "Pass one that was trained",
            )
        assert loads.call_count == 0
        assert "cannot be a source: it changes nothing" in describe(inspect(tmp_path / name))


def test_numbers_that_a_configuration_does_not_name_are_said(source_folder, lora_folder, target_folder, tmp_path):
    adapter, loha = edited(lora_folder, tmp_path / "a", lora_alpha=...), tmp_path / "loha"
    assert "lora_alpha=8 (PEFT's default, adapter_config.json names none)" in describe(inspect(adapter))
    without_r = describe(inspect(edited(lora_folder, tmp_path / "r", r=...)))
    assert "cannot be a source: it has a configuration that names no rank, for which PEFT takes 8, and" in without_r
    with pytest.warns(UserWarning, match="names no `lora_alpha`: PEFT's default, 8, is taken. Add it"):
        peft_cast.plan(source_folder, adapter, target_folder, steps=1, batch_size=2, max_length=8, fit_samples=4)
    get_peft_model(tiny_model(), LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False)).save_pretrained(loha)
    config = FourierFTConfig(n_frequency=6, target_modules=["q_proj"], init_weights=False)
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "fourier")
    adapter = edited(tmp_path / "fourier", tmp_path / "f", scaling=...)
    with pytest.warns(UserWarning, match="names no `scaling`: PEFT's default, 150.0, is taken. Add it"):
        peft_cast.plan(source_folder, adapter, target_folder, steps=1, batch_size=2, max_length=8, fit_samples=4)
    words = ["by PEFT's default of `r`, which adapter_config.json does not name, its shape would be (32, 8): add `r`"]
    adapter = edited(loha, tmp_path / "b", r=...)
    refused(lambda: peft_cast.translate(source_folder, adapter, target_folder, **QUICK), *words)


INSTEAD = {
    "UTF-16": (lambda text: text.encode("utf-16"), "is no plain UTF-8: save it as UTF-8 without a byte order mark"),
    "no mark": (lambda text: text.encode("utf-16-le"), "is no plain UTF-8: save it as UTF-8"),
    "a mark": (lambda text: text.encode("utf-8-sig"), "is no plain UTF-8: save it as UTF-8"),
    "Git LFS": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`, or download it"),
    "a page": (lambda _: b"<!DOCTYPE html>\n<html>", "is a web page, not the file itself: download the file"),
    "nothing": (lambda _: b"\n", "is empty: get it again"),
}


@pytest.mark.parametrize("kind", INSTEAD)
def test_configurations_that_are_something_else_are_called_so(
    kind, source_folder, lora_folder, target_folder, tmp_path
):
    change, message = INSTEAD[kind]
    given = [
        source_folder,
        *(shutil.copytree(folder, tmp_path / folder[-4:]) for folder in (lora_folder, target_folder)),
    ]
    for number, name in ((2, "config.json"), (1, "adapter_config.json")):
        file = given[number] / name
        text = file.read_text()
        file.write_bytes(change(text))
        for verb in (peft_cast.translate, peft_cast.baselines.direct_copy, peft_cast.plan):
            options = QUICK if verb == peft_cast.translate else {}
            assert refused(lambda: verb(*map(str, given), **options), name, message).endswith(".")
        if number == 1:
            refused(lambda: inspect(given[1]), message)
        file.write_text(text)


def test_one_tensor_that_does_not_fit_is_named(source_folder, lora_folder, target_folder, tmp_path):
    root, words = "base_model.model.model.", ["delete it from the file, if the adapter does not need it, else get the"]
    for name, said in {
        "layers.0.self_attn.foo.lora_A.weight": "has no module for it, while 42 others have theirs: ",
        "norm.weight": "(LlamaForCausalLM) has (32,) there: ",
    }.items():
        adapter = Path(shutil.copytree(lora_folder, tmp_path / name))
        file = adapter / "adapter_model.safetensors"
        save_file(load_file(file) | {root + name: torch.ones(4, 32)}, file, metadata={"format": "pt"})
        for work in (peft_cast.translate, peft_cast.plan, peft_cast.baselines.direct_copy):
            refused(
                lambda: work(source_folder, adapter, target_folder), f"'{root}{name}' of shape (4, 32)", said, *words
            )


WEIGHTS = {
    "parts": (lambda file: file.rename(file.with_name("adapter_model-00001-of-00002.safetensors")), "in parts"),
    "MLX's": (lambda file: file.rename(file.with_name("adapters.safetensors")), "but 'adapters.safetensors'"),
    "a link": (lambda file: (file.unlink(), file.symlink_to("/no/where")), "to '/no/where', which is not there"),
    "none": (lambda file: file.unlink(), "has no adapter_model.safetensors: get the whole folder"),
    "Git LFS": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "`git lfs pull`"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_there_are_told_apart(kind, source_folder, lora_folder, target_folder, tmp_path):
    change, message = WEIGHTS[kind]
    adapter = edited(lora_folder, tmp_path / "a")
    change(Path(adapter) / "adapter_model.safetensors")
    sentence = refused(lambda: peft_cast.translate(source_folder, adapter, target_folder, **QUICK), message)
    assert "pickled" not in sentence
    if kind != "Git LFS":
        assert message in describe(inspect(adapter))


@pytest.mark.parametrize(
    ("values", "tool"),
    [({"fine_tune_type": "lora"}, "MLX"), ({"model_class": "A"}, "AdapterHub"), ({}, "another tool")],
)
def test_configurations_of_other_tools_are_called_so(values, tool, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    refused(lambda: inspect(tmp_path), f"has no `peft_type`, so it is of {tool}, not of PEFT: convert it")


def test_adalora_without_the_length_of_its_training_is_read(source_folder, target_folder, tmp_path):
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["q_proj", "down_proj"], total_step=9, init_r=6, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source_folder), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "ada")
    for i, step in enumerate((None, 0)):
        adapter = edited(tmp_path / "ada", tmp_path / f"ada{i}", total_step=step)
        assert (
            peft_cast.translate(source_folder, adapter, target_folder, **QUICK).metrics["source"]["type"] == "ADALORA"
        )
        assert inspect(adapter)["kind"] == "ADALORA"


@pytest.mark.parametrize("task_type", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", None])
def test_a_wrong_task_type_on_a_decoder_is_read_as_what_it_is(
    task_type, source_folder, lora_folder, target_folder, tmp_path
):
    adapter = edited(lora_folder, tmp_path / "a", task_type=task_type)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = peft_cast.translate(source_folder, adapter, target_folder, **QUICK)
    right = peft_cast.translate(source_folder, lora_folder, target_folder, **QUICK)
    torch.testing.assert_close(logits(result.model), logits(right.model))
    assert any("read as CAUSAL_LM" in str(one.message) for one in said) == (task_type is not None)


def test_an_adapter_of_another_source_in_a_list_is_translated_by_itself(
    source_folder, lora_folder, target_folder, tmp_path
):
    other = make_lora(AutoModelForCausalLM.from_pretrained(target_folder), tmp_path / "other")
    foreign = edited(other, tmp_path / "foreign", base_model_name_or_path=target_folder)
    said = "pass that as `source`, with it alone: adapters in a list are all on one source"
    refused(
        lambda: peft_cast.translate(source_folder, [lora_folder, foreign], target_folder, **QUICK), "foreign", said
    )


def test_an_adapter_in_a_subfolder_of_a_repository_is_found(hub, source_folder, lora_folder, target_folder, tmp_path):
    shutil.copytree(lora_folder, tmp_path / "repo" / "checkpoint-500")
    shutil.copytree(lora_folder, tmp_path / "repo" / "library" / "math")
    hub.add("user/loras", str(tmp_path / "repo"))
    plain = peft_cast.translate(source_folder, lora_folder, target_folder, **QUICK)
    for name in ("user/loras/checkpoint-500", "user/loras/library/math"):
        result = peft_cast.translate(source_folder, name, target_folder, **QUICK)
        torch.testing.assert_close(logits(result.model), logits(plain.model))
        assert result.model.active_peft_config.source_adapter_name_or_path == name
        assert inspect(name)["rank"] == 4 and peft_cast.plan(source_folder, name, target_folder, steps=1).seconds > 0
    refused(
        lambda: peft_cast.translate(source_folder, "user/loras/nothing", target_folder, **QUICK),
        "is no folder of the repository 'user/loras' on the Hub",
        "pass 'user/loras/checkpoint-500' or 'user/loras/library/math'",
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"source": "someone/base"}, ["The source model 'someone/base'", "with config.json"]),
        ({"target": "someone/base"}, ["The target model 'someone/base'", "with config.json"]),
        ({"adapter": "someone/lora"}, ["The adapter 'someone/lora'", "with adapter_config.json"]),
        ({"adapter": "someone/lora/step-5"}, ["subfolder 'step-5' of the repository 'someone/lora'"]),
        ({"start": "someone/cast"}, ["The adapter to start from 'someone/cast'", "with adapter_config.json"]),
        ({"bridge": "someone/bridge"}, ["The bridge 'someone/bridge'", "with bridge_config.json"]),
        ({"source_tokenizer": "someone/base"}, ["`source_tokenizer`, 'someone/base',", "tokenizer_config.json"]),
    ],
)
def test_what_is_out_of_reach_is_told_in_one_way_before_a_model_is_loaded(
    given, words, source_folder, lora_folder, target_folder
):
    both = {"source": source_folder, "adapter": lora_folder, "target": target_folder, **given}
    works = [lambda: peft_cast.translate(**both, **QUICK)]
    if "source_tokenizer" not in given:
        works += [lambda: peft_cast.plan(**both)]
    if "target" in given or "someone/lora" in given.values():
        adapters = {"a": both["adapter"]}
        works += [lambda: peft_cast.evaluate(both["target"], adapters, [NEXT], progress=False)]
    plain = AutoModelForCausalLM.from_pretrained
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained", side_effect=plain) as loads:
        for work in works:
            said = "could not be reached: HF_HUB_OFFLINE is set, and it was not fetched before, so unset that, or pass"
            refused(work, said, *words)
    assert loads.call_count == ("source" in given)  # which is loaded first


def test_an_adapter_that_was_merged_and_unloaded_is_said_to_be_gone(source_folder, lora_folder, target_folder):
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), lora_folder)
    adapter.merge_and_unload()
    refused(lambda: peft_cast.translate(None, adapter, target_folder, **QUICK), "no longer on its model", "its folder")


def test_a_merged_adapter_in_memory_comes_back_merged(source_folder, lora_folder, target_folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), lora_folder).eval()
    plain = peft_cast.translate(None, model, target_folder, source_tokenizer=source_folder, **QUICK)
    model.merge_adapter()
    before = logits(model)
    result = peft_cast.translate(None, model, target_folder, source_tokenizer=source_folder, **QUICK)
    torch.testing.assert_close(logits(result.model), logits(plain.model), rtol=1e-3, atol=1e-4)
    assert all(m.merged for m in model.modules() if hasattr(m, "lora_A"))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_a_model_given_as_adapter_gets_its_own_sentence(source_folder, target_folder):
    model = AutoModelForCausalLM.from_pretrained(source_folder)
    for verb in (peft_cast.translate, peft_cast.baselines.direct_copy):
        refused(
            lambda: verb(source_folder, model, target_folder), "`adapter` is a model (LlamaForCausalLM)", "PeftModel"
        )


def test_weights_that_are_missing_are_not_made_up(source_folder, lora_folder, target_folder, tmp_path):
    folder = shutil.copytree(target_folder, tmp_path / "cut")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.0.mlp" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        lambda: peft_cast.translate(source_folder, lora_folder, folder, **QUICK), "lacks the weights", "layers.0.mlp"
    )
    other = {f"module.{name}": value for name, value in weights.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: peft_cast.translate(source_folder, lora_folder, folder, **QUICK), "its file has 'module.")


EXTRA = {
    "foo": "loaded without 1 tensor of its file ('foo'), for which Gemma3ForCausalLM has no place",
    "model.layers.2.mlp.up_proj.weight": "loaded without 1 tensor",
    "mtp.layers.0.norm.weight": None,
    "vision_tower.encoder.layers.0.norm.weight": None,
    "model.layers.0.self_attn.rotary_emb.inv_freq": None,
    "lm_head.weight": None,
}


@pytest.mark.parametrize("name", EXTRA)
def test_tensors_that_a_model_is_loaded_without_are_told_once(name, target_folder, tmp_path):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        extra = weights["model.embed_tokens.weight"].clone() if name == "lm_head.weight" else torch.ones(2)
        save_file({**weights, name: extra}, folder / "model.safetensors", metadata={"format": "pt"})

    folder = folder_of(target_folder, tmp_path / "more", change)
    assert told_without(folder) == ([EXTRA[name]] if EXTRA[name] else [])


def told_without(folder) -> list[str]:
    """What is said of tensors without a place, as far as the rows above go."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_model(folder, "target", torch.device("cpu"))
    words = [str(one.message) for one in said if "loaded without" in str(one.message)]
    assert all(f"The target model '{folder}' is" in one for one in words)
    return [next((row for row in EXTRA.values() if row and row in one), one) for one in words]


def test_a_model_under_the_type_of_another_is_told(target_folder, tmp_path):
    (said,) = told_without(folder_of(target_folder, tmp_path / "llama", settings(model_type="llama")))
    assert "8 tensors of its file ('model.layers.0.post_feedforward_layernorm.weight')" in said
    assert "LlamaForCausalLM has no place" in said and "correct `model_type`" in said


def test_a_model_type_that_is_none_is_told_at_first_sight(hub, source_folder, lora_folder, target_folder, tmp_path):
    hub.add("user/odd", folder_of(source_folder, tmp_path / "odd", settings(model_type="foo")))
    why = "does not know its `model_type`, 'foo': update transformers, or correct it"
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        for odd in (str(tmp_path / "odd"), "user/odd"):
            for work in (peft_cast.translate, peft_cast.plan):
                refused(lambda: work(odd, lora_folder, target_folder), "The source model", why)
                refused(lambda: work(source_folder, lora_folder, odd), "The target model", why)
            refused(lambda: peft_cast.probe(odd, lora_folder, prompts=["a"]), "The source model", why)
            refused(lambda: peft_cast.fit_bridge(odd, target_folder, text=TEXTS), "The source model", why)
            refused(lambda: peft_cast.evaluate(odd, {}, [NEXT]), "The target model", why)
    assert loads.call_count == 0


def test_a_quantization_that_is_passed_over_is_told(target_folder, tmp_path):
    folder = folder_of(target_folder, tmp_path / "odd", settings(quantization_config={"quant_method": "foo"}))
    with pytest.warns(UserWarning, match="does not know the `quant_method` in .*odd', 'foo', and loads") as said:
        load_model(folder, "target", torch.device("cpu"))
    assert len(said) == 1


def test_a_layer_that_predicts_further_tokens_is_not_missed(target_folder, tmp_path):
    def change(folder):
        settings(num_nextn_predict_layers=1)(folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.2.eh_proj.weight"] = torch.ones(2)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    assert told_without(folder_of(target_folder, tmp_path / "more", change)) == []


@pytest.mark.parametrize("verb", [peft_cast.translate, peft_cast.plan])
def test_what_the_hub_lacks_is_told_at_first_sight(hub, verb, source_folder, lora_folder, target_folder):
    for name, folder in (("source", source_folder), ("lora", lora_folder), ("target", target_folder)):
        hub.add(f"user/{name}", folder)
    hub.add("other/hidden", target_folder, private=True)
    models = {"source": "user/source", "adapter": "user/lora", "target": "user/target"}
    for given, *words in (
        ({"target": "user/absent"}, "the Hub has no repository 'user/absent', or a private one", "`hf auth login`"),
        ({"source": "other/hidden"}, "the Hub has no repository 'other/hidden', or a private one"),
        ({"target_revision": "nope"}, "on the Hub 'user/target' has no revision 'nope': correct it"),
        ({"target": "user/lora"}, "it holds an adapter, not a model: pass a hub id or a folder with config.json"),
        ({"adapter": "user/absent"}, "the Hub has no repository 'user/absent', or a private one"),
        ({"adapter_revision": "nope"}, "on the Hub 'user/lora' has no revision 'nope': correct it"),
        ({"bridge": "user/absent"}, "the Hub has no repository 'user/absent', or a private one"),
    ):
        with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
            refused(lambda given=given: verb(**{**models, **given}), *words)
        assert loads.call_count == 0


def test_what_lacks_beside_a_model_on_the_hub_is_told_before_a_model_is_loaded(
    hub, both, source_folder, lora_folder, target_folder, tmp_path
):
    bare = shutil.copytree(target_folder, tmp_path / "bare")
    for file in bare.glob("token*"):
        file.unlink()
    folders = {"source": source_folder, "lora": lora_folder, "target": target_folder, "bare": bare, "both": both}
    for name, folder in folders.items():
        hub.add(f"user/{name}", folder)
    models = {"source": "user/source", "adapter": "user/lora", "target": "user/target"}
    for given, *words in (
        ({"source_tokenizer": "user/absent"}, "`source_tokenizer`, 'user/absent', could not be read", "no repository"),
        ({"target_tokenizer": "user/lora"}, "`target_tokenizer`, 'user/lora', holds no tokenizer: pass another"),
        ({"target": "user/bare"}, "tokenizer of the target model ('user/bare')", "pass `target_tokenizer=`"),
        ({"target": "user/both"}, "The target model 'user/both' is a repository that holds an adapter too"),
    ):
        with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
            refused(lambda given=given: peft_cast.translate(**{**models, **given}, **QUICK), *words)
        assert loads.call_count == 0


@pytest.mark.parametrize("held", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_weights_that_cannot_be_read_are_one_sentence(held, source_folder, lora_folder, target_folder, tmp_path):
    folder = shutil.copytree(target_folder, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(held)
    refused(lambda: peft_cast.translate(source_folder, lora_folder, folder, **QUICK), "target model", "could not be")


def test_models_that_carry_an_adapter_are_left_alone(source_folder, lora_folder, target_folder, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(source_folder)
    source.load_adapter(lora_folder)
    refused(lambda: peft_cast.translate(source, lora_folder, target_folder, **QUICK), "`source` carries an adapter")
    assert source.active_adapters() == ["default"]
    target = AutoModelForCausalLM.from_pretrained(target_folder)
    make_lora(AutoModelForCausalLM.from_pretrained(target_folder), tmp_path / "own")
    target.load_adapter(tmp_path / "own")
    refused(lambda: peft_cast.translate(source_folder, lora_folder, target, **QUICK), "`target` carries an adapter")


def test_adapters_in_memory_where_files_are_read_are_to_be_saved(source_folder, lora_folder, target_folder):
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), lora_folder)
    for given in (adapter, torch.compile(adapter)):
        for work in (lambda: peft_cast.plan(source_folder, given, target_folder), lambda: inspect(given)):
            refused(work, "a PeftModel in memory has no files: save it, with `save_pretrained(folder)`")
    refused(lambda: peft_cast.translate(None, [lora_folder, adapter], target_folder, **QUICK), "save them first")
    refused(lambda: peft_cast.translate(None, [lora_folder, 5], target_folder, **QUICK), "got 5 among them")


@pytest.mark.parametrize("given", [{}, {"a"}, iter("a"), 5, [], LoraConfig()])
def test_what_is_no_adapter_or_model_is_called_by_its_type(given, source_folder, lora_folder, target_folder):
    said = "empty list" if given == [] else type(given).__name__
    sentence = refused(lambda: peft_cast.translate(source_folder, given, target_folder, **QUICK), "adapter", said)
    assert ("several as a list" in sentence) == (type(given) not in (int, list, LoraConfig))
    if given != []:
        refused(lambda: peft_cast.plan(source_folder, given, target_folder), "adapter", said)
    refused(lambda: peft_cast.translate(source_folder, lora_folder, given, **QUICK), "`target` must be", "got")


def test_a_bridge_does_not_write_over_what_it_reads(source_folder, lora_folder, target_folder, tmp_path):
    bridge = peft_cast.fit_bridge(source_folder, target_folder, text=TEXTS, samples=8, max_length=32, progress=False)
    folder = shutil.copytree(lora_folder, tmp_path / "lora")
    refused(lambda: bridge.cast_file(folder, folder), "would be overwritten")
    refused(lambda: bridge.save_pretrained(folder), "holds an adapter of type LORA, which would be overwritten")


def test_names_from_the_users_own_folder_are_found(source_folder, lora_folder, target_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, folder in {"source": source_folder, "lora": lora_folder, "target": target_folder}.items():
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    names = "~/source", Path("~/lora"), "~/target"
    text = {"text": "~/text.txt", "fit_text": peft_cast.Corpus(Path("~/text.txt")), "target_tokenizer": "~/target"}
    assert peft_cast.translate(*names, **{**QUICK, **text}).metrics["text"]["train"] > 0
    assert inspect("~/lora")["rank"] == 4 and peft_cast.evaluate("~/target", {}, [NEXT], progress=False).rows
    refused(lambda: inspect("~/nothing"), "there is no folder '~/nothing'")
    peft_cast.fit_bridge("~/source", "~/target", text=TEXTS, samples=8, max_length=32, progress=False).save_pretrained(
        "~/bridge"
    )
    call("cast", "~/bridge", "~/lora", "-o", "~/cast")
    call("to-lora", "~/cast", "-o", "~/folded")
    assert inspect("~/folded")["rank"] == 8  # two layers on one
    assert "would be overwritten while it is read" in call("to-lora", "~/cast", "-o", "~/cast", code=1).output


def test_what_is_kept_for_further_runs_has_a_folder_of_its_own(source_folder, lora_folder, target_folder, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, said in ((lora_folder, "holds a model or an adapter"), (target_folder, "a folder of its own")):
        for work in (peft_cast.translate, peft_cast.baselines.distill_lora):
            refused(lambda: work(source_folder, lora_folder, target_folder, text=TEXTS, cache_dir=folder), said)
    given = {**QUICK, "cache_dir": tmp_path / "file"}
    refused(lambda: peft_cast.translate(source_folder, lora_folder, target_folder, **given), "it is a file")


def folder_of(model: str, to, change) -> str:
    change(Path(shutil.copytree(model, to)))
    return str(to)


def settings(**values):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def in_shards(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(b"version https://git-lfs")


def in_pickle(held):
    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save(held, folder / "pytorch_model.bin")

    return change


def weights(edit):
    def change(folder):
        file = folder / "model.safetensors"
        save_file(edit(load_file(file)), file, metadata={"format": "pt"})

    return change


def without_mlp(held):
    return {name: value for name, value in held.items() if "layers.0.mlp" not in name}


def in_8_bits(dtype, scale=()):
    name = "model.layers.0.mlp.up_proj.weight"
    return weights(lambda held: held | {name: held[name].to(dtype)} | {f"{name}{end}": torch.ones(1) for end in scale})


def emptied_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def without_vocabulary(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def of_tokenizer(**values):
    def change(folder):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def more_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (written("config.json", "{"), ["could not be loaded", "not a valid JSON", "Correct it"]),
        (written("config.json", '{"model_type": "new"}'), ["does not know its `model_type`, 'new': update"]),
        (written("config.json", "{}"), ["its config.json has no `model_type`, so it is no model's: get it again"]),
        (written("config.json", "[]"), ["its config.json is no model's: get it again"]),
        *(
            (written("generation_config.json", held), ["its generation_config.json holds no object, get it again"])
            for held in ("[1]", "{")
        ),
        (emptied_index, ["its model.safetensors.index.json is broken, get it again"]),
        (
            written("generation_config.json", '{"eos_token_id": "x"}'),
            ["`eos_token_id` in its", "is 'x'", "correct it"],
        ),
        (
            written("generation_config.json", '{"cache_implementation": "foo"}'),
            ["its generation_config.json cannot be used (Invalid `cache_implementation` (foo)", "): correct it."],
        ),
        (settings(model_type=5), ["`model_type` in its config.json is 5, no type's name: correct it"]),
        (settings(attn_implementation="foo"), ["config.json cannot be used", "correct `attn_implementation` ('foo')"]),
        (settings(attn_implementation="flash_attention_2"), ["needs a package that is missing", "load the model"]),
        (settings(quantization_config={}), ["config.json cannot be used", "correct `quantization_config` ({}) in it"]),
        (settings(quantization_config=5), ["config.json cannot be used", "correct `quantization_config` (5) in it"]),
        (
            settings(quantization_config={"quant_method": "gptq", "bits": 4}),
            ["is quantized and the package that loads it is missing", "or pass the unquantized model as `target`"],
        ),
        (settings(tie_word_embeddings=False), ["no 'lm_head.weight'", "`tie_word_embeddings`", "is false: correct"]),
        (settings(intermediate_size=64), ["mlp.down_proj", "(40, 48)", "(40, 64)", "do not belong together"]),
        (weights(without_mlp), ["lacks the weights of 3 tensors ('model.layers.0.mlp.down_proj.weight')"]),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
            ["has 'model-00001-of-00002.safetensors' without the index", "get the whole model"],
        ),
        (in_8_bits(torch.int8), ["'model.layers.0.mlp.up_proj.weight' of the type I8", "no `quantization_config`"]),
        (in_8_bits(torch.float8_e4m3fn, ["_scale_inv"]), ["of the type F8_E4M3", "no `quantization_config`"]),
        (in_pickle([torch.ones(2)]), ["'pytorch_model.bin' is broken, or holds something else than tensors"]),
        (in_pickle({"model": {"a": torch.ones(2)}}), ["'pytorch_model.bin'", "something else than tensors by their"]),
        (in_pickle({"a": Path("b")}), ["'pytorch_model.bin'", "something else than tensors", "as safetensors"]),
        (
            settings(vocab_size="many"),
            ["could not be loaded", "`vocab_size` in its config.json is 'many', a text: correct it."],
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), ["no weights", "get the whole model"]),
        (in_shards, ["'two.safetensors'", "is missing"]),
        (written("model.safetensors", ""), ["model.safetensors", "cut off", "get it again"]),
        (pickled, ["pytorch_model.bin", "cut off", "get it again"]),
        (
            lambda folder: (
                (folder / "tokenizer_config.json").write_text("{}") and (folder / "tokenizer.json").unlink()
            ),
            ["tokenizer", "pass `target_tokenizer=`"],
        ),
        (written("tokenizer.json", "{"), ["cannot be read", "its tokenizer.json is broken, get it again"]),
        (written("tokenizer.json", "version https://git-lfs"), ["its tokenizer.json is a pointer of Git LFS"]),
        (of_tokenizer(eos_token=5), ["correct `eos_token` (5) in its tokenizer_config.json"]),
        (of_tokenizer(chat_template=5), ["correct `chat_template` (5) in its tokenizer_config.json"]),
        (without_vocabulary, ["no vocabulary but its special tokens", "`target_tokenizer"]),
        (more_tokens, ["tokens up to number 420 ('<new>')", "420 rows", "`target_tokenizer`"]),
    ],
)
def test_what_is_wrong_with_a_models_folder_is_told_before_a_model_is_loaded(
    change, words, source_folder, lora_folder, target_folder, tmp_path
):
    target = folder_of(target_folder, tmp_path / "target", change)
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        for adapter in (lora_folder, [lora_folder, shutil.copytree(lora_folder, tmp_path / "other")]):
            refused(lambda: peft_cast.translate(source_folder, adapter, target, **QUICK), "target model", *words)
        refused(lambda: peft_cast.evaluate(target, {}, []), *words)
        refused(lambda: peft_cast.fit_bridge(source_folder, target, text=TEXTS), *words)
    assert loads.call_count == 0


def test_why_too_few_texts_are_usable_is_said(source_folder, lora_folder, target_folder):
    given = {**QUICK, "text": TEXTS[:1] * 9}
    said = "1 usable sample, .*; of 9 texts 0 have too few tokens, and 8 begin as others do: pass more"
    with pytest.raises(ValueError, match=said):
        peft_cast.translate(source_folder, lora_folder, target_folder, **given)


def pickled_whole(folder):
    held = load_file(folder / "model.safetensors")
    in_pickle({name.removeprefix("model."): value for name, value in held.items()})(folder)


no_limit = settings(time_step_limit=[0.0, float("inf")])  # as Falcon-H1 and Nemotron-H say


@pytest.mark.parametrize("change", [in_8_bits(torch.float8_e4m3fn), pickled_whole, no_limit])
def test_folders_that_are_whole_are_loaded(change, target_folder, tmp_path):
    folder = folder_of(target_folder, tmp_path / "other", change)
    assert (
        skeleton_of(folder, "target").num_parameters()
        == load_model(folder, "target", torch.device("cpu")).num_parameters()
    )


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_texts_longer_than_learned_positions_are_told_before_a_model_is_loaded(
    architecture, source_folder, lora_folder, byte_tokenizer, tmp_path
):
    model = tiny_model(architecture, len(byte_tokenizer), max_position_embeddings=32)
    short = save_model(model, byte_tokenizer, tmp_path / "short")
    lora = make_lora(copy.deepcopy(model), tmp_path / "lora", target_modules="all-linear")
    why = "has 32 positions, and `max_length` is 48: pass `max_length=32`"
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        for work in (peft_cast.translate, peft_cast.plan):
            refused(lambda: work(short, lora, source_folder, max_length=48), "The source model", why)
            refused(lambda: work(source_folder, lora_folder, short, max_length=48), "The target model", why)
        refused(lambda: peft_cast.fit_bridge(source_folder, short, max_length=48), "The target model", why)
    assert loads.call_count == 0
    check_positions(model, "target", 32)
    check_positions(tiny_model("llama", max_position_embeddings=32), "target", 48)  # rotary ones go on


def test_a_model_writes_up_to_its_last_learned_position(target_folder, byte_tokenizer, tmp_path):
    model = tiny_model("gpt2", len(byte_tokenizer), max_position_embeddings=64)
    short = save_model(model, byte_tokenizer, tmp_path / "short")
    lora = make_lora(model, tmp_path / "lora", target_modules="all-linear")
    given = {**QUICK, "text": None, "fit_text": TEXTS, "max_length": 32, "report_samples": 1}
    for kind in (peft_cast.SelfWritten, peft_cast.Survey):
        texts = kind(prompts=("Question: what?",), max_new_tokens=100, samples=8)
        result = peft_cast.translate(short, lora, target_folder, **{**given, "text": texts})
        assert result.metrics["text"]["train"] > 0
        texts = kind(prompts=("Question: what? " * 30,))
        with mock.patch("peft_cast.text.written.continuations") as writes:
            refused(
                lambda: peft_cast.translate(short, lora, target_folder, **{**given, "text": texts}),
                "A prompt has",
                "has 64 positions: pass shorter prompts",
            )
        assert writes.call_count == 0
    refused(lambda: peft_cast.probe(short, lora, prompts=["what? " * 64]), "A prompt has", "has 64 positions")


@pytest.mark.parametrize("which", ["source", "target"])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_attention_heads": 0}, ["`num_attention_heads` in its config.json is 0", "correct it"]),
        ({"hidden_act": "foo"}, ["KeyError", "correct `hidden_act` ('foo') in it"]),
        ({"hidden_act": None}, ["correct `hidden_act` (None) in it"]),
        ({"dtype": "foo"}, ["correct `dtype` ('foo') in it"]),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, ["correct `rope_parameters` ({'rope_type': '"]),
        ({"pad_token_id": 999}, ["correct `vocab_size` (300) or `pad_token_id` (999) in it"]),
        ({"vocab_size": 0}, ["`vocab_size` in its config.json is 0", "correct it"]),
        ({"hidden_size": 33}, ["The hidden size (33) is not a multiple", "correct `hidden_size` (33) in it"]),
        ({"num_hidden_layers": 100_000}, ["`num_hidden_layers` in its config.json is 100000", "correct it"]),
        ({"num_hidden_layers": "2"}, ["`num_hidden_layers` in its config.json is '2', a text: correct it."]),
        *(
            ({"num_hidden_layers": n}, [f"`num_hidden_layers` in its config.json is {n}, which is no size"])
            for n in (-1, 0)
        ),
        ({"vocab_size": 10**6}, ["speaks of", "its files have", "get both again"]),
    ],
)
def test_a_setting_with_which_no_model_can_be_built_is_named(
    which, values, words, source_folder, lora_folder, target_folder, tmp_path
):
    odd = folder_of(source_folder, tmp_path / "odd", settings(**values))
    pair = {"source": source_folder, "target": target_folder, which: odd}
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained") as loads:
        for work in (peft_cast.translate, peft_cast.baselines.direct_copy):
            refused(lambda: work(pair["source"], lora_folder, pair["target"]), f"{which} model '{odd}'", *words)
    assert loads.call_count == 0


def test_a_setting_within_a_part_of_a_model_is_named(vision, source_folder, lora_folder, tmp_path):
    odd = Path(shutil.copytree(vision, tmp_path / "odd"))
    config = json.loads((odd / "config.json").read_text())
    for part, name, value, words in (
        ("vision_config", "hidden_act", "foo", "correct `hidden_act` ('foo') of `vision_config` in it"),
        ("text_config", "model_type", "foo", "the `model_type` of its `text_config`, 'foo': update transformers"),
        ("text_config", "num_key_value_heads", 4, "of shape (16"),
        ("text_config", "num_hidden_layers", 3, "layers.2.input_layernorm.weight'), which would be random"),
    ):
        wrong = {**config, part: {**config[part], name: value}}
        wrong["text_config"].pop("layer_types", None)
        (odd / "config.json").write_text(json.dumps(wrong))
        if value == "foo" and name == "model_type" and vision.endswith("qwen2.5-vl"):
            continue  # which knows the type of its parts
        with mock.patch("transformers.AutoModelForImageTextToText.from_pretrained") as loads:
            refused(lambda: peft_cast.translate(source_folder, lora_folder, str(odd), **QUICK), words)
        assert loads.call_count == 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_of_a_model_that_are_not_finite_are_told(number, source_folder, lora_folder, target_folder):
    broken, tower = (AutoModelForCausalLM.from_pretrained(source_folder) for _ in range(2))
    broken.model.layers[1].mlp.up_proj.weight.data[0] = number
    words = ["NaN or infinite numbers in its own weights ('model.layers.1.mlp.up_proj.weight')", "get its weights"]
    adapter = PeftModel.from_pretrained(broken, lora_folder)
    refused(lambda: peft_cast.translate(None, adapter, target_folder, **QUICK), "source model", *words)
    adapter.unload()
    refused(lambda: peft_cast.translate(broken, lora_folder, target_folder, **QUICK), "source model", *words)
    refused(lambda: peft_cast.evaluate(broken, {"it": lora_folder}, [NEXT]), "target model", *words)
    tower.vision_tower = torch.nn.Linear(2, 2)
    tower.vision_tower.weight.data[:] = number
    assert peft_cast.translate(tower, lora_folder, target_folder, **QUICK).metrics["kl"]


def test_tokenizers_files_and_wrapped_adapters_are_told_by_what_they_are(source_folder, lora_folder, target_folder):
    file = str(Path(source_folder) / "tokenizer.json")
    refused(
        lambda: peft_cast.translate(source_folder, lora_folder, target_folder, source_tokenizer=file, **QUICK),
        f"'{file}' is a file, pass the folder that it is in",
    )
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source_folder), lora_folder)
    for wrapped, inner in ((torch.nn.DataParallel(adapter), "module"), (torch.compile(adapter), "_orig_mod")):
        refused(lambda: peft_cast.translate(None, wrapped, target_folder, **QUICK), f"`adapter.{inner}`")
        refused(lambda: peft_cast.evaluate(source_folder, {"a": wrapped}, []), f"`adapters['a'].{inner}`")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_no_file_can_have_is_told_wherever_it_is_passed(name, source_folder, lora_folder, target_folder):
    for given in ((name, lora_folder, target_folder), (source_folder, name, target_folder)):
        refused(lambda: peft_cast.translate(*given, **QUICK), f"{name[:60]!r}… is no name of")
    refused(lambda: peft_cast.evaluate(name, {}, []), f"{name[:60]!r}… is no name of")
    options = {**QUICK, "output_dir": name}
    refused(
        lambda: peft_cast.translate(source_folder, lora_folder, target_folder, **options),
        f"`output_dir`, {name[:60]!r}…, is no name that a file can have",
    )


@pytest.mark.parametrize(
    "values", [{"vocab_size": "many"}, {"hidden_activation": "no such"}, {"num_attention_heads": 0}]
)
def test_plans_of_configurations_that_make_no_sense_are_one_sentence(
    values, source_folder, lora_folder, target_folder, tmp_path
):
    target = folder_of(target_folder, tmp_path / "target", settings(**values))
    refused(lambda: peft_cast.plan(source_folder, lora_folder, target), "target model", f"`{[*values][0]}`", "correct")


def test_objects_that_are_no_language_models_are_called_what_they_are(source_folder, lora_folder, target_folder):
    whole = AutoModelForCausalLM.from_pretrained(source_folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(whole.config)
    t5 = transformers.T5Config(vocab_size=300, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
    for given, words in {
        transformers.T5ForConditionalGeneration(t5): ["T5ForConditionalGeneration", "no decoder-only"],
        transformers.AutoModel.from_pretrained(source_folder): ["LlamaModel", "no language-modeling head"],
        torch.nn.Linear(2, 2): ["a Linear, no language model"],
        torch.nn.DataParallel(whole): ["wrapped in DataParallel", ".module`"],
        empty: ["meta device"],
    }.items():
        refused(lambda: peft_cast.translate(given, lora_folder, target_folder, **QUICK), *words)
        refused(lambda: peft_cast.translate(source_folder, lora_folder, given, **QUICK), *words)
        refused(lambda: peft_cast.evaluate(given, {}, []), *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://huggingface.co/user/repo", ["hub id is 'user/repo'"]),
        ("https://huggingface.co/user/repo/tree/main/a/b?x=1", ["hub id is 'user/repo/a/b'"]),
        ("hf.co/user/repo/blob/v2/config.json", ["hub id is 'user/repo'", "revision 'v2'"]),
        ("user/repo@v2", ["hub id, that is 'user/repo', its revision 'v2'"]),
        ("user/repo/../x", ["there is no folder 'user/repo/../x'"]),
        ("s3://bucket/model", ["something else than a model or adapter on the Hub"]),
        ("model-Q4_K_M.gguf", ["GGUF"]),
    ],
)
def test_web_addresses_and_ggufs_are_told(name, words, source_folder, lora_folder, target_folder):
    for given in ((name, lora_folder, target_folder), (source_folder, name, target_folder)):
        refused(lambda: peft_cast.translate(*given, **QUICK), *words)
        refused(lambda: peft_cast.plan(*given), *words)
    refused(lambda: peft_cast.to_lora(name), *words)
    tokenizer = {"source_tokenizer": name}
    refused(lambda: peft_cast.translate(source_folder, lora_folder, target_folder, **tokenizer, **QUICK), *words)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (written("chat_template.jinja", TEMPLATE), "holds chat_template.jinja without tokenizer_config.json"),
        (written("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}'), "no vocabulary but its special"),
    ],
)
def test_a_tokenizer_of_an_adapter_that_is_not_whole_is_told(
    change, said, source_folder, lora_folder, target_folder, tmp_path
):
    adapter = folder_of(lora_folder, tmp_path / "a", change)
    with pytest.warns(UserWarning, match=f"{said}.*"), open_pair(source_folder, adapter, target_folder) as pair:
        assert len(pair.tokenizers[0]) == 300


def test_a_tokenizer_that_knows_no_english_is_told(source_folder, lora_folder, target_folder):
    able = Tokenizer(WordLevel({"<unk>": 0, "ab": 1, "cd": 2}, unk_token="<unk>"))
    able = PreTrainedTokenizerFast(tokenizer_object=able, unk_token="<unk>")
    unable = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"ab": 0, "cd": 1})))
    with pytest.warns(UserWarning, match="knows hardly a token of plain English"):
        refused(lambda: peft_cast.translate(source_folder, lora_folder, target_folder, target_tokenizer=able, **QUICK))
    refused(lambda: peft_cast.evaluate(target_folder, {}, [], target_tokenizer=unable), "cannot be read", "[UNK]")


def test_tokens_that_no_text_has_may_lie_beyond_the_embeddings(source_folder, lora_folder, target_folder):
    given = AutoTokenizer.from_pretrained(target_folder)
    given.add_tokens(["<image_soft_token>"], special_tokens=True)
    given.add_special_tokens({"pad_token": "[PAD]"})
    pairing = peft_cast.Pairing(target_tokenizer=given)
    with open_pair(source_folder, lora_folder, target_folder, pairing) as pair:
        assert len(continuations(pair.target, given, ["one", "one two three four"], 4)) == 2


def test_a_slow_tokenizer_of_an_adapter_on_the_hub_is_read_with_its_files(
    hub, source_folder, lora_folder, target_folder, tmp_path
):
    folder = Path(shutil.copytree(lora_folder, tmp_path / "repo" / "last"))
    known = json.loads((Path(source_folder) / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(known["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, known["merges"])]))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    hub.add("user/loras", tmp_path / "repo")
    with open_pair(source_folder, "user/loras/last", target_folder) as pair:
        read = pair.tokenizers[0]
    own = AutoTokenizer.from_pretrained(source_folder)
    assert read.chat_template == TEMPLATE and read(TEXTS[0]).input_ids == own(TEXTS[0]).input_ids


@pytest.mark.parametrize("tokens", [310, None])
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [3]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_embeddings_that_are_saved_too_are_no_mismatch(options, tokens, source_folder, target_folder, tmp_path):
    def source():
        model = AutoModelForCausalLM.from_pretrained(source_folder)
        if tokens:  # PEFT then saves the embeddings by itself
            model.resize_token_embeddings(tokens)
        return model

    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    get_peft_model(source(), config).save_pretrained(tmp_path, **({} if tokens else {"save_embedding_layers": True}))
    with open_pair(source(), tmp_path, target_folder) as pair:
        assert pair.kernels
        expected = PeftModel.from_pretrained(source(), tmp_path).eval()
        ids = torch.arange(5, 15)[None]
        with torch.no_grad():
            torch.testing.assert_close(pair.adapted(ids).logits, expected(ids).logits)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    broken = {name: tensor for name, tensor in saved.items() if name != "base_model.model.model.embed_tokens.weight"}
    if "base_model.model.model.embed_tokens.modules_to_save.weight" in broken:  # which nothing would read
        save_file(broken, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        with (
            pytest.raises(ValueError, match="does not fit the source model"),
            open_pair(source(), tmp_path, target_folder),
        ):
            pass


def test_encoders_are_refused(source_folder, lora_folder, byte_tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=300, **sizes))
    for target in (model, save_model(model, byte_tokenizer, tmp_path)):
        refused(
            lambda: peft_cast.translate(source_folder, lora_folder, target, **QUICK), "no decoder-only language model"
        )


def test_a_model_without_weights_or_adapter_in_the_adapters_place(source_folder, target_folder):
    model = AutoModelForCausalLM.from_pretrained(source_folder)
    refused(lambda: peft_cast.translate(None, model, target_folder, **QUICK), "`adapter` is a model")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).to("meta")
    refused(lambda: peft_cast.translate(None, peft, target_folder, **QUICK), "weights on the meta device")


def test_a_bridge_is_not_written_over(source_folder, lora_folder, target_folder, tmp_path):
    (tmp_path / "bridge_config.json").write_text("{}")
    refused(
        lambda: peft_cast.translate(source_folder, lora_folder, target_folder, output_dir=tmp_path, **QUICK),
        "holds a bridge: write to another folder",
    )


def test_a_translation_is_not_saved_over_something_else(source_folder, lora_folder, target_folder, tmp_path):
    result = peft_cast.translate(source_folder, lora_folder, target_folder, **QUICK)
    refused(lambda: result.save_pretrained(target_folder), "holds a model: write to another folder")
    folder = shutil.copytree(lora_folder, tmp_path / "lora")
    refused(lambda: result.save_pretrained(folder), "holds an adapter of type LORA, which would be overwritten")
    for _ in range(2):  # one of its own kind may be replaced
        result.save_pretrained(tmp_path / "cast")
    assert inspect(tmp_path / "cast")["kind"] == "CAST adapter"
