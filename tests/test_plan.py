"""What a translation will cost, told beforehand."""

import json
from dataclasses import replace
from functools import cache
from importlib import import_module
from unittest import mock

import peft
import pytest
import torch
import transformers
from conftest import c4_texts, make_lora, save_model, tiny_config, tiny_model
from test_pairs import adapted_modules, spanning_pairs
from test_sources import APPROXIMATED, EXACT, FEW, REPORTED, lora, reported_source, save_adapter
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast import fit_bridge, plan, to_lora
from peft_cast.planning import DEVICES, Device, this_machine
from peft_cast.planning.fake import _Counter, counted
from peft_cast.refine.cache import TopKLogProbs
from peft_cast.refine.losses import Predictions, whole


SLOW = Device("slow", flops=1e9, flops32=1e9, memory=2**40, runtime=0, start=0.0)
SLOW_IN_FLOAT32 = Device("slow in float32", flops=1e30, flops32=1.0, memory=2**60, runtime=0, start=0.0)
USUAL = {"on": SLOW, "steps": 10, "batch_size": 4, "max_length": 64}
# The least that is still a plan.
QUICK = {"on": SLOW, "teacher": "source", "steps": 1, "batch_size": 2, "max_length": 8, "fit_samples": 4, "gamma": 0.0}
KINDS = {
    **{kind: (config, "llama") for kind, (config, _) in EXACT.items()},
    **{kind: (config, "llama") for kind, config in APPROXIMATED.items()},
    **{kind: (config, architecture) for kind, (config, architecture, _) in REPORTED.items()},
}
HYBRID = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HYBRIDS = {
    "qwen3_5": transformers.Qwen3_5TextConfig(
        **HYBRID,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "jamba": transformers.JambaConfig(
        **HYBRID, attn_layer_period=2, attn_layer_offset=1, num_experts=4, mamba_d_state=8, mamba_dt_rank=4
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, byte_tokenizer, piece_tokenizer):
    """A source, a LoRA for it and a target, of one layer each: a plan goes through all operations of every layer."""
    folder = tmp_path_factory.mktemp("one-layer")
    source = tiny_model("llama", len(byte_tokenizer), num_hidden_layers=1)
    source = save_model(source, byte_tokenizer, folder / "source")
    lora = make_lora(AutoModelForCausalLM.from_pretrained(source), folder / "lora")
    target = tiny_model("gemma3", len(piece_tokenizer), seed=5, hidden_size=40, num_hidden_layers=1, head_dim=16)
    return source, lora, save_model(target, piece_tokenizer, folder / "target")


@pytest.fixture(scope="module")
def planned(models):
    """Plans of these models that are as usual but for some options; each is made once for all tests."""
    return cache(lambda **options: plan(*models, **{**USUAL, **options}))


@pytest.fixture
def linears(models):
    """The linear modules of the target's layers."""
    target = AutoModelForCausalLM.from_pretrained(models[2])
    return [m for m in target.model.layers.modules() if isinstance(m, torch.nn.Linear)]


def test_sizes_are_those_of_the_translation(source_folder, lora_folder, target_folder, tmp_path):
    planned = plan(source_folder, lora_folder, target_folder, on=SLOW, dtype=torch.float32)
    result = peft_cast.translate(
        source_folder, lora_folder, target_folder, text=c4_texts(12), steps=0, max_length=32, progress=False
    )
    assert planned.parameters == result.metrics["parameters"]
    result.save_pretrained(tmp_path / "cast")
    to_lora(result.model).save_pretrained(tmp_path / "lora")
    for name, folder in (("adapter", "cast"), ("folded", "lora")):
        size = (tmp_path / folder / "adapter_model.safetensors").stat().st_size
        assert planned.files[name] <= size < planned.files[name] + 20_000  # the file's header
    assert planned.weights["target"] == pytest.approx(
        sum(p.nbytes for p in result.model.unload().parameters()), rel=0.01
    )


def test_counts_memory_that_is_alive_at_once():
    with FakeTensorMode():
        a, b = torch.empty(64, 64), torch.empty(64, 64)
        with counted() as cost:
            c = a @ b
            d = c + 1
            del c
            e = d.T + 1
    assert cost.peak == 2 * 64 * 64 * 4  # c and d, later d and e; views take nothing
    assert cost.kept == cost.peak and e.shape == (64, 64)
    assert cost.flops == 2 * 64**3


def test_counts_what_a_backward_pass_keeps():
    with FakeTensorMode():
        x, w = torch.empty(32, 64), torch.empty(64, 64, requires_grad=True)
        with counted() as cost:
            (x @ w).relu().sum().backward()
    assert cost.flops == 2 * 2 * 32 * 64 * 64  # the product, and the weight's gradient
    gradients = 32 * 64 * 4 + 64 * 64 * 4  # of the product and of the weight, at once
    assert gradients <= cost.peak < 1.1 * gradients


def test_counts_products_that_are_added_in_place():
    with FakeTensorMode():
        sums, x = torch.zeros(16, 16), torch.empty(32, 16)
        with counted() as cost:
            sums.addmm_(x.T, x)
    assert (cost.flops, cost.products) == (2 * 32 * 16 * 16, 1)


def test_second_moments_take_time(planned, linears):
    # Of five batches one is held out, of ten two.
    few, many = (
        planned(on=SLOW_IN_FLOAT32, dtype=torch.float32, fit_samples=n).phases["closed_form"].seconds for n in (20, 40)
    )
    positions = 4 * 4 * int(0.95 * 64)
    gradients, inputs = (
        2 * positions * sum(getattr(m, f"{side}_features") ** 2 for m in linears) for side in ("out", "in")
    )
    # Inputs that modules share are taken once; the maps' other side is as wide as the LoRA's rank.
    assert gradients < many - few < 1.5 * (gradients + inputs)


def test_a_step_costs_the_passes_it_cannot_avoid(planned, linears):
    plain, mixed = (planned(teacher=teacher, gamma=0.0).phases["refine"].flops for teacher in ("source", 0.2))
    weights = sum(m.weight.numel() for m in linears)
    passes = 2 * 2 * weights * 10 * 4 * 64  # forward and backward of the target's layers
    assert passes < plain < 5 * passes
    # The plain source and the untouched target predict too.
    assert 1.2 * plain < mixed < 2 * plain


def test_anchors_are_as_long_as_they_may_be_however_short_the_texts(planned):
    short, long = (planned(tokens=8, max_length=most).phases["refine"].flops for most in (64, 128))
    assert long > 1.2 * short


@pytest.mark.parametrize("change", [{"batch_size": 16}, {"max_length": 128}])
def test_larger_batches_take_more_memory_and_time(planned, change):
    before, after = planned(), planned(**change)
    for phase in ("closed_form", "refine"):
        assert after.phases[phase].above_weights > 1.5 * before.phases[phase].above_weights
    assert after.phases["refine"].seconds > 1.5 * before.phases["refine"].seconds


def test_held_out_positions_of_the_closed_form_take_memory(planned, linears):
    # Of five batches one is held out, of ten two.
    one, two = (
        planned(on=SLOW_IN_FLOAT32, dtype=torch.float32, fit_samples=n).phases["closed_form"] for n in (20, 40)
    )
    widths = sum(m.in_features + m.out_features for m in linears)
    positions = 4 * int(0.95 * 64)
    # q, k and v, gate and up read the same input, which is held once for all of them.
    assert 0.5 * widths * positions * 4 < two.memory - one.memory < 1.5 * widths * positions * 4


@pytest.mark.parametrize("given", ["bridge", "start"])
def test_what_is_begun_from_needs_no_closed_form(models, planned, given, tmp_path):
    source, adapter, target = models
    begun = fit_bridge(source, target, text=c4_texts(4), max_length=16, progress=False)
    if given == "start":
        begun.cast_file(adapter, begun := tmp_path / "start")
    with_fit, without = planned(), plan(*models, **USUAL, **{given: begun})
    assert set(with_fit.phases) - set(without.phases) == {"closed_form"} and without.seconds < with_fit.seconds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": "/nope"}, "there is no folder '/nope'"),
        ({"start": 5}, "`start` must be the folder or hub id of a translation"),
        ({"bridge": 3}, "`bridge` must be a `Bridge`"),
        ({"bridge": "/nope"}, "there is no folder '/nope'"),
    ],
)
def test_what_cannot_be_begun_from_is_refused_as_in_a_translation(
    given, message, source_folder, lora_folder, target_folder
):
    for verb, options in ((plan, {"on": SLOW}), (peft_cast.translate, {})):
        with pytest.raises(ValueError, match=message):
            verb(source_folder, lora_folder, target_folder, **given, **options)


def test_steps_on_own_words_are_counted(planned):
    before, after = planned(), planned(on_policy_steps=5)
    assert after.phases["refine"].seconds == pytest.approx(1.5 * before.phases["refine"].seconds)
    assert after.phases["evaluate"].seconds > 2 * before.phases["evaluate"].seconds


def test_text_that_models_write_takes_time_and_other_text_none(planned):
    prompts = peft_cast.SelfWritten(prompts=("One?", "Two?"), more_prompts=0)
    texts = (None, prompts, peft_cast.Mixture((prompts, 1), ("c4", 1)))
    survey, written, half = (planned(text=text).phases["text"].flops for text in texts)
    assert "text" not in planned(text="c4").phases and survey > 2 * written
    assert half == pytest.approx(written / 2, rel=0.1)
    further = planned(text=replace(prompts, more_prompts=20)).phases["text"].flops
    assert written < further < survey


def test_a_device_waits_for_python_where_products_are_small(models):
    seconds = []
    for start in (0.0, 1.0):
        fast = Device("fast", flops=1e30, flops32=1e30, memory=2**40, runtime=0, start=start)
        seconds.append(plan(*models, **{**QUICK, "on": fast}).phases["refine"].seconds)
    loaded = [AutoModelForCausalLM.from_pretrained(models[i]) for i in (0, 2)]
    source, target = (sum(isinstance(m, torch.nn.Linear) for m in model.modules()) for model in loaded)
    assert seconds[0] < 1e-9
    assert seconds[1] > source + 2 * target  # the source forward, the target forward and back


def test_gradient_checkpointing_takes_another_forward_pass(models, planned):
    saving = plan(*models, **USUAL, training_args={"gradient_checkpointing": True})
    assert saving.phases["refine"].flops > 1.1 * planned().phases["refine"].flops


def test_counts_what_gradient_checkpointing_gives_free():
    model = tiny_model(num_hidden_layers=8)
    ids = torch.zeros(2, 64, dtype=torch.long)
    peaks = []
    for saving in (False, True):
        if saving:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        with counted() as cost:
            model(input_ids=ids, use_cache=False).logits.sum().backward()
        peaks.append(cost.peak - sum(p.nbytes for p in model.parameters()))  # the gradients
        model.zero_grad()
    assert peaks[1] < 0.5 * peaks[0]


def test_logits_are_never_there_all_at_once():
    n, vocabulary, peaks = 4000, 50_000, []
    with FakeTensorMode(allow_non_fake_inputs=True):
        head = torch.nn.Linear(64, vocabulary, bias=False).requires_grad_(False)
        kept = TopKLogProbs(torch.zeros(n, 8, dtype=torch.int32), torch.zeros(n, 9, dtype=torch.float16))
        for in_blocks in (True, False):
            states = torch.zeros(n, 64, requires_grad=True)
            with counted() as cost:
                student = Predictions(states, head)
                kept.kl_divergence(student if in_blocks else whole(student)).sum().backward()
            peaks.append(cost.peak)
    assert peaks[1] > 2 * n * vocabulary * 4 > 10 * peaks[0]


def test_quantized_weights_take_their_bits(models):
    whole, quantized = (plan(*models, **QUICK, dtype=torch.float32, weight_bits=bits) for bits in (None, 4))
    target = AutoModelForCausalLM.from_pretrained(models[2])
    layers = sum(p.numel() for name, p in target.named_parameters() if ".layers." in name and p.ndim == 2)
    saved = whole.weights["target"] - quantized.weights["target"]
    assert saved == pytest.approx(layers * (4 - 4.5 / 8), abs=2)
    assert whole.memory - quantized.memory == saved + whole.weights["source"] - quantized.weights["source"]


def test_quantized_weights_are_not_planned_spread(source_folder, lora_folder, target_folder):
    with pytest.raises(ValueError, match="FSDP shards no quantized models"):
        plan(
            source_folder,
            lora_folder,
            target_folder,
            on=SLOW,
            training_args={"fsdp": True},
            processes=2,
            weight_bits=4,
        )


def test_a_70b_model_is_planned_in_seconds_without_its_weights(models):
    llama = tiny_config(
        "llama",
        128_256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )
    planned = plan(*models[:2], llama, **{**QUICK, "on": "h100"})
    assert 139e9 < planned.weights["target"] < 143e9
    assert not planned.fits and "It does not fit" in str(planned)
    # Of 80 GiB for 131 GiB of weights alone
    assert planned.memory > planned.weights["target"]


def test_several_devices_share_texts_and_with_fsdp_the_weights(source_folder, lora_folder, target_folder):
    options = {"on": SLOW, "batch_size": 8, "max_length": 64, "fit_samples": 32, "steps": 4}
    one, shared, spread = (
        plan(source_folder, lora_folder, target_folder, **options, **more)
        for more in ({}, {"processes": 4}, {"processes": 4, "training_args": {"fsdp": True}})
    )
    for phase in ("closed_form", "refine"):
        assert 3 * shared.phases[phase].flops < one.phases[phase].flops * 1.2
        assert shared.phases[phase].above_weights < one.phases[phase].above_weights
    layers = [
        m.model.layers
        for m in (
            tiny_model("llama", 300),
            tiny_model("gemma3", 420, hidden_size=40, num_hidden_layers=2, head_dim=16),
        )
    ]
    itemsize = one.weights["target"] / sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(target_folder).parameters()
    )
    each = [
        [sum(p.numel() for p in layer.parameters() if p.ndim == 2) * itemsize for layer in model] for model in layers
    ]
    # Three quarters of the layers are elsewhere, and two whole ones of a model are put together while it works.
    saved = 0.75 * sum(map(sum, each)) - 2 * max(map(max, each))
    assert shared.phases["load"].memory - spread.phases["load"].memory == pytest.approx(saved, rel=1e-3)
    assert (
        "each of 4" in str(spread) and spread.phases["refine"].above_weights == shared.phases["refine"].above_weights
    )
    with pytest.raises(ValueError, match="must be a multiple of the 3 processes"):
        plan(source_folder, lora_folder, target_folder, **options, processes=3)


def test_is_json_ready_and_readable(models):
    planned = plan(None, *models[1:], **{**QUICK, "on": "a100", "steps": 7})
    account = json.loads(json.dumps(planned.as_dict()))
    assert account["assumed"]["steps"] == 7 and account["device"]["name"] == "a100" and account["fits"]
    assert account["seconds"] == pytest.approx(sum(phase["seconds"] for phase in account["phases"].values()))
    assert "refine" in str(planned) and "a100 (80.0 GiB)" in str(planned)


def test_this_machine_is_measured():
    device = this_machine()
    assert device.flops > 1e9 and device.memory > 2**30
    assert device.name not in DEVICES


def test_what_cannot_be_planned_is_one_clear_error(source_folder, lora_folder, target_folder, tmp_path):
    with pytest.raises(ValueError, match="no device 'abacus': choose from"):
        plan(source_folder, lora_folder, target_folder, on="abacus")
    with pytest.raises(ValueError, match="configuration of the target model could not be read: there is no folder"):
        plan(source_folder, lora_folder, tmp_path / "nothing", on="h100")
    with pytest.raises(ValueError, match="`source` must be a hub id, .*, got LlamaForCausalLM: pass `source.config`"):
        plan(tiny_model(), lora_folder, target_folder, on="h100")
    foreign = make_lora(tiny_model("llama", 300, hidden_size=64), tmp_path / "foreign")
    with pytest.raises(ValueError, match="does not fit|shape"):
        plan(source_folder, foreign, target_folder, on="h100")


def adapter_of(kind: str, folder):
    config, architecture = KINDS[kind]
    model = reported_source(architecture, 300)
    return model.config, save_adapter(
        model, config, folder, size=0.4 if kind in ("AdaLoRA", "VeRA", "VB-LoRA") else 0.1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_planned(kind, tmp_path):
    source, adapter = adapter_of(kind, tmp_path)
    planned = plan(source, adapter, tiny_config("llama", 420, num_hidden_layers=1, hidden_size=40), **QUICK)
    assert planned.parameters["trained"] > 0 and planned.phases["closed_form"].flops > 0
    # What is read from the adapter's file is no estimate.
    read = kind in REPORTED and kind != "aLoRA" or kind in list(EXACT)[: list(EXACT).index("MiCA")]
    assert bool(planned.assumed["estimated"]) != (read or kind == "layer_replication")
    assert source.num_hidden_layers < 4  # a configuration that was passed is left as it was


@pytest.mark.parametrize(
    "kind", ["DoRA", "PiSSA", "IA3", "LoHa", "CAST", "AdaLoRA", "modules_to_save (head)", "layer_replication"]
)
def test_kinds_are_planned_with_the_parameters_that_they_will_have(kind, byte_tokenizer, target_folder, tmp_path):
    source = tiny_model("llama", len(byte_tokenizer))
    adapter = save_adapter(source, KINDS[kind][0], tmp_path, size=0.4 if kind == "AdaLoRA" else 0.1)
    planned = plan(source.config, adapter, target_folder, **QUICK)
    result = peft_cast.translate(
        source,
        adapter,
        target_folder,
        source_tokenizer=byte_tokenizer,
        text=c4_texts(4),
        steps=0,
        max_length=16,
        progress=False,
    )
    assert planned.parameters == result.metrics["parameters"]


@pytest.mark.parametrize("rank", [3, 40])
def test_a_source_rank_is_planned(rank, tmp_path):
    source = tiny_model("llama", 300)
    adapter = save_adapter(source, lora(use_dora=True), tmp_path)
    planned = plan(source.config, adapter, source.config, source_rank=rank, **QUICK)
    widths = {"q_proj": 32 + 32, "down_proj": 48 + 32}
    # A matrix of 32 rows has no higher rank.
    assert planned.parameters["source_lora"] == 3 * min(rank, 32) * sum(widths[name] for name in FEW)


def test_wide_models_are_planned_with_the_rank_that_full_ones_are_cut_to(tmp_path):
    source = tiny_model("llama", 300, hidden_size=96, intermediate_size=80, num_hidden_layers=1)
    adapter = save_adapter(source, lora(use_dora=True, r=12, target_modules=["down_proj"]), tmp_path / "dora")
    other = save_adapter(source, peft.LoHaConfig(r=9, target_modules=["down_proj"]), tmp_path / "loha")
    for folder, rank in ((adapter, 24), (other, 16)):
        assert plan(source.config, folder, source.config, **QUICK).parameters["source_lora"] == rank * (96 + 80)


def test_other_kinds_of_another_model_are_refused(tmp_path):
    deep, wide = tiny_model("llama", 300, num_hidden_layers=4), tiny_model("llama", 300, hidden_size=64)
    for number, model in enumerate((deep, wide)):
        adapter = save_adapter(model, lora(use_dora=True), tmp_path / str(number))
        with pytest.raises(ValueError, match="does not fit the source model") as error:
            plan(tiny_config("llama", 300), adapter, tiny_config("llama", 300), **QUICK)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(("source", "target"), spanning_pairs())
def test_every_architecture_is_planned_as_source_and_target(source, target, tmp_path):
    model = tiny_model(source, 300, num_hidden_layers=2)
    adapter = make_lora(model, tmp_path, adapted_modules(model, source))
    planned = plan(model.config, adapter, tiny_config(target, 420, num_hidden_layers=2), dtype=torch.float32, **QUICK)
    assert planned.parameters["trained"] > 0 and not planned.assumed["estimated"]


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_models_are_planned(name, models, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HYBRIDS[name])
    adapter = make_lora(model, tmp_path, ["q_proj", "k_proj", "v_proj"])
    for pair in ((HYBRIDS[name], adapter, models[0]), (*models[:2], HYBRIDS[name])):
        planned = plan(*pair, **QUICK)
        assert planned.phases["refine"].flops > 0
        assert planned.assumed["estimated"] == ["passes, as if every value that the models' code asks for were 1"]
        assert "Estimated: passes" in str(planned)


def test_products_of_experts_are_counted(models):
    few, many = (
        plan(
            *models[:2],
            tiny_config("mixtral", 300, num_hidden_layers=1, intermediate_size=size),
            dtype=torch.float32,
            **QUICK,
        )
        .phases["refine"]
        .flops
        for size in (48, 96)
    )
    # Two texts of eight tokens with two experts each; three matrices, forward and back.
    assert many - few == pytest.approx(2 * 8 * 2 * 3 * 2 * (2 * 32 * 48), rel=0.1)


def test_a_plan_says_what_peft_cannot_replicate(byte_tokenizer, tmp_path):
    model = tiny_model("gpt2", len(byte_tokenizer))
    source = save_model(model, byte_tokenizer, tmp_path / "source")
    config = lora(use_dora=True, target_modules="all-linear")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "dora")
    file = tmp_path / "dora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layer_replication": [[0, 2], [1, 2]]}))
    with pytest.raises(ValueError, match="`layer_replication` repeats layers, which PEFT cannot do"):
        plan(source, tmp_path / "dora", source, **QUICK)


def test_a_teacher_that_is_the_target_is_estimated(models):
    estimated = plan(*models, **{**QUICK, "teacher": "shown"}).assumed["estimated"]
    assert any("teacher `shown`" in one for one in estimated)


def test_what_depends_on_the_data_is_estimated_from_the_modules(lora_folder, source_folder):
    plans = []
    for experts in (None, "eager"):  # one product for all experts, or a loop over those that were chosen
        config = tiny_config("mixtral", 300, hidden_size=64, intermediate_size=128)
        config._experts_implementation = experts
        options = {**QUICK, "max_length": 64, "dtype": torch.float32}
        plans.append(plan(source_folder, lora_folder, config, **options))
    counted, estimated = plans
    assert estimated.assumed["estimated"] == ["passes of the target model, by its linear modules alone"]
    for phase in ("closed_form", "refine"):
        assert estimated.phases[phase].flops == pytest.approx(counted.phases[phase].flops, rel=0.3)
        assert estimated.phases[phase].above_weights == pytest.approx(counted.phases[phase].above_weights, rel=0.5)
    assert estimated.parameters == counted.parameters


def test_a_model_that_goes_token_by_token_is_estimated_from_its_modules(lora_folder, source_folder):
    config = transformers.RwkvConfig(
        vocab_size=300, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=512
    )
    steps, counter = [], _Counter.__torch_dispatch__

    def counting(self, *args, **options):
        steps.append(1)
        return counter(self, *args, **options)

    counts = []
    for length in (16, 64):
        steps.clear()
        with mock.patch.object(_Counter, "__torch_dispatch__", counting):
            found = plan(source_folder, lora_folder, config, **{**QUICK, "max_length": length})
        counts.append(len(steps))
        assert "passes of the target model, by its linear modules alone" in found.assumed["estimated"]
    assert counts[1] < 1.2 * counts[0]


def test_what_cannot_be_counted_is_one_short_error(lora_folder, source_folder, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such operation " + "SomeClass, " * 1000)

    monkeypatch.setattr(import_module("peft_cast.planning.plan"), "closed_form_costs", refuse)
    with pytest.raises(ValueError, match="cannot be told without their weights") as error:
        plan(source_folder, lora_folder, source_folder, **QUICK)
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="The target model is of the type 'clip', which is no decoder") as error:
        plan(source_folder, lora_folder, transformers.CLIPConfig(), **QUICK)
    assert len(str(error.value)) < 400
