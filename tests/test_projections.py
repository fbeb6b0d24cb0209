"""Projections beyond the default ones: nonlinear, with biases, shared between modules."""

import pytest
import torch
import torch.nn.functional as F
from adapters import KERNELS, stirred
from conftest import c4_texts, tiny_model
from peft import PeftModel
from test_tuner import logits, random_cast

import peft_cast
from peft_cast import CastConfig
from peft_cast.tuner.layer import CastLayer


OPTIONS = {
    "mlp": {"projection_type": "mlp"},
    "bias": {"projection_bias": True},
    "mlp and bias": {"projection_type": "mlp", "projection_bias": True, "projection_size": 5},
    "compact and bias": {"projection_type": "compact", "projection_bias": True, "projection_size": 2},
    "full and bias": {"projection_type": "full", "projection_bias": True},
}
SHARED = {
    "layer, full": {"projection_sharing": "layer", "projection_type": "full"},
    "all, full": {"projection_sharing": "all", "projection_type": "full"},
    "all, factored": {"projection_sharing": "all", "projection_size": 20},
}


def q_proj(model, layer=0):
    return model.get_base_model().model.layers[layer].self_attn.q_proj


def project(P, x, kernel):
    if P.compact:  # `U = A⁺ C` before the kernel, `V = C B⁺` after it
        y = (
            x
            @ (
                torch.linalg.pinv(kernel.A) @ P.C @ P.V
                if P is kernel.P_in
                else P.U @ P.C @ torch.linalg.pinv(kernel.B)
            ).T
        )
    else:
        y = F.linear(x, P.W if P.full else P.U @ P.V)
    if P.nonlinear:
        y = y + F.gelu(x @ P.mlp_V.T) @ P.mlp_U.T
    return y if P.bias is None else y + P.bias


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_is_the_formula(name):
    model = stirred(random_cast(tiny_model(), kernels=KERNELS, **OPTIONS[name]), 11)
    layer, x = q_proj(model), torch.randn(2, 5, 32)
    expected = layer.base_layer(x)
    for kernel in layer.peft_cast_kernels["default"]:
        through = project(kernel.P_in, x, kernel) @ kernel.A.T @ kernel.B.T
        expected = expected + kernel.spec.scaling * project(kernel.P_out, through, kernel)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*OPTIONS, *SHARED])
def test_saved_and_loaded(name, tmp_path):
    model = stirred(random_cast(tiny_model(), kernels=KERNELS, **{**OPTIONS, **SHARED}[name]), 11)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path, low_cpu_mem_usage=low_memory)
        torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_no_lora_is_neither_merged_nor_converted(name):
    model = stirred(random_cast(tiny_model(), kernels=KERNELS, **OPTIONS[name]), 11)
    before, weight = logits(model), q_proj(model).base_layer.weight.clone()
    for merge in (model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(ValueError, match="nonlinear projections or biases"):
            merge()
        torch.testing.assert_close(logits(model), before)
        assert torch.equal(q_proj(model).base_layer.weight, weight)
    assert not model.supports_lora_conversion()


def test_nonlinear_parts_and_biases_start_as_nothing():
    plain, extended = (random_cast(tiny_model(), kernels=KERNELS, **o) for o in ({}, OPTIONS["mlp and bias"]))
    for kernel, other in zip(*(q_proj(m).peft_cast_kernels["default"] for m in (plain, extended))):
        other.A.copy_(kernel.A), other.B.copy_(kernel.B)
        other.set_effective(torch.randn(kernel.spec.r, 32), torch.randn(32, kernel.spec.r))
        kernel.set_effective(other.P_in.after(other.A), other.P_out.before(other.B))
    x = torch.randn(3, 32)
    torch.testing.assert_close(q_proj(extended)(x), q_proj(plain)(x), rtol=1e-4, atol=1e-4)


def projections_of(model):
    """Distinct projections by whose module they serve."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, CastLayer):
            found[name] = [P for kernel in module.peft_cast_kernels["default"] for P in (kernel.P_in, kernel.P_out)]
    return found


@pytest.mark.parametrize("sharing", [None, "layer", "all"])
def test_who_shares(sharing):
    size = {"projection_size": 16} if sharing else {}
    options = {"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"]}
    model = random_cast(tiny_model(), projection_sharing=sharing, **options, **size)
    by_module = projections_of(model)
    assert len(by_module) == 18
    found = {id(P) for projections in by_module.values() for P in projections}
    shapes = {(side, P.in_features, P.out_features) for Ps in by_module.values() for side, P in zip(("in", "out"), Ps)}
    per_scope = len(shapes)
    assert len(found) == {None: 36, "layer": 3 * per_scope, "all": per_scope}[sharing]


def test_two_adapters_share_nothing():
    model = random_cast(tiny_model(), kernels=KERNELS, **SHARED["all, full"])
    before = logits(model)
    model.add_adapter("other", CastConfig(kernels=KERNELS, init_weights=False, **SHARED["all, full"]))
    first, second = (q_proj(model).peft_cast_kernels[name][0].P_in for name in ("default", "other"))
    assert first is not second
    with torch.no_grad():
        second.W.zero_()
    torch.testing.assert_close(logits(model), before)


def test_shared_projections_are_set_for_all_their_kernels_at_once():
    torch.manual_seed(0)
    P = peft_cast.tuner.Projection(10, 30, 12, CastConfig())
    A, wanted = torch.randn(12, 30), torch.randn(12, 10)  # three kernels of rank 4
    P.set_after(A, wanted)
    torch.testing.assert_close(P.after(A), wanted, rtol=1e-3, atol=1e-4)
    Q = peft_cast.tuner.Projection(10, 30, 12, CastConfig(projection_type="full"))
    A, wanted = torch.randn(50, 30), torch.randn(50, 10)  # more than fit: least squares
    Q.set_after(A, wanted)
    torch.testing.assert_close(Q.W, torch.linalg.lstsq(A, wanted).solution, rtol=1e-3, atol=1e-4)


def test_shared_thin_projections_need_a_size():
    with pytest.raises(ValueError, match="pass `projection_size`"):
        CastConfig(projection_sharing="layer")
    with pytest.raises(ValueError, match="must be 'layer' or 'all' or null"):
        CastConfig(projection_sharing="model", projection_size=8)


@pytest.mark.parametrize("name", [*OPTIONS, *SHARED])
def test_translations_train_them(name, source_folder, lora_folder, target_folder):
    result = peft_cast.translate(
        source_folder,
        lora_folder,
        target_folder,
        text=c4_texts(24),
        steps=12,
        batch_size=4,
        fit_samples=8,
        max_length=48,
        learning_rate=0.05,
        progress=False,
        **{**OPTIONS, **SHARED}[name],
    )
    kl = result.metrics["kl"]
    assert kl["translated"] < min(kl["closed_form"], kl["target"])
    if name in OPTIONS:
        moved = [p for n, p in result.model.named_parameters() if n.endswith(("mlp_U", "bias")) and "peft_cast_" in n]
        assert moved and all(p.abs().max() > 0 for p in moved)
