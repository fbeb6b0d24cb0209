"""Several adapters on a model and the choice of modules, as PEFT offers them for LoRA. docs/peft.md lists the
promises.
"""

import pytest
import torch
from adapters import (
    ARCHITECTURES,
    DOWN_PROJ,
    INPUTS,
    KERNELS,
    NONLINEAR,
    Q_PROJ,
    base_model,
    cast,
    cast_config,
    differs,
    layer,
    logits,
    lora_config,
    same,
    two_adapters,
    with_adapter,
    without_adapter,
)
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_cast import CastConfig, CastLayer


def adapted(model):
    return [name for name, module in model.get_base_model().named_modules() if isinstance(module, CastLayer)]


def of_layers(names):
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_adapters_act_alone_and_summed(architecture):
    model = two_adapters(architecture)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    assert differs(logits(model), with_adapter(model, "default"))
    model.base_model.set_adapter(["default", "other"])
    last = [module for module in model.modules() if isinstance(module, CastLayer)][-1]
    x = torch.randn(2, last.in_features)
    same(last(x), last.base_layer(x) + last.delta(x, "default") + last.delta(x, "other"))


def test_deleting_adapters():
    model = two_adapters()
    other, base = with_adapter(model, "other"), without_adapter(model)
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"] and set(model.peft_config) == {"other"}
    assert torch.equal(logits(model), other)
    assert not any(".default." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="default does not exist"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert model.active_adapters == [] and torch.equal(logits(model.base_model), base)
    model.add_adapter("default", cast_config())
    model.set_adapter("default")
    assert differs(logits(model), base)


@pytest.mark.parametrize("config", [cast_config, lora_config], ids=["cast", "lora"])
def test_after_the_last_active_adapter_is_gone_one_must_be_set(config):
    model = get_peft_model(base_model(), config(3, target_modules=["q_proj"], r=4)).eval()
    model.add_adapter("other", config(4, target_modules=["v_proj"], r=4))
    other = with_adapter(model, "other")
    model.delete_adapter("default")  # the first module has no other adapter to activate
    assert model.active_adapters == []
    with pytest.raises(KeyError, match="default"):
        logits(model)
    model.set_adapter("other")
    assert torch.equal(logits(model), other)


def test_deleting_an_inactive_adapter_changes_nothing():
    model = two_adapters()
    before = logits(model)
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "names",
    [
        ("a", "a_b"),
        ("v1", "v10"),
        ("default", "default2"),
        ("q_proj", "self_attn"),
        ("cast", "peft"),
        ("A", "0"),
        ("U", "P_in"),
    ],
)
def test_names_that_contain_each_other_or_parts_of_the_model(names, tmp_path):
    model = two_adapters(names=names)
    expected = {name: with_adapter(model, name) for name in names}
    for name in names:
        model.save_pretrained(tmp_path, selected_adapters=[name])
        folder = tmp_path if name == "default" else tmp_path / name
        for new_name in (name, "default"):
            loaded = PeftModel.from_pretrained(base_model(), folder, adapter_name=new_name)
            assert torch.equal(logits(loaded), expected[name])
    model.delete_adapter(names[0])
    assert torch.equal(with_adapter(model, names[1]), expected[names[1]])


@pytest.mark.parametrize("name", ["with.dot", "keys"])
def test_names_that_torch_cannot_hold_are_refused_before_anything_changes(name):
    model = cast()
    before = logits(model)
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        model.add_adapter(name, cast_config())
    assert set(model.peft_config) == {"default"} and torch.equal(logits(model), before)
    with pytest.raises(KeyError, match=name):
        get_peft_model(base_model(), lora_config(), adapter_name=name)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="'default' already exists"):
        cast().add_adapter("default", cast_config())


@pytest.mark.parametrize(
    ("options", "count", "layers"),
    [
        ({"target_modules": ["q_proj"]}, 3, {0, 1, 2}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, 1, {1}),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}, 4, {0, 2}),
        ({"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"}, 1, {2}),
        ({"target_modules": r".*\.[01]\..*(q|k)_proj"}, 4, {0, 1}),
        ({"target_modules": "all-linear"}, 21, {0, 1, 2}),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, 18, {0, 1, 2}),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, 2, {1, 2}),
        ({"r": 4, "kernels": None, "target_modules": None}, 6, {0, 1, 2}),
    ],
)
def test_choice_of_modules_is_loras(options, count, layers):
    model = get_peft_model(base_model(), CastConfig(**options))
    assert len(adapted(model)) == count and of_layers(adapted(model)) == layers
    options.pop("kernels", None)
    assert adapted(model) == model.base_model.targeted_module_names
    assert set(get_peft_model(base_model(), lora_config(**options)).base_model.targeted_module_names) == set(
        adapted(model)
    )


@pytest.mark.parametrize("config", [CastConfig, lora_config], ids=["cast", "lora"])
def test_modules_that_do_not_exist_are_an_error(config):
    with pytest.raises(ValueError, match="Target modules .*nowhere.* not found"):
        get_peft_model(base_model(), config(target_modules=["nowhere"]))


def test_unsupported_modules_are_named_with_a_remedy():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lin = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)

    with pytest.raises(ValueError, match=r"cannot adapt 'conv', a torch.nn.*Conv2d: .*exclude_modules"):
        get_peft_model(Net(), CastConfig(target_modules=["lin", "conv"], r=2))


def test_an_adapter_on_other_modules_than_the_first():
    model = get_peft_model(base_model(), cast_config(target_modules=["q_proj"], r=4)).eval()
    first = logits(model)
    model.add_adapter("other", cast_config(4, target_modules=["v_proj"], r=4))
    assert torch.equal(logits(model), first)
    assert differs(with_adapter(model, "other"), first)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unload_and_get_base_model(architecture):
    base = base_model(architecture)
    before = logits(base)
    model = get_peft_model(base, cast_config(target_modules="all-linear", r=4))
    assert model.get_base_model() is base and differs(logits(model), before)
    assert torch.equal(logits(model.unload()), before)
    assert not any("peft_cast" in name for name in base.state_dict())


def test_status_and_repr():
    model = two_adapters()
    status = {entry.name: entry for entry in model.get_layer_status()}
    entry = status[f"model.{Q_PROJ}"]
    assert entry.module_type == "cast.Linear" and entry.available_adapters == ["default", "other"]
    assert entry.requires_grad == {"default": True, "other": False} and entry.devices == {
        "default": ["cpu"],
        "other": ["cpu"],
    }
    whole = model.get_model_status()
    assert whole.adapter_model_type == "CastModel" and whole.peft_types == {"default": "CAST", "other": "CAST"}
    assert whole.num_adapter_layers == 2 and whole.active_adapters == ["default"] and whole.enabled is True
    assert whole.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    assert repr(layer(model)).startswith("cast.Linear(\n  (base_layer): Linear(in_features=32")


# Batches whose examples use different adapters


@pytest.mark.parametrize("projection", [{}, *NONLINEAR.values()], ids=["factored", *NONLINEAR])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_example_of_a_batch_has_its_adapter(architecture, projection):
    where = {"target_modules": ["q_proj", "out_proj"]} if architecture == "opt" else {}
    model = two_adapters(architecture, **where, **projection)
    alone = [without_adapter(model)[0], with_adapter(model, "default")[1], with_adapter(model, "other")[2]]
    mixed = logits(model, adapter_names=["__base__", "default", "other"])
    same(mixed, torch.stack(alone))
    assert not any(m._forward_pre_hooks for m in model.modules())
    same(logits(model), with_adapter(model, "default"))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_with_mixed_adapters(num_beams):
    model = two_adapters(names=("default", "other"))
    names = ["other", "__base__", "default"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": num_beams, "pad_token_id": 2}
    mixed = model.generate(input_ids=INPUTS, adapter_names=names, **options)
    rows = []
    for name, row in zip(names, INPUTS):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model.generate(input_ids=row[None], **options)[0])
        else:
            model.set_adapter(name)
            rows.append(model.generate(input_ids=row[None], **options)[0])
    assert torch.equal(mixed, torch.stack(rows))
    assert len({tuple(row[7:].tolist()) for row in rows}) > 1


@pytest.mark.parametrize("config", [cast_config, lora_config], ids=["cast", "lora"])
def test_mixed_batches_are_refused_as_loras_are(config):
    model = get_peft_model(base_model(), config(3)).eval()
    names = ["default"] * 3
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        logits(model, adapter_names=["default", "nobody", "default"])
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same .* got 2 and 3"):
        logits(model, adapter_names=names[:2])
    with pytest.raises(ValueError, match="when the model is in training mode"):
        logits(model.train(), adapter_names=names)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        logits(model, adapter_names=names)


@pytest.mark.parametrize("config", [cast_config, lora_config], ids=["cast", "lora"])
def test_mixed_batches_where_a_module_flattens_them_are_refused(config):
    model = get_peft_model(base_model("opt"), config(3, target_modules=["fc1"], r=4)).eval()
    with pytest.raises(ValueError, match="got 3 and 21 respectively"):
        logits(model, adapter_names=["default"] * 3)


def test_a_failed_mixed_batch_leaves_no_hooks():
    model = cast()
    expected = logits(model)
    with pytest.raises(ValueError, match="Length of"):
        logits(model, adapter_names=["default"])
    with pytest.raises(TypeError, match="must be a list"):
        logits(model, adapter_names="default")
    assert torch.equal(logits(model), expected)


def test_mixed_batches_beside_modules_saved_whole():
    model = get_peft_model(base_model(), cast_config(modules_to_save=["lm_head"])).eval()
    base = logits(model.get_base_model())
    head = model.base_model.model.lm_head
    head.modules_to_save["default"].weight.data.mul_(2.0)
    mixed = logits(model, adapter_names=["__base__", "default", "__base__"])
    same(mixed[1], logits(model)[1])
    same(mixed[[0, 2]], without_adapter(model)[[0, 2]])
    assert differs(mixed[1], base[1])


# Sums of adapters


def weighted(model, weights, names=("default", "other")):
    """What the sum must do to the output of a layer."""
    module = layer(model)
    x = torch.randn(5, 32)
    return x, sum(w * module.delta(x, n) for w, n in zip(weights, names))


SUMS = {
    "factored": ({}, {}),
    "sizes": ({"projection_size": 2}, {"projection_size": 7}),
    "rank and size": ({}, {"projection_size": 3}),
    "compact": ({"projection_type": "compact"}, {"projection_type": "compact", "projection_size": 2}),
    "full": ({"projection_type": "full"}, {"projection_type": "full"}),
    "shared": ({"projection_type": "full", "projection_sharing": "all"}, {"projection_type": "full"}),
    "mlp and factored": ({"projection_type": "mlp"}, {}),
    "bias and none": ({"projection_bias": True}, {"projection_size": 5}),
}


@pytest.mark.parametrize("name", SUMS)
def test_weighted_sums_are_exact(name, tmp_path):
    first, second = SUMS[name]
    model = cast(**first)
    model.add_adapter("other", cast_config(4, **second))
    before = logits(model)
    x, expected = weighted(model, [0.3, -1.7])
    model.add_weighted_adapter(["default", "other"], [0.3, -1.7], "sum")
    same(layer(model).delta(x, "sum"), expected, 1e-5)
    assert torch.equal(logits(model), before) and model.active_adapters == ["default"]
    summed = with_adapter(model, "sum")
    assert differs(summed, before)
    assert len(model.peft_config["sum"].kernels[Q_PROJ]) == 2 * len(KERNELS[Q_PROJ])
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(with_adapter(model, "sum"), summed)  # it holds copies
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path / "sum")), summed)


def test_weighted_sum_of_adapters_on_different_modules():
    first = {Q_PROJ: KERNELS[Q_PROJ]}
    second = {DOWN_PROJ: KERNELS[DOWN_PROJ]}
    model = get_peft_model(base_model(), cast_config(3, kernels=first, source_adapter_name_or_path="one")).eval()
    model.add_adapter("other", cast_config(4, kernels=second, source_adapter_name_or_path="two"))
    both = with_adapter(model, "default", "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    same(with_adapter(model, "sum"), both)
    assert model.peft_config["sum"].source_adapter_name_or_path is None


def test_weighted_sum_of_adapters_on_rows_of_a_fused_module():
    name, shape = "model.layers.1.self_attn.qkv_proj", {"r": 2, "in_features": 24, "out_features": 12}
    first, second = {name: [{**shape, "rows": [0, 32]}]}, {name: [{**shape, "rows": [32, 48]}, shape]}
    model = get_peft_model(base_model("phi3"), cast_config(3, kernels=first)).eval()
    model.add_adapter("other", cast_config(4, kernels=second))
    both = with_adapter(model, "default", "other")
    assert differs(both, without_adapter(model))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    same(with_adapter(model, "sum"), both)


def test_weighted_sum_can_be_trained_and_merged():
    model = two_adapters()
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    expected = logits(model)
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(".sum." in name for name in trained)
    same(logits(model.merge_and_unload()), expected)


def test_sums_that_cannot_be_are_refused():
    model = two_adapters()
    model.add_adapter("full", cast_config(5, projection_type="full"))
    for arguments, message in [
        ((["default", "other"], [1.0, 1.0], "sum", "svd"), "exactly, by `combination_type='cat'`, not by 'svd'"),
        ((["default", "nobody"], [1.0, 1.0], "sum"), "nobody does not exist"),
        ((["default", "other"], [1.0], "sum"), "got 2 adapters and 1 weight\\."),
        ((["default", "other"], [1.0, 1.0], "other"), "'other' already exists"),
        ((["default", "full"], [1.0, 1.0], "sum"), "types factored, full, which no single adapter"),
        ((["default", "other"], [1.0, 1.0], "a.b"), "cannot be called 'a.b'"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default", "other", "full"}


def test_modules_saved_whole(tmp_path):
    model = get_peft_model(base_model(), cast_config(modules_to_save=["lm_head"])).eval()
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.1)
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    same(logits(PeftModel.from_pretrained(base_model(), tmp_path)), logits(model))
    with pytest.raises(ValueError, match="train whole modules"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
