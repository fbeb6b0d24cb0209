"""What a translation will cost, told beforehand."""

import json

import pytest
import torch
from conftest import c4_texts, make_lora, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

import peft_cast
from peft_cast import plan, to_lora
from peft_cast.planning.devices import DEVICES, Device, this_machine
from peft_cast.planning.fake import counted
from peft_cast.refine.cache import TopKLogProbs
from peft_cast.refine.losses import Predictions, whole


SLOW = Device("slow", flops=1e9, flops32=1e9, memory=2**40, runtime=0, start=0.0)


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


def test_second_moments_take_time(source_folder, lora_folder, target_folder):
    slow = Device("slow in float32", flops=1e30, flops32=1.0, memory=2**60, runtime=0, start=0.0)
    options = {"on": slow, "batch_size": 4, "max_length": 64, "dtype": torch.float32}
    # Of five batches one is held out, of ten two.
    few, many = (
        plan(source_folder, lora_folder, target_folder, **options, fit_samples=n).phases["closed_form"].seconds
        for n in (20, 40)
    )
    linears = [m for m in tiny_model("gemma3", 420).model.layers.modules() if isinstance(m, torch.nn.Linear)]
    positions = 4 * 4 * int(0.95 * 64)
    gradients, inputs = (
        2 * positions * sum(getattr(m, f"{side}_features") ** 2 for m in linears) for side in ("out", "in")
    )
    # Inputs that modules share are taken once; the maps' other side is as wide as the LoRA's rank.
    assert gradients < many - few < 1.5 * (gradients + inputs)


def test_a_step_costs_the_passes_it_cannot_avoid(source_folder, lora_folder, target_folder):
    options = {"on": SLOW, "steps": 10, "batch_size": 4, "max_length": 64, "gamma": 0.0}
    planned, mixed = (
        plan(source_folder, lora_folder, target_folder, teacher=teacher, **options) for teacher in ("source", 0.2)
    )
    target = tiny_model("gemma3", 420)
    weights = sum(p.numel() for p in target.model.layers.parameters() if p.ndim == 2)
    passes = 2 * 2 * weights * 10 * 4 * 64  # forward and backward of the target's layers
    assert passes < planned.phases["refine"].flops < 5 * passes
    # The plain source and the untouched target predict too.
    assert 1.2 * planned.phases["refine"].flops < mixed.phases["refine"].flops < 2 * planned.phases["refine"].flops


def test_anchors_are_as_long_as_they_may_be_however_short_the_texts(source_folder, lora_folder, target_folder):
    short, long = (
        plan(source_folder, lora_folder, target_folder, on=SLOW, tokens=8, max_length=most).phases["refine"].flops
        for most in (64, 128)
    )
    assert long > 1.2 * short


@pytest.mark.parametrize("change", [{"batch_size": 16}, {"max_length": 128}])
def test_larger_batches_take_more_memory_and_time(source_folder, lora_folder, target_folder, change):
    small = {"batch_size": 4, "max_length": 64, "on": SLOW, "fit_samples": 32}
    before, after = (plan(source_folder, lora_folder, target_folder, **o) for o in (small, {**small, **change}))
    for phase in ("closed_form", "refine"):
        assert after.phases[phase].above_weights > 1.5 * before.phases[phase].above_weights
    assert after.phases["refine"].seconds > 1.5 * before.phases["refine"].seconds


def test_held_out_positions_of_the_closed_form_take_memory(source_folder, lora_folder, target_folder):
    options = {"on": SLOW, "batch_size": 4, "max_length": 64, "dtype": torch.float32}
    # Of five batches one is held out, of ten two.
    one, two = (
        plan(source_folder, lora_folder, target_folder, **options, fit_samples=n).phases["closed_form"]
        for n in (20, 40)
    )
    target = tiny_model("gemma3", 420)
    widths = sum(
        m.in_features + m.out_features for m in target.model.layers.modules() if isinstance(m, torch.nn.Linear)
    )
    positions = 4 * int(0.95 * 64)
    # q, k and v, gate and up read the same input, which is held once for all of them.
    assert 0.5 * widths * positions * 4 < two.memory - one.memory < 1.5 * widths * positions * 4


@pytest.mark.parametrize("given", ["bridge", "start"])
def test_what_is_begun_from_needs_no_closed_form(source_folder, lora_folder, target_folder, given):
    models, options = (source_folder, lora_folder, target_folder), {"on": SLOW, "batch_size": 4, "max_length": 64}
    with_fit, without = (plan(*models, **options, **more) for more in ({}, {given: "a folder"}))
    assert set(with_fit.phases) - set(without.phases) == {"closed_form"} and without.seconds < with_fit.seconds


def test_steps_on_own_words_are_counted(source_folder, lora_folder, target_folder):
    options = {"on": SLOW, "batch_size": 4, "max_length": 64, "steps": 10}
    before, after = (
        plan(source_folder, lora_folder, target_folder, **options, **o) for o in ({}, {"on_policy_steps": 5})
    )
    assert after.phases["refine"].seconds == pytest.approx(1.5 * before.phases["refine"].seconds)
    assert after.phases["evaluate"].seconds > 2 * before.phases["evaluate"].seconds


def test_a_device_waits_for_python_where_products_are_small(source_folder, lora_folder, target_folder):
    seconds = []
    for start in (0.0, 1.0):
        fast = Device("fast", flops=1e30, flops32=1e30, memory=2**40, runtime=0, start=start)
        planned = plan(source_folder, lora_folder, target_folder, on=fast, steps=1, gamma=0.0, dtype=torch.float32)
        seconds.append(planned.phases["refine"].seconds)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source_folder, target_folder)]
    source, target = (sum(isinstance(m, torch.nn.Linear) for m in model.modules()) for model in models)
    assert seconds[0] < 1e-9
    assert seconds[1] > source + 2 * target  # the source forward, the target forward and back


def test_gradient_checkpointing_takes_another_forward_pass(source_folder, lora_folder, target_folder):
    options = {"on": SLOW, "steps": 4, "max_length": 128}
    plain, saving = (
        plan(
            source_folder, lora_folder, target_folder, training_args={"gradient_checkpointing": on}, **options
        ).phases["refine"]
        for on in (False, True)
    )
    assert saving.flops > 1.1 * plain.flops


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


def test_quantized_weights_take_their_bits(source_folder, lora_folder, target_folder):
    whole, quantized = (
        plan(source_folder, lora_folder, target_folder, on=SLOW, dtype=torch.float32, weight_bits=bits)
        for bits in (None, 4)
    )
    target = AutoModelForCausalLM.from_pretrained(target_folder)
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


def test_a_70b_model_is_planned_in_seconds_without_its_weights(tmp_path, lora_folder, source_folder):
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
    planned = plan(source_folder, lora_folder, llama, on="h100", batch_size=1, max_length=128)
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


def test_is_json_ready_and_readable(source_folder, lora_folder, target_folder):
    planned = plan(None, lora_folder, target_folder, on="a100", steps=7)
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
    foreign = make_lora(tiny_model("llama", 300, hidden_size=64), tmp_path / "foreign")
    with pytest.raises(ValueError, match="does not fit|shape"):
        plan(source_folder, foreign, target_folder, on="h100")
