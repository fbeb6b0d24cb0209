"""The tuner: what PEFT loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import KERNELS
from conftest import ALL_LINEAR, tiny_model
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_cast import CastConfig, CastLayer, KernelSpec
from peft_cast.tuner.layer import Kernel
from peft_cast.tuner.projection import Projection


INPUTS = torch.arange(3, 17).reshape(2, 7)


def random_cast(model, adapter_name="default", seed=3, **options):
    """A CAST adapter with random projections, so that it does something."""
    torch.manual_seed(seed)
    options = options or {"kernels": KERNELS}
    return get_peft_model(model, CastConfig(init_weights=False, **options), adapter_name=adapter_name).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUTS).logits


def kernels_of(model):
    return {
        name: tensor.clone()
        for name, tensor in model.named_buffers()
        if "peft_cast_" in name and name.endswith((".A", ".B"))
    }


def test_fresh_adapter_is_a_no_op_that_can_learn():
    model = tiny_model()
    before = logits(model)
    model = get_peft_model(model, CastConfig(target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits(model), before)
    kernel = model.get_base_model().model.layers[0].self_attn.q_proj.peft_cast_kernels["default"][0]
    A, B = kernel.factors()
    torch.testing.assert_close(A, kernel.A)  # P_in is the identity where it counts
    assert not B.any() and kernel.B.any()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=INPUTS, labels=INPUTS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_fresh_adapter_where_the_target_is_wider_than_it_is_high():
    model = get_peft_model(tiny_model(), CastConfig(target_modules=["down_proj"], projection_type="full"))
    kernel = model.get_base_model().model.layers[0].mlp.down_proj.peft_cast_kernels["default"][0]
    assert torch.equal(kernel.P_in.W, torch.eye(48)) and not kernel.P_out.W.any()


@pytest.mark.parametrize(
    "projection",
    [{}, {"projection_size": 2}, {"projection_size": 9}, {"projection_type": "full"}, {"projection_type": "compact"}],
)
def test_forward_equals_the_formula(projection):
    model = random_cast(tiny_model(), kernels=KERNELS, **projection)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 32)
    expected = x @ layer.base_layer.weight.T
    for kernel in layer.peft_cast_kernels["default"]:
        if projection.get("projection_type") == "full":
            P_in, P_out = kernel.P_in.W, kernel.P_out.W
        elif kernel.P_in.compact:
            P_in = torch.linalg.pinv(kernel.A) @ kernel.P_in.C @ kernel.P_in.V
            P_out = kernel.P_out.U @ kernel.P_out.C @ torch.linalg.pinv(kernel.B)
        else:
            P_in, P_out = kernel.P_in.U @ kernel.P_in.V, kernel.P_out.U @ kernel.P_out.V
        assert P_in.shape == (24, 32) and P_out.shape == (32, 20)
        expected = expected + kernel.spec.scaling * (x @ P_in.T @ kernel.A.T @ kernel.B.T @ P_out.T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("projection", [{}, {"projection_type": "full"}])
def test_merged_equals_unmerged(projection):
    model = random_cast(tiny_model(), kernels=KERNELS, **projection)
    with_adapter = logits(model)
    with model.disable_adapter():
        without = logits(model)
    assert (with_adapter - without).abs().max() > 0.1
    model.merge_adapter()
    torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), with_adapter, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, CastLayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), with_adapter, rtol=1e-4, atol=1e-4)


def test_safe_merge_refuses_nan():
    model = random_cast(tiny_model())
    model.get_base_model().model.layers[0].self_attn.q_proj.peft_cast_kernels["default"][0].P_in.V.data[0, 0] = (
        torch.nan
    )
    before = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight, before)


def test_unload_gives_the_base_model_back():
    model = tiny_model()
    before = logits(model)
    assert torch.equal(logits(random_cast(model).unload()), before)


def kernel_between(spec, size):
    """A kernel on a target module of width 32 → 16."""
    P_in, P_out = (
        Projection(32, spec.in_features, size, CastConfig()),
        Projection(spec.out_features, 16, size, CastConfig()),
    )
    return Kernel(spec, P_in, P_out, 16)


def test_exact_fold_for_every_inner_size_that_suffices():
    torch.manual_seed(0)
    kernel = kernel_between(KernelSpec(4, 24, 20, 2.0), size=4)
    kernel.reset_parameters()
    wanted_in, wanted_out = torch.randn(4, 32), torch.randn(16, 4)
    kernel.set_effective(wanted_in, wanted_out)
    A, B = kernel.factors()
    torch.testing.assert_close(A, wanted_in, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B, 2.0 * wanted_out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "at"),
    [
        ([4, 12], range(4, 12)),
        ([2, 4, 8], [2, 3, 10, 11, 18, 19, 26, 27]),  # of every 8 rows
        ([0, 8, 8], range(32)),
    ],
)
@pytest.mark.parametrize(
    "projection", [{}, {"projection_type": "full"}, {"projection_type": "mlp", "projection_bias": True}]
)
def test_a_kernel_lands_on_its_rows_alone(rows, at, projection, tmp_path):
    base = tiny_model()
    name, at = "model.layers.0.self_attn.q_proj", list(at)
    spec = {"r": 4, "in_features": 24, "out_features": 20, "scaling": 2.0}
    model = random_cast(base, kernels={name: [{**spec, "rows": rows}, {**spec, "r": 2}]}, **projection)
    layer = model.get_base_model().get_submodule(name)
    kernel, whole = layer.peft_cast_kernels["default"]
    assert kernel.P_out.out_features == len(at) and whole.P_out.out_features == 32
    for parameter in layer.peft_cast_kernels.parameters():
        parameter.data.normal_(std=0.3)
    x = torch.randn(3, 32)
    delta = kernel(x)
    others = [i for i in range(32) if i not in at]
    assert not delta[:, others].any() and delta[:, at].all()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + delta + whole(x))
    config = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=list))
    assert config["kernels"][name][0]["rows"] == [*rows, *([None] if len(rows) == 2 else [])]
    model.save_pretrained(tmp_path)
    expected = logits(model)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected)
    if not projection.get("projection_bias"):
        A, B = kernel.factors()
        torch.testing.assert_close(x @ A.T @ B.T, delta)
        torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [[0, 33], [4, 4], [0, 9, 8], [0, 4, 12]])
def test_rows_that_the_module_does_not_have_are_one_clear_error(rows):
    spec = {"r": 4, "in_features": 24, "out_features": 20, "rows": rows}
    with pytest.raises(ValueError, match=r"made for the rows .* that has 32 here: load the model"):
        random_cast(tiny_model(), kernels={"model.layers.0.self_attn.q_proj": [spec]})


def test_too_small_inner_size_is_the_best_low_rank_fit():
    torch.manual_seed(0)
    kernel = kernel_between(KernelSpec(4, 24, 20), size=2)
    kernel.reset_parameters()
    wanted = torch.randn(4, 32)
    kernel.set_effective(wanted, torch.randn(16, 4))
    best = torch.linalg.svdvals(wanted)[2:].square().sum().sqrt()
    torch.testing.assert_close((kernel.factors()[0] - wanted).norm(), best, rtol=1e-4, atol=1e-5)


def test_save_then_load_in_a_fresh_process_gives_identical_logits(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    model = random_cast(base)
    torch.save(logits(model), tmp_path / "logits.pt")
    model.save_pretrained(tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    script = f"""
import torch, peft_cast
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(r"{tmp_path / "base"}")
model = PeftModel.from_pretrained(model, r"{tmp_path / "adapter"}")
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 17).reshape(2, 7)).logits
assert torch.equal(logits, torch.load(r"{tmp_path / "logits.pt"}"))
print("identical")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "identical", done.stderr


def test_auto_peft_model_and_config_round_trip(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = type(tiny_model()).from_pretrained(tmp_path / "base")
    model = random_cast(base, kernels=KERNELS, source_adapter_name_or_path="user/lora", source_adapter_revision="abc")
    model.peft_config["default"].task_type = "CAUSAL_LM"
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    config = loaded.peft_config["default"]
    assert config.kernels["model.layers.0.self_attn.q_proj"][1] == KernelSpec(2, 24, 20, 0.5, "h.1.q")
    assert (config.source_adapter_name_or_path, config.source_adapter_revision) == ("user/lora", "abc")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_adapter_with_meta_weights(tmp_path, low_cpu_mem_usage):
    model = random_cast(tiny_model())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)


def test_two_adapters_stay_apart(tmp_path):
    first = random_cast(tiny_model(), seed=3)
    second = random_cast(tiny_model(), seed=4, kernels={k: v[:1] for k, v in KERNELS.items()}, projection_size=2)
    expected = logits(first), logits(second)
    second.save_pretrained(tmp_path)
    first.load_adapter(tmp_path, adapter_name="second")
    assert torch.equal(logits(first), expected[0])
    first.set_adapter("second")
    assert torch.equal(logits(first), expected[1])
    first.set_adapter("default")
    assert torch.equal(logits(first), expected[0])
    first.delete_adapter("default")
    first.set_adapter("second")
    assert torch.equal(logits(first), expected[1])
    assert not any(".default" in name for name in first.state_dict())


def test_beside_a_lora_on_the_same_model(tmp_path):
    model = random_cast(tiny_model())
    model.save_pretrained(tmp_path)
    expected = logits(model)
    fresh = get_peft_model(tiny_model(), LoraConfig(target_modules=ALL_LINEAR))
    loaded = PeftModel.from_pretrained(fresh.unload(), tmp_path)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_kernels_never_train(tmp_path, is_trainable):
    random_cast(tiny_model()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=is_trainable)
    model.set_adapter("default")
    for flagged in (model, model.get_base_model()):
        flagged.requires_grad_(True)
    before = kernels_of(model)
    assert len(before) == 6
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    optimizer.step()
    after = kernels_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_gradients_only_in_projections(tmp_path):
    random_cast(tiny_model()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    with_gradient = {".".join(name.split(".")[-2:]) for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"P_in.U", "P_in.V", "P_out.U", "P_out.V"}
    assert all("peft_cast_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_kernels_keep_their_bits_on_a_half_precision_model(tmp_path):
    model = random_cast(tiny_model())
    before = kernels_of(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model().to(torch.bfloat16), tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in kernels_of(loaded).items())
    assert logits(loaded).dtype == torch.bfloat16


def test_autocast_decides_in_what_the_adapter_is_multiplied():
    model = random_cast(tiny_model(dtype=torch.bfloat16))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, layer.in_features, dtype=torch.bfloat16)
    exact = layer.delta(x, "default").detach()
    with torch.autocast("cpu", torch.bfloat16):
        fast = layer.delta(x, "default")
    assert exact.dtype == torch.float32 and fast.dtype == torch.bfloat16
    torch.testing.assert_close(fast.float(), exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))


def test_cached_factors_follow_every_change():
    model = random_cast(tiny_model()).requires_grad_(False)
    before = logits(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    kernel = layer.peft_cast_kernels["default"][0]
    assert layer.get_factors("default")[0] is layer.get_factors("default")[0]
    with torch.no_grad():
        kernel.P_out.U.mul_(2)
    assert (logits(model) - before).abs().max() > 1e-3
    with torch.no_grad():
        kernel.P_out.U.div_(2)
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("kind", [{"fused": True}, {"foreach": True}])
def test_training_is_seen_by_the_next_evaluation(kind):
    model = random_cast(tiny_model())
    frozen_before = logits(model.requires_grad_(False))
    model.set_adapter("default")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, **kind)
    before = logits(model)  # evaluated between two steps, as Trainer does
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    optimizer.step()
    after = logits(model)
    assert torch.equal(before, frozen_before) and (after - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(model.requires_grad_(False)), after)


def test_a_base_module_whose_name_contains_the_word_cast_is_left_alone(tmp_path):
    class Forecaster(nn.Module):
        def __init__(self):
            super().__init__()
            self.forecast_head = nn.ModuleDict({"default": nn.Linear(4, 4), "peft": nn.Linear(4, 4)})

        def forward(self, x):
            return self.forecast_head["peft"](self.forecast_head["default"](x))

    model = get_peft_model(Forecaster(), CastConfig(target_modules=["peft"], r=2))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert len(keys) == 6 and all(".peft.peft_cast_kernels.0." in key for key in keys)
    model.add_adapter("other", CastConfig(target_modules=["peft"], r=2))
    model.delete_adapter("other")
    assert set(model.base_model.model.forecast_head["peft"].peft_cast_kernels) == {"default"}


def test_adapter_for_another_model_is_one_clear_error(tmp_path):
    model = random_cast(tiny_model())
    model.peft_config["default"].base_model_name_or_path = "user/right-model"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has shape .* this model needs .* 'user/right-model'"):
        PeftModel.from_pretrained(tiny_model(hidden_size=40), tmp_path)
    with pytest.raises(ValueError, match=r"kernel for 'model.layers.2.mlp.down_proj'.*'user/right-model'"):
        PeftModel.from_pretrained(tiny_model(num_hidden_layers=2), tmp_path)


def test_incomplete_adapter_file_is_one_clear_error(tmp_path):
    random_cast(tiny_model()).save_pretrained(tmp_path)
    path = Path(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(key for key in tensors if key.endswith(".B")))
    save_file(tensors, path)
    with pytest.raises(ValueError, match="lacks the tensor .*B"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "`r` must be a positive integer"),
        ({"projection_type": "thin"}, "must be 'factored', 'compact', 'full' or 'mlp'"),
        ({"projection_size": 0}, "`projection_size` must be a positive integer"),
        ({"projection_type": "full", "projection_size": 4}, "no meaning"),
        ({"projection_type": "compact", "projection_sharing": "all"}, "cannot be shared"),
        ({"kernels": {}}, "at least one target module"),
        ({"kernels": {"a": [{"r": -1, "in_features": 2, "out_features": 2}]}}, "`r` of a kernel"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
    ],
)
def test_config_refuses_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        CastConfig(**options)


def test_target_module_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="for which `kernels` has no entry"):
        get_peft_model(tiny_model(), CastConfig(kernels=KERNELS, target_modules=["q_proj", "down_proj"]))


def test_config_is_plain_json(tmp_path):
    random_cast(tiny_model()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "CAST"
    assert config["kernels"]["model.layers.2.mlp.down_proj"][0]["in_features"] == 60
