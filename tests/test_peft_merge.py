"""Merging, as PEFT offers it for LoRA: all layers or none. docs/peft.md lists what is promised."""

import pytest
import torch
from adapters import (
    ARCHITECTURES,
    DOWN_PROJ,
    LINEAR,
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

from peft_cast import CastLayer


def weights(model):
    """Base weights of all adapted layers."""
    modules = model.named_modules()
    return {name: m.get_base_layer().weight.detach().clone() for name, m in modules if isinstance(m, CastLayer)}


def spoil(model, name=DOWN_PROJ, adapter="default"):
    layer(model, name).peft_cast_kernels[adapter][0].P_out.U.data[0, 0] = torch.nan


@pytest.mark.parametrize("projection", LINEAR)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merge_unmerge_and_unload(architecture, projection):
    options = dict(LINEAR[projection])
    model = cast(architecture, **options)
    adapted, base = logits(model), without_adapter(model)
    assert differs(adapted, base)
    model.merge_adapter()
    same(logits(model), adapted)
    assert all(m.merged for m in model.modules() if isinstance(m, CastLayer))
    model.unmerge_adapter()
    same(logits(model), adapted)
    same(without_adapter(model), base)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(base_model(architecture))
    assert not any(isinstance(module, CastLayer) for module in merged.modules())
    same(logits(merged), adapted)


def test_merging_several_adapters_and_some_of_them():
    model = two_adapters()
    both = with_adapter(model, "default", "other")
    first, second = with_adapter(model, "default"), with_adapter(model, "other")
    model.merge_adapter(adapter_names=["other"])
    same(logits(model), second)
    with pytest.warns(UserWarning, match="Already following adapters were merged other"):
        model.merge_adapter(adapter_names=["default"])
    assert layer(model).merged_adapters == ["other", "default"]
    same(logits(model), both)
    model.unmerge_adapter()
    same(logits(model), first)
    same(logits(model.merge_and_unload(adapter_names=["default", "other"])), both)


def test_an_adapter_that_is_not_there_is_not_merged_in_silence():
    model = cast()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="no adapter typo to merge: this model has default"):
            merge(adapter_names=["typo"])
    get_peft_model(base_model(), lora_config()).merge_and_unload(adapter_names=["typo"])  # a LoRA user sees no error


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_with_nan_leaves_every_layer_as_it_was(merge):
    model = cast()
    spoil(model)  # in the last layer that is merged
    before = weights(model)
    with pytest.raises(ValueError, match="NaNs detected .* adapter default seems to be broken"):
        getattr(model, merge)(safe_merge=True)
    assert {name: m.merged for name, m in model.named_modules() if isinstance(m, CastLayer)} == dict.fromkeys(
        before, False
    )
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())


def test_a_failed_safe_merge_of_a_lora_leaves_some_layers_merged():
    model = get_peft_model(base_model(), lora_config(target_modules=[Q_PROJ, DOWN_PROJ]))
    layer(model, DOWN_PROJ).lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert layer(model, Q_PROJ).merged and not layer(model, DOWN_PROJ).merged


def test_safe_merge_of_several_adapters_names_the_broken_one():
    model = two_adapters()
    spoil(model, Q_PROJ, "other")
    before = weights(model)
    with pytest.raises(ValueError, match="The adapter other seems"):
        model.merge_adapter(adapter_names=["default", "other"], safe_merge=True)
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())
    model.merge_adapter(adapter_names=["default"], safe_merge=True)


@pytest.mark.parametrize("projection", NONLINEAR)
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_nonlinear_adapters_and_biases_refuse_to_merge_and_stay_usable(projection, merge):
    model = cast()
    model.add_adapter("bent", cast_config(4, **NONLINEAR[projection]))
    linear, bent = logits(model), with_adapter(model, "bent")
    with pytest.raises(ValueError, match="'bent' has nonlinear projections or biases.*use it unmerged"):
        getattr(model, merge)(adapter_names=["default", "bent"])
    assert not any(m.merged for m in model.modules() if isinstance(m, CastLayer))
    assert torch.equal(logits(model), linear) and torch.equal(with_adapter(model, "bent"), bent)
    model.merge_adapter()  # the linear one still can
    same(logits(model), linear)


def test_saving_while_merged_saves_the_adapter_as_it_is(tmp_path):
    model = cast()
    adapted = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    same(logits(PeftModel.from_pretrained(base_model(), tmp_path)), adapted)


def test_disabling_while_merged_unmerges():
    model = cast()
    adapted, base = logits(model), without_adapter(model)
    model.merge_adapter()
    same(without_adapter(model), base)
    same(logits(model), adapted)


@pytest.mark.parametrize("config", [cast_config, lora_config], ids=["cast", "lora"])
def test_loading_deleting_and_switching_while_merged_is_as_with_lora(config, tmp_path):
    model = get_peft_model(base_model(), config(3)).eval()
    model.save_pretrained(tmp_path)
    adapted = logits(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot delete adapter.* while they are merged"):
        model.delete_adapter("default")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.load_adapter(tmp_path, "second")
    same(logits(model), adapted)
    assert not model.get_model_status().merged_adapters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_once(dtype):
    model = get_peft_model(base_model().to(dtype), cast_config())
    model.add_adapter("other", cast_config(4))
    module = layer(model)
    weight = module.base_layer.weight.float()
    exact = weight + module.get_delta_weight("default") + module.get_delta_weight("other")
    model.merge_adapter(["default", "other"])
    assert module.base_layer.weight.dtype == dtype
    assert torch.equal(module.base_layer.weight, exact.to(dtype))
