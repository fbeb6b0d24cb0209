"""Quantized target models, as for LoRA. The packages are optional: bitsandbytes, torchao, hqq. docs/peft.md."""

import warnings

import pytest
import torch
from adapters import cast_config, differs, logits, lora_config, same, without_adapter
from conftest import c4_texts, tiny_model
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import peft_cast
from peft_cast import CastLayer
from peft_cast.tuner import quantized


KERNELS = {
    "model.layers.0.self_attn.q_proj": [{"r": 4, "in_features": 24, "out_features": 20}],
    "model.layers.1.mlp.down_proj": [{"r": 3, "in_features": 60, "out_features": 24}],
}
INPUTS = torch.arange(3, 24).reshape(3, 7)


def bitsandbytes_8bit(model, folder):
    pytest.importorskip("bitsandbytes")
    return load(model, folder, BitsAndBytesConfig(load_in_8bit=True))


def bitsandbytes_4bit(model, folder):
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return load(model, folder, BitsAndBytesConfig(load_in_4bit=True, **options))


def torchao_int8(model, folder):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return load(model, folder, TorchAoConfig(Int8WeightOnlyConfig()))


def hqq_8bit(model, folder):
    """transformers 5.23 cannot quantize with hqq, so the layers are replaced by hand."""
    pytest.importorskip("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, last = name.rpartition(".")
            small = HQQLinear(
                module, BaseQuantizeConfig(nbits=8, group_size=8), compute_dtype=torch.float32, device="cpu"
            )
            setattr(model.get_submodule(parent), last, small)
    return model


# How large the rounding errors of the weights may be, relative to the weights.
BACKENDS = {bitsandbytes_8bit: 0.02, bitsandbytes_4bit: 0.2, torchao_int8: 0.02, hqq_8bit: 0.02}


def load(model, folder, config):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.__name__)
def backend(request):
    return request.param


@pytest.fixture
def target(backend, tmp_path):
    def make():
        model = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=2)
        return backend(model, tmp_path)

    return make


def layers(model):
    return [module for module in model.modules() if isinstance(module, CastLayer)]


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def weight(layer):
    return layer.get_base_weight().detach().float().clone()


def test_forward_and_loading(target, tmp_path):
    model = get_peft_model(target(), cast_config(kernels=KERNELS)).eval()
    adapted, base = logits(model), without_adapter(model)
    assert differs(adapted, base, 0.1) and torch.equal(base, logits(target()))
    for layer in layers(model):
        assert layer.quantization_backend is not None and "quantization_backend=" in repr(layer)
        assert layer.peft_cast_kernels["default"][0].P_in.U.dtype == torch.float32
        x = torch.randn(4, layer.in_features)
        same(layer(x) - layer.base_layer(x), layer.delta(x, "default"), 1e-3)
    mixed = logits(model, adapter_names=["default", "__base__", "default"])
    same(mixed[1], base[1], 0.05)
    same(mixed[[0, 2]], adapted[[0, 2]], 0.05)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(target(), tmp_path / "adapter")
    same(logits(loaded), adapted)


def test_projections_train(target):
    model = get_peft_model(target(), cast_config(kernels=KERNELS))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=INPUTS, labels=INPUTS).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3


def test_dynamic_activations_pass_no_gradient(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    for config in (cast_config(kernels=KERNELS), lora_config(target_modules=list(KERNELS))):
        base = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=2)
        model = get_peft_model(load(base, tmp_path, TorchAoConfig(Int8DynamicActivationInt8WeightConfig())), config)
        model(input_ids=INPUTS, labels=INPUTS).loss.backward()
        trained = {name.split(".layers.")[1][0]: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert trained["0"] is None and trained["1"] is not None


def test_merging_quantizes_anew(target, backend):
    tolerance = BACKENDS[backend]
    model = get_peft_model(target(), cast_config(kernels=KERNELS)).eval()
    before = [weight(layer) for layer in layers(model)]
    changed = [old + layer.get_delta_weight("default").detach() for old, layer in zip(before, layers(model))]
    kinds = [type(layer.base_layer) for layer in layers(model)]
    with pytest.warns(UserWarning, match="rounds them once more"):
        model.merge_adapter(safe_merge=True)
    for layer, old, new in zip(layers(model), before, changed):
        assert relative(weight(layer), new) < tolerance < relative(weight(layer), old)
    assert [type(layer.base_layer) for layer in layers(model)] == kinds
    model.unmerge_adapter()
    for layer, old in zip(layers(model), before):
        assert relative(weight(layer), old) < 2 * tolerance
    plain = model.merge_and_unload()
    assert type(plain.get_submodule("model.layers.0.self_attn.q_proj")) is kinds[0]
    assert not layers(plain) and torch.isfinite(logits(plain)).all()
    assert differs(logits(plain), logits(target()), 0.1)


def test_merging_after_inference_is_right_or_refused(target, backend):
    model = get_peft_model(target(), cast_config(kernels=KERNELS)).eval()
    changed = [weight(layer) + layer.get_delta_weight("default").detach() for layer in layers(model)]
    before = logits(model)
    if quantized.is_packed(layers(model)[0].base_layer):
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="reordered the 4-bit weights .* merge before it is first used"):
                merge()
        assert torch.equal(logits(model), before)
        model.train()(input_ids=INPUTS, labels=INPUTS).loss.backward()
        assert not any(p.grad is not None and p.grad.any() for p in layers(model)[0].parameters())
    else:
        model.merge_adapter()
        for layer, new in zip(layers(model), changed):
            assert relative(weight(layer), new) < BACKENDS[backend]


def test_nonlinear_adapters_do_not_merge_but_work(target):
    model = get_peft_model(target(), cast_config(kernels=KERNELS, projection_type="mlp")).eval()
    before = logits(model)
    with pytest.raises(ValueError, match="nonlinear projections"):
        model.merge_adapter()
    same(logits(model), before)


def test_translation_onto_a_quantized_target(backend, source_folder, lora_folder, piece_tokenizer, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    options = {
        "text": c4_texts(24),
        "fit_samples": 16,
        "eval_samples": 4,
        "batch_size": 4,
        "max_length": 64,
        "steps": 2,
        "progress": False,
        "target_tokenizer": piece_tokenizer,
    }

    def target():
        return tiny_model("gemma3", len(piece_tokenizer), seed=5, **sizes)

    exact = peft_cast.translate(source_folder, lora_folder, target(), **options)
    result = peft_cast.translate(source_folder, lora_folder, backend(target(), tmp_path / "base"), **options)
    assert all(layer.quantization_backend is not None for layer in layers(result.model))
    for layer, other in zip(layers(result.model), layers(exact.model)):
        for mine, theirs in zip(layer.get_factors("default"), other.get_factors("default")):
            # the fit saw nearly the same model, so it is nearly the same
            assert torch.isfinite(mine).all()
            assert torch.cosine_similarity(mine.flatten(), theirs.flatten(), 0) > 0.7
    result.save_pretrained(tmp_path / "cast")
    reloaded = PeftModel.from_pretrained(target(), tmp_path / "cast")
    assert differs(logits(reloaded), without_adapter(reloaded))


def test_torchao_weights_without_a_recipe_work_but_do_not_merge():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = tiny_model()
    quantize_(base, Int8WeightOnlyConfig())
    model = get_peft_model(base, cast_config(target_modules=["q_proj"], r=4)).eval()
    assert differs(logits(model), without_adapter(model))
    with pytest.raises(
        ValueError, match="cannot be merged into torchao layers, whose weights PEFT cannot quantize again"
    ):
        model.merge_adapter()


class Packed(nn.Module):
    """A quantized linear layer of a package that is not here (GPTQ, AWQ, AQLM, EETQ, ...): no nn.Linear, no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 32).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 32)


def packed_model():
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed(layer.self_attn.q_proj)
    return model


def test_layers_of_a_package_that_is_missing_are_named_with_a_remedy():
    with pytest.raises(ValueError, match=r"cannot adapt 'model.layers.0.self_attn.q_proj', a .*Packed: .*install"):
        get_peft_model(packed_model(), cast_config(target_modules=["q_proj"], r=4))


def test_layers_that_peft_only_runs_forward_work_but_do_not_merge(monkeypatch):
    def resolve(layer, **kwargs):  # as PEFT's does where gptqmodel is installed
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, Packed) else None

    monkeypatch.setattr(quantized, "resolve_quantization_backend", resolve)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT does not know the class
        model = get_peft_model(packed_model(), cast_config(target_modules=["q_proj", "v_proj"], r=4)).eval()
    before = logits(model)
    assert differs(before, without_adapter(model))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into gptq layers"):
            merge()
    assert not any(layer.merged for layer in layers(model)) and torch.equal(logits(model), before)
    assert sum(not p.requires_grad for p in model.parameters()) > 0
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    base = without_adapter(model.eval())
    plain = model.unload()
    assert isinstance(plain.model.layers[0].self_attn.q_proj, Packed) and torch.equal(logits(plain), base)
