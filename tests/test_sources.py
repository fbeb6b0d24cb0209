"""Every kind of adapter that can be a source: what becomes of it, and what is said about the rest.

Exact kinds are held to the outputs: on a copy of the source itself the closed form must recover the adapter.
docs/sources.md has a row for each kind here.
"""

import copy
import json
import re
import warnings
from contextlib import contextmanager

import peft
import pytest
import torch
from conftest import ALL_LINEAR, ROOT, c4_texts, make_lora, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from test_translate import assert_untouched, snapshot
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import peft_cast
from peft_cast.models import skeleton
from peft_cast.models.restoring import untouched
from peft_cast.source.kernels import leading_triplets, low_rank_kernel
from peft_cast.source.loading import adapted_source, check_adapter


FEW = ["q_proj", "down_proj"]
IDS = torch.arange(5, 25)[None]
FILE = "adapter_model.safetensors"


@pytest.fixture
def source(byte_tokenizer):
    return tiny_model("llama", len(byte_tokenizer))


def save_adapter(model, config, folder, size: float = 0.1, plain=None, **save_options) -> str:
    """Put an adapter with an effect on a copy of `model` and save it."""
    torch.manual_seed(1)
    adapted = get_peft_model(copy.deepcopy(model), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)
    adapted.save_pretrained(folder, **save_options)
    return str(folder)


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": FEW, "task_type": "CAUSAL_LM", **options})


@contextmanager
def opened(source, adapter, **options):
    """`adapted_source` as it is used: frozen, with flags and modes put back."""
    with untouched(source), adapted_source(source, adapter, **options) as on_source:
        yield on_source


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def from_file(model, adapter: str) -> torch.Tensor:
    """What PEFT alone makes of the adapter."""
    return outputs(PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval())


def closed_form(source, adapter, tokenizer, target=None, **options):
    settings = {"text": c4_texts(60), "fit_samples": 40, "eval_samples": 8, "max_length": 96, "progress": False}
    return peft_cast.translate(
        source,
        adapter,
        target or copy.deepcopy(source),
        source_tokenizer=tokenizer,
        target_tokenizer=tokenizer,
        **{"steps": 0, "first_maps": "closed_form", **settings, **options},
    )


# Kinds whose weight change a kernel holds whole: configuration and the rank that the kernels must have.
EXACT = {
    "LoRA": (lora(), 4),
    "rank_pattern": (lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 32}), 4),
    "rsLoRA": (lora(use_rslora=True), 4),
    "layers_to_transform": (lora(layers_to_transform=[0, 2]), 4),
    "regex targets": (lora(target_modules=r".*\.(0|2)\.self_attn\.(q|v)_proj"), 4),
    "all-linear": (lora(target_modules="all-linear"), 4),
    "exclude_modules": (lora(exclude_modules=r".*layers\.1.*"), 4),
    "gaussian": (lora(init_lora_weights="gaussian"), 4),
    "EVA": (lora(init_lora_weights="eva"), 4),
    "orthogonal": (lora(init_lora_weights="orthogonal"), 4),
    "MiCA": (lora(init_lora_weights="mica"), 4),
    "PiSSA": (lora(init_lora_weights="pissa"), 8),
    "OLoRA": (lora(init_lora_weights="olora"), 8),
    "KaSA": (lora(kasa_config=KasaConfig()), 8),
    "VeLoRA": (lora(velora_config=VeloraConfig(num_groups=4)), 4),
    "MonteCLoRA": (lora(monteclora_config=MontecloraConfig()), 4),
    "BD-LoRA": (lora(use_bdlora=BdLoraConfig(["q_proj"], ["down_proj"], nblocks=2)), 4),
    "target_parameters (2-D)": (lora(target_parameters=["mlp.up_proj.weight"]), 4),
    "layer_replication": (lora(layer_replication=[[0, 2], [1, 3]]), 4),
    "AdaLoRA": (peft.AdaLoraConfig(target_modules=FEW, total_step=9, init_r=6, task_type="CAUSAL_LM"), 6),
    "LoHa": (peft.LoHaConfig(r=2, target_modules=FEW), 4),
    "VeRA": (peft.VeraConfig(r=6, target_modules=FEW), 6),
    "HRA": (peft.HRAConfig(r=4, target_modules=FEW), 4),
    "DeLoRA": (peft.DeloraConfig(r=4, target_modules=FEW), 4),
    "MiSS": (peft.MissConfig(r=4, target_modules=FEW), 4),
    "VB-LoRA": (peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=16, target_modules=FEW), 4),
    "CAST": (peft_cast.CastConfig(r=4, target_modules=FEW, init_weights=False), 4),
    "TinyLoRA": (peft.TinyLoraConfig(r=4, target_modules=FEW), 4),
}
# Kinds whose weight change has full rank.
APPROXIMATED = {
    "DoRA": lora(use_dora=True),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoKr": peft.LoKrConfig(r=4, target_modules=FEW),
    "OFT": peft.OFTConfig(oft_block_size=4, target_modules=FEW),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=FEW),
    "FourierFT": peft.FourierFTConfig(n_frequency=64, target_modules=FEW),
    "RandLoRA": peft.RandLoraConfig(r=4, target_modules=FEW),
    "SHiRA": peft.ShiraConfig(r=4, target_modules=FEW),
    "HiRA": peft.HiraConfig(r=4, target_modules=FEW),
    "C3A": peft.C3AConfig(block_size=16, target_modules=FEW),
    "WaveFT": peft.WaveFTConfig(n_frequency=64, target_modules=FEW),
}
# What no kernel holds: configuration and what is said of it.
REPORTED = {
    "bias='all'": (lora(bias="all"), "opt", {("model.decoder.layers.0.fc1", "trained bias")}),
    "bias='lora_only'": (lora(bias="lora_only"), "opt", {("model.decoder.layers.0.self_attn.q_proj", "trained bias")}),
    "lora_bias": (lora(lora_bias=True), "opt", {("model.decoder.layers.1.self_attn.q_proj", "trained bias")}),
    "modules_to_save (head)": (
        lora(modules_to_save=["lm_head"]),
        "llama",
        {("lm_head", "module trained in full (modules_to_save)")},
    ),
    "modules_to_save (embedding)": (
        lora(modules_to_save=["embed_tokens"]),
        "llama",
        {("model.embed_tokens", "module trained in full (modules_to_save)")},
    ),
    "modules_to_save (norm)": (
        lora(modules_to_save=["norm"]),
        "llama",
        {("model.norm", "module trained in full (modules_to_save)")},
    ),
    "LoRA on the embedding": (
        lora(target_modules=[*FEW, "embed_tokens"]),
        "llama",
        {("model.embed_tokens", "adapter on an Embedding")},
    ),
    "LoRA on the head": (lora(target_modules=[*FEW, "lm_head"]), "llama", {("lm_head", "adapter on the output head")}),
    "trainable_token_indices": (
        lora(trainable_token_indices=[7, 9]),
        "llama",
        {("model.embed_tokens", "trained tokens")},
    ),
    "target_parameters (experts)": (
        lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], target_modules=["q_proj"]),
        "mixtral",
        {
            ("model.layers.0.mlp.experts", "adapter on the parameter 'gate_up_proj' (target_parameters)"),
            ("model.layers.0.mlp.experts", "adapter on the parameter 'down_proj' (target_parameters)"),
        },
    ),
    "aLoRA": (
        lora(alora_invocation_tokens=[5, 6]),
        "llama",
        {("every adapted module", "activation after the invocation tokens only (aLoRA)")},
    ),
}
REFUSED = {
    "prompt tuning": (peft.PromptTuningConfig(num_virtual_tokens=4), "PROMPT_TUNING, which adds virtual tokens"),
    "prefix tuning": (peft.PrefixTuningConfig(num_virtual_tokens=4), "PREFIX_TUNING, which adds virtual tokens"),
    "sequence classification": (lora(task_type="SEQ_CLS"), "task type SEQ_CLS"),
    "PiSSA by fast SVD": (lora(init_lora_weights="pissa_niter_4"), "initialization \\(pissa_niter_4\\)"),
    "LoRA-GA": (lora(init_lora_weights="lora_ga"), "path_initial_model_for_weight_conversion"),
    "CorDA": (lora(init_lora_weights="corda"), "initialization \\(corda\\)"),
    "LoftQ": (lora(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "pass the changed model as `source`"),
    "Lily": (peft.LilyConfig(r=4, target_modules=FEW), "not linear in the module's input"),
    "X-LoRA": (peft.XLoraConfig(hidden_size=32, adapters={}), "mixes other adapters token by token"),
    "Poly": (peft.PolyConfig(r=4, target_modules=FEW), "needs task ids"),
    "LN tuning": (peft.LNTuningConfig(target_modules=["norm"]), "model.norm: adapter on a normalization layer"),
    "trainable tokens alone": (
        peft.TrainableTokensConfig(token_indices=[7], target_modules=["embed_tokens"]),
        "embed_tokens: trained tokens",
    ),
    "BEFT": (peft.BeftConfig(target_modules=["v_proj"]), "v_proj: trained bias"),
}


def kernels_alone(source, adapter, **options) -> torch.Tensor:
    """Outputs of the plain source with the kernels added to its weights."""
    plain = copy.deepcopy(source)
    with opened(source, adapter, **options) as on_source:
        for name, kernel in on_source.kernels.items():
            delta = kernel.scaling * kernel.B @ kernel.A
            weight = plain.get_submodule(name).weight
            weight.data += delta if weight.shape == delta.shape and type(plain) is not GPT2LMHeadModel else delta.T
    return outputs(plain)


@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind != "layer_replication"])
def test_exact_kinds_are_recovered_on_the_same_model(kind, source, byte_tokenizer, tmp_path):
    config, rank = EXACT[kind]
    adapter = save_adapter(source, config, tmp_path, size=0.4 if kind in ("AdaLoRA", "VeRA", "VB-LoRA") else 0.1)
    expected, before = from_file(source, adapter), snapshot(source)
    assert (outputs(source) - expected).abs().max() > 0.1
    torch.testing.assert_close(kernels_alone(source, adapter), expected, rtol=1e-3, atol=1e-3)
    assert_untouched(source, before)
    result = closed_form(source, adapter, byte_tokenizer)
    account, kl = result.metrics["source"], result.metrics["kl"]
    assert account["rank"] == rank and account["not_carried"] == []
    assert all(error < 1e-5 for error in account["converted"].values())
    assert kl["target"] > 0.01
    assert 1 - kl["closed_form"] / kl["target"] >= 0.99
    assert_untouched(source, before)


def test_replicated_layers_are_translated_and_taken_off_again(source, byte_tokenizer, tmp_path):
    adapter = save_adapter(source, EXACT["layer_replication"][0], tmp_path)
    before, deeper = snapshot(source), copy.deepcopy(source)
    deeper = PeftModel.from_pretrained(deeper, adapter).unload()
    assert len(deeper.model.layers) == 4
    result = closed_form(source, adapter, byte_tokenizer, target=deeper)
    kl = result.metrics["kl"]
    assert result.metrics["source"]["rank"] == EXACT["layer_replication"][1] and not result.module_map.unmapped
    assert kl["target"] > 0.01 and 1 - kl["closed_form"] / kl["target"] >= 0.99
    assert_untouched(source, before)
    with pytest.raises(ValueError, match="replicates layers"):
        peft_cast.baselines.direct_copy(source, adapter, tiny_model("llama", 300))


@pytest.mark.parametrize("kind", APPROXIMATED)
def test_approximated_kinds_report_their_true_error(kind, source, tmp_path):
    config = APPROXIMATED[kind]
    adapter = save_adapter(source, config, tmp_path)
    merged = PeftModel.from_pretrained(copy.deepcopy(source), adapter).merge_and_unload()
    before, plain = snapshot(source), dict(source.named_parameters())
    means = []
    for rank in (2, 6):
        with opened(source, adapter, source_rank=rank) as on_source:
            kernels, errors = on_source.kernels, on_source.converted
        assert kernels.keys() == errors.keys() and {len(k.A) for k in kernels.values()} == {rank}
        for name, kernel in kernels.items():
            own = plain[f"{name}.weight"]
            delta = (merged.get_submodule(name).weight - own).detach()
            error = (delta - kernel.scaling * kernel.B @ kernel.A).norm() / delta.norm()
            assert errors[name] == pytest.approx(float(error), abs=2e-3)
            best = torch.linalg.svdvals(delta)[rank:].norm() / delta.norm()
            assert errors[name] == pytest.approx(float(best), abs=2e-3)
        means.append(sum(errors.values()) / len(errors))
    assert means[1] < means[0] - 0.01 and means[0] > 0.05
    expected = from_file(source, adapter)
    assert (outputs(source) - expected).abs().max() > 0.1
    # Every singular direction kept, the kernels are the adapter.
    torch.testing.assert_close(kernels_alone(source, adapter, source_rank=32), expected, rtol=1e-3, atol=2e-3)
    assert_untouched(source, before)


def test_the_teacher_of_an_approximated_kind_is_the_original(source, byte_tokenizer, tmp_path):
    adapter = save_adapter(source, lora(use_dora=True), tmp_path)
    expected = from_file(source, adapter)
    with opened(source, adapter, source_rank=1) as on_source:
        assert torch.equal(outputs(on_source.model), expected)
    coarse, fine = (closed_form(source, adapter, byte_tokenizer, source_rank=r) for r in (1, 32))
    account = coarse.metrics["source"]
    assert account["type"] == "LORA (use_dora)" and account["rank"] == 1
    assert any("pass a larger `source_rank`" in sentence for sentence in coarse.diagnosis())
    assert "6 weight changes approximated, mean relative error" in coarse.summary()
    assert fine.metrics["kl"]["closed_form"] < 0.01 * fine.metrics["kl"]["target"]
    assert coarse.metrics["kl"]["closed_form"] > 10 * fine.metrics["kl"]["closed_form"]
    json.dumps(account)


def test_the_cache_tells_ranks_and_scalings_apart(source, byte_tokenizer, tmp_path):
    adapter = save_adapter(source, lora(use_dora=True), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    for alpha, rank in ((8, 2), (8, 6), (16, 6)):
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": alpha}))
        runs = [
            closed_form(source, adapter, byte_tokenizer, source_rank=rank, cache_dir=folder).metrics
            for folder in (tmp_path / "cache", None)
        ]
        assert runs[0]["kl"] == pytest.approx(runs[1]["kl"], rel=1e-3)
    assert len(list((tmp_path / "cache").glob("closed_form_*"))) == 3


def test_a_share_of_the_energy_chooses_the_rank_as_peft_does(source, tmp_path):
    adapter = save_adapter(source, peft.LoKrConfig(r=4, target_modules=FEW), tmp_path)
    _, state = peft.convert_to_lora(PeftModel.from_pretrained(copy.deepcopy(source), adapter), rank=0.9)
    with opened(source, adapter, source_rank=0.9) as on_source:
        for name, kernel in on_source.kernels.items():
            A, B = (state[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            assert A.shape == kernel.A.shape
            torch.testing.assert_close(kernel.B @ kernel.A, B @ A, rtol=1e-3, atol=1e-5)
            assert on_source.converted[name] <= 0.1**0.5


def test_default_rank_keeps_low_ranks_whole_and_cuts_high_ones():
    torch.manual_seed(0)
    low = torch.randn(200, 64, dtype=torch.float64) @ torch.randn(64, 300, dtype=torch.float64)
    full = torch.randn(200, 300, dtype=torch.float64)
    kernel, error = low_rank_kernel(low, None, default=16)
    assert len(kernel.A) == 64 and error < 1e-6
    kernel, error = low_rank_kernel(full, None, default=16)
    assert len(kernel.A) == 16 and 0.5 < error < 1
    assert len(low_rank_kernel(full, 20, default=16)[0].A) == 20


def test_leading_directions_of_a_large_delta_are_those_of_the_full_decomposition():
    torch.manual_seed(0)
    spectrum = torch.linspace(0, -6, 900, dtype=torch.float64).exp()
    left, right = (torch.linalg.qr(torch.randn(n, 900, dtype=torch.float64)).Q for n in (1000, 900))
    delta = (left * spectrum) @ right.T
    U, S, Vh = leading_triplets(delta, 64)  # few of many: by iteration
    best = (left[:, :64] * spectrum[:64]) @ right[:, :64].T
    least = (delta - best).norm()
    assert S.shape == (64,) and (delta - (U * S) @ Vh).norm() < 1.001 * least


@pytest.mark.parametrize("kind", REPORTED)
def test_what_no_kernel_holds_is_named_and_stays_in_the_teacher(kind, byte_tokenizer, tmp_path):
    config, architecture, named = REPORTED[kind]
    source = reported_source(architecture, len(byte_tokenizer))
    adapter = save_adapter(source, config, tmp_path)
    expected, before, plain = from_file(source, adapter), snapshot(source), outputs(source)
    with opened(source, adapter) as on_source:
        assert torch.equal(outputs(on_source.model), expected)
        with on_source.model.disable_adapter():
            assert torch.equal(outputs(on_source.model), plain)
        assert torch.equal(outputs(on_source.model), expected)
    assert_untouched(source, before)
    result = closed_form(source, adapter, byte_tokenizer, steps=2, max_length=48)
    assert_untouched(source, before)
    found = {(part["module"], part["what"]) for part in result.metrics["source"]["not_carried"]}
    assert named <= found and result.metrics["source"]["converted"] == {}
    assert {what for _, what in found} == {what for _, what in named}
    what = next(iter(named))[1]
    assert any("No kernel expresses these parts" in sentence and what in sentence for sentence in result.diagnosis())
    assert f"not carried over: {what}" in result.summary() or len(named) > 1 and what in result.summary()


def reported_source(architecture, vocab_size):
    if architecture == "mixtral":
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return MixtralForCausalLM(
            MixtralConfig(vocab_size=vocab_size, num_key_value_heads=2, num_local_experts=4, **sizes)
        ).eval()
    model = tiny_model(architecture, vocab_size)
    if architecture == "opt":
        names = {"down_proj": "fc2"}
        for config, other, _ in REPORTED.values():
            if other == "opt":
                config.target_modules = {names.get(name, name) for name in config.target_modules}
    return model


def test_shared_projections_are_in_the_file_or_made_anew(source, tmp_path):
    kind = {"r": 6, "target_modules": FEW}
    anew = save_adapter(source, peft.VeraConfig(**kind, save_projection=False), tmp_path / "anew", size=0.4)
    expected = from_file(source, anew)
    with pytest.warns(UserWarning, match="made anew from `projection_prng_key`"), opened(source, anew) as on_source:
        torch.testing.assert_close(outputs(on_source.model), expected)
    saved = save_adapter(source, peft.VeraConfig(**kind), tmp_path / "saved", size=0.4)
    tensors, config = load_file(tmp_path / "saved" / FILE), (tmp_path / "saved" / "adapter_config.json").read_text()
    for lacking, is_saved, words in (
        (("vera_B",), "true", "a file that is cut: it holds no `vera_B`, which its modules share"),
        (("vera_A", "vera_B"), "true", "`save_projection` is true, and `vera_A` is not in its file. Correct it"),
        ((), "false", "`save_projection` is false, and `vera_A` is in its file. Correct it"),
    ):
        kept = {name: one for name, one in tensors.items() if name.split(".")[-1] not in lacking}
        save_file(kept, tmp_path / "saved" / FILE, metadata={"format": "pt"})
        changed = config.replace('"save_projection": true', f'"save_projection": {is_saved}')
        (tmp_path / "saved" / "adapter_config.json").write_text(changed)
        with pytest.raises(ValueError, match=words):
            check_adapter(saved)


@pytest.mark.parametrize("kind", ["bias='all'", "lora_bias", "modules_to_save (head)", "LoRA on the head"])
def test_what_peft_says_to_who_trains_is_left_out(kind, tmp_path):
    config, architecture, _ = REPORTED[kind]
    tied = reported_source({"llama": "gemma3"}.get(architecture, architecture), 300)
    adapter = save_adapter(tied, config, tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with opened(tied, adapter) as on_source, on_source.model.disable_adapter():
            outputs(on_source.model)
    assert not [str(one.message) for one in said if "/peft/" in one.filename]


@pytest.mark.parametrize("kind", ["modules_to_save (head)", "LoRA on the head"])
def test_the_adapted_head_speaks_in_the_teacher(kind, source, byte_tokenizer, tmp_path):
    # Distances are taken with a head of the shared tokens alone; an adapter on the head must not get lost on the way.
    adapter = save_adapter(source, REPORTED[kind][0], tmp_path, size=0.3)
    ids = torch.tensor([7, 3, 250])
    with opened(source, adapter) as on_source:
        full = outputs(on_source.model)
        with on_source.model.disable_adapter():
            plain = outputs(on_source.model)
        with peft_cast.models.shared_head(source, ids):
            torch.testing.assert_close(outputs(on_source.model), full[..., ids])
            with on_source.model.disable_adapter():
                torch.testing.assert_close(outputs(on_source.model), plain[..., ids])
    assert (full - plain).abs().max() > 0.1


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_kinds_say_why(kind, source, byte_tokenizer, tmp_path):
    config, message = REFUSED[kind]
    if kind in ("sequence classification", "LoRA-GA", "PiSSA by fast SVD", "CorDA", "LoftQ"):
        make_lora(source, tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        saved |= {name: getattr(config, name) for name in ("task_type", "init_lora_weights", "loftq_config")}
        (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    elif kind in ("prompt tuning", "prefix tuning", "X-LoRA", "Poly"):
        config.save_pretrained(tmp_path)
    else:
        save_adapter(source, config, tmp_path)
    before = snapshot(source)
    with pytest.raises(ValueError, match=message) as error:
        closed_form(source, str(tmp_path), byte_tokenizer)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert_untouched(source, before)


@pytest.mark.parametrize("rank", [0, -1, 1.5, 0.0, True, "8"])
def test_bad_ranks(rank, source, byte_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`source_rank` must be a whole number from 1 or a share"):
        closed_form(source, make_lora(source, tmp_path), byte_tokenizer, source_rank=rank)


def gpt2(vocab_size: int):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=3, n_head=4, n_positions=256)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "c_" in name:
            parameter.data.normal_(std=parameter.shape[0] ** -0.5)
    return model


@pytest.mark.parametrize("options", [{"fan_in_fan_out": True}, {}, {"use_dora": True, "fan_in_fan_out": True}])
def test_conv1d_sources_are_read_the_right_way_round(options, byte_tokenizer, tmp_path):
    source = gpt2(len(byte_tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out itself
        adapter = save_adapter(source, lora(target_modules=["c_fc", "attn.c_proj", "mlp.c_proj"], **options), tmp_path)
    expected = from_file(source, adapter)
    assert (outputs(source) - expected).abs().max() > 0.1
    torch.testing.assert_close(kernels_alone(source, adapter, source_rank=32), expected, rtol=1e-3, atol=1e-3)
    result = closed_form(source, adapter, byte_tokenizer, source_rank=32)
    kl = result.metrics["kl"]
    assert 1 - kl["closed_form"] / kl["target"] >= 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(dtype, source, tmp_path):
    adapter = make_lora(source, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    with opened(source, adapter) as on_source:
        assert all(kernel.A.dtype == kernel.B.dtype == torch.float32 for kernel in on_source.kernels.values())
    torch.testing.assert_close(kernels_alone(source, adapter), from_file(source, adapter), rtol=1e-3, atol=1e-3)


def test_dora_on_a_half_precision_model_is_measured_without_its_rounding(source, tmp_path):
    adapter = save_adapter(source, lora(use_dora=True), tmp_path, size=0.01)
    source.to(torch.bfloat16)
    exact = copy.deepcopy(source).float()
    with opened(source, adapter, source_rank=32) as low, opened(exact, adapter, source_rank=32) as high:
        for name, kernel in low.kernels.items():
            expected = high.kernels[name].B @ high.kernels[name].A
            error = (kernel.B @ kernel.A - expected).norm() / expected.norm()
            assert error < 0.1, name  # differences of bfloat16 outputs would be off by about as much as the delta


def test_adapters_of_other_peft_versions(source, tmp_path):
    adapter = make_lora(source, tmp_path)
    expected, file = from_file(source, adapter), tmp_path / "adapter_config.json"
    full = json.loads(file.read_text())
    old = {name: full[name] for name in ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules")}
    new = {**full, "an_option_of_the_future": {"x": 1}}
    for config in (old, new):
        file.write_text(json.dumps(config))
        with opened(source, adapter) as on_source:
            assert len(on_source.kernels) == 3 * len(ALL_LINEAR)
            torch.testing.assert_close(outputs(on_source.model), expected)


def test_pickled_weights_are_refused(source, byte_tokenizer, tmp_path):
    adapter = make_lora(source, tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.bin\), which are not read.*convert them to safetensors"):
        closed_form(source, adapter, byte_tokenizer)


def test_pissa_converted_by_peft_is_a_plain_lora(source, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(source), lora(init_lora_weights="pissa"))
    adapted.save_pretrained(tmp_path / "start")
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    expected = outputs(adapted.eval())
    adapted.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    with opened(source, tmp_path / "end") as on_source:
        assert on_source.kind == "LORA" and not on_source.converted
        assert {len(kernel.A) for kernel in on_source.kernels.values()} == {8}
    torch.testing.assert_close(kernels_alone(source, tmp_path / "end"), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="save it with `save_pretrained\\(folder\\)` and pass the folder"):
        with opened(adapted.get_base_model(), adapted):
            pass


@pytest.mark.parametrize("config", [lora(target_modules=["q_proj", name]) for name in ("lm_head", "embed_tokens")])
@pytest.mark.parametrize("weights", [True, False])
def test_so_does_one_under_a_lora_on_the_head_or_the_embeddings(weights, config, source, tmp_path):
    larger = copy.deepcopy(source)
    larger.resize_token_embeddings(305, mean_resizing=False)
    adapter = save_adapter(larger, config, tmp_path)
    with pytest.raises(ValueError, match=r"vocabulary of 305 tokens.* has 300: .*`resize_token_embeddings\(305\)`"):
        opened(source if weights else skeleton(source.config), adapter).__enter__()


def test_a_resized_vocabulary_says_what_to_do(source, byte_tokenizer, tmp_path):
    size = len(byte_tokenizer)
    larger = copy.deepcopy(source)
    larger.resize_token_embeddings(size + 5, mean_resizing=False)
    larger.config._name_or_path = ""
    adapter = save_adapter(larger, lora(modules_to_save=["embed_tokens", "lm_head"]), tmp_path)
    before = snapshot(source)
    with pytest.raises(ValueError, match=rf"vocabulary of {size + 5} tokens.*`resize_token_embeddings\({size + 5}\)`"):
        closed_form(source, adapter, byte_tokenizer)
    assert_untouched(source, before)
    target = copy.deepcopy(source)
    source.resize_token_embeddings(size + 5, mean_resizing=False)
    account = closed_form(source, adapter, byte_tokenizer, target=target).metrics["source"]
    assert {part["module"] for part in account["not_carried"]} == {"model.embed_tokens", "lm_head"}


def test_a_changed_embedding_in_the_file_is_reported_and_put_back(source, tmp_path):
    changed = copy.deepcopy(source)
    changed.model.embed_tokens.weight.data += 0.1
    adapter = save_adapter(changed, lora(), tmp_path, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter_model.safetensors")
    before, expected, plain = snapshot(source), from_file(source, adapter), outputs(source)
    with opened(source, adapter) as on_source:
        assert ("model.embed_tokens", "weights of the base model in the adapter's file") in on_source.not_carried
        assert torch.equal(outputs(on_source.model), expected)
        with on_source.model.disable_adapter():
            assert torch.equal(outputs(on_source.model), plain)
    assert_untouched(source, before)


@pytest.mark.parametrize("kind", ["DoRA", "IA3"])
def test_an_approximated_adapter_in_memory(kind, source, byte_tokenizer, tmp_path):
    adapter = save_adapter(source, APPROXIMATED[kind], tmp_path)
    adapted = PeftModel.from_pretrained(copy.deepcopy(source), adapter)
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    target = copy.deepcopy(source)
    in_memory = closed_form(None, adapted, byte_tokenizer, target=target, source_rank=32)
    assert all(torch.equal(state[name], tensor) for name, tensor in adapted.state_dict().items())
    from_folder = closed_form(source, adapter, byte_tokenizer, source_rank=32)
    assert in_memory.metrics["kl"] == pytest.approx(from_folder.metrics["kl"], rel=1e-4)
    assert in_memory.metrics["source"]["converted"].keys() == from_folder.metrics["source"]["converted"].keys()


def test_trained_biases_of_an_adapter_in_memory_are_named(byte_tokenizer, tmp_path):
    source = tiny_model("opt", len(byte_tokenizer))
    config = lora(target_modules=["q_proj"], bias="lora_only", init_lora_weights=False)
    adapted = get_peft_model(source, config)
    with opened(source, adapted) as on_source:
        assert on_source.not_carried == tuple(
            (f"model.decoder.layers.{i}.self_attn.q_proj", "trained bias") for i in range(3)
        )


def filled(part: str, value: float):
    def change(model):
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.data.fill_(value)

    return change


IDLE = {
    "B": (lora(init_lora_weights=True), lambda model: None, "changes nothing: all of its B is zero"),
    "A": (lora(init_lora_weights=False), filled("lora_A", 0), "changes nothing: all of its A is zero"),
    "alpha": (lora(init_lora_weights=False, lora_alpha=0), lambda model: None, "`lora_alpha` is 0"),
    "DoRA": (lora(use_dora=True), lambda model: None, r"\(use_dora\) adapter.* changes nothing"),
    **{
        type(config).__name__: (config, lambda model: None, f"changes nothing: all of its {part} is zero")
        for part, config in {
            "hada_w2_b": peft.LoHaConfig(r=2, target_modules=FEW),
            "lokr_w1": peft.LoKrConfig(r=4, target_modules=FEW),
            "oft_R": peft.OFTConfig(oft_block_size=4, target_modules=FEW),
            "vera_lambda_b": peft.VeraConfig(r=6, target_modules=FEW),
            "fourierft_spectrum": peft.FourierFTConfig(n_frequency=64, init_weights=True, target_modules=FEW),
            "E": peft.AdaLoraConfig(target_modules=FEW, total_step=9, task_type="CAUSAL_LM"),
        }.items()
    },
    "all but the head": (lora(modules_to_save=["lm_head"]), filled("lm_head", 1), "changes no linear layer: all of"),
    "all but biases": (lora(lora_bias=True), filled("lora_B.default.bias", 1), "Nothing .*: trained bias"),
    "disabled": (
        lora(init_lora_weights=False),
        lambda model: model.base_model.disable_adapter_layers(),
        "`adapter.base_model.enable_adapter_layers",
    ),
    "NaN": (lora(init_lora_weights=False), filled("lora_A", float("nan")), "NaN or infinite numbers"),
}


@pytest.mark.parametrize("kind", IDLE)
def test_adapters_that_do_nothing_are_refused_in_memory_and_in_files(kind, source, tmp_path):
    config, change, message = IDLE[kind]
    adapted = get_peft_model(copy.deepcopy(source), copy.deepcopy(config))
    change(adapted)
    adapted.save_pretrained(tmp_path)
    cases = [(adapted.get_base_model(), adapted), (source, tmp_path)]
    for model, adapter in cases[:1] if kind == "disabled" else cases:  # a file does not say so
        with pytest.raises(ValueError, match=message):
            opened(model, adapter).__enter__()


def test_dora_with_trained_magnitudes_alone_is_read(source, tmp_path):
    adapted = get_peft_model(copy.deepcopy(source), lora(use_dora=True))
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.2
    adapted.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    with opened(source, tmp_path) as on_source:
        assert len(on_source.kernels) == 6


def test_baselines_take_other_adapters_too(source, tmp_path):
    adapter = save_adapter(source, APPROXIMATED["DoRA"], tmp_path)
    copied = peft_cast.baselines.direct_copy(source, adapter, copy.deepcopy(source), source_rank=32)
    torch.testing.assert_close(outputs(copied), from_file(source, adapter), rtol=1e-3, atol=1e-3)
    crossed = peft_cast.baselines.cross_lora(source, adapter, copy.deepcopy(source), rank=32, source_rank=3)
    ranks = {m.r["default"] for m in crossed.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert ranks == {3}


def test_convolutions_are_left_out_and_named(source, tmp_path):
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv1d(32, 32, 1)

        def forward(self, x):
            return self.mix(x.transpose(1, 2)).transpose(1, 2)

    source.model.layers[0].mlp = Mixer()
    adapter = save_adapter(source, lora(target_modules=["q_proj", "mix"]), tmp_path)
    with opened(source, adapter) as on_source:
        assert on_source.not_carried == (("model.layers.0.mlp.mix", "adapter on a Conv1d"),)
        assert set(on_source.kernels) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}


def test_the_docs_have_a_row_for_every_kind():
    page = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    first = page.partition("## What every verb does")[0]
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", first, flags=re.MULTILINE))
    for kinds, outcome in (
        (EXACT, "exact"),
        (APPROXIMATED, "approximated"),
        (REPORTED, "reported"),
        (REFUSED, "refused"),
    ):
        listed = {kind for kind, found in rows.items() if found == outcome}
        assert listed == set(kinds), outcome
