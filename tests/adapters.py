"""What the tests of PEFT's behaviors share: adapters that do something, on models of several architectures."""

import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model

from peft_cast import CastConfig


INPUTS = torch.arange(3, 24).reshape(3, 7)
ARCHITECTURES = ["llama", "gemma3", "opt", "gpt2"]  # nn.Linear with and without bias, and transformers' Conv1D
LINEAR = {
    "factored": {},
    "small": {"projection_size": 2},
    "compact": {"projection_type": "compact", "projection_size": 3},
    "full": {"projection_type": "full"},
    "shared": {"projection_type": "full", "projection_sharing": "layer"},
}
NONLINEAR = {"mlp": {"projection_type": "mlp"}, "bias": {"projection_bias": True}}
Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"
KERNELS = {
    Q_PROJ: [
        {"r": 4, "in_features": 24, "out_features": 20, "scaling": 2.0, "source_place": "h.0.q"},
        {"r": 2, "in_features": 24, "out_features": 20, "scaling": 0.5, "source_place": "h.1.q"},
    ],
    DOWN_PROJ: [{"r": 3, "in_features": 60, "out_features": 24}],
}


def base_model(architecture: str = "llama"):
    """A model without dropout, so that training mode is repeatable."""
    model = tiny_model(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def cast_config(seed: int = 3, **options) -> CastConfig:
    """A random adapter, its kernels and projections determined by the seed."""
    torch.manual_seed(seed)
    if "target_modules" not in options:
        options = {"kernels": KERNELS, **options}
    return CastConfig(init_weights=False, **options)


def lora_config(seed: int = 3, **options) -> LoraConfig:
    torch.manual_seed(seed)
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **options})


def cast(architecture: str = "llama", seed: int = 3, adapter_name: str = "default", **options):
    """A model with a random adapter on all linear layers, on llama by default on two."""
    if architecture != "llama":
        options = {"target_modules": "all-linear", "r": 4, **options}
    return stirred(get_peft_model(base_model(architecture), cast_config(seed, **options), adapter_name), seed).eval()


def two_adapters(architecture: str = "llama", names=("default", "other"), **options):
    """Two different adapters, the first active."""
    model = cast(architecture, adapter_name=names[0], **options)
    if architecture != "llama":
        options = {"target_modules": "all-linear", "r": 3, **options}
    model.add_adapter(names[1], cast_config(4, **options))
    return stirred(model, 4, names[1]).eval()


def stirred(model, seed: int, adapter_name: str = "default"):
    """What starts at zero (MLPs, biases) gets random values."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"peft_cast_kernels.{adapter_name}." in name and name.endswith(("mlp_U", "bias")):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model, inputs=INPUTS, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=inputs, **kwargs).logits


def with_adapter(model, *names: str) -> torch.Tensor:
    """Logits with these adapters, whatever was active before."""
    before = model.active_adapters
    model.base_model.set_adapter(list(names))
    result = logits(model)
    model.base_model.set_adapter(before)
    return result


def without_adapter(model) -> torch.Tensor:
    with model.disable_adapter():
        return logits(model)


def layer(model, name: str = Q_PROJ):
    return model.get_base_model().get_submodule(name)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def differs(a: torch.Tensor, b: torch.Tensor, by: float = 1e-2) -> bool:
    return bool((a.float() - b.float()).abs().max() > by)
