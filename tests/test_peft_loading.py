"""Loading, precision, training and transformers' own adapter methods, as for LoRA. docs/peft.md lists the promises."""

import copy
import pickle

import pytest
import torch
import transformers
from adapters import (
    ARCHITECTURES,
    DOWN_PROJ,
    INPUTS,
    KERNELS,
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
    stirred,
    two_adapters,
    with_adapter,
    without_adapter,
)
from conftest import tiny_config
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter

from peft_cast import CastConfig, CastLayer


PROJECTIONS = {**LINEAR, **NONLINEAR}


def projections(model):
    return {name: p for name, p in model.named_parameters() if "peft_cast_" in name}


def kernels(model):
    return {name: b for name, b in model.named_buffers() if "peft_cast_" in name}


def gradients(model, train=True):
    model.train(train)
    model.zero_grad()
    model(input_ids=INPUTS, labels=INPUTS).loss.backward()
    return {name: p.grad.clone() for name, p in projections(model).items() if p.requires_grad}


@pytest.mark.parametrize("safe_serialization", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_saved_and_loaded(projection, low_cpu_mem_usage, safe_serialization, tmp_path):
    model = cast(**PROJECTIONS[projection])
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    file = "adapter_model.safetensors" if safe_serialization else "adapter_model.bin"
    assert (tmp_path / file).exists()
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "torch_device": "cpu"}
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, **options)
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, "again", **options)
    assert torch.equal(with_adapter(loaded, "again"), logits(model))
    assert len(projections(loaded)) == 2 * len(projections(model))  # what is shared stays shared


def test_created_on_the_meta_device_and_filled_from_a_file():
    model = cast()
    state = get_peft_model_state_dict(model)
    empty = get_peft_model(base_model(), cast_config(9), low_cpu_mem_usage=True).eval()
    assert {p.device.type for p in projections(empty).values()} == {"meta"}
    set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True)
    assert torch.equal(logits(empty), logits(model))


def test_auto_classes(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, cast_config(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("projection", ["factored", "mlp"])
def test_half_precision_models(dtype, autocast, projection, tmp_path):
    model = cast(**PROJECTIONS[projection])
    model.save_pretrained(tmp_path)
    options = {"autocast_adapter_dtype": autocast, "is_trainable": True}
    half = PeftModel.from_pretrained(base_model().to(dtype), tmp_path, **options).eval()
    expected = torch.float32 if autocast else dtype
    assert {t.dtype for t in (*projections(half).values(), *kernels(half).values())} == {expected}
    result = logits(half)
    assert result.dtype == dtype
    same(result.float(), logits(model), 0.3)
    assert all(gradient.dtype == expected and gradient.any() for gradient in gradients(half).values())


@pytest.mark.parametrize("projection", ["factored", "mlp", "shared"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant, projection):
    model = cast(**PROJECTIONS[projection])
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    got = gradients(model)
    assert len(got) >= 4 and all(gradient.any() for gradient in got.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("projection", ["factored", "full", "mlp"])
def test_torch_compile_without_graph_breaks(projection, frozen):
    model = cast(**PROJECTIONS[projection])
    if frozen:
        model.requires_grad_(False)
    expected = logits(model)
    torch._dynamo.reset()
    module, x = layer(model), torch.randn(2, 5, 32)
    same(torch.compile(module, fullgraph=True, backend="eager")(x), module(x), 1e-5)
    # Of the whole model it also takes PEFT, transformers and torch: 2.6 with transformers 5.0 breaks the graph.
    whole = Version(torch.__version__) >= Version("2.13")
    same(logits(torch.compile(model, fullgraph=whole, backend="eager")), expected, 1e-5)


def test_compiled_model_follows_changes_of_a_frozen_adapter():
    model = cast().requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    before = logits(compiled)
    projections(model)[f"base_model.model.{Q_PROJ}.peft_cast_kernels.default.0.P_out.U"].data.mul_(3.0)
    same(logits(compiled), logits(model), 1e-5)
    assert differs(logits(compiled), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_copies_and_pickles_live_on_their_own(projection, copied):
    model = cast(**PROJECTIONS[projection]).requires_grad_(False)
    before = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), before)
    assert len(projections(twin)) == len(projections(model))
    with torch.no_grad():
        for parameter in projections(twin).values():
            parameter.mul_(2.0)
    assert differs(logits(twin), before) and torch.equal(logits(model), before)


def test_what_is_trainable(tmp_path):
    def trainable(model):
        return {
            name.split("peft_cast_kernels.")[1].split(".")[0]
            for name, p in projections(model).items()
            if p.requires_grad
        }

    cast().save_pretrained(tmp_path)
    assert trainable(PeftModel.from_pretrained(base_model(), tmp_path)) == set()
    assert trainable(PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)) == {"default"}
    assert trainable(get_peft_model(base_model(), cast_config(inference_mode=True))) == set()
    model = two_adapters()
    assert trainable(model) == {"default"}
    model.set_adapter("other")
    assert trainable(model) == {"other"}
    model.set_adapter("default", inference_mode=True)
    assert trainable(model) == set()
    model.set_requires_grad(["default", "other"])
    assert trainable(model) == {"default", "other"}
    model.set_requires_grad("other", requires_grad=False)
    assert trainable(model) == {"default"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "peft_cast_" not in n)


def test_trainer_steps_and_checkpoints(tmp_path):
    model = get_peft_model(base_model(), CastConfig(kernels=KERNELS, task_type="CAUSAL_LM"))
    frozen = {name: buffer.clone() for name, buffer in kernels(model).items()}
    data = [{"input_ids": row, "labels": row} for row in INPUTS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=3,
        report_to=[],
        save_steps=6,
        logging_steps=1,
        use_cpu=True,
        gradient_checkpointing=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[name], buffer) for name, buffer in kernels(model).items())
    model.eval()
    same(logits(PeftModel.from_pretrained(base_model(), tmp_path / "checkpoint-6")), logits(model))


def test_sequence_classification(tmp_path):
    def classifier():
        torch.manual_seed(0)
        return transformers.LlamaForSequenceClassification(tiny_config("llama", 300, num_labels=3)).eval()

    config = cast_config(task_type="SEQ_CLS")
    model = get_peft_model(classifier(), config).eval()
    assert {n for n, p in model.named_parameters() if p.requires_grad and "score" in n}
    model.base_model.model.score.modules_to_save["default"].weight.data.add_(1.0)
    model.save_pretrained(tmp_path)
    same(logits(PeftModel.from_pretrained(classifier(), tmp_path)), logits(model))


# transformers' own methods, without a PeftModel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_load_adapter(architecture, tmp_path):
    if architecture == "gpt2" and Version(transformers.__version__) < Version("5.6"):
        pytest.skip("older versions load no adapter onto GPT-2, LoRA neither")
    model = cast(architecture)
    model.save_pretrained(tmp_path)
    base = base_model(architecture)
    before = logits(base)
    base.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(base), logits(model)) and base.active_adapters() == ["mine"]
    base.disable_adapters()
    assert torch.equal(logits(base), before)
    base.enable_adapters()
    assert torch.equal(logits(base), logits(model))
    base.delete_adapter("mine")
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_transformers_add_adapter_save_and_load(projection, tmp_path):
    base = base_model()
    base.add_adapter(cast_config(**PROJECTIONS[projection]), "mine")
    stirred(base, 3, "mine")
    base.add_adapter(cast_config(4), "other")
    base.set_adapter("mine")
    expected = logits(base)
    assert {name for name, p in base.named_parameters() if p.requires_grad and ".mine." in name}
    base.save_pretrained(tmp_path)
    loaded = base_model()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), tmp_path)), expected)


def test_transformers_from_pretrained_of_an_adapter_folder(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, cast_config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, transformers.LlamaForCausalLM)
    assert torch.equal(logits(loaded), logits(model))


def test_injected_without_a_peft_model():
    model = inject_adapter_in_model(cast_config(), base_model(), "mine").eval()
    state = get_peft_model_state_dict(model, adapter_name="mine")
    assert set(state) == {key.replace(".mine.", ".") for key in (*projections(model), *kernels(model))}
    base = base_model()
    other = inject_adapter_in_model(cast_config(8), base, "theirs").eval()
    assert differs(logits(other), logits(model))
    assert not set_peft_model_state_dict(other, state, adapter_name="theirs").unexpected_keys
    assert torch.equal(logits(other), logits(model))


# What only LoRA has


def test_mixed_adapter_types_are_refused_by_peft():
    with pytest.raises(ValueError, match="'CAST' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base_model(), cast_config(), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        cast().add_adapter("lora", lora_config())


def test_hot_swapping_is_refused_by_peft(tmp_path):
    model = cast()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but CAST was passed"):
        hotswap_adapter(model, tmp_path, "default")
    base = base_model()
    base.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        base.load_adapter(str(tmp_path), hotswap=True, adapter_name="default")


# Devices


def offloaded_to_disk(folder):
    """The model with its last two layers on disk."""
    base_model().save_pretrained(folder / "base")
    places = dict.fromkeys(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"], "cpu"
    )
    device_map = {**places, "model.layers.1": "disk", "model.layers.2": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=device_map, offload_folder=folder / "offload"
    )
    assert model.model.layers[2].mlp.down_proj.weight.is_meta
    return model


@pytest.mark.parametrize("projection", ["factored", "mlp", "shared"])
def test_a_model_offloaded_to_disk(projection, tmp_path):
    model = cast(**PROJECTIONS[projection])
    expected, base = logits(model), without_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    offloaded = offloaded_to_disk(tmp_path)
    same(logits(offloaded), base)
    loaded = get_peft_model(offloaded, PeftConfig.from_pretrained(tmp_path / "adapter")).eval()
    set_peft_model_state_dict(loaded, load_peft_weights(tmp_path / "adapter"))
    assert offloaded.get_submodule(DOWN_PROJ).base_layer.weight.is_meta
    same(logits(loaded), expected)
    trained = get_peft_model(offloaded_to_disk(tmp_path), cast_config(**PROJECTIONS[projection]))
    assert all(g.any() for name, g in gradients(trained).items() if ".P_out." in name and ".mlp_V" not in name)


def test_what_peft_cannot_load_onto_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes a copy of the weights below the working directory
    cast().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="'model.layers.2.mlp.down_proj' are on disk.*set_peft_model_state_dict"):
        PeftModel.from_pretrained(
            offloaded_to_disk(tmp_path), tmp_path / "adapter", offload_folder=str(tmp_path / "offload")
        )


def test_projections_offloaded_by_accelerate_are_fetched():
    from accelerate import cpu_offload

    for projection in ("factored", "mlp"):
        model = cast(**PROJECTIONS[projection]).requires_grad_(False)
        expected = logits(model)
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        module = next(m for m in model.modules() if isinstance(m, CastLayer))
        assert all(p.is_meta for p in module.parameters())
        same(logits(model), expected)
        same(logits(model), expected)


def test_a_cpu_device_map(tmp_path):
    base_model().save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    same(logits(get_peft_model(base, cast_config())), logits(get_peft_model(base_model(), cast_config())))
